"""Sparse mixture of experts: router, dispatch, experts, the layer, and balancing."""

from mixtral.moe.dispatch import Dispatched, Dispatcher, LocalDispatcher
from mixtral.moe.experts import Experts, FeedForward
from mixtral.moe.layer import MoE
from mixtral.moe.router import Router, Routing
from mixtral.moe.routers import TopKRouter, make_router

__all__ = [
    "Dispatched",
    "Dispatcher",
    "Experts",
    "FeedForward",
    "LocalDispatcher",
    "MoE",
    "Router",
    "Routing",
    "TopKRouter",
    "make_router",
]
