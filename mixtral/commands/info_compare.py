"""`mixtral info A --against B`: models side by side, as the tables of papers have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixtral.commands.common import bytes_text, console, print_table, rate_text

if TYPE_CHECKING:
    from mixtral.config import ModelConfig
    from mixtral.shapes import Shape

BITS = {"bf16": 16, "int8": 8.5, "int4": 4.5}  # a weight
CONTEXTS = (4096, 32768, 131072)  # of the cache, as far as a model goes


def compare(models: dict[str, ModelConfig | Shape], context: int | None, as_json: bool) -> None:
    """Print the figures of some models, by name, a column each.

    Raises UsageError for a context beyond that of one of them.
    """
    from mixtral.errors import UsageError

    context = context or min(4096, *(model.context for model in models.values()))
    for name, model in models.items():
        if context > model.context:
            raise UsageError(f"--context {context}: {name} is made for at most {model.context} tokens")
    figures = [_figures(name, model, context) for name, model in models.items()]
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        _print(figures, context)


def _figures(name: str, model: ModelConfig | Shape, context: int) -> dict[str, Any]:
    from mixtral.shapes import Shape

    total, active = model.n_params(), model.n_active_params()
    experts, note = "", ""
    if isinstance(model, Shape):
        experts, note = model.experts, model.note
    elif model.is_sparse:
        experts = f"{model.experts_per_token} of {model.n_experts}"
    contexts = [n for n in CONTEXTS if n <= model.context] or [model.context]
    return {
        "name": name, "parameters": total, "active_parameters": active, "active_share": active / total,
        "experts": experts, "context": context, "flops_forward": model.flops_per_token(context),
        "flops_forward_backward": model.flops_per_token(context, backward=True),
        "weight_bytes": {kind: model.weight_bytes(bits) for kind, bits in BITS.items()},
        "kv_bytes": {str(n): model.kv_bytes(n) for n in contexts}, "note": note,
    }  # fmt: skip


def _print(figures: Sequence[dict[str, Any]], context: int) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    for model in figures:
        table.add_column(model["name"], justify="right", overflow="fold")
    rows = {
        "parameters": [f"{m['parameters'] / 1e9:,.2f} B" for m in figures],
        "active per token": [f"{m['active_parameters'] / 1e9:,.2f} B" for m in figures],
        "share": [f"{m['active_share']:.1%}" for m in figures],
        "experts": [m["experts"] or "dense" for m in figures],
        f"forward, {context:,}": [rate_text(m["flops_forward"], "FLOP") for m in figures],
        "with backward": [rate_text(m["flops_forward_backward"], "FLOP") for m in figures],
    }
    for kind in figures[0]["weight_bytes"]:
        rows[f"weights, {kind}"] = [bytes_text(m["weight_bytes"][kind]) for m in figures]
    for tokens in sorted({int(n) for m in figures for n in m["kv_bytes"]}):
        cache = [m["kv_bytes"].get(str(tokens)) for m in figures]
        rows[f"cache at {tokens:,}"] = ["-" if n is None else bytes_text(n) for n in cache]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    out = console()
    print_table(out, table)
    out.print(f"\nforward: FLOPs of one token, mean over a context of {context:,}; the cache in bf16.", style="dim")
    for model in figures:
        if model["note"]:
            out.print(f"{model['name']}: {model['note']}.", style="dim")
