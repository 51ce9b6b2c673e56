"""Generation: runners and their cache of keys and values, sampling, the engine that runs many requests at once, and the
plain loop that it is held to."""

from mixtral.engine.continuation import Generation, Piece
from mixtral.engine.defaults import recommended, with_recommended, within_vocabulary
from mixtral.engine.engine import Engine
from mixtral.engine.generate import generate, stream
from mixtral.engine.params import SamplingParams
from mixtral.engine.pool import KVPool
from mixtral.engine.request import Request, Stream
from mixtral.engine.runner import Runner, TorchRunner
from mixtral.engine.sampling import sample

__all__ = [
    "Engine", "Generation", "KVPool", "Piece", "Request", "Runner", "SamplingParams", "Stream", "TorchRunner",
    "generate", "recommended", "sample", "stream", "with_recommended", "within_vocabulary",
]  # fmt: skip
