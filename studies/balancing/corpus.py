"""The study's text: four labelled domains, each with a held-out part, and text of no trained domain.

    FOLDER/train/DOMAIN.jsonl      what runs train on
    FOLDER/held_out/DOMAIN.jsonl   what they are measured on: the same for every run and seed
    FOLDER/held_out/OTHER.jsonl    out of domain

Which documents are held out is decided by their text alone.
"""

from __future__ import annotations

import json
import random
import string
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mixtral.data.readers import BadInput
from mixtral.data.sources import Source, documents, text_digest
from mixtral.files import atomic_folder, atomic_write

# In the order of their names, in which training counts domains too. Of the logic tasks circuit_logic is left out: it
# draws its circuits, and most of the domain's bytes would be lines.
DOMAINS = {
    "arithmetic": "reasoning-gym:arithmetic",
    "code": "stdlib:code",
    "logic": "reasoning-gym:aiw+knights_knaves+propositional_logic+self_reference+syllogism",
    "prose": "stdlib:prose",
}
OTHER = ("c", "games", "noise")  # Python's C headers; tasks of other categories; random printable characters


def build(folder: Path, domain_bytes: int, held_out_bytes: int) -> None:
    """Write the corpus, unless it is there: of each domain up to `domain_bytes`, and `held_out_bytes` apart from them.

    The standard library's prose has less than half a megabyte; the others are cut at `domain_bytes`.
    """
    if folder.exists():
        return
    with atomic_folder(folder) as new:
        for domain, name in DOMAINS.items():
            texts = _read(name, domain_bytes + held_out_bytes)
            train, held_out = split(texts, held_out_bytes)
            _write(new / "train" / f"{domain}.jsonl", train)
            _write(new / "held_out" / f"{domain}.jsonl", held_out)
        for other, texts in _others(held_out_bytes).items():
            _write(new / "held_out" / f"{other}.jsonl", texts)


def split(texts: list[str], held_out_bytes: int) -> tuple[list[str], list[str]]:
    """(train, held out): in the order of their digests, documents are held out until they have that many bytes.

    One that is longer than a quarter of it is trained on, so that at least four are held out.
    """
    train, held_out, size = [], [], 0
    for text in sorted(set(texts), key=text_digest):
        length = len(text.encode())
        if size < held_out_bytes and length <= held_out_bytes / 4:
            held_out.append(text)
            size += length
        else:
            train.append(text)
    return train, held_out


def _read(name: str, max_bytes: int) -> list[str]:
    return [document.text for document in documents(Source(name, max_bytes=max_bytes), BadInput(skip=True))]


def _others(max_bytes: int) -> dict[str, list[str]]:
    """Text of no trained domain; C headers are left out where Python came without them."""
    found = {"games": _read("reasoning-gym:games+graphs", max_bytes), "noise": list(_noise(max_bytes))}
    headers = sorted(Path(sysconfig.get_path("include")).glob("*.h"))
    if texts := [path.read_text(errors="ignore") for path in headers]:
        found["c"] = texts
    return found


def _noise(max_bytes: int) -> Iterator[str]:
    draw = random.Random(0)
    for _ in range(max(1, max_bytes // 1000)):
        yield "".join(draw.choices(string.printable, k=1000))


def _write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
