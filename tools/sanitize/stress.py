"""Threads that share one model: each answer must have the bits that it has alone, whatever the others do.

    python tools/sanitize/stress.py --threads 8 --seconds 600

Prompts have 10 to 900 tokens, so that scratch and cache grow while others run. Exits with 1 when bits differ.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time

import torch

import mixtral
from mixtral.config import ModelConfig
from mixtral.engine import Generation
from mixtral.lm import LM
from mixtral.model import Mixtral, initialise

CONFIG = ModelConfig(
    vocab_size=500, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, n_experts=8,
    experts_per_token=2, context=1024,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8, help="how many share the model (8)")
    parser.add_argument("--seconds", type=float, default=60, help="how long (60)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = initialise(Mixtral(CONFIG), torch.Generator().manual_seed(0)).to(torch.bfloat16)
        LM(model).save(f"{folder}/model")
        answers, wrong = stress(f"{folder}/model", options.threads, options.seconds)
    print(f"{answers} answers by {options.threads} threads, {wrong} of them with other bits than alone")
    sys.exit(1 if wrong or not answers else 0)


def stress(folder: str, n_threads: int, seconds: float) -> tuple[int, int]:
    """-> (answers, how many of them differ)."""
    generator = random.Random(0)
    prompts = [[generator.randrange(500) for _ in range(n)] for n in (10, 900, 33, 200, 64, 511, 17, 600)]
    alone = [answer(mixtral.load(folder, device="cpu"), prompt) for prompt in prompts]
    end, counts, wrong = time.monotonic() + seconds, [0] * n_threads, [0] * n_threads
    lms = [mixtral.load(folder, device="cpu")]

    def work(i: int) -> None:
        own = random.Random(i)
        while time.monotonic() < end:
            number = own.randrange(len(prompts))
            wrong[i] += answer(lms[0], prompts[number]) != alone[number]
            counts[i] += 1
            if i == 0 and counts[0] % 50 == 0:
                lms[0] = mixtral.load(folder, device="cpu")  # freshly loaded, while the others go on with the old one

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts), sum(wrong)


def answer(lm: LM, prompt: list[int]) -> Generation:
    [[done]] = lm.complete([prompt], max_tokens=8, ignore_eos=True, temperature=0.0)
    return done


if __name__ == "__main__":
    main()
