"""Does the loss go where transformers' goes? Both train from the same weights on the same rows, two seeds each.

Ours goes through our trainer. Theirs is transformers' model, forward, loss and backward, under torch's AdamW with our
parameter groups, learning rates and clipping. A seed decides the initial weights (our `initialise`, which both get)
and the order of the rows. Documents inside a row are kept apart on both sides: transformers reads positions that start
again as packed sequences. The vocabulary, the shards and the held-out rows are one for all runs. fp32; no z-loss, which
transformers lacks.

The balancing losses differ in form. Ours is a mean over layers of E * share * score, 1 at balance; transformers
multiplies shares and scores pooled over layers and counts K assignments a token, K at balance. Its coefficient is
ours divided by K: both are worth the same at balance, and each layer's scores get a gradient of the same scale, from
the pooled shares there and from its own here. `--balance 0` leaves it out on both sides: what is left is rounding.

Legend: B rows, S tokens of a row, K experts a token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from lib.common import publish
from lib.peer import peer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mixtral.data.loader import Loader, TrainBatch
from mixtral.data.readers import BadInput
from mixtral.data.shards import prepare
from mixtral.data.sources import Source, documents
from mixtral.data.store import TokenData
from mixtral.model import Mixtral, initialise
from mixtral.presets import tiny
from mixtral.runtime import set_threads
from mixtral.tokenizer import Tokenizer, train_bpe
from mixtral.train.config import PretrainConfig
from mixtral.train.display import Display
from mixtral.train.lines import read_lines
from mixtral.train.loop import Run
from mixtral.train.optim.schedule import learning_rate
from mixtral.train.state import TrainState

SIDES = ("mixtral", "transformers")


class Curve(NamedTuple):
    """One run; losses are cross-entropy in nats a token."""

    side: str
    seed: int
    training: list[float]  # of each step, before its update
    validation: list[tuple[int, float]]  # (steps done, held-out loss)
    seconds: float


def our_curve(config: PretrainConfig, data: TokenData, tokenizer: Tokenizer, folder: Path) -> Curve:
    """Train with mixtral.train."""
    begin = time.perf_counter()
    model = fresh_model(config)
    loader = Loader(data, config.rows, config.context, config.seed)
    Run(
        folder=folder, config=config, model=model, optimizer=TrainState.of(model, config, torch.float32), loader=loader,
        val_batches=loader.val_batches(config.val_tokens),
        byte_lengths_V=torch.from_numpy(tokenizer.byte_lengths()), display=Display(),
    ).train()  # fmt: skip
    lines = read_lines(folder / "metrics.jsonl")
    training = [line["cross_entropy"] for line in lines if "cross_entropy" in line]
    validation = [(line["step"], line["val_cross_entropy"]) for line in lines if "val_cross_entropy" in line]
    return Curve("mixtral", config.seed, training, validation, time.perf_counter() - begin)


def their_curve(config: PretrainConfig, data: TokenData, balance: float) -> Curve:
    """Train transformers' model; `balance` is our coefficient of the balancing loss."""
    begin = time.perf_counter()
    model: Any = peer(fresh_model(config), torch.float32, "eager")
    model.router_aux_loss_coef = balance / config.model.experts_per_token
    matrices, norms = ([p for p in model.parameters() if (p.dim() > 1) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=config.betas, fused=True)
    loader = Loader(data, config.rows, config.context, config.seed)
    held_out = loader.val_batches(config.val_tokens)
    training, validation = [], [(0, their_validation(model, held_out, config))]
    for step in range(config.steps):
        output = their_output(model, loader.batch(step), config)
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, config)
        adamw.step()
        adamw.zero_grad()
        training.append(cross_entropy(model, output))
        if (step + 1) % config.val_every == 0 or step + 1 == config.steps:
            validation.append((step + 1, their_validation(model, held_out, config)))
    return Curve("transformers", config.seed, training, validation, time.perf_counter() - begin)


def their_output(model: nn.Module, part: TrainBatch, config: PretrainConfig) -> Any:
    """transformers' output, with its loss, for packed rows."""
    ids_BS, positions_BS, targets_BS = (
        x_T.view(-1, config.context) for x_T in (part.batch.tokens_T, part.batch.positions_T, part.targets_T)
    )
    return model(
        input_ids=ids_BS, position_ids=positions_BS, labels=targets_BS, shift_labels=targets_BS, use_cache=False,
        output_router_logits=True,
    )  # fmt: skip


def cross_entropy(model: Any, output: Any) -> float:
    """Its loss without the balancing loss that it adds."""
    loss: Tensor = output.loss.detach() - model.router_aux_loss_coef * output.aux_loss.detach()
    return float(loss)


@torch.no_grad()
def their_validation(model: nn.Module, batches: Sequence[TrainBatch], config: PretrainConfig) -> float:
    counts = [int((part.targets_T != -100).sum()) for part in batches]
    losses = [cross_entropy(model, their_output(model, part, config)) for part in batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def fresh_model(config: PretrainConfig) -> Mixtral:
    return initialise(Mixtral(config.model), torch.Generator().manual_seed(config.seed))


def summary(curves: Sequence[Curve]) -> dict[str, Any]:
    """Final losses, how far seeds lie apart, how far the sides do, and whether the second lies within the first."""
    ours, theirs = ({c.seed: c for c in curves if c.side == side} for side in SIDES)
    final = {side: [c.validation[-1][1] for c in curves if c.side == side] for side in SIDES}
    spread = {side: max(losses) - min(losses) for side, losses in final.items()}
    difference = statistics.mean(final["mixtral"]) - statistics.mean(final["transformers"])
    rows = []
    for seed, curve in ours.items():
        pairs = [(a, b) for (_, a), (_, b) in zip(curve.validation, theirs[seed].validation, strict=True)]
        row = {"seed": seed, "mixtral": pairs[-1][0], "transformers": pairs[-1][1]}
        rows.append({**row, "largest_difference": max(abs(a - b) for a, b in pairs)})
    return {
        "rows": rows, "spread_between_seeds": spread, "difference_of_means": difference,
        "within_spread": abs(difference) <= min(spread.values()),
    }  # fmt: skip


def show(result: dict[str, Any], steps: int) -> None:
    table = Table(title=f"held-out loss after {steps} steps, nats a token")
    for column in ("seed", "mixtral", "transformers", "difference", "largest on the way"):
        table.add_column(column)
    for row in result["rows"]:
        apart = row["mixtral"] - row["transformers"]
        losses = (f"{row['mixtral']:.4f}", f"{row['transformers']:.4f}")
        table.add_row(str(row["seed"]), *losses, f"{apart:+.4f}", f"{row['largest_difference']:.4f}")
    spread = [f"{result['spread_between_seeds'][side]:.4f}" for side in SIDES]
    table.add_row("spread", *spread, f"{result['difference_of_means']:+.4f}", "")
    Console(width=100).print(table)
    print(f"the difference of means lies {'within' if result['within_spread'] else 'OUTSIDE'} the spread between seeds")


def plot(curves: Sequence[Curve], path: Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = {"mixtral": {"linestyle": "-", "alpha": 0.6, "linewidth": 3}, "transformers": {"linestyle": "--"}}
    for curve in curves:
        label = f"{curve.side}, seed {curve.seed}: {curve.validation[-1][1]:.4f}"
        axes.plot(*zip(*curve.validation, strict=True), color=f"C{curve.seed % 10}", label=label, **styles[curve.side])
    axes.set(title="the same weights, rows and hyper-parameters", xlabel="step", ylabel="held-out loss, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--balance", type=float, default=0.01, help="coefficient of the balancing loss")
    parser.add_argument("--max-bytes", type=int, default=3_000_000, help="of the standard library's text")
    parser.add_argument("--json-out", action="store_true", help="write bench/results/curve_<hardware>_<date>.*")
    args = parser.parse_args()
    set_threads()
    transformers.logging.set_verbosity_error()
    source = f"stdlib?max_bytes={args.max_bytes}"
    config = PretrainConfig(
        model=tiny(), data=(source,), steps=args.steps, rows=4, context=256, lr=4e-3,
        balance=(f"micro_batch?weight={args.balance}",) if args.balance else (),
        dtype="fp32", device="cpu", val_every=25, val_tokens=8192, save_every=args.steps,
    )  # fmt: skip
    curves = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [document.text for document in documents(Source.parse(source), BadInput(False))]
        tokenizer = train_bpe(texts, config.model.vocab_size)
        data = prepare([Source.parse(source)], tokenizer, folder / "data")
        if (held_out := int(data.val.length_M.sum())) < config.val_tokens:  # transformers is given whole rows
            raise SystemExit(f"only {held_out} held-out tokens, not {config.val_tokens}; raise --max-bytes")
        for seed in args.seeds:
            seeded = config.replace(seed=seed)
            run = folder / str(seed)
            run.mkdir()
            for curve in (our_curve(seeded, data, tokenizer, run), their_curve(seeded, data, args.balance)):
                curves.append(curve)
                text = f"{curve.side}, seed {seed}: {curve.validation[-1][1]:.4f}, {curve.seconds:.0f} s"
                print(text, file=sys.stderr)
    result = summary(curves)
    show(result, args.steps)
    whole = {**result, "curves": [c._asdict() for c in curves], "config": config.to_dict(),
             "transformers": transformers.__version__}  # fmt: skip
    topic = "curve" if args.balance else "curve-without-balancing"
    if path := publish(topic, whole, args.json_out):
        plot(curves, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
