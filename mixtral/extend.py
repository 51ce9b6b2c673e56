"""Add a router, a balancing objective, a recipe or a data source from a package of your own.

    # my_package/mixtral_parts.py
    from dataclasses import dataclass
    from mixtral import extend

    @dataclass(frozen=True)
    class Cautious(extend.TopK, name="cautious"):      # model.router=cautious?bias=true
        margin: float = 0.1

    class CautiousRouter(extend.TopKRouter):
        ...

    extend.router(Cautious, CautiousRouter)

    # its pyproject.toml
    [project.entry-points."mixtral.extensions"]
    my_package = "my_package.mixtral_parts"

The module is imported when a name is asked for that is not ours, or before: `import my_package.mixtral_parts` in
Python, `mixtral --import my_package.mixtral_parts train ...` on the command line. Names that are taken are refused.
"""

from __future__ import annotations

from collections.abc import Callable

from mixtral.config.router import ROUTERS, Buffer, RouterOptions, TopK
from mixtral.data.corpora import BUILT_IN, SOURCES, TextSource
from mixtral.errors import UsageError
from mixtral.moe import Router, Routing
from mixtral.moe.routers import ROUTER_OF, TopKRouter
from mixtral.recipes import RECIPES
from mixtral.train.balancing.balancer import RULES, Rule
from mixtral.train.balancing.options import OBJECTIVES, BalanceOptions
from mixtral.train.config import PretrainConfig

__all__ = [
    "BalanceOptions", "Buffer", "PretrainConfig", "Router", "RouterOptions", "Routing", "Rule", "TopK", "TopKRouter",
    "objective", "recipe", "router", "source",
]  # fmt: skip


def router(options: type[RouterOptions], module: type[Router]) -> None:
    """Let `model.router=NAME?option=value` build `module`, where `options` is `class X(RouterOptions, name="NAME")`.

    CONTRIBUTING.md says what a router has to keep to ("A router").
    """
    if options not in ROUTERS.values():
        raise UsageError(f"router {options.__name__}: its options have no name; class X(RouterOptions, name=\"...\")")
    if ROUTER_OF.setdefault(options, module) is not module:
        raise UsageError(f"router {options.__name__}: there is one for these options already")


def objective(options: type[BalanceOptions], rule: type[Rule] | None = None) -> None:
    """Let `balance=NAME?option=value` name an objective of training; `options.name` is NAME.

    Args:
        options: with a method `loss(routing) -> Tensor`, a scalar, for a loss; or with the class attribute `buffer`,
            the router's buffer that the objective moves.
        rule: how it moves it; for objectives with a `buffer`.
    """
    if (rule is None) != (options.buffer is None):
        raise UsageError(f"objective {options.name}: a rule is wanted where it moves a buffer, and only there")
    if OBJECTIVES.setdefault(options.name, options) is not options:
        raise UsageError(f"objective {options.name}: there is one of this name already")
    if rule is not None:
        RULES[options] = rule


def recipe(name: str) -> Callable[[Callable[[], PretrainConfig]], Callable[[], PretrainConfig]]:
    """Decorator of a function that gives a training configuration: `mixtral train NAME`."""

    def register(function: Callable[[], PretrainConfig]) -> Callable[[], PretrainConfig]:
        if RECIPES.setdefault(name, function) is not function:
            raise UsageError(f"recipe {name}: there is one of this name already")
        return function

    return register


def _unversioned(part: str) -> str:
    del part
    return ""


def source(name: str, texts: TextSource, version: Callable[[str], str] = _unversioned) -> None:
    """Let `data=NAME` or `data=NAME:PART` read texts.

    Args:
        texts: (part, seed) -> the documents as (text, domain), always the same for the same arguments.
        version: part -> a text that changes when the documents do, so that prepared data is made anew.
    """
    if name in BUILT_IN or SOURCES.setdefault(name, (texts, version)) != (texts, version):
        raise UsageError(f"data source {name}: there is one of this name already")
