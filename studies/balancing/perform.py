"""One run of the study, from its configuration to `summary.json`: trained by the library, then measured.

A run that was interrupted goes on from its last checkpoint; a finished one is only read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from failures import failures
from measure import HeldOut, held_out, measure, other_texts
from plan import Run

from mixtral.errors import UsageError
from mixtral.files import atomic_write, remove_folder
from mixtral.model import Mixtral
from mixtral.runtime import environment, set_threads
from mixtral.tokenizer import Tokenizer, load_tokenizer
from mixtral.train.checkpoint import load_checkpoint
from mixtral.train.display import Display
from mixtral.train.lines import read_lines
from mixtral.train.pretrain import pretrain
from mixtral.train.record import checkpoints, recorded_config
from mixtral.train.run_folder import begin
from mixtral.train.state import TrainState


def finished(folder: Path, run: Run) -> dict[str, Any] | None:
    """The summary of a run that is done. UsageError when the folder holds a run of another configuration."""
    if (folder / "config.json").exists() and recorded_config(folder) != run.config:
        raise UsageError(f"{folder} is a run of another configuration; choose another --out, or remove it")
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def perform(run: Run, folder: Path, corpus: Path, tokens: int) -> dict[str, Any]:
    """Train, or go on; measure every checkpoint on `tokens` tokens a domain, the last on four times as many."""
    if found := finished(folder, run):
        return found
    set_threads()
    if not (folder / "config.json").exists():
        begin(run.config, folder)
    model = pretrain(folder, Display()).run.model
    tokenizer = load_tokenizer(folder / "tokenizer")
    few, many = held_out(corpus, tokenizer, tokens), held_out(corpus, tokenizer, 4 * tokens)
    summary = _described(run, folder) | {"final": measure(model, many), "trajectory": _trajectory(run, folder, few)}
    if "failure" in run.kind.groups:
        summary["failures"] = _failures(model, corpus, tokenizer, tokens)
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1))
    remove_folder(folder / "checkpoints")  # 27 MB each
    return summary


def _described(run: Run, folder: Path) -> dict[str, Any]:
    config = run.config
    seconds = [line["seconds"] for line in read_lines(folder / "timings.jsonl") if "seconds" in line]
    tokens = config.steps * config.tokens_per_step
    return {
        "label": run.kind.label,
        "groups": list(run.kind.groups),
        "seed": config.seed,
        "model": config.model.to_dict(),
        "balance": list(config.balance),
        "parameters": config.model.n_params(),
        "active_parameters": config.model.n_active_params(),
        "flops_per_token": config.model.flops_per_token(config.context, backward=True),
        "steps": config.steps,
        "tokens": tokens,
        "seconds": round(sum(seconds), 1),  # of the steps alone
        "tokens_per_second": round(tokens / sum(seconds), 1),
        "environment": environment(),
    }


def _trajectory(run: Run, folder: Path, batches: HeldOut) -> list[dict[str, Any]]:
    """The figures of each checkpoint, from the untrained model on."""
    model = Mixtral(run.config.model)
    train_state = TrainState.of(model, run.config.replace(balance=()), torch.float32)
    found = []
    for checkpoint in checkpoints(folder):
        step = load_checkpoint(checkpoint, train_state)["step"]
        found.append({"step": step, "tokens": step * run.config.tokens_per_step, **measure(model, batches)})
    return found


def _failures(model: Mixtral, corpus: Path, tokenizer: Tokenizer, tokens: int) -> dict[str, dict[str, Any]]:
    byte_lengths_V = torch.from_numpy(tokenizer.byte_lengths())
    plain, others = held_out(corpus, tokenizer, tokens), other_texts(corpus, tokenizer, tokens)
    return failures(model, plain, others, byte_lengths_V)
