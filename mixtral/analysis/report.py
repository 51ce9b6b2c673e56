"""Routing as text for a terminal: load strips, a table of layers by experts, and text coloured by expert.

A load is the share of a layer's assignments that each expert got; E experts have a fair share of 1/E each.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from rich.color import Color
from rich.color_triplet import ColorTriplet
from rich.style import Style
from rich.table import Table
from rich.text import Text

HEIGHTS, HEIGHTS_ASCII = "▁▂▃▄▅▆▇█", ".:-=+*#@"
EIGHTHS = " ▏▎▍▌▋▊▉"
BAR_CELLS = 6  # the width of a bar, which is full at twice the fair share
MOST_BARS = 8  # experts; beyond that the bars would not fit 80 columns and a layer becomes one strip

_BELOW, _FAIR, _ABOVE = (60, 130, 250), (150, 150, 150), (250, 70, 50)  # blue, grey, red; on dark and light grounds


def load_strip(load: Sequence[float], ascii_only: bool = False) -> str:
    """One character an expert, as high as its share: half height is the fair share, full height twice that or more.

    `ascii_only` is for consoles that cannot show blocks (rich's `console.options.ascii_only` says so).
    """
    heights = HEIGHTS_ASCII if ascii_only else HEIGHTS
    return "".join(heights[min(max(round(4 * share * len(load)), 1), 8) - 1] for share in load)


def load_bar(ratio: float, ascii_only: bool = False) -> str:
    """A horizontal bar for a share of `ratio` times the fair one: half of BAR_CELLS at 1, all of them at 2 or more."""
    if ascii_only:
        return "#" * round(BAR_CELLS * min(ratio, 2) / 2)
    full, eighths = divmod(round(8 * BAR_CELLS * min(ratio, 2) / 2), 8)
    return ("█" * full + EIGHTHS[eighths]).rstrip()


def load_style(ratio: float) -> Style:
    """From blue (no tokens) over grey (the fair share, a ratio of 1) to red (twice the fair share or more)."""
    ratio = min(max(ratio, 0.0), 2.0)
    start, end, part = (_BELOW, _FAIR, ratio) if ratio < 1 else (_FAIR, _ABOVE, ratio - 1)
    rgb = (round(a + part * (b - a)) for a, b in zip(start, end, strict=True))
    return Style(color=Color.from_triplet(ColorTriplet(*rgb)))


def routing_table(
    layers: Sequence[Sequence[float]], title: str, ascii_only: bool = False, numbers: Sequence[int] | None = None,
    width: int = 80,
) -> Table:  # fmt: skip
    """A row a layer: each expert's load as a bar, the largest and the smallest load as multiples of the fair share.

    Fits 80 columns up to 64 experts: above MOST_BARS, or in less than 80 columns, a layer's loads are one strip
    instead of bars. Layers may have different numbers of experts.

    Args:
        numbers: of the layers; 0, 1, ... by default.
        width: columns that there are.
    """
    experts = max(map(len, layers))
    bars = experts <= MOST_BARS and width >= 80
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for name in range(experts) if bars else [f"experts 0 to {experts - 1}"]:
        table.add_column(str(name), min_width=BAR_CELLS, no_wrap=bars)
    table.add_column("max", justify="right")
    table.add_column("min", justify="right")
    for number, load in zip(range(len(layers)) if numbers is None else numbers, layers, strict=True):
        ratios = [share * len(load) for share in load]
        cells = [Text(load_bar(ratio, ascii_only), load_style(ratio)) for ratio in ratios]
        cells += [Text()] * (experts - len(load))
        row = cells if bars else [_coloured_strip(load, ascii_only)]
        table.add_row(str(number), *row, f"{max(ratios):.2f}", f"{min(ratios):.2f}")
    return table


def _coloured_strip(load: Sequence[float], ascii_only: bool) -> Text:
    strip = load_strip(load, ascii_only)
    return Text.assemble(*((c, load_style(share * len(load))) for c, share in zip(strip, load, strict=True)))


def tokens_by_expert(pieces: Sequence[str], experts: Sequence[int]) -> Text:
    """The text of `pieces`, each on the colour of its expert (arXiv 2401.04088, figure 8); -1 (none) is left plain."""
    return Text.assemble(*((p, expert_style(e)) for p, e in zip(pieces, experts, strict=True)))


def text_by_expert(pieces: Sequence[str], experts: Sequence[int]) -> Text:
    """The text of `pieces` without colour: [3] stands before each stretch of tokens whose expert is 3; [-] for none."""
    parts, before = [], None
    for piece, expert in zip(pieces, experts, strict=True):
        if expert != before:
            parts.append(f"[{expert if expert >= 0 else '-'}]")
        parts.append(piece)
        before = expert
    return Text("".join(parts))


def expert_legend(n_experts: int) -> Text:
    """The experts' numbers on their colours."""
    return Text(" ").join(Text(f" {e} ", expert_style(e)) for e in range(n_experts))


def expert_style(expert: int) -> Style:
    """Black on a colour of the expert's own: hues a golden ratio apart stay distinct however many there are."""
    if expert < 0:
        return Style()
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(expert * 0.618034 % 1, 0.45, 0.95))
    return Style(color="black", bgcolor=Color.from_rgb(red, green, blue))
