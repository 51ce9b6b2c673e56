"""The model definition that training, generation, serving and analysis share."""

from mixtral.model.attention import KVCache
from mixtral.model.batch import Ragged
from mixtral.model.transformer import Mixtral, Output, initialise, named_state

__all__ = ["KVCache", "Mixtral", "Output", "Ragged", "initialise", "named_state"]
