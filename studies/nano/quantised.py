r"""What 8 and 4 bits cost a small trained model, ours beside llama.cpp's.

    python studies/nano/quantised.py RUN [--model FOLDER] [--llama-cpp PROGRAMS] [--tokens N] [--json FILE]

RUN is the folder of a training run, such as `mixtral train nano --out runs/nano` leaves. Its final model is rounded to
bf16, which is what all others are compared with; --model names another model of the same tokenizer, `mixtral-nano` say.

The text is what the run validates on: the same held-out tokens in the same windows. Calibration reads the run's first
training batches. Loss, KL divergence to bf16 (nats) and agreement of the likeliest token are means over all targets.

Models run here in fp32 between products. Ours round the inputs of products to 8 bits too, as they do in use.
llama.cpp's are a bf16 GGUF file of ours, quantised by its own llama-quantize, whose weights are read back exactly and
whose products' inputs are not rounded, which flatters them. PROGRAMS is the folder of llama.cpp's programs; without it
the files are quantised by our writer. With it there is a second table, of the same text as llama-perplexity cuts it:
its own figures of its files, whose inputs it rounds to 8 bits, beside ours on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_programs
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mixtral
from mixtral.commands.common import stages_bar
from mixtral.config.formats import read_config
from mixtral.data.loader import Loader, TrainBatch
from mixtral.data.store import TokenData
from mixtral.errors import MixtralError
from mixtral.files import atomic_write
from mixtral.gguf.header import read_gguf
from mixtral.model import Mixtral, Ragged
from mixtral.quant.calibrate import second_moments
from mixtral.quant.compare import distances
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.runtime import environment, set_threads
from mixtral.shipped import model_folder
from mixtral.tokenizer import Tokenizer
from mixtral.train.record import recorded_config
from mixtral.weights import convert
from mixtral.weights.load import StateReader

OURS = {  # bits, and whether calibrated
    "int8": ("8", False), "int4": ("4", False), "int4, calibrated": ("4", True), "mixed, calibrated": ("mixed", True),
}  # fmt: skip
GGUF = ("q8_0", "q4_0")
CALIBRATION_TOKENS = 8192
LIMITS = {"int8": 0.2, "int4, calibrated": 2.0}  # per cent that the loss may change by

Batches = Sequence[tuple[Ragged, Tensor]]


@dataclass(frozen=True)
class Row:
    """One model on one text."""

    name: str
    loss: float  # nats a token
    change: float  # of the loss, per cent of bf16's
    kl: float
    agreement: float


@dataclass(frozen=True)
class Variant:
    """A model to compare, and the bytes of all its tensors."""

    name: str
    path: Path
    size: int


# -- the text ----------------------------------------------------------------------------------------------------------


def texts_of(run: Path, tokenizer: Tokenizer, tokens: int | None) -> tuple[list[TrainBatch], list[list[int]]]:
    """(the batches that the run validates on, `tokens` at most; sequences of its training text to calibrate by).

    Raises DataError for another tokenizer than the run's.
    """
    config = recorded_config(run)
    loader = Loader(TokenData(run / "data", tokenizer), config.rows, config.context, config.seed)
    held_out = loader.val_batches(min(tokens or config.val_tokens, config.val_tokens))
    steps = math.ceil(CALIBRATION_TOKENS / (config.rows * config.context))
    return held_out, [ids for step in range(steps) for ids in sequences(loader.batch(step)) if len(ids) > 1]


def sequences(batch: TrainBatch) -> list[list[int]]:
    ends = batch.batch.cu_seqlens.tolist()
    return [batch.batch.tokens_T[begin:end].tolist() for begin, end in pairwise(ends)]


# -- the models --------------------------------------------------------------------------------------------------------


def quantised(plain: Path, folder: Path, calibration: list[list[int]]) -> Iterator[Variant]:
    """Ours."""
    config = read_config(plain)
    with stages_bar() as progress:
        moments = second_moments(StateReader(plain, config), config, calibration, progress)
        for name, (bits, calibrated) in OURS.items():
            facts = {"source": "training text", "tokens": sum(map(len, calibration))} if calibrated else None
            recipe, importance = QuantScheme.of(bits, facts), moments if calibrated else None
            size = quantise_folder(plain, folder / name, recipe, importance, progress).written
            yield Variant(name, folder / name, size)


def gguf_files(plain: Path, folder: Path, programs: Path | None) -> Iterator[Variant]:
    """llama.cpp's formats, by its own program where there is one."""
    convert(plain, folder / "bf16.gguf", "gguf")
    for type in GGUF:
        file = folder / f"{type}.gguf"
        if programs is None:
            convert(plain, file, "gguf", type=type)
        else:
            llama_programs.run_program(programs / "llama-quantize", folder / "bf16.gguf", file, type.upper(), 1)
        size = sum(info.nbytes for _, header in read_gguf(file) for info in header.tensors.values())
        yield Variant(f"{type.upper()}, weights", file, size)


def measure(models: Mapping[str, Mixtral], batches: Batches) -> list[Row]:
    """The first model is what the others are compared with."""
    first, *others = models
    with stages_bar() as progress:
        found = distances(models[first], {name: models[name] for name in others}, batches, progress)
    losses = [math.log(distance.perplexity) for distance in found]
    return [
        Row(name, loss, 100 * (loss / losses[0] - 1), distance.kl, distance.agreement)
        for name, loss, distance in zip(models, losses, found, strict=True)
    ]


def measured_there(
    programs: Path, folder: Path, ours: Mapping[str, Mixtral], tokenizer: Tokenizer, text: str, context: int
) -> list[Row]:
    """Ours, and what llama-perplexity says of its files, on the windows it makes of the text.

    Raises MixtralError where it fails, or the text is too short.
    """
    batches = llama_programs.windows(tokenizer.encode(text), context, tokenizer.bos_id)
    files = [folder / f"{type}.gguf" for type in GGUF]
    theirs = llama_programs.perplexity(programs, folder / "bf16.gguf", files, text, context, folder)
    base = theirs[0].base_loss
    rows = [Row("bf16, llama.cpp", base, 0.0, 0.0, 1.0)]
    for type, it in zip(GGUF, theirs, strict=True):
        rows.append(Row(f"{type.upper()}, llama.cpp", it.loss, 100 * (it.loss / base - 1), it.kl, it.agreement))
    return [*measure(ours, batches), *rows]


# -- the result --------------------------------------------------------------------------------------------------------


def study(run: Path, model: Path, programs: Path | None, tokens: int | None) -> dict[str, Any]:
    """All figures. Raises MixtralError for a model without the run's tokenizer, and as reading does."""
    tokenizer = mixtral.load(model, "fp32", "cpu").tokenizer
    if tokenizer is None:
        raise MixtralError(f"{model}: no tokenizer; a model with the run's tokenizer is wanted")
    held_out, calibration = texts_of(run, tokenizer, tokens)
    there, left_out = list[Row](), "no --llama-cpp: its formats written here, and nothing run there"
    with tempfile.TemporaryDirectory() as scratch:
        folder, plain = Path(scratch), Path(scratch) / "bf16"
        convert(model, plain, "hf", torch.bfloat16)
        config = read_config(plain)
        variants = [Variant("bf16", plain, config.weight_bytes()), *quantised(plain, folder, calibration)]
        ours = len(variants)
        if config.is_plain:
            variants += gguf_files(plain, folder, programs)
        else:
            left_out, programs = "llama.cpp: it knows no router but Mixtral's own", None
        models = {variant.name: mixtral.load(variant.path, "fp32", "cpu").model for variant in variants}
        here = measure(models, [(part.batch, part.targets_T) for part in held_out])
        if programs is not None:
            text = "\n".join(tokenizer.decode(ids) for part in held_out for ids in sequences(part))
            first = dict(list(models.items())[:ours])
            try:
                there = measured_there(programs, folder, first, tokenizer, text, recorded_config(run).context)
                left_out = ""
            except MixtralError as error:
                left_out = str(error)
    sizes = [{"bytes": v.size, "bits_per_weight": 8 * v.size / config.n_params()} for v in variants]
    change = {row.name: row.change for row in here}
    return {
        "environment": environment(), "run": str(run), "model": str(model),
        "tokens": sum(int((part.targets_T >= 0).sum()) for part in held_out),
        "calibration_tokens": sum(map(len, calibration)),
        "models": [asdict(row) | size for row, size in zip(here, sizes, strict=True)],
        "llama_windows": [asdict(row) for row in there], "left_out": left_out,
        "held": {name: abs(change[name]) <= limit for name, limit in LIMITS.items()},
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    title = f"{result['tokens']:,} held-out tokens; calibrated on {result['calibration_tokens']:,} training tokens"
    Console().print(_table(title, result["models"]))
    if result["llama_windows"]:
        Console().print(_table("The same text in llama-perplexity's windows", result["llama_windows"]))
    if result["left_out"]:
        print(f"left out: {result['left_out']}")
    for name, held in result["held"].items():
        print(f"{name}: the loss changes by at most {LIMITS[name]} %: {'yes' if held else 'NO'}")


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("", "loss", "change, %", "KL, nats", "same, %", "MB", "bits"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        sizes = (f"{row['bytes'] / 1e6:.2f}", f"{row['bits_per_weight']:.2f}") if "bytes" in row else ("", "")
        figures = f"{row['loss']:.4f}", f"{row['change']:+.3f}", f"{row['kl']:.5f}", f"{100 * row['agreement']:.1f}"
        table.add_row(row["name"], *figures, *sizes)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--model", metavar="FOLDER", help="instead of the run's final model; mixtral-nano is one too")
    parser.add_argument("--llama-cpp", type=Path, metavar="PROGRAMS", help="folder of llama-quantize, llama-perplexity")
    parser.add_argument("--tokens", type=int, metavar="N", help="read at most this many of the held-out tokens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if options.json is not None and options.json.exists():
        parser.error(f"--json {options.json}: exists already; name a new file")
    set_threads()
    model = options.run / "final" if options.model is None else Path(model_folder(options.model))
    try:
        result = study(options.run, model, options.llama_cpp, options.tokens)
    except MixtralError as error:
        raise SystemExit(str(error)) from None
    show(result)
    if options.json:
        atomic_write(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
