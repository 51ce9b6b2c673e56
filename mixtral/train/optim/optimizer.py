"""What updates a model's weights: AdamW or Muon over fp32 master weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixtral.model import Mixtral
from mixtral.train.config import OptimConfig
from mixtral.train.optim.muon import Muon


class Optimizer:
    """AdamW (arXiv 1711.05101) on fp32 masters; with `optimizer: muon`, Muon on the matrices inside the layers.

    In fp32 the masters are the model's own parameters. In bf16 the model holds bf16 copies, made once a step: gradients
    are added to the masters' in fp32 after each micro-batch, and the copies are refreshed after the step. Router
    weights stay fp32 in the model, and so do its buffers. A sharded model (FSDP2) stays fp32, and computes as its own
    precision policy says.
    """

    def __init__(self, model: Mixtral, config: OptimConfig, dtype: torch.dtype) -> None:
        self.clip = config.clip
        self.model_params: dict[str, Tensor] = dict(model.named_parameters())
        self.masters: dict[str, Tensor] = {}
        if dtype != torch.float32:
            self.masters = {name: p.detach().clone() for name, p in self.model_params.items()}
            _cast(model, dtype)
            self.model_params = dict(model.named_parameters())
        self.parts = _optimizers(self.params, config)

    @property
    def params(self) -> dict[str, Tensor]:
        """The fp32 weights that are optimised."""
        return self.masters or self.model_params

    def collect_gradients(self) -> None:
        """After each backward pass: move the model's gradients to the masters, summed in fp32."""
        for name, master in self.masters.items():
            grad = self.model_params[name].grad
            if grad is not None:
                master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
                self.model_params[name].grad = None

    def grad_norm(self) -> Tensor:
        """The global norm of all gradients, over all shards."""
        norm = nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def clip_gradients(self, norm: Tensor) -> None:
        """Scale all gradients, of global norm `norm`, so that it is at most `clip`."""
        if self.clip:
            nn.utils.clip_grads_with_norm_(list(self.params.values()), self.clip, norm)

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`; gradients are gone afterwards."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, master in self.masters.items():
                self.model_params[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Every other tensor needed to go on: moments and step counts, `exp_avg/NAME`."""
        names = {p: name for name, p in self.params.items()}
        return {
            f"{kind}/{names[p]}": value
            for part in self.parts
            for p, state in part.state.items()
            for kind, value in state.items()
        }

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take over what `params` and `state` gave."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(weights[name])
                self.model_params[name].copy_(p)
        for part in self.parts:
            part.state.clear()
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            p = self.params[name]
            # AdamW keeps its step counts where they were made, moments live beside their parameter
            owner[p].state[p][kind] = value if value.dim() == 0 else value.to(p.device)


def _optimizers(params: dict[str, Tensor], config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Who updates what: norms without decay; embedding, output and routers always by AdamW."""
    by_muon = {
        name: p
        for name, p in params.items()
        if config.optimizer == "muon" and p.dim() > 1 and "layers." in name and ".router." not in name
    }
    by_adamw = [p for name, p in params.items() if name not in by_muon]
    groups = [
        {"params": [p for p in by_adamw if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in by_adamw if p.dim() <= 1], "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)]
    if by_muon:
        parts.append(Muon(by_muon.values(), config.lr, config.weight_decay))
    return parts


def _cast(model: Mixtral, dtype: torch.dtype) -> None:
    """Cast all but the routers' weights: which experts a token takes should not depend on bf16."""
    for name, module in model.named_modules():
        if not name.endswith("router"):
            for key, p in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(p.detach().to(dtype)))
