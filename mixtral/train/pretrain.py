"""Pretraining from text to a finished model folder.

    OUT/config.json      the resolved configuration, versions and hardware
    OUT/tokenizer/       trained on the corpus, or a copy of the one given
    OUT/data/            token shards
    OUT/metrics.jsonl    results by step (OUT/timings.jsonl: times)
    OUT/checkpoints/     everything needed to resume
    OUT/final/           the model: weights, configuration, tokenizer; transformers loads it too
"""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mixtral.cores import asked_threads, cpu_count
from mixtral.data.loader import Loader
from mixtral.data.readers import BadInput
from mixtral.data.shards import prepare
from mixtral.data.sources import Source, documents
from mixtral.data.store import TokenData
from mixtral.errors import ConfigError, DataError, UsageError
from mixtral.files import atomic_folder, atomic_write, remove_folder
from mixtral.kernels import use_backend
from mixtral.kernels.memory import keep_freed_memory
from mixtral.model import Mixtral, initialise
from mixtral.runtime import choose_device, choose_dtype, environment, set_threads
from mixtral.tokenizer import Tokenizer, load_tokenizer, train_bpe
from mixtral.train.checkpoint import latest_checkpoint
from mixtral.train.config import TrainConfig
from mixtral.train.loop import Run
from mixtral.train.metrics import MatrixRate
from mixtral.train.optim import Optimizer
from mixtral.train.recompute import recompute_layers
from mixtral.train.step import Validation
from mixtral.train.threads import ThreadWatch, choose_threads, counts_to_try, measure_training
from mixtral.train.trackers import require_packages
from mixtral.train.view import View
from mixtral.weights.save import write_hf

TOKENIZER_CHARACTERS = 4_000_000  # of text are enough to learn a vocabulary from; more costs time and changes little


_BEFORE_TRAINING = {"config.json", "tokenizer", "data"}  # what a run writes before its first checkpoint


class Trained(NamedTuple):
    """A finished run."""

    folder: Path  # the model
    start_loss: float  # validation cross-entropy before the first step, nats a token
    validation: Validation
    run: Run


def begin(config: TrainConfig, out: Path, threads: int | str | None = None, view: View | None = None) -> None:
    """Claim a new run's folder and record what it is to do, and with how many threads: None or "auto" as measured.

    A run that failed before its first checkpoint, on bad data perhaps, is begun anew. Raises UsageError when the folder
    holds anything else, or the package of a tracker is missing.
    """
    require_packages(config.trackers)
    # .tmp: left by a kill while one of those was written; writing it again clears that up
    names = {path.name for path in out.iterdir() if path.suffix != ".tmp"} if out.is_dir() else set()
    if names - _BEFORE_TRAINING or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} is not empty; choose another --out, or go on with: mixtral train --resume {out}")
    if (out / "tokenizer").exists():
        remove_folder(out / "tokenizer")  # it may be of other data
    set_threads(asked_threads(threads) or choose_threads(config, view or View()))
    record = {"train": config.to_dict(), "environment": environment()}
    atomic_write(out / "config.json", json.dumps(record, indent=1))


def split_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """(the run's folder, the checkpoint) for RUN/checkpoints/step_N, and (path, None) for a run's folder itself."""
    path = path.resolve() if path.name in ("", ".") else path
    return (path.parents[1], path) if path.parent.name == "checkpoints" else (path, None)


def recorded_config(out: Path) -> TrainConfig:
    """The configuration of the run in `out`, or of the run that the checkpoint `out` is of; UsageError without one."""
    path, record = _record(out)
    try:
        return TrainConfig.from_dict(record["train"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a training configuration: {error}") from error


def recorded_threads(out: Path) -> int:
    """How many threads the run in `out` computes with: its bits depend on that, so it keeps them when it goes on."""
    path, record = _record(out)
    try:
        return int(record["environment"]["threads"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: environment.threads is no number of threads ({error})") from error


def change_threads(out: Path, threads: int | str) -> None:
    """Let the run in `out` go on with another number of threads, and from there on with other bits; "auto": its own."""
    recorded_threads(out)  # or it is no training run
    if threads != "auto":
        path, record = _record(out)
        record["environment"]["threads"] = asked_threads(threads)
        atomic_write(path, json.dumps(record, indent=1))


def _record(out: Path) -> tuple[Path, dict[str, Any]]:
    out = split_checkpoint(out)[0]
    path = out / "config.json"
    try:
        return path, dict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UsageError(f"{out} is not a training run: it has no config.json") from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a training configuration: {error}") from error


def pretrain(out: Path, view: View) -> Trained:
    """Run, or go on with, the training run that `begin` recorded in `out`.

    `out` may also be one of a run's checkpoints, to go on from there instead of from the last one.
    """
    out, checkpoint = split_checkpoint(out)
    config = recorded_config(out)
    require_packages(config.trackers)
    _keep_threads(out, view)
    keep_freed_memory()
    tokenizer = _tokenizer(config, out, view)
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    config = config.replace(model=config.model.replace(**ids))
    run = _run(config, tokenizer, _data(config, tokenizer, out, view), out, view)
    if start := checkpoint or latest_checkpoint(out):
        run.resume(start)
    with use_backend("compiled") if config.compile else contextlib.nullcontext():
        validation = run.train()
    final = save_final(run, tokenizer)
    assert run.progress.start_loss is not None  # a run validates before its first step
    return Trained(final, run.progress.start_loss, validation, run)


def _keep_threads(out: Path, view: View) -> None:
    """Compute with the threads that are recorded; what speaks against them is told when the run goes on."""
    threads, cores, asked = recorded_threads(out), cpu_count(), asked_threads()
    set_threads(threads)
    if latest_checkpoint(out) and (threads > cores or asked not in (None, threads)):
        few = "there is 1 core" if cores == 1 else f"there are {cores} cores"
        here = f"{few}, so it is slower" if threads > cores else f"not OMP_NUM_THREADS={asked}"
        view.say(f"threads: {threads} as before, for the same bits; {here}; --resume with --threads N changes it")


def save_final(run: Run, tokenizer: Tokenizer) -> Path:
    """Write the model, its tokenizer and its configuration to OUT/final, as transformers reads them."""
    final = run.folder / "final"
    with atomic_folder(final) as folder:
        write_hf({n: p.detach() for n, p in run.optimizer.weights.items()}, run.model.config, folder)
        tokenizer.save(folder)
        atomic_write(folder / "training.json", (run.folder / "config.json").read_text())
    return final


def _tokenizer(config: TrainConfig, out: Path, view: View) -> Tokenizer:
    folder = out / "tokenizer"
    if not folder.exists():
        if config.tokenizer is None:
            with view.working(f"learning a vocabulary of {config.model.vocab_size} tokens"):
                tokenizer = train_bpe(_sample(config), config.model.vocab_size)
        else:
            tokenizer = load_tokenizer(config.tokenizer)
        with atomic_folder(folder) as new:
            tokenizer.save(new)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.model.vocab_size}; "
            f"add --set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _sources(config: TrainConfig) -> list[Source]:
    return [Source.parse(spec) for spec in config.data]


def _sample(config: TrainConfig) -> list[str]:
    """The texts that a vocabulary is learnt from: every n-th document, so that all parts of the corpus are in it."""
    bad = BadInput(config.skip_bad)
    texts = [document.text for source in _sources(config) for document in documents(source, bad)]
    if not texts:
        raise DataError(f"{', '.join(config.data)}: no text to train on; give more")
    return texts[:: max(1, round(sum(map(len, texts)) / TOKENIZER_CHARACTERS))]


def _data(config: TrainConfig, tokenizer: Tokenizer, out: Path, view: View) -> TokenData:
    if latest_checkpoint(out):  # a run that has begun keeps its data, whatever became of the sources since
        return TokenData(out / "data", tokenizer)
    with view.working("tokenising") as progress:
        data = prepare(
            _sources(config), tokenizer, out / "data", seed=config.seed, skip_bad=config.skip_bad,
            progress=lambda p: progress(f"tokenising: {p.documents:,} documents, {p.tokens:,} tokens"),
        )  # fmt: skip
    counts = data.summary()
    view.say(
        f"{counts['train']['tokens']:,} tokens to train on and {counts['val']['tokens']:,} held out, from "
        f"{counts['train']['documents'] + counts['val']['documents']:,} documents; {counts['duplicates']:,} repeated "
        f"and {counts['skipped']:,} unreadable ones left out"
    )
    return data


def _run(config: TrainConfig, tokenizer: Tokenizer, data: TokenData, out: Path, view: View) -> Run:
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    model = initialise(Mixtral(config.model), torch.Generator().manual_seed(config.seed)).to(device)
    if config.recompute:
        recompute_layers(model)
    loader = Loader(data, config.rows, config.context, config.seed)
    with view.working("measuring the matrix rate"):
        rate = MatrixRate.measure(dtype, device)
    watch = _watch(config, out, view) if device.type == "cpu" else None
    return Run(
        folder=out, config=config, model=model, optimizer=Optimizer(model, config, dtype, data.domains), loader=loader,
        val_batches=loader.val_batches(config.val_tokens),
        byte_lengths_V=torch.from_numpy(tokenizer.byte_lengths()), view=view, matrix_rate=rate, watch=watch,
    )  # fmt: skip


def _watch(config: TrainConfig, out: Path, view: View) -> ThreadWatch:
    threads = torch.get_num_threads()
    counts = sorted({*counts_to_try(cpu_count()), threads})
    measure = None if config.compile else partial(measure_training, config, counts)  # compiling anew takes long
    return ThreadWatch(out, threads, measure, view.say)
