"""Which parts of a model are quantised and how: the scheme that stands in a quantised folder's config.json."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mixtral.config import ModelConfig
from mixtral.config.formats import QUANT_METHOD
from mixtral.config.specs import check_value
from mixtral.errors import ConfigError, UsageError, did_you_mean, shown
from mixtral.json_files import read_object
from mixtral.kernels.packing import GROUP
from mixtral.quant.formats import FORMATS, QuantFormat
from mixtral.weights.names import parameter_shapes

Part = Literal["attention", "experts", "output"]
PARTS: tuple[Part, ...] = ("attention", "experts", "output")
BITS = {"8": ("int8", "int8", "int8"), "4": ("int4", "int4", "int4"), "mixed": ("int8", "int4", "int8")}
PACKED = "_packed"  # what the name of a packed tensor ends in; before that comes our parameter's


@dataclass(frozen=True)
class QuantScheme:
    """The format of each part, and what it was calibrated with.

    "experts" are all feed-forward networks, those of dense models and shared ones too. The embedding, norms, gates and
    buffers of routers are never quantised; nor is an output tied to the embedding.
    """

    attention: str
    experts: str
    output: str
    calibration: dict[str, Any] | None = None  # "source" and "tokens"

    def __post_init__(self) -> None:
        for part in PARTS:
            name: object = getattr(self, part)
            if name not in list(FORMATS):  # a file may hold anything here, even what no dictionary takes
                known = ", ".join(FORMATS)
                raise ConfigError(f"quantisation: {part} has an unknown format {shown(name)}; known: {known}")

        check_value("quantisation: calibration", self.calibration, dict[str, Any] | None)

    @classmethod
    def of(cls, bits: str, calibration: dict[str, Any] | None = None) -> QuantScheme:
        """From "8", "4" or "mixed" (8 bits, and 4 for the experts). Raises UsageError for anything else."""
        if bits not in BITS:
            raise UsageError(f"bits: unknown choice {bits!r}; {did_you_mean(bits, BITS)}")
        return cls(*BITS[bits], calibration)

    def format(self, name: str) -> QuantFormat | None:
        """The format of our parameter `name`; None when it is not quantised."""
        part = part_of(name)
        return FORMATS[getattr(self, part)] if part else None

    def to_dict(self) -> dict[str, Any]:
        """The value of `quantization_config` in config.json."""
        return {"quant_method": QUANT_METHOD, "group": GROUP, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantScheme:
        """The inverse. Raises ConfigError when it is none of ours."""
        fixed = {"quant_method": QUANT_METHOD, "group": GROUP}
        for key, only in fixed.items():
            if values.get(key) != only:
                raise ConfigError(f"quantisation: {key} must be {only!r}, not {shown(values.get(key))}")
        fields = {key: value for key, value in values.items() if key not in fixed}
        if wrong := fields.keys() ^ {*PARTS, "calibration"}:
            raise ConfigError(f"quantisation: missing or unknown {', '.join(sorted(wrong))}")
        return cls(**fields)


def part_of(name: str) -> Part | None:
    """Which part of the model our parameter `name` belongs to; None: it is never quantised."""
    if name == "output.weight":
        return "output"
    if name.endswith((".attention.wqkv.weight", ".attention.wo.weight")):
        return "attention"
    return "experts" if name.endswith((".w13", ".w2")) else None


def read_scheme(folder: str | Path) -> QuantScheme | None:
    """Of a folder that `mixtral quantize` wrote; None for any other. Raises ConfigError for a damaged scheme."""
    file = Path(folder) / "config.json"
    try:
        values = read_object(file).get("quantization_config")
    except ConfigError:  # what is wrong with a model's config.json, read_config says
        return None
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        return None
    try:
        return QuantScheme.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def stored_shapes(config: ModelConfig, scheme: QuantScheme) -> dict[str, tuple[int, ...]]:
    """Every tensor of a quantised folder in the order of its file: packed ones first, on multiples of 32 bytes."""
    shapes = parameter_shapes(config)
    packed = {name + PACKED: fmt.packed_shape(shape) for name, shape in shapes.items() if (fmt := scheme.format(name))}
    return packed | {name: shape for name, shape in shapes.items() if part_of(name) is None}


def theoretical_bytes(config: ModelConfig, scheme: QuantScheme, itemsize: int = 2) -> float:
    """Bytes of all weights at their formats' bits a weight; what is not quantised has `itemsize` bytes a weight."""
    total = 0.0
    for name, shape in parameter_shapes(config).items():
        fmt = scheme.format(name)
        total += math.prod(shape) * (fmt.bits / 8 if fmt else itemsize)
    return total
