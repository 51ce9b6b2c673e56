"""`mixtral train`: run a recipe, or go on with an interrupted run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral.commands.common import JsonOption, ThreadsOption, console

if TYPE_CHECKING:
    from mixtral.train.config import PretrainConfig
    from mixtral.train.finished import Finished
    from mixtral.train.pretrain import Trained


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name, such as tiny.", show_default=False)] = None,
    size: Annotated[
        int | None, typer.Option(metavar="S", help="Instead of a recipe: derive every field from one number, 1 to 64.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="A new folder for the run.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Go on with the run in this folder, or from one of its checkpoints."),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="N", help="Steps; the schedule fits itself to them.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Of the weights and of the order of the data.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Text, JSONL, Parquet, a folder of them, or stdlib; may be repeated."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count unreadable inputs and go on, instead of stopping at the first.")
    ] = False,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any other field; may be repeated.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved configuration and do nothing.")] = False,
    threads: ThreadsOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a model from text: vocabulary, token shards, steps, checkpoints, and the finished model in DIR/final.

    A source is a path or one of stdlib, packages, reasoning-gym, debian, hf:NAME, with options after "?" and a weight
    after "=": notes.jsonl?field=body=0.3. The fields of --set are those that --show prints. Ctrl-C stops after the
    step with a checkpoint.

    Examples:
    mixtral train tiny --out runs/tiny
    mixtral train tiny --out runs/mine --data texts/ --max-steps 2000 --seed 1
    mixtral train tiny --out runs/mixed --data a.jsonl=0.7 --data web/=0.3 --skip-bad
    mixtral train tiny --out runs/wide --set lr=2e-3 --set model.dim=384
    mixtral train --size 4 --out runs/four
    mixtral train --resume runs/mine
    """
    from mixtral.errors import UsageError
    from mixtral.train.record import recorded_config

    if resume is not None:
        new = {"RECIPE": recipe, "--size": size, "--out": out, "--max-steps": max_steps, "--seed": seed, "--data": data}
        new |= {"--skip-bad": skip_bad or None, "--set": assignments}
        if given := [name for name, value in new.items() if value is not None]:
            raise UsageError(f"--resume goes on with the run as it was begun; leave out {', '.join(given)}")
        config = recorded_config(resume)
    else:
        config = override_options(base_config(recipe, size), max_steps, seed, data, skip_bad, assignments)
    if show:  # before torch is loaded
        print(json.dumps(config.to_dict(), indent=1))
        return
    if resume is None and out is None:
        raise UsageError("train: name a new folder with --out DIR")
    trained = _perform(config, resume, out or Path(), threads)
    if as_json:
        print(json.dumps(summary(trained)))
    else:
        print(_text(trained))


def _perform(config: PretrainConfig, resume: Path | None, out: Path, threads: str) -> Trained | Finished:
    """Begin the run in `out` and train, or go on with the one in `resume`."""
    from mixtral.cores import asked_threads
    from mixtral.train.display import TerminalDisplay
    from mixtral.train.finished import finished
    from mixtral.train.pretrain import pretrain
    from mixtral.train.run_folder import begin

    display = TerminalDisplay(console(stderr=True))
    if resume is None:
        begin(config, out, threads, display)
        return pretrain(out, display)
    if (done := finished(resume)) is not None:
        asked_threads(threads)  # no step follows, yet a wrong value is refused
        display.say(f"done already: all {config.steps:,} steps; the model is in {done.folder}")
        return done
    return pretrain(resume, display, threads)


def base_config(name: str | None, size: int | None) -> PretrainConfig:
    """The configuration that a recipe's name or a size stands for."""
    from mixtral.errors import UsageError
    from mixtral.recipes import RECIPES, recipe, sized

    if (name is None) == (size is None):
        raise UsageError(f"train: name a recipe ({', '.join(RECIPES)}) or a --size, or go on with a run: --resume DIR")
    return sized(size) if name is None and size is not None else recipe(name or "")


def override_options(
    config: PretrainConfig,
    max_steps: int | None,
    seed: int | None,
    data: list[str] | None,
    skip_bad: bool,
    assignments: list[str] | None,
) -> PretrainConfig:
    """`config` with the command line's own options and its --set assignments."""
    from mixtral.train.config import override

    given = {"steps": max_steps, "seed": seed, "data": tuple(data) if data else None, "skip_bad": skip_bad or None}
    return override(config.replace(**{k: v for k, v in given.items() if v is not None}), assignments or [])


def summary(trained: Trained | Finished) -> dict[str, object]:
    """A finished run in numbers."""
    config = trained.config
    return {
        "model": str(trained.folder),
        "parameters": config.model.n_params(),
        "active_parameters": config.model.n_active_params(),
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step,
        "start_cross_entropy": trained.start_loss,
        "val_cross_entropy": trained.validation.cross_entropy,
        "val_bits_per_byte": trained.validation.bits_per_byte,
        "val_loads": trained.validation.loads,
    }


def _text(trained: Trained | Finished) -> str:
    validation = trained.validation
    return (
        f"validation {trained.start_loss:.3f} -> {validation.cross_entropy:.3f} nats a token "
        f"({validation.cross_entropy / trained.start_loss:.0%} of its start), "
        f"{validation.bits_per_byte:.3f} bits a byte\n"
        f"model: {trained.folder}\n"
        f"try:   mixtral generate --model {trained.folder} --prompt {shlex.quote(_prompt(trained))} --temperature 0.7"
    )


def _prompt(trained: Trained | Finished) -> str:
    """How a text begins that the run has held out."""
    from mixtral.data.store import TokenData
    from mixtral.errors import MixtralError
    from mixtral.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(trained.folder)
        held_out = TokenData(trained.folder.parent / "data", tokenizer).val
        begins = (tokenizer.decode(held_out.tokens(i)[:20].tolist()).split() for i in range(len(held_out.length_M)))
        return " ".join(next(words for words in begins if words)[:3])
    except (MixtralError, StopIteration):  # no data any more, or none with words: a model of what, nobody can say
        return "..."
