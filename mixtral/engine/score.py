"""The probability that a model gives to a text that is there already."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixtral import kernels
from mixtral.engine.continuation import check_prompt
from mixtral.engine.runner import Runner

CHUNK = 512  # tokens a pass: the logits of a chunk are in memory, never those of the whole text


@torch.inference_mode()
def score(runner: Runner, token_ids: Sequence[int], k: int | None = None) -> list[float]:
    """The logarithm of each token's probability after those before it, all but the first's: natural, before any filter.

    Raises UsageError for what the model cannot read.
    """
    check_prompt(token_ids, runner.config, "text")
    found: list[float] = []
    sequence = runner.pool.add()
    try:
        for begin in range(0, len(token_ids) - 1, CHUNK):
            next_ids = torch.tensor(token_ids[begin + 1 : begin + CHUNK + 1], device=runner.device)
            batch = runner.pool.batch([(sequence, token_ids[begin : begin + len(next_ids)])])
            with runner.cores():
                logits_TV = runner.run(batch, k=k, keep_routing=False).logits
                assert logits_TV is not None
                norm_T = kernels.log_sum_exp(logits_TV)  # as in generation: the same bits for a token sampled there
                found += (logits_TV.gather(1, next_ids[:, None])[:, 0] - norm_T).tolist()
    finally:
        runner.pool.free(sequence)
    return found
