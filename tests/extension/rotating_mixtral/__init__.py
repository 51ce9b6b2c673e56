"""What a package of somebody else's adds: everything through mixtral/extend.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mixtral import extend
from mixtral.presets import preset

DIGITS = "zero one two three four five six seven eight nine".split()


@dataclass(frozen=True)
class Rotating(extend.TopK, name="rotating"):
    """Top-k over scores moved by `turn` experts."""

    turn: int = 1


class RotatingRouter(extend.TopKRouter):
    def forward(self, x_TD: Tensor, *arguments: Any, **options: Any) -> extend.Routing:
        routing = super().forward(x_TD, *arguments, **options)
        assert isinstance(self.options, Rotating)
        turned_TK = (routing.experts_TK + self.options.turn) % routing.logits_TE.shape[1]
        return routing._replace(experts_TK=turned_TK, chosen_TK=turned_TK)


extend.router(Rotating, RotatingRouter)


@dataclass(frozen=True)
class Quiet(extend.BalanceOptions):
    """Small logits."""

    name = "quiet"
    weight: float = 0.001

    def loss(self, routing: extend.Routing) -> Tensor:
        return routing.logits_TE.square().mean()


extend.objective(Quiet)


def _counting(part: str, seed: int) -> Iterator[tuple[str, str]]:
    for n in range(seed, seed + 400):
        digits = "".join(str(i) for i in range(n, n + int(part or 20)))
        yield " ".join(DIGITS[int(digit)] for digit in digits), "counting"


extend.source("counting", _counting)


@extend.recipe("rotating-tiny")
def rotating_tiny() -> extend.PretrainConfig:
    model = preset("tiny").replace(vocab_size=300, dim=64, n_heads=1, router="rotating?turn=2")
    return extend.PretrainConfig(
        model=model, data=("counting:30",), steps=4, rows=2, context=64, val_every=4, val_tokens=512, save_every=4,
        balance=("quiet", "micro_batch?weight=0.01"),
    )  # fmt: skip
