"""The Balancer: what a run's balancing objectives keep between parts and steps.

Losses are computed from a part's routing, and for global_batch from counts over the step. The other objectives watch
the routing of every part, and move a buffer of the routers after the optimiser's step; `forward` changes nothing.

Legend: T tokens, E experts, K experts a token, M domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.config.router import LearnedK
from mixtral.errors import ConfigError
from mixtral.moe import Router, Routing, bias_updates
from mixtral.moe.choice import counts_of
from mixtral.moe.losses import guidance, k_price, load_balance, z_loss
from mixtral.train.balancing.options import (
    BalanceOptions,
    GlobalBatch,
    Guided,
    KPrice,
    LossFree,
    MicroBatch,
    Quantile,
    Smebu,
    Threshold,
    ZLoss,
    numbers,
    parse_balance,
)
from mixtral.train.config import PretrainConfig

# buffer: the routers that have it
ROUTERS_WITH = {"bias": "topk?bias=true, or another one that takes bias=true", "threshold": "threshold"}

SumOverRanks = Callable[[Tensor], Tensor]


class Term(NamedTuple):
    """One loss over a part: add `coefficient` times the mean of its layers' values to the total."""

    name: str
    coefficient: float
    values: list[Tensor]  # one a layer it covers


class Rule:
    """One objective's work on one layer's router: watch a step, then move a buffer.

    `weight` is the share of the proposed move that is made.
    """

    def __init__(self, options: BalanceOptions, layer: int, router: Router, k: int) -> None:
        self.options, self.layer, self.router, self.k = options, layer, router, k
        assert options.buffer is not None
        if options.buffer not in dict(router.named_buffers(recurse=False)):
            raise ConfigError(
                f"balance {options.name}: the router of layer {layer} has no {options.buffer}; "
                f"choose model.router={ROUTERS_WITH[options.buffer]}"
            )
        self.state = self._fresh_state()

    @property
    def moved_E(self) -> Tensor:
        """The router's buffer, as it is now."""
        assert self.options.buffer is not None
        return self.router.get_buffer(self.options.buffer)

    def _fresh_state(self) -> dict[str, Tensor]:
        """What must survive from step to step besides the buffer."""
        return {}

    def begin(self) -> None:
        """A new step: forget what was watched."""

    def observe(self, routing: Routing) -> None:
        """Watch one part's routing."""

    def propose(self, counts_E: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
        """The buffer's next value, from the step's assignments and what was watched; advances `state`."""
        raise NotImplementedError


class LossFreeRule(Rule):
    def propose(self, counts_E: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
        del sum_over_ranks
        assert isinstance(self.options, LossFree)
        return bias_updates.loss_free(self.moved_E, counts_E, self.options.rate)


class SmebuRule(Rule):
    def _fresh_state(self) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(self.moved_E)}

    def propose(self, counts_E: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
        del sum_over_ranks
        assert isinstance(self.options, Smebu)
        o = self.options
        bias_E, self.state["momentum"] = bias_updates.smebu(
            self.moved_E, self.state["momentum"], counts_E, o.rate, o.scale, o.decay
        )
        return bias_E


class HistogramRule(Rule):
    """A rule that reads a quantile of each expert's values over the step."""

    def begin(self) -> None:
        self.histogram = bias_updates.Histogram(self.moved_E)

    def _quantile(self, q: float, sum_over_ranks: SumOverRanks) -> Tensor:
        self.histogram.counts_EB = sum_over_ranks(self.histogram.counts_EB)
        return self.histogram.quantile(q)


class QuantileRule(HistogramRule):
    def __init__(self, options: BalanceOptions, layer: int, router: Router, k: int) -> None:
        super().__init__(options, layer, router, k)
        if k >= len(self.moved_E):
            raise ConfigError(f"balance quantile: {k} of {len(self.moved_E)} experts a token leaves nothing to balance")

    def observe(self, routing: Routing) -> None:
        self.histogram.add(bias_updates.margins(routing, self.moved_E, self.k))

    def propose(self, counts_E: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
        return bias_updates.centred(self._quantile(self.k / len(counts_E), sum_over_ranks))


class ThresholdRule(HistogramRule):
    def _fresh_state(self) -> dict[str, Tensor]:
        return {"updates": torch.zeros((), dtype=torch.int64, device=self.moved_E.device)}

    def observe(self, routing: Routing) -> None:
        self.histogram.add(routing.scores_TE.detach())

    def propose(self, counts_E: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
        assert isinstance(self.options, Threshold)
        self.state["updates"] = self.state["updates"] + 1
        rate = (1 / self.state["updates"]).clamp(min=1 - self.options.decay)
        quantile_E = self._quantile(1 - self.k / len(counts_E), sum_over_ranks)
        return self.moved_E.lerp(quantile_E, rate)


RULES: dict[type[BalanceOptions], type[Rule]] = {
    LossFree: LossFreeRule, Smebu: SmebuRule, Quantile: QuantileRule, Threshold: ThresholdRule,
}  # fmt: skip


class Balancer:
    """A run's balancing objectives. A step is `begin`, then for each part `observe` and `terms`, then `update`.

    Args:
        routers: one a layer; none for a dense model, which has nothing to balance.
        domains: the names of the data's domains, which guided needs.

    Raises ConfigError when an objective needs what the routers or the data do not have.
    """

    sum_over_ranks: SumOverRanks = staticmethod(lambda counts: counts)  # with several ranks, an all-reduce

    def __init__(self, routers: Sequence[Router], config: PretrainConfig, domains: Sequence[str] = ()) -> None:
        self.steps = config.steps
        k, self.layers = config.model.experts_per_token, config.model.sparse_layers[: len(routers)]
        entries = parse_balance(config.balance, config.model.n_layers) if routers else []
        if idle := next((entry for entry in entries if not any(map(entry.covers, self.layers))), None):
            raise ConfigError(f"balance {idle.name}: layers={idle.layers} are dense; only layers with a router balance")
        self.losses = [entry for entry in entries if entry.buffer is None]
        self.rules = [
            RULES[type(entry)](entry, layer, router, k)
            for entry in entries
            if entry.buffer
            for layer, router in zip(self.layers, routers, strict=True)
            if entry.covers(layer)
        ]
        learns_k = all(isinstance(router.options, LearnedK) for router in routers)
        if not learns_k and any(isinstance(entry, KPrice) for entry in entries):
            raise ConfigError("balance k_price: the router learns no k; choose model.router=learned_k")
        device = routers[0].weight.device if routers else torch.device("cpu")
        guided = [entry for entry in entries if isinstance(entry, Guided)]
        if guided and not config.model.is_uniform:
            raise ConfigError("balance guided: its groups name experts of every layer, and experts_by_layer differs")
        self.groups = {entry: _groups(entry, domains, config.model.n_experts).to(device) for entry in guided}

    def counts_first(self, step: int) -> bool:
        """Whether the step's assignments must be known before its first loss: an exact global_batch is at work."""
        exact = (entry for entry in self.losses if isinstance(entry, GlobalBatch) and entry.exact)
        return any(entry.coefficient(step, self.steps) > 0 for entry in exact)

    def begin(self, step: int, counts: Sequence[Tensor] | None = None) -> None:
        """A new step; `counts`, int64 [E] a layer, are those of all its parts when they are known already."""
        self.step = step
        self.known = None if counts is None else [self.sum_over_ranks(c) for c in counts]
        self.counts: list[Tensor] = []  # a layer each, over the parts so far
        self.live = [rule for rule in self.rules if rule.options.coefficient(step, self.steps) > 0]
        for rule in self.live:
            rule.begin()

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Watch a part's routing."""
        if self.live or any(isinstance(entry, GlobalBatch) for entry in self.losses):
            taken = [counts_of(routing.chosen_TK, routing.logits_TE.shape[1]) for routing in routings]
            self.counts = [a + b for a, b in zip(self.counts, taken, strict=True)] if self.counts else taken
        for rule in self.live:
            rule.observe(routings[self.layers.index(rule.layer)])

    def terms(self, routings: Sequence[Routing], domains_T: Tensor | None = None) -> Iterator[Term]:
        """The losses of a part that was observed; those whose weight is 0 at this step are not computed."""
        for entry in self.losses:
            coefficient = entry.coefficient(self.step, self.steps)
            covered = [i for i, layer in enumerate(self.layers) if entry.covers(layer)]
            if coefficient > 0 and covered:
                values = [self._value(entry, i, routings[i], domains_T) for i in covered]
                yield Term(entry.name, coefficient * (len(covered) / len(routings)), values)

    def _value(self, entry: BalanceOptions, i: int, routing: Routing, domains_T: Tensor | None) -> Tensor:
        match entry:
            case MicroBatch():
                return load_balance(routing)
            case GlobalBatch():
                whole = self.known if entry.exact else None
                counts_E = self.sum_over_ranks(self.counts[i]) if whole is None else whole[i]
                return load_balance(routing, counts_E=counts_E)
            case ZLoss():
                return z_loss(routing)
            case Guided():
                if domains_T is None:
                    raise ConfigError("balance guided: the batch carries no domains")
                return guidance(routing, domains_T, self.groups[entry])
            case KPrice():
                assert routing.k_T is not None, "a learned_k router gives it"
                return k_price(routing.k_T, entry.target)
        return entry.loss(routing)

    @torch.no_grad()
    def update(self) -> dict[str, float]:
        """After the optimiser's step: move the routers' buffers.

        -> name: the largest load over the mean one, less 1, of the step's assignments; mean over the rule's layers.
        """
        violations: dict[str, list[Tensor]] = {}
        for rule in self.live:
            counts_E = self.sum_over_ranks(self.counts[self.layers.index(rule.layer)])
            weight = rule.options.coefficient(self.step, self.steps)
            rule.moved_E.lerp_(rule.propose(counts_E, self.sum_over_ranks), weight)
            mean = counts_E.float().mean().clamp(min=1e-20)
            violations.setdefault(rule.options.name, []).append(counts_E.max() / mean - 1)
        return {name: float(torch.stack(values).mean()) for name, values in violations.items()}

    def state(self) -> dict[str, Tensor]:
        """What must survive besides the routers' buffers, `OBJECTIVE.LAYER.NAME`."""
        return {f"{r.options.name}.{r.layer}.{name}": t for r in self.rules for name, t in r.state.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave; what is missing in it is as at the start."""
        for rule in self.rules:
            for name, fresh in rule._fresh_state().items():
                found = state.get(f"{rule.options.name}.{rule.layer}.{name}", fresh)
                rule.state[name] = found.to(fresh.device)


def _groups(entry: Guided, domains: Sequence[str], n_experts: int) -> Tensor:
    """The experts of each domain -> bool [M, E]."""
    if len(domains) < 2:
        raise ConfigError("balance guided: the data has one domain alone; name them with ?domain=NAME on its sources")
    if entry.groups == "even":
        if len(domains) > n_experts:
            raise ConfigError(f"balance guided: {len(domains)} domains for {n_experts} experts; give fewer domains")
        owner_E = torch.arange(n_experts) * len(domains) // n_experts
        return owner_E == torch.arange(len(domains))[:, None]
    groups = [numbers(group, "balance guided: groups") for group in entry.groups.split("/")]
    if len(groups) != len(domains):
        raise ConfigError(f"balance guided: {len(groups)} groups for {len(domains)} domains ({', '.join(domains)})")
    if (last := max(max(group) for group in groups)) >= n_experts:
        raise ConfigError(f"balance guided: groups name expert {last}, but there are 0..{n_experts - 1}")
    return torch.tensor([[e in group for e in range(n_experts)] for group in groups])
