"""A path's way through `mixtral.load`: which files of the package it is handed to, and how straight that is.

    python tools/load_path.py FOLDER

Printed: each time that a function in another file gets the path of the folder, or of a file in it, as an argument,
indented by the depth of such calls; then how many different files that are, how often the path turns back up (comes to
a file on a higher import row than the one before it), and how often it comes back to a file that it had left.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import mixtral
from mixtral.lm import load
from mixtral.shipped import model_folder

PACKAGE = Path(mixtral.__file__).parent
ROOT = PACKAGE.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a model folder, GGUF file, or mixtral-nano")
    parser.add_argument("--quiet", action="store_true", help="the figures alone")
    options = parser.parse_args()
    entered = way(options.folder)
    if not options.quiet:
        for depth, name in entered:
            print(f"{'  ' * depth}{name}")
    names = [name for _, name in entered]
    rows = [row_of(name) for name in names]
    turns = sum(row > before for before, row in pairwise(rows))
    returns = sum(name in names[:i] for i, name in enumerate(names))
    print(f"{len(set(names))} files entered, {turns} turns back up, {returns} returns to a file left before")


def way(folder: str) -> list[tuple[int, str]]:
    """(depth, file) each time that the path comes into another file of the package."""
    entered: list[tuple[int, str]] = []
    stack: list[str | None] = []  # for each call that goes on, the file that got the path with it
    inside = str(model_folder(folder).absolute())

    def look(frame: FrameType, event: str, _argument: Any) -> None:
        name = frame.f_code.co_filename
        if not name.startswith(str(PACKAGE)):
            return
        if event == "call":
            file = str(Path(name).relative_to(PACKAGE)) if _has_path(frame, inside) else None
            holders = [holder for holder in stack if holder]
            if file and (not holders or holders[-1] != file):
                depth = sum(i == 0 or holders[i - 1] != holder for i, holder in enumerate(holders))
                if not entered or entered[-1] != (depth, file):
                    entered.append((depth, file))
            stack.append(file)
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(look)
    try:
        load(inside, device="cpu")
    finally:
        sys.setprofile(None)
    return entered


def _has_path(frame: FrameType, inside: str) -> bool:
    """Whether one of a call's arguments is the path, or one in it."""
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
    values = (frame.f_locals.get(name) for name in names)
    return any(isinstance(value, str | Path) and str(value).startswith(inside) for value in values)


def row_of(name: str) -> int:
    """The import row of a file (tests/test_architecture.py)."""
    sys.path.insert(0, str(ROOT))
    from tests import test_architecture

    found: int = test_architecture.row_of(name.removesuffix(".py"))
    return found


if __name__ == "__main__":
    main()
