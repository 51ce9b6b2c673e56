"""Random load on an engine for some minutes: arrivals, lengths, priorities, samples, guesses, and requests taken back.

    python tools/engine_load.py MODEL --minutes 20

A line a minute on standard output, and one of JSON at the end. Exits with 1 when memory has grown by more than 2 %
after the first fifth, a request is stuck, an answer is another than the plain loop's, or a block is lost.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

import torch

from mixtral import LLM, SamplingParams
from mixtral.engine import Request, generate
from mixtral.hardware import used_memory_bytes

STUCK_SECONDS = 120.0


def main() -> int:
    """Drive the engine -> the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="mixtral-nano")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--cache-mib", type=int, default=24, help="of keys and values: little, so that it runs out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    llm = LLM(args.model, cache_bytes=args.cache_mib << 20, max_sequences=32)
    load = Load(llm, random.Random(args.seed))
    started, minute, samples = time.monotonic(), 0, []
    while (elapsed := time.monotonic() - started) < 60 * args.minutes:
        load.step()
        if elapsed >= 60 * minute:
            minute += 1
            samples.append((elapsed, used_memory_bytes(torch.device("cpu"))))
            print(f"{elapsed / 60:5.1f} min  {load.text()}  {samples[-1][1] / 2**20:.1f} MiB", flush=True)
    load.finish()
    settled = [n for t, n in samples if t >= 12 * args.minutes] or [samples[-1][1]]
    growth = max(settled) / settled[0] - 1
    pool = llm.engine.pool
    lost = pool.n_blocks - pool.n_free
    figures = {"minutes": args.minutes, "memory_growth": growth, "blocks_lost": lost}
    print(json.dumps(load.counts | figures | llm.metrics()))
    return int(growth > 0.02 or load.counts["wrong"] > 0 or load.counts["stuck"] > 0 or lost > 0)


class Load:
    """Requests that come and go."""

    def __init__(self, llm: LLM, rng: random.Random) -> None:
        self.llm, self.rng, self.number = llm, rng, 0
        self.live: list[tuple[Request, dict[str, Any]]] = []
        self.counts = {"asked": 0, "answered": 0, "taken_back": 0, "compared": 0, "wrong": 0, "stuck": 0}
        vocab_size = llm.lm.config.vocab_size
        self.stems = [[rng.randrange(3, vocab_size) for _ in range(rng.randint(1, 150))] for _ in range(8)]

    def step(self) -> None:
        """Perhaps a new request, perhaps one taken back, and a step of the engine."""
        if len(self.live) < 48 and self.rng.random() < 0.2:
            self.ask()
        if self.live and self.rng.random() < 0.01:
            request, _ = self.live.pop(self.rng.randrange(len(self.live)))
            self.llm.engine.abort(request)
            self.counts["taken_back"] += 1
        self.llm.engine.step()
        self.collect()

    def ask(self) -> None:
        vocab_size = self.llm.lm.config.vocab_size
        tail = [self.rng.randrange(3, vocab_size) for _ in range(self.rng.randint(1, 40))]
        self.number += 1
        temperature = self.rng.choice([0.0, 0.0, 1.0])
        params = SamplingParams(max_tokens=self.rng.randint(1, 120), temperature=temperature, seed=7)
        asked = {"prompt": self.rng.choice(self.stems) + tail, "params": params, "first": self.number,
                 "n": self.rng.choice([1, 1, 1, 3]), "k": self.rng.choice([None, None, 1])}  # fmt: skip
        self.live.append((self.llm.engine.add(**asked, priority=self.rng.randint(0, 2)), asked))
        self.counts["asked"] += 1

    def collect(self) -> None:
        """Drop what has ended; one in twenty is compared with the plain loop."""
        going = []
        for request, asked in self.live:
            if not request.is_finished:
                self.counts["stuck"] += time.monotonic() - request.arrived > STUCK_SECONDS
                going.append((request, asked))
                continue
            self.counts["answered"] += 1
            if self.rng.random() < 0.05:
                self.compare(request, asked)
        self.live = going

    def compare(self, request: Request, asked: dict[str, Any]) -> None:
        lm, rest = self.llm.lm, {name: asked[name] for name in ("n", "k", "first")}
        wanted = generate(lm.runner, [asked["prompt"]], asked["params"], tokenizer=lm.tokenizer, **rest)
        self.counts["compared"] += 1
        ours = [(g.tokens, g.logprobs, g.finish_reason) for g in request.results()]
        self.counts["wrong"] += ours != [(g.tokens, g.logprobs, g.finish_reason) for g in wanted]

    def finish(self) -> None:
        while self.llm.engine.has_work:
            self.llm.engine.step()
        self.collect()

    def text(self) -> str:
        m = self.llm.metrics()
        return f"{self.counts}  running {m['running']} waiting {m['waiting']} preemptions {m['preemptions']}"


if __name__ == "__main__":
    sys.exit(main())
