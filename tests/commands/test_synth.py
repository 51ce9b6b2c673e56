"""`mixtral synth` in this process: what it writes loads and runs, and what it refuses."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from mixtral.config import ModelConfig
from mixtral.config.formats import read_config
from mixtral.kernels.packing import unpack
from mixtral.lm import LM, load
from mixtral.model import Mixtral
from mixtral.presets import PRESETS, preset
from mixtral.quant import synth
from mixtral.quant.formats import FORMATS, PLAIN
from mixtral.quant.load import empty_quantised, open_packed
from mixtral.quant.scheme import QuantScheme, read_scheme, stored_shapes, theoretical_bytes
from mixtral.quant.synth import _random_packed, write_random
from mixtral.weights.load import StateReader
from mixtral.weights.names import parameter_shapes
from tests.commands.conftest import Run

TOKENS = [1, 5, 900, 17, 42]


@pytest.mark.parametrize("bits", ["4", "8", "mixed", "16"])
def test_what_is_written_loads_and_runs(run: Run, bits: str, tmp_path: Path) -> None:
    code, out, err = run("synth", "tiny", tmp_path / "m", "--bits", bits)
    assert (code, err) == (0, "") and f"{tmp_path / 'm'}/config.json  " in out
    size = sum(file.stat().st_size for file in (tmp_path / "m").iterdir())
    config = preset("tiny")
    theory = config.weight_bytes() if bits == "16" else theoretical_bytes(config, QuantScheme.of(bits))
    assert theory <= size <= 1.01 * theory + 10_000
    lm = load(tmp_path / "m", dtype="fp32", device="cpu")
    assert lm.config == config and lm.tokenizer is None
    logits = lm.logits(TOKENS)
    assert logits.isfinite().all() and logits.std() > 0
    assert len(lm.generate(TOKENS, max_tokens=3, ignore_eos=True)) == 3


def test_the_seed_decides(run: Run, tmp_path: Path) -> None:
    seeds = {"a": "0", "b": "0", "c": "1"}
    for name, seed in seeds.items():
        assert run("synth", "tiny", tmp_path / name, "--bits", "4", "--seed", seed).code == 0
    a, b, c = ((tmp_path / name / "packed.safetensors").read_bytes() for name in seeds)
    assert a == b != c


@pytest.mark.parametrize("quantised", [True, False])
def test_two_layers_of_a_larger_model(quantised: bool, tmp_path: Path) -> None:
    """Their tensors alone are read, and are a model of two layers."""
    config = preset("tiny").replace(n_layers=5)
    two = config.replace(n_layers=2)
    write_random(config, tmp_path / "m", "4" if quantised else "16")
    assert read_config(tmp_path / "m") == config
    model = _two_quantised_layers(tmp_path / "m", two) if quantised else _two_layers(tmp_path / "m", config, two)
    lm = LM(model)
    assert lm.logits(TOKENS).isfinite().all() and len(lm.routing(TOKENS)) == 2


def _two_quantised_layers(folder: Path, two: ModelConfig) -> Mixtral:
    recipe = read_scheme(folder)
    assert recipe is not None
    model = empty_quantised(two, recipe, PLAIN[torch.float32], torch.float32)
    raw = (file := open_packed(folder, read_config(folder), recipe)).mapped()
    state = {}
    for name in stored_shapes(two, recipe):
        tensor = raw[name].view(file.headers[name].dtype).view(file.headers[name].shape)
        state[name] = tensor if tensor.dtype == torch.uint8 else tensor.float()
    model.load_state_dict(state, assign=True)
    return model


def _two_layers(folder: Path, config: ModelConfig, two: ModelConfig) -> Mixtral:
    reader = StateReader(folder, config)
    with torch.device("meta"):
        model = Mixtral(two)
    model.load_state_dict({name: reader.read(name).float() for name in parameter_shapes(two)}, assign=True)
    return model


@pytest.mark.parametrize("name", FORMATS)
def test_weights_have_the_spread_and_range(name: str) -> None:
    fmt = FORMATS[name]
    packed = _random_packed(fmt, 0, "w", fmt.packed_shape((64, 128)), 0.02)
    q_ND, scale_NG = unpack(packed, name, 64, 128)
    assert scale_NG is not None and scale_NG.unique().numel() == 1
    assert math.isclose(q_ND.float().std() * scale_NG[0, 0], 0.02, rel_tol=0.03)
    assert (q_ND.min(), q_ND.max()) == (fmt.low, fmt.high) and q_ND.unique().numel() == fmt.high - fmt.low + 1


def test_16_bits_have_the_spread(tmp_path: Path) -> None:
    write_random(preset("tiny"), tmp_path / "m", "16")
    lm = load(tmp_path / "m", dtype="fp32", device="cpu", runner="torch")
    w = lm.model.state_dict()["layers.0.ffn.experts.w13"]
    assert 0.7 < w.std() / lm.config.init_std < 1.4 and abs(w.mean()) < 0.02 * w.std()
    assert (lm.model.state_dict()["norm.weight"] == 1).all()


@pytest.mark.parametrize("name", PRESETS)
def test_published_shapes_have_no_padding(name: str) -> None:
    """The padding of a block is to hold zeros, and random bits are written everywhere."""
    config, recipe = preset(name), QuantScheme.of("4")
    stored = [math.prod(shape) for name, shape in stored_shapes(config, recipe).items() if name.endswith("_packed")]
    weights = [math.prod(shape) for name, shape in parameter_shapes(config).items() if recipe.format(name)]
    assert 8 * sum(stored) == 4.5 * sum(weights)


def test_the_size_of_8x7b() -> None:
    config = preset("mixtral-8x7b")
    assert 26.4e9 < theoretical_bytes(config, QuantScheme.of("4")) < 26.6e9


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mixtral-8x8b", "out", "--bits", "4"], 2, "unknown preset 'mixtral-8x8b'; did you mean 'mixtral-8x"),
        (["tiny", "out", "--bits", "5"], 2, "bits: unknown choice '5'; known: 16, 4, 8, mixed"),
        (["tiny", "full", "--bits", "4"], 2, "full: exists already; a new or empty folder is wanted"),
        (["tiny", "file/out", "--bits", "4"], 1, "cannot write file/out: "),
        (["tiny", "out"], 2, "Missing option '--bits'"),
    ],
)
def test_failures(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int,
                  message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("precious")
    (tmp_path / "file").write_text("a file, where a folder is wanted")
    got = run("synth", *arguments)
    assert (got.code, got.out) == (code, "") and got.err.count("\n") == 1 and message in got.err
    assert (tmp_path / "full/kept").read_text() == "precious" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", ["4", "16"])
def test_a_disk_without_room(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 3 * 10**9))
    got = run("synth", "mixtral-8x7b", tmp_path / "deep" / "out", "--bits", bits)
    needed = {"4": "26.5", "16": "93.4"}[bits]
    assert got.code == 1 and f"deep/out: {needed} GB are needed, and 3.0 GB are free on its disk" in got.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", ["4", "16"])
def test_what_goes_wrong_on_the_way_leaves_nothing(bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that cannot be made, and a file that is found damaged afterwards."""

    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    for part in ("random_bytes", "open_packed" if bits == "4" else "StateReader"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of luck"):
            patch.setattr(synth, part, broken)
            write_random(preset("tiny"), tmp_path / "m", bits)
        assert not list(tmp_path.iterdir())
