"""The portable kernels on another processor: cross-compiled for aarch64 and run by qemu, bit for bit the reference."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral.kernels import packing
from mixtral.kernels.native.library import FORMATS
from mixtral.kernels.packing import GROUP, LANES, pack
from tests.kernels.native_oracle import assert_same_bits
from tools.stand_in.build import ROOT, SOURCES, compile_all

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SHAPES = [(16, 32), (1, 1), (17, 33), (90, 100), (33, 1000)]  # outputs, inputs
ROWS = [1, 2, 3, 5, 7, 13]

missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
WHY = f"no {' and no '.join(missing)}: Debian's packages are g++-aarch64-linux-gnu and qemu-user"
needs_both = pytest.mark.skipif(bool(missing), reason=WHY)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aarch64")
    objects = compile_all(folder, ["-O2"], compiler=COMPILER, only="portable")
    source = ROOT / "tools/cross/products.cpp"
    command = [COMPILER, "-std=c++17", "-static", "-pthread", f"-I{SOURCES}", str(source), *objects]
    subprocess.run([*command, "-o", str(folder / "products")], check=True)
    return folder / "products"


def weight(name: str, n: int, d: int) -> Tensor:
    if name in packing.DTYPES:
        return pack(torch.randn(n, d).to(packing.DTYPES[name]), name)
    low, high = {"int8": (-127, 128), "int4": (-8, 8)}[name]
    scale_NG = torch.randn(n, math.ceil(d / GROUP)) * 2.0 ** torch.randint(-24, 10, (n, math.ceil(d / GROUP)))
    return pack(torch.randint(low, high, (n, d), dtype=torch.int8), name, scale_NG)


@needs_both
@pytest.mark.parametrize("name", FORMATS)
def test_products_on_aarch64(name: str, program: Path) -> None:
    cases = [(n, d, torch.randn(rows, d), weight(name, n, d)) for n, d in SHAPES for rows in ROWS]
    sent = b""
    for n, d, x_TD, packed in cases:
        raw = packed.contiguous().view(torch.uint8).numpy().tobytes()
        sent += struct.pack("<4iq", FORMATS[name], n, d, len(x_TD), len(raw)) + raw + x_TD.numpy().tobytes()
    out = subprocess.run([EMULATOR, str(program)], input=sent, capture_output=True, check=True).stdout
    got = torch.from_numpy(np.frombuffer(out, np.float32).copy())
    for n, _, x_TD, packed in cases:
        size = len(x_TD) * math.ceil(n / LANES) * LANES
        rows, got = got[:size].view(len(x_TD), -1)[:, :n].contiguous(), got[size:]
        assert_same_bits(rows, packing.packed_linear(x_TD, packed, name, n))
    assert not len(got)
