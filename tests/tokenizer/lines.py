"""Lines to hold tokenizers to: code, five languages, and what makes tokenizers stumble; the same ones every time."""

# ruff: noqa: RUF001 (quotation marks and signs of other languages)

from __future__ import annotations

import random
import sys
import sysconfig
import unicodedata
from collections.abc import Callable
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])

SENTENCES = {
    "en": ("The ferry leaves at a quarter past nine, unless it doesn't.", "She'd counted 1,024 gulls, or so she said"),
    "de": ("Während des Gewitters übte Jürgen völlig unbekümmert Geige.", "Große Füße heißen „Größe 48“, nicht wahr?"),
    "fr": ("L’été dernier, où étiez-vous ? À l’œuvre, bien sûr !", "« Çà et là », dit-il, « naît un garçon naïf. »"),
    "es": ("¿Cuándo volverá el pingüino? ¡Mañana, señor!", "El año pasado llovió más de lo que creíamos."),
    "ru": ("Ёж ещё не спит: он ждёт объявления поезда.", "Съешь этих булок, да выпей чаю — 3,5 рубля."),
    "ja": ("猫は庭で寝ています。", "「明日、東京タワーへ行きませんか？」と彼女は言った。"),
    "right to left": ("سأعود غدًا، إن شاء الله.", "שָׁלוֹם עוֹלָם, מה שלומך?"),
}
TYPED = ("<s>", "</s>", "<unk>", "[INST] hi [/INST]", "<|im_start|>user", "a<|im_end|>", "<0x0A>", "[REF]x", "<tag>b c",
         "a<tag> b", " <tag>", "[REFERENCE_DOC_1] a", "▁", "a▁▁b", "▁▁a", "Ġhe", "é€")  # fmt: skip
EMOJI = ("🙂", "👩‍👧", "👨🏽‍💻", "🏳️‍🌈", "🇩🇪", "❤️", "1️⃣", "🫠")
ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f\u202e\u202c"
COMBINING = "\u0301\u0308\u0327\u20dd\u093f\u0e49\u064b"
CONTROLS = "".join(map(chr, [*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029]))
_UNASSIGNED = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) == "Cn"]
_Maker = Callable[[random.Random], str]


def _words(rng: random.Random) -> str:
    return rng.choice(rng.choice(list(SENTENCES.values())))


def _blanks(rng: random.Random) -> str:
    runs = (rng.choice(" \t\u3000\u00a0") * rng.choice((1, 2, 3, 4, 7, 8, 15, 16, 40)) for _ in range(3))
    return "".join(run + rng.choice(("", "x", "=", _words(rng)[:9])) for run in runs)


def _some(alphabet: str | tuple[str, ...] | list[str]) -> _Maker:
    before = ("", " ", "a", "é")
    return lambda rng: "".join(rng.choice(before) + rng.choice(alphabet) for _ in range(rng.randint(1, 12)))


def _mixed(rng: random.Random) -> str:
    return "".join(rng.choice(_MAKERS[:-1])(rng)[: rng.randint(1, 12)] for _ in range(4))


_MAKERS: list[_Maker] = [
    _words, _blanks, _some(EMOJI), _some(ZERO_WIDTH), _some(COMBINING), _some(CONTROLS), _some(_UNASSIGNED),
    lambda rng: _words(rng).replace(" ", "\r\n"),
    lambda rng: rng.choice(TYPED) + rng.choice(("", " ", _words(rng))),
    lambda rng: "".join(map(chr, (rng.choice((rng.randint(32, 0xD7FF), rng.randint(0xE000, 0x10FFFF)))
                                  for _ in range(rng.randint(1, 12))))),
    lambda rng: rng.choice("a=-~中🙂\n") * rng.randint(1, 60),
    _mixed,
]  # fmt: skip


def make_lines(count: int, seed: int = 0) -> list[str]:
    """`count` lines: half of them code and prose of the standard library, the others made; no two sets differ."""
    rng = random.Random(seed)
    made = ["", " ", "a", " a", "  a", *TYPED, *(text for texts in SENTENCES.values() for text in texts)]
    made += [rng.choice(_MAKERS)(rng) for _ in range(count // 2 - len(made))]
    code: list[str] = []
    for file in sorted(STDLIB.glob("*.py")):
        code += file.read_text(encoding="utf-8", errors="replace").split("\n")
        if len(code) > 40 * count:
            break
    return made + rng.sample(code, count - len(made))
