"""`mixtral info`: what a model is and costs, counted from its configuration alone."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.commands.common import JsonOption, bytes_text, check_k, console, print_table, rate_text
from mixtral.commands.info_compare import compare
from mixtral.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from mixtral.config import ModelConfig
    from mixtral.shapes import Shape

PRECISIONS = {"fp32": 32, "bf16": 16, "int8": 8.5, "int4": 4.5}  # bits a weight; 0.5 is an fp16 scale for 32 weights
USUAL_CONTEXT = 32768


def info(
    name: Annotated[str, typer.Argument(metavar="NAME_OR_FOLDER", help="A preset, or a model folder.")],
    context: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of context to count with; default: 32768 or less.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", metavar="K", help="Experts a token takes; default what the model is made for.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="NAME_OR_FOLDER", help="Another model beside it; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell a model's size, compute, memory, and what fits here.

    All is counted from the configuration; nothing is loaded or downloaded.

    Presets: tiny, small, mistral-7b, mistral-7b-v0.3, mixtral-8x7b, mixtral-8x22b, mixtral-8x22b-v0.3. mixtral-nano is
    the model that comes with the package. A folder of such a name is ./NAME. --against also knows the shapes of models
    that are not run here: llama-2-70b, switch-base-8 to -256, glam-64b-64e, st-moe-32b, grok-1, deepseek-moe-16b,
    qwen1.5-moe-a2.7b, olmoe-1b-7b, deepseek-v3, kimi-k2.

    Examples:
    mixtral info mixtral-8x7b
    mixtral info mixtral-8x7b --against llama-2-70b --against deepseek-v3
    mixtral info mixtral-8x22b --context 65536 --k 1
    mixtral info runs/first/final --json
    """
    from mixtral.shapes import SHAPES

    if against or name in SHAPES:
        if k is not None:
            raise UsageError("--k: counts one model of a preset or folder with other experts; leave it out here")
        compare({each: find_shape(each) for each in (name, *(against or ()))}, context, as_json)
        return
    config = find_config(name)
    check_k(k, config)
    machine = machine_memory()
    figures = describe(name, config, context, k) | {"machine": machine, "runner": runner_for(config, machine)}
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        _print(figures, config)


def runner_for(config: ModelConfig, machine: dict[str, int]) -> dict[str, str]:
    """What would generate with such a model on this machine, and why."""
    from mixtral.native_file import FOLDER, cannot_run, load

    library = load(FOLDER)
    missing = library if isinstance(library, str) else ""
    reason = missing or cannot_run(config, "cuda" if "cuda" in machine else "cpu")
    why = f"not the native step: {reason}" if reason else "the native step on packed weights, exact in the file's dtype"
    return {"name": "torch" if reason else "native", "why": why}


def find_config(name: str) -> ModelConfig:
    """Of a preset or a model folder. Raises ConfigError when it is neither, or the folder's configuration is bad."""
    from mixtral.config.formats import read_config
    from mixtral.presets import PRESETS, preset
    from mixtral.shipped import SHIPPED, model_folder

    is_path = name == SHIPPED or os.path.exists(name) or "/" in name
    return read_config(model_folder(name)) if is_path and name not in PRESETS else preset(name)


def find_shape(name: str) -> ModelConfig | Shape:
    """Of a model that is run here, or of one that is only counted. Raises ConfigError when it is neither."""
    from mixtral.errors import ConfigError, did_you_mean
    from mixtral.presets import PRESETS
    from mixtral.shapes import SHAPES, shape
    from mixtral.shipped import SHIPPED

    if name in SHAPES and not os.path.exists(name):
        return shape(name)
    if name in PRESETS or name == SHIPPED or "/" in name or os.path.exists(name):
        return find_config(name)
    raise ConfigError(f"unknown model {name!r}; {did_you_mean(name, [*PRESETS, *SHAPES])}")


def describe(name: str, config: ModelConfig, context: int | None, k: int | None) -> dict[str, Any]:
    """All figures of a model: counts of parameters, FLOPs and bytes.

    Args:
        context: tokens to count with, at most the model's context; by default 32768, or the model's when that is less.
        k: experts a token takes; by default the configuration's, with all others listed in `by_k`.

    Raises UsageError for a context beyond the model's, ConfigError for a k out of range.
    """
    if context is not None and context > config.context:
        raise UsageError(f"--context {context}: {name} is made for at most {config.context} tokens")
    context = context or min(USUAL_CONTEXT, config.context)
    taken = config.experts_per_token if k is None else k
    contexts = {context, USUAL_CONTEXT} if config.context >= USUAL_CONTEXT else {context}
    return {
        "name": name,
        "parameters": config.n_params(),
        "active_parameters": config.n_active_params(taken),
        "active_share": config.n_active_params(taken) / config.n_params(),
        "experts_per_token": taken,
        "expert_parameters": config.routed_params(),
        "context": context,  # what the FLOPs are counted at
        "flops_per_token": {
            "forward": config.flops_per_token(context, k=taken),
            "forward_backward": config.flops_per_token(context, backward=True, k=taken),
        },
        "by_k": [_at_k(config, context, n) for n in (_ks(config) if k is None else [k])],
        "weight_bytes": {precision: config.weight_bytes(bits) for precision, bits in PRECISIONS.items()},
        "kv_bytes_per_token": config.kv_bytes_per_token(),
        "kv_bytes": {str(tokens): config.kv_bytes(tokens) for tokens in sorted(contexts)},
        "config": config.to_dict(),
    }


def _ks(config: ModelConfig) -> list[int]:
    """The K worth a line: all of them up to 8 experts; beyond that powers of two, the configured K, and all experts."""
    most = config.fewest_experts
    if most <= 8:
        return list(range(1, most + 1))
    return sorted({1 << n for n in range(most.bit_length()) if 1 << n <= most} | {config.experts_per_token, most})


def _at_k(config: ModelConfig, context: int, k: int) -> dict[str, Any]:
    active = config.n_active_params(k)
    return {
        "k": k,
        "active_parameters": active,
        "active_share": active / config.n_params(),
        "flops_forward": config.flops_per_token(context, k=k),
        "flops_forward_backward": config.flops_per_token(context, backward=True, k=k),
    }


def machine_memory() -> dict[str, int]:
    """Free bytes of this machine by device: "cpu", and "cuda" when there is one."""
    from mixtral import system

    memory = {"cpu": system.available_memory_bytes()}
    if system.may_have_gpu():  # else torch, which takes seconds to load, would find none
        import torch

        if torch.cuda.is_available():
            memory["cuda"] = torch.cuda.mem_get_info()[0]
    return memory


# -- for people --------------------------------------------------------------------------------------------------------


def _print(figures: dict[str, Any], config: ModelConfig) -> None:
    out = console()
    kind = f"sparse, {_experts(config)} experts a layer" if config.is_sparse else "dense"
    out.print(f"{figures['name']}: {kind}\n", style="bold")
    print_table(out, _summary(figures, config))
    tokens = figures["context"]
    out.print(f"\nCompute for a token, mean over a context of {tokens:,}", style="bold")
    print_table(out, _compute(figures, config))
    out.print(f"\nMemory: weights, and with the bf16 cache of one sequence of {tokens:,}", style="bold")
    print_table(out, _memory(figures))
    if config.is_sparse:
        out.print("\nAll experts must be in memory, whichever a token takes.")
    out.print(f"\nGenerates here by {figures['runner']['name']}: {figures['runner']['why']}.")


def _experts(config: ModelConfig) -> str:
    """Of a layer, such as 8, or 4 to 8 where they differ."""
    most, fewest = config.n_experts, config.fewest_experts
    return f"{most}" if most == fewest else f"{fewest} to {most}"


def _summary(figures: dict[str, Any], config: ModelConfig) -> Table:
    from rich.table import Table

    total, window = figures["parameters"], config.sliding_window
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_row("parameters", f"{total:,}")
    if config.is_sparse:
        k, experts = figures["experts_per_token"], figures["expert_parameters"]
        share = f"{figures['active_share']:.1%} ({k} of {_experts(config)} experts)"
        table.add_row("active per token", f"{figures['active_parameters']:,}  {share}")
        table.add_row("in the experts", f"{experts:,}  {experts / total:.1%}")
    dense = config.n_layers - len(config.sparse_layers) if config.is_sparse else 0
    layers = f"{config.n_layers}" + (f" ({dense} of them dense)" if dense else "")
    table.add_row("layers, width", f"{layers}, {config.dim:,}; feed-forward {config.ffn_dim:,}")
    heads = f"{config.n_heads} of width {config.head_dim}, {config.n_kv_heads} for keys and values"
    table.add_row("attention heads", heads)
    table.add_row("vocabulary", f"{config.vocab_size:,}")
    table.add_row("context", f"{config.context:,} tokens, " + (f"window {window:,}" if window else "no sliding window"))
    cache = ", ".join(f"{bytes_text(n)} at {int(tokens):,}" for tokens, n in figures["kv_bytes"].items())
    table.add_row("cache (bf16)", f"{bytes_text(figures['kv_bytes_per_token'])} a token; {cache}")
    return table


def _compute(figures: dict[str, Any], config: ModelConfig) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    columns = ("K", "active parameters", "share", "forward", "with backward")
    for name in columns:
        table.add_column(name, justify="right")
    for line in figures["by_k"]:
        table.add_row(
            str(line["k"]), f"{line['active_parameters']:,}", f"{line['active_share']:.1%}",
            rate_text(line["flops_forward"], "FLOP"), rate_text(line["flops_forward_backward"], "FLOP"),
            style="bold" if config.is_sparse and line["k"] == figures["experts_per_token"] else None,
        )  # fmt: skip
    return table


def _memory(figures: dict[str, Any]) -> Table:
    from rich.table import Table

    cache = figures["kv_bytes"][str(figures["context"])]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)  # 80 columns must hold a GPU too
    table.add_column("precision")
    table.add_column("weights", justify="right")
    table.add_column("with cache", justify="right")
    for device, free in figures["machine"].items():
        table.add_column(f"{device}, {bytes_text(free)} free")
    for precision, weights in figures["weight_bytes"].items():
        total = weights + cache
        fits = [_fits(weights, total, free) for free in figures["machine"].values()]
        table.add_row(f"{precision}, {PRECISIONS[precision]:g} bits", bytes_text(weights), bytes_text(total), *fits)
    return table


def _fits(weights: int, with_cache: int, free: int) -> str:
    if with_cache <= free:
        return "fits"
    return "fits, less cache" if weights < free else "does not fit"
