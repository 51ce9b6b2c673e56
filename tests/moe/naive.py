"""The sparse layer as the paper writes it, token by token: the oracle of the tests here."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.model import Mixtral
from mixtral.moe import Experts, MoE, Routing, TopKRouter


def routing_of(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(weights, experts) by Python's stable sort and a softmax over the chosen logits, one token at a time."""
    weights, experts = [], []
    for logits_E in logits_TE:
        chosen = sorted(range(len(logits_E)), key=lambda e: -logits_E[e].item())[:k]
        experts.append(torch.tensor(chosen))
        weights.append(logits_E[chosen].exp() / logits_E[chosen].exp().sum())
    return torch.stack(weights), torch.stack(experts)


def layer(moe: MoE, x_TD: Tensor, k: int) -> Tensor:
    """y = sum over i of softmax(TopK(x Wg))_i * SwiGLU_i(x) (arXiv 2401.04088, section 2.1)."""
    weights_TK, experts_TK = routing_of(x_TD @ moe.router.weight.T, k)
    out = []
    for x_D, weights_K, experts_K in zip(x_TD, weights_TK, experts_TK, strict=True):
        y_D = torch.zeros_like(x_D)
        for weight, e in zip(weights_K, experts_K.tolist(), strict=True):
            gate_F, up_F = moe.experts.w13[e, 0] @ x_D, moe.experts.w13[e, 1] @ x_D
            y_D = y_D + weight * (moe.experts.w2[e] @ (torch.nn.functional.silu(gate_F) * up_F))
        out.append(y_D)
    return torch.stack(out)


def weighted(experts: Experts, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
    """y = sum over all experts of weight * expert(x), most weights being 0: nothing is sorted or left out."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(weights_TE.shape[1]):
        hidden_TF = torch.nn.functional.silu(x_TD @ experts.w13[e, 0].T) * (x_TD @ experts.w13[e, 1].T)
        y_TD = y_TD + weights_TE[:, e, None] * (hidden_TF @ experts.w2[e].T)
    return y_TD


class NaiveMoE(MoE):
    """A layer's own router, experts and shared experts, put together by `weighted`."""

    def forward(
        self, x_TD: Tensor, replay: Tensor | None = None, k: int | Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        routing = self.router(x_TD, replay, k)
        wide_TE = torch.zeros(len(x_TD), self.router.n_experts + 1).scatter_add(
            1, routing.experts_TK + 1, routing.weights_TK
        )
        y_TD = weighted(self.experts, x_TD, wide_TE[:, 1:])
        return y_TD if self.shared is None else y_TD + self.shared(x_TD), routing


def without_dispatch(model: Mixtral) -> Mixtral:
    """The same model, its sparse layers computed by `NaiveMoE`; in place."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.__class__ = NaiveMoE
    return model


def moe(n_experts: int = 5, k: int = 2, dim: int = 12, ffn: int = 7) -> MoE:
    """A layer with weights large enough for its parts to matter."""
    made = MoE(TopKRouter(dim, n_experts, k), Experts(n_experts, dim, ffn))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def routing(choice: list[list[int]], scores: Tensor | None = None, n_experts: int = 4) -> Routing:
    """A Routing that takes `choice`; scores put all probability evenly on the chosen experts unless given."""
    experts_TK = torch.tensor(choice, dtype=torch.int64)
    if scores is None:
        scores = torch.zeros(len(choice), n_experts)
        for t, experts in enumerate(choice):
            taken = [e for e in experts if e >= 0]
            scores[t, taken] = 1 / max(1, len(taken))
    weights_TK = torch.where(experts_TK < 0, 0.0, scores.gather(1, experts_TK.clamp(min=0)))
    return Routing(scores.clamp(min=1e-30).log(), scores, weights_TK, experts_TK, experts_TK)


def layer_with_ks(moe: MoE, x_TD: Tensor, k_T: Tensor) -> Tensor:
    """The layer's output for a number of experts of each token's own, one token at a time through `layer`."""
    out = []
    for x_D, k in zip(x_TD, k_T.tolist(), strict=True):
        out.append(layer(moe, x_D[None], k)[0] if k else torch.zeros_like(x_D))
    return torch.stack(out)
