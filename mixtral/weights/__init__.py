"""Weights: reading, checking and writing the files of others, all from one table of names (names.py)."""

from mixtral.weights.convert import convert
from mixtral.weights.load import load_state
from mixtral.weights.names import parameter_shapes
from mixtral.weights.save import save_hf, save_mistral
from mixtral.weights.shards import detect_format

__all__ = ["convert", "detect_format", "load_state", "parameter_shapes", "save_hf", "save_mistral"]
