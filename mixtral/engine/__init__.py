"""Generation: runners and their cache of keys and values, sampling, and the plain loop that every faster engine is held
to."""

from mixtral.engine.defaults import recommended, with_recommended, within_vocabulary
from mixtral.engine.generate import Generation, Piece, Stream, generate, stream
from mixtral.engine.params import SamplingParams
from mixtral.engine.pool import KVPool
from mixtral.engine.runner import Runner, TorchRunner
from mixtral.engine.sampling import sample

__all__ = [
    "Generation", "KVPool", "Piece", "Runner", "SamplingParams", "Stream", "TorchRunner", "generate", "recommended",
    "sample", "stream", "with_recommended", "within_vocabulary",
]  # fmt: skip
