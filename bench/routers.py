"""What each router costs, against the whole layer.

2,048 tokens of width 512, 8 experts of width 1792, top-2 (Switch: top-1), one thread. Each router's own forward and
backward pass alone, and the layer (router, dispatch, experts, combine) with it; all taken in turn. Routers that take
as many experts as a token needs do other work in the experts, so their layers are no measure of the router: `share` is
the router's time over the time of Mixtral's layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from lib.common import interleave, publish
from rich.console import Console
from rich.table import Table

from mixtral.config import ModelConfig
from mixtral.moe import Experts, MoE, Routing, make_router

D, F, E, T = 512, 1792, 8, 2048
SPECS = (
    "topk", "topk?bias=true", "topk?capacity_factor=1.25", "switch", "noisy", "jitter", "sigmoid?bias=true",
    "grouped?groups=4&taken=2", "learned_k?most=4", "token_k", "top_p?p=0.3&most=4", "min_p?p=0.5&most=4",
    "threshold?most=4", "expert_choice",
)  # fmt: skip


def layer(spec: str) -> MoE:
    config = ModelConfig(
        vocab_size=64, dim=D, n_layers=1, n_heads=8, n_kv_heads=2, head_dim=64, ffn_dim=F, n_experts=E,
        experts_per_token=1 if spec == "switch" else 2, router=spec,
    )  # fmt: skip
    made = MoE(make_router(config), Experts(E, D, F))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.02)
    made.router.reset_buffers()
    return made


def steps(spec: str) -> tuple[Callable[[], object], Callable[[], object], float]:
    """(the router alone, the whole layer, the mean number of experts a token takes), forward and backward."""
    made, x_TD = layer(spec), torch.randn(T, D).requires_grad_()
    k = torch.full((T,), 2) if spec == "token_k" else None

    def clear() -> None:
        made.zero_grad()
        x_TD.grad = None

    def alone() -> None:
        clear()
        routing: Routing = made.router(x_TD, k=k)
        routing.weights_TK.square().sum().backward()

    def whole() -> None:
        clear()
        made(x_TD, k=k)[0].sum().backward()

    mean = (made.router(x_TD, k=k).experts_TK >= 0).sum().item() / T
    return alone, whole, mean


def measure(router_repeats: int, layer_repeats: int) -> dict[str, dict[str, Any]]:
    """Median milliseconds of each router and each layer."""
    made = {spec: steps(spec) for spec in SPECS}
    routers = interleave({spec: alone for spec, (alone, _, _) in made.items()}, router_repeats)
    layers = interleave({spec: whole for spec, (_, whole, _) in made.items()}, layer_repeats)
    return {
        spec: {
            "experts a token": round(mean, 2),
            "router (ms)": 1000 * routers[spec],
            "layer (ms)": 1000 * layers[spec],
            "share": routers[spec] / layers["topk"],
        }
        for spec, (_, _, mean) in made.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router-repeats", type=int, default=51, help="timed runs of each router (default 51)")
    parser.add_argument("--layer-repeats", type=int, default=5, help="timed runs of each layer (default 5)")
    parser.add_argument("--json-out", action="store_true", help="write bench/results/routers_<hardware>_<date>.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.router_repeats, args.layer_repeats)
    title = "Routers, forward and backward, fp32, 2,048 tokens, width 512, ffn 1792, 8 experts"
    table = Table("router", "experts a token", "router (ms)", "layer (ms)", "router / Mixtral's layer", title=title)
    for spec, row in rows.items():
        table.add_row(spec, f"{row['experts a token']:.2f}", f"{row['router (ms)']:.2f}", f"{row['layer (ms)']:,.0f}",
                      f"{row['share']:.1%}")  # fmt: skip
    Console(width=110).print(table)
    publish("routers", {"repeats": [args.router_repeats, args.layer_repeats], "rows": rows}, args.json_out)


if __name__ == "__main__":
    main()
