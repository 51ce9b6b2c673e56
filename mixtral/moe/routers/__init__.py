"""The routers behind the one contract (moe/router.py). `make_router` builds the one that a configuration names."""

from mixtral.config import ModelConfig
from mixtral.config.router import (
    ExpertChoice,
    Grouped,
    Jitter,
    LearnedK,
    MinP,
    Noisy,
    RouterOptions,
    Sigmoid,
    Switch,
    Threshold,
    TokenK,
    TopK,
    TopP,
)
from mixtral.moe.router import Router
from mixtral.moe.routers.dynamic_k import MinPRouter, ThresholdRouter, TopPRouter
from mixtral.moe.routers.expert_choice import ExpertChoiceRouter
from mixtral.moe.routers.grouped import GroupedRouter
from mixtral.moe.routers.learned_k import LearnedKRouter
from mixtral.moe.routers.noise import JitterRouter, NoisyRouter
from mixtral.moe.routers.score_weights import SigmoidRouter, SwitchRouter
from mixtral.moe.routers.topk import TopKRouter

ROUTER_OF: dict[type[RouterOptions], type[Router]] = {
    TopK: TopKRouter,
    Switch: SwitchRouter,
    Noisy: NoisyRouter,
    Jitter: JitterRouter,
    Sigmoid: SigmoidRouter,
    Grouped: GroupedRouter,
    LearnedK: LearnedKRouter,
    TokenK: TopKRouter,
    TopP: TopPRouter,
    MinP: MinPRouter,
    Threshold: ThresholdRouter,
    ExpertChoice: ExpertChoiceRouter,
}


def make_router(config: ModelConfig, n_experts: int | None = None) -> Router:
    """The router of a layer with `n_experts` (the model's by default), uninitialised, as `config.router` names it."""
    options, n_experts = config.router_options, n_experts or config.n_experts
    return ROUTER_OF[type(options)](config.dim, n_experts, config.experts_per_token, options)


__all__ = ["ROUTER_OF", "TopKRouter", "make_router"]
