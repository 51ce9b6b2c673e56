"""`mixtral generate`: continue a prompt, the text growing on standard output as it comes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.commands.common import (
    BosOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    ThreadsOption,
    bytes_text,
    check_k,
    console,
    load_model,
    loads,
    sampling_params,
    say,
    show_routing,
    shown,
)
from mixtral.commands.generate_file import generate_file
from mixtral.commands.streams import text_input
from mixtral.errors import UsageError
from mixtral.shipped import SHIPPED

if TYPE_CHECKING:
    from mixtral.engine import Generation, SamplingParams, Stream
    from mixtral.lm import LM

SAMPLING = (  # options that are fields of SamplingParams
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "suppress_tokens", "seed", "stop",
)  # fmt: skip


def generate(
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to continue; - reads it from standard input.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Instead: a prompt a line, or JSON lines; - is standard input.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of --prompts: where the JSON lines go; it goes on there.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Of --prompts: leave out lines that are wrong.")] = False,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Of --prompts: log-probabilities too.")] = False,
    model: ModelOption = SHIPPED,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="The most tokens to generate (256).")] = None,
    min_tokens: Annotated[int | None, typer.Option(metavar="N", help="No end token before N others.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="0: always the most probable token.")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Sample from the N most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="Sample from the fewest that sum to P.")] = None,
    min_p: Annotated[
        float | None, typer.Option(metavar="P", help="Drop tokens of less than P times the highest probability.")
    ] = None,
    typical_p: Annotated[
        float | None, typer.Option(metavar="P", help="Sample from the fewest tokens of typical surprise that sum to P.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Above 1: tokens that occurred become less probable.")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(metavar="N", help="No sequence of N tokens occurs twice.")
    ] = None,
    suppress_tokens: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="A token never to generate; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this; may be repeated.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, metavar="N", help="How many continuations, as one batch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a continuation, a line each.")] = False,
    k: Annotated[
        int | None, typer.Option("--k", metavar="N", help="Experts a token takes; as in training by default.")
    ] = None,
    routing: Annotated[bool, typer.Option("--routing", help="Show which experts took the tokens.")] = False,
    bos: BosOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = "auto",
) -> None:
    """Continue a prompt.

    The text goes to standard output, speed and remarks to standard error. The models are base models: they continue a
    text, and were not taught to follow instructions. What you do not say is as the model's generation_config.json says;
    without that file the most probable token is taken.

    --prompts continues every prompt of a file, in batches, one JSON object each in their order. A line of JSON may have
    its own max_tokens, temperature, stop, k, ...: {"prompt": "...", "seed": 1}. Killed, it goes on where --out ends.

    Examples:
    mixtral generate --prompt "def fibonacci(n):" --max-tokens 100
    mixtral generate --model DIR --prompt "Once" --temperature 0.8 --seed 1 --routing
    mixtral generate --model DIR --prompt "Once" --k 1
    echo "To be or" | mixtral generate --model DIR --prompt - --json
    mixtral generate --prompts prompts.jsonl --out answers.jsonl --max-tokens 64
    """
    asked = {name: value for name, value in locals().items() if name in SAMPLING and value not in (None, [])}
    from mixtral.config.formats import read_config
    from mixtral.runtime import set_threads
    from mixtral.shipped import model_folder

    set_threads(threads)
    params = sampling_params(model, **asked)
    of_file = {"out": out is not None, "skip-bad": skip_bad, "logprobs": logprobs}
    _check_source(prompt, prompts, {"n": n > 1, "json": as_json, "routing": routing}, of_file)
    prompt = read_stdin() if prompt == "-" else prompt
    check_k(k, read_config(model_folder(model)))  # before the model is loaded
    lm, _ = load_model(model, dtype, device)
    if prompts is not None:
        generate_file(lm, prompts, out, asked, bos, k, skip_bad, logprobs)
    else:
        continue_one(lm, prompt or "", params, n, k, bos, routing, as_json)


def continue_one(
    lm: LM, prompt: str, params: SamplingParams, n: int, k: int | None, bos: bool | None, routing: bool, as_json: bool
) -> None:  # fmt: skip
    """Continue one prompt `n` times, the text of one continuation as it comes."""
    if routing and not lm.config.is_sparse:
        raise UsageError("--routing: this model is dense (one expert); only sparse models route their tokens")
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode(prompt, bos, eos=False)
    _check_memory(lm, len(ids), n)
    speed = Speed(len(ids))
    pieces = lm.engine.stream([ids], params, n=n, k=k, keep_routing=routing)
    if as_json:
        _print_json(prompt, ids, _finish(pieces, speed, show=False), speed, routing)
        return
    if n == 1 and sys.stdout.isatty():
        console().print(shown(prompt), style="dim", end="", soft_wrap=True)
    done = _finish(pieces, speed, show=n == 1)
    for number, generation in enumerate(done, start=1):
        print("" if n == 1 else f"--- {number} of {n} ---\n{shown(generation.text)}")
    say(speed.text())
    for generation in done if routing else ():
        show_routing(lm, [*ids, *generation.tokens], generation.routing)


def _check_source(prompt: str | None, prompts: str | None, of_one: dict[str, bool], of_file: dict[str, bool]) -> None:
    """Raise UsageError unless there is one prompt or a file of them, and no option that would be ignored."""
    if (prompt is None) == (prompts is None):
        raise UsageError("generate: give a --prompt, or a file of them: --prompts")
    ignored, goes_with = (of_file, "--prompts") if prompts is None else (of_one, "--prompt")
    if given := [name for name, is_given in ignored.items() if is_given]:
        raise UsageError(f"--{given[0]}: goes with {goes_with}")


def _check_memory(lm: LM, prompt_tokens: int, n: int) -> None:
    """Raise UsageError when the cache of the prompt and `n` tokens' logits need more memory than is free."""
    from mixtral.hardware import free_memory_bytes

    bits = 8 * lm.runner.pool.dtype.itemsize
    needed = lm.config.kv_bytes(prompt_tokens, bits) + n * 4 * lm.config.vocab_size
    if needed > (free := free_memory_bytes(lm.device)):
        room = f"at least {bytes_text(needed)} of memory are needed, and {bytes_text(free)} are free"
        raise UsageError(f"--n {n}: {room}; continue the prompt fewer times")


def _finish(pieces: Stream, speed: Speed, show: bool) -> list[Generation]:
    """Generate to the end; `show` prints the text as it grows."""
    for piece in pieces:
        speed.count()
        if show:
            print(shown(piece.text), end="", flush=True)
    return pieces.results()


def _print_json(prompt: str, ids: list[int], done: Sequence[Generation], speed: Speed, routing: bool) -> None:
    for generation in done:
        line: dict[str, Any] = {
            "prompt": prompt,
            "text": generation.text,
            "tokens": generation.tokens,
            "logprobs": generation.logprobs,
            "finish_reason": generation.finish_reason,
            "prompt_tokens": len(ids),
            "timing": speed.figures(),
        }
        if routing:
            line["routing"] = loads(generation.routing)
        print(json.dumps(line))


class Speed:
    """Counts tokens against the clock, from the moment it is made. The first token ends the reading of the prompt."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.tokens = prompt_tokens, 0
        self._started = self._first = self._last = time.perf_counter()

    def count(self) -> None:
        self._last = time.perf_counter()
        if self.tokens == 0:
            self._first = self._last
        self.tokens += 1

    def figures(self) -> dict[str, float | None]:
        """Seconds to the first token and from it to the last one; tokens a second after the first (None: only one)."""
        decode = self._last - self._first
        rate = (self.tokens - 1) / decode if decode > 0 else None
        return {"prompt_seconds": self._first - self._started, "decode_seconds": decode, "tokens_per_second": rate}

    def text(self) -> str:
        figures = self.figures()
        rate = f", then {figures['tokens_per_second']:.1f} tokens/s" if figures["tokens_per_second"] else ""
        return f"[{self.tokens} tokens; prompt of {self.prompt_tokens} in {figures['prompt_seconds']:.2f} s{rate}]"


def read_stdin() -> str:
    """All of standard input, as UTF-8 text, without the line end that `echo` adds."""
    with text_input(whole=True) as lines:
        return lines.read().removesuffix("\n")
