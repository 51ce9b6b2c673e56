"""How far each format is from the model it was made from: KL divergence and agreement of the likeliest token.

The measure is the bf16 model in fp32 arithmetic, on one sequence of random tokens. Ours is taken as it runs, with its
rounding of activations, and by its weights alone; of a GGUF file there are only the weights, expanded as llama.cpp
expands them, so that its own rounding of activations is left out in its favour.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mixtral
from lib.engines import Task, prompts
from mixtral.kernels.packing import GROUP, unpack
from mixtral.model import Mixtral
from mixtral.quant.scheme import PACKED, read_scheme
from mixtral.runtime import set_threads


def distances(
    folder: Path, ours: Mapping[str, Path], ggufs: Mapping[str, Path], tokens: int, threads: int
) -> list[dict[str, Any]]:
    """Rows of "what", "kl" (nats a token) and "agreement" (0 to 1); `folder` is the bf16 model's."""
    set_threads(threads)
    lm = mixtral.load(folder, dtype="fp32")
    (ids,) = prompts(Task(min(tokens, lm.config.context), 0), lm.config.vocab_size)
    plain_TV = lm.logits(ids).log_softmax(-1)
    rows = []
    for format, path in ours.items():
        rows.append(_row(f"mixtral {format}", _native_logits(path, ids), plain_TV))
        if format != "bf16":
            _expand_into(lm.model, path)
            rows.append(_row(f"mixtral {format}, weights alone", lm.logits(ids), plain_TV))
    del lm
    for name, path in ggufs.items():
        rows.append(_row(f"GGUF {name}, weights alone", mixtral.load(path, dtype="fp32").logits(ids), plain_TV))
    return rows


def _row(what: str, logits_TV: Tensor, plain_TV: Tensor) -> dict[str, Any]:
    return {"what": what, **distance(logits_TV.log_softmax(-1), plain_TV)}


def distance(logp_TV: Tensor, plain_TV: Tensor) -> dict[str, float]:
    """KL(plain || other) in nats a token, and how often both find one token likeliest; of log-probabilities."""
    kl = torch.nn.functional.kl_div(logp_TV, plain_TV, log_target=True, reduction="sum") / len(plain_TV)
    return {"kl": float(kl), "agreement": float((logp_TV.argmax(-1) == plain_TV.argmax(-1)).float().mean())}


@torch.inference_mode()
def _native_logits(path: Path, ids: list[int]) -> Tensor:
    """[T, V] by the native step, as generation runs it."""
    return mixtral.load(path, dtype="bf16", runner="native").logits(ids)


def _expand_into(model: Mixtral, path: Path) -> None:
    """Give `model` the weights that the quantised folder stands for."""
    state, recipe = mixtral.load(path).model.state_dict(), read_scheme(path)
    assert recipe is not None
    for name, parameter in model.named_parameters():
        if (fmt := recipe.format(name)) is None:
            continue
        d = parameter.shape[-1]
        q, scale = unpack(state[name + PACKED], fmt.name, parameter.shape[-2], d)
        assert scale is not None
        parameter.data = q.float().mul_(scale.repeat_interleave(GROUP, dim=-1)[..., :d])
