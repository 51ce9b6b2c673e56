"""Beam search: the most probable continuations that a search of some width finds.

It stands above the engine, which knows nothing of it: each step asks for one token of every beam, with alternatives.
The prefix cache makes that one row a beam, and what does not fill a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixtral.engine.engine import Engine
from mixtral.engine.params import SamplingParams
from mixtral.errors import UsageError

_MOST_WIDTH = 500


@dataclass(frozen=True)
class Beam:
    """One continuation."""

    tokens: list[int]  # the end token too
    logprob: float  # of all tokens
    score: float  # logprob / n_tokens ** length_penalty
    text: str  # "" without a tokenizer
    finished: bool  # at an end token; else at max_tokens, or the end of the context


def beam_search(
    engine: Engine, prompt: Sequence[int], width: int, max_tokens: int, *, length_penalty: float = 1.0,
    k: float | None = None, end_ids: Sequence[int] | None = None,
) -> list[Beam]:  # fmt: skip
    """-> at most `width` continuations, the best score first.

    Each step keeps the `width` most probable of all beams' extensions; those that end are set aside. It stops once
    `width` have ended and no open beam is more probable than the worst of them could become, or at `max_tokens`.

    Args:
        end_ids: tokens that end a continuation; by default the model's, or the tokenizer's.

    Raises UsageError for a width or a number of tokens out of range, and as Engine.add does.
    """
    if not 1 <= width <= _MOST_WIDTH or max_tokens < 1:
        raise UsageError(f"beam search: a width of 1 to {_MOST_WIDTH} and at least one token are wanted, not {width} "
                         f"and {max_tokens}")
    config, tokenizer = engine.runner.config, engine.tokenizer
    params = SamplingParams(max_tokens=1, logprobs=2 * width, ignore_eos=True)
    ends = frozenset(config.eos_ids or ([tokenizer.eos_id] if tokenizer else [])) if end_ids is None else {*end_ids}
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for _ in range(min(max_tokens, config.context - len(prompt))):
        answers = engine.generate([[*prompt, *tokens] for _, tokens in beams], params, k=k)
        grown = [
            (logprob + more, [*tokens, token])
            for (logprob, tokens), answer in zip(beams, answers, strict=True)
            for token, more in answer.alternatives[0].items()
        ]
        best = sorted(grown, key=lambda beam: -beam[0])[: 2 * width]
        ended += [beam for beam in best if beam[1][-1] in ends]
        beams = [beam for beam in best if beam[1][-1] not in ends][:width]
        if not beams or _is_over(ended, beams, width, length_penalty):
            break
    found = [_beam(engine, prompt, *beam, length_penalty, True) for beam in ended]
    found += [_beam(engine, prompt, *beam, length_penalty, False) for beam in beams]
    return sorted(found, key=lambda beam: -beam.score)[:width]


def _is_over(
    ended: list[tuple[float, list[int]]], beams: list[tuple[float, list[int]]], width: int, length_penalty: float
) -> bool:
    """Whether enough have ended with a better score than the best open beam has now."""
    scores = sorted((_score(*beam, length_penalty) for beam in ended), reverse=True)
    return len(scores) >= width and scores[width - 1] >= _score(*beams[0], length_penalty)


def _score(logprob: float, tokens: list[int], length_penalty: float) -> float:
    return float(logprob / len(tokens) ** length_penalty)


def _beam(
    engine: Engine, prompt: Sequence[int], logprob: float, tokens: list[int], length_penalty: float, finished: bool
) -> Beam:
    text = ""
    if engine.tokenizer is not None:
        stream = engine.tokenizer.stream(after=prompt)
        text = "".join(stream.add(token) for token in (tokens[:-1] if finished else tokens)) + stream.flush()
    return Beam(tokens, logprob, _score(logprob, tokens, length_penalty), text, finished)
