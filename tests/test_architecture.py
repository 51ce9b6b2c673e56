"""The house rules that a machine can hold: who imports whom, sizes, forbidden calls, and the README's tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mixtral"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file imports only from strictly lower rows, or from its own folder; files of row 0 may also import each other.
# The longest name that fits a file decides its row. `__init__` and `__main__` are the package's own doors, on top.
ROWS = {
    "cores errors files hardware runtime shipped json_files logs system hub extensions native_file": 0,
    "config gguf": 0,
    "weights/safetensors_file weights/torch_file weights/finite": 0,
    "kernels tokenizer": 1,
    "moe quant/formats": 2,
    "model quant/layers": 3,
    "presets shapes weights data distributed": 4,
    "engine quant": 5,
    "model_folder": 6,
    "lm analysis surgery": 7,
    "train eval": 8,
    "llm": 8,
    "recipes server": 9,
    "commands extend": 10,
    "cli": 11,
    "__init__ __main__": 12,
}
ROW_OF = {name: row for names, row in ROWS.items() for name in names.split()}

# What a folder must not import even where the rows would allow it, and outside packages that belong to one folder.
NEVER = {
    "moe": {"mixtral/quant"},
    "model": {"mixtral/quant"},
    "engine": {"fastapi", "starlette", "uvicorn", "http"},
    "server": {"torch", "numpy"},
}
ONLY_KERNELS = {"triton", "ctypes", "cffi", "torch/utils/cpp_extension"}
NOBODY = {"pickle", "dill", "cloudpickle", "joblib"}

MAX_FUNCTION, MAX_FILE = 80, 400


def name_of(file: Path) -> str:
    """moe/router for mixtral/moe/router.py, moe for mixtral/moe/__init__.py, __init__ for mixtral/__init__.py."""
    name = file.relative_to(PACKAGE).with_suffix("").as_posix()
    return name.removesuffix("/__init__")


def row_of(name: str) -> int:
    parts = name.split("/")
    candidates = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    known = [ROW_OF[candidate] for candidate in candidates if candidate in ROW_OF]
    assert known, f"mixtral/{name} has no row: add it to ROWS and to docs/architecture.md"
    return known[0]


def imports(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """(line, slashed name) of every import anywhere in a file: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.replace(".", "/")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import; write the whole name"
            source = (node.module or "").replace(".", "/")
            yield from ((node.lineno, f"{source}/{alias.name}") for alias in node.names)


def is_within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}/") for package in packages)


def target(name: str) -> str | None:
    """The file that an imported mixtral/... name lies in, by name_of; None for the package's own attributes."""
    inner = name.removeprefix("mixtral").strip("/")
    parts = inner.split("/") if inner else []
    for n in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:n])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return "/".join(parts[:n])
    return None


def import_faults(file: Path) -> Iterator[str]:
    name = name_of(file)
    folder, row = name.split("/")[0], row_of(name)
    for line, imported in imports(ast.parse(file.read_text()), file):
        where = f"{file.relative_to(ROOT)}:{line} imports {imported.replace('/', '.')}"
        if is_within(imported, NOBODY):
            yield f"{where}: loading it runs code from the file"
        if is_within(imported, ONLY_KERNELS) and folder not in ("kernels", "native_file"):
            yield f"{where}: only mixtral/kernels may"
        if is_within(imported, NEVER.get(folder, set())):
            yield f"{where}: mixtral/{folder} never may"
        inner = target(imported) if is_within(imported, {"mixtral"}) else None
        if inner is None or inner.split("/")[0] == folder or row > row_of(inner) or row == row_of(inner) == 0:
            continue
        yield f"{where}: row {row} may not import row {row_of(inner)}"


def call_faults(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        where, called = f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func)
        if called.endswith("torch.load"):
            safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            if not safe:
                yield f"{where}: torch.load without weights_only=True"
        if called.endswith("load_library") and name_of(file).split("/")[0] != "kernels":
            yield f"{where}: only mixtral/kernels loads native libraries"


def size_faults(file: Path) -> Iterator[str]:
    text = file.read_text()
    lines = text.count("\n")
    if lines > MAX_FILE:
        yield f"{file.relative_to(ROOT)}: {lines} lines, at most {MAX_FILE}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{file.relative_to(ROOT)}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}"


@pytest.mark.parametrize("check", [import_faults, call_faults, size_faults])
def test_every_file_keeps_the_rules(check: object) -> None:
    assert callable(check) and FILES
    faults = [fault for file in FILES for fault in check(file)]
    assert not faults, "\n" + "\n".join(faults)


def readme_tree() -> dict[str, str]:
    """Path -> description from the README's block that starts with `mixtral/`; two spaces a level, folders end in /."""
    block = re.search(r"^```\w*\nmixtral/.*?\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block, "README.md has no block of code that starts with the line mixtral/"
    found: dict[str, str] = {}
    above: list[str] = []
    for line in block[1].splitlines():
        name, _, description = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[: depth - 1], name]
        if not name.endswith("/"):
            found["".join(above)] = description.strip()
    return found


def real_tree() -> set[str]:
    """Every file of the package; empty formalities (__init__.py of folders, py.typed), what is built, and the parts of
    the model that ships, for which its card stands, are left out."""
    card = "nano/README.md"
    files = {f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob("*") if f.is_file() and f.suffix != ".so"}
    files = {f for f in files if f == card or not f.startswith("nano/")}
    return {f for f in files if "__pycache__" not in f and not f.endswith("/__init__.py") and f != "py.typed"}


def test_readme_tree_is_the_real_one() -> None:
    told, real = readme_tree(), real_tree()
    missing, gone = sorted(real - set(told)), sorted(set(told) - real)
    assert not missing, f"README.md's tree lacks {missing}"
    assert not gone, f"README.md's tree names files that are not there: {gone}"
    assert not (mute := sorted(f for f, text in told.items() if not text)), f"README.md says nothing about {mute}"


# -- the checks themselves can fail ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("moe/a.py", "import mixtral.model.batch", "row 2 may not import row 3"),
        ("moe/a.py", "def f():\n    from mixtral.model import batch", ":2 imports mixtral.model.batch"),
        ("moe/a.py", "if TYPE_CHECKING:\n    from mixtral.model.batch import Packed", "row 2 may not import row 3"),
        ("tokenizer.py", "import mixtral.kernels", "row 1 may not import row 1"),
        ("errors.py", "from mixtral import kernels", "row 0 may not import row 1"),
        ("model/a.py", "from mixtral.quant.formats import Format", "mixtral/model never may"),
        ("engine/a.py", "import fastapi.responses", "mixtral/engine never may"),
        ("weights/a.py", "import triton.language as tl", "only mixtral/kernels may"),
        ("weights/a.py", "import ctypes", "only mixtral/kernels may"),
        ("data/a.py", "from pickle import load", "runs code"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, source: str,
                                     fault: str) -> None:
    package = tmp_path / "mixtral"
    for name in (file, "model/__init__.py", "model/batch.py", "kernels/__init__.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    (package / file).write_text(source)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert fault in "\n".join(import_faults(package / file))


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("moe/a.py", "from mixtral.errors import UsageError\nfrom mixtral.moe import b", None),
        ("kernels/a.py", "import ctypes\ntorch.ops.load_library('x')", None),
        ("config.py", "import mixtral.errors", None),
        ("weights/a.py", "torch.load(p, weights_only=True)", None),
        ("weights/a.py", "torch.load(p)", "without weights_only=True"),
        ("weights/a.py", "torch.load(p, weights_only=False)", "without weights_only=True"),
        ("weights/a.py", "torch.ops.load_library('x')", "only mixtral/kernels loads"),
        ("moe/a.py", "def f():\n" + "    x = 1\n" * 80, "f has 81 lines, at most 80"),
        ("moe/a.py", "x = 1\n" * 401, "401 lines, at most 400"),
    ],
)
def test_other_faults_are_found_and_good_code_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str,
                                                     source: str, fault: str | None) -> None:
    package = tmp_path / "mixtral"
    for name in (file, "errors.py", "moe/b.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    (package / file).write_text(source)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = [f for check in (import_faults, call_faults, size_faults) for f in check(package / file)]
    assert (fault in "\n".join(found)) if fault else not found
