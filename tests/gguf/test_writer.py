"""The header that is written, byte for byte that of the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mixtral.gguf.header import read_gguf_header
from mixtral.gguf.writer import TensorEntry, header_bytes, padding

METADATA: dict[str, Any] = {
    "general.architecture": "llama", "yes": True, "no": False, "count": 7, "large": (1 << 32) - 1, "eps": 1e-5,
    "name": "größer 🙂", "tokens": ["▁a", "b", "🙂"], "scores": [0.5, -1.25], "kinds": [1, 3, 6], "none": [],
    "empty": "",
}  # fmt: skip


def test_equals_the_packages(tmp_path: Path) -> None:
    arrays = {
        "norm": np.arange(5, dtype=np.float32), "matrix": np.ones((3, 7), np.float32),
        "experts": np.ones((2, 3, 32), np.float16),
    }  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    for key, value in METADATA.items():
        if key != "general.architecture" and value not in ([], ""):
            add[type(value)](key, value)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kinds = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
    entries = [TensorEntry(name, kinds[array.dtype], array.shape, array.nbytes) for name, array in arrays.items()]
    ours = header_bytes(METADATA, entries)
    ours += b"".join(array.tobytes() + b"\0" * padding(array.nbytes) for array in arrays.values())
    assert ours == (tmp_path / "theirs.gguf").read_bytes()
    (tmp_path / "ours.gguf").write_bytes(ours)
    metadata, tensors = read_gguf_header(tmp_path / "ours.gguf")
    assert all(metadata[key] == METADATA[key] for key in ("name", "tokens", "large", "yes", "no"))
    assert {name: info.shape for name, info in tensors.items()} == {name: a.shape for name, a in arrays.items()}
