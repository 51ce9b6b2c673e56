from __future__ import annotations

import pytest
import torch

from mixtral.kernels.packing import pack
from mixtral.model import Mixtral, initialise
from mixtral.quant.formats import PLAIN
from mixtral.quant.pack import pack_state
from mixtral.quant.scheme import PACKED
from tests.engine.models import CONFIG


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrices_of_many_rows_are_packed_whole(dtype: torch.dtype, tied: bool) -> None:
    """More rows than are packed at once, and no multiple of a block. Oracle: each matrix packed in one piece."""
    config = CONFIG.replace(vocab_size=1101, ffn_dim=2069, tie_embeddings=tied)
    state = initialise(Mixtral(config), torch.Generator().manual_seed(0)).state_dict()
    packed = {n: t for n, t in pack_state(config, state, dtype).state_dict().items() if n.endswith(PACKED)}
    assert max(tensor.shape[-2] for tensor in packed.values()) * 16 > 2048
    for name, tensor in packed.items():
        assert torch.equal(tensor, pack(state[name.removesuffix(PACKED)].to(dtype), PLAIN[dtype].name)), name
