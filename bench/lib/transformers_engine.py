"""transformers as an engine: its settings tried for a moment each, the fastest kept."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lib.common import PEERS, Apart, PeerError
from lib.engines import Engine, InProcess, Run, Task, peak_bytes, prompts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATIENCE = 180.0  # seconds for loading, or for one trial, compilation included


class Setting(NamedTuple):
    dtype: str
    attention: str
    experts: str
    compiled: bool = False

    @property
    def title(self) -> str:
        return f"{self.dtype}, {self.attention}, {self.experts}" + (", compiled, static cache" if self.compiled else "")


PLAIN = [
    Setting(dtype, attention, experts)
    for dtype in DTYPES
    for attention in ("eager", "sdpa")
    for experts in ("eager", "grouped_mm", "batched_mm")
]
COMPILED = [Setting(dtype, "sdpa", experts, True) for dtype in DTYPES for experts in ("grouped_mm", "batched_mm")]


def choices(trial: Task) -> list[Setting]:
    """All for decoding; for a prompt neither batched_mm, which gathers an expert's weights for every routed row, nor
    what `generate` compiles."""
    return [*PLAIN, *COMPILED] if trial.tokens else [setting for setting in PLAIN if setting.experts != "batched_mm"]


def best(folder: Path, threads: int, trial: Task, title: str | None = None) -> tuple[Setting, dict[str, float]]:
    """The fastest setting at a short task, and tokens/s of all; those that failed or took too long have 0.

    `title`: of the setting to take without a trial. SystemExit when there is none of that name.
    """
    settings = choices(trial)
    if title is not None:
        found = [setting for setting in settings if setting.title == title]
        if not found:
            raise SystemExit(f"--setting: none is called {title!r}; known: {'; '.join(s.title for s in settings)}")
        return found[0], {}
    rates: dict[Setting, float] = {}
    for setting in settings:
        try:
            run = Apart(_run, (str(folder), threads, setting), PATIENCE, PEERS)
            run(trial)  # of the same length: a compiled step is made for one size of cache
            rates[setting] = run(trial).rate
            run.close()
        except PeerError as error:
            rates[setting] = 0.0
            print(f"transformers, {setting.title}: {error}", file=sys.stderr)
        print(f"transformers, {setting.title}: {rates[setting]:.1f} tokens/s", file=sys.stderr)
    fastest = max(rates, key=lambda setting: rates[setting])
    return fastest, {setting.title: rate for setting, rate in rates.items()}


def engine(folder: Path, threads: int, setting: Setting) -> Engine:
    return InProcess("transformers", setting.title, _run, str(folder), threads, setting, environment=PEERS)


def _run(path: str, threads: int, setting: Setting) -> Callable[[Task], Run]:
    import transformers

    warnings.filterwarnings("ignore")  # the compiler's, about transformers' own code
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES[setting.dtype], attn_implementation=setting.attention,
        experts_implementation=setting.experts,
    )  # fmt: skip
    model.generation_config.eos_token_id = None
    how = _compiled() if setting.compiled else {}

    @torch.inference_mode()
    def run(task: Task) -> Run:
        ids_BS = torch.tensor(prompts(task, model.config.vocab_size))
        started = time.perf_counter()
        if task.tokens == 0:
            model(input_ids=ids_BS, logits_to_keep=1)
            return Run(ids_BS.numel() / (time.perf_counter() - started), peak_bytes())
        times = _Times()
        model.generate(
            ids_BS, max_new_tokens=task.tokens + 1, do_sample=False, pad_token_id=0,
            use_cache=True, streamer=times, **how,
        )  # fmt: skip
        return Run(task.batch * task.tokens / (times.seen[-1] - times.seen[1]), peak_bytes())

    return run


def _compiled() -> dict[str, Any]:
    """Arguments of `generate` that compile the step, on a CPU too; it reads a cache of fixed size."""
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=False, dynamic=False, mode="default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


class _Times:
    """What `generate` takes for a streamer: it notes when the prompt and each token were there."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, value: object) -> None:
        del value
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        pass
