"""`mixtral chat`: a running text that the person and the model write in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral.commands.common import (
    BosOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    ThreadsOption,
    load_model,
    sampling_params,
    say,
    show_routing,
    shown,
)
from mixtral.commands.streams import text_input
from mixtral.shipped import SHIPPED

if TYPE_CHECKING:
    from mixtral.engine import SamplingParams
    from mixtral.lm import LM
    from mixtral.tokenizer import Tokenizer

COMMANDS = ("/reset", "/routing", "/quit")
OTHERWISE = {"max_tokens": 128, "temperature": 0.8, "top_p": 0.95}  # where neither you nor the model's folder says


def chat(
    model: ModelOption = SHIPPED,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="The most tokens of one answer (128).")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="0: always the most probable token.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="Draw from the fewest tokens that sum to P.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="The same seed and lines give the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End an answer before this text.")] = None,
    bos: BosOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = "auto",
) -> None:
    """Write a text in turn with a model.

    For base models, which continue a text: each line you type goes on the end of the running text, and the model
    continues it from there. Nothing is put around your words; the templates of Instruct models are not there yet.
    When the text outgrows the context, its beginning is forgotten. What you do not say is as the model's
    generation_config.json says; without that file, temperature 0.8 and top-p 0.95.

    /reset starts anew, /routing shows which experts took the text, /quit or Ctrl-D leaves, Ctrl-C stops an answer.

    Examples:
    mixtral chat
    mixtral chat --model DIR --temperature 0.5 --max-tokens 60
    mixtral chat --model DIR --stop "You:"
    """
    from mixtral.errors import UsageError
    from mixtral.runtime import set_threads

    set_threads(threads)
    params = sampling_params(
        model, OTHERWISE, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
    )
    lm, tokenizer = load_model(model, dtype, device)
    longest = min(params.max_length or lm.config.context, lm.config.context)
    if max_tokens is not None and max_tokens > longest - 2:
        raise UsageError(f"--max-tokens {max_tokens}: leaves no room for a text in the context of {longest}")
    if params.max_tokens > longest - 2:  # as the folder has it
        params = dataclasses.replace(params, max_tokens=max(1, longest // 2))
    with contextlib.suppress(ImportError):  # line editing for input(), where the system has it
        import readline  # noqa: F401
    say(f"The model continues what you write. {', '.join(COMMANDS)}; Ctrl-C stops an answer.")
    Conversation(lm, tokenizer, params, bos).run()


class Conversation:
    """The running text and the loop around it."""

    def __init__(self, lm: LM, tokenizer: Tokenizer, params: SamplingParams, bos: bool | None) -> None:
        self.lm, self.tokenizer, self.params, self.bos = lm, tokenizer, params, bos
        self.text = ""

    def run(self) -> None:
        """Read lines until the input ends or /quit. Raises UsageError when it is closed, or not UTF-8."""
        with text_input():
            self._converse()

    def _converse(self) -> None:
        while (line := self._read_line()) is not None:
            if line == "/quit":
                return
            if line == "/reset":
                self.text = ""
                say("[a new text]")
            elif line == "/routing":
                self._routing()
            elif line.startswith("/"):
                say(f"[unknown command {line}; known: {', '.join(COMMANDS)}]")
            elif line:
                self._answer(line)

    def _read_line(self) -> str | None:
        """The next line; None when there is none. Ctrl-C gives an empty one."""
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                say("")  # Ctrl-D leaves the cursor behind the prompt
            return None
        except KeyboardInterrupt:
            say("")
            return ""

    def _ids(self) -> list[int]:
        """The running text as the model gets it: cut at its beginning so that an answer fits the context."""
        before = self.tokenizer.encode("", self.bos, eos=False)
        ids = self.tokenizer.encode(self.text, bos=False, eos=False)
        context = self.lm.config.context
        room = min(self.params.max_length or context, context) - self.params.max_tokens - len(before)
        return [*before, *ids[-max(1, room) :]]

    def _answer(self, line: str) -> None:
        """Add a line to the text and let the model go on; Ctrl-C keeps what it has said so far."""
        self.text = f"{self.text}\n{line}" if self.text else line
        with contextlib.suppress(KeyboardInterrupt):
            for piece in self.lm.engine.stream([self._ids()], self.params):
                self.text += piece.text
                print(shown(piece.text), end="", flush=True)
        print()

    def _routing(self) -> None:
        if not self.lm.config.is_sparse:
            say("[this model is dense: it has no routing]")
        elif not self.text:
            say("[no text yet]")
        else:
            ids = self._ids()
            show_routing(self.lm, ids, self.lm.routing(ids))
