"""The texts behind the name of a source: built-in corpora, data sets, and paths."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from mixtral.data.debian import debian_files, language_of, read_debian
from mixtral.data.readers import SUFFIXES, BadInput, checked_text, pieces, read_texts
from mixtral.errors import DataError, UsageError, did_you_mean, nearest
from mixtral.extensions import look_for

# Left out of the built-in corpora: tests, generated tables, bundled wheels. They are long and teach little.
EXCLUDED_FOLDERS = frozenset({
    "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data", "site-packages", "dist-packages",
    "__pycache__", "ensurepip",
})
# Tests that are wrong on purpose, or in another encoding than UTF-8.
EXCLUDED_TESTS = re.compile(r"bad.*|test_source_encoding\.py")
EXCLUDED_FILES = re.compile(r"_sysconfigdata.*|entities\.py|stringprep\.py|.*_pb2\.py|_?test_.*|.*_test\.py")
MAX_SOURCE_BYTES = 400_000  # a longer source file is nearly always a generated table

BUILT_IN = ("stdlib", "packages", "reasoning-gym", "debian")
TextSource = Callable[[str, int], Iterable[tuple[str, str]]]  # (part of the name, seed) -> (text, domain) each
SOURCES: dict[str, tuple[TextSource, Callable[[str], str]]] = {}  # of extensions, with what tells their version
STDLIB_PARTS = ("code", "tests", "prose")

# Generators of reasoning-gym that are left out: they need 0.1 s and more for one task, or sample from Python sets, so
# that the same seed gives other tasks in another process.
SLOW_TASKS = frozenset({
    "knight_swap", "futoshiki", "sokoban", "puzzle24", "intermediate_integration", "quantum_lock", "sudoku",
    "zebra_puzzles", "arc_agi", "rubiks_cube", "polynomial_equations",
})
UNSTABLE_TASKS = frozenset({
    "codeio", "countdown", "isomorphic_strings", "list_functions", "polynomial_multiplication", "ransom_note",
    "word_ladder",
})
LEFT_OUT_TASKS = SLOW_TASKS | UNSTABLE_TASKS | {"composite"}  # composite is made of other generators
TASKS_AT_A_TIME = 32  # of one generator, before the next one's turn


class File(NamedTuple):
    """One file of a source. `text` is set where the file only stands for a text that it holds."""

    name: str  # relative, so that order and domain do not depend on where the folder lies
    path: Path
    domain: str
    text: str | None = None


def texts(name: str, field: str, seed: int, level: int | None, bad: BadInput) -> Iterator[tuple[str, str]]:
    """(text, domain) of every document of the source called `name`."""
    base, _, part = name.partition(":")
    if added := _added(name):
        yield from added[0](part, seed)
    elif base == "reasoning-gym":
        yield from _reasoning_gym(seed, part, level)
    elif base == "hf":
        yield from _hugging_face(name, field, bad)
    elif name == "debian":
        for file in list_files(name):
            for piece in pieces(read_debian(file.path, bad)):
                yield piece, file.domain
    else:
        if base in ("stdlib", "packages"):
            bad = BadInput(skip=True)  # nobody can mend a file of an installed package
        for file in list_files(name):
            for text in [file.text] if file.text else read_texts(file.path, field, bad):
                yield text, file.domain


def _added(name: str) -> tuple[TextSource, Callable[[str], str]] | None:
    """A source that an extension has added (extend.py); a path that is there goes before it."""
    base = name.partition(":")[0]
    if base in BUILT_IN or base == "hf" or os.path.lexists(os.path.expanduser(name)):
        return None
    look_for(base, SOURCES)
    return SOURCES.get(base)


def check_name(name: str) -> None:
    """Raise UsageError or DataError when the source called `name` is not there; none of its texts is read."""
    base, _, part = name.partition(":")
    if _added(name):
        return
    if base == "reasoning-gym":
        _chosen_generators(part)
    elif base == "hf":
        _datasets_library(name)
    else:
        list_files(name)


def fingerprint(name: str) -> str:
    """Changes when the texts behind a name change: from names, sizes and times of files, or a package's version.

    A data set `hf:NAME` is taken not to change under its name.
    """
    if added := _added(name):
        return f"{name} {added[1](name.partition(':')[2])}"
    if name.partition(":")[0] == "reasoning-gym":
        return f"{name} {_version('reasoning-gym')}"
    if name.startswith("hf:"):
        return name
    digest = hashlib.sha256()
    for file in list_files(name):
        status = file.path.stat()
        digest.update(_bytes(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    return digest.hexdigest()


def list_files(name: str) -> list[File]:
    """The files of a source, ordered by a hash of their relative names: a slice by `max_bytes` is a fair sample."""
    base, _, part = name.partition(":")
    if base == "stdlib":
        files = _stdlib(part)
    elif base == "packages":
        files = _packages(part)
    elif name == "debian":
        files = [File(str(path), path, language_of(str(path))) for path in debian_files()]
    else:
        files = _path_files(Path(name).expanduser())
    return sorted(files, key=lambda file: (hashlib.sha256(_bytes(file.name)).digest(), file.name))


def _bytes(name: str) -> bytes:
    """A name as the file system has it, which may be no UTF-8."""
    return name.encode(errors="surrogateescape")


def _stdlib(part: str) -> list[File]:
    """Sources as "code", the language reference that `help()` shows as "prose", and the sources' own tests as "tests".

    `part` is one of them, or "" for the first two; a system may come without the tests.
    Docstrings are not taken out as prose of their own: they are in the sources, and a text that stood in two documents
    could be trained on in one and held out in the other.
    """
    from pydoc_data import topics

    if part not in ("", *STDLIB_PARTS):
        raise UsageError(f"data source stdlib:{part}: unknown part {part!r}; {did_you_mean(part, STDLIB_PARTS)}")
    library = Path(sysconfig.get_path("stdlib"))
    if part == "tests":
        return _test_files(library)
    path = Path(str(topics.__file__))
    code = _python_files(library) if part != "prose" else []
    prose = [File(f"pydoc_data/{key}", path, "prose", text) for key, text in topics.topics.items()]
    return code if part == "code" else [*code, *prose]


def _packages(part: str) -> list[File]:
    """The sources of installed packages: of all of them, or of those whose import names `part` lists."""
    folders = sorted({Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")})
    files = [file for folder in folders for file in _python_files(folder)]
    if not part:
        return files
    of_package: dict[str, list[File]] = {}
    for file in files:
        of_package.setdefault(file.name.partition("/")[0].removesuffix(".py"), []).append(file)
    for word in part.split("+"):
        if word not in of_package:
            hint = did_you_mean(word, of_package)
            raise UsageError(f"data source packages:{part}: no sources of a package {word!r} installed here; {hint}")
    return [file for word in dict.fromkeys(part.split("+")) for file in of_package[word]]


def _python_files(folder: Path) -> list[File]:
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS]  # os.walk enters only what is left here
        sources = (name for name in names if name.endswith(".py") and not EXCLUDED_FILES.fullmatch(name))
        for path in (Path(place, name) for name in sources):
            if _has_fair_size(path):
                files.append(File(path.relative_to(folder).as_posix(), path, "code"))
    return files


def _test_files(library: Path) -> list[File]:
    files = [
        File(path.relative_to(library).as_posix(), path, "tests")
        for path in (library / "test").rglob("*.py")
        if path.parent.name != "encoded_modules" and not EXCLUDED_TESTS.fullmatch(path.name) and _has_fair_size(path)
    ]
    if not files:
        raise DataError(f"data source stdlib:tests: no tests in {library / 'test'}; this Python came without them")
    return files


def _has_fair_size(path: Path) -> bool:
    """An empty __init__.py is no fault in an installed library, as an empty file that a user names would be."""
    return 0 < path.stat().st_size <= MAX_SOURCE_BYTES


def _path_files(path: Path) -> list[File]:
    if path.is_file():
        return [File(path.name, path, _bytes(path.stem).decode(errors="replace"))]
    if not path.is_dir():
        raise _no_such_path(path)
    files = []
    for found in path.rglob("*"):
        name = found.relative_to(path)
        if found.suffix in SUFFIXES and found.is_file() and not any(part.startswith(".") for part in name.parts):
            domain = name.parts[0] if len(name.parts) > 1 else path.name
            files.append(File(name.as_posix(), found, _bytes(domain).decode(errors="replace")))
    if not files:
        raise DataError(f"{path}: no text in this folder; looked for {' '.join(sorted(SUFFIXES))}")
    return files


def _no_such_path(path: Path) -> UsageError:
    """What may have been meant: the name of a built-in source, or a weight, which only a number can be."""
    target, equals, weight = str(path).rpartition("=")
    if equals and (target.partition(":")[0] in BUILT_IN or Path(target).exists()):
        return UsageError(f"data source {path}: the weight must be a positive number, not {weight!r}")
    known = nearest(str(path).partition(":")[0], BUILT_IN) if path.name == str(path) and not path.suffix else None
    hint = f"did you mean {known!r}?" if known else f"a source is a path, {', '.join(BUILT_IN)} or hf:NAME"
    return UsageError(f"{path}: no such file or folder; {hint}")


def _reasoning_gym(seed: int, part: str, level: int | None) -> Iterator[tuple[str, str]]:
    """Tasks as texts: the question, and the answer on the next line."""
    for task in reasoning_tasks(seed, part, level):
        yield f"{task.question}\n{task.answer}", task.generator


class Task(NamedTuple):
    """One of reasoning-gym's tasks."""

    generator: str
    question: str
    answer: str


def reasoning_tasks(seed: int, part: str = "", level: int | None = None) -> Iterator[Task]:
    """Tasks with their answers, each generator in turn, without end.

    The same seed gives the same tasks; an evaluation takes another seed.

    Args:
        part: chooses generators: categories of the library and names of generators, with `+` between them; "": all.
        level: of difficulty in each generator's curriculum, 0 the easiest; None, or no curriculum: its own defaults.
    """
    generators = _chosen_generators(part)
    for turn in count():
        for generator in generators:
            # Task i of a set is sampled with seed + i, so the turns of one seed must lie TASKS_AT_A_TIME apart.
            first = seed * 1_000_003 + turn * TASKS_AT_A_TIME
            with contextlib.redirect_stdout(io.StringIO()):  # some generators print while they search
                items = list(_data_set(generator, first, level))
            for item in items:
                yield Task(generator, str(item["question"]), str(item["answer"]))


def _data_set(generator: str, seed: int, level: int | None) -> Iterable[dict[str, Any]]:
    from reasoning_gym.factory import DATASETS, create_curriculum, has_curriculum

    kind, defaults = DATASETS[generator]
    given = {"size": TASKS_AT_A_TIME, "seed": seed}
    if level is None or not has_curriculum(generator):
        made: Iterable[dict[str, Any]] = kind(config=defaults(**given))
        return made
    curriculum = create_curriculum(generator)
    curriculum.set_global_level(level)
    made = kind(config=curriculum.generate_configuration(given))
    return made


def _chosen_generators(part: str) -> list[str]:
    """The names of generators of the installed library that `part` chooses."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UsageError('reasoning-gym is not installed: pip install "mixtral[tasks]"') from error
    return _generators({name: entry[0].__module__ for name, entry in DATASETS.items()}, part)


def _generators(modules: dict[str, str], part: str) -> list[str]:
    """The names of generators that `part` chooses; `modules` has where each is defined, reasoning_gym.CATEGORY.NAME."""
    open_to = {name: module for name, module in modules.items() if name not in LEFT_OUT_TASKS}
    if not part:
        return sorted(open_to)
    categories: dict[str, set[str]] = {}
    for name, module in open_to.items():
        categories.setdefault(module.split(".")[1], set()).add(name)
    chosen: set[str] = set()
    for word in part.split("+"):
        if word not in categories and word not in open_to:
            known = [*categories, *open_to]
            raise UsageError(f"data source reasoning-gym:{part}: unknown {word!r}; {did_you_mean(word, known)}")
        chosen |= categories.get(word, {word})
    return sorted(chosen)


def _datasets_library(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f'{name}: the datasets library is not installed: pip install "mixtral[data]"') from error
    return datasets


def _hugging_face(name: str, field: str, bad: BadInput) -> Iterator[tuple[str, str]]:
    datasets = _datasets_library(name)
    target, _, config = name.removeprefix("hf:").partition(":")
    try:
        rows: Any = (
            datasets.load_from_disk(target)
            if Path(target).is_dir()
            else datasets.load_dataset(target, config or None, split="train")
        )
        rows = rows["train"] if isinstance(rows, dict) else rows
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{name}: cannot be loaded: {str(error).splitlines()[0]}") from error
    if field not in rows.column_names:
        raise DataError(f"{name}: no column {field!r}; this data set has: {', '.join(rows.column_names)}")
    for row, record in zip(count(1), rows.select_columns([field]), strict=False):
        if (text := checked_text(record[field], f"column {field!r}", f"{name}, row {row}", bad)) is not None:
            yield text, target


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"missing, Python {sys.version_info.major}.{sys.version_info.minor}"
