"""The walkthrough notebook: every cell runs, its checks bite, and the file holds the outputs that it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from torch import Tensor

NOTEBOOK = Path(__file__).parent.parent / "examples" / "walkthrough.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}

STEPS = [
    "RMSNorm", "SwiGLU", "router weights", "sparse layer, naive", "dispatched rows", "combine", "sparse layer, sorted",
    "collapse: loss", "its gradient, E f / T", "attention", "logits of the whole model", "norm of all gradients",
    "weights after the step, output.weight", "temperature 0.0", "temperature 0.8",
]  # fmt: skip


def run(*ids: str) -> None:
    """Run cells in one namespace, as a notebook does."""
    names: dict[str, Any] = {"__name__": "walkthrough"}
    for cell in ids:
        exec(compile(CODE[cell], f"{NOTEBOOK.name}:{cell}", "exec"), names)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Pictures are drawn without a screen; -> those that were shown."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: list[Any] = []

    def show() -> None:
        for number in pyplot.get_fignums():
            shown.append(pyplot.figure(number))
            shown[-1].canvas.draw()
        pyplot.close("all")

    monkeypatch.setattr(pyplot, "show", show)
    return shown


@pytest.mark.filterwarnings("error::UserWarning")
def test_every_cell_runs(pictures: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(*CODE)
    told = capsys.readouterr().out
    assert masked(told) == masked(stored_text())
    for step in STEPS:
        assert re.search(f"^{step}: .*same .*as the package", told, re.MULTILINE), step
    assert len(pictures) == 6 and all(figure.axes for figure in pictures)


def masked(text: str) -> list[str]:
    """What is held to the package, without numbers: another processor rounds otherwise, and learns another text."""
    return [re.sub(r"[\d.,]+(e[-+]?\d+)?", "#", line) for line in text.splitlines() if "same as the package" in line]


def stored_text() -> str:
    outputs = (output for cell in CELLS if cell["cell_type"] == "code" for output in cell["outputs"])
    return "".join("".join(output.get("text", "")) for output in outputs)


def wrong_weights(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """The chosen scores without the division by their sum."""
    return logits_TE.softmax(-1).gather(1, experts_TK)


def wrong_combine(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, place_TK: Tensor) -> Tensor:
    """Rows taken as if they lay in token order."""
    del order_N, place_TK
    return (y_ND.unflatten(0, weights_TK.shape) * weights_TK[:, :, None]).sum(1)


def wrong_shares(scores_TE: Tensor) -> Tensor:
    return scores_TE.square()


@pytest.mark.parametrize(
    ("name", "wrong", "cell"),
    [
        ("mixtral.moe.router.choice_weights", wrong_weights, "router-code"),
        ("mixtral.kernels.combine", wrong_combine, "layer-code"),
        ("mixtral.moe.losses.score_shares", wrong_shares, "balance-code"),
        ("mixtral.kernels.rotary", lambda x_THC, *_: x_THC, "attention-code"),
    ],
)
def test_a_wrong_package_is_noticed(name: str, wrong: object, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [i for i in list(CODE)[: list(CODE).index(cell)] if not i.endswith("-picture")]
    monkeypatch.setattr(name, wrong)
    run(*before)
    with pytest.raises(AssertionError, match="differs by"):
        run(*before, cell)


def test_the_pictures_are_stored() -> None:
    """As the page of a code host shows them, without running anything."""
    outputs = [output for cell in CELLS if cell["cell_type"] == "code" for output in cell["outputs"]]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6 and all(len(picture) > 5000 for picture in pictures)
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))  # run from top to bottom
