"""AdamW over fp32 master weights, whatever dtype the model computes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixtral.model import Mixtral
from mixtral.train.config import TrainConfig


class Optimizer:
    """AdamW (arXiv 1711.05101) on fp32 masters.

    In fp32 the masters are the model's own parameters. In bf16 the model holds bf16 copies, made once a step: gradients
    are added to the masters' in fp32 after each part of a batch, and the copies are refreshed after the step. Router
    weights stay fp32 in the model.
    """

    def __init__(self, model: Mixtral, config: TrainConfig, dtype: torch.dtype) -> None:
        self.clip = config.clip
        self.model_params = dict(model.named_parameters())
        self.masters = {name: p.detach().clone() for name, p in self.model_params.items()} if dtype != torch.float32 else {}
        if self.masters:
            _cast(model, dtype)
            self.model_params = dict(model.named_parameters())
        decayed = [p for p in self.params.values() if p.dim() > 1]
        others = [p for p in self.params.values() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

    @property
    def params(self) -> dict[str, Tensor]:
        """The fp32 weights that are optimised."""
        return self.masters or self.model_params

    def collect_gradients(self) -> None:
        """After each backward pass: move the model's gradients to the masters, summed in fp32. Nothing to do in fp32."""
        for name, master in self.masters.items():
            grad = self.model_params[name].grad
            if grad is not None:
                master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
                self.model_params[name].grad = None

    def clip_gradients(self) -> Tensor:
        """Scale all gradients so that their global norm is at most `clip`; -> the norm before."""
        return nn.utils.clip_grad_norm_(list(self.params.values()), self.clip or float("inf"))

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`; gradients are gone afterwards."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, master in self.masters.items():
                self.model_params[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Every tensor needed to go on: masters' moments and step counts, named `exp_avg/NAME` and so on."""
        return {
            f"{key}/{name}": value
            for name, p in self.params.items()
            for key, value in self.adamw.state[p].items()
            if isinstance(value, Tensor)
        }

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Take over fp32 weights and the state that `state` gave."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(weights[name])
                self.model_params[name].copy_(p)
        for key, value in state.items():
            kind, _, name = key.partition("/")
            self.adamw.state[self.params[name]][kind] = value


def _cast(model: Mixtral, dtype: torch.dtype) -> None:
    """Cast all but the routers' weights: which experts a token takes should not hang on bf16."""
    for name, module in model.named_modules():
        if not name.endswith("router"):
            for key, p in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(p.detach().to(dtype)))
