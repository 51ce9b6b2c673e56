"""Moments against those of the whole model run at once, and every expert's, whatever its share of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixtral.config.formats import read_config
from mixtral.lm import LM, load
from mixtral.model import Ragged
from mixtral.moe import Experts
from mixtral.quant import calibrate
from mixtral.quant.calibrate import second_moments
from mixtral.quant.scheme import part_of
from mixtral.weights import parameter_shapes
from mixtral.weights.load import StateReader
from tests.quant.models import SHAPES, make_folder, tokens

SEQUENCES = [tokens(60), tokens(9, seed=1), tokens(40, seed=2)]


def moments_of(folder: Path) -> dict[str, Tensor]:
    config = read_config(folder)
    return second_moments(StateReader(folder, config), config, SEQUENCES)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_quantised_matrix_has_its_moments(tmp_path: Path, shape: str) -> None:
    folder = make_folder(tmp_path / "model", **SHAPES[shape])
    found = moments_of(folder)
    shapes = {name: shape for name, shape in parameter_shapes(read_config(folder)).items() if part_of(name)}
    assert found.keys() == shapes.keys()
    for name, moments in found.items():
        d, stacked = shapes[name][-1], ".experts." in name
        assert moments.shape == ((shapes[name][0], d) if stacked else (d,) if ".ffn." in name else (d, d))
        squares = moments.diagonal() if moments.shape == (d, d) and not stacked else moments
        assert moments.isfinite().all() and (squares > 0).all()


def seen_by(lm: LM, wanted: dict[str, str]) -> dict[str, Tensor]:
    """Inputs of modules of a whole model that runs all sequences at once."""
    seen: dict[str, Tensor] = {}
    for name, module in lm.model.named_modules():
        if name in wanted:
            module.register_forward_pre_hook(lambda _m, inputs, name=name: seen.update({wanted[name]: inputs[0]}))
    lm.model(Ragged.of(SEQUENCES))
    return seen


def test_the_means_are_those_of_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_BATCH", 50)  # several batches
    folder = make_folder(tmp_path / "model")
    names = {f"layers.{i}.attention.{w}": f"layers.{i}.attention.{w}.weight" for i in (0, 1) for w in ("wqkv", "wo")}
    seen = seen_by(load(folder, dtype="fp32", device="cpu", runner="torch"), names | {"output": "output.weight"})
    found = moments_of(folder)
    assert len(seen) == 5
    for name, x_TD in seen.items():
        mean_DD = x_TD.T @ x_TD / len(x_TD)
        torch.testing.assert_close(found[name], mean_DD, rtol=1e-4, atol=1e-5 * float(mean_DD.max()))


def one_expert_is_never_taken(folder: Path) -> LM:
    """A model whose last layer's router gives expert 3 a logit far below all others."""
    lm = load(make_folder(folder / "base"), dtype="fp32", device="cpu", runner="torch")
    router, norm = lm.model.layers[1].ffn.router, lm.model.layers[1].ffn_norm
    norm.weight.fill_(1.0)
    lm.model.embedding.weight[:, 0] += 5  # every token then has a large input 0
    router.weight[3] = 0
    router.weight[3, 0] = -100
    lm.save(folder / "model")
    return lm


def test_an_expert_without_tokens_is_calibrated_on_its_own_hidden_units(tmp_path: Path) -> None:
    lm = one_expert_is_never_taken(tmp_path)
    ids = [token for sequence in SEQUENCES for token in sequence]
    assert not any((lm.routing(sequence)[1].experts_TK == 3).any() for sequence in SEQUENCES)
    found = moments_of(tmp_path / "model")
    x_TD = seen_by(lm, {"layers.1.ffn": "x"})["x"]
    assert len(x_TD) == len(ids) < calibrate.SAMPLE  # so all of them are in the sample
    w13, w2 = found["layers.1.ffn.experts.w13"], found["layers.1.ffn.experts.w2"]
    assert torch.allclose(w13[3], x_TD.square().mean(0), rtol=1e-4)
    experts = lm.model.layers[1].ffn.experts
    assert isinstance(experts, Experts)
    gate_TF, up_TF = (x_TD @ w_FD.T for w_FD in experts.w13[3])
    assert torch.allclose(w2[3], (torch.nn.functional.silu(gate_TF) * up_TF).square().mean(0), rtol=1e-3)


def test_the_sample_is_small_beside_what_an_expert_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "model")
    rows: list[int] = []
    monkeypatch.setattr(calibrate, "SAMPLE", 10)

    def counted(self: calibrate._Moments, name: str, x_nD: Tensor, pairs: bool = False) -> None:
        rows.append(len(x_nD))
        add(self, name, x_nD, pairs)

    monkeypatch.setattr(calibrate._Moments, "add", counted)
    moments_of(folder)
    assert min(rows) >= 10 and 109 in rows and sum(rows) < 2 * (2 * 109 + 2 * (2 * 109 + 4 * 14)) + 109 + 1


add = calibrate._Moments.add
