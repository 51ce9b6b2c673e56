"""The study's scripts are no package: they import each other by file name, from their own folder."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "studies" / name) for name in ("balancing", "nano")]

from corpus import DOMAINS  # noqa: E402
from measure import prepare_held_out  # noqa: E402

from mixtral.tokenizer import train_bpe  # noqa: E402

WORDS = {
    "arithmetic": "1 2 34 + - * = sum 7".split(),
    "code": "def return self ( ) : if x".split(),
    "logic": "all some no knights are knaves".split(),
    "prose": "the object of a class is called when".split(),
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT/corpus, with OUT/tokenizer beside it: as the study makes them, of a few words a domain."""
    out = tmp_path_factory.mktemp("study")
    draw = random.Random(0)
    assert set(WORDS) == set(DOMAINS)
    for part, count in (("train", 60), ("held_out", 30)):
        (out / "corpus" / part).mkdir(parents=True)
        for domain, words in WORDS.items():
            texts = [" ".join(draw.choices(words, k=60)) for _ in range(count)]
            lines = [json.dumps({"text": text}) for text in texts]
            (out / "corpus" / part / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    (out / "corpus" / "held_out" / "noise.jsonl").write_text(json.dumps({"text": "# ~ " * 400}) + "\n")
    tokenizer = train_bpe([" ".join(words) for words in WORDS.values()] * 20, 320)
    (out / "tokenizer").mkdir()
    tokenizer.save(out / "tokenizer")
    prepare_held_out(out / "corpus", tokenizer)
    return out / "corpus"
