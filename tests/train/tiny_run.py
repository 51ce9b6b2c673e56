"""A training run small enough to repeat in a fraction of a second."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixtral.config import ModelConfig
from mixtral.data.loader import Loader
from mixtral.data.store import TokenData
from mixtral.model import Mixtral, initialise
from mixtral.runtime import choose_dtype
from mixtral.tokenizer import Tokenizer
from mixtral.train.config import PretrainConfig
from mixtral.train.display import Display
from mixtral.train.loop import Run
from mixtral.train.metrics import Speed
from mixtral.train.state import TrainState
from mixtral.train.step import StepResult, Validation

VOCABULARY = 320
MakeRun = Callable[..., Run]  # the fixture run_in
WORDS = "router expert token layer weight gate score load batch loss step norm head query key value".split()


def texts() -> list[str]:
    """Sixty documents of unequal length, the same ones everywhere: `choice` and `randrange` do not change in Python."""
    draw = random.Random(7)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randrange(5, 40))) + f".\nNo {i}\n" for i in range(60)]


def model_config(**changes: Any) -> ModelConfig:
    shape = dict(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48,
                 n_experts=4, experts_per_token=2, rope_theta=1e4, context=64)  # fmt: skip
    return ModelConfig.from_dict({**shape, **changes})


def train_config(model: dict[str, Any] | None = None, **changes: Any) -> PretrainConfig:
    fields = dict(model=model_config(**(model or {})), data=("unused",), steps=10, rows=4, context=32, lr=1e-2,
                  dtype="fp32", device="cpu", val_every=4, val_tokens=256, save_every=4, stats_every=5)  # fmt: skip
    return PretrainConfig(**{**fields, **changes})


def fresh_model(config: ModelConfig) -> Mixtral:
    return initialise(Mixtral(config), torch.Generator().manual_seed(0))


def fresh_state(config: PretrainConfig) -> tuple[Mixtral, TrainState]:
    model = fresh_model(config.model)
    return model, TrainState.of(model, config, choose_dtype(config.dtype, "cpu"))


def make_run(
    folder: Path, config: PretrainConfig, data: TokenData, tokenizer: Tokenizer, display: Display | None = None
) -> Run:
    folder.mkdir(exist_ok=True)
    _, train_state = fresh_state(config)
    loader = Loader(data, config.rows, config.context, config.seed)
    return Run(folder=folder, config=config, state=train_state, loader=loader,
               val_batches=loader.val_batches(config.val_tokens), display=display or Display(),
               byte_lengths_V=torch.from_numpy(tokenizer.byte_lengths()))  # fmt: skip


class Watching(Display):
    """Keeps what it is told, and calls `after_step` with the number of each step."""

    def __init__(self, after_step: Callable[[int], None] = lambda _: None) -> None:
        self.after_step = after_step
        self.said: list[str] = []
        self.losses: list[float] = []
        self.validations: list[tuple[int, Validation]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, step: int, result: StepResult, bits_per_byte: float, speed: Speed) -> None:
        del bits_per_byte, speed
        self.losses.append(result.cross_entropy)
        self.after_step(step)

    def validation(self, step: int, result: Validation) -> None:
        self.validations.append((step, result))


class Killed(BaseException):
    """What no handler of errors catches."""


def kill_after(step: int) -> Watching:
    """A display that ends the process, as far as the run can tell, once `step` is done."""

    def at(now: int) -> None:
        if now == step:
            raise Killed

    return Watching(at)


def weights(model: Mixtral) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit-equal."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
