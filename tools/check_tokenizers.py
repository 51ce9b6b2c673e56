#!/usr/bin/env python3
"""Holds every kind of tokenizer to transformers' ids, and every text to itself: `tools/check_tokenizers.py [LINES]`.

10,000 lines by default, of seed 0 (tests/tokenizer/lines.py): code, languages, emoji, runs of blanks, control
characters, lone combining marks, line ends, zero-width characters, right-to-left text, unassigned code points. Where
transformers does not read a file rightly (a bare tokenizer.model), the ids are held to sentencepiece's. A tokenizer
that went through GGUF is held to what it was before. Prints a table; fails when a line differs. Takes some minutes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mixtral.tokenizer import load_tokenizer  # noqa: E402
from tests.tokenizer.kinds import GGUF, KINDS, check, check_gguf  # noqa: E402
from tests.tokenizer.lines import make_lines  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="?", type=int, default=10_000, metavar="LINES", help="how many (default 10000)")
    logging.disable(logging.WARNING)  # transformers' remarks
    lines = make_lines(parser.parse_args().lines)
    print(f"{len(lines):,} lines, {sum(len(line.encode()) for line in lines):,} bytes, seed 0")
    print(f"{'kind':34} {'vocabulary':>10} {'ids held to':15} {'other ids':>9} {'other texts':>11} {'seconds':>7}")
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        for name, kind in KINDS.items():
            folder = Path(place) / name.replace(" ", "-")
            kind.make(folder)
            for label, run in ((name, check), *([(f"{name}, by GGUF", check_gguf)] if name in GGUF else [])):
                started = time.perf_counter()
                oracle, ids, texts = run(name, folder, lines)
                size, seconds = load_tokenizer(folder).vocab_size, time.perf_counter() - started
                print(f"{label:34} {size:10,} {oracle:15} {ids:9,} {texts:11,} {seconds:7.1f}", flush=True)
                failed += ids + texts
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
