"""The balancing objectives a run can name, with their options: `NAME?option=value`, one dataclass a name.

Every objective has a coefficient `weight`, which moves in a straight line to `final` at the last step when that is
given, and `layers`, the layers it acts on. An objective may be named more than once, for different layers. At weight 0
it is not computed at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mixtral.config.specs import parse_spec
from mixtral.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from mixtral.moe import Routing


@dataclass(frozen=True)
class BalanceOptions:
    """What all objectives share. Raises ConfigError when a value is out of range."""

    name: ClassVar[str]
    buffer: ClassVar[str | None] = None  # the router's buffer that the objective moves; None: it is a loss

    weight: float = 1.0
    final: float | None = None  # the weight at the last step; None: it stays
    layers: str | None = None  # as in `0,2-4`; None: all

    def __post_init__(self) -> None:
        for option in ("weight", "final"):
            value = getattr(self, option)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"balance {self.name}: {option} must not be negative, nor infinite, not {value}")
        if self.layers is not None:
            numbers(self.layers, f"balance {self.name}: layers")

    def coefficient(self, step: int, steps: int) -> float:
        """The weight at step `step` (0 is the first) of `steps`."""
        if self.final is None:
            return self.weight
        return self.weight + (self.final - self.weight) * step / max(1, steps - 1)

    def loss(self, routing: Routing) -> Tensor:
        """Of one layer's routing of a part, a scalar; for objectives of others (extend.py). Ours are in balancer.py."""
        raise NotImplementedError(f"balance {self.name}: neither a loss nor a buffer to move")

    def covers(self, layer: int) -> bool:
        return self.layers is None or layer in numbers(self.layers, "layers")

    def _check_share(self, option: str) -> None:
        value = getattr(self, option)
        if not 0 <= value < 1:
            raise ConfigError(f"balance {self.name}: {option} must lie in [0, 1), not {value}")

    def _check_positive(self, option: str) -> None:
        value = getattr(self, option)
        if not 0 < value < math.inf:
            raise ConfigError(f"balance {self.name}: {option} must be a positive number, not {value}")


@dataclass(frozen=True)
class MicroBatch(BalanceOptions):
    """moe.balance.load_balance over each part of the batch alone."""

    name = "micro_batch"
    weight: float = 0.01


@dataclass(frozen=True)
class GlobalBatch(BalanceOptions):
    """load_balance with the assignments of the whole global batch (arXiv 2501.11873).

    exact: a pass without gradients counts first; otherwise with those of the step's parts so far, an approximation.
    """

    name = "global_batch"
    weight: float = 0.01
    exact: bool = True


@dataclass(frozen=True)
class ZLoss(BalanceOptions):
    """moe.balance.z_loss."""

    name = "z_loss"
    weight: float = 0.001


@dataclass(frozen=True)
class Guided(BalanceOptions):
    """moe.balance.guidance: each domain of the data has a group of experts."""

    name = "guided"
    weight: float = 0.01
    groups: str = "even"  # or the experts of each domain, in the order of the domains' names, as in `0-1/2,5/3-4`

    def __post_init__(self) -> None:
        super().__post_init__()
        for group in self.groups.split("/") if self.groups != "even" else []:
            numbers(group, f"balance {self.name}: groups")


@dataclass(frozen=True)
class KPrice(BalanceOptions):
    """moe.balance.k_price: what a learned number of experts costs."""

    name = "k_price"
    weight: float = 0.01
    target: float | None = None  # mean number of experts a token; None: the fewer the better

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None:
            self._check_positive("target")


@dataclass(frozen=True)
class LossFree(BalanceOptions):
    """moe.updates.loss_free."""

    name = "loss_free"
    buffer = "bias"
    rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("rate")


@dataclass(frozen=True)
class Smebu(BalanceOptions):
    """moe.updates.smebu."""

    name = "smebu"
    buffer = "bias"
    rate: float = 5e-4
    scale: float = 2.0  # of the violation inside tanh
    decay: float = 0.5  # of the momentum

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("rate")
        self._check_positive("scale")
        self._check_share("decay")


@dataclass(frozen=True)
class Quantile(BalanceOptions):
    """Quantile Balancing: the bias with which each expert would have had its share of the last batch."""

    name = "quantile"
    buffer = "bias"


@dataclass(frozen=True)
class Threshold(BalanceOptions):
    """Expert Threshold (arXiv 2603.11535): a moving average of the quantile of scores above which k / E of them lie."""

    name = "threshold"
    buffer = "threshold"
    decay: float = 0.99  # of the moving average; a plain mean until 1 / (1 - decay) steps have been seen

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("decay")


OBJECTIVES: dict[str, type[BalanceOptions]] = {
    kind.name: kind
    for kind in (MicroBatch, GlobalBatch, ZLoss, Guided, KPrice, LossFree, Smebu, Quantile, Threshold)
}


def split_balance(text: str) -> tuple[str, ...]:
    """Specs out of one line, between commas; one before a digit belongs to an option, as in `layers=0,2-4`."""
    return tuple(re.split(r",(?!\d)", text)) if text else ()


def parse_balance(specs: Sequence[str], n_layers: int) -> list[BalanceOptions]:
    """The objectives that `specs` name, `none` and the empty string standing for nothing.

    Raises ConfigError for an unknown name or option, a layer that the model does not have, and for two objectives that
    would move the same buffer of one layer.
    """
    entries = [parse_spec(spec, OBJECTIVES, "balance") for spec in specs if spec not in ("", "none")]
    named = 0  # layers up to the last one that is named
    for entry in entries:
        if entry.layers is not None:
            if (last := max(numbers(entry.layers, "layers"))) >= n_layers:
                raise ConfigError(f"balance {entry.name}: layer {last} of layers={entry.layers} is not one of the "
                                  f"model's 0..{n_layers - 1}")  # fmt: skip
            named = max(named, last + 1)
    moved: dict[tuple[int, str], str] = {}
    for entry in entries:
        for layer in range(min(named + 1, n_layers)):  # the one behind stands for all that are not named
            if entry.buffer and entry.covers(layer):
                if other := moved.get((layer, entry.buffer)):
                    raise ConfigError(
                        f"balance: {other} and {entry.name} both move the {entry.buffer} of layer {layer}; keep one"
                    )
                moved[layer, entry.buffer] = entry.name
    return entries


_LONGEST_NUMBER = 5  # digits: more than layers or experts need, few enough for a set of all numbers below


def numbers(text: str, what: str) -> set[int]:
    """{0, 2, 3, 4} from `0,2-4`; ConfigError, which begins with `what`, when it is not such a list."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if max(len(first), len(last)) > _LONGEST_NUMBER or not first.isdecimal() or (dash and not last.isdecimal()) or (
            int(last or first) < int(first)
        ):
            raise ConfigError(f"{what}={text}: expected numbers and ranges, as in 0,2-4")
        found |= set(range(int(first), int(last or first) + 1))
    return found
