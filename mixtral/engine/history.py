"""What the tokens so far do to the logits of the next one: a penalty, and tokens that must not follow.

Pure functions, applied before temperature and filters, with greedy choice too. The order is transformers': the penalty,
then the bans, of which none depends on another.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from mixtral.engine.params import SamplingParams
from mixtral.errors import MixtralError


def apply_history(
    logits_V: Tensor, params: SamplingParams, tokens: Sequence[int], n_prompt: int, end_ids: Collection[int]
) -> Tensor:
    """fp32 logits with the penalty applied and what is banned at -inf; the same tensor when nothing is asked for.

    Args:
        tokens: the prompt of `n_prompt` tokens and what was sampled after it.
        end_ids: the tokens that would end the text.

    Raises MixtralError when no token is left.
    """
    if params.repetition_penalty != 1:
        logits_V = penalise_repetition(logits_V, tokens, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        logits_V = penalise_generated(logits_V, tokens[n_prompt:], params.presence_penalty, params.frequency_penalty)
    if params.logit_bias:
        logits_V = add_bias(logits_V, params.logit_bias)
    if params.allowed_token_ids is not None:
        logits_V = keep_allowed(logits_V, {*params.allowed_token_ids, *end_ids})
    banned = {i for i in banned_ids(params, tokens, n_prompt, end_ids) if i < len(logits_V)}
    if banned:
        logits_V = logits_V.float().index_fill(0, torch.tensor(list(banned), device=logits_V.device), -math.inf)
    if (banned or params.allowed_token_ids is not None) and logits_V.amax() == -math.inf:
        raise MixtralError("generation: every token is banned by suppress_tokens, bad_words_ids, no_repeat_ngram_size, "
                           "allowed_token_ids or a minimum of tokens; allow some")  # fmt: skip
    return logits_V


def penalise_repetition(logits_V: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Logits of tokens that occurred divided by `penalty`, multiplied where they are negative."""
    logits_V = logits_V.float()
    ids = torch.tensor([i for i in set(tokens) if i < len(logits_V)], dtype=torch.int64, device=logits_V.device)
    found = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(found < 0, found * penalty, found / penalty))


def penalise_generated(logits_V: Tensor, generated: Sequence[int], presence: float, frequency: float) -> Tensor:
    """logit - presence - frequency * count for each token that was generated, as OpenAI's interface defines the two."""
    counts = Counter(i for i in generated if i < len(logits_V))
    return add_bias(logits_V, [(i, -(presence + frequency * count)) for i, count in counts.items()])


def add_bias(logits_V: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    """Add a number to the logits of some tokens."""
    ids = torch.tensor([i for i, _ in bias], dtype=torch.int64, device=logits_V.device)
    values = torch.tensor([value for _, value in bias], dtype=torch.float32, device=logits_V.device)
    return logits_V.float().index_add(0, ids, values)


def keep_allowed(logits_V: Tensor, allowed: Collection[int]) -> Tensor:
    """-inf but for some tokens."""
    ids = torch.tensor([i for i in allowed if i < len(logits_V)], dtype=torch.int64, device=logits_V.device)
    logits_V = logits_V.float()
    return torch.full_like(logits_V, -math.inf).index_copy(0, ids, logits_V[ids])


def banned_ids(params: SamplingParams, tokens: Sequence[int], n_prompt: int, end_ids: Collection[int]) -> Iterable[int]:
    """The tokens that must not follow; an id may come twice, and lie beyond the vocabulary."""
    if params.no_repeat_ngram_size:
        yield from repeating_ids(tokens, params.no_repeat_ngram_size)
    if params.bad_words_ids:
        yield from completing_ids(tokens, params.bad_words_ids, end_ids)
    if len(tokens) < max(params.min_length, n_prompt + params.min_tokens):
        yield from end_ids
    yield from params.suppress_tokens
    if len(tokens) == n_prompt:
        yield from params.begin_suppress_tokens


def repeating_ids(tokens: Sequence[int], n: int) -> list[int]:
    """The tokens that would complete a sequence of `n` tokens that occurred already."""
    if len(tokens) < n:
        return []
    tokens_T = torch.tensor(tokens)
    windows_WN = tokens_T.unfold(0, n, 1)
    matches_W = (windows_WN[:, :-1] == tokens_T[len(tokens) - n + 1 :]).all(1)
    ids: list[int] = windows_WN[matches_W, -1].tolist()
    return ids


def completing_ids(tokens: Sequence[int], words: Iterable[Sequence[int]], end_ids: Collection[int]) -> Iterable[int]:
    """The last token of each word whose other tokens are the last of the text; an end token alone is no word."""
    for *begin, last in words:
        if begin:
            if list(tokens[-len(begin) :]) == begin:
                yield last
        elif last not in end_ids:
            yield last
