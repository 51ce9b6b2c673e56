"""The study's runs: what each trains, and which question it serves.

All have the demo's model with changes, the same data, batches and steps. The batch has four parts of one row each, so
that `micro_batch` balances one or two documents and `global_batch` four times as many. The questions after the first
use `micro_batch` with 0.01, the form and the strength that are most in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus import DOMAINS

from mixtral.presets import tiny
from mixtral.train.config import PretrainConfig

SEEDS = (0, 1, 2)
TWICE = 2  # seeds of runs that serve other questions than the first, whose differences are the smallest
BASE = "micro 0.01"
Z_LOSS = "z_loss?weight=0.001"  # in every run: it balances nothing
MICRO = ("micro_batch?weight=0.01", Z_LOSS)
WIDTH = tiny().ffn_dim  # F of one expert; K * F is the same in all runs, and so are active parameters
ACTIVE = tiny().experts_per_token * WIDTH
DENSE = {"n_experts": 1, "experts_per_token": 1}


@dataclass(frozen=True)
class Kind:
    """What all seeds of a run share."""

    label: str
    groups: tuple[str, ...]  # the questions it serves
    model: dict[str, Any]  # changes to the demo's model
    balance: tuple[str, ...]


def _objective(label: str, balance: tuple[str, ...], router: str = "topk", groups: tuple[str, ...] = ()) -> Kind:
    return Kind(label, ("objectives", *groups), {"router": router}, (*balance, Z_LOSS))


KINDS = (
    _objective(BASE, MICRO[:1], groups=("dense", "k", "failure")),
    _objective("none", (), groups=("failure",)),
    _objective("micro 0.001", ("micro_batch?weight=0.001",)),
    _objective("micro 0.1", ("micro_batch?weight=0.1",)),
    _objective("global 0.01", ("global_batch?weight=0.01",), groups=("failure",)),
    _objective("loss-free", ("loss_free?rate=0.003",), "topk?bias=true"),
    _objective("quantile", ("quantile",), "topk?bias=true"),
    _objective("threshold", ("threshold",), "threshold?most=4"),
    _objective("guided", ("guided?weight=0.1",), groups=("failure",)),
    Kind("dense, equal active", ("dense", "failure"), DENSE | {"ffn_dim": ACTIVE}, ()),
    Kind("dense, equal total", ("dense", "failure"), DENSE | {"ffn_dim": tiny().n_experts * WIDTH}, ()),
    Kind("K 1", ("k",), {"experts_per_token": 1, "ffn_dim": ACTIVE}, MICRO),
    # With one expert the softmax over the chosen is 1 whatever the router says: only balancing teaches it. Switch's
    # weight is the score among all experts.
    Kind("K 1, switch", ("k",), {"experts_per_token": 1, "ffn_dim": ACTIVE, "router": "switch"}, MICRO),
    Kind("K 4", ("k",), {"experts_per_token": 4, "ffn_dim": ACTIVE // 4}, MICRO),
    Kind("4 experts", ("k",), {"n_experts": 4}, MICRO),
    Kind("16 experts", ("k",), {"n_experts": 16}, MICRO),
    Kind("learned K", ("k",), {"router": "learned_k?most=4"}, (*MICRO, "k_price?weight=0.1&target=2")),
    Kind("top-p", ("k",), {"router": "top_p?p=0.5&most=4"}, MICRO),
)
GROUPS = ("objectives", "dense", "k", "failure")


@dataclass(frozen=True)
class Run:
    kind: Kind
    config: PretrainConfig

    @property
    def name(self) -> str:
        """As a folder: `micro_0.01-seed0`."""
        return f"{self.kind.label.replace(',', '').replace(' ', '_')}-seed{self.config.seed}"

    @property
    def cost(self) -> float:
        """FLOPs of training, of which the exact global batch needs a third more."""
        per_token = self.config.model.flops_per_token(self.config.context, backward=True)
        again = 4 / 3 if any(spec.startswith("global_batch") for spec in self.config.balance) else 1
        return again * per_token * self.config.tokens_per_step * self.config.steps


def planned(corpus: Path, tokenizer: Path, steps: int, groups: tuple[str, ...] = GROUPS) -> list[Run]:
    """The runs of some groups, all of the first seed before the second: so a short budget leaves whole comparisons."""
    wanted = [kind for kind in KINDS if set(kind.groups) & set(groups)]
    return [
        Run(kind, _config(kind, corpus, tokenizer, steps, seed))
        for place, seed in enumerate(SEEDS)
        for kind in wanted
        if place < TWICE or "objectives" in kind.groups
    ]


def _config(kind: Kind, corpus: Path, tokenizer: Path, steps: int, seed: int) -> PretrainConfig:
    data = tuple(f"{corpus}/train/{domain}.jsonl?domain={domain}=1" for domain in DOMAINS)
    checkpoints = -(-steps // 8)  # steps between them; measured after the run (measure.py)
    return PretrainConfig(
        model=tiny().replace(**kind.model), data=data, tokenizer=str(tokenizer), steps=steps, rows=4, context=256,
        accumulation=4, lr=4e-3, final_lr=0.02, balance=kind.balance, dtype="fp32", device="cpu", seed=seed,
        val_every=checkpoints, val_tokens=2048, save_every=checkpoints, keep=1000, stats_every=50,
    )  # fmt: skip
