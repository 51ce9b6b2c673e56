"""`mixtral demo --train`: a small model of one's own, on text that every Python carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral.commands.common import console, show_loads, shown
from mixtral.commands.train import summary

if TYPE_CHECKING:
    from mixtral.train.pretrain import Trained

PROMPT = "def __init__(self, name, value=None):\n"
SEED = 1


def train_demo(out: Path, max_steps: int | None, threads: str, as_json: bool) -> None:
    """Train the recipe `tiny` in `out`, or go on with it, and show what has become of it."""
    from mixtral.errors import UsageError
    from mixtral.recipes import recipe
    from mixtral.train.display import TerminalDisplay
    from mixtral.train.finished import finished
    from mixtral.train.pretrain import pretrain
    from mixtral.train.run_folder import begin

    terminal = console(stderr=True)
    resumed = (out / "config.json").exists()
    if not resumed:
        config = recipe("tiny") if max_steps is None else recipe("tiny").replace(steps=max_steps)
        begin(config, out, threads, TerminalDisplay(terminal))
        shape = config.model
        terminal.print(
            f"A Mixtral of {shape.n_params() / 1e6:.1f} M parameters, {shape.n_active_params() / 1e6:.1f} M active: "
            f"{shape.n_layers} layers of {shape.n_experts} experts, {shape.experts_per_token} a token. "
            f"{config.steps * config.tokens_per_step / 1e6:.2f} M tokens to train on."
        )
    elif max_steps is not None:
        raise UsageError(f"--max-steps: the run in {out} was begun with its own number; choose another --out")
    goes_on = resumed and finished(out) is None  # else no step follows
    trained = pretrain(out, TerminalDisplay(terminal), threads if goes_on else "auto")
    figures = _figures(trained)
    if as_json:
        print(json.dumps(figures))
    else:
        _show(trained, figures)


def _figures(trained: Trained) -> dict[str, Any]:
    """The run's numbers, a counted bigram model's bits per byte on the same held-out tokens, and a sample."""
    from mixtral.eval.ngram import bigram_bits_per_byte
    from mixtral.lm import load

    run = trained.run
    data = run.loader.data
    held_out = [(b.batch.tokens_T.numpy(), b.targets_T.numpy()) for b in run.val_batches]
    n_bytes, vocabulary = run.byte_lengths_V.numpy(), run.config.model.vocab_size
    bigram = bigram_bits_per_byte(data.pairs("train"), held_out, n_bytes, vocabulary)
    text = load(trained.folder).generate(PROMPT, max_tokens=120, temperature=0.6, top_p=0.95, seed=SEED)
    return {**summary(trained), "bigram_bits_per_byte": bigram, "prompt": PROMPT, "text": text}


def _show(trained: Trained, figures: dict[str, Any]) -> None:
    out, final = console(), trained.folder
    ratio = figures["val_cross_entropy"] / figures["start_cross_entropy"]
    loads = figures["val_loads"]
    least = min(min(load) * len(load) for load in loads)
    out.print(f"\n{PROMPT}", style="dim", end="")
    out.print(shown(figures["text"]))
    show_loads(loads, "Where the held-out tokens went, by layer and expert")
    out.print(
        f"\nheld-out text   {figures['start_cross_entropy']:.3f} -> {figures['val_cross_entropy']:.3f} nats a token, "
        f"{ratio:.0%} of the start\n"
        f"bits a byte     {figures['val_bits_per_byte']:.3f}; a bigram model counted on the same text: "
        f"{figures['bigram_bits_per_byte']:.3f}\n"
        f"expert loads    the least used expert of any layer got {least:.2f} of its fair share of held-out tokens",
        soft_wrap=True,
    )
    out.print(
        f"\nNext:\n"
        f"  mixtral generate --model {final} --prompt 'class Node:' --temperature 0.7 --routing\n"
        f"  mixtral chat --model {final}\n"
        f"  mixtral info {final}\n"
        f"  mixtral convert {final} runs/mistral --to mistral\n"
        f"  mixtral train tiny --out runs/mine --data FOLDER --max-steps 2000",
        soft_wrap=True,
    )
