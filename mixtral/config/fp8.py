"""Checkpoints in fp8 (e4m3): what their configuration says of the scales beside the weights.

Read: Hugging Face's `quantization_config` of transformers and vLLM (quant_method "fp8") and of compressed-tensors, and
Mistral's `quantization`. How activations were to be rounded is passed over: here weights are expanded as they are read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mixtral.errors import ConfigError, shown

KEYS = ("quantization_config", "compression_config", "quantization")
_USUAL_BLOCK = (128, 128)
_STRATEGIES = ("tensor", "channel", "block")


class Fp8(NamedTuple):
    block: tuple[int, int]  # rows and columns of a weight that share a scale, where there is more than one for a row
    key: str = ""  # which of KEYS says so


def read_fp8(values: dict[str, Any]) -> Fp8 | None:
    """Of the content of a config.json or params.json; None where it says nothing of fp8.

    Raises ConfigError, naming the key, for fp8 of a kind that is not read.
    """
    for key in KEYS:
        said = values.get(key)
        if not isinstance(said, dict):
            continue
        if said.get("quant_method") == "fp8":
            return _transformers(said, key)._replace(key=key)
        if said.get("quant_method") == "compressed-tensors" or said.get("format") == "float-quantized":
            return _compressed(said, key)._replace(key=key)
        if said.get("qformat_weight") == "fp8_e4m3":
            return Fp8(_USUAL_BLOCK, key)
    return None


def _transformers(said: dict[str, Any], key: str) -> Fp8:
    if said.get("fmt") not in (None, "e4m3"):
        raise ConfigError(f"{key}.fmt {shown(said['fmt'])} is not implemented; only 'e4m3' is")
    return Fp8(_block(said.get("weight_block_size"), f"{key}.weight_block_size"))


def _compressed(said: dict[str, Any], key: str) -> Fp8:
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(f"{key}.config_groups must say how weights were rounded, not {shown(groups)}")
    blocks = {_group(group, f"{key}.config_groups.{shown(name)[1:-1]}") for name, group in groups.items()}
    if len(blocks) > 1:
        raise ConfigError(f"{key}.config_groups: blocks of several sizes are not implemented: {sorted(blocks)}")
    return Fp8(blocks.pop())


def _group(group: object, key: str) -> tuple[int, int]:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ConfigError(f"{key}.weights must be an object, not {shown(weights)}")
    wanted = {"num_bits": (8,), "type": ("float",), "symmetric": (True,), "strategy": _STRATEGIES}
    for name, allowed in wanted.items():
        if weights.get(name) not in allowed:
            only = " or ".join(map(repr, allowed))
            raise ConfigError(f"{key}.weights.{name} {shown(weights.get(name))} is not implemented; only {only} is")
    block = weights.get("block_structure")
    if isinstance(block, str) and all(size.isdecimal() for size in block.split("x")):
        block = [int(size) for size in block.split("x")]
    return _block(block, f"{key}.weights.block_structure")


def _block(value: object, key: str) -> tuple[int, int]:
    if value is None:
        return _USUAL_BLOCK
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise ConfigError(f"{key} must be two positive numbers, not {shown(value)}")
    return value[0], value[1]
