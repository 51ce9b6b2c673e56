"""From logits to the next token: temperature, filters, and one random number.

The filters apply in transformers' order: top_h, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, each to
what the one before left. Ties count as ordered by index, the lower one first; all that are as probable as the last one
of top_k pass.

Legend: B sequences, V vocabulary, N candidates that are left, the most probable first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mixtral import kernels
from mixtral.engine.continuation import Continuation, Token
from mixtral.engine.history import apply_history
from mixtral.engine.params import SamplingParams
from mixtral.errors import MixtralError

GREEDY = SamplingParams()
_TOP_H_CANDIDATES = 100  # transformers'


def next_tokens(
    logits_RV: Tensor, rows: Sequence[int], continuations: Sequence[Continuation],
    masks: Sequence[Tensor | MixtralError | None] | None = None,
) -> list[Token | MixtralError]:  # fmt: skip
    """The next token of each continuation, from its row of the logits; an error for one that can have none.

    Args:
        masks: for each, bool [V] of what its grammar allows, or the error of asking it.
    """
    norm_R = kernels.log_sum_exp(logits_RV)
    norms, plain = norm_R.tolist(), list(rows) == list(range(len(logits_RV)))
    logits_BV = logits_RV if plain else logits_RV[list(rows)]
    norm_B = norm_R if plain else norm_R[list(rows)]
    found: dict[int, MixtralError] = {b: _not_finite() for b, row in enumerate(rows) if not math.isfinite(norms[row])}
    unmasked = masks is None or all(mask is None for mask in masks)
    if not found and unmasked and all(c.is_plain for c in continuations):  # the usual case: the same, sooner
        ids_B = first_highest(logits_BV)
        logprobs = (logits_BV.gather(1, ids_B[:, None])[:, 0] - norm_B).tolist()
        return list(map(Token, ids_B.tolist(), logprobs))
    changed_BV = _changed(logits_BV, continuations, masks or [None] * len(rows), found)
    params = [GREEDY if b in found else c.params for b, c in enumerate(continuations)]
    ids_B = sample(changed_BV, params, [c.generator for c in continuations])
    logprobs = (logits_BV.gather(1, ids_B[:, None])[:, 0] - norm_B).tolist()
    ids = ids_B.tolist()
    return [
        found[b] if b in found else Token(ids[b], logprobs[b], top_logprobs(logits_BV[b], norm_B[b], c.params.logprobs))
        for b, c in enumerate(continuations)
    ]


def given_tokens(logits_TV: Tensor, ids: Sequence[int], n: int) -> list[Token]:
    """Tokens that are there already, each after its row of the logits, with `n` alternatives."""
    norm_T = kernels.log_sum_exp(logits_TV)
    ids_T = torch.tensor(ids, device=logits_TV.device)
    logprobs = (logits_TV.gather(1, ids_T[:, None])[:, 0] - norm_T).tolist()
    rows = zip(ids, logprobs, logits_TV, norm_T, strict=True)
    return [Token(id, logprob, top_logprobs(row_V, norm, n) if n else {}) for id, logprob, row_V, norm in rows]


def top_logprobs(logits_V: Tensor, norm: Tensor, n: int | None) -> dict[int, float] | None:
    """Log-probabilities of the `n` most probable tokens, the most probable first."""
    if n is None:
        return None
    top = logits_V.topk(min(n, len(logits_V)))
    return dict(zip(top.indices.tolist(), (top.values - norm).tolist(), strict=True))


def _not_finite() -> MixtralError:  # some norm is not as soon as one logit is NaN or +inf
    return MixtralError(
        "generation: logits are not finite; the weights are damaged, or need a dtype of larger range (bf16 or fp32)"
    )


def _changed(
    logits_BV: Tensor, continuations: Sequence[Continuation], masks: Sequence[Tensor | MixtralError | None],
    found: dict[int, MixtralError],
) -> Tensor:  # fmt: skip
    """The logits after what the tokens so far and the masks do to them; errors go to `found`."""
    rows: dict[int, Tensor] = {}
    for b, (c, mask) in enumerate(zip(continuations, masks, strict=True)):
        if b in found or not (c.params.uses_history or mask is not None):
            continue
        try:
            row_V = apply_history(logits_BV[b], c.params, c.all_tokens, c.n_prompt, c.end_ids)
            rows[b] = row_V.float() if mask is None else masked(row_V, mask)
        except MixtralError as error:
            found[b] = error
    if not rows:
        return logits_BV
    return torch.stack([rows.get(b, row_V.float()) for b, row_V in enumerate(logits_BV)])


def masked(logits_V: Tensor, mask: Tensor | MixtralError) -> Tensor:
    """fp32 logits, -inf where the mask does not allow a token. Raises MixtralError when it allows none."""
    if isinstance(mask, MixtralError):
        raise mask
    if mask.dtype != torch.bool or mask.dim() != 1 or len(mask) < len(logits_V):
        raise MixtralError(
            f"mask: bool of {len(logits_V)} tokens or more is wanted, not {mask.dtype} {list(mask.shape)}"
        )
    logits_V = logits_V.float().masked_fill(~mask[: len(logits_V)].to(logits_V.device), -math.inf)
    if logits_V.amax() == -math.inf:
        raise MixtralError("mask: it allows no token that may follow")
    return logits_V


def sample(logits_BV: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw the next token of each sequence from its own parameters and generator -> int64 [B].

    A sequence of temperature 0 uses no random number; any other uses exactly one.
    """
    ids_B = first_highest(logits_BV)
    for row, (wanted, generator) in enumerate(zip(params, generators, strict=True)):
        if wanted.temperature > 0:
            ids_B[row] = _draw(logits_BV[row], wanted, generator)
    return ids_B


def first_highest(logits_BV: Tensor) -> Tensor:
    """The lowest index of each row's highest logit -> int64 [B]."""
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:  # numpy takes a tenth of torch's time
        return torch.from_numpy(logits_BV.detach().numpy().argmax(-1))
    return logits_BV.argmax(-1)  # documented to return the first of equal values


def _draw(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:
    """One token by inversion: the first whose cumulative probability exceeds a uniform number."""
    probabilities, ids = kept(logits_V, params)
    cumulative = probabilities.cumsum(0)
    point = torch.rand((), generator=generator).to(cumulative.device) * cumulative[-1]
    position = torch.searchsorted(cumulative, point, right=True)
    last = torch.searchsorted(cumulative, cumulative[-1])  # the last that is not of probability 0
    return ids[torch.minimum(position, last)]  # a uniform number next to 1 may round up to the whole sum


def kept(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that pass the filters: fp32 probabilities, not renormalised, and ids.

    Sorted, the most probable first, when there is a filter; in the order of ids when there is none.
    """
    if not params.is_filtered:  # sorting a vocabulary would take milliseconds
        return _probabilities(logits_V, params), torch.arange(len(logits_V), device=logits_V.device)
    ids = _candidates(logits_V, _TOP_H_CANDIDATES if params.top_h is not None else params.top_k)
    probabilities = _probabilities(logits_V[ids], params)
    for mask in _filters(params):
        passes = mask(probabilities / probabilities.sum())
        probabilities, ids = probabilities[passes], ids[passes]
    return probabilities, ids


def _probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    logits_V = logits_V.float()
    temperature = max(params.temperature, 1e-30)  # a smaller one is 0 in fp32, and 0 / 0 is no number
    return ((logits_V - logits_V.amax()) / temperature).softmax(0)  # subtracted first, so that nothing overflows


def _candidates(logits_V: Tensor, n: int | None) -> Tensor:
    """Ids of the `n` highest logits (all by default) and of those equal to the last, highest first."""
    if n is None or n >= len(logits_V):
        return logits_V.sort(descending=True, stable=True).indices
    ids = (logits_V >= logits_V.topk(n).values[-1]).nonzero()[:, 0]
    return ids[logits_V[ids].sort(descending=True, stable=True).indices]


# -- filters: descending probabilities [N] that sum to 1 -> which of them pass -----------------------------------------


def _filters(params: SamplingParams) -> Iterator[Callable[[Tensor], Tensor]]:
    """Those that are asked for, in order; top_k alone is done by `_candidates`."""
    if params.top_h is not None:
        yield partial(_top_h, share=params.top_h)
        if params.top_k is not None:
            yield partial(_top_k, k=params.top_k)
    if params.top_p < 1:  # at 1 the running sum would round to 1 before the last tokens of a long tail
        yield partial(_top_p, mass=params.top_p)
    if params.min_p > 0:
        yield partial(_at_least, bound=params.min_p, relative=True)
    if params.typical_p < 1:
        yield partial(_typical, mass=params.typical_p)
    if params.epsilon_cutoff > 0:
        yield partial(_at_least, bound=params.epsilon_cutoff)
    if params.eta_cutoff > 0:
        yield partial(_eta, cutoff=params.eta_cutoff)


def _top_h(p_N: Tensor, share: float) -> Tensor:
    """arXiv 2509.02510: the most probable tokens whose terms of the entropy stay within a share of it."""
    terms_N = _entropy_terms(p_N)
    passes_N = terms_N.cumsum(0) <= share * terms_N.sum()
    passes_N[0] = True
    return passes_N


def _top_k(p_N: Tensor, k: int) -> Tensor:
    return p_N >= p_N[min(k, len(p_N)) - 1]


def _top_p(p_N: Tensor, mass: float) -> Tensor:
    sums_N = p_N.cumsum(0, dtype=torch.float64)  # in fp32 the end of a long tail would round away
    before_N = torch.nn.functional.pad(sums_N[:-1], (1, 0))
    return before_N < mass * sums_N[-1]


def _at_least(p_N: Tensor, bound: float | Tensor, relative: bool = False) -> Tensor:
    highest = p_N.amax()  # after typical_p not always the first
    return (p_N >= bound * (highest if relative else 1)) | (p_N == highest)


def _typical(p_N: Tensor, mass: float) -> Tensor:
    """arXiv 2202.00666: the tokens whose surprise is nearest to the entropy, up to a mass of probability."""
    distance_N = (-p_N.log() - _entropy_terms(p_N).sum()).abs()
    order_N = distance_N.sort(stable=True).indices
    n_below = int((p_N[order_N].cumsum(0) < mass).sum())
    return distance_N <= distance_N[order_N[min(n_below, len(p_N) - 1)]]


def _eta(p_N: Tensor, cutoff: float) -> Tensor:
    """arXiv 2210.15191: a bound on the probability that falls with the entropy."""
    flat = math.sqrt(cutoff) * (-_entropy_terms(p_N).sum()).exp()
    return _at_least(p_N, flat.clamp(max=cutoff))


def _entropy_terms(p_N: Tensor) -> Tensor:
    return -torch.special.xlogy(p_N, p_N)  # 0 for a probability of 0
