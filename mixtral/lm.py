"""LM: a model, its tokenizer and its configuration in one object. `mixtral.load(path)` is the way in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.config.formats import read_config
from mixtral.engine import SamplingParams, generate, recommended, stream, with_recommended, within_vocabulary
from mixtral.engine.generate import check_prompt
from mixtral.engine.native import NativeModel, suits
from mixtral.errors import UsageError
from mixtral.files import atomic_folder
from mixtral.hardware import has_fast_bf16
from mixtral.model import Mixtral, Output, Ragged, named_state
from mixtral.moe import Routing
from mixtral.quant.load import load_quantised
from mixtral.quant.scheme import PACKED, read_scheme
from mixtral.runtime import choose_device, choose_dtype
from mixtral.shipped import model_folder
from mixtral.tokenizer import Tokenizer
from mixtral.weights import load_state
from mixtral.weights.convert import with_token_ids, write_tokenizer
from mixtral.weights.finite import require_range
from mixtral.weights.gguf_tokenizer import read_tokenizer, side_files
from mixtral.weights.load import open_weights
from mixtral.weights.names import fixed_dtype
from mixtral.weights.save import check_free, write_hf


class LM:
    """A language model ready to use: in evaluation mode, its parameters without gradients.

    Args:
        native: whether generation runs through the native step (engine/native.py); by default where that can stand in
            for the model, and the weights are quantised or bf16.
        sole: nobody else holds the model, so that its bf16 matrices may be freed while the native step has them packed:
            until `model` is first asked for, whole or by logits, routing or save. Else they are held twice.
        sampling: fields of SamplingParams that `generate` and `stream` go by where they are not told otherwise.
        side_files: the small files of the folder that it came from (tokenizer/side_files.py), which `save` writes too.
    """

    def __init__(
        self, model: Mixtral, tokenizer: Tokenizer | None = None, native: bool | None = None, sole: bool = False,
        sampling: Mapping[str, Any] | None = None, side_files: Mapping[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        self._model = model.eval().requires_grad_(False)
        self._sole = sole
        self.tokenizer = tokenizer
        self.native = native
        self.sampling = dict(sampling or {})
        self.side_files = dict(side_files or {})
        self._packed: tuple[list[tuple[int, int]], NativeModel] | None = None

    @property
    def model(self) -> Mixtral:
        """The model itself, whole. Whoever asks may keep it, so its matrices stay from then on."""
        if self._sole:
            if self._packed is not None:
                self._packed[1].restore()
                self._packed = self._weights_state(), self._packed[1]
            self._sole = False
        return self._model

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    @property
    def device(self) -> torch.device:
        return self._model.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.embedding.weight.dtype

    # -- generating --------------------------------------------------------------------------------------------------

    def native_step(self) -> NativeModel | None:
        """What runs the model when it generates; None: the model itself. Made anew when weights have changed.

        Raises UsageError with the reason when `native` is True and the step cannot stand in for this model.
        """
        if self.native is False or (self.native is None and not suits(self._model)):
            return None
        if self._packed is None or self._packed[0] != self._weights_state():
            self._packed = None  # before another is made beside it
            native = NativeModel(self._model, release=self._sole)
            self._packed = self._weights_state(), native
        return self._packed[1]

    def for_engine(self) -> tuple[Mixtral, NativeModel | None]:
        """The model, and what runs it, as `engine.generate` and `engine.stream` take them; the model may be emptied."""
        native = self.native_step()
        return self._model if native else self.model, native

    def _weights_state(self) -> list[tuple[int, int]]:
        """Another list once a weight was exchanged or changed."""
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in named_state(self._model).values()]

    @overload
    def generate(self, prompt: str, *, bos: bool | None = None, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], *, bos: bool | None = None, **sampling: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: list[int], **sampling: Any) -> list[int]: ...
    @overload
    def generate(self, prompt: list[list[int]], **sampling: Any) -> list[list[int]]: ...
    def generate(self, prompt: Any, *, bos: bool | None = None, **sampling: Any) -> Any:
        """Continue a prompt, or a list of prompts as one batch.

        A text is answered with text, token ids with token ids (the end token included). The prompt itself is not
        repeated.

        Args:
            bos: whether <s> stands before a text; None: as the tokenizer's files decide.
            sampling: fields of SamplingParams (max_tokens, temperature, top_k, top_p, seed, stop, ...). For others
                what the model's folder recommends, `self.sampling`, counts before the defaults.
        """
        if _is_one(prompt):
            return self.generate([prompt], bos=bos, **sampling)[0]
        if not isinstance(prompt, Sequence):
            raise UsageError(f"prompt: a text, token ids, or a list of those is wanted, not {type(prompt).__name__}")
        texts = [isinstance(p, str) for p in prompt]
        ids = [self._ids(p, bos) for p in prompt]
        model, native = self.for_engine()
        done = generate(model, ids, self._params(sampling), tokenizer=self.tokenizer, native=native)
        return [g.text if is_text else g.tokens for g, is_text in zip(done, texts, strict=True)]

    @overload
    def stream(self, prompt: str, *, bos: bool | None = None, **sampling: Any) -> Iterator[str]: ...
    @overload
    def stream(self, prompt: list[int], **sampling: Any) -> Iterator[int]: ...
    def stream(self, prompt: Any, *, bos: bool | None = None, **sampling: Any) -> Any:
        """The same as `generate` for one prompt, piece by piece as it comes: pieces of text, or token ids."""
        if not _is_one(prompt):
            raise UsageError("prompt: stream takes one prompt; generate takes a list of them")
        ids, (model, native) = self._ids(prompt, bos), self.for_engine()
        pieces = stream(model, [ids], self._params(sampling), tokenizer=self.tokenizer, native=native)
        if isinstance(prompt, str):
            return (piece.text for piece in pieces if piece.text)
        return (piece.token for piece in pieces)

    def _params(self, asked: dict[str, Any]) -> SamplingParams:
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

    @torch.no_grad()  # not inference_mode: what comes back is the caller's, to change as he likes
    def _read(self, token_ids: Sequence[int] | Tensor, k: int | None = None) -> Output:
        ids = _as_list(token_ids)
        check_prompt(ids, self.config, "token_ids")
        return self.model(Ragged.of([ids], device=self.device), k=k)

    def _ids(self, prompt: str | Sequence[int] | Tensor, bos: bool | None) -> list[int]:
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
        state = named_state(self.model)
        if any(name.endswith(PACKED) for name in state):
            raise UsageError("save: this model is quantised; copy its folder, or save the model it was made from")
        with atomic_folder(folder) as new:
            write_hf(state, self.config, new, allow_nonfinite=allow_nonfinite)
            write_tokenizer(self.tokenizer, self.side_files, new)


def load(
    path: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> LM:
    """The model of a folder (Hugging Face's, Mistral's or quantised) or GGUF file, with its tokenizer when it has one.

    Args:
        path: the folder, or "mixtral-nano" for the model that comes with the package.
        dtype: "bf16", "fp32", ...; by default (or "auto") the file's, but fp32 on a CPU that is slow in bf16.
        device: "cpu", "cuda", "cuda:1"; by default (or "auto") a GPU when there is one.
    """
    path, chosen = model_folder(path), choose_device(device)
    wanted = _dtype(dtype, chosen)
    config, scheme = read_config(path), read_scheme(path)
    opened = open_weights(path, config) if scheme is None else None  # a vocabulary takes far longer to read
    tokenizer, sampling, files = read_tokenizer(path), recommended(path), side_files(path)
    config = with_token_ids(config, path, tokenizer)
    sampling = within_vocabulary(sampling, config.vocab_size)
    if scheme is not None:
        model = load_quantised(path, config, scheme, wanted, chosen)
        return LM(model, tokenizer, sole=True, sampling=sampling, side_files=files)
    state = _one_dtype(load_state(path, config, wanted, chosen, opened=opened))
    with torch.device("meta"):
        model = Mixtral(config)
    model.load_state_dict(state, assign=True)
    return LM(model, tokenizer, sole=True, sampling=sampling, side_files=files)


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype to load in; None: the file's."""
    if dtype not in (None, "auto"):
        return choose_dtype(dtype, device)
    return torch.float32 if device.type == "cpu" and not has_fast_bf16(device) else None


def _one_dtype(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cast, tensor by tensor, to the dtype that most weights have: a file may mix them, the model does not."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel()
    dtype = sizes.most_common(1)[0][0]
    for name in state:
        wanted = fixed_dtype(name) or dtype
        require_range(name, state[name], wanted)
        state[name] = state[name].to(wanted)
    return state


def _is_one(prompt: object) -> bool:
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
