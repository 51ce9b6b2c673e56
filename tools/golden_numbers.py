"""Record the numbers and files that a change should not move, and compare two records.

    python tools/golden_numbers.py record before.json      # on the commit before
    python tools/golden_numbers.py record after.json       # on the commit after, same machine
    python tools/golden_numbers.py compare before.json after.json

Recorded through the command line and `mixtral.load`, on one thread: the metrics of a short run for every router,
balancing objective and optimizer; logits of the shipped model in every precision; its greedy and sampled tokens; the
sha256 of every file that convert, quantize, synth and train write. On another processor, or another torch, bits differ.
`compare` lists what differs, by name, and exits with 1 if anything does.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads: bits depend on the number of threads

import torch

import mixtral
from mixtral import cli

Record = dict[str, Any]  # name -> what JSON holds

WORDS = "router expert token layer weight gate score load batch loss step norm head query key value".split()
MODEL = "vocab_size=320 dim=32 n_layers=2 n_heads=4 n_kv_heads=2 head_dim=8 ffn_dim=48 n_experts=4".split()
RUN = "context=32 rows=4 val_every=4 val_tokens=256 save_every=8 stats_every=2 device=cpu dtype=fp32".split()
ROUTERS = (
    "topk topk?bias=true topk?capacity_factor=0.5 switch noisy jitter sigmoid sigmoid?bias=true&scale=2.5 "
    "grouped?groups=2&taken=1 learned_k token_k top_p?p=0.6 min_p?p=0.5 threshold?most=4 expert_choice"
).split()
EXTRA = {  # router -> what it needs besides its name
    "switch": ["model.experts_per_token=1"],
    "learned_k": ["balance=micro_batch?weight=0.01,k_price?weight=0.01"],
    "threshold?most=4": ["balance=threshold"],
}
BALANCES = (
    "micro_batch?weight=0.01 global_batch?weight=0.01 global_batch?weight=0.01&exact=false z_loss?weight=0.01 "
    "guided?weight=0.01 loss_free smebu quantile"
).split()
BIAS = ("loss_free", "smebu", "quantile")  # objectives that move a router's bias
HOW: tuple[list[object], ...] = (
    ["--temperature", 0], ["--temperature", 0.8, "--top-k", 40, "--top-p", 0.9, "--seed", 3], ["--k", 1],
)  # fmt: skip
PROMPTS = ("def fibonacci(n):", "To be, or not to be", "import os\n\n\nclass Router:\n")


def corpus(folder: Path) -> list[str]:
    """The same sixty small documents everywhere, as two domains -> data sources."""
    chosen = random.Random(7)
    lines = [" ".join(chosen.choice(WORDS) for _ in range(chosen.randrange(5, 40))) + f".\nNo {i}" for i in range(60)]
    for domain, part in (("one", lines[:30]), ("two", lines[30:])):
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    return [f"{domain}.jsonl?domain={domain}" for domain in ("one", "two")]


def run(*arguments: object) -> str:
    """What `mixtral ARGUMENTS` prints; raises RuntimeError when it fails."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    if code:
        raise RuntimeError(f"mixtral {' '.join(map(str, arguments))}: {err.getvalue().strip()}")
    return out.getvalue()


def attempt(record: Record, name: str, make: Any) -> None:
    """Keep what `make` returns; a failure is recorded by its message, and seen when records are compared."""
    try:
        record[name] = make()
    except Exception as error:
        record[name] = f"failed: {type(error).__name__}: {str(error)[:300]}"
    print(name, file=sys.stderr)


def hashes(path: Path) -> dict[str, str]:
    """The sha256 of a file, or of each file of a folder, by name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(f.relative_to(path.parent)): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


def training(sources: list[str], folder: Path, *settings: str) -> Record:
    """The metrics of each step of a short run, and its model's files."""
    sets = [f"--set=model.{field}" for field in MODEL] + [f"--set={field}" for field in (*RUN, *settings)]
    data = [f"--data={source}" for source in sources]
    run("train", "tiny", "--out", folder, *data, "--max-steps", 8, *sets)
    files = hashes(folder / "final") | hashes(folder / "data")
    for name in ("final/training.json", "data/index.json"):  # versions and hardware; full paths of the sources
        files.pop(name)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {"metrics": {f"line {i}": json.loads(line) for i, line in enumerate(lines)}, "files": files}


def trainings(record: Record, work: Path) -> None:
    sources = corpus(work)
    cases = {f"router {r}": [f"model.router={r}", "model.experts_per_token=2", *EXTRA.get(r, [])] for r in ROUTERS}
    for balance in BALANCES:
        router = "topk?bias=true" if balance in BIAS else "topk"
        cases[f"balance {balance}"] = [f"model.router={router}", f"balance={balance}"]
    cases |= {"muon": ["optimizer=muon"], "bf16": ["dtype=bf16"], "recompute": ["recompute=true"]}
    cases |= {"accumulation": ["accumulation=2"], "window": ["model.sliding_window=8"], "dense": ["model.n_experts=1",
              "model.experts_per_token=1", "balance="], "tied": ["model.tie_embeddings=true"]}  # fmt: skip
    for number, (name, settings) in enumerate(cases.items()):
        attempt(record, f"train {name}", lambda n=number, s=settings: training(sources, work / f"run{n}", *s))


def shipped(record: Record) -> None:
    """Logits and tokens of the shipped model in each precision."""
    for dtype in ("fp32", "bf16", "fp16"):
        lm = mixtral.load("mixtral-nano", dtype=dtype, device="cpu")
        assert lm.tokenizer is not None
        ids = lm.tokenizer.encode(PROMPTS[0] * 5)
        attempt(record, f"logits {dtype}", lambda m=lm, i=ids: digest(m.logits(i)))
        attempt(record, f"routing {dtype}", lambda m=lm, i=ids: [r.experts_TK.tolist() for r in m.routing(i)])
    for dtype in ("fp32", "bf16"):
        for how in HOW:
            for number, prompt in enumerate(PROMPTS):
                name = f"generate {dtype} {' '.join(map(str, how))} {number}"
                attempt(record, name, lambda d=dtype, h=how, p=prompt: tokens(p, d, h))


def tokens(prompt: str, dtype: str, how: list[object]) -> list[int]:
    seeded = [*how, *([] if "--seed" in how else ["--seed", 1])]
    found: list[int] = json.loads(run("generate", "--prompt", prompt, "--dtype", dtype, "--max-tokens", 48, "--json",
                                      *seeded))["tokens"]  # fmt: skip
    return found


def digest(logits: torch.Tensor) -> dict[str, object]:
    sha = hashlib.sha256(logits.float().contiguous().numpy().tobytes()).hexdigest()[:16]
    return {"sha256": sha, "last": logits[-1, :8].float().tolist()}


def written(record: Record, work: Path) -> None:
    """The files that each command writes."""
    jobs: dict[str, list[object]] = {
        "hf": ["convert", "mixtral-nano", work / "hf", "--to", "hf"],
        "fused": ["convert", "mixtral-nano", work / "fused", "--to", "hf", "--fused"],
        "fp16": ["convert", "mixtral-nano", work / "fp16", "--to", "hf", "--dtype", "fp16"],
        "mistral": ["convert", "mixtral-nano", work / "mistral", "--to", "mistral"],
        "synth": ["synth", "tiny", work / "synth", "--bits", "16", "--seed", 1],
    }
    for kind in ("bf16", "q8_0", "q4_0"):
        jobs[f"{kind}.gguf"] = ["convert", "mixtral-nano", work / f"{kind}.gguf", "--to", "gguf", "--type", kind]
    for bits in ("8", "4", "mixed"):
        jobs[f"bits{bits}"] = ["quantize", "mixtral-nano", work / f"bits{bits}", "--bits", bits]
    jobs["calibrated"] = ["quantize", "mixtral-nano", work / "calibrated", "--bits", "4", "--calibrate",
                          "one.jsonl", "--tokens", 2048]  # fmt: skip
    for name, arguments in jobs.items():
        attempt(record, f"write {name}", lambda n=name, a=arguments: (run(*a), hashes(work / n))[1])
    for name in ("bits8", "bits4", "q8_0.gguf"):
        attempt(record, f"logits {name}", lambda n=name: digest(mixtral.load(n, device="cpu").logits(range(9, 60))))


def flat(value: object, name: str = "") -> dict[str, object]:
    """Nested dictionaries by joined names."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name} | {key}" if name else key).items()}


def compare(before: Record, after: Record) -> int:
    old, new = flat(before), flat(after)
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    for name in differing:
        values = [str(record.get(name, "not there"))[:200] for record in (old, new)]
        print(f"{name}\n  before {values[0]}\n  after  {values[1]}")
    print(f"{len(old.keys() | new.keys()) - len(differing)} equal, {len(differing)} differ")
    return 1 if differing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.what == "compare":
        before, after = (json.loads(file.read_text()) for file in arguments.files)
        return compare(before, after)
    logging.disable(logging.WARNING)
    record: Record = {}
    file = arguments.files[0].resolve()
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        trainings(record, Path(work))
        shipped(record)
        written(record, Path(work))
    file.write_text(json.dumps(record, indent=1) + "\n")
    failed = [name for name, value in record.items() if isinstance(value, str)]
    print(f"{len(record)} recorded in {file}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
