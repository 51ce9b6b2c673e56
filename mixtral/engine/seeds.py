"""The random numbers of a sequence."""

from __future__ import annotations

import numpy as np
import torch

from mixtral.engine.params import SamplingParams


def make_generator(params: SamplingParams, index: int) -> torch.Generator:
    """The random numbers of sequence `index` of a batch: the same for a seed whatever else the batch holds.

    On the CPU for every device, so that a seed gives the same numbers everywhere.
    """
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:  # hashed together: seed + index would give sequence 1 of seed 0 the numbers of sequence 0 of seed 1
        generator.manual_seed(int(np.random.SeedSequence((params.seed, index)).generate_state(1, np.uint64)[0]))
    return generator
