"""Routers by name: `NAME?option=value&...`, and what each adds to a model's parameters and buffers.

Only what a configuration must know is here; the routers themselves are in moe/routers, their equations in
docs/routers.md. A class of options that has a name is in ROUTERS.

Legend: D model width, E experts, K experts a token, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from mixtral.config.specs import parse_spec
from mixtral.errors import ConfigError

ROUTERS: dict[str, type[RouterOptions]] = {}  # by name; the classes below enter themselves


class Buffer(NamedTuple):
    """A tensor of a router that is no parameter: saved with the model, in its own dtype whatever the weights' is."""

    shape: tuple[int, ...]
    start: float  # every element at the start
    dtype: str = "float32"  # torch's name of it


@dataclass(frozen=True)
class RouterOptions:
    """What all routers share. Raises ConfigError when an option is out of range.

    A subclass that is a router's, not the base of several, gives its `name`.
    """

    zero_at_start: ClassVar[tuple[str, ...]] = ()  # parameters that `initialise` sets to 0 instead of sampling them

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is not None and ROUTERS.setdefault(name, cls) is not cls:
            raise ConfigError(f"router {name}: there is one of this name already")

    def check(self, n_experts: int, k: int) -> None:
        """Raise ConfigError when the options do not fit the number of experts, or the K, of the model."""

    def parameters(self, dim: int, n_experts: int) -> dict[str, tuple[int, ...]]:
        """The router's parameters in one layer: name -> shape."""
        return {"weight": (n_experts, dim)}

    def buffers(self, n_experts: int) -> dict[str, Buffer]:
        """The router's buffers in one layer, by name."""
        del n_experts
        return {}

    def slots(self, n_experts: int, k: int) -> int | None:
        """Top-k slots per token when each token has a number of experts of its own; None: as many as needed."""
        del n_experts, k
        return None


@dataclass(frozen=True)
class TopK(RouterOptions, name="topk"):
    """The K highest; Mixtral's router, and the options of all that rank experts."""

    bias: bool = False  # a buffer, added to the scores for the choice alone
    capacity_factor: float | None = None  # in training an expert takes at most ceil(factor * T * K / E) rows

    def __post_init__(self) -> None:
        if self.capacity_factor is not None:
            _require_positive("capacity_factor", self.capacity_factor)

    def reachable(self, n_experts: int) -> int:
        """The most experts that one token can take."""
        return n_experts

    def buffers(self, n_experts: int) -> dict[str, Buffer]:
        return {"bias": Buffer((n_experts,), 0.0)} if self.bias else {}


@dataclass(frozen=True)
class Switch(TopK, name="switch"):
    """One expert; its weight is the softmax score itself."""

    def check(self, n_experts: int, k: int) -> None:
        del n_experts
        _require(k == 1, f"switch takes one expert a token: experts_per_token must be 1, not {k}")


@dataclass(frozen=True)
class Noisy(TopK, name="noisy"):
    """Learned noise on the logits, in training."""

    zero_at_start = ("noise_weight",)  # noise of one size for all experts

    def parameters(self, dim: int, n_experts: int) -> dict[str, tuple[int, ...]]:
        return super().parameters(dim, n_experts) | {"noise_weight": (n_experts, dim)}


@dataclass(frozen=True)
class Jitter(TopK, name="jitter"):
    """The gate's input times uniform(1 - eps, 1 + eps), in training."""

    eps: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.eps < 1, f"eps must lie in [0, 1), not {self.eps}")


@dataclass(frozen=True)
class Sigmoid(TopK, name="sigmoid"):
    """Sigmoid scores; weights normalised over the chosen, times `scale`."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive("scale", self.scale)


@dataclass(frozen=True)
class Grouped(TopK, name="grouped"):
    """The best `taken` of `groups` groups of neighbouring experts first, then the K highest inside them."""

    groups: int = 2
    taken: int = 1
    by: Literal["top2", "max"] = "top2"  # a group's score: the sum of its two highest, or the highest

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.by in ("top2", "max"), f"by must be top2 or max, not {self.by!r}")
        _require(1 <= self.taken <= self.groups, f"taken must lie in 1..{self.groups} (groups), not {self.taken}")

    def check(self, n_experts: int, k: int) -> None:
        size = n_experts // self.groups
        _require(size * self.groups == n_experts, f"{n_experts} experts do not divide into {self.groups} groups")
        _require(self.by == "max" or size > 1, "groups of one expert have no two highest: by must be max")
        _require(k <= self.taken * size, f"{self.taken} groups of {size} hold no {k} experts (experts_per_token)")

    def reachable(self, n_experts: int) -> int:
        return self.taken * n_experts // self.groups


@dataclass(frozen=True)
class LearnedK(TopK, name="learned_k"):
    """A head says how many experts a token takes, from 1 to `most` (all, unless given)."""

    most: int | None = None

    def check(self, n_experts: int, k: int) -> None:
        del k
        _check_bounds(1, self.most, n_experts)

    def parameters(self, dim: int, n_experts: int) -> dict[str, tuple[int, ...]]:
        return super().parameters(dim, n_experts) | {"k_weight": (self.most or n_experts, dim)}

    def slots(self, n_experts: int, k: int) -> int:
        del k
        return self.most or n_experts


@dataclass(frozen=True)
class TokenK(TopK, name="token_k"):
    """A table from token id to how many experts it takes, from 0 to `most` (experts_per_token, unless given)."""

    most: int | None = None

    def check(self, n_experts: int, k: int) -> None:
        _check_bounds(k, self.most, n_experts)

    def slots(self, n_experts: int, k: int) -> int:
        del n_experts
        return self.most or k


@dataclass(frozen=True)
class Bounded(RouterOptions):
    """Routers by which a token takes as many experts as it needs: at least `least`, at most `most` (None: all)."""

    least: int = 1
    most: int | None = None

    def check(self, n_experts: int, k: int) -> None:
        del k
        _require(self.least >= 1, f"least must be at least 1, not {self.least}")
        _check_bounds(self.least, self.most, n_experts)


@dataclass(frozen=True)
class TopP(Bounded, name="top_p"):
    """The fewest experts whose softmax scores sum to `p`."""

    p: float = 0.5

    def __post_init__(self) -> None:
        _require(0 < self.p <= 1, f"p must lie in (0, 1], not {self.p}")


@dataclass(frozen=True)
class MinP(Bounded, name="min_p"):
    """Every expert whose score is at least `p` times the highest."""

    p: float = 0.5

    def __post_init__(self) -> None:
        _require(0 < self.p <= 1, f"p must lie in (0, 1], not {self.p}")


@dataclass(frozen=True)
class Threshold(RouterOptions, name="threshold"):
    """Every expert whose score exceeds its threshold, from none to `most` (None: all)."""

    most: int | None = None

    def check(self, n_experts: int, k: int) -> None:
        del k
        _check_bounds(1, self.most, n_experts)

    def buffers(self, n_experts: int) -> dict[str, Buffer]:
        mean_score = 1 / n_experts  # until the first update knows the quantile
        return {"threshold": Buffer((n_experts,), mean_score)}


@dataclass(frozen=True)
class ExpertChoice(RouterOptions, name="expert_choice"):
    """Each expert takes its best tokens; training only."""


@functools.lru_cache
def parse_router(text: str) -> RouterOptions:
    """The options that `text` names; ConfigError for an unknown router or option, or a value out of range."""
    try:
        return parse_spec(text, ROUTERS, "router")
    except ConfigError as error:
        if str(error).startswith("router"):
            raise
        raise ConfigError(f"router {text}: {error}") from None


def _require(good: bool, otherwise: str) -> None:
    if not good:
        raise ConfigError(otherwise)


def _require_positive(option: str, value: float) -> None:
    _require(0 < value < math.inf, f"{option} must be a positive number, not {value}")


def _check_bounds(least: int, most: int | None, n_experts: int) -> None:
    if most is not None:
        _require(least <= most <= n_experts, f"most must lie in {least}..{n_experts}, not {most}")
    _require(least <= n_experts, f"least must lie in 1..{n_experts}, not {least}")
