"""Stop strings and streaming text, however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mixtral.engine.detokenize import StopStrings, TextOutput
from mixtral.tokenizer import Tokenizer, train_bpe
from tests.engine.models import Pieces

LETTERS = st.text("ab", max_size=12)


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: go through the text; where a stop string ends first, cut before the longest that ends there."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_stop_strings_equal_the_definition(pieces: list[str], stops: list[str]) -> None:
    finder, shown = StopStrings(stops), ""
    stopped = False
    for piece in pieces:
        text, stopped = finder.push(piece)
        shown += text
        if stopped:
            break
    shown += finder.flush()
    assert (shown, stopped) == cut_at_stop("".join(pieces), stops)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["END", "\n\n"])
    assert finder.push("one\n") == ("one", False)
    assert finder.push("two E") == ("\ntwo ", False)
    assert finder.push("N") == ("", False)
    assert finder.push("S") == ("ENS", False)
    assert finder.push("...END...") == ("...", True)
    assert finder.flush() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).push("text") == ("text", False)


def tokenizer() -> Tokenizer:
    """With no merges worth the name: every character of other scripts is several byte tokens."""
    return train_bpe(["the cat sat on the mat\n" * 20], vocab_size=300)


def test_text_never_shows_half_a_character() -> None:
    own = tokenizer()
    text = "cat 猫 🐈 sat"
    output, pieces = TextOutput(own, [own.bos_id], ()), []
    for token in own.encode(text, bos=False):
        pieces.append(output.push(token))
        assert text.startswith("".join(pieces))
    assert "".join(pieces) + output.end() == text
    assert "" in pieces  # some tokens were indeed parts of a character


def test_an_unfinished_character_ends_as_a_replacement_and_may_complete_a_stop_string() -> None:
    own = tokenizer()
    ids = own.encode("cat 猫", bos=False)[:-1]
    for stop, wanted in (((), "cat \ufffd"), (("t \ufffd",), "ca")):
        output = TextOutput(own, [own.bos_id], stop)
        assert "".join(output.push(token) for token in ids) + output.end() == wanted


def test_a_continuation_keeps_its_leading_space() -> None:
    """Decoding drops the space that encoding puts before a text; a continuation's first space is a real one."""
    own = tokenizer()
    assert own.dummy_prefix
    prompt = own.encode("the cat")
    rest = own.encode("the cat sat")[len(prompt) :]
    output = TextOutput(own, prompt, ())
    assert "".join(output.push(token) for token in rest) + output.end() == " sat"


# Bytes that meet in odd ways: letters, the beginning, middle and end of longer characters, and what never is UTF-8.
PARTS = [b"a", b"b", b"\n", "é".encode(), b"\xc3", b"\xa9", b"\xe2\x80", b"\xf0\x9f", b"\xff"]
BYTES = st.lists(st.sampled_from(PARTS), max_size=6).map(b"".join)
STOPS = st.lists(st.text("ab\né\ufffd", min_size=1, max_size=3), max_size=3)


@given(st.lists(BYTES, max_size=6), STOPS)
@example([b"one\n\xe2\x80"], ["\n"])  # the token that holds the stop also begins a character
@example([b"\xe2\x80", b"\n"], ["\n"])  # a broken character that really is before the stop
@example([b"a\xe2"], ["a\ufffd"])  # a stop that the end of the text completes
def test_text_ends_at_the_stop_however_it_is_cut(pieces: list[bytes], stops: list[str]) -> None:
    tokenizer = Pieces(pieces)
    output, shown = TextOutput(tokenizer, [], stops), ""
    for token in range(len(pieces)):
        shown += output.push(token)
        if output.stopped:
            break
    shown += output.end()
    whole = b"".join(pieces).decode(errors="replace")
    assert (shown, output.stopped) == cut_at_stop(whole, stops)


@pytest.mark.parametrize("then", ["", "more"])
def test_nothing_comes_after_a_stop(then: str) -> None:
    output = TextOutput(Pieces([b"x.END\xf0\x9f", then.encode()]), [], ["END"])
    assert output.push(0) == "x." and output.stopped
    assert output.push(1) == "" and output.end() == ""
