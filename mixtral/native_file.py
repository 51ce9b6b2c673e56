"""The file of the C++ library (kernels/native): where it lies, whether it can be used, for which models. No torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path

from mixtral.config import ModelConfig

# Another folder: tools/sanitize and tools/stand_in
FOLDER = Path(os.environ.get("MIXTRAL_NATIVE", Path(__file__).parent / "kernels/native"))


def cannot_run(config: ModelConfig, device: str) -> str:
    """Why the native step cannot run a model of this configuration on a type of device, given the library; "": it can.
    """
    if config.router != "topk" or config.shared_experts:
        return "it knows Mixtral's own router alone, and no shared experts"
    return "" if device == "cpu" else "it runs on the CPU alone"


def load(folder: Path) -> ctypes.CDLL | str:
    """The library in `folder`, or why it cannot be used. One made with other headers than those beside it is refused:
    its structures may be others."""
    path = folder / "libmixtral.so"
    if not path.exists():
        return "the library was not built when this package was installed"
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.mx_isa.restype = loaded.mx_headers.restype = ctypes.c_char_p
        loaded.mx_read.restype = ctypes.c_uint64
        made_with = loaded.mx_headers().decode()
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded ({error})"
    if made_with != headers_hash(folder):
        return f"{path} was built with other headers than those beside it"
    return loaded


def headers_hash(folder: Path) -> str:
    """As setup.py has it."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted((folder / "src").glob("*.h")))).hexdigest()[:16]
