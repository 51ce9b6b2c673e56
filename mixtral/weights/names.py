"""The one table of weight names: how each tensor of a foreign file lies inside one of ours.

A rule's `view` maps our tensor to a strided view whose elements, read in row-major order, are exactly the foreign
tensor. Loading copies the file into that view and saving reads the view out, so both directions are one function,
and a rule cannot be wrong in one direction only. Each foreign format is a column (`hf`, `mistral`, `gguf`).

Legend: D model width, F expert hidden width, SF that of all shared experts, E experts, H query
heads, G key/value heads, R = H / G query heads that share a key/value head, C head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.config.router import TokenK

Format = Literal["hf", "mistral", "gguf"]
Ffn = Literal["dense", "per-expert", "fused", "stacked"]  # how a file lays out its feed-forward weights
View = Callable[[Tensor, ModelConfig, int], Tensor]  # (our tensor, config, expert) -> view


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameters and persistent buffers, in the order of the model: name -> shape."""
    c = config
    options = c.router_options
    qkv_rows = c.n_kv_heads * (c.queries_per_kv + 2) * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"k_of_token": (c.vocab_size,)} if isinstance(options, TokenK) else {}
    shapes["embedding.weight"] = (c.vocab_size, c.dim)
    for layer in range(c.n_layers):
        block = f"layers.{layer}."
        shapes[block + "attention_norm.weight"] = (c.dim,)
        shapes[block + "attention.wqkv.weight"] = (qkv_rows, c.dim)
        shapes[block + "attention.wo.weight"] = (c.dim, c.n_heads * c.head_dim)
        shapes[block + "ffn_norm.weight"] = (c.dim,)
        n_experts, ffn_dim = c.layer(layer)
        if n_experts > 1:
            router = f"{block}ffn.router."
            shapes |= {router + name: shape for name, shape in options.parameters(c.dim, n_experts).items()}
            shapes |= {router + name: buffer.shape for name, buffer in options.buffers(n_experts).items()}
            shapes[block + "ffn.experts.w13"] = (n_experts, 2, ffn_dim, c.dim)
            shapes[block + "ffn.experts.w2"] = (n_experts, c.dim, ffn_dim)
            if c.shared_experts:
                shapes[block + "ffn.shared.w13"] = (2, c.shared_experts * c.ffn_dim, c.dim)
                shapes[block + "ffn.shared.w2"] = (c.dim, c.shared_experts * c.ffn_dim)
        else:
            shapes[block + "ffn.w13"] = (2, ffn_dim, c.dim)
            shapes[block + "ffn.w2"] = (c.dim, ffn_dim)
    shapes["norm.weight"] = (c.dim,)
    if not c.tie_embeddings:
        shapes["output.weight"] = (c.vocab_size, c.dim)
    return shapes


def fixed_dtype(name: str, config: ModelConfig) -> torch.dtype | None:
    """The dtype of our tensor `name` when no cast may change it: buffers decide choices; None for weights."""
    if name == "k_of_token":
        return torch.int64
    buffer = config.router_options.buffers(config.n_experts).get(name.rpartition(".router.")[2])
    return None if buffer is None else getattr(torch, buffer.dtype)


# -- views: our tensor -> the elements of the foreign one, in its order ------------------------------------------------


def _whole(x: Tensor, _config: ModelConfig, _expert: int) -> Tensor:
    return x


def _heads(wqkv: Tensor, config: ModelConfig) -> Tensor:
    """[G * (R + 2) * C, D] -> [G, R + 2, C, D]: each group is its R query heads, then its key, then its value head."""
    return wqkv.unflatten(0, (config.n_kv_heads, config.queries_per_kv + 2, config.head_dim))


def _queries(wqkv: Tensor, config: ModelConfig, _expert: int) -> Tensor:
    return _heads(wqkv, config)[:, :-2]  # [G, R, C, D]


def _keys(wqkv: Tensor, config: ModelConfig, _expert: int) -> Tensor:
    return _heads(wqkv, config)[:, -2]  # [G, C, D]


def _values(wqkv: Tensor, config: ModelConfig, _expert: int) -> Tensor:
    return _heads(wqkv, config)[:, -1]  # [G, C, D]


def _interleaved(view: View) -> View:
    """For rotary pairs that lie in neighbouring rows (2i, 2i + 1) there, and half a head apart (i, i + C/2) here."""

    def pairs(wqkv: Tensor, config: ModelConfig, expert: int) -> Tensor:
        halves = view(wqkv, config, expert).unflatten(-2, (2, config.head_dim // 2))
        return halves.transpose(-3, -2)  # [..., C/2, 2, D]

    return pairs


def _part(index: int) -> View:
    """The gate (0) or the up (1) matrix of a dense layer, w13 [2, F, D]."""
    return lambda w13, _config, _expert: w13[index]


def _expert_part(index: int) -> View:
    """The gate (0) or the up (1) matrix of one expert, w13 [E, 2, F, D]."""
    return lambda w13, _config, expert: w13[expert, index]


def _stacked_part(index: int) -> View:
    """The gate (0) or the up (1) matrices of all experts."""
    return lambda w13, _config, _expert: w13[:, index]


def _expert(w2: Tensor, _config: ModelConfig, expert: int) -> Tensor:
    return w2[expert]


def _transposed(w2: Tensor, _config: ModelConfig, _expert: int) -> Tensor:
    return w2.transpose(1, 2)  # [E, D, F] -> [E, F, D]


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One kind of foreign tensor. {l}: the layer, {e}: the expert, {r}: any other tensor of a router."""

    ours: str
    view: View
    shape: str  # in the file: sizes of the legend, a product written together ("HC D" is [H * C, D]); "ours": as here
    hf: str | None = None
    mistral: str | None = None
    gguf: str | None = None
    ffn: Ffn | None = None  # applies to files of this feed-forward layout only


_BLOCK, _HF = "layers.{l}.", "model.layers.{l}."
_ATTENTION, _HF_ATTENTION = _BLOCK + "attention.", _HF + "self_attn."
_W13, _W2 = _BLOCK + "ffn.experts.w13", _BLOCK + "ffn.experts.w2"
_MOE, _EXPERT = _HF + "block_sparse_moe.", _HF + "block_sparse_moe.experts.{e}."
_NATIVE, _NATIVE_EXPERT = _BLOCK + "feed_forward.", _BLOCK + "feed_forward.experts.{e}."
_OLD = _BLOCK + "block_sparse_moe."
_GGUF = "blk.{l}."

RULES = (
    Rule("k_of_token", _whole, "V", hf="model.k_of_token"),
    Rule("embedding.weight", _whole, "V D",
         hf="model.embed_tokens.weight", mistral="tok_embeddings.weight", gguf="token_embd.weight"),
    Rule(_BLOCK + "attention_norm.weight", _whole, "D",
         hf=_HF + "input_layernorm.weight", mistral=_BLOCK + "attention_norm.weight", gguf=_GGUF + "attn_norm.weight"),
    Rule(_ATTENTION + "wqkv.weight", _queries, "HC D", hf=_HF_ATTENTION + "q_proj.weight"),
    Rule(_ATTENTION + "wqkv.weight", _keys, "GC D", hf=_HF_ATTENTION + "k_proj.weight"),
    Rule(_ATTENTION + "wqkv.weight", _interleaved(_queries), "HC D",
         mistral=_ATTENTION + "wq.weight", gguf=_GGUF + "attn_q.weight"),
    Rule(_ATTENTION + "wqkv.weight", _interleaved(_keys), "GC D",
         mistral=_ATTENTION + "wk.weight", gguf=_GGUF + "attn_k.weight"),
    Rule(_ATTENTION + "wqkv.weight", _values, "GC D",
         hf=_HF_ATTENTION + "v_proj.weight", mistral=_ATTENTION + "wv.weight", gguf=_GGUF + "attn_v.weight"),
    Rule(_ATTENTION + "wo.weight", _whole, "D HC",
         hf=_HF_ATTENTION + "o_proj.weight", mistral=_ATTENTION + "wo.weight", gguf=_GGUF + "attn_output.weight"),
    Rule(_BLOCK + "ffn_norm.weight", _whole, "D",
         hf=_HF + "post_attention_layernorm.weight", mistral=_BLOCK + "ffn_norm.weight",
         gguf=_GGUF + "ffn_norm.weight"),

    Rule(_BLOCK + "ffn.w13", _part(0), "F D", ffn="dense",
         hf=_HF + "mlp.gate_proj.weight", mistral=_NATIVE + "w1.weight", gguf=_GGUF + "ffn_gate.weight"),
    Rule(_BLOCK + "ffn.w13", _part(1), "F D", ffn="dense",
         hf=_HF + "mlp.up_proj.weight", mistral=_NATIVE + "w3.weight", gguf=_GGUF + "ffn_up.weight"),
    Rule(_BLOCK + "ffn.w2", _whole, "D F", ffn="dense",
         hf=_HF + "mlp.down_proj.weight", mistral=_NATIVE + "w2.weight", gguf=_GGUF + "ffn_down.weight"),

    Rule(_BLOCK + "ffn.router.weight", _whole, "E D", ffn="per-expert",
         hf=_MOE + "gate.weight", mistral=_NATIVE + "gate.weight", gguf=_GGUF + "ffn_gate_inp.weight"),
    Rule(_W13, _expert_part(0), "F D", ffn="per-expert",
         hf=_EXPERT + "w1.weight", mistral=_NATIVE_EXPERT + "w1.weight", gguf=_GGUF + "ffn_gate.{e}.weight"),
    Rule(_W13, _expert_part(1), "F D", ffn="per-expert",
         hf=_EXPERT + "w3.weight", mistral=_NATIVE_EXPERT + "w3.weight", gguf=_GGUF + "ffn_up.{e}.weight"),
    Rule(_W2, _expert, "D F", ffn="per-expert",
         hf=_EXPERT + "w2.weight", mistral=_NATIVE_EXPERT + "w2.weight", gguf=_GGUF + "ffn_down.{e}.weight"),

    # routers and layers of our own; names after those of DeepSeek-V3 where it has them
    Rule(_BLOCK + "ffn.router.{r}", _whole, "ours", hf=_MOE + "gate.{r}"),
    Rule(_BLOCK + "ffn.router.bias", _whole, "ours", hf=_MOE + "gate.e_score_correction_bias"),
    Rule(_BLOCK + "ffn.shared.w13", _part(0), "SF D", hf=_MOE + "shared_experts.gate_proj.weight"),
    Rule(_BLOCK + "ffn.shared.w13", _part(1), "SF D", hf=_MOE + "shared_experts.up_proj.weight"),
    Rule(_BLOCK + "ffn.shared.w2", _whole, "D SF", hf=_MOE + "shared_experts.down_proj.weight"),

    # transformers 5 holds experts like this; its files do too when saved with save_original_format=False
    Rule(_BLOCK + "ffn.router.weight", _whole, "E D", ffn="fused", hf=_HF + "mlp.gate.weight"),
    Rule(_W13, _whole, "E 2F D", ffn="fused", hf=_HF + "mlp.experts.gate_up_proj"),
    Rule(_W2, _whole, "E D F", ffn="fused", hf=_HF + "mlp.experts.down_proj"),

    # GGUF; its first files of Mixtral were "per-expert"
    Rule(_BLOCK + "ffn.router.weight", _whole, "E D", ffn="stacked",
         mistral=_OLD + "gate.weight", gguf=_GGUF + "ffn_gate_inp.weight"),
    Rule(_W13, _stacked_part(0), "E F D", ffn="stacked", gguf=_GGUF + "ffn_gate_exps.weight"),
    Rule(_W13, _stacked_part(1), "E F D", ffn="stacked", gguf=_GGUF + "ffn_up_exps.weight"),
    Rule(_W2, _whole, "E D F", ffn="stacked", gguf=_GGUF + "ffn_down_exps.weight"),

    # the first 8x7B shards
    Rule(_W13, _stacked_part(0), "EF D", ffn="stacked", mistral=_OLD + "w1"),
    Rule(_W13, _stacked_part(1), "EF D", ffn="stacked", mistral=_OLD + "w3"),
    Rule(_W2, _transposed, "EF D", ffn="stacked", mistral=_OLD + "w2"),

    Rule("norm.weight", _whole, "D", hf="model.norm.weight", mistral="norm.weight", gguf="output_norm.weight"),
    Rule("output.weight", _whole, "V D", hf="lm_head.weight", mistral="output.weight", gguf="output.weight"),
)  # fmt: skip

# -- what follows from the table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Where one foreign tensor lies in ours."""

    ours: str
    shape: tuple[int, ...]  # of the foreign tensor
    view: Callable[[Tensor], Tensor]  # our tensor -> the foreign one's elements, in its order
    fixed_dtype: torch.dtype | None  # of ours, when no cast may change it


_LAYOUTS: dict[Format, tuple[Ffn, ...]] = {
    "hf": ("per-expert", "fused"), "mistral": ("per-expert", "stacked"), "gguf": ("stacked", "per-expert"),
}  # fmt: skip


def layouts(config: ModelConfig, format: Format) -> tuple[Ffn, ...]:
    """The feed-forward layouts in which files of a format hold this model; the first is the one to write."""
    if not config.is_sparse:
        return ("dense",)
    return _LAYOUTS[format]


def slots(config: ModelConfig, format: Format, ffn: Ffn) -> dict[str, Slot]:
    """Every tensor that a file of this format holds, its sparse layers in this layout: its name -> its slot.

    With tied embeddings the output matrix is among them, as a second name of the embedding: files may hold it or not.
    """
    found: dict[str, Slot] = {}
    shapes = parameter_shapes(config)
    rules = [expanded for rule in RULES if getattr(rule, format) for expanded in _expanded(rule, config)]
    for layer, block in _blocks(rules, config.n_layers):
        own = ffn if config.layer(layer).is_sparse else "dense"
        for rule in block:
            if rule.ffn not in (None, own):
                continue
            name: str = getattr(rule, format)
            ours = rule.ours.format(l=layer)
            if ours == "output.weight" and config.tie_embeddings:
                ours = "embedding.weight"
            if ours not in shapes:  # a router's own tensors
                continue
            shape = shapes[ours] if rule.shape == "ours" else _file_shape(rule.shape, config, layer)
            fixed = fixed_dtype(ours, config)
            for expert in range(config.layer(layer).n_experts if "{e}" in name else 1):
                view = partial(_bound, rule.view, config, expert)
                found[name.format(l=layer, e=expert)] = Slot(ours, shape, view, fixed)
    return found


def output_name(format: Format) -> str:
    """What a format calls the output matrix."""
    return "lm_head.weight" if format == "hf" else "output.weight"


def _bound(view: View, config: ModelConfig, expert: int, ours: Tensor) -> Tensor:
    return view(ours, config, expert)


def _expanded(rule: Rule, config: ModelConfig) -> list[Rule]:
    """The rule itself; one that stands for a router's tensors as one rule for each that has none of its own."""
    if "{r}" not in rule.ours or rule.hf is None:
        return [rule]
    options, named = config.router_options, {rule.ours for rule in RULES}
    own = (*options.parameters(config.dim, config.n_experts), *options.buffers(config.n_experts))
    rules = [replace(rule, ours=rule.ours.replace("{r}", r), hf=rule.hf.replace("{r}", r)) for r in own]
    return [expanded for expanded in rules if expanded.ours not in named]


def _blocks(rules: list[Rule], n_layers: int) -> list[tuple[int, list[Rule]]]:
    """Rules in the order of the model: before the layers, each layer's, after the layers."""
    per_layer = [rule for rule in rules if "{l}" in rule.ours]
    first = rules.index(per_layer[0])
    last = first + len(per_layer)
    return [(0, rules[:first]), *((layer, per_layer) for layer in range(n_layers)), (0, rules[last:])]


def _file_shape(shape: str, config: ModelConfig, layer: int) -> tuple[int, ...]:
    c, (n_experts, ffn_dim) = config, config.layer(layer)
    sizes = {
        "V": c.vocab_size, "D": c.dim, "E": n_experts, "F": ffn_dim, "2F": 2 * ffn_dim,
        "EF": n_experts * ffn_dim, "SF": c.shared_experts * c.ffn_dim,
        "HC": c.n_heads * c.head_dim, "GC": c.n_kv_heads * c.head_dim,
    }  # fmt: skip
    return tuple(sizes[size] for size in shape.split())
