"""The probability that a model gives to a text that is there already."""

from __future__ import annotations

from collections.abc import Sequence

from mixtral.engine.engine import Engine
from mixtral.engine.params import SamplingParams
from mixtral.engine.request import Request
from mixtral.errors import MixtralError

READ = SamplingParams(max_tokens=0, prompt_logprobs=0)  # the prompt, and nothing after it


def ask(engine: Engine, token_ids: Sequence[int], k: float | None = None) -> Request:
    """A request whose answer `logprobs` reads."""
    return engine.add(token_ids, READ, k=k, name="text")


def logprobs(request: Request) -> list[float]:
    """Of a finished request of `ask`: the logarithm of each token's probability after those before it, all but the
    first's: natural, before any filter. Raises MixtralError when the model's output is not finite."""
    if request.error:
        raise MixtralError(request.error)
    return request.results()[0].prompt_logprobs


def score(engine: Engine, token_ids: Sequence[int], k: float | None = None) -> list[float]:
    """Both. Raises UsageError for what the model cannot read."""
    request = ask(engine, token_ids, k)
    engine.finish(request)
    return logprobs(request)
