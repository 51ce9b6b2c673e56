"""Engines that generate: ours, llama.cpp, transformers and vLLM, each in a process of its own, asked in one way.

An engine is called with a Task and answers with a Run. What is timed is the task's generated tokens, from the moment
the first one after the prompt is there; or the prompt itself, where none is to be generated.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

import mixtral
from lib.common import PEERS, Apart, other_environment
from mixtral.engine import SamplingParams
from mixtral.runtime import set_threads

FIRST_ID = 3  # random prompts leave out the first ids, which stand for no text


class Task(NamedTuple):
    """`batch` requests of `context` random tokens each, continued by `tokens` more; 0: their reading is timed."""

    context: int
    tokens: int
    batch: int = 1


class Run(NamedTuple):
    rate: float  # tokens/s, of all requests together
    peak: int  # bytes of memory that the engine's process has taken at most; 0: not known


class Engine(Protocol):
    """`settings` is what a reader of the figures has to know."""

    title: str
    settings: str

    def __call__(self, task: Task) -> Run: ...
    def close(self) -> None: ...


def prompts(task: Task, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(task.context)
    return torch.randint(FIRST_ID, vocab_size, (task.batch, task.context), generator=generator).tolist()


def peak_bytes(process: int | str = "self") -> int:
    """The most memory a process has had resident; 0 where the system does not tell, or it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


class InProcess:
    """An engine that Python code runs: `make(*args)`, in a process of its own, returns what turns a Task into a Run."""

    def __init__(self, title: str, settings: str, make: Callable[..., Callable[..., object]], *args: Any,
                 environment: Mapping[str, str | None] | None = None) -> None:
        self.title, self.settings = title, settings
        self._run = Apart(make, args, environment=environment)

    def __call__(self, task: Task) -> Run:
        run: Run = self._run(task)
        return run

    def close(self) -> None:
        self._run.close()


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(folder: Path, threads: int) -> Engine:
    settings = "the engine; no guesses at next tokens and nothing remembered, so that all is computed"
    return InProcess("mixtral", settings, _our_run, str(folder), threads)


def _our_run(path: str, threads: int) -> Callable[[Task], Run]:
    set_threads(threads)
    llm = mixtral.LLM(path, prefix_cache=False, speculate="off")

    def run(task: Task) -> Run:
        params = SamplingParams(temperature=0.0, max_tokens=task.tokens + 1, ignore_eos=True)
        started = time.perf_counter()
        pieces = llm.engine.stream(prompts(task, llm.lm.config.vocab_size), params)
        reading = set(range(task.batch))
        while reading:  # the first prompts are answered while the last ones are read
            reading.discard(next(pieces).sequence)
        first = time.perf_counter()
        count = sum(1 for _ in pieces)
        ended = time.perf_counter()
        if task.tokens == 0:
            return Run(task.batch * task.context / (first - started), peak_bytes())
        return Run(count / (ended - first), peak_bytes())

    return run


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


class LlamaCpp:
    """llama-bench, and llama-batched-bench for several requests: one start of the program a run, its own timing.

    The second was not built where this was written, and never run: its options and output are taken from its source.
    """

    def __init__(self, folder: Path, file: Path, threads: int) -> None:
        self.title, self.file, self.threads = "llama.cpp", file, threads
        self.bench, self.batched = folder / "llama-bench", folder / "llama-batched-bench"
        text = subprocess.run([self.bench, "--help"], capture_output=True, text=True, check=True).stdout
        self.load = ["-mmp", "0"] if "-mmp" in text else ["-lm", "none"]
        how = f"llama-bench -t {threads} {' '.join(self.load)} -r 1"
        self.settings = f"{how}, f16 cache; its files are written by mixtral convert"

    def __call__(self, task: Task) -> Run:
        if task.batch > 1:
            return self._batched(task)
        n = ("-p", "0", "-n", task.tokens, "-d", task.context) if task.tokens else ("-p", task.context, "-n", "0")
        how = ("-t", self.threads, *self.load, "-r", "1", "-o", "json")
        output, peak = _program([self.bench, "-m", self.file, *n, *how])
        return Run(parse_llama_bench(output), peak)

    def _batched(self, task: Task) -> Run:
        load = ["--no-mmap"] if "-mmp" in self.load else self.load  # older and newer programs
        room = task.batch * (task.context + task.tokens)
        output, peak = _program([
            self.batched, "-m", self.file, "-c", room, "-npp", task.context, "-ntg", task.tokens, "-npl", task.batch,
            "-t", self.threads, *load, "--output-format", "jsonl",
        ])  # fmt: skip
        return Run(parse_batched_bench(output), peak)

    def close(self) -> None:
        pass


def find_llama_cpp(folder: str | None) -> Path | None:
    """Where llama-bench lies: in the folder named, else on the path. SystemExit when the folder has none."""
    if folder is None:
        found = shutil.which("llama-bench")
        return Path(found).parent if found else None
    if not (Path(folder) / "llama-bench").exists():
        raise SystemExit(f"--llama-cpp {folder}: no llama-bench in it")
    return Path(folder)


def parse_llama_bench(output: str) -> float:
    """Tokens/s of the one test in llama-bench's JSON."""
    (test,) = json.loads(output)
    return float(test["avg_ts"])


def parse_batched_bench(output: str) -> float:
    """Tokens/s that were generated by the one test in llama-batched-bench's lines of JSON."""
    (test,) = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    return float(test["speed_tg"])


def _program(command: list[object]) -> tuple[str, int]:
    """-> (what it printed, the most memory it had when looked at, ten times a second)."""
    words, pipe, peak = [str(word) for word in command], subprocess.PIPE, 0
    with other_environment(PEERS), subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as p:
        while True:
            try:
                output, errors = p.communicate(timeout=0.1)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, peak_bytes(p.pid))
    if p.returncode:
        raise SystemExit(f"{command[0]} failed: {errors.strip().splitlines()[-1:]}")
    return output, peak


# -- vLLM --------------------------------------------------------------------------------------------------------------


def vllm(folder: Path, threads: int) -> Engine:
    """Its CPU build, at bf16. Written after its documentation and never run: there was none to run."""
    return InProcess("vLLM", "bf16, CPU build", _vllm_run, str(folder), threads, environment=PEERS)


def _vllm_run(path: str, threads: int) -> Callable[[Task], Run]:
    import os

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    from vllm import LLM
    from vllm import SamplingParams as Params

    llm = LLM(path, dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False)
    vocab_size = llm.llm_engine.model_config.get_vocab_size()

    def seconds(task: Task, tokens: int) -> float:
        requests = [{"prompt_token_ids": ids} for ids in prompts(task, vocab_size)]
        params = Params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate(requests, params, use_tqdm=False)
        return time.perf_counter() - started

    def run(task: Task) -> Run:
        first = seconds(task, 1)
        if task.tokens == 0:
            return Run(task.batch * task.context / first, peak_bytes())
        return Run(task.batch * task.tokens / (seconds(task, task.tokens + 1) - first), peak_bytes())

    return run
