"""The MoE layer forward and backward against a dense SwiGLU of equal active FLOPs, and against itself.

Width 512, ffn 1792, top-2. Three questions: what does sparsity cost (8 and 32 experts against a dense network of twice
the width, 2,048 tokens); what does skew cost (one expert gets half of all tokens); what do many experts cost (64
against 8 at 8,192 tokens).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from lib.common import interleave, peak_matmul, publish
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mixtral.kernels.allocator import keep_freed_memory
from mixtral.moe import Experts, FeedForward, MoE, TopKRouter
from mixtral.runtime import set_threads

D, F, K = 512, 1792, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def moe(n_experts: int, dtype: torch.dtype) -> MoE:
    layer = MoE(TopKRouter(D, n_experts, K), Experts(n_experts, D, F))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.02)
    layer.experts.to(dtype)
    return layer


def balanced(tokens: int, n_experts: int) -> Tensor:
    """Every expert gets the same number of tokens -> int64 [T, K]."""
    first_T = torch.arange(tokens) % n_experts
    return torch.stack((first_T, (first_T + n_experts // 2) % n_experts), dim=1)


def skewed(tokens: int, n_experts: int) -> Tensor:
    """Expert 0 takes part for half of all tokens, the others share the rest evenly -> int64 [T, K]."""
    others_T = 1 + torch.arange(tokens) % (n_experts - 1)
    again_T = 1 + (others_T - 1 + n_experts // 2) % (n_experts - 1)
    first_T = torch.where(torch.arange(tokens) % 2 == 0, 0, again_T)
    return torch.stack((first_T, others_T), dim=1)


def sparse_step(n_experts: int, experts_TK: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    layer, x_TD = moe(n_experts, dtype), torch.randn(len(experts_TK), D).to(dtype).requires_grad_()

    def step() -> None:
        layer.zero_grad()
        layer(x_TD, replay=experts_TK)[0].sum().backward()

    return step


def dense_step(tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """A dense SwiGLU of hidden width K * F: the FLOPs of K experts."""
    layer, x_TD = FeedForward(D, K * F), torch.randn(tokens, D).to(dtype).requires_grad_()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.02)
    layer.to(dtype)

    def step() -> None:
        layer.zero_grad()
        layer(x_TD).sum().backward()

    return step


def measure(dtype_name: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each layer, taken in turn, and the ratios that are asked for."""
    dtype = DTYPES[dtype_name]
    first = interleave({
        "dense": dense_step(2048, dtype),
        "8 experts": sparse_step(8, balanced(2048, 8), dtype),
        "8 experts, skewed": sparse_step(8, skewed(2048, 8), dtype),
        "32 experts": sparse_step(32, balanced(2048, 32), dtype),
    }, repeats)  # fmt: skip
    second = interleave({
        "8 experts, 8192 tokens": sparse_step(8, balanced(8192, 8), dtype),
        "64 experts, 8192 tokens": sparse_step(64, balanced(8192, 64), dtype),
    }, repeats)  # fmt: skip
    flops = 3 * 2 * 2048 * K * 3 * D * F
    times = {f"{name} (ms)": 1000 * s for name, s in {**first, **second}.items()}
    return times | {
        "8 experts / dense": first["8 experts"] / first["dense"],
        "32 experts / dense": first["32 experts"] / first["dense"],
        "skewed / balanced": first["8 experts, skewed"] / first["8 experts"],
        "64 / 8 experts at 8192 tokens": second["64 experts, 8192 tokens"] / second["8 experts, 8192 tokens"],
        "8 experts, of peak matmul": flops / first["8 experts"] / peak_matmul(dtype),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--json-out", action="store_true", help="write bench/results/moe_layer_<hardware>_<date>.json")
    args = parser.parse_args()
    set_threads()
    keep_freed_memory()  # as `mixtral train` does
    rows = {name: measure(name, args.repeats) for name in DTYPES}
    table = Table("", *rows, title="MoE layer, forward and backward, 2,048 tokens, width 512, ffn 1792, top-2")
    for name in next(iter(rows.values())):
        table.add_row(name, *(f"{row[name]:,.2f}" for row in rows.values()))
    Console(width=100).print(table)
    publish("moe_layer", {"repeats": args.repeats, "rows": rows}, args.json_out)


if __name__ == "__main__":
    main()
