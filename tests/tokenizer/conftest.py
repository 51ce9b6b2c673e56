"""Shared by the tokenizer tests: the real files that mistral-common ships, an own small one, and awkward text."""

from __future__ import annotations

import functools
import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import mistral_common
import pytest

from mixtral.tokenizer import Tokenizer, load_tokenizer, train_bpe
from mixtral.tokenizer.mistral import TekkenTokenizer

FILES = Path(mistral_common.__file__).parent / "data"
NAMES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": "tekken_240718.json",
}
STDLIB = Path(sysconfig.get_paths()["stdlib"])
ALPHABET = " \t\n\r\0ab=-.1é\u0301\u200d\u3000中日本🙂👩👧[]INSTREF/0xA"


@functools.cache
def tokenizer_named(name: str) -> Tokenizer:
    """One of NAMES; "own": 1,000 pieces learnt from a few sources of the standard library; or "small-tekken"."""
    if name == "small-tekken":
        return TekkenTokenizer(_small_tekken(), "tekken.json")
    if name != "own":
        return load_tokenizer(FILES / NAMES[name])
    return train_bpe([(STDLIB / file).read_text() for file in ("ast.py", "json/decoder.py", "textwrap.py")], 1000)


def _small_tekken() -> bytes:
    """The first 10,000 pieces of the real file: it takes seconds to read, to write, and to read again as a whole."""
    tekken = json.loads((FILES / NAMES["tekken"]).read_bytes())
    tekken["config"]["default_vocab_size"] = 11_000
    return json.dumps({**tekken, "vocab": tekken["vocab"][:10_000]}).encode()


@pytest.fixture(scope="session")
def own() -> Tokenizer:
    return tokenizer_named("own")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder into which the named tokenizer was saved, once for all tests: not to be changed."""

    @functools.cache
    def folder(name: str) -> Path:
        tokenizer_named(name).save(path := tmp_path_factory.mktemp(name))
        return path

    return folder


@pytest.fixture(scope="session")
def awkward_lines() -> list[str]:
    """10,000 lines: sources of the standard library, odd characters, runs of one character, what tokens look like."""
    sources = [path.read_text(errors="replace") for path in sorted(STDLIB.glob("[a-d]*.py"))]
    rng = random.Random(0)
    odd = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 40))) for _ in range(1500)]
    blocks = ((0x20, 0x300), (0x300, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    rare = ["".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(12)) for _ in range(500)]
    runs = [c * k for c in " a=-\t\n" for k in range(60)] + ["x" + " " * k + "y" + " " * (k // 2) for k in range(60)]
    typed = ["<0x0A>", "[REF]x", " [REF] b[/REF] ", "[REFERENCE_DOC_1]", "[REFERENCE_DOC_12] a", "[INST", "▁", "a▁▁b"]
    lines = [*odd, *rare, *runs, *typed]
    return lines + [line for text in sources for line in text.split("\n")][: 10_000 - len(lines)]
