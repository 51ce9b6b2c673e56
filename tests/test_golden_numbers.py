from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import golden_numbers


def compared(capsys: pytest.CaptureFixture[str], tmp_path: Path, *records: object) -> tuple[int, str]:
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for file, record in zip(files, records, strict=True):
        file.write_text(json.dumps(record))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["golden_numbers.py", "compare", *map(str, files)])
        code = golden_numbers.main()
    return code, capsys.readouterr().out


def test_equal_records(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = {"a": {"b": [1, 2.5], "c": "x"}, "d": 3}
    assert compared(capsys, tmp_path, record, record) == (0, "3 equal, 0 differ\n")


def test_what_differs_is_named_with_both_values(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out = compared(capsys, tmp_path, {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})
    assert code == 1
    assert out == "a | c\n  before 2\n  after  3\nd\n  before not there\n  after  4\n1 equal, 2 differ\n"


def test_a_failure_is_recorded_and_differs_from_a_result() -> None:
    record: golden_numbers.Record = {}
    golden_numbers.attempt(record, "good", lambda: 7)
    golden_numbers.attempt(record, "bad", lambda: [][0])
    assert record["good"] == 7 and record["bad"].startswith("failed: IndexError")
