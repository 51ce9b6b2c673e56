"""From logits to the next token: what may be asked for, what a model's folder recommends, and the draw itself.

The order of the filters: temperature, then top_k, then top_p over what top_k left, then min_p. The most probable token
passes them all. Ties count as ordered by index, the lower one first.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtral.errors import ConfigError, UsageError, did_you_mean, shown
from mixtral.json_files import read_object

_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p")  # what a model's folder may say


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Raises UsageError when a value is out of range."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0: always the most probable token
    top_k: int | None = None  # keep this many of the most probable tokens
    top_p: float = 1.0  # keep the fewest of the most probable tokens whose probabilities reach this sum
    min_p: float = 0.0  # keep tokens of at least this share of the highest probability
    seed: int | None = None  # None: another text every time
    stop: tuple[str, ...] = ()  # end before any of these strings
    ignore_eos: bool = False  # go on after the end-of-sequence token

    def __post_init__(self) -> None:
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "a positive integer", self.max_tokens)
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature",
                 "a number of at least 0", self.temperature)  # fmt: skip
        _require(self.top_k is None or (_is_int(self.top_k) and self.top_k >= 1), "top_k",
                 "a positive integer or None", self.top_k)  # fmt: skip
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        _require(self.seed is None or (_is_int(self.seed) and self.seed >= 0), "seed",
                 "an integer of at least 0 or None", self.seed)  # fmt: skip
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        _require(strings, "stop", "a tuple of strings that are not empty", self.stop)
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", "True or False", self.ignore_eos)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplingParams:
        """From field names; an unknown one raises UsageError with the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise UsageError(f"sampling: unknown option {shown(name)}; {did_you_mean(name, known)}")
        return cls(**values)


def recommended(folder: str | Path) -> dict[str, Any]:
    """What a model's generation_config.json says of sampling, as transformers takes it -> fields of SamplingParams.

    Nothing, which is greedy, without that file or without `do_sample` in it. Raises ConfigError when it is damaged.
    """
    file = Path(folder) / "generation_config.json"
    if not os.path.isfile(file):
        return {}
    values = read_object(file)
    if not values.get("do_sample"):
        return {}
    try:
        found = {"temperature": 1.0} | {n: values[n] for n in _RECOMMENDED if values.get(n) is not None}
        if found.get("top_k") == 0:  # as transformers writes "no such filter"
            del found["top_k"]
        SamplingParams(**found)
    except UsageError as error:
        raise ConfigError(f"{file}: {error}") from None
    return found


def _require(holds: bool, name: str, wanted: str, value: object) -> None:
    if not holds:
        raise UsageError(f"sampling: {name} must be {wanted}, not {shown(value)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def make_generator(params: SamplingParams, index: int) -> torch.Generator:
    """The random numbers of sequence `index` of a batch: the same for a seed whatever else the batch holds.

    On the CPU for every device, so that a seed draws the same numbers everywhere.
    """
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:  # hashed together: seed + index would give sequence 1 of seed 0 the numbers of sequence 0 of seed 1
        generator.manual_seed(int(np.random.SeedSequence((params.seed, index)).generate_state(1, np.uint64)[0]))
    return generator


def sample(logits_BV: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw the next token of each sequence from its own parameters and generator -> int64 [B].

    A sequence of temperature 0 draws no random number; any other draws exactly one.
    """
    ids_B = _first_highest(logits_BV)
    for row, (wanted, generator) in enumerate(zip(params, generators, strict=True)):
        if wanted.temperature > 0:
            ids_B[row] = _draw(logits_BV[row], wanted, generator)
    return ids_B


def _first_highest(logits_BV: Tensor) -> Tensor:
    """The lowest index of each row's highest logit -> int64 [B]."""
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:  # numpy takes a tenth of torch's time
        return torch.from_numpy(logits_BV.detach().numpy().argmax(-1))
    return logits_BV.argmax(-1)  # documented to return the first of equal values


def _draw(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:
    """One token by inversion: the first whose cumulative probability exceeds a uniform number."""
    probabilities, ids = kept(logits_V, params)
    cumulative = probabilities.cumsum(0)
    point = torch.rand((), generator=generator).to(cumulative.device) * cumulative[-1]
    place = torch.searchsorted(cumulative, point, right=True)
    return ids[place.clamp(max=len(ids) - 1)]  # a uniform number next to 1 may round up to the whole sum


def kept(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that pass the filters: fp32 probabilities, not renormalised, and ids.

    Sorted, the most probable first, when there is a filter; in the order of ids when there is none.
    """
    if params.top_k is None and params.top_p == 1 and params.min_p == 0:  # sorting a vocabulary would take milliseconds
        return _probabilities(logits_V, params), torch.arange(len(logits_V), device=logits_V.device)
    ids = _candidates(logits_V, params.top_k)
    probabilities = _probabilities(logits_V[ids], params)
    mass_before = probabilities.cumsum(0) - probabilities
    top_p = params.top_p if params.top_p < 1 else math.inf  # the sum rounds to 1 before the last tokens of a long tail
    passes = (mass_before < top_p) & (probabilities >= params.min_p * probabilities[0])
    count = int(passes.sum().clamp(min=1))  # both tests fail for good once they fail: the survivors lie in front
    return probabilities[:count], ids[:count]


def _probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    logits_V = logits_V.float()
    temperature = max(params.temperature, 1e-30)  # a smaller one is 0 in fp32, and 0 / 0 is no number
    return ((logits_V - logits_V.amax()) / temperature).softmax(0)  # subtracted first, so that nothing overflows


def _candidates(logits_V: Tensor, top_k: int | None) -> Tensor:
    """Ids of the `top_k` highest logits (all by default), highest first, ties to the lower index."""
    if top_k is None or top_k >= len(logits_V):
        return logits_V.sort(descending=True, stable=True).indices
    threshold = logits_V.topk(top_k).values[-1]
    ids = (logits_V >= threshold).nonzero()[:, 0]  # more than top_k when several tie with the last
    return ids[logits_V[ids].sort(descending=True, stable=True).indices[:top_k]]
