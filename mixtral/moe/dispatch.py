"""Dispatch: from token order to rows grouped by expert, and back. Expert parallelism is another Dispatcher.

Legend: T tokens, D model width, E experts, K experts a token, N routed rows (T * K).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all

from mixtral import kernels
from mixtral.moe.choice import counts_of
from mixtral.moe.experts import Experts
from mixtral.moe.router import Routing


class Dispatched(NamedTuple):
    """Rows for the experts, and what the same dispatcher needs to bring their outputs back."""

    rows_ND: Tensor  # grouped by expert, in token order within each; rows of dropped assignments lie at the end
    counts_E: Tensor  # int64, rows of each expert that are to be computed
    context: Any  # the dispatcher's own; nobody else reads it


class Dispatcher(ABC):
    """Brings tokens to experts and back. No parameters, so no nn.Module; experts do not know who brought their rows."""

    @abstractmethod
    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """The rows of `experts_TK`, which a capacity may have shortened."""

    @abstractmethod
    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor:
        """The weighted sum of each token's expert outputs, in fp32 and token order, rounded once -> [T, D]."""

    def apply(self, experts: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
        """Dispatch, experts, combine -> [T, D]."""
        dispatched = self.dispatch(x_TD, routing)
        return self.combine(experts(dispatched.rows_ND, dispatched.counts_E), dispatched)


def added_to(part: Any) -> str:
    """What a call of `part` runs besides the code of its class: hooks, its own or those on all modules, or methods set
    on the object itself. "" if nothing; else a shortcut past the call must not be taken."""
    if isinstance(part, nn.Module) and (
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        or of_all._global_forward_hooks or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks or of_all._global_backward_pre_hooks
    ):  # fmt: skip
        return f"the hooks on {type(part).__name__}"
    methods = _methods(type(part))  # type: ignore[arg-type]  # mypy takes a class as not hashable
    given = [name for name in vars(part) if name in methods]
    return f"the {given[0]} that a {type(part).__name__} was given" if given else ""


@functools.cache  # asked anew for every token
def _methods(kind: type) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))


class LocalDispatcher(Dispatcher):
    """All experts in this process, by a stable sort of the assignments. Static shapes, no host synchronisation."""

    class _Context(NamedTuple):
        weights_TK: Tensor  # fp32
        order_N: Tensor  # int64, the flat assignment (token * K + choice) that each row serves
        row_TK: Tensor  # int64, the row that serves each assignment

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        n_experts, k = routing.logits_TE.shape[1], routing.experts_TK.shape[1]
        expert_N = routing.experts_TK.flatten()
        expert_N = torch.where(expert_N < 0, n_experts, expert_N)
        order_N = expert_N.argsort(stable=True)
        row_N = torch.empty_like(order_N)
        row_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        row_TK = row_N.view(-1, k)
        rows_ND = kernels.gather_rows(x_TD, order_N, row_TK)
        counts_E = counts_of(routing.experts_TK, n_experts)
        return Dispatched(rows_ND, counts_E, self._Context(routing.weights_TK, order_N, row_TK))

    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor:
        return kernels.combine(y_ND, *dispatched.context)

    def apply(self, experts: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
        """By `experts.decode` where there is one that serves: a few tokens are not worth sorting.

        Not in a subclass, nor when something was added to the experts or to this: it lies in the steps left out.
        """
        if torch.compiler.is_compiling():  # which cannot look for what was added
            return super().apply(experts, x_TD, routing)
        decode = getattr(experts, "decode", None)
        plain = type(self) is LocalDispatcher and not added_to(self) and not added_to(experts)
        if decode is not None and plain:
            y_TD: Tensor | None = decode(x_TD, routing)
            if y_TD is not None:
                return y_TD
        return super().apply(experts, x_TD, routing)
