"""Pretraining from text to a finished model folder.

    OUT/config.json      the resolved configuration, versions and hardware; written first: it marks a run's folder
    OUT/tokenizer/       trained on the corpus, or a copy of the one given
    OUT/data/            token shards
    OUT/metrics.jsonl    results by step (OUT/timings.jsonl: times)
    OUT/checkpoints/     everything needed to resume
    OUT/final/           the model: weights, configuration, tokenizer; transformers loads it too
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from mixtral.cores import asked_threads, cpu_count
from mixtral.data.loader import Loader
from mixtral.data.readers import BadInput
from mixtral.data.shards import prepare
from mixtral.data.sources import Source, documents
from mixtral.data.store import TokenData
from mixtral.errors import DataError, Interrupted, UsageError, WeightsError
from mixtral.files import atomic_folder, atomic_write, lock_folder, unlock_folder
from mixtral.kernels.allocator import keep_freed_memory
from mixtral.model import Mixtral, initialise
from mixtral.runtime import choose_device, choose_dtype, set_threads
from mixtral.tokenizer import Tokenizer, load_tokenizer, train_bpe
from mixtral.train.checks import check_vocabulary
from mixtral.train.config import PretrainConfig
from mixtral.train.display import Display
from mixtral.train.loop import Run
from mixtral.train.memory import check_memory
from mixtral.train.metrics import PeakMatmul
from mixtral.train.recompute import recompute_layers
from mixtral.train.record import latest_checkpoint, record_threads, recorded_config, recorded_threads, split_checkpoint
from mixtral.train.sinks import require_packages
from mixtral.train.state import TrainState
from mixtral.train.step import Validation
from mixtral.train.threads import ThreadWatch, counts_to_try, measure_training
from mixtral.weights.save import write_hf

TOKENIZER_CHARACTERS = 4_000_000  # of text are enough to learn a vocabulary from; more costs time and changes little


class Trained(NamedTuple):
    """A finished run."""

    folder: Path  # the model
    start_loss: float  # validation cross-entropy before the first step, nats a token
    validation: Validation
    run: Run

    @property
    def config(self) -> PretrainConfig:
        return self.run.config


def pretrain(out: Path, display: Display, threads: int | str = "auto") -> Trained:
    """Run, or go on with, the training run that `begin` recorded in `out`.

    `out` may also be one of a run's checkpoints, to go on from there instead of from the last one. A number of threads
    other than "auto", the recorded one, is recorded once the run can go on with it. Raises UsageError when another
    process trains in the folder, and as `begin` does; Interrupted at Ctrl-C.
    """
    recorded_config(out)  # else the lock would make the folder
    changed = None if threads == "auto" else asked_threads(threads)
    out, checkpoint = split_checkpoint(out)
    lock_folder(out)
    try:
        return _pretrain(recorded_config(out), out, checkpoint, display, changed)
    except KeyboardInterrupt:  # outside the steps, or a second time in one
        anew = "" if latest_checkpoint(out) else "begin anew with the same --out, or "
        raise Interrupted(f"stopped; {anew}go on with: mixtral train --resume {out}") from None
    finally:
        unlock_folder(out)


def _pretrain(
    config: PretrainConfig, out: Path, checkpoint: Path | None, display: Display, threads: int | None
) -> Trained:
    require_packages(config.trackers)
    check_memory(config)
    _use_threads(out, display, threads)
    keep_freed_memory()
    tokenizer = _tokenizer(config, out, display)
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    config = config.replace(model=config.model.replace(**ids))
    run = _run(config, tokenizer, _data(config, tokenizer, out, display), out, display)
    if start := checkpoint or latest_checkpoint(out):
        run.resume(start)
    if threads is not None:
        record_threads(out, threads)
    if config.compile:
        for block in run.model.layers:
            block.compile(fullgraph=True)
    validation = run.train()
    final = save_final(run, tokenizer)
    assert run.progress.start_loss is not None  # a run validates before its first step
    return Trained(final, run.progress.start_loss, validation, run)


def _use_threads(out: Path, display: Display, changed: int | None) -> None:
    """Compute with `changed` threads, or as recorded; what speaks against that is said when the run goes on."""
    threads, cores = recorded_threads(out), cpu_count()
    set_threads(changed or threads)
    if changed is not None:
        return
    try:
        asked = asked_threads()
    except UsageError:  # of what is no number, which decides nothing here
        asked = None
    if latest_checkpoint(out) and (threads > cores or asked not in (None, threads)):
        few = "there is 1 core" if cores == 1 else f"there are {cores} cores"
        here = f"{few}, so it is slower" if threads > cores else f"not OMP_NUM_THREADS={asked}"
        display.say(f"threads: {threads} as before, for the same bits; {here}; --resume with --threads N changes it")


def save_final(run: Run, tokenizer: Tokenizer) -> Path:
    """Write the model, its tokenizer and its configuration to OUT/final, as transformers reads them.

    What else lies there, put there after an earlier end of the run, stays. Raises WeightsError, naming the tensor, for
    weights that are not finite.
    """
    final = run.folder / "final"
    with atomic_folder(final, replace=True) as folder:
        try:
            write_hf({n: p.detach() for n, p in run.state.weights.items()}, run.model.config, folder)
        except WeightsError as error:
            raise WeightsError(f"{final}: not written; the run's checkpoints are as they were. {error}") from None
        tokenizer.save(folder)
        atomic_write(folder / "training.json", (run.folder / "config.json").read_text())
    return final


def _tokenizer(config: PretrainConfig, out: Path, display: Display) -> Tokenizer:
    folder = out / "tokenizer"
    if not folder.exists():
        if config.tokenizer is None:
            with display.working(f"learning a vocabulary of {config.model.vocab_size} tokens"):
                tokenizer = train_bpe(_sample(config), config.model.vocab_size)
        else:
            tokenizer = load_tokenizer(config.tokenizer)
        with atomic_folder(folder) as new:
            tokenizer.save(new)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config)
    return tokenizer


def _sources(config: PretrainConfig) -> list[Source]:
    return [Source.parse(spec) for spec in config.data]


def _sample(config: PretrainConfig) -> list[str]:
    """The texts that a vocabulary is learnt from: every n-th document, so that all parts of the corpus are in it."""
    bad = BadInput(config.skip_bad)
    texts = [document.text for source in _sources(config) for document in documents(source, bad)]
    if not texts:
        raise DataError(f"{', '.join(config.data)}: no text to train on; give more")
    return texts[:: max(1, round(sum(map(len, texts)) / TOKENIZER_CHARACTERS))]


def _data(config: PretrainConfig, tokenizer: Tokenizer, out: Path, display: Display) -> TokenData:
    if latest_checkpoint(out):  # a run that has begun keeps its data, whatever became of the sources since
        return TokenData(out / "data", tokenizer)
    with display.working("tokenising") as progress:
        data = prepare(
            _sources(config), tokenizer, out / "data", seed=config.seed, skip_bad=config.skip_bad,
            progress=lambda p: progress(f"tokenising: {p.documents:,} documents, {p.tokens:,} tokens"),
        )  # fmt: skip
    counts = data.summary()
    display.say(
        f"{counts['train']['tokens']:,} tokens to train on and {counts['val']['tokens']:,} held out, from "
        f"{counts['train']['documents'] + counts['val']['documents']:,} documents; {counts['duplicates']:,} repeated "
        f"and {counts['skipped']:,} unreadable ones left out"
    )
    return data


def _run(config: PretrainConfig, tokenizer: Tokenizer, data: TokenData, out: Path, display: Display) -> Run:
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    model = initialise(Mixtral(config.model), torch.Generator().manual_seed(config.seed)).to(device)
    if config.recompute:
        recompute_layers(model)
    loader = Loader(data, config.rows, config.context, config.seed)
    with display.working("measuring the peak matmul throughput"):
        rate = PeakMatmul.measure(dtype, device)
    watch = _watch(config, out, display) if device.type == "cpu" else None
    return Run(
        folder=out, config=config, state=TrainState.of(model, config, dtype, data.domains), loader=loader,
        val_batches=loader.val_batches(config.val_tokens),
        byte_lengths_V=torch.from_numpy(tokenizer.byte_lengths()), display=display, peak_matmul=rate, watch=watch,
    )  # fmt: skip


def _watch(config: PretrainConfig, out: Path, display: Display) -> ThreadWatch:
    threads = torch.get_num_threads()
    counts = sorted({*counts_to_try(cpu_count()), threads})
    measure = None if config.compile else partial(measure_training, config, counts)  # compiling anew takes long
    return ThreadWatch(out, threads, measure, display.say)
