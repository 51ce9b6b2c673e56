from __future__ import annotations

import pytest

from mixtral.commands.common import bytes_text, rate_text, shown


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (128 * 1024, "128 KiB"), (93405585408, "86.99 GiB"), (2**40, "1.00 TiB"), (2**52, "4096.00 TiB")],
)
def test_bytes(n_bytes: int, text: str) -> None:
    assert bytes_text(n_bytes) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(12, "12 B/s"), (45.2e9, "45.2 GB/s"), (999.6e9, "1 TB/s"), (1.05e12, "1.05 TB/s"), (989e12, "989 TB/s")],
)
def test_rates(rate: float, text: str) -> None:
    assert rate_text(rate, "B/s") == text


def test_a_terminal_gets_control_characters_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2Jb\rc\x00\x7f\x9b\td\né ∑ 👩‍🚀"
    assert shown(text) == text  # a file or pipe gets every byte
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert shown(text) == r"a\x1b[2Jb\x0dc\x00\x7f\x9b" + "\td\né ∑ 👩‍🚀"
