"""Every recipe is a whole configuration; an unknown name is told the nearest one."""

from __future__ import annotations

import json

import pytest

from mixtral.data.sources import Source
from mixtral.errors import ConfigError
from mixtral.recipes import RECIPES, recipe
from mixtral.train.config import PretrainConfig


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_configuration(name: str) -> None:
    config = recipe(name)
    assert config.model.is_sparse and config.context <= config.model.context
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_demo_trains_enough_and_keeps_what_it_validates() -> None:
    config = recipe("tiny")
    assert config.steps * config.tokens_per_step >= 1_200_000
    assert [source.partition("?")[0] for source in config.data] == ["stdlib"] and config.tokenizer is None
    assert config.save_every % config.val_every == 0  # else no validated step would be a saved one


def test_the_model_that_ships_fits_the_package() -> None:
    config = recipe("nano")
    assert config.model.weight_bytes(bits=16) < 15e6  # of 16 MB; the rest is the tokenizer's
    assert 7e6 <= config.steps * config.tokens_per_step <= 15e6
    assert config.save_every % config.val_every == 0
    sources = [Source.parse(spec) for spec in config.data]
    kinds = [source.name.partition(":")[0] for source in sources]
    assert kinds == [*["stdlib"] * 3, *["packages"] * 2, *["reasoning-gym"] * 2]
    assert [source.level for source in sources] == [*[None] * 5, 1, 1]
    assert not any(source.weight for source in sources)  # every text once


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"^unknown recipe 'tinny'; did you mean 'tiny'\?$"):
        recipe("tinny")
