from __future__ import annotations

import pickle
import time

import pytest

from mixtral import errors
from mixtral.errors import ConfigError, DataError, MixtralError, UsageError, WeightsError, did_you_mean, one_line, shown


def test_misuse_exits_with_2_and_failure_with_1() -> None:
    assert [e.exit_code for e in (UsageError, ConfigError)] == [2, 2]
    assert [e.exit_code for e in (MixtralError, WeightsError, DataError)] == [1, 1, 1]


def test_every_error_is_ours_and_prints_its_message() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) >= 5
    for cls in classes:
        with pytest.raises(MixtralError, match=r"^what, where$"):
            raise cls("what, where")


def test_did_you_mean_names_the_nearest_or_all() -> None:
    assert did_you_mean("mixtral-8x7", ["tiny", "mixtral-8x7b"]) == "did you mean 'mixtral-8x7b'?"
    assert did_you_mean("tyni", ["tiny", "nano"]) == "did you mean 'tiny'?"
    assert did_you_mean("zzz", ["tiny", "small"]) == "known: small, tiny"


def test_a_key_of_any_length_is_looked_up_at_once() -> None:
    start = time.process_time()
    assert did_you_mean("k" * 4_000_000, ["tiny", "small"]) == "known: small, tiny"
    assert time.process_time() - start < 0.2


def test_a_message_is_one_short_line_whatever_it_quotes() -> None:
    assert str(UsageError("a\x1b[31m\nb\u202e\ud800")) == "a\\x1b[31m b\\u202e\\ud800"
    long = str(UsageError(f"/folder/config.json: unknown field {'x' * 5000}; did you mean 'dim'?"))
    assert long.startswith("/folder/config.json: unknown field xxx") and long.endswith("xxx; did you mean 'dim'?")
    assert len(long) < 160 and "..." in long
    assert len(one_line("word " * 10_000_000)) < 600


def test_a_long_path_is_told_in_full_and_the_reason_after_it() -> None:
    path = "/" + "/".join(["folder"] * 45)
    assert one_line(f"{path}: no such file") == f"{path}: no such file"


def test_a_message_stays_what_it_is_when_it_passes_a_process() -> None:
    error = pickle.loads(pickle.dumps(UsageError("a\n" + "b" * 500)))
    assert isinstance(error, UsageError) and str(error) == str(UsageError("a\n" + "b" * 500))


def test_a_value_is_shown_short() -> None:
    for value in ("x" * 5000, 10**400, 10**5000, -(10**5000), [["y" * 500] * 9] * 9, {"z" * 99: {1: {2: 3}}}):
        assert len(shown(value)) <= 100


def test_a_short_value_is_shown_as_it_is() -> None:
    values = (None, True, 12, -1.5, "topk", [1, 2])
    assert [shown(value) for value in values] == ["None", "True", "12", "-1.5", "'topk'", "[1, 2]"]
