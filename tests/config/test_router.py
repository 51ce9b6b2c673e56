from __future__ import annotations

import math

import pytest

from mixtral.config import ModelConfig
from mixtral.config.router import ROUTERS, Grouped, Sigmoid, TopK, parse_router
from mixtral.errors import ConfigError
from tests.model.small import config


def test_a_spec_names_a_router_and_its_options() -> None:
    assert parse_router("topk") == TopK() and config().router_options == TopK()
    assert parse_router("grouped?groups=4&taken=2&by=max&bias=true") == Grouped(
        bias=True, groups=4, taken=2, by="max"
    )
    for name in ROUTERS:
        assert type(parse_router(name)) is ROUTERS[name]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("topc", "unknown 'topc'; did you mean 'topk'"),
        ("topk?baas=true", "unknown option 'baas=true'; did you mean 'bias'"),
        ("topk?capacity_factor=0", "capacity_factor must be a positive number, not 0.0"),
        ("switch", "switch takes one expert a token: experts_per_token must be 1, not 2"),
        ("jitter?eps=1", r"eps must lie in \[0, 1\), not 1.0"),
        ("sigmoid?scale=0", "scale must be a positive number, not 0.0"),
        ("grouped?taken=3", r"taken must lie in 1..2 \(groups\), not 3"),
        ("grouped?by=mean", "by must be top2 or max, not 'mean'"),
        ("grouped?groups=3", "4 experts do not divide into 3 groups"),
        ("grouped?groups=4&taken=2", "groups of one expert have no two highest"),
        ("grouped?groups=4&by=max", "1 groups of 1 hold no 2 experts"),
        ("learned_k?most=5", r"most must lie in 1\.\.4, not 5"),
        ("token_k?most=1", r"most must lie in 2\.\.4, not 1"),
        ("threshold?most=0", r"most must lie in 1\.\.4, not 0"),
        ("top_p?p=0", r"p must lie in \(0, 1\], not 0.0"),
        ("min_p?p=1.5", r"p must lie in \(0, 1\], not 1.5"),
        ("top_p?least=0", "least must be at least 1, not 0"),
        ("top_p?least=5", r"least must lie in 1\.\.4, not 5"),
    ],
)
def test_options_out_of_range_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^(config: )?router.*{message}"):
        config(router=spec)


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_options_are_numbers_however_they_are_given(value: float) -> None:
    """A spec cannot say infinity; a dataclass can."""
    with pytest.raises(ConfigError, match=f"capacity_factor must be a positive number, not {value}"):
        TopK(capacity_factor=value)
    with pytest.raises(ConfigError, match=f"scale must be a positive number, not {value}"):
        Sigmoid(scale=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": 3}, "router must be a text such as 'topk', not 3"),
        ({"shared_experts": -1}, "shared_experts must be 0 or a positive integer, not -1"),
        ({"n_experts": 1, "experts_per_token": 1, "router": "switch"}, "a dense model .* has no router"),
        ({"n_experts": 1, "experts_per_token": 1, "shared_experts": 1}, "a dense model .* no shared_experts"),
    ],
)
def test_fields_of_the_configuration_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def _grown(**changes: object) -> tuple[int, int, int]:
    """By how much parameters, active parameters and FLOPs a token grow."""
    a, b = config(), config(**changes)
    return (b.n_params() - a.n_params(), b.n_active_params() - a.n_active_params(),
            b.flops_per_token(8) - a.flops_per_token(8))  # fmt: skip


def test_what_routers_and_shared_experts_add_is_counted() -> None:
    shape: ModelConfig = config()
    gate, expert = shape.n_layers * shape.dim * shape.n_experts, shape.n_layers * shape.expert_params
    assert _grown(router="topk?bias=true") == (0, 0, 0)
    assert _grown(router="noisy") == (gate, gate, 2 * gate)
    head = shape.n_layers * shape.dim * 3
    assert _grown(router="learned_k?most=3") == (head, head, 2 * head)
    assert _grown(shared_experts=2) == (2 * expert, 2 * expert, 4 * expert)
