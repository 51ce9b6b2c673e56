"""`mixtral score`: how probable texts are to a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.commands.common import BosOption, DeviceOption, DtypeOption, ModelOption, ThreadsOption, load_model
from mixtral.commands.prompt_lines import parsed_lines
from mixtral.errors import UsageError
from mixtral.shipped import SHIPPED

if TYPE_CHECKING:
    from mixtral.lm import LM


def score(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A text a line, or JSON lines; - is standard input.")],
    model: ModelOption = SHIPPED,
    k: Annotated[
        int | None, typer.Option("--k", metavar="N", help="Experts a token takes; as in training by default.")
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Of each token too.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out lines that are wrong.")] = False,
    bos: BosOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = "auto",
) -> None:
    """Print how probable texts are to a model, one JSON object each.

    A line of JSON is {"text": "..."}, or {"prompt": "...", "continuation": "..."}, of which the continuation counts.
    logprob is the natural logarithm of the probability of all its tokens but a first one, which stands after nothing;
    bits_per_byte the same in bits for each byte of those tokens' text: the fewer, the more expected.

    Examples:
    mixtral score lines.txt
    mixtral score pairs.jsonl --model DIR --logprobs
    """
    from mixtral.commands.common import check_k
    from mixtral.config.formats import read_config
    from mixtral.runtime import set_threads
    from mixtral.shipped import model_folder

    set_threads(threads)
    check_k(k, read_config(model_folder(model)))
    lm, _ = load_model(model, dtype, device)
    for line in _scored(lm, source, k, bos, logprobs, skip_bad):
        print(json.dumps(line, ensure_ascii=False), flush=True)


def _scored(
    lm: LM, source: str, k: int | None, bos: bool | None, logprobs: bool, skip_bad: bool
) -> Iterator[dict[str, Any]]:  # fmt: skip
    from mixtral.engine.score import ask
    from mixtral.engine.score import logprobs as found_by

    assert lm.tokenizer is not None
    lines = parsed_lines(source, "text", lambda values: _ids(lm, values, bos), skip_bad)
    asked = (partial(ask, lm.engine, [*before, *ids], k) for _, before, ids in lines)
    for (values, before, ids), request in zip(lines, lm.engine.in_order(asked), strict=True):
        found = found_by(request)
        counted = found[max(0, len(before) - 1) :]
        whole = [*before, *ids]
        lengths = [len(lm.tokenizer.decode(part).encode()) for part in (whole, whole[: len(whole) - len(counted)])]
        n_bytes = lengths[0] - lengths[1]
        total = math.fsum(counted)
        line = {**values, "tokens": len(counted), "logprob": total,
                "bits_per_byte": -total / math.log(2) / n_bytes if n_bytes else None}  # fmt: skip
        yield line | ({"token_ids": ids[len(ids) - len(counted) :], "logprobs": counted} if logprobs else {})


def _ids(lm: LM, values: dict[str, Any], bos: bool | None) -> tuple[dict[str, Any], list[int], list[int]]:
    """(the line, the tokens before what counts, those that count). Raises UsageError for what is no text."""
    from mixtral.engine.continuation import check_prompt

    tokenizer = lm.tokenizer
    assert tokenizer is not None
    are_texts = all(isinstance(value, str) for value in values.values())
    if not are_texts or values.keys() not in ({"text"}, {"prompt", "continuation"}):
        raise UsageError('a text is wanted: {"text": "..."} or {"prompt": "...", "continuation": "..."}')
    if "text" in values:
        whole, begin = tokenizer.encode(values["text"], bos, eos=False), 0
    else:  # encoded as one text: where they meet, tokens may be others than of the two alone
        whole = tokenizer.encode(values["prompt"] + values["continuation"], bos, eos=False)
        begin = _meeting(tokenizer.encode(values["prompt"], bos, eos=False), whole)
    check_prompt(whole, lm.config, "text")
    if len(whole) - max(begin, 1) < 1:
        raise UsageError("nothing to score: a text of two tokens or more is wanted")
    return values, whole[:begin], whole[begin:]


def _meeting(prompt: list[int], whole: list[int]) -> int:
    """How many tokens the two begin with in common."""
    pairs = zip(prompt, whole, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole)))
