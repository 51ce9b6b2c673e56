"""`mixtral-nano`: the model that ships in the package, trained in an hour on one thread."""

from __future__ import annotations

from mixtral.config import ModelConfig
from mixtral.train.config import PretrainConfig

ARITHMETIC = "reasoning-gym:chain_sum?level=1"
LOGIC = "reasoning-gym:aiw+knights_knaves+propositional_logic+syllogism?level=1"
GENERAL = "packages:fsspec+huggingface_hub+jinja2+mpmath+networkx+numpy+pydantic+rich"
SPECIAL = "packages:sympy+torch"


def nano() -> PretrainConfig:
    """6.8 M parameters (1.65 M active), 13.6 MB in bf16; 11.7 M tokens: code, tests, prose, arithmetic, logic.

    Sixteen experts, as those that a token does not take cost no time and the file has room for them; rows of 512, for
    code refers far back. The vocabulary is learnt from the data, with Mistral's v3 control tokens in it. Every text is
    read once: the standard library's code, some of its tests, and packages that this one stands on, many small files
    by many hands, since text that returns is learnt by heart, and by a sparse model first (docs/log.md).
    Arithmetic and logic are of the second level of difficulty (sums of two or three numbers of one or two digits).

    Muon, ahead of AdamW on a third of the tokens (docs/log.md), with eight rows, which share the price of its update. A
    step is one part, so that micro_batch balances all domains together, as the study of balancing favours
    (docs/studies/balancing.md).
    """
    model = ModelConfig(
        vocab_size=2048, dim=160, n_layers=4, n_heads=5, n_kv_heads=1, head_dim=32, ffn_dim=192,
        n_experts=16, experts_per_token=2, rope_theta=1e4, context=1024, init_std=0.05,
    )  # fmt: skip
    return PretrainConfig(
        model=model,
        data=(
            "stdlib:code", "stdlib:tests?max_bytes=4000000", "stdlib:prose",
            f"{GENERAL}?max_bytes=8000000&domain=packages", f"{SPECIAL}?max_bytes=5000000&domain=packages",
            f"{ARITHMETIC}&max_bytes=8000000&domain=arithmetic", f"{LOGIC}&max_bytes=1800000&domain=logic",
        ),
        steps=2850, rows=8, context=512, optimizer="muon", lr=3.5e-3, final_lr=0.02, warmup=0.02,
        balance=("micro_batch?weight=0.01", "z_loss?weight=0.001"),
        val_every=250, val_tokens=32768, save_every=250, stats_every=25,
    )  # fmt: skip
