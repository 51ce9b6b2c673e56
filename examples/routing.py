"""Write with a model and see which experts its tokens took.

    python examples/routing.py DIR ["PROMPT"]

DIR is a model folder, or mixtral-nano; Hugging Face's or Mistral's Mixtral will do.
"""

from __future__ import annotations

import sys

from rich.console import Console

import mixtral
from mixtral.analysis import routing_table
from mixtral.moe.choice import counts_of
from mixtral.moe.losses import share_of


def main(folder: str, prompt: str = "def ") -> None:
    lm = mixtral.load(folder)
    assert lm.tokenizer is not None, f"{folder} has no tokenizer"
    text = prompt + lm.generate(prompt, max_tokens=40, temperature=0.8, seed=0)
    print(text, end="\n\n")

    ids = lm.tokenizer.encode(text)
    routings = lm.routing(ids)  # a Routing for each layer
    loads = [share_of(counts_of(layer.experts_TK, layer.logits_TE.shape[1])).tolist() for layer in routings]
    Console().print(routing_table(loads, f"Routing of {len(ids)} tokens"))

    print("\nThe first tokens in layer 0: experts, most weight first, and their weights")
    experts_TK, weights_TK = routings[0].experts_TK.tolist(), routings[0].weights_TK.tolist()
    for token, experts, weights in list(zip(ids, experts_TK, weights_TK, strict=True))[:8]:
        shares = "  ".join(f"{e}: {w:.2f}" for e, w in zip(experts, weights, strict=True))
        name = lm.tokenizer.control.get(token) or str(lm.tokenizer.token_bytes(token))  # <s> stands for no bytes
        print(f"{name:12} {shares}")


if __name__ == "__main__":
    main(*sys.argv[1:])
