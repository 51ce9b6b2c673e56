"""Kill a training run again and again, go on each time, and compare what comes out with an uninterrupted run.

    python tools/kill_and_resume.py --kills 20 --dtype bf16

The run is a small one of the command line (`mixtral train tiny`, shrunk by --set). Each kill is a SIGKILL: one of ten
comes before the first step, a third while a checkpoint is being written, the rest at random steps. After each kill
every checkpoint that is listed must load; then follows `mixtral train --resume`. At the end metrics.jsonl and all
tensors of the finished model and of the kept checkpoints must equal the uninterrupted run's bit for bit, and nothing
half-written may be left. Exit code 1 if any of this fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from safetensors import deserialize

POLL = 0.001  # seconds between looks at the run's folder
PATIENCE = 600.0  # seconds without the awaited moment, after which a run counts as hung
PREPARING = ("config.json", "tokenizer")  # what a run has written when a kill "while preparing" may come
DELAY = {"preparing": 0.2, "saving": 0.02, "step": 0.02}  # seconds from that moment to the kill, at most
MODEL = "vocab_size=320 dim=32 n_layers=2 n_heads=4 n_kv_heads=2 head_dim=8 ffn_dim=48 n_experts=4".split()
RUN = "context=32 rows=4 val_every=5 val_tokens=256 save_every=5 stats_every=3 device=cpu".split()
WORDS = "router expert token layer weight gate score load batch loss step norm head query key value".split()


class Process(Protocol):
    """What is asked of a started run; subprocess.Popen has it."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


Start = Callable[[list[str], Path], Process]  # from the arguments of `mixtral`, and the file for what it prints


class Failed(Exception):
    """The run did not do what it should."""


class Kill(NamedTuple):
    """What one kill met."""

    kind: str  # preparing, saving, step: what really happened, not what was planned
    step: int | None  # the last one logged; None before the first
    resumes_from: int | None  # the newest checkpoint's step; None: begins anew

    def __str__(self) -> str:
        at = {"preparing": "while preparing", "saving": f"in a save after step {self.step}"}
        said = f"at step {self.step}"
        on = "no checkpoint yet: begins anew" if self.resumes_from is None else f"resumes from step {self.resumes_from}"
        return f"killed {at.get(self.kind, said):27} {on}"


def command_line(arguments: list[str], log: Path) -> Process:
    """Start `mixtral` in one thread, as the result is promised for one number of threads."""
    with log.open("a") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "mixtral", *arguments],
            stdout=out,
            stderr=out,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def new_run(out: Path, data: Path, dtype: str, seed: int, steps: int) -> list[str]:
    """The arguments that begin the run in `out`, after writing its corpus to `data`."""
    draw = random.Random(seed)
    data.mkdir(exist_ok=True)
    for i in range(60):
        (data / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=draw.randrange(5, 40))) + f".\nNo {i}\n")
    arguments = ["train", "tiny", "--out", str(out), "--data", str(data), f"--seed={seed}", f"--max-steps={steps}"]
    for field in [*RUN, f"dtype={dtype}", *(f"model.{m}" for m in MODEL)]:
        arguments += ["--set", field]
    return arguments


def finish(process: Process, log: Path) -> None:
    """Wait for the end of a run; Failed with its last line when it is not a good one."""
    if process.wait() != 0:
        raise Failed(f"mixtral ended with code {process.poll()}: {log.read_text().splitlines()[-1:]}")


def torture(run: Path, arguments: list[str], kills: int, steps: int, draw: random.Random, start: Start) -> list[Kill]:
    """Begin a run, kill it `kills` times, let it end; -> what each kill met. Raises Failed."""
    given: list[Kill] = []
    log = run.with_suffix(".log")
    for number, kind in enumerate(plan(kills, draw)):
        begun, older = latest_step(run) or 0, half_saved(run)
        step = begun + draw.randint(1, max(1, 2 * (steps - begun) // (kills - number + 1)))
        reached = (run / PREPARING[number % 2]).exists if kind == "preparing" else at_step(run, step)
        process = start(arguments, log)
        try:
            wait_for(reached, process, log)
            if kind != "preparing":  # on a busy machine the save of step 0 may outlast some steps
                wait_for(lambda: latest_step(run) is not None, process, log)
            if kind == "saving":
                wait_for(in_a_save(run, older), process, log)
            time.sleep(draw.uniform(0, DELAY[kind]))
        finally:
            process.kill()
            process.wait()
        given.append(aftermath(run, older))
        print(f"{number + 1:3}  {given[-1]}", flush=True)
        arguments = ["train", "--resume", str(run)]
    finish(start(arguments, log), log)
    return given


def plan(kills: int, draw: random.Random) -> list[str]:
    """The kinds of the kills in order: those before the first step must come first."""
    preparing, saving = kills // 10, max(1, round(kills / 3))
    later = ["saving"] * saving + ["step"] * (kills - preparing - saving)
    return ["preparing"] * preparing + draw.sample(later, len(later))


# -- the moments of a kill ---------------------------------------------------------------------------------------------


def wait_for(moment: Callable[[], object], process: Process, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not moment():
        if process.poll() is not None:
            raise Failed(f"the run ended before its kill: {log.read_text().splitlines()[-1:]}; give more --steps")
        if time.monotonic() > deadline:
            raise Failed(f"the run hangs: {log.read_text().splitlines()[-1:]}")
        time.sleep(POLL)


def at_step(run: Path, step: int) -> Callable[[], bool]:
    """When `step` is logged, by a process yet to be started: an older log may know the step from before a kill."""
    before = changed(run / "metrics.jsonl")
    return lambda: changed(run / "metrics.jsonl") != before and (logged_step(run) or 0) >= step


def in_a_save(run: Path, older: set[Path]) -> Callable[[], bool]:
    """When a checkpoint is being written; `older` ones were left by kills."""
    return lambda: bool(half_saved(run) - older)


def changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def half_saved(run: Path) -> set[Path]:
    """The folders of checkpoints being written, or left by a kill."""
    return set((run / "checkpoints").glob(".step_*.tmp"))


# -- what is there after it --------------------------------------------------------------------------------------------


def aftermath(run: Path, older: set[Path]) -> Kill:
    """Look at what a kill left, `older` leavings apart; Failed unless every checkpoint listed is whole."""
    from mixtral.model import Mixtral
    from mixtral.runtime import choose_dtype
    from mixtral.train.checkpoint import load_checkpoint
    from mixtral.train.record import checkpoints, recorded_config
    from mixtral.train.state import TrainState

    config = recorded_config(run)
    for path in checkpoints(run):
        state = load_checkpoint(path, TrainState.of(Mixtral(config.model), config, choose_dtype(config.dtype, "cpu")))
        if state["step"] != int(path.name.removeprefix("step_")):
            raise Failed(f"{path} holds step {state['step']}")
    step = logged_step(run)
    kind = "saving" if half_saved(run) - older else "preparing" if step is None else "step"
    return Kill(kind, step, latest_step(run))


def latest_step(run: Path) -> int | None:
    """The step of the newest checkpoint; looked up here by name, not by the code under test."""
    return max((int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")), default=None)


def logged_step(run: Path) -> int | None:
    """The step of the last whole line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else None


def differences(reference: Path, run: Path) -> list[str]:
    """What of the run is not as in the uninterrupted one, and what is left half-written; must be empty."""
    left, right = results(reference), results(run)
    found = [f"{name} is not in both" for name in sorted(left.keys() ^ right.keys())]
    found += [f"{name} differs" for name in sorted(left.keys() & right.keys()) if left[name] != right[name]]
    return found + [f"{path} is left over" for path in run.rglob(".*")]


def results(run: Path) -> dict[str, object]:
    """The metrics, and the tensors of the model and of every checkpoint, as bytes under the names of their files."""
    tensors = {path: dict(deserialize(path.read_bytes())) for path in run.rglob("*.safetensors")}
    return {str(path.relative_to(run)): values for path, values in tensors.items()} | {
        "metrics.jsonl": (run / "metrics.jsonl").read_bytes()
    }


def compare_runs(work: Path, kills: int, dtype: str, seed: int, steps: int, start: Start = command_line) -> list[str]:
    """One uninterrupted and one killed run in `work`; -> their differences. Prints a line a kill; raises Failed."""
    reference, run, data = work / f"{dtype}-whole", work / f"{dtype}-killed", work / "texts"
    log = reference.with_suffix(".log")
    finish(start(new_run(reference, data, dtype, seed, steps), log), log)
    draw = random.Random(seed)
    given = torture(run, new_run(run, data, dtype, seed, steps), kills, steps, draw, start)
    found = differences(reference, run)
    kinds = Counter(kill.kind for kill in given)
    verdict = "; ".join(found) or f"equal bit for bit: {', '.join(sorted(results(run)))}"
    print(f"{dtype}: {kills} kills, {kinds['preparing']} while preparing, {kinds['saving']} in a save; {verdict}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--seed", type=int, default=0, help="of the run, its data and the moments of the kills")
    parser.add_argument("--steps", type=int, help="of the run; by default ten a kill")
    parser.add_argument("--work", type=Path, help="an empty folder to keep the runs in; by default a temporary one")
    options = parser.parse_args()
    steps = options.steps or 10 * options.kills
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            parser.error(f"--work {work}: an empty folder is wanted")
        try:
            return 1 if compare_runs(work, options.kills, options.dtype, options.seed, steps) else 0
        except Failed as error:
            print(f"failed: {error}")
            return 1


if __name__ == "__main__":
    sys.exit(main())
