from __future__ import annotations

import pytest

from mixtral import errors
from mixtral.errors import ConfigError, DataError, MixtralError, UsageError, WeightsError, did_you_mean


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
    assert did_you_mean("zzz", ["tiny", "small"]) == "known: small, tiny"
