from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mixtral.lm import load
from mixtral.model import Ragged
from mixtral.quant import compare as compare_module
from mixtral.quant.compare import compare, distances
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from tests.quant.models import SHAPES, make_folder, tokens

SEQUENCES = [tokens(40), tokens(20, seed=1)]


def test_a_model_and_itself(tmp_path: Path) -> None:
    model = load(make_folder(tmp_path / "model"), dtype="fp32", device="cpu").model
    same = compare(model, model, SEQUENCES)
    assert same.tokens == 58
    for part in (same.whole, *same.parts):
        assert (part.kl, part.agreement, part.perplexity) == (0, 1, same.perplexity)


def test_figures_by_hand(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    quantise_folder(folder, tmp_path / "q", QuantScheme.of("4"))
    plain, quantised = load(folder, dtype="fp32", device="cpu"), load(tmp_path / "q", dtype="fp32", device="cpu")
    told: list[tuple[str, int, int]] = []
    got = compare(plain.model, quantised.model, SEQUENCES[:1], lambda *args: told.append(args))
    p, q = (lm.logits(SEQUENCES[0][:-1]).log_softmax(-1) for lm in (plain, quantised))
    next_T = torch.tensor(SEQUENCES[0][1:])
    assert got.perplexity == pytest.approx(math.exp(-p[torch.arange(39), next_T].mean()), rel=1e-5)
    assert got.whole.perplexity == pytest.approx(math.exp(-q[torch.arange(39), next_T].mean()), rel=1e-5)
    assert got.whole.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert got.whole.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert told == [("comparing", 1, 1)]


def test_tokens_without_a_target_are_not_counted(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    quantise_folder(folder, tmp_path / "q", QuantScheme.of("4"))
    plain, quantised = (load(f, dtype="fp32", device="cpu", runner="torch").model for f in (folder, tmp_path / "q"))
    batch, targets_T = Ragged.of([tokens(30), tokens(9, seed=1)]), torch.tensor(tokens(39, seed=2))
    targets_T[::3] = -100
    itself, other = distances(plain, {"q": quantised}, [(batch, targets_T)])
    p, q = (model(batch).logits.log_softmax(-1)[targets_T >= 0] for model in (plain, quantised))
    next_n = targets_T[targets_T >= 0]
    assert (itself.what, itself.kl, itself.agreement, other.what) == ("plain", 0, 1, "q")
    assert itself.perplexity == pytest.approx(math.exp(-p.gather(1, next_n[:, None]).mean()), rel=1e-5)
    assert other.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_some_rows_at_a_time_are_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "model")
    quantise_folder(folder, tmp_path / "q", QuantScheme.of("4"))
    plain, quantised = (load(f, dtype="fp32", device="cpu", runner="torch").model for f in (folder, tmp_path / "q"))
    whole = compare(plain, quantised, SEQUENCES)
    monkeypatch.setattr(compare_module, "_BLOCK_BYTES", 7 * 4 * 4 * plain.config.vocab_size)  # 7 rows of 4 models
    cut = compare(plain, quantised, SEQUENCES)
    for got, wanted in zip((cut.whole, *cut.parts), (whole.whole, *whole.parts), strict=True):
        assert (got.what, got.agreement) == (wanted.what, wanted.agreement)
        assert (got.perplexity, got.kl) == pytest.approx((wanted.perplexity, wanted.kl), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_part_at_a_time(tmp_path: Path, shape: str) -> None:
    folder = make_folder(tmp_path / "model", **SHAPES[shape])
    quantise_folder(folder, tmp_path / "q", QuantScheme.of("4"))
    plain, quantised = (load(f, dtype="fp32", device="cpu", runner="torch").model for f in (folder, tmp_path / "q"))
    before = dict(plain.state_dict())
    got = compare(plain, quantised, SEQUENCES)
    tied = shape == "tied"
    assert [part.what for part in got.parts] == ["layer 0", "layer 1", *([] if tied else ["output"])]
    assert all(0 < part.kl < 2 * got.whole.kl for part in got.parts) and got.whole.kl < 0.05
    assert plain.state_dict().keys() == before.keys()  # the models themselves are as they were
