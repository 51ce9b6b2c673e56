"""Runnable training configurations as Python functions; the command line overrides any field of one."""

from __future__ import annotations

from collections.abc import Callable

from mixtral.errors import ConfigError, did_you_mean
from mixtral.extensions import look_for
from mixtral.recipes.nano import nano
from mixtral.recipes.sized import sized
from mixtral.recipes.tiny import tiny
from mixtral.train.config import PretrainConfig

__all__ = ["RECIPES", "recipe", "sized"]

RECIPES: dict[str, Callable[[], PretrainConfig]] = {"tiny": tiny, "nano": nano}


def recipe(name: str) -> PretrainConfig:
    """The recipe called `name`; an unknown name raises ConfigError with the nearest known one."""
    look_for(name, RECIPES)
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; {did_you_mean(name, RECIPES)}")
    return RECIPES[name]()
