"""Source lines, built-in corpora, and the order of files."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mixtral.data.corpora import TASKS_AT_A_TIME, list_files
from mixtral.data.readers import BadInput
from mixtral.data.sources import Source, documents
from mixtral.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("stdlib", Source("stdlib")),
        ("stdlib=0.7", Source("stdlib", 0.7)),
        ("a.jsonl?field=body", Source("a.jsonl", field="body")),
        ("a.jsonl?field=body=3e-1", Source("a.jsonl", 0.3, field="body")),
        ("packages?max_bytes=900", Source("packages", max_bytes=900)),
        ("reasoning-gym:logic?level=1", Source("reasoning-gym:logic", level=1)),
        ("reasoning-gym?max_bytes=900&seed=5=2", Source("reasoning-gym", 2.0, max_bytes=900, seed=5)),
        ("a.txt?domain=prose=2", Source("a.txt", 2.0, domain="prose")),
        ("hf:org/name:config=2", Source("hf:org/name:config", 2.0)),
        ("/data/day=monday/a.txt", Source("/data/day=monday/a.txt")),
    ],
)
def test_parse(spec: str, source: Source) -> None:
    assert Source.parse(spec) == source


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "name is empty"),
        ("stdlib=0", "weight must be a positive number"),
        ("reasoning-gym?level=-1", "level must be 0 or more, not -1"),
        ("stdlib?max_bytes=0", "max_bytes must be a positive number"),
        ("stdlib?max_bytes=many", "max_bytes must be a whole number, not 'many'"),
        ("a.jsonl?fields=x", "unknown option 'fields'; did you mean 'field'"),
    ],
)
def test_parse_refuses(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Source.parse(spec)


def test_stdlib_has_code_and_prose_but_no_tests() -> None:
    files = list_files("stdlib")
    assert {file.domain for file in files} == {"code", "prose"}
    names = {file.name for file in files}
    assert "json/decoder.py" in names and "pydoc_data/if" in names
    assert not [name for name in names if "test" in name.split("/")[:-1]]
    found = list(documents(Source("stdlib", max_bytes=600_000), BadInput()))
    assert 600_000 <= sum(len(document.text.encode()) for document in found) < 700_000
    assert {document.domain for document in found} == {"code", "prose"}  # a slice is a mixture too


def test_packages() -> None:
    found = list(documents(Source("packages", max_bytes=20_000), BadInput()))
    assert found and {document.domain for document in found} == {"code"}


def test_packages_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one/a.py", "one/tests/b.py", "two/c.py", "two/deep/d.py", "three.py", "one_more/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import os\n")
    monkeypatch.setattr("mixtral.data.corpora.sysconfig.get_path", lambda _: str(tmp_path))
    assert {file.name for file in list_files("packages:three+two")} == {"two/c.py", "two/deep/d.py", "three.py"}
    assert list_files("packages:one+one") == list_files("packages:one")
    assert [file.name for file in list_files("packages:one")] == ["one/a.py"]
    assert len(list_files("packages")) == 5
    with pytest.raises(UsageError, match="no sources of a package 'tow' installed here; did you mean 'two'"):
        list_files("packages:one+tow")


def test_folder_order_and_domains_do_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    for name in ("x/one.txt", "x/two.md", "y/three.txt", "four.txt"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(f"text of {name}")
    (tmp_path / "a" / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "a" / ".hidden.txt").write_text("hidden")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "a")
    first = list(documents(Source(str(tmp_path / "a")), BadInput()))
    second = list(documents(Source(str(tmp_path / "elsewhere" / "a")), BadInput()))
    assert [(d.text, d.domain) for d in first] == [(d.text, d.domain) for d in second]
    assert {d.text: d.domain for d in first} == {
        "text of x/one.txt": "x", "text of x/two.md": "x", "text of y/three.txt": "y", "text of four.txt": "a",
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no name that is not UTF-8")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """The domain is written as JSON, which has no such text."""
    for name in (b"\xe9.txt", b"\xe8/a.txt", b"fine/a.txt"):
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "corpus"), name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name!r}")
    source = Source(str(tmp_path / "corpus"))
    assert {file.domain for file in list_files(source.name)} == {"corpus", "\ufffd", "fine"}
    assert len(list(documents(source, BadInput(False)))) == 3 and source.inputs() == source.inputs()
    assert list_files(str(tmp_path / os.fsdecode(b"corpus/\xe9.txt")))[0].domain == "\ufffd"


def test_missing_path_and_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such file or folder"):
        list(documents(Source(str(tmp_path / "nowhere")), BadInput(skip=True)))
    with pytest.raises(DataError, match="no text in this folder"):
        list(documents(Source(str(tmp_path)), BadInput(skip=True)))


def test_inputs_change_with_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = Source(str(path)).inputs()
    assert Source(str(path), weight=2.0).inputs() == before
    os.utime(path, ns=(1, 1))
    assert Source(str(path)).inputs() != before
    assert Source("hf:a").inputs() != Source("hf:b").inputs()
    assert Source("reasoning-gym").inputs()["content"].startswith("reasoning-gym ")


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("reasoning-gym", "reasoning_gym", "tasks"), ("hf:x", "datasets", "data")]
)
def test_missing_extra_is_named(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf'pip install "mixtral\[{extra}\]"'):
        list(documents(Source(name), BadInput()))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r'pip install "mixtral\[data\]"'):
        list(documents(Source(str(path)), BadInput()))


@pytest.fixture
def reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's entry points in place of the library, which takes seconds to import. `sums` has a curriculum."""

    class Tasks:
        def __init__(self, config: dict[str, int]) -> None:
            self.config = config

        def __iter__(self) -> Iterator[dict[str, object]]:
            print("noise")
            first, level = self.config["seed"], self.config.get("level", "")
            for number in range(first, first + self.config["size"]):
                yield {"question": f"{type(self).__name__}{level} {number}?", "answer": number}

    class Curriculum:
        def set_global_level(self, level: int) -> None:
            self.level = level

        def generate_configuration(self, given: dict[str, int]) -> dict[str, int]:
            return {**given, "level": self.level}

    categories = {"sums": "arithmetic", "primes": "arithmetic", "knights": "logic", "sudoku": "games", "cubes": "games"}
    kinds = {n: type(n, (Tasks,), {"__module__": f"reasoning_gym.{c}.{n}"}) for n, c in categories.items()}
    factory = ModuleType("reasoning_gym.factory")
    factory.DATASETS = {name: (kind, dict) for name, kind in kinds.items()}  # type: ignore[attr-defined]
    factory.has_curriculum = lambda name: name == "sums"  # type: ignore[attr-defined]
    factory.create_curriculum = lambda name: Curriculum()  # type: ignore[attr-defined]  # noqa: ARG005
    monkeypatch.setitem(sys.modules, "reasoning_gym", ModuleType("reasoning_gym"))
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


@pytest.mark.usefixtures("reasoning_gym")
def test_reasoning_gym_is_seeded_and_goes_on() -> None:
    first, again, other = (
        list(documents(Source("reasoning-gym", max_bytes=6_000, seed=seed), BadInput())) for seed in (1, 1, 2)
    )
    assert first == again
    texts = [document.text for document in first]
    assert len(set(texts)) == len(texts) > 4 * TASKS_AT_A_TIME and not set(first) & set(other)
    assert texts[0] == "cubes 1000003?\n1000003"
    assert {document.domain for document in first} == {"cubes", "knights", "primes", "sums"}


@pytest.mark.usefixtures("reasoning_gym")
def test_a_level_of_difficulty() -> None:
    found = list(documents(Source("reasoning-gym:arithmetic", max_bytes=2_000, level=3), BadInput()))
    assert found[0].text == "primes 0?\n0"  # it has no curriculum
    assert next(d.text for d in found if d.domain == "sums") == "sums3 0?\n0"


@pytest.mark.usefixtures("reasoning_gym")
@pytest.mark.parametrize(
    ("part", "generators"),
    [("arithmetic", {"primes", "sums"}), ("knights", {"knights"}), ("logic+sums", {"knights", "sums"})],
)
def test_a_part_of_reasoning_gym(part: str, generators: set[str]) -> None:
    found = documents(Source(f"reasoning-gym:{part}", max_bytes=3_000), BadInput())
    assert {document.domain for document in found} == generators


@pytest.mark.usefixtures("reasoning_gym")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reasoning-gym:arithmetics", "unknown 'arithmetics'; did you mean 'arithmetic'"),
        ("reasoning-gym:sums+sudoku", "unknown 'sudoku'; known: arithmetic, cubes"),  # one of those left out
        ("stdlib:cod", "unknown part 'cod'; did you mean 'code'"),
    ],
)
def test_an_unknown_part(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(documents(Source(name), BadInput()))


@pytest.mark.parametrize("part", ["code", "prose"])
def test_a_part_of_the_standard_library(part: str) -> None:
    files = list_files(f"stdlib:{part}")
    assert {file.domain for file in files} == {part}
    assert files == [file for file in list_files("stdlib") if file.domain == part]


def test_the_tests_of_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("test/test_os.py", "test/json_tests/test_dump.py", "test/badsyntax.py", "test/empty.py", "os.py",
                 "test/encoded_modules/koi8_r.py"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else "import os\n")
    monkeypatch.setattr("mixtral.data.corpora.sysconfig.get_path", lambda _: str(tmp_path))
    files = list_files("stdlib:tests")
    assert {file.domain for file in files} == {"tests"}
    assert {file.name for file in files} == {"test/test_os.py", "test/json_tests/test_dump.py"}


def test_a_python_without_its_tests_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral.data.corpora.sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=r"no tests in .*; this Python came without them"):
        list_files("stdlib:tests")


def test_hugging_face_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "", "two"], "id": [1, 2, 3]}).save_to_disk(str(tmp_path / "set"))
    name = f"hf:{tmp_path / 'set'}"
    assert [d.text for d in documents(Source(name), BadInput())] == ["one", "two"]
    with pytest.raises(DataError, match="no column 'body'; this data set has: text, id"):
        list(documents(Source(name, field="body"), BadInput()))
    with pytest.raises(DataError, match="row 1: column 'id' holds int"):
        list(documents(Source(name, field="id"), BadInput()))
    with pytest.raises(DataError, match="cannot be loaded"):
        list(documents(Source(f"hf:{tmp_path}"), BadInput()))
