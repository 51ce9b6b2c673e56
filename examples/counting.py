"""What a model costs, counted from its configuration before anything is built.

    python examples/counting.py [NAME or DIR]

A preset's name (mixtral-8x7b by default), or a folder with a config.json or params.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mixtral.config.formats import read_config
from mixtral.presets import preset

GIB = 2**30


def main(name: str = "mixtral-8x7b") -> None:
    config = read_config(name) if Path(name).exists() else preset(name)
    print(f"{name}: {config.n_layers} layers, {config.n_experts} experts, {config.experts_per_token} a token")
    print(f"parameters {config.n_params():,}")
    for k in range(1, min(config.n_experts, 4) + 1):
        share = config.n_active_params(k) / config.n_params()
        print(f"  met by a token that takes {k}: {config.n_active_params(k):,} ({share:.0%})")
    for bits in (32, 16, 8, 4):
        print(f"weights at {bits:2} bits: {config.weight_bytes(bits) / GIB:8.3f} GiB")
    for context in (2048, config.context):
        cache = config.kv_bytes(context) / GIB
        flops = config.flops_per_token(context) / 1e9
        print(f"{context:6,} tokens of context: KV cache {cache:.3f} GiB, forward {flops:.2f} GFLOP a token")

    # Twice the experts, the same cost a token: the point of a sparse model.
    wider = config.replace(n_experts=2 * config.n_experts)
    print(f"with {wider.n_experts} experts: {wider.n_params():,} parameters, {wider.n_active_params():,} active")


if __name__ == "__main__":
    main(*sys.argv[1:])
