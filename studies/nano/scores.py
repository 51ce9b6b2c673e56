r"""What a small trained model is worth: its held-out code against gzip and xz, and held-out arithmetic, exactly right.

    python studies/nano/scores.py RUN [RUN ...] [--tasks 500] [--untrained] [--shipped] [--json FILE]

RUN is the folder of a training run, such as `mixtral train nano --out runs/nano` leaves. Further runs are scored on the
same files and tasks: the dense model of equal active compute, say, which is

    mixtral train nano --out runs/nano-dense --set model.n_experts=1 --set model.experts_per_token=1 \
        --set model.ffn_dim=384 --set balance=

Bits a byte: all held-out documents of the first run's domain "code", each read in windows of the training's context,
half of which is context alone but in the first; the end of each document counts. The compressors get the same bytes,
all in one stream, and file by file.

Exact match: tasks of the recipe's arithmetic, of a seed of their own, none of which is in the training text. The answer
is greedy, up to the first line end.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mixtral
from mixtral.data.corpora import Task, reasoning_tasks
from mixtral.data.readers import BadInput
from mixtral.data.sources import Source, documents
from mixtral.data.store import NO_TARGET, TokenData
from mixtral.engine import SamplingParams
from mixtral.errors import DataError, UsageError
from mixtral.files import atomic_write
from mixtral.lm import LM
from mixtral.model import Mixtral, Ragged, initialise
from mixtral.recipes.nano import ARITHMETIC
from mixtral.runtime import environment, set_threads
from mixtral.shipped import SHIPPED
from mixtral.train.record import recorded_config

HELD_OUT_SEED = 7_777
WINDOWS_AT_A_TIME = 8
PROMPTS_AT_A_TIME = 50


def held_out_code(run: Path, lm: LM) -> list[str]:
    """The texts of domain "code" that the run held out. DataError when there are none."""
    assert lm.tokenizer is not None
    data = TokenData(run / "data", lm.tokenizer)
    place = data.domains.index("code") if "code" in data.domains else -1
    mine = [m for m, domain in enumerate(data.val.domain_M) if domain == place]
    if not mine:
        raise DataError(f"{run}: holds out no documents of domain code; name a run on the standard library")
    return [lm.tokenizer.decode(data.val.tokens(m).tolist()[1:-1]) for m in mine]


@torch.no_grad()
def nats(model: Mixtral, ids: Sequence[int], window: int) -> float:
    """-log probability of ids[1:]; windows overlap by half, and count what the one before did not."""
    total, batch = 0.0, list[tuple[Sequence[int], int]]()
    for first, counted in windows(len(ids) - 1, window):
        batch.append((ids[first : first + window + 1], counted))
        if len(batch) == WINDOWS_AT_A_TIME:
            total, batch = total + _window_nats(model, batch), []
    return total + (_window_nats(model, batch) if batch else 0.0)


def windows(targets: int, window: int) -> Iterator[tuple[int, int]]:
    """(first input, how many targets at the end of its window count), until each of `targets` has counted once."""
    done = 0
    while done < targets:
        first = max(0, done - window // 2)
        last = min(first + window, targets)
        yield first, last - done
        done = last


def _window_nats(model: Mixtral, batch: Sequence[tuple[Sequence[int], int]]) -> float:
    targets_T = torch.cat([
        torch.tensor([NO_TARGET] * (len(ids) - 1 - counted) + list(ids[len(ids) - counted :])) for ids, counted in batch
    ])  # fmt: skip
    output = model(Ragged.of([ids[:-1] for ids, _ in batch]), targets=targets_T, loss_weights="mean")
    return float(output.loss) * sum(counted for _, counted in batch)


def code_score(lm: LM, texts: Sequence[str], window: int) -> float:
    """Bits a byte of the texts."""
    assert lm.tokenizer is not None
    total = sum(nats(lm.model, ids, window) for ids in lm.tokenizer.encode_batch(list(texts), bos=True, eos=True))
    return total / math.log(2) / sum(len(text.encode()) for text in texts)


def compressed(texts: Sequence[str]) -> dict[str, float]:
    """Bits a byte of compressors at their strongest, in one stream and file by file."""
    files = [text.encode() for text in texts]
    size = sum(map(len, files))
    tools = {"gzip -9": lambda data: gzip.compress(data, 9), "xz -9": lambda data: lzma.compress(data, preset=9)}
    found = {}
    for name, tool in tools.items():
        found[name] = 8 * len(tool(b"".join(files))) / size
        found[f"{name}, each file"] = 8 * sum(len(tool(data)) for data in files) / size
    return found


def held_out_tasks(run: Path, count: int) -> list[Task]:
    """Different tasks of the recipe's arithmetic that stand in none of the run's generated training text."""
    trained = {
        document.text
        for source in map(Source.parse, recorded_config(run).data)
        if source.name.startswith("reasoning-gym")
        for document in documents(source, BadInput())
    }
    source = Source.parse(ARITHMETIC)
    found: dict[str, Task] = {}
    for task in reasoning_tasks(HELD_OUT_SEED, source.name.partition(":")[2], source.level):
        if f"{task.question}\n{task.answer}" not in trained:
            found[task.question] = task
        if len(found) == count:
            return list(found.values())
    raise AssertionError("tasks never end")


def answers(lm: LM, tasks: Sequence[Task]) -> list[str]:
    """Greedy answers, to the end of their line."""
    assert lm.tokenizer is not None
    params = SamplingParams(max_tokens=24, stop=("\n",))
    found = []
    for first in range(0, len(tasks), PROMPTS_AT_A_TIME):
        prompts = [lm.tokenizer.encode(f"{task.question}\n") for task in tasks[first : first + PROMPTS_AT_A_TIME]]
        found += [answer.text for answer in lm.engine.generate(prompts, params)]
    return found


def exact_match(tasks: Sequence[Task], given: Sequence[str]) -> dict[str, float]:
    """The share of right answers, over all tasks and by generator."""
    right: dict[str, list[bool]] = {"all": []}
    for task, answer in zip(tasks, given, strict=True):
        for name in ("all", task.generator):
            right.setdefault(name, []).append(answer.strip() == task.answer.strip())
    return {name: sum(hits) / len(hits) for name, hits in right.items()}


def score(name: str, lm: LM, texts: Sequence[str], tasks: Sequence[Task], window: int) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": lm.config.n_params(),
        "active_parameters": lm.config.n_active_params(),
        "code_bits_per_byte": code_score(lm, texts, window),
        "exact_match": exact_match(tasks, answers(lm, tasks)),
    }


def untrained(run: Path, lm: LM) -> LM:
    """The model with which the run began."""
    seed = recorded_config(run).seed
    return LM(initialise(Mixtral(lm.config), torch.Generator().manual_seed(seed)), lm.tokenizer)


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['code_files']} held-out files of {result['code_bytes']:,} bytes; "
                        f"{result['tasks']} tasks of arithmetic", title_justify="left")  # fmt: skip
    for column in ("", "parameters", "active", "bits a byte", "exact match"):
        table.add_column(column, justify="right" if column else "left")
    for row in result["models"]:
        sizes = f"{row['parameters'] / 1e6:.2f} M", f"{row['active_parameters'] / 1e6:.2f} M"
        table.add_row(row["name"], *sizes, f"{row['code_bits_per_byte']:.3f}", f"{row['exact_match']['all']:.1%}")
    for name, bits in result["compressors"].items():
        table.add_row(name, "", "", f"{bits:.3f}", "")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--untrained", action="store_true", help="score the first run's weights before training too")
    parser.add_argument("--shipped", action="store_true", help="score the package's mixtral-nano too: weights in bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if options.json is not None and options.json.exists():
        parser.error(f"--json {options.json}: exists already; name a new file")
    set_threads()
    models = [(run.name, mixtral.load(run / "final")) for run in options.runs]
    first = options.runs[0]
    if options.untrained:
        models.append((f"{first.name}, untrained", untrained(first, models[0][1])))
    if options.shipped:
        models.append((f"{SHIPPED}, as shipped", mixtral.load(SHIPPED)))
    texts, tasks = held_out_code(first, models[0][1]), held_out_tasks(first, options.tasks)
    if any(held_out_code(run, lm) != texts for run, (_, lm) in zip(options.runs, models, strict=False)):
        raise UsageError("the runs held out other files: train them on the same data with the same seed")
    window = recorded_config(first).context
    result = {
        "environment": environment(), "code_files": len(texts), "code_bytes": sum(len(t.encode()) for t in texts),
        "tasks": len(tasks), "models": [score(name, lm, texts, tasks, window) for name, lm in models],
        "compressors": compressed(texts),
    }  # fmt: skip
    show(result)
    if options.json:
        atomic_write(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
