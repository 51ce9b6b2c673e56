"""The read kernel: it reads every word, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mixtral.kernels.native import library as native

pytestmark = pytest.mark.skipif(bool(native.available()), reason=native.available())


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("count", [0, 1, 2, 95, 1000, 32767, 32768, 32769, 98403])
def test_the_sum_is_right_at_every_size(count: int) -> None:
    """Large numbers, so that sums wrap around and a word read twice or not at all shows."""
    words = torch.randint(-(2**63), 2**63 - 1, (count + 1,))[1:]
    assert native.read_sum(words) == sum(words.tolist()) % 2**64


def test_a_measurement_is_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which passes take 1, 4 and 2 seconds: the median is 2."""
    ticks = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])
    monkeypatch.setattr(native.time, "perf_counter", lambda: next(ticks))
    assert native.measure_read(n_bytes=8003, seconds=0.1) == 8000 / 2
