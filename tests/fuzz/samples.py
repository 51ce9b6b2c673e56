"""A small valid file of every format that is read, and how a user loads it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mixtral
from mixtral.cli import main
from mixtral.config.formats import to_hf, to_mistral
from mixtral.data.loader import Loader
from mixtral.data.readers import BadInput
from mixtral.data.shards import prepare
from mixtral.data.sources import Source, documents
from mixtral.data.store import TokenData
from mixtral.engine import recommended
from mixtral.errors import MixtralError
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.tokenizer import Tokenizer, load_tokenizer, train_bpe
from mixtral.tokenizer.export import byte_characters
from mixtral.tokenizer.gguf import read_metadata
from mixtral.tokenizer.spm_model import Kind
from mixtral.train.checkpoint import load_checkpoint, write_checkpoint
from mixtral.train.compare import summarise
from mixtral.train.config import PretrainConfig
from mixtral.train.loop import Progress
from mixtral.train.run_folder import begin
from mixtral.weights import convert, save_hf, save_mistral
from mixtral.weights.gguf_write import write_gguf
from tests.train.tiny_run import fresh_state, texts, train_config
from tests.weights.test_gguf import EVEN
from tests.weights.weight_states import random_state

CONFIG = EVEN.replace(vocab_size=320, bos_id=1, eos_id=2)


class Sample(NamedTuple):
    """A folder with a valid file in it."""

    folder: Path
    file: str  # the one to be damaged
    kind: str  # as mutate.damaged has it
    load: Callable[[Path], Any]  # the folder; raises MixtralError for what is damaged


def make_samples(root: Path) -> dict[str, Sample]:
    """By name, below `root`."""
    tokenizer = train_bpe(texts() * 3, CONFIG.vocab_size)
    samples = {**_models(root, tokenizer), **_tokenizers(root, tokenizer), **_data(root, tokenizer), **_runs(root)}
    for name, sample in samples.items():  # the valid ones load, or the rest would say nothing
        shutil.copytree(sample.folder, root / "copy")
        sample.load(root / "copy")
        shutil.rmtree(root / "copy")
        assert (sample.folder / sample.file).is_file(), name
    return samples


# -- models ------------------------------------------------------------------------------------------------------------


def _models(root: Path, tokenizer: Tokenizer) -> dict[str, Sample]:
    state = random_state(CONFIG, torch.bfloat16)
    save_hf(state, CONFIG, root / "hf")
    save_hf(state, CONFIG, root / "sharded", shard_bytes=100_000)
    save_mistral(state, CONFIG, root / "mistral")
    quantise_folder(root / "hf", root / "packed", QuantScheme.of("mixed"))
    from safetensors.torch import load_file

    (root / "torch").mkdir()
    torch.save(load_file(root / "mistral/consolidated.safetensors"), root / "torch/consolidated.00.pth")
    (root / "torch/params.json").write_text(json.dumps(to_mistral(CONFIG)))
    for type in ("bf16", "q8_0"):
        (root / type).mkdir()
        write_gguf(state, CONFIG, root / type / "model.gguf", type, tokenizer)
    _write_fp8(root / "fp8", root / "hf")
    (root / "bpe").mkdir()
    write_gguf(state, CONFIG, root / "bpe/model.gguf", "bf16", _byte_level())
    (root / "whole").mkdir()
    write_gguf(state, CONFIG, root / "whole/model.gguf", "bf16", _whole(root / "given", tokenizer), _SIDE_FILES)
    (root / "config").mkdir()
    (root / "config/config.json").write_text(json.dumps(to_hf(CONFIG, "bfloat16")))
    (root / "config/generation_config.json").write_text(json.dumps(
        {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "eos_token_id": [2, 3], "bos_token_id": 1}
    ))  # fmt: skip
    return {
        "safetensors": Sample(root / "hf", "model.safetensors", "safetensors", generate),
        "safetensors convert": Sample(root / "hf", "model.safetensors", "safetensors", converted),
        "config.json": Sample(root / "hf", "config.json", "json", generate),
        "config.json info": Sample(root / "config", "config.json", "json", info),
        "generation_config.json": Sample(root / "config", "generation_config.json", "json", recommended),
        "index": Sample(root / "sharded", "model.safetensors.index.json", "json", generate),
        "params.json": Sample(root / "mistral", "params.json", "json", generate),
        "torch": Sample(root / "torch", "consolidated.00.pth", "zip", generate),
        "packed": Sample(root / "packed", "packed.safetensors", "safetensors", generate),
        "recipe": Sample(root / "packed", "config.json", "json", generate),
        "gguf": Sample(root / "bf16", "model.gguf", "bytes", lambda folder: generate(folder / "model.gguf")),
        "gguf q8_0": Sample(root / "q8_0", "model.gguf", "bytes", lambda folder: generate(folder / "model.gguf")),
        "gguf keys": Sample(root / "whole", "model.gguf", "gguf", lambda folder: generate(folder / "model.gguf")),
        "gguf bpe": Sample(root / "bpe", "model.gguf", "bytes", lambda folder: generate(folder / "model.gguf")),
        "gguf bpe keys": Sample(root / "bpe", "model.gguf", "gguf", lambda folder: generate(folder / "model.gguf")),
        "fp8": Sample(root / "fp8", "model.safetensors", "safetensors", generate),
        "fp8 config": Sample(root / "fp8", "config.json", "json", generate),
        "gguf keys convert": Sample(
            root / "whole", "model.gguf", "gguf", lambda folder: convert(folder / "model.gguf", folder / "out", "hf")
        ),
        "gguf info": Sample(root / "bf16", "model.gguf", "bytes", lambda folder: info(folder / "model.gguf")),
    }


def _write_fp8(folder: Path, plain: Path) -> None:
    """The same model in fp8, a scale for each block of 32 x 32."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        stored[name] = weight
        if ".experts." in name or "_proj" in name:
            blocks = [-(-size // 32) for size in weight.shape]
            stored |= {name: weight.to(torch.float8_e4m3fn), name + "_scale_inv": torch.ones(blocks)}
    save_file(stored, folder / "model.safetensors")
    said = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(to_hf(CONFIG, "bfloat16") | {"quantization_config": said}))


def _byte_level() -> Tokenizer:
    """A byte-level BPE of the model's vocabulary, as GGUF metadata give it back."""
    tokens = ["<s>", "</s>", *byte_characters(), "an", "in"]
    kinds = [Kind.CONTROL] * 2 + [Kind.NORMAL] * (len(tokens) - 2)
    return read_metadata({
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds], "tokenizer.ggml.merges": ["a n", "i n"],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
    })  # fmt: skip


_SIDE_FILES = {
    "generation_config.json": b'{"eos_token_id": [2, 3], "do_sample": true, "temperature": 0.7}',
    "tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ 1 }}"}',
    "special_tokens_map.json": b'{"unk_token": "<unk>"}',
}  # fmt: skip


def _whole(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary as a tokenizer.json with a sentencepiece model beside it, which a GGUF file holds both."""
    tokenizer.save(folder)
    document = json.loads((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return load_tokenizer(folder)


def generate(path: Path) -> None:
    mixtral.load(path, device="cpu").generate([1, 5, 7], max_tokens=2)


def info(path: Path) -> None:
    command("info", path)


def runs(path: Path) -> None:
    command("runs", path)
    summarise(path)


def converted(path: Path) -> None:
    convert(path, path / "out", "mistral")


def command(name: str, path: Path) -> None:
    """On the command line: no line but the error's, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([name, str(path), "--json"])
    if code:
        assert code in (1, 2) and not out.getvalue(), (code, out.getvalue())
        assert "internal error" not in err.getvalue(), err.getvalue()
        raise MixtralError(err.getvalue().splitlines()[-1])
    json.loads(out.getvalue())


# -- tokenizers --------------------------------------------------------------------------------------------------------


def _tokenizers(root: Path, tokenizer: Tokenizer) -> dict[str, Sample]:
    tokenizer.save(root / "all")
    for name, wanted in {"spm": "*.model*", "json": "tokenizer*.json"}.items():
        (root / name).mkdir()
        for file in (root / "all").glob(wanted):
            shutil.copy(file, root / name)
    shutil.copytree(root / "spm", root / "added")
    ids = {"<|im_start|>": CONFIG.vocab_size, "<|im_end|>": CONFIG.vocab_size + 1}
    (root / "added/added_tokens.json").write_text(json.dumps(ids))
    named = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "lstrip": False}, "unk_token": "<unk>"}
    (root / "added/special_tokens_map.json").write_text(json.dumps(named))
    (root / "tekken").mkdir()
    (root / "tekken/tekken.json").write_text(json.dumps(_tekken()))
    (model,) = (root / "spm").iterdir()
    return {
        "tokenizer.model": Sample(root / "spm", model.name, "protobuf", encode),
        "tokenizer.json": Sample(root / "json", "tokenizer.json", "json", encode),
        "tokenizer_config.json": Sample(root / "json", "tokenizer_config.json", "json", encode),
        "special_tokens_map.json": Sample(root / "added", "special_tokens_map.json", "json", encode),
        "added_tokens.json": Sample(root / "added", "added_tokens.json", "json", encode),
        "tekken.json": Sample(root / "tekken", "tekken.json", "json", encode),
    }


def encode(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("The router\u2019s 4 experts: \U0001f600 [INST]\n")
    tokenizer.decode(ids)
    _ = tokenizer.fingerprint


def _tekken() -> dict[str, Any]:
    """All bytes and a few pairs, in the layout of Mistral's files."""
    from base64 import b64encode

    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"er", b"in", b" t", b"the"]
    vocab = [{"rank": i, "token_bytes": b64encode(p).decode(), "token_str": None} for i, p in enumerate(pieces)]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    return {
        "config": {"pattern": r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+", "num_vocab_tokens": len(vocab),
                   "default_vocab_size": len(vocab) + 20, "default_num_special_tokens": 20, "version": "v3"},
        "vocab": vocab,
        "special_tokens": [{"rank": i, "token_str": s, "is_control": True} for i, s in enumerate(special)],
    }  # fmt: skip


# -- data --------------------------------------------------------------------------------------------------------------


def _data(root: Path, tokenizer: Tokenizer) -> dict[str, Sample]:
    import pyarrow
    import pyarrow.parquet

    (root / "text").mkdir()
    rows = [{"text": text, "id": i} for i, text in enumerate(texts())]
    (root / "text/a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (root / "text/a.txt").write_text("\n\n".join(texts()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "text/a.parquet")
    prepare([Source(str(root / "text/a.jsonl"))], tokenizer, root / "prepared")
    shard = next((root / "prepared").glob("train-*.docs.npy")).name.removesuffix(".docs.npy")

    def read(file: str) -> Callable[[Path], None]:
        return lambda folder: [*documents(Source(str(folder / file)), BadInput())] and None

    def batches(folder: Path) -> None:
        loader = Loader(TokenData(folder, tokenizer), rows=2, context=16, seed=0)
        assert int(loader.batch(0).batch.tokens_T.max()) < tokenizer.vocab_size
        assert all(int(part.batch.tokens_T.max()) < tokenizer.vocab_size for part in loader.val_batches(64))

    return {
        "jsonl": Sample(root / "text", "a.jsonl", "lines", read("a.jsonl")),
        "txt": Sample(root / "text", "a.txt", "bytes", read("a.txt")),
        "parquet": Sample(root / "text", "a.parquet", "bytes", read("a.parquet")),
        "data index": Sample(root / "prepared", "index.json", "json", batches),
        "data shard": Sample(root / "prepared", f"{shard}.npy", "bytes", batches),
        "data documents": Sample(root / "prepared", f"{shard}.docs.npy", "bytes", batches),
    }


# -- runs --------------------------------------------------------------------------------------------------------------


def _runs(root: Path) -> dict[str, Sample]:
    config = train_config()
    begin(PretrainConfig(**{**config.__dict__, "data": ("stdlib",)}), root / "run")
    layer = {"load": [0.25] * 4, "max_over_mean": 1.0, "gini": 0.1, "entropy": 0.9, "repeats": 0.1, "dead": 0}
    lines = [
        {"step": 0, "val_cross_entropy": 7.0, "val_bits_per_byte": 3.0, "val_loads": [[0.25] * 4] * 2},
        {"step": 1, "tokens": 128, "cross_entropy": 6.5, "layers": [layer] * 2, "lr": 0.1},
    ]
    (root / "run/metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    times = {"step": 1, "seconds": 1.0, "tokens_per_second": 100.0, "share_of_peak": 0.2, "memory_bytes": 10**9}
    (root / "run/timings.jsonl").write_text(f"{json.dumps(times)}\n")
    _, train_state = fresh_state(config)
    tensors = {"model": dict(train_state.weights), "optimizer": dict(train_state.state_dict()["optimizer"])}
    write_checkpoint(root / "step_000000", tensors, dict(Progress().to_dict()))
    weights = next((root / "step_000000/model").glob("*.safetensors")).name

    def resume(folder: Path) -> None:
        Progress.from_dict(load_checkpoint(folder, fresh_state(config)[1]))

    return {
        "run config": Sample(root / "run", "config.json", "json", runs),
        "metrics": Sample(root / "run", "metrics.jsonl", "lines", runs),
        "timings": Sample(root / "run", "timings.jsonl", "lines", summarise),
        "checkpoint": Sample(root / "step_000000", "state.json", "json", resume),
        "checkpoint weights": Sample(root / "step_000000", f"model/{weights}", "safetensors", resume),
    }


