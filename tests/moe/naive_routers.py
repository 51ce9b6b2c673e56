"""Every router as its equation says, one token at a time with Python's lists: the oracle of the tests here.

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.config.router import (
    ExpertChoice,
    Grouped,
    Jitter,
    LearnedK,
    MinP,
    Noisy,
    Sigmoid,
    Switch,
    Threshold,
    TopK,
    TopP,
)
from mixtral.moe import Router, make_router

SPECS = [
    "topk", "topk?bias=true", "topk?capacity_factor=0.75", "topk?bias=true&capacity_factor=1",
    "switch", "switch?capacity_factor=0.5", "switch?bias=true&capacity_factor=0.8",
    "noisy", "noisy?bias=true", "noisy?capacity_factor=0.7",
    "jitter?eps=0.3", "jitter?eps=0.3&bias=true&capacity_factor=0.7",
    "sigmoid", "sigmoid?bias=true&scale=2.5&capacity_factor=0.9",
    "grouped?groups=4&taken=2", "grouped?groups=2&by=max&bias=true", "grouped?groups=4&taken=2&capacity_factor=0.6",
    "learned_k", "learned_k?most=3&bias=true", "learned_k?most=5&bias=true&capacity_factor=0.7",
    "token_k", "token_k?most=3&bias=true", "token_k?most=3&capacity_factor=0.5",
    "top_p?p=0.6", "top_p?p=0.9&least=2&most=3", "top_p?p=1", "min_p?p=0.4", "min_p?p=0.9&least=2&most=4",
    "threshold", "threshold?most=2", "expert_choice",
]  # fmt: skip
TRAINING_ONLY = [spec for spec in SPECS if spec.startswith("expert_choice")]
MODES = [(spec, training) for spec in SPECS for training in (True, False) if training or spec not in TRAINING_ONLY]


def config(spec: str, **changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "vocab_size": 50, "dim": 6, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "ffn_dim": 5,
        "n_experts": 8, "experts_per_token": 1 if spec.startswith("switch") else 2, "rope_theta": 1e4, "router": spec,
    }  # fmt: skip
    return ModelConfig(**{**base, **changes})


def router(spec: str, seed: int = 0) -> Router:
    """With weights, biases and thresholds large enough to matter."""
    made, generator = make_router(config(spec)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
        for name, buffer in made.named_buffers():
            buffer.normal_(std=0.3, generator=generator) if name == "bias" else buffer.uniform_(0.02, 0.3)
    return made


def dense_weights(experts_TK: Tensor, weights_TK: Tensor, n_experts: int) -> Tensor:
    """-> [T, E], 0 where an expert is not taken."""
    wide = weights_TK.new_zeros(len(experts_TK), n_experts + 1).scatter_add(1, experts_TK + 1, weights_TK)
    return wide[:, 1:]


def route(made: Router, x_TD: Tensor, seed: int, k_T: Tensor | None = None) -> Tensor:
    """The weight of every expert for every token -> [T, E], 0 where it is not taken; noise as from `seed`.

    `k_T`: how many experts each token takes, where it has a number of its own.
    """
    options = made.options
    torch.manual_seed(seed)
    logits_TE = _logits(made, x_TD)
    scores_TE = logits_TE.sigmoid() if isinstance(options, Sigmoid) else logits_TE.softmax(-1)
    if isinstance(options, ExpertChoice):
        chosen = _experts_choose(scores_TE, made.experts_per_token)
    else:
        ks = [None] * len(x_TD) if k_T is None else k_T.tolist()
        chosen = [_choose(made, x_D, s_E, k) for x_D, s_E, k in zip(x_TD, scores_TE, ks, strict=True)]
    kept = chosen
    if isinstance(options, TopK) and options.capacity_factor and made.training:
        share = Fraction(made.experts_per_token, made.n_experts) * Fraction(str(options.capacity_factor))
        kept = _drop(chosen, scores_TE, math.ceil(share * len(x_TD)))
    rows = [_weigh(made, s_E, experts) for s_E, experts in zip(scores_TE, kept, strict=True)]
    if isinstance(options, LearnedK) and made.training:
        rows = [_with_head(made, x_D, *row) for x_D, *row in zip(x_TD, rows, chosen, strict=True)]
    return torch.stack(rows) if rows else scores_TE * 0


def _with_head(made: Router, x_D: Tensor, row_E: Tensor, chosen: list[int]) -> Tensor:
    """The same weights; the head gets the gradient of weight * P(K >= j) for the j-th expert chosen, from 1."""
    p_J = (made.k_weight @ x_D).softmax(-1)
    weights = list(row_E)
    for j, e in enumerate(chosen):
        probability = p_J[j:].sum()
        weights[e] = row_E[e] + row_E[e].detach() * (probability - probability.detach())
    return torch.stack(weights)


def _logits(made: Router, x_TD: Tensor) -> Tensor:
    if isinstance(made.options, Jitter) and made.training:
        eps = made.options.eps
        x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - eps, 1 + eps)
    logits_TE = x_TD @ made.weight.T
    if isinstance(made.options, Noisy) and made.training:
        spread_TE = (1 + (x_TD @ made.noise_weight.T).exp()).log()
        logits_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE
    return logits_TE


def _order(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -values[e])


def _choose(made: Router, x_D: Tensor, scores_E: Tensor, k: int | None) -> list[int]:
    """The experts of one token, in the order in which they come in as K grows."""
    o, s = made.options, scores_E.tolist()
    if isinstance(o, TopP):
        order = _order(s)
        n = next((n for n in range(1, len(s)) if o.p < 1 and sum(s[e] for e in order[:n]) >= o.p), len(s))
        return order[: min(max(n, o.least), o.most or len(s))]
    if isinstance(o, MinP):
        n = sum(value >= o.p * max(s) for value in s)
        return _order(s)[: min(max(n, o.least), o.most or len(s))]
    if isinstance(o, Threshold):
        return [e for e in _order(s) if s[e] > made.get_buffer("threshold")[e]][: o.most or len(s)]
    bias = [0.0] * len(s) if not (isinstance(o, TopK) and o.bias) else made.get_buffer("bias").tolist()
    key = [a + b for a, b in zip(s, bias, strict=True)]
    k = made.experts_per_token if k is None else k
    if isinstance(o, LearnedK):
        k = int((made.k_weight @ x_D).argmax()) + 1
    if not isinstance(o, Grouped):
        return _order(key)[:k]
    size = len(s) // o.groups
    groups = [key[g * size : (g + 1) * size] for g in range(o.groups)]
    worth = [sum(sorted(group)[-2:]) if o.by == "top2" else max(group) for group in groups]
    inside = [e for g in _order(worth)[: o.taken] for e in range(g * size, (g + 1) * size)]
    return sorted(inside, key=lambda e: (-key[e], e))[:k]


def _experts_choose(scores_TE: Tensor, k: int) -> list[list[int]]:
    n_tokens, n_experts = scores_TE.shape
    chosen: list[list[int]] = [[] for _ in range(n_tokens)]
    for e in range(n_experts):
        for t in _order(scores_TE[:, e].tolist())[: math.ceil(n_tokens * k / n_experts)]:
            chosen[t].append(e)
    return chosen


def _drop(chosen: list[list[int]], scores_TE: Tensor, limit: int) -> list[list[int]]:
    kept: list[list[int]] = [[] for _ in chosen]
    load = [0] * scores_TE.shape[1]
    ranked = [sorted(experts, key=lambda e, t=t: (-scores_TE[t, e].item(), e)) for t, experts in enumerate(chosen)]
    for rank in range(max(map(len, chosen), default=0)):
        for t, experts in enumerate(ranked):
            if rank < len(experts) and load[experts[rank]] < limit:
                load[experts[rank]] += 1
                kept[t].append(experts[rank])
    return kept


def _weigh(made: Router, scores_E: Tensor, experts: list[int]) -> Tensor:
    total = sum((scores_E[e] for e in experts), start=torch.zeros(()))
    row = [torch.zeros(())] * len(scores_E)
    for e in experts:
        raw = isinstance(made.options, Switch | Threshold | ExpertChoice)
        row[e] = scores_E[e] if raw else scores_E[e] / total
        if isinstance(made.options, Sigmoid):
            row[e] = made.options.scale * row[e]
    return torch.stack(row)
