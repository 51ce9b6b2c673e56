"""Put a trained run's model into the package as `mixtral-nano`: weights in bf16, tokenizer, how it was trained and
is best sampled, curve.

    python tools/ship_nano.py runs/nano

The card, mixtral/nano/README.md, is written by hand from what studies/nano/scores.py prints, and stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

import mixtral
from mixtral.config.formats import read_config
from mixtral.errors import MixtralError, UsageError
from mixtral.files import atomic_folder
from mixtral.shipped import FOLDER
from mixtral.train.lines import read_lines
from mixtral.train.record import recorded_config

MOST_BYTES = 16_000_000
SAMPLING = {"temperature": 0.7, "top_k": 0, "top_p": 0.95}  # 0: all; without it transformers takes 50
CARD = "README.md"


def ship(run: Path, folder: Path) -> int:
    """Write the model of `run` to `folder`, whose card stays -> bytes. UsageError when that would be too large."""
    with tempfile.TemporaryDirectory() as scratch:
        new = Path(scratch) / "model"
        mixtral.load(run / "final", dtype=torch.bfloat16).save(new)
        shutil.copyfile(run / "final" / "training.json", new / "training.json")
        write_sampling(new)
        plot_curve(run, new / "curve.png")
        size = sum(file.stat().st_size for file in new.iterdir())
        if size > MOST_BYTES:
            raise UsageError(f"{run}: {size:,} bytes; the package has room for {MOST_BYTES:,}")
        with atomic_folder(folder, replace=True) as whole:  # what is there and not made here, such as the card, stays
            shutil.copytree(new, whole, dirs_exist_ok=True)
    return size


def write_sampling(folder: Path) -> None:
    """How its tokens are best drawn, where transformers looks for it too: the likeliest ones soon repeat themselves."""
    config = read_config(folder)
    values = {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "do_sample": True, **SAMPLING}
    (folder / "generation_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def plot_curve(run: Path, path: Path) -> None:
    """Training and held-out loss by tokens, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines, a_step = read_lines(run / "metrics.jsonl"), recorded_config(run).tokens_per_step / 1e6
    train = [(line["step"] * a_step, line["cross_entropy"]) for line in lines if "cross_entropy" in line]
    held_out = [(line["step"] * a_step, line["val_cross_entropy"]) for line in lines if "val_cross_entropy" in line]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="0.75", linewidth=0.6, label="training, each step")
    axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="held-out")
    axes.set(xlabel="million tokens", ylabel="nats a token", ylim=(0.5, None), title="mixtral-nano")
    axes.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    options = parser.parse_args()
    try:
        print(f"{FOLDER}: {ship(options.run, FOLDER):,} bytes")
    except MixtralError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
