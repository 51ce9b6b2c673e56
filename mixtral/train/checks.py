"""What can be known to be wrong with a run before any work is done for it."""

from __future__ import annotations

import torch

from mixtral.data.sources import check_sources
from mixtral.errors import ConfigError
from mixtral.model import Mixtral
from mixtral.moe import MoE
from mixtral.tokenizer import Tokenizer, load_tokenizer
from mixtral.tokenizer.train import check_size
from mixtral.train.balancing.balancer import Balancer
from mixtral.train.config import PretrainConfig
from mixtral.train.memory import check_memory
from mixtral.train.sinks import require_packages


def check_run(config: PretrainConfig) -> None:
    """Raise what would stop a new run later: packages, memory, sources, the tokenizer, balance against the routers.

    What depends on the texts themselves, such as their domains, is left to when they are read.
    """
    require_packages(config.trackers)
    check_memory(config)
    check_sources(config.data)
    if config.tokenizer is None:
        check_size(config.model.vocab_size)
    else:
        check_vocabulary(load_tokenizer(config.tokenizer), config)
    _check_balance(config)


def check_vocabulary(tokenizer: Tokenizer, config: PretrainConfig) -> None:
    """Raise ConfigError when the tokenizer is not of the model's size."""
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.model.vocab_size}; "
            f"add --set model.vocab_size={tokenizer.vocab_size}"
        )


def _check_balance(config: PretrainConfig) -> None:
    """Against routers without memory; `guided` needs the domains of the data, which are not known yet."""
    with torch.device("meta"):
        model = Mixtral(config.model)
    known = tuple(spec for spec in config.balance if spec.partition("?")[0] != "guided")
    Balancer([module.router for module in model.modules() if isinstance(module, MoE)], config.replace(balance=known))
