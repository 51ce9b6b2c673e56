"""What one sees while training: every figure, in lines that a terminal of 100 columns does not wrap."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mixtral.moe.stats import LayerStats
from mixtral.train.display import TerminalDisplay, figures_line, layer_line
from mixtral.train.metrics import Speed
from mixtral.train.step import StepResult, Validation
from tests.train.tiny_run import train_config

LAYER = LayerStats([0.25, *[0.125] * 5, 0.125, 0.0], 2.0, 0.1562, 0.98, 0.1, 0.46, 1)
RESULT = StepResult(cross_entropy=3.41234, aux={}, grad_norm=0.8211, lr=1e-3, layers=[LAYER] * 3)
SPEED = Speed(1.0, 5210.4, 0.409, 912_000_000)
FIGURES = "loss 3.412  1.89 b/B  grad 0.82  5,210 tok/s  41 % of peak matmul  0.9 GB"


def seen(terminal: bool, width: int = 100) -> str:
    """What three steps of 1,000 and a validation leave on a console, with all that a live panel has drawn."""
    file = io.StringIO()
    display = TerminalDisplay(Console(file=file, force_terminal=terminal, width=width, _environ={}, color_system=None))
    config = train_config(model={"n_layers": 4, "experts_by_layer": (4, 1, 4, 4)}, steps=1000)  # layer 1 is dense
    with display.live(config, 0):
        for step in (1, 2, 3):
            display.step(step, RESULT, 1.894, SPEED)
        display.panel.refresh()
        display.validation(3, Validation(3.5, 1.95, []))
    return file.getvalue()


def test_a_step_in_figures() -> None:
    assert figures_line(RESULT, 1.894, SPEED) == FIGURES
    unmeasured = SPEED._replace(share_of_peak=None)
    assert figures_line(RESULT, 1.894, unmeasured) == FIGURES.replace("  41 % of peak matmul", "")


def test_a_layer_in_figures() -> None:
    assert layer_line(LAYER) == "█▄▄▄▄▄▄▁  max/mean 2.00  gini 0.16  entropy 0.98  1 dead"
    assert layer_line(LAYER._replace(dropped=0.032)).endswith("1 dead  3.2 % dropped")
    assert layer_line(LAYER, blocks=False).startswith("@======.  max/mean")


@pytest.mark.parametrize("width", [100, 80])
def test_the_panel_does_not_wrap(width: int) -> None:
    lines = seen(terminal=True, width=width).splitlines()
    assert any(line.strip().endswith(FIGURES) for line in lines)
    assert any("step 3/1000" in line and "left" in line for line in lines)
    assert any(line.strip() == f"layer 3   {layer_line(LAYER)}" for line in lines)
    assert "step 3: validation 3.5000 nats a token, 1.9500 bits a byte" in "".join(lines)


def test_plain_lines_where_there_is_no_terminal() -> None:
    """One for the first step, then none for ten seconds."""
    first, validation = seen(terminal=False).splitlines()
    assert first == f"step 1/1000  {FIGURES}" and validation.startswith("step 3: validation 3.5000")
