"""The configuration of a training run: of the run, of the optimiser, and of pre-training, each validated by itself.

They are flat on disk and on the command line: `PretrainConfig` has the fields of the other two.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixtral.config import ModelConfig
from mixtral.config.specs import check_names, check_value, parse_value
from mixtral.errors import ConfigError, did_you_mean, shown
from mixtral.train.balancing.options import parse_balance, split_balance

DTYPES = ("auto", "fp32", "bf16")
SCHEDULES = ("cosine", "wsd")
OPTIMIZERS = ("adamw", "muon")
TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated. Raises ConfigError when a field is out of range."""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices inside the layers, AdamW for the rest
    lr: float = 1e-3  # peak learning rate
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.05  # share of the steps over which the rate rises linearly
    cooldown: float = 0.2  # wsd alone: share of the steps over which the rate falls linearly at the end
    final_lr: float = 0.1  # share of `lr` that is left at the end
    weight_decay: float = 0.1  # on matrices; norms have none
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest global gradient norm; 0: none

    def check_optim(self) -> None:
        """Raise ConfigError when a field is out of range."""
        for name in "lr warmup cooldown final_lr weight_decay clip".split():
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"train: {name} must not be negative, nor infinite, not {getattr(self, name)}")
        for name in ("warmup", "cooldown", "final_lr"):
            if getattr(self, name) > 1:
                raise ConfigError(f"train: {name} is a share and must not be more than 1, not {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train: betas must be two numbers in [0, 1), not {self.betas}")
        _check_known("schedule", self.schedule, SCHEDULES)
        _check_known("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1 + 1e-9:
            both = f"warmup {self.warmup} and cooldown {self.cooldown}"
            raise ConfigError(f"train: {both} overlap; with schedule wsd they must not sum to more than 1")


@dataclass(frozen=True)
class RunConfig:
    """How long a run is, where it computes, what it saves and reports, whatever it minimises.

    A step's global batch is `rows` rows of `context` tokens, in `accumulation` equal micro-batches.
    """

    steps: int = 1000
    rows: int = 8
    context: int = 256
    accumulation: int = 1
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the computation; auto: bf16 where it is faster
    device: str = "auto"  # auto: a GPU when there is one
    seed: int = 0
    val_every: int = 100  # steps between validations
    val_tokens: int = 65536
    save_every: int = 200  # steps between checkpoints
    keep: int = 2  # checkpoints kept beside the best one
    recompute: bool = False  # compute each layer again in the backward pass instead of keeping its activations
    compile: bool = False  # each block through torch.compile, for long runs
    stats_every: int = 10  # steps between lines of routing statistics
    trackers: tuple[str, ...] = ()  # of TRACKERS: additional metric sinks

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.context

    def check_run(self) -> None:
        """Raise ConfigError when a field is out of range."""
        for name in "steps rows context accumulation val_every val_tokens save_every keep stats_every".split():
            if getattr(self, name) < 1:
                raise ConfigError(f"train: {name} must be at least 1, not {getattr(self, name)}")
        if self.steps * self.rows * self.context >= 2**63:
            raise ConfigError(f"train: steps {self.steps} of {self.rows} rows of {self.context} are too many tokens")
        if self.rows % self.accumulation:
            raise ConfigError(f"train: rows {self.rows} is not a multiple of accumulation {self.accumulation}")
        _check_known("dtype", self.dtype, DTYPES)
        for value in self.trackers:
            if value not in TRACKERS:
                raise ConfigError(f"train: unknown tracker {value!r}; {did_you_mean(value, TRACKERS)}")
        if self.seed < 0:
            raise ConfigError(f"train: seed must not be negative, not {self.seed}")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig, OptimConfig):
    """Pre-training of a model on text. Raises ConfigError when a field is out of range."""

    model: ModelConfig
    data: tuple[str, ...] = ("stdlib",)  # sources, each `NAME[?option=value][=WEIGHT]` (data/sources.py)
    skip_bad: bool = False  # count unreadable inputs and go on, instead of stopping at the first
    tokenizer: str | None = None  # a tokenizer file or folder; None: train one of model.vocab_size on the data
    balance: tuple[str, ...] = ("micro_batch?weight=0.01", "z_loss?weight=0.001")  # train/balancing/options.py

    def __post_init__(self) -> None:
        self._check_types()
        self.check_run()
        self.check_optim()
        if self.context > self.model.context:
            raise ConfigError(f"train: context {self.context} is longer than the model's {self.model.context}")
        parse_balance(self.balance, self.model.n_layers)
        if not self.data:
            raise ConfigError("train: data names no source; try 'stdlib', or a file or folder of text")

    def _check_types(self) -> None:
        for name, kind in typing.get_type_hints(PretrainConfig).items():
            if typing.get_origin(kind) is Literal:
                kind = str  # one of those that are known, as the checks say
            if name != "model":
                check_value(f"train: {name}", getattr(self, name), tuple[float, ...] if name == "betas" else kind)
        if not isinstance(self.model, ModelConfig):
            raise ConfigError(f"train: model must be a ModelConfig, not {shown(self.model)}")

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PretrainConfig:
        """From `to_dict`, also after a passage through JSON. Raises ConfigError for unknown fields and bad values."""
        check_names("train", values, cls)
        model = check_value("train: model", values["model"], dict)
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists, "model": ModelConfig.from_dict(model)})

    def replace(self, **changes: Any) -> PretrainConfig:
        return dataclasses.replace(self, **changes)


def _check_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"train: unknown {name} {value!r}; {did_you_mean(value, known)}")


def override(config: PretrainConfig, assignments: Sequence[str]) -> PretrainConfig:
    """Apply `field=value` and `model.field=value`; ConfigError names an unknown field, or a value of the wrong type."""
    changes: dict[str, Any] = {}
    model_changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment!r}: expected FIELD=VALUE, as in lr=1e-3 or model.dim=512")
        of_model = name.startswith("model.")
        types_of = typing.get_type_hints(ModelConfig if of_model else PretrainConfig)
        types_of.pop("model", None)  # set field by field
        field = name.removeprefix("model.")
        if field not in types_of:
            known = [f"model.{n}" for n in typing.get_type_hints(ModelConfig)] if of_model else [*types_of, "model.dim"]
            raise ConfigError(f"--set {name}: unknown field; {did_you_mean(name, known)}")
        value = split_balance(text) if field == "balance" else parse_value(f"--set {name}", text, types_of[field])
        (model_changes if of_model else changes)[field] = value
    return config.replace(model=config.model.replace(**model_changes), **changes)
