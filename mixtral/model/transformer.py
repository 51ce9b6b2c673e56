"""The model: embedding, blocks of attention and (sparse) feed-forward, norm, output. One definition for everything.

Legend: T tokens, D model width, V vocabulary, K experts a token, L layers, R rows asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixtral import kernels
from mixtral.config import ModelConfig
from mixtral.config.router import TokenK
from mixtral.errors import UsageError
from mixtral.model.attention import Attention, KVCache
from mixtral.model.batch import Ragged
from mixtral.model.embedding import Embedding
from mixtral.model.linear import Linear
from mixtral.model.norm import RMSNorm
from mixtral.model.rope import rotary_angles
from mixtral.moe import Experts, FeedForward, MoE, Router, Routing, make_router
from mixtral.moe.dispatch import added_to

_BLOCK_BYTES = 32 * 2**20  # of fp32 logits that are made at once for a loss


class Output(NamedTuple):
    """What a forward pass returns: tensors and named tuples only."""

    logits: Tensor | None = None  # fp32 [R, V], without `targets`
    nll_T: Tensor | None = None  # fp32, -log p of each target, 0 where there is none; with `targets` alone
    loss: Tensor | None = None  # fp32 scalar, with `targets` and `loss_weights`
    routing: tuple[Routing, ...] = ()  # one a sparse layer


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn: MoE | FeedForward = _feed_forward(config, layer)

    def forward(
        self, x_TD: Tensor, angles: tuple[Tensor, Tensor], batch: Ragged, layer: int,
        cache: KVCache | None, replay: Tensor | None, k: int | Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:  # fmt: skip
        """x [T, D] -> (x [T, D], the layer's Routing, or None when dense)."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), angles, batch, layer, cache)
        h_TD = self.ffn_norm(x_TD)
        if not isinstance(self.ffn, MoE):
            return x_TD + self.ffn(h_TD), None
        y_TD, routing = self.ffn(h_TD, replay, k)
        return x_TD + y_TD, routing


def _feed_forward(config: ModelConfig, layer: int) -> MoE | FeedForward:
    shape, n_shared = config.layer(layer), config.shared_experts
    if not shape.is_sparse:
        return FeedForward(config.dim, shape.ffn_dim)
    shared = FeedForward(config.dim, n_shared * config.ffn_dim) if n_shared else None
    experts = Experts(shape.n_experts, config.dim, shape.ffn_dim)
    return MoE(make_router(config, shape.n_experts), experts, shared=shared)


class Mixtral(nn.Module):
    """A Mistral (dense) or Mixtral (sparse) language model. Weights are uninitialised: load them, or `initialise`.

    With the router `token_k`, the buffer `k_of_token` (int64 [V]) says how many experts each token id takes.
    """

    k_of_token: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        by_token = isinstance(config.router_options, TokenK)
        k_V = torch.full((config.vocab_size,), config.experts_per_token) if by_token else None
        self.register_buffer("k_of_token", k_V)
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output: nn.Module | None = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)

    @property
    def output_weight(self) -> Tensor:
        """[V, D], the embedding itself when tied. Raises UsageError when a packed module stands in its place."""
        weight = (self.embedding if self.output is None else self.output)._parameters.get("weight")
        if weight is None:
            raise UsageError("output_weight: this model's output is packed and has none; ask for its logits")
        return weight

    def forward(
        self, batch: Ragged, cache: KVCache | None = None, replay: Sequence[Tensor] | None = None,
        rows: Tensor | None = None, targets: Tensor | None = None, loss_weights: Tensor | Literal["mean"] | None = None,
        k: int | Tensor | None = None,
    ) -> Output:  # fmt: skip
        """Run a ragged batch.

        Args:
            cache: keys and values of earlier tokens; the batch holds each sequence's new tokens alone.
            replay: one int64 [T, K] a sparse layer: the experts to take, as an earlier `routing` recorded them.
            rows: int64 [R], the tokens whose logits are wanted; all of them by default.
            targets: int64 [T], the token to predict at each position, -100 for none; gives -log p of each instead of
                logits. [T, V] is never whole then, nor in the backward pass, which makes the logits again.
            loss_weights: of the targets, fp32 [T] or "mean", where they are known before the pass: gives the weighted
                sum alone, and makes gradients in the forward pass, without another product.
            k: how many experts a token takes in this call, in every layer: a number, or int64 [T]. Routers that find
                the number themselves (top_p, min_p, threshold) raise UsageError, and so does a dense model.
        """
        x_TD, routing = self.hidden(batch, cache, replay, k)
        if targets is None:
            return Output(logits=self.logits(self.norm(x_TD if rows is None else x_TD[rows])), routing=routing)
        if loss_weights is None:
            return Output(nll_T=self._nll(self.norm(x_TD), targets), routing=routing)
        return Output(loss=self._loss(self.norm(x_TD), targets, loss_weights), routing=routing)

    def hidden(
        self, batch: Ragged, cache: KVCache | None = None, replay: Sequence[Tensor] | None = None,
        k: int | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:  # fmt: skip
        """The residual stream after the last layer, [T, D], which the norm and the output read; and the routing."""
        if k is None and replay is None and self.k_of_token is not None:
            k = self.k_of_token[batch.tokens_T]
        elif k is not None and not self.config.is_sparse:
            raise UsageError("k: this model is dense (one expert); only sparse models choose how many a token takes")
        if replay is not None and len(replay) != (n := len(self.config.sparse_layers)):
            raise UsageError(f"replay: {len(replay)} given for {n} sparse layers; one for each is wanted")
        x_TD = self.embedding(batch.tokens_T)
        angles = rotary_angles(batch.positions_T, self.config.head_dim, self.config.rope_theta)
        routings: list[Routing] = []
        for i, block in enumerate(self.layers):
            choice = replay[len(routings)] if replay is not None and self.config.layer(i).is_sparse else None
            x_TD, routing = block(x_TD, angles, batch, i, cache, choice, k)
            if routing is not None:
                routings.append(routing)
        return x_TD, tuple(routings)

    def logits(self, h_RD: Tensor) -> Tensor:
        """The output product of rows that the norm has been over -> fp32 [R, V]."""
        h_RV = self.embedding.logits(h_RD) if self.output is None else self.output(h_RD)
        return h_RV.float()

    def _plain_output(self) -> bool:
        """Whether the output is its weight and nothing more, so that an op may take that instead of the module."""
        module, plain = (self.embedding, Embedding) if self.output is None else (self.output, Linear)
        return type(module) is plain and not added_to(module)

    def _nll(self, h_TD: Tensor, targets_T: Tensor) -> Tensor:
        """-log p of each target. Another output than a plain one is called as it is, on some rows at a time."""
        if self._plain_output():
            return kernels.token_nll(h_TD, self.output_weight, targets_T)

        def block(h_tD: Tensor, targets_t: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.logits(h_tD), targets_t, ignore_index=-100, reduction="none")

        size = max(1, _BLOCK_BYTES // (4 * self.config.vocab_size))
        pairs = zip(h_TD.split(size), targets_T.split(size), strict=True)
        return torch.cat([checkpoint(block, *pair, use_reentrant=False) for pair in pairs])

    def _loss(self, h_TD: Tensor, targets_T: Tensor, weights: Tensor | Literal["mean"]) -> Tensor:
        weights_T = weights if isinstance(weights, Tensor) else None
        if self._plain_output():
            return kernels.cross_entropy(h_TD, self.output_weight, targets_T, weights_T)
        nll_T = self._nll(h_TD, targets_T)
        if weights_T is not None:
            return (nll_T * weights_T).sum()
        return nll_T.sum() / (targets_T != -100).sum().clamp(min=1)


def named_state(model: Mixtral) -> dict[str, Tensor]:
    """All that makes a model what it is, by name: its parameters and its persistent buffers, themselves, not copies."""
    return dict(model.state_dict(keep_vars=True))


@torch.no_grad()
def initialise(model: Mixtral, generator: torch.Generator | None = None) -> Mixtral:
    """Fresh weights, in place.

    Normal with `init_std`; the two projections that write into the residual stream are scaled by 1/sqrt(2 L), so that
    its variance does not grow with depth (GPT-2's rule); the output has std 0.1/sqrt(D), so that fresh logits have a
    standard deviation of 0.1 whatever the width and the loss starts at ln V; norms are 1; parameters that a router
    wants at 0, and its buffers, start as its options say.
    """
    config = model.config
    residual = config.init_std / (2 * config.n_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        if name.rpartition(".router.")[2] in config.router_options.zero_at_start:
            parameter.zero_()
            continue
        std = residual if name.endswith((".wo.weight", ".w2")) else config.init_std
        parameter.normal_(0.0, std, generator=generator)
    for module in model.modules():
        if isinstance(module, Router):
            module.reset_buffers()
    if model.k_of_token is not None:
        model.k_of_token.fill_(config.experts_per_token)
    model.output_weight.normal_(0.0, 0.1 / config.dim**0.5, generator=generator)
    return model
