"""ModelConfig: the shape of a model, validated, and able to count before anything is built.

`formats.py` reads it from, and writes it to, the files of Hugging Face and Mistral.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from mixtral.config.router import RouterOptions, parse_router
from mixtral.config.specs import check_names
from mixtral.errors import ConfigError, shown

# The most that a field may be: above every model there is, and little enough to loop over and for 32 bits. Whoever
# builds something from a file's configuration first holds it against what the file has (weights/load.py).
LIMITS = {
    "vocab_size": 1 << 24, "dim": 1 << 20, "n_layers": 1 << 12, "n_heads": 1 << 16, "n_kv_heads": 1 << 16,
    "head_dim": 1 << 16, "ffn_dim": 1 << 24, "n_experts": 1 << 16, "experts_per_token": 1 << 16,
    "shared_experts": 1 << 16, "context": (1 << 31) - 1, "sliding_window": (1 << 31) - 1,
    "rope_theta": 1e30, "norm_eps": 1e30, "init_std": 1e30,  # fp32 holds them
}  # fmt: skip
FLOATS = ("rope_theta", "norm_eps", "init_std")
_LONGEST_ROUTER = 1000  # characters

DEFAULT_EOS = 2  # of every published model


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_token_id(value: object) -> bool:
    return _is_int(value) and 0 <= value < 1 << 32  # type: ignore[operator]  # GGUF holds them in 32 bits


def end_tokens(value: object, name: str) -> int | tuple[int, ...] | None:
    """One id, a list of ids or None, in its simplest form: no id twice, a list of one is the id, an empty one is None.

    Raises ConfigError, which begins with `name`, for anything else.
    """
    ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(map(is_token_id, ids)):
        raise ConfigError(f"{name} must be a token id, a list of token ids or null, not {shown(value)}")
    ids = tuple(dict.fromkeys(ids))
    return ids if len(ids) > 1 else next(iter(ids), None)


class LayerConfig(NamedTuple):
    """Shape of one layer's feed-forward part."""

    n_experts: int  # 1: dense
    ffn_dim: int  # hidden width of one expert, or of the dense network

    @property
    def is_sparse(self) -> bool:
        return self.n_experts > 1


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Mistral (one expert: dense) or Mixtral (several: sparse) model.

    Raises ConfigError when a field is out of range or contradicts another.
    """

    vocab_size: int
    dim: int  # D, the width of the residual stream
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int  # key/value heads; each serves n_heads / n_kv_heads query heads
    head_dim: int
    ffn_dim: int  # F, the hidden width of one expert
    n_experts: int = 1  # the most of any layer; 1: a dense feed-forward network and no router
    experts_per_token: int = 1  # K
    rope_theta: float = 1e6
    context: int = 32768  # the longest sequence the model is meant for, in tokens
    sliding_window: int | None = None  # a token sees this many positions, itself included; None: all of them
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    bos_id: int | None = 1
    eos_id: int | tuple[int, ...] | None = DEFAULT_EOS  # a generation ends at any of several; lists become tuples
    init_std: float = 0.02
    router: str = "topk"  # NAME?option=value&...; router.py has the names
    shared_experts: int = 0  # experts of width ffn_dim that every token takes, besides those it is routed to
    experts_by_layer: tuple[int, ...] | None = None  # of each layer, 1: dense; None: n_experts in every layer
    dense_ffn_dim: int | None = None  # hidden width of the dense layers of a sparse model; None: ffn_dim

    def __post_init__(self) -> None:
        positive = "vocab_size dim n_layers n_heads n_kv_heads head_dim ffn_dim n_experts experts_per_token context"
        for name in positive.split():
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ConfigError(f"config: {name} must be a positive integer, not {shown(value)}")
        for name in FLOATS:
            value = getattr(self, name)
            if not (_is_int(value) or isinstance(value, float)) or not 0 < value < math.inf:
                raise ConfigError(f"config: {name} must be a positive number, not {shown(value)}")
        window = self.sliding_window
        if window is not None and (not _is_int(window) or window < 1):
            raise ConfigError(f"config: sliding_window must be a positive integer or null, not {shown(window)}")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"config: tie_embeddings must be true or false, not {shown(self.tie_embeddings)}")
        if not _is_int(self.shared_experts) or self.shared_experts < 0:
            value = shown(self.shared_experts)
            raise ConfigError(f"config: shared_experts must be 0 or a positive integer, not {value}")
        if not isinstance(self.router, str) or len(self.router) > _LONGEST_ROUTER:
            raise ConfigError(f"config: router must be a text such as 'topk', not {shown(self.router)}")
        if self.bos_id is not None and not is_token_id(self.bos_id):
            raise ConfigError(f"config: bos_id must be a token id or null, not {shown(self.bos_id)}")
        object.__setattr__(self, "eos_id", end_tokens(self.eos_id, "config: eos_id"))
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise ConfigError(f"config: {name} must be at most {most:,}, not {shown(value)}")
        for name in FLOATS:  # as a file may have whole numbers, of any size, which torch does not take for them
            object.__setattr__(self, name, float(getattr(self, name)))
        self._check_layers()
        self._check_together()

    def _check_layers(self) -> None:
        width = self.dense_ffn_dim
        if width is not None and (not _is_int(width) or not 1 <= width <= LIMITS["ffn_dim"]):
            raise ConfigError(f"config: dense_ffn_dim must be a positive integer or null, not {shown(width)}")
        numbers = self.experts_by_layer
        if numbers is None:
            if width is not None:
                raise ConfigError("config: dense_ffn_dim is for a model with dense layers among sparse ones; "
                                  "experts_by_layer says which")
            return
        if not isinstance(numbers, list | tuple) or not all(_is_int(n) and n >= 1 for n in numbers):
            raise ConfigError(f"config: experts_by_layer must be a list of positive integers, not {shown(numbers)}")
        object.__setattr__(self, "experts_by_layer", tuple(numbers))
        if len(numbers) != self.n_layers or max(numbers) != self.n_experts:
            raise ConfigError(f"config: experts_by_layer must have n_layers {self.n_layers} numbers, the largest of "
                              f"them n_experts {self.n_experts}; not {shown(list(numbers))}")
        if width is not None and 1 not in numbers:
            raise ConfigError("config: dense_ffn_dim is for dense layers, and experts_by_layer has none (1)")

    def _check_together(self) -> None:
        """Refuse fields that are fine alone and contradict each other."""
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"config: head_dim must be even for the rotary embedding, not {self.head_dim}")
        sizes = sorted({shape.n_experts for shape in self._layer_shapes() if shape.is_sparse} or {1})
        if self.experts_per_token > sizes[0]:
            which = "n_experts" if len(sizes) == 1 else "the smallest sparse layer's experts,"
            raise ConfigError(f"config: experts_per_token {self.experts_per_token} is more than {which} {sizes[0]}")
        if not self.is_sparse and not self.is_plain:
            raise ConfigError("config: a dense model (n_experts 1) has no router and no shared_experts; remove them")
        options = self.router_options
        try:
            for n_experts in sizes:
                options.check(n_experts, self.experts_per_token)
        except ConfigError as error:
            raise ConfigError(f"config: router {self.router!r}: {error}") from None

    # -- what kind of model ------------------------------------------------------------------------------------------

    @property
    def is_sparse(self) -> bool:
        return self.n_experts > 1

    @property
    def is_plain(self) -> bool:
        """Whether it is a Mistral or Mixtral as published, which other programs compute too."""
        return self.router == "topk" and self.shared_experts == 0 and self.is_uniform

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same number of experts."""
        return self.experts_by_layer is None

    def layer(self, i: int) -> LayerConfig:
        """Shape of layer `i`."""
        n_experts = self.n_experts if self.experts_by_layer is None else self.experts_by_layer[i]
        dense = n_experts == 1 and self.dense_ffn_dim is not None
        return LayerConfig(n_experts, self.dense_ffn_dim if dense and self.dense_ffn_dim else self.ffn_dim)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers with a router, by number."""
        return tuple(i for i in range(self.n_layers) if self.layer(i).is_sparse)

    @property
    def fewest_experts(self) -> int:
        """The fewest that a sparse layer has: as many as a token may take; 1 when dense."""
        return min((shape.n_experts for shape in self._layer_shapes() if shape.is_sparse), default=1)

    def _layer_shapes(self) -> dict[LayerConfig, int]:
        """The different shapes of layers, and how many have each."""
        if self.experts_by_layer is None:
            return {self.layer(0): self.n_layers}
        return Counter(map(self.layer, range(self.n_layers)))

    def not_plain(self) -> str:
        """What other formats cannot hold of this model, by name; "" when they hold all."""
        found = [f"router {self.router!r}"] if self.router != "topk" else []
        found += [f"{self.shared_experts} shared experts"] if self.shared_experts else []
        found += [] if self.is_uniform else ["layers of different numbers of experts (experts_by_layer)"]
        return ", ".join(found)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a generation, the one that ends a text first."""
        if self.eos_id is None:
            return ()
        return self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)

    @property
    def router_options(self) -> RouterOptions:
        return parse_router(self.router)

    @property
    def queries_per_kv(self) -> int:
        return self.n_heads // self.n_kv_heads

    # -- counting ----------------------------------------------------------------------------------------------------

    @property
    def expert_params(self) -> int:
        """Parameters of one expert of one layer: gate, up and down, no biases."""
        return 3 * self.dim * self.ffn_dim

    @property
    def attention_params(self) -> int:
        """Parameters of one layer's attention: query, key, value and output projections, no biases."""
        return self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)

    def routed_params(self) -> int:
        """Parameters of all routed experts of all layers."""
        return self.expert_params * sum(
            count * shape.n_experts for shape, count in self._layer_shapes().items() if shape.is_sparse
        )

    def _layer_params(self, layer: LayerConfig, k: int | None) -> int:
        """Parameters of a layer's products, with `k` of its routed experts, or all of them."""
        if not layer.is_sparse:
            return self.attention_params + 3 * self.dim * layer.ffn_dim
        shapes = self.router_options.parameters(self.dim, layer.n_experts).values()
        experts = (layer.n_experts if k is None else k) + self.shared_experts
        return self.attention_params + sum(map(math.prod, shapes)) + experts * self.expert_params

    def _count(self, k: int | None) -> int:
        """Parameters, with `k` of the routed experts in each sparse layer, or all of them."""
        layers = sum(count * (self._layer_params(s, k) + 2 * self.dim) for s, count in self._layer_shapes().items())
        return layers + self.vocab_size * self.dim * (1 if self.tie_embeddings else 2) + self.dim

    def n_params(self) -> int:
        """All parameters."""
        return self._count(None)

    def n_active_params(self, k: int | None = None) -> int:
        """Parameters a token meets when it takes `k` experts (default: the configured K) and the shared ones."""
        return self._count(self._taken(k))

    def _taken(self, k: int | None) -> int:
        """The number of experts a token takes: `k`, or the configured K."""
        k = self.experts_per_token if k is None else k
        if not 1 <= k <= self.fewest_experts:
            raise ConfigError(f"config: k must lie in 1..{self.fewest_experts} (n_experts), not {k}")
        return k

    def flops_per_token(self, context: int, backward: bool = False, k: int | None = None) -> int:
        """Multiply-adds times two for one token, averaged over a sequence of `context` tokens.

        Counts every matrix product: projections, router, K experts and the shared ones, output, and the two attention
        products over the positions a causal (and windowed) token sees on average. The embedding is a lookup and costs
        nothing. The backward pass computes two products for each one of the forward pass, so forward with backward is
        three times. A router that finds the number of experts itself is counted with K.
        """
        if context < 1:
            raise ConfigError(f"config: context must be a positive number of tokens, not {context}")
        k = self._taken(k)
        layers = sum(count * self._layer_params(shape, k) for shape, count in self._layer_shapes().items())
        matmul = layers + self.vocab_size * self.dim
        attention = self.n_layers * 2 * self.n_heads * self.head_dim * self._mean_visible(context)
        forward = 2 * (matmul + attention)
        return round(3 * forward if backward else forward)

    def _mean_visible(self, context: int) -> float:
        """Positions seen by a token, itself included, averaged over a sequence of `context` tokens."""
        window = min(self.sliding_window or context, context)
        return (window * (window + 1) / 2 + (context - window) * window) / context

    def weight_bytes(self, bits: float = 16) -> int:
        """Bytes of all weights at `bits` a weight, norms and routers included."""
        return round(self.n_params() * bits / 8)

    def kv_bytes_per_token(self, bits: float = 16) -> int:
        """Bytes of keys and values that one token adds to the cache."""
        return round(2 * self.n_layers * self.n_kv_heads * self.head_dim * bits / 8)

    def kv_bytes(self, context: int, bits: float = 16) -> int:
        """Bytes of keys and values for one sequence of `context` tokens: no more than the window, if there is one."""
        return self.kv_bytes_per_token(bits) * min(context, self.sliding_window or context)

    # -- reading and writing -----------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """From our own field names; an unknown one raises ConfigError with the nearest known one."""
        check_names("config", values, cls)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """By our own field names, without those of single layers where all are alike."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if v is not None or k not in ("experts_by_layer", "dense_ffn_dim")}

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return ModelConfig.from_dict({**self.to_dict(), **changes})
