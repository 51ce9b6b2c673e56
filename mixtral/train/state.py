"""TrainState: all that a training step changes, and that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral.model import Mixtral, named_state
from mixtral.moe import MoE
from mixtral.train.balancing.balancer import Balancer
from mixtral.train.config import PretrainConfig
from mixtral.train.optim.optimizer import Optimizer

BALANCE = "balance/"  # before the names of what balancing keeps, beside the optimiser's moments


@dataclass
class TrainState:
    """A model, what updates its weights, and what balances its routers. Tensors are as they are sharded."""

    model: Mixtral
    optimizer: Optimizer
    balancer: Balancer

    @classmethod
    def of(
        cls, model: Mixtral, config: PretrainConfig, dtype: torch.dtype, domains: Sequence[str] = ()
    ) -> TrainState:
        """The state in which training begins.

        Args:
            dtype: of the model's weights while it computes; other than fp32 the model becomes a copy of fp32 masters.
            domains: the names of the data's domains, for objectives that need them.
        """
        routers = [module.router for module in model.modules() if isinstance(module, MoE)]
        return cls(model, Optimizer(model, config, dtype), Balancer(routers, config, domains))

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers, which the balancer moves."""
        return {name: b for name, b in named_state(self.model).items() if name not in self.optimizer.params}

    @property
    def weights(self) -> dict[str, Tensor]:
        """All that makes up the model: the fp32 weights that are optimised, and its persistent buffers."""
        return {**self.optimizer.params, **self.buffers}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor needed to go on: "model" (`weights`) and "optimizer" (moments and step counts `KIND/NAME`, and
        `balance/...`)."""
        balance = {BALANCE + name: value for name, value in self.balancer.state().items()}
        return {"model": self.weights, "optimizer": self.optimizer.state() | balance}

    def empty_state_dict(self, moments: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Tensors to load into, sharded as this state's are, for the moments `KIND/NAME` of a checkpoint.

        Raises KeyError for a moment of a parameter that the model lacks.
        """
        known, found = self.optimizer.params, {}
        for key in moments:
            kind, _, name = key.partition("/")
            found[key] = torch.empty(()) if kind == "step" else torch.empty_like(known[name], requires_grad=False)
        return {"model": {n: torch.empty_like(w, requires_grad=False) for n, w in self.weights.items()},
                "optimizer": found}  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state_dict` gave; what is missing of the optimiser's state is as at the start."""
        for name, buffer in self.buffers.items():
            buffer.copy_(state["model"][name])
        kept = state["optimizer"]
        self.optimizer.load(state["model"], {n: t for n, t in kept.items() if not n.startswith(BALANCE)})
        self.balancer.load({n.removeprefix(BALANCE): t for n, t in kept.items() if n.startswith(BALANCE)})
