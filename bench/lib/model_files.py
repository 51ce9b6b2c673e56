"""One random model in every format that the engines of bench/decode.py and bench/prefill.py read, made once and kept.

The bf16 folder is `mixtral synth`'s, the others are made from it by `mixtral quantize` and `mixtral convert`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from mixtral.config import ModelConfig
from mixtral.config.formats import read_config
from mixtral.gguf.header import read_gguf_header
from mixtral.kernels.packing import packed_shape
from mixtral.presets import preset
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme, part_of
from mixtral.quant.synth import write_random
from mixtral.weights import convert
from mixtral.weights.names import parameter_shapes

FORMATS = ("bf16", "int8", "int4")
GGUF_TYPES = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}  # llama.cpp's format of as many bits a weight
BITS = {"int8": "8", "int4": "4"}


def default() -> ModelConfig:
    """1.15 B parameters, 329 M read a token."""
    return ModelConfig(
        vocab_size=32000, dim=1024, n_layers=12, n_heads=16, n_kv_heads=4, head_dim=64, ffn_dim=3584,
        n_experts=8, experts_per_token=2, rope_theta=1e6, context=16384,
    )  # fmt: skip


def find_config(name: str) -> ModelConfig:
    """`default`, or a preset of the package."""
    return default() if name == "default" else preset(name)


class ModelFiles:
    """The files of one configuration under `folder`; what is asked for and not there is made.

    Raises SystemExit when another model lies there.
    """

    def __init__(self, folder: Path, name: str, config: ModelConfig) -> None:
        self.folder, self.config = folder / name, config
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (bf16 := self.folder / "bf16").exists():
            _tell(bf16)
            write_random(config, bf16, "16")
        elif read_config(bf16) != config:
            raise SystemExit(f"{bf16}: holds another model; remove {self.folder}, or name another --folder")

    def ours(self, format: str) -> Path:
        """Our folder in a format of FORMATS."""
        path = self.folder / format
        if not path.exists():
            _tell(path)
            quantise_folder(self.folder / "bf16", path, QuantScheme.of(BITS[format]))
        return path

    def gguf(self, format: str) -> Path:
        """The GGUF file that is set against our format."""
        path = self.folder / f"{GGUF_TYPES[format]}.gguf"
        if not path.exists():
            _tell(path)
            convert(self.folder / "bf16", path, "gguf", type=GGUF_TYPES[format])
        return path


def _tell(path: Path) -> None:
    print(f"making {path}", file=sys.stderr)


# -- the bytes of weights that a step for one token reads --------------------------------------------------------------


def our_step_bytes(config: ModelConfig, format: str) -> float:
    """Packed matrices, of a token's experts and of all else; gates and norms in fp32; one row of the embedding."""
    total = 2.0 * config.dim
    for name, shape in parameter_shapes(config).items():
        if name == "embedding.weight":
            continue
        part = part_of(name)
        if part is None:
            total += 4 * math.prod(shape)
            continue
        *lead, n, d = shape
        taken = config.experts_per_token / config.n_experts if part == "experts" and config.is_sparse else 1.0
        total += taken * math.prod(lead) * math.prod(packed_shape(format, n, d))
    return total


def gguf_step_bytes(path: Path, config: ModelConfig) -> float:
    """The same of a GGUF file, by what its header says of each tensor."""
    total = 0.0
    for name, tensor in read_gguf_header(path).tensors.items():
        if name == "token_embd.weight":
            total += tensor.nbytes / config.vocab_size
        elif "_exps." in name:
            total += tensor.nbytes * config.experts_per_token / config.n_experts
        else:
            total += tensor.nbytes
    return total


def plain_step_bytes(config: ModelConfig, itemsize: int) -> float:
    """The same of a model that holds every weight in `itemsize` bytes."""
    rows = 1 - config.vocab_size  # of the embedding, one is read
    return itemsize * (config.n_active_params() + rows * config.dim)
