"""Build a sparse layer by hand and check it against the formula of the paper, one token at a time.

    python examples/layer.py

Legend: T tokens, D model width, F expert hidden width, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from mixtral.moe import Experts, MoE, TopKRouter
from mixtral.moe.choice import counts_of
from mixtral.moe.losses import load_balance, z_loss

T, D, F, E, K = 50, 32, 64, 8, 2


def naive(moe: MoE, x_TD: Tensor) -> Tensor:
    """y = sum over the K best experts of softmax(their logits) * expert(x) (arXiv 2401.04088, section 2.1)."""
    rows = []
    for x_D in x_TD:
        logits_K, experts_K = (moe.router.weight @ x_D).topk(K)
        y_D = torch.zeros(D)
        for weight, e in zip(logits_K.softmax(0), experts_K.tolist(), strict=True):
            gate_FD, up_FD = moe.experts.w13[e]
            y_D = y_D + weight * (moe.experts.w2[e] @ (silu(gate_FD @ x_D) * (up_FD @ x_D)))
        rows.append(y_D)
    return torch.stack(rows)


def main() -> None:
    torch.manual_seed(0)
    moe = MoE(TopKRouter(D, E, K), Experts(E, D, F))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x_TD = torch.randn(T, D)

    y_TD, routing = moe(x_TD)
    difference = ((y_TD - naive(moe, x_TD)).abs().max() / y_TD.abs().max()).item()
    print(f"largest difference from the formula: {difference:.1e} of the largest output")
    assert difference < 1e-5

    print(f"tokens of each expert: {counts_of(routing.experts_TK, E).tolist()}")
    print(f"load balance {load_balance(routing).item():.3f} (1 at balance), z-loss {z_loss(routing).item():.3f}")

    again_TD, _ = moe(x_TD, replay=routing.chosen_TK)  # the same choice, logits and weights computed anew
    print(f"replayed: {'the same, bit for bit' if torch.equal(again_TD, y_TD) else 'different'}")
    (y_TD.square().mean() + 0.01 * load_balance(routing)).backward()
    assert moe.router.weight.grad is not None
    print(f"gradient of the router: norm {moe.router.weight.grad.norm():.4f}")


if __name__ == "__main__":
    main()
