from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixtral.analysis import expert_legend, load_strip, routing_table, text_by_expert, tokens_by_expert
from mixtral.analysis.report import load_bar, load_style


def drawn(what: Table | Text, width: int = 80) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(what)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("experts", [1, 2, 8, 64])
def test_fair_share_is_half_height(experts: int) -> None:
    assert load_strip([1 / experts] * experts) == "▄" * experts
    assert load_strip([1 / experts] * experts, ascii_only=True) == "=" * experts


def test_heights_grow_and_are_clipped() -> None:
    assert load_strip([0, 0.25, 0.5, 0.25]) == "▁▄█▄"
    assert load_strip([1, 0, 0, 0]) == "█▁▁▁"
    assert load_strip([1 / 32, 2 / 32, 3 / 32, 5 / 32, 6 / 32, 7 / 32, 8 / 32, 0]) == "▁▂▃▅▆▇█▁"
    assert load_strip([0, 0.25, 0.5, 0.25], ascii_only=True) == ".=@="


@pytest.mark.parametrize(("ratio", "bar"), [(0, ""), (1, "███"), (2, "██████"), (9, "██████"), (0.5, "█▌")])
def test_bars(ratio: float, bar: str) -> None:
    assert load_bar(ratio) == bar


def test_bars_in_ascii() -> None:
    assert [load_bar(ratio, ascii_only=True) for ratio in (0, 1, 3)] == ["", "###", "######"]


def test_colours_go_from_blue_to_red() -> None:
    def rgb(ratio: float) -> tuple[int, ...]:
        color = load_style(ratio).color
        assert color is not None and color.triplet is not None
        return tuple(color.triplet)

    assert rgb(0) == (60, 130, 250) and rgb(1) == (150, 150, 150) and rgb(2) == rgb(7) == (250, 70, 50)
    reds = [rgb(n / 10)[0] for n in range(21)]
    assert reds == sorted(reds)


def test_table_tells_the_extremes() -> None:
    lines = drawn(routing_table([[0.125] * 8, [0.5, 0.0625, *[0.4375 / 6] * 6]], "Routing"))
    assert lines[0].strip() == "Routing" and lines[1].split() == ["layer", *map(str, range(8)), "max", "min"]
    assert lines[2].split() == ["0", *["███"] * 8, "1.00", "1.00"]
    assert lines[3].split()[:2] == ["1", "██████"] and lines[3].split()[-2:] == ["4.00", "0.50"]


@pytest.mark.parametrize("experts", [2, 4, 8, 9, 16, 64])
def test_table_fits_80_columns(experts: int) -> None:
    lines = drawn(routing_table([[1 / experts] * experts] * 32, "Routing"), width=200)
    assert len(lines) == 34 and max(len(line.rstrip()) for line in lines) <= 80
    assert ("▄" * experts in lines[2]) == (experts > 8)


@pytest.mark.parametrize("experts", [8, 16])
def test_table_in_ascii(experts: int) -> None:
    assert "".join(drawn(routing_table([[1 / experts] * experts], "Routing", ascii_only=True))).isascii()


def test_tokens_keep_their_text_and_share_colours_by_expert() -> None:
    text = tokens_by_expert(["de", "f ", "add", "\n"], [3, 0, 3, -1])
    assert text.plain == "def add\n"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["de"] == styles["add"] != styles["f "]
    assert not styles.get("\n")


def test_tokens_and_experts_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        tokens_by_expert(["a", "b"], [0])


def test_legend_has_a_colour_for_every_expert() -> None:
    legend = expert_legend(64)
    assert drawn(legend, width=400)[0].split() == [str(e) for e in range(64)]
    assert len({str(span.style) for span in legend.spans}) == 64


def test_text_without_colour_names_the_expert_of_each_stretch() -> None:
    assert text_by_expert(["de", "f ", "add", "\n", "x"], [3, 3, 0, -1, 0]).plain == "[3]def [0]add[-]\n[0]x"
    with pytest.raises(ValueError):
        text_by_expert(["a", "b"], [0])


def test_less_than_80_columns_get_strips() -> None:
    layers = [[0.125] * 8, [0.5, 0.5, 0, 0, 0, 0, 0, 0]]
    assert "experts 0 to 7" in "".join(drawn(routing_table(layers, "t", width=40), 40))
    assert "experts 0 to 7" not in "".join(drawn(routing_table(layers, "t", width=80)))
