"""Weights that are not finite, or would not be in the written type: refused by name by every writer, or allowed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral.cli import main
from mixtral.errors import UsageError, WeightsError
from mixtral.kernels.packing import unpack
from mixtral.lm import LM, _one_dtype, load
from mixtral.model import Mixtral
from mixtral.quant.formats import INT4, INT8, quantise
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.quant.synth import write_random
from mixtral.weights import convert, load_state, save_hf, save_mistral
from mixtral.weights.finite import is_finite
from mixtral.weights.gguf_write import write_gguf
from tests.weights.weight_states import SPARSE, random_state

CONFIG = SPARSE.replace(dim=32, ffn_dim=64, head_dim=8, n_heads=4, n_kv_heads=2, vocab_size=32)
OURS = "layers.1.ffn.experts.w2"
HF, MISTRAL, GGUF = (
    "model.layers.1.block_sparse_moe.experts.3.w2.weight", "layers.1.feed_forward.experts.3.w2.weight",
    "blk.1.ffn_down_exps.weight",
)  # fmt: skip
NAN, INF = math.nan, math.inf
Write = Callable[..., object]


def state_with(value: float) -> dict[str, Tensor]:
    state = random_state(CONFIG)
    state[OURS][3, 5, 7] = value
    return state


def to_lm(state: dict[str, Tensor], path: Path, **options: bool) -> None:
    model = Mixtral(CONFIG)
    model.load_state_dict(state)
    LM(model, None).save(path, **options)


def through_folder(write: Write) -> Write:
    """A writer that starts from a folder, which holds what it is given."""

    def run(state: dict[str, Tensor], path: Path, **options: bool) -> None:
        save_hf(state, CONFIG, path.parent / "source", allow_nonfinite=True)
        write(path.parent / "source", path, **options)

    return run


WRITERS: dict[str, tuple[Write, str]] = {  # -> writer of a state, the name that it must tell
    "save_hf": (lambda s, p, **o: save_hf(s, CONFIG, p, **o), HF),
    "save_hf fused": (lambda s, p, **o: save_hf(s, CONFIG, p, fused=True, **o), "layers.1.mlp.experts.down_proj"),
    "save_mistral": (lambda s, p, **o: save_mistral(s, CONFIG, p, **o), MISTRAL),
    "LM.save": (to_lm, HF),
    "convert hf": (through_folder(lambda s, p, **o: convert(s, p, "hf", **o)), HF),
    "convert mistral": (through_folder(lambda s, p, **o: convert(s, p, "mistral", **o)), MISTRAL),
    "quantise 8": (through_folder(lambda s, p, **o: quantise_folder(s, p, QuantScheme.of("8"), **o)), OURS),
    "quantise 4": (through_folder(lambda s, p, **o: quantise_folder(s, p, QuantScheme.of("4"), **o)), OURS),
    **{
        f"gguf {type}": (lambda s, p, type=type, **o: write_gguf(s, CONFIG, p.with_suffix(".gguf"), type, **o), GGUF)
        for type in ("bf16", "q8_0", "q4_0")
    },
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_weight_that_is_not_finite(writer: str, value: float, tmp_path: Path) -> None:
    write, name = WRITERS[writer]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(WeightsError) as error:
            write(state_with(value), tmp_path / "out")
    assert name in str(error.value) and "allow-nonfinite" in str(error.value) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}  # nothing half-written


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("writer", WRITERS)
def test_it_is_written_when_allowed(writer: str, value: float, tmp_path: Path) -> None:
    write, _ = WRITERS[writer]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(state_with(value), tmp_path / "out", allow_nonfinite=True)
    if "quantise" in writer:
        return
    path = tmp_path / ("out.gguf" if "gguf" in writer else "out")
    state = load_state(path, CONFIG)
    assert not state[OURS][3, 5, 7].isfinite() and state[OURS][3, 4].isfinite().all()
    if "q" not in writer:
        assert torch.equal(state[OURS][3, 5, 7].isnan(), torch.tensor(math.isnan(value)))


@pytest.mark.parametrize(
    ("write", "value", "kind"),
    [
        (lambda s, p: save_hf(s, CONFIG, p, torch.float16), 1e5, "1e+05, is too large for float16; bf16"),
        (lambda s, p: save_mistral(s, CONFIG, p, torch.float16), -65520.0, "6.552e+04, is too large for float16"),
        (lambda s, p: save_hf(s, CONFIG, p, torch.bfloat16), 3.4e38, "3.4e+38, is too large for bfloat16"),
        (lambda s, p: write_gguf(s, CONFIG, p.with_suffix(".gguf"), "bf16"), 3.4e38, "too large for BF16"),
        (lambda s, p: write_gguf(s, CONFIG, p.with_suffix(".gguf"), "q8_0"), 1e7, "1e+07, is too large for Q8_0; bf16"),
        (lambda s, p: write_gguf(s, CONFIG, p.with_suffix(".gguf"), "q4_0"), 1e6, "1e+06, is too large for Q4_0"),
        (through_folder(lambda s, p: quantise_folder(s, p, QuantScheme.of("8"))), 1e7, "too large for an fp16 scale"),
        (through_folder(lambda s, p: quantise_folder(s, p, QuantScheme.of("4"))), 1e7, "too large for an fp16 scale"),
    ],
)
def test_a_weight_that_the_type_cannot_hold(write: Write, value: float, kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(WeightsError) as error:
            write(state_with(value), tmp_path / "out")
    assert kind in str(error.value)
    assert any(name in str(error.value) for name in (OURS, HF, MISTRAL, GGUF))
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_the_largest_numbers_of_a_type_are_written(tmp_path: Path) -> None:
    for value, dtype in ((65504.0, torch.float16), (65519.0, torch.float16), (3.3895e38, torch.bfloat16)):
        save_hf(state_with(value), CONFIG, tmp_path / f"{value}", dtype)
    write_gguf(state_with(8.3e6), CONFIG, tmp_path / "8.gguf", "q8_0")
    write_gguf(state_with(5.2e5), CONFIG, tmp_path / "4.gguf", "q4_0")


def test_norms_and_routers_are_looked_at_too(tmp_path: Path) -> None:
    state = random_state(CONFIG)
    state["layers.0.ffn.router.weight"][1, 2] = NAN
    with pytest.raises(WeightsError, match=r"^blk\.0\.ffn_gate_inp\.weight: 1 of 160 weights are NaN or infinite"):
        write_gguf(state, CONFIG, tmp_path / "a.gguf", "q8_0")
    save_hf(state, CONFIG, tmp_path / "source", allow_nonfinite=True)
    with pytest.raises(WeightsError, match=r"^layers\.0\.ffn\.router\.weight: 1 of 160 weights"):
        quantise_folder(tmp_path / "source", tmp_path / "out", QuantScheme.of("8"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_finite_sees_every_number(dtype: torch.dtype) -> None:
    assert is_finite(torch.zeros(0, dtype=dtype))
    for at in range(67):
        for bad in (NAN, INF, -INF):
            x = torch.randn(67).to(dtype)
            assert is_finite(x)
            x[at] = bad
            assert not is_finite(x)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(state_with(1e5), CONFIG, tmp_path / "source")
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    assert main(["convert", source, out, "--to", "hf", "--dtype", "fp16"]) == 1
    assert f"{HF}: its largest weight, 1e+05, is too large for float16" in capsys.readouterr().err
    assert main(["convert", source, out, "--to", "hf", "--dtype", "fp16", "--allow-nonfinite"]) == 0
    assert load_state(out, CONFIG)[OURS][3, 5, 7].item() == INF
    assert main(["quantize", out, f"{out}-8", "--bits", "8"]) == 1
    assert OURS in capsys.readouterr().err and not Path(f"{out}-8").exists()
    assert main(["quantize", out, f"{out}-8", "--bits", "8", "--allow-nonfinite"]) == 0


def test_only_the_group_of_the_weight_is_lost() -> None:
    for fmt in (INT8, INT4):
        w_ND = torch.randn(5, 70)
        w_ND[2, 40] = INF
        q, scale_NG = unpack(quantise(w_ND, fmt, allow_nonfinite=True), fmt.name, 5, 70)
        assert scale_NG is not None and scale_NG.isnan().sum() == 1 and scale_NG[2, 1].isnan()
        w_ND[2, 40] = 0.0
        clean, _ = unpack(quantise(w_ND, fmt), fmt.name, 5, 70)
        same = q == clean
        same[2, 32:64] = True
        assert same.all()


def test_random_weights_of_any_spread_are_refused_or_finite(tmp_path: Path) -> None:
    for spread in (1e5, 1e-6):
        with pytest.raises(UsageError, match=r"random weights have a spread of 0\.0001 to 10000"):
            write_random(CONFIG.replace(init_std=spread), tmp_path / "no", "4")
    for spread in (1e4, 1e-4):
        with np.errstate(all="raise", under="ignore"):
            write_random(CONFIG.replace(init_std=spread), tmp_path / f"{spread}", "4")


# -- loading -----------------------------------------------------------------------------------------------------------


def test_loading_in_a_dtype_that_does_not_hold_a_weight(tmp_path: Path) -> None:
    """One tensor of the file; and a tensor that is cast because most of the others are fp16."""
    save_hf(state_with(1e5), CONFIG, tmp_path / "large")
    assert load_state(tmp_path / "large", CONFIG, torch.bfloat16)[OURS][3, 5, 7].item() == 99840.0
    with pytest.raises(WeightsError, match=rf"^{HF}: its largest weight, 1e\+05, is too large for float16; bf16"):
        load(tmp_path / "large", dtype="fp16", device="cpu")
    state = {name: tensor.half() for name, tensor in random_state(CONFIG).items()}
    state["norm.weight"] = torch.full((32,), 1e5)
    save_hf(state, CONFIG, tmp_path / "mixed")
    assert _one_dtype(dict(random_state(CONFIG)), CONFIG)["norm.weight"].dtype == torch.float32
    with pytest.raises(WeightsError, match=r"^norm\.weight: its largest weight, 1e\+05, is too large for float16"):
        _one_dtype(load_state(tmp_path / "mixed", CONFIG), CONFIG)


def test_loading_a_quantised_model_in_fp16(tmp_path: Path) -> None:
    state = random_state(CONFIG)
    state["embedding.weight"][1, 2] = 1e5
    save_hf(state, CONFIG, tmp_path / "source")
    quantise_folder(tmp_path / "source", tmp_path / "q", QuantScheme.of("8"))
    with pytest.raises(WeightsError, match=r"^embedding\.weight: its largest weight, 9\.984e\+04, is too large"):
        load(tmp_path / "q", dtype="fp16", device="cpu")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loading_keeps_what_is_not_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    save_hf(state_with(value), CONFIG, tmp_path / "source", allow_nonfinite=True)
    got = load_state(tmp_path / "source", CONFIG, dtype)[OURS][3, 5, 7].item()
    assert math.isnan(got) if math.isnan(value) else got == value
