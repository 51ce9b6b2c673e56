from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral.errors import ConfigError, UsageError
from mixtral.presets import mixtral_8x7b
from mixtral.quant.scheme import QuantScheme, part_of, read_scheme, stored_shapes, theoretical_bytes
from mixtral.weights.names import parameter_shapes
from tests.quant.models import CONFIG, SHAPES


def test_what_each_choice_means() -> None:
    assert QuantScheme.of("mixed") == QuantScheme("int8", "int4", "int8")
    assert QuantScheme.of("4", {"tokens": 3}).calibration == {"tokens": 3}
    with pytest.raises(UsageError, match="bits: unknown choice '5'; known: 4, 8, mixed"):
        QuantScheme.of("5")
    with pytest.raises(ConfigError, match="experts has an unknown format 'int2'; known: int8, int4"):
        QuantScheme("int8", "int2", "int8")


@pytest.mark.parametrize("shape", SHAPES)
def test_only_large_matrices_are_quantised(shape: str) -> None:
    config = CONFIG.replace(**SHAPES[shape])
    plain = {name.rpartition(".")[0].rpartition(".")[2] for name in parameter_shapes(config) if part_of(name) is None}
    assert plain <= {"embedding", "attention_norm", "ffn_norm", "router", "norm"}
    parts = {name.removeprefix("layers.0."): part_of(name) for name in parameter_shapes(config) if ".1." not in name}
    parts = {name: part for name, part in parts.items() if part}
    assert parts.pop("attention.wqkv.weight") == parts.pop("attention.wo.weight") == "attention"
    assert parts.pop("output.weight", "output") == "output"
    assert set(parts.values()) == {"experts"} and len(parts) in (2, 4)


def test_the_published_size_at_four_bits() -> None:
    """46.7 billion weights, 131 million of them embedding at 16 bits: 24.6 GiB."""
    config, scheme = mixtral_8x7b(), QuantScheme.of("4")
    assert theoretical_bytes(config, scheme) == pytest.approx(24.65 * 2**30, rel=1e-3)
    shapes = stored_shapes(config, scheme)
    assert shapes["layers.31.ffn.experts.w13_packed"] == (8, 2, 14336 // 16, 4096 // 32 * 288)
    assert shapes["layers.0.ffn.router.weight"] == (8, 4096) and shapes["output.weight_packed"] == (2000, 128 * 288)
    assert list(shapes)[-1] == "norm.weight" and next(iter(shapes)) == "layers.0.attention.wqkv.weight_packed"


def write(folder: Path, values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def test_there_and_back(tmp_path: Path) -> None:
    scheme = QuantScheme.of("mixed", {"source": "stdlib", "tokens": 9})
    assert read_scheme(write(tmp_path, {"quantization_config": scheme.to_dict()})) == scheme


@pytest.mark.parametrize(
    "values", ["{", "[]", {}, {"quantization_config": None}, {"quantization_config": {"quant_method": "awq"}}]
)
def test_what_is_not_ours(tmp_path: Path, values: Any) -> None:
    assert read_scheme(write(tmp_path, values)) is None
    assert read_scheme(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 64}, "group must be 32, not 64"),
        ({"output": "int3"}, "output has an unknown format 'int3'; known: int8, int4"),
        ({"output": ["int8"]}, "output has an unknown format ['int8']"),
        ({"rotation": 1}, "missing or unknown rotation"),
    ],
)
def test_a_recipe_that_is_not_right(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, {"quantization_config": QuantScheme.of("8").to_dict() | change})
    with pytest.raises(ConfigError) as error:
        read_scheme(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: quantisation: ") and message in str(error.value)
