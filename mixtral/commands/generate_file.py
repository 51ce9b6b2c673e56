"""`mixtral generate --prompts FILE`: all prompts of a file, many at once, a line of JSON each; goes on after a kill."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixtral.commands.common import console, say
from mixtral.commands.prompt_lines import parsed_lines
from mixtral.errors import MixtralError, UsageError
from mixtral.files import open_regular
from mixtral.json_files import parse

if TYPE_CHECKING:
    from mixtral import engine
    from mixtral.engine import Generation, SamplingParams
    from mixtral.lm import LM


class Request(NamedTuple):
    """One line of the file."""

    prompt: str | list[int]  # as it stands there
    ids: list[int]
    params: SamplingParams
    k: float | None


def generate_file(
    lm: LM, source: str, out: Path | None, asked: dict[str, Any], bos: bool | None, k: int | None, skip_bad: bool,
    logprobs: bool,
) -> None:  # fmt: skip
    """Continue each prompt of `source`, and write what came of them to `out` (by default standard output), in order.

    A line of text is a prompt; of a file that ends in .jsonl, or whose first character is "{", each line is an object:
    `prompt`, a text or token ids, and any field of SamplingParams, or `k`, beside it. What `out` holds already is kept,
    and the rest is done.

    Raises UsageError, with the line, for one that cannot be served, before any work, unless `skip_bad`; and where `out`
    holds something else than the beginning of this.
    """
    requests = parsed_lines(source, "prompt", lambda values: _request(lm, values, asked, bos, k), skip_bad)
    done = 0 if out is None else _done(out, requests)
    if done:
        say(f"{out}: {done} of {len(requests)} are there; going on")
    with _writing(out) as write, _bar(len(requests), done) as advance:
        adds = (partial(_add, lm, request, number) for number, request in enumerate(requests[done:], start=done))
        for asked_for, answered in zip(requests[done:], lm.engine.in_order(adds), strict=True):
            if answered.error:
                raise MixtralError(answered.error)
            write(json.dumps(_line(asked_for, answered.results()[0], logprobs), ensure_ascii=False))
            advance()


def _add(lm: LM, request: Request, number: int) -> engine.Request:
    return lm.engine.add(request.ids, request.params, k=request.k, first=number)


def _line(request: Request, generation: Generation, logprobs: bool) -> dict[str, Any]:
    line = {"prompt": request.prompt, "text": generation.text, "tokens": generation.tokens,
            "finish_reason": generation.finish_reason}  # fmt: skip
    return line | ({"logprobs": generation.logprobs} if logprobs else {})


# -- the prompts -------------------------------------------------------------------------------------------------------


def _request(lm: LM, values: dict[str, Any], asked: dict[str, Any], bos: bool | None, k: int | None) -> Request:
    """Raises UsageError for what cannot be served."""
    prompt = values.pop("prompt", None)
    k = values.pop("k", k)
    assert lm.tokenizer is not None
    is_ids = isinstance(prompt, list) and all(type(i) is int for i in prompt)
    if not is_ids and not isinstance(prompt, str):
        raise UsageError("prompt must be a text or a list of token ids")
    params = lm.params({**asked, **values})
    ids = list(prompt) if isinstance(prompt, list) else lm.tokenizer.encode(prompt, bos, eos=False)
    if k is not None and type(k) not in (int, float):
        raise UsageError("k must be a number of experts, or between 0 and 1")
    lm.engine.check(ids, params, k=k)
    return Request(prompt, ids, params, k)


# -- what came of them -------------------------------------------------------------------------------------------------


def _done(out: Path, requests: Sequence[Request]) -> int:
    """How many of the prompts `out` answers already; a last line that a kill has cut off is taken away.

    Raises UsageError where it holds other lines than this would write.
    """
    if not out.exists():
        return 0
    data = open_regular(out).read()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            answered = parse(line)["prompt"]
        except (ValueError, LookupError, TypeError):
            raise UsageError(f"{out}, line {number}: nothing that this command writes; name another --out") from None
        if number > len(requests) or answered != requests[number - 1].prompt:
            raise UsageError(f"{out}, line {number}: answers another prompt than the file has; name another --out")
    if len(whole) < len(data):
        os.truncate(out, len(whole))
    return len(lines)


@contextmanager
def _writing(out: Path | None) -> Iterator[Any]:
    """-> a function that writes a line, which is on its way to the disk when it returns."""
    if out is None:
        yield lambda line: print(line, flush=True)
        return
    try:
        with out.open("a", encoding="utf-8") as file:

            def write(line: str) -> None:
                file.write(line + "\n")
                file.flush()

            yield write
    except OSError as error:
        raise MixtralError(f"cannot write {out}: {error.strerror}") from error


@contextmanager
def _bar(total: int, done: int) -> Iterator[Any]:
    """A bar on standard error, where that is a terminal -> a function that moves it by one prompt."""
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("prompts", total=total, completed=done)
        yield lambda: bar.advance(task)
