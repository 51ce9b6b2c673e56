"""Generation: caches of keys and values, sampling, and the plain loop that every faster engine is held to."""

from mixtral.engine.generate import Generation, Piece, generate, stream
from mixtral.engine.kv_cache import FullCache, RollingCache, make_cache
from mixtral.engine.sampling import SamplingParams, recommended, sample

__all__ = [
    "FullCache", "Generation", "Piece", "RollingCache", "SamplingParams", "generate", "make_cache", "recommended",
    "sample", "stream",
]  # fmt: skip
