"""LM: a model, its tokenizer and its configuration in one object. `mixtral.load(path)` is the way in."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.engine import Engine, Generation, KVPool, SamplingParams, with_recommended
from mixtral.engine.continuation import check_prompt
from mixtral.engine.native_runner import NativeRunner, cache_dtype, why_not
from mixtral.engine.runner import Runner, TorchRunner
from mixtral.engine.speculative import PromptLookup
from mixtral.errors import UsageError, did_you_mean
from mixtral.files import atomic_folder
from mixtral.hardware import has_fast_bf16
from mixtral.kernels.native import library as native
from mixtral.model import Mixtral, Output, named_state
from mixtral.model_folder import ModelFolder
from mixtral.moe import Routing
from mixtral.quant.formats import PLAIN
from mixtral.quant.load import load_quantised
from mixtral.quant.pack import UnpackedState, pack_state, packed_modules
from mixtral.runtime import choose_device, choose_dtype
from mixtral.tokenizer import Tokenizer
from mixtral.weights import load_state
from mixtral.weights.convert import write_tokenizer
from mixtral.weights.finite import require_range
from mixtral.weights.load import StateReader
from mixtral.weights.names import fixed_dtype
from mixtral.weights.save import check_free, write_hf

RUNNERS = ("auto", "native", "torch")


class LM:
    """A language model ready to use: in evaluation mode, its parameters without gradients. Threads may share it.

    Args:
        runner: what runs the model: "native" (the native step, on packed weights), "torch" (the model itself), or
            "auto": the native step where it can run the model, the fastest exact way on a CPU.
        sampling: fields of SamplingParams that `generate` and `stream` use where the caller gives none.
        side_files: the small files of the folder that it came from (tokenizer/side_files.py), which `save` writes too.
    """

    def __init__(
        self, model: Mixtral, tokenizer: Tokenizer | None = None, runner: str = "auto",
        sampling: Mapping[str, Any] | None = None, side_files: Mapping[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        if runner not in RUNNERS:
            raise UsageError(f"runner: unknown choice {runner!r}; {did_you_mean(runner, RUNNERS)}")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.wanted_runner = runner
        self.sampling = dict(sampling or {})
        self.side_files = dict(side_files or {})
        self._lock = threading.Lock()
        self._runner: tuple[list[int], Runner] | None = None  # where the weights lay when it was made
        self._engine: Engine | None = None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; of a quantised model, of its activations."""
        plain = {format.name: dtype for dtype, format in PLAIN.items()}
        dtypes = {plain.get(module.format.name) for _, module in packed_modules(self.model)}
        only = dtypes.pop() if len(dtypes) == 1 else None
        return self.model.embedding.dtype if only is None else only

    # -- generating --------------------------------------------------------------------------------------------------

    @property
    def runner(self) -> Runner:
        """What runs the model, with its cache; made anew when parts of the model have been replaced.

        Raises UsageError with the reason when "native" was asked for and the native step cannot run this model.
        """
        name, where = self.runner_name, self._addresses()
        with self._lock:
            if self._runner is None or self._runner[0] != where or self._runner[1].name != name:
                self._runner = self._engine = None  # before another one has a cache beside it
                self._runner = where, self.make_runner(name)
            return self._runner[1]

    @property
    def runner_name(self) -> str:
        """Which kind of runner it is, "native" or "torch"."""
        native_runs = self.wanted_runner == "native" or (self.wanted_runner == "auto" and not why_not(self.model))
        return "native" if native_runs else "torch"

    def make_runner(self, name: str, cache_bytes: int | None = None) -> Runner:
        """A runner of this name, "native" or "torch", with a cache of its own (KVPool.within)."""
        if name == "torch":
            pool = KVPool.within(self.config, self.model.embedding.dtype, self.device, cache_bytes)
            return TorchRunner(self.model, pool)
        return NativeRunner(self.model, KVPool.within(self.config, cache_dtype(self.model), "cpu", cache_bytes))

    @property
    def engine(self) -> Engine:
        """What `generate` and `stream` ask: it runs all that threads ask for at the same time together."""
        runner = self.runner
        with self._lock:
            if self._engine is None or self._engine.runner is not runner:
                drafter = PromptLookup() if runner.name == "native" else None  # there no answer changes by a bit
                self._engine = Engine(runner, self.tokenizer, drafter=drafter)
            return self._engine

    def why_runner(self) -> str:
        """Why it is this runner, in a few words."""
        if self.wanted_runner != "auto":
            return "asked for"
        return why_not(self.model) or "the native step can run this model, and rounds no weight"

    def _addresses(self) -> list[int]:
        """Another list once a module or tensor has been replaced; what changes in place, runners see."""
        return [tensor.data_ptr() for tensor in named_state(self.model).values()]

    @overload
    def generate(self, prompt: str, *, bos: bool | None = None, n: Literal[1] = 1, k: int | None = None,
                 **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], *, bos: bool | None = None, n: Literal[1] = 1, k: int | None = None,
                 **sampling: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: list[int], *, n: Literal[1] = 1, k: int | None = None, **sampling: Any) -> list[int]: ...
    @overload
    def generate(self, prompt: list[list[int]], *, n: Literal[1] = 1, k: int | None = None,
                 **sampling: Any) -> list[list[int]]: ...
    @overload
    def generate(self, prompt: Any, *, bos: bool | None = None, n: int, k: int | None = None,
                 **sampling: Any) -> list[Any]: ...
    def generate(self, prompt: Any, *, bos: bool | None = None, n: int = 1, k: int | None = None,
                 **sampling: Any) -> Any:  # fmt: skip
        """Continue a prompt, or a list of prompts as one batch.

        A text is answered with text, token ids with token ids (the end token included). The prompt itself is not
        repeated. `complete` gives more: log-probabilities, why it ended, routing.

        Args:
            bos: whether <s> stands before a text; None: as the tokenizer's files decide.
            n: continuations of each prompt; for more than one, a list of them stands for each prompt.
            k: how many experts a token takes; by default what the model was trained with.
            sampling: fields of SamplingParams (max_tokens, temperature, top_k, top_p, seed, stop, ...). For others
                what the model's folder recommends, `self.sampling`, counts before the defaults.
        """
        if is_one_prompt(prompt):
            return self.generate([prompt], bos=bos, n=n, k=k, **sampling)[0]
        done = self.complete(prompt, bos=bos, n=n, k=k, **sampling)
        answers = [
            [g.text if isinstance(p, str) else g.tokens for g in of_prompt]
            for p, of_prompt in zip(prompt, done, strict=True)
        ]
        return answers if n > 1 else [answer[0] for answer in answers]

    def complete(
        self, prompts: Sequence[str | Sequence[int]], *, bos: bool | None = None, n: int = 1, k: int | None = None,
        keep_routing: bool = False, **sampling: Any,
    ) -> list[list[Generation]]:  # fmt: skip
        """The `n` continuations of each prompt: tokens, text, log-probabilities, why each ended, and its routing if
        kept. Arguments as of `generate`."""
        if not isinstance(prompts, Sequence) or isinstance(prompts, str):
            raise UsageError(f"prompt: a text, token ids, or a list of those is wanted, not {type(prompts).__name__}")
        ids = [self.prompt_ids(p, bos) for p in prompts]
        done = self.engine.generate(ids, self.params(sampling), n=n, k=k, keep_routing=keep_routing)
        return [done[i : i + n] for i in range(0, len(done), n)]

    @overload
    def stream(self, prompt: str, *, bos: bool | None = None, k: int | None = None,
               **sampling: Any) -> Iterator[str]: ...
    @overload
    def stream(self, prompt: list[int], *, k: int | None = None, **sampling: Any) -> Iterator[int]: ...
    def stream(self, prompt: Any, *, bos: bool | None = None, k: int | None = None, **sampling: Any) -> Any:
        """The same as `generate` for one prompt, piece by piece as it comes: pieces of text, or token ids."""
        if not is_one_prompt(prompt):
            raise UsageError("prompt: stream takes one prompt; generate takes a list of them")
        params = self.params(sampling)
        pieces = self.engine.stream([self.prompt_ids(prompt, bos)], params, k=k)
        if isinstance(prompt, str):
            return (piece.text for piece in pieces if piece.text)
        return (piece.token for piece in pieces)

    def params(self, asked: Mapping[str, Any]) -> SamplingParams:
        """SamplingParams of some fields, what the model recommends in the place of others, and then the defaults."""
        return SamplingParams.from_dict(with_recommended(asked, self.sampling))

    # -- looking inside ----------------------------------------------------------------------------------------------

    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """The logits after each token of one sequence -> fp32 [T, V]."""
        logits_TV = self._read(token_ids).logits
        assert logits_TV is not None
        return logits_TV

    def routing(self, token_ids: Sequence[int] | Tensor, k: int | None = None) -> tuple[Routing, ...]:
        """How each layer routes the tokens of one sequence, to `k` experts each if given.

        Raises UsageError for a dense model.
        """
        if not self.config.is_sparse:
            raise UsageError("routing: this model is dense (one expert); only sparse models route their tokens")
        return self._read(token_ids, k).routing

    def _read(self, token_ids: Sequence[int] | Tensor, k: int | None = None) -> Output:
        ids = _as_list(token_ids)
        check_prompt(ids, self.config, "token_ids")
        return self.runner.read(ids, k)

    def prompt_ids(self, prompt: str | Sequence[int] | Tensor, bos: bool | None = None) -> list[int]:
        """A prompt's token ids; `bos`: whether <s> stands before a text, by default as the tokenizer's files decide."""
        if not isinstance(prompt, str):
            if bos is not None:
                raise UsageError("bos: goes with a text; token ids are taken as they are")
            return _as_list(prompt)
        if self.tokenizer is None:
            raise UsageError("prompt: this model came without a tokenizer; give token ids instead of text")
        return self.tokenizer.encode(prompt, bos, eos=False)  # which is to go on

    # -- saving ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, allow_nonfinite: bool = False) -> None:
        """Write a model folder that transformers reads too, tokenizer included; whole or not at all.

        Raises UsageError when the folder exists and is not empty, and for a quantised model; WeightsError, naming the
        tensor, for weights that are not finite unless `allow_nonfinite`.
        """
        check_free(folder)
        packed = any(True for _ in packed_modules(self.model))
        state = UnpackedState(self.model) if packed else named_state(self.model)
        with atomic_folder(folder) as new:
            write_hf(state, self.config, new, allow_nonfinite=allow_nonfinite)
            write_tokenizer(self.tokenizer, self.side_files, new)


def load(
    path: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None,
    runner: str = "auto",
) -> LM:  # fmt: skip
    """The model of a folder (Hugging Face's, Mistral's or quantised) or GGUF file, with its tokenizer when it has one.

    Args:
        path: the folder, or "mixtral-nano" for the model that comes with the package.
        dtype: "bf16", "fp32", ...; by default (or "auto") the file's, but fp32 for torch on a CPU slow in bf16.
        device: "cpu", "cuda", "cuda:1"; by default (or "auto") a GPU when there is one.
        runner: as of LM. For "auto" and "native" on a CPU the weights are packed as they are read, which is what the
            native step runs; "torch" keeps plain parameters, to be trained, hooked or changed.
    """
    chosen = choose_device(device)
    wanted = None if dtype in (None, "auto") else choose_dtype(dtype, chosen)
    if runner == "native" and (reason := cannot_pack(chosen)):
        raise UsageError(f"native step: {reason}")
    folder = ModelFolder(path)
    model = _load_model(folder, wanted, chosen, packed=runner != "torch" and not cannot_pack(chosen))
    return LM(model, folder.tokenizer, runner, folder.sampling_defaults, folder.side_files)


def _load_model(folder: ModelFolder, dtype: torch.dtype | None, device: torch.device, packed: bool) -> Mixtral:
    """The model of a folder: quantised as it is, packed as it is read, or with plain parameters."""
    config = folder.config
    if folder.quant_scheme is not None:
        return load_quantised(folder.path, config, folder.quant_scheme, dtype or _torch_dtype(device), device)
    if packed:
        reader = StateReader(folder.path, config, opened=folder.weights)
        reader.wanted_dtype = dtype or _file_dtype(reader)
        return pack_state(config, reader, reader.wanted_dtype)
    state = load_state(folder.path, config, dtype or _torch_dtype(device), device, opened=folder.weights)
    with torch.device("meta"):
        model = Mixtral(config)
    model.load_state_dict(_one_dtype(state, config), assign=True)
    return model


def cannot_pack(device: torch.device) -> str:
    """Why weights are not packed when they are loaded there; "" when they are."""
    return native.available() if device.type == "cpu" else "it runs on the CPU alone"


def _torch_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that torch is to compute in; None: the file's."""
    return torch.float32 if device.type == "cpu" and not has_fast_bf16(device) else None


def _file_dtype(reader: StateReader) -> torch.dtype:
    """The dtype that most weights have, of those that can be packed: a file may mix them, the model does not."""
    sizes: Counter[torch.dtype] = Counter()
    for name, shape in reader.shapes.items():
        dtype = reader.exact_dtype(name)
        sizes[dtype if dtype in PLAIN else torch.float32] += math.prod(shape)
    return sizes.most_common(1)[0][0]


def _one_dtype(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Cast, tensor by tensor, to the dtype that most weights have: a file may mix them, the model does not."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel()
    dtype = sizes.most_common(1)[0][0]
    for name in state:
        wanted = fixed_dtype(name, config) or dtype
        require_range(name, state[name], wanted)
        state[name] = state[name].to(wanted)
    return state


def is_one_prompt(prompt: object) -> bool:
    """Whether this is one prompt (a text, or token ids) rather than a list of prompts; an empty list holds none."""
    if isinstance(prompt, str | Tensor):
        return True
    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(t, int) for t in prompt)


def _as_list(token_ids: object) -> list[int]:
    """Token ids as a list; raises UsageError for anything else."""
    ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
    if isinstance(ids, Sequence) and all(isinstance(t, int) for t in ids):
        return list(ids)
    raise UsageError(f"token ids: a list of integers is wanted, not {type(token_ids).__name__}; "
                     "lm.tokenizer.encode(text) makes one of a text")
