"""The model inside the package: that it is whole, small, and a language model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import mixtral
from mixtral.config.formats import read_config
from mixtral.engine import recommended
from mixtral.lm import LM
from mixtral.recipes import recipe
from mixtral.shipped import FOLDER, SHIPPED, model_folder
from mixtral.tokenizer.train import CONTROL


@pytest.fixture(scope="module")
def nano() -> LM:
    return mixtral.load(SHIPPED)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder("mixtral-nano") == FOLDER and model_folder("./mixtral-nano") == Path("mixtral-nano")
    assert model_folder("runs/x") == Path("runs/x")


def test_the_folder_is_small_and_has_its_card() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 16_000_000
    card = (FOLDER / "README.md").read_text()
    for part in ("Data", "Recipe", "curve.png", "Scores", "Limits"):
        assert part in card, part


def test_it_says_how_it_is_best_drawn_from() -> None:
    found = recommended(FOLDER)
    assert found.keys() == {"temperature", "top_p"} and 0 < found["temperature"] < 1


def test_it_was_trained_by_the_recipe() -> None:
    recorded = json.loads((FOLDER / "training.json").read_text())["train"]
    assert recorded == json.loads(json.dumps(recipe("nano").to_dict()))
    config = recipe("nano").model
    assert read_config(FOLDER).n_params() == config.n_params()


def test_its_tokenizer_reserves_the_control_tokens_of_v3(nano: LM) -> None:
    assert nano.tokenizer is not None and nano.tokenizer.version == "v3"
    ids = nano.tokenizer.encode(" ".join(CONTROL["v3"]), bos=False)
    assert not set(ids) & set(range(3, 3 + len(CONTROL["v3"])))  # typed by a user they are text


def test_it_knows_python_from_other_text(nano: LM) -> None:
    """Bits a byte of code, and of the same characters in another order."""
    assert nano.tokenizer is not None
    code = "def __init__(self, name=None):\n    self.name = name\n    self.lock = threading.Lock()\n"
    bits = {}
    for kind, text in {"code": code, "reversed": code[::-1]}.items():
        ids = nano.tokenizer.encode(text)
        logprobs_TV = nano.logits(ids).log_softmax(-1)
        nats = -sum(float(logprobs_TV[t, token]) for t, token in enumerate(ids[1:]))
        bits[kind] = nats / math.log(2) / len(text)
    assert bits["code"] < 1.5 and bits["reversed"] > 2 * bits["code"]


def test_it_writes_indented_python(nano: LM) -> None:
    text = nano.generate("def fibonacci(n):", max_tokens=60)
    assert text.startswith("\n    ")
