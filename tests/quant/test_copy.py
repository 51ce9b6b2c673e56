"""A quantised copy in memory is what the folder, quantised on disk and loaded, is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtral import load
from mixtral.errors import UsageError
from mixtral.kernels.native import library as native
from mixtral.lm import LM
from mixtral.model import named_state
from mixtral.quant.copy import quantised_copy
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from tests.engine.models import make_model


@pytest.mark.skipif(bool(native.available()), reason="no native library: nothing is packed")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", ["8", "4", "mixed"])
def test_a_copy_equals_the_quantised_folder(tmp_path: Path, tied: bool, bits: str) -> None:
    LM(make_model(tie_embeddings=tied)).save(tmp_path / "model")
    scheme = QuantScheme.of(bits)
    quantise_folder(tmp_path / "model", tmp_path / "quantised", scheme)
    ours = named_state(quantised_copy(load(tmp_path / "model").model, scheme))
    wanted = named_state(load(tmp_path / "quantised", dtype="fp32").model)
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if "embedding" not in name:  # the folder's is bf16, the copy's as it was
            assert torch.equal(ours[name], tensor), name


def test_plain_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match="weights are not packed"):
        quantised_copy(make_model(), QuantScheme.of("4"))
