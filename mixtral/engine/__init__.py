"""Generation: caches of keys and values, sampling, and the plain loop that every faster engine is held to."""

from mixtral.engine.defaults import recommended, with_recommended, within_vocabulary
from mixtral.engine.generate import Generation, Piece, generate, stream
from mixtral.engine.kv_cache import FullCache, RollingCache, make_cache
from mixtral.engine.params import SamplingParams
from mixtral.engine.sampling import sample

__all__ = [
    "FullCache", "Generation", "Piece", "RollingCache", "SamplingParams", "generate", "make_cache", "recommended",
    "sample", "stream", "with_recommended", "within_vocabulary",
]  # fmt: skip
