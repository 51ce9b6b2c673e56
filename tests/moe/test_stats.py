"""Routing statistics against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mixtral.moe.router import Routing, choice_weights
from mixtral.moe.stats import Repeats, count_repeats, gini, layer_stats, score_entropy


def routing(experts: list[list[int]], scores: list[list[float]] | None = None, n_experts: int = 4) -> Routing:
    experts_TK = torch.tensor(experts)
    scores_TE = torch.tensor(scores) if scores else torch.full((len(experts), n_experts), 1 / n_experts)
    logits_TE = scores_TE.clamp(min=1e-30).log()
    return Routing(logits_TE, scores_TE, choice_weights(logits_TE, experts_TK), experts_TK, experts_TK)


def cuts(*positions: int) -> torch.Tensor:
    return torch.tensor(positions, dtype=torch.int32)


def test_balance() -> None:
    found = layer_stats(routing([[0, 1], [2, 3], [0, 1], [3, 2]]), cuts(0, 4))
    assert found == ([0.25] * 4, 1.0, 0.0, pytest.approx(1.0), 0.0, 0.0, 0, None, 0.0)


def test_collapse_on_one_expert() -> None:
    certain = [[1.0, 0.0, 0.0, 0.0]] * 3
    found = layer_stats(routing([[0]] * 3, certain), cuts(0, 3))
    none = pytest.approx(0.0, abs=1e-6)
    assert found == ([1.0, 0.0, 0.0, 0.0], 4.0, pytest.approx(0.75), none, 1.0, 1.0, 3, None, 0.0)


def test_an_uneven_layer() -> None:
    found = layer_stats(routing([[0, 1], [0, 1], [0, 2], [1, 0]]), cuts(0, 4))
    assert found.load == [0.5, 0.375, 0.125, 0.0] and found.max_over_mean == 2.0
    # |differences| over all ordered pairs: 2 (.125 + .375 + .5 + .25 + .375 + .125) = 3.5; over 2 * 4 * 1
    assert found.gini == pytest.approx(3.5 / 8)
    assert found.repeats == pytest.approx(2 / 3) and found.repeats_any == 1.0


def test_faded_outputs_are_dead_too() -> None:
    """Balanced by count; the outputs of expert 3 are under a hundredth of the median norm."""
    found = layer_stats(routing([[0, 1], [2, 3]]), cuts(0, 2), torch.tensor([1.0, 2.0, 1.0, 0.005]))
    assert found.dead == 1 and found.output_norms == [1.0, 2.0, 1.0, 0.005]


def test_unused_places_do_not_count() -> None:
    assert layer_stats(routing([[0, -1], [1, -1]]), cuts(0, 2)).load == [0.5, 0.5, 0.0, 0.0]


def test_dropped_assignments_count_as_the_router_s_choice_and_as_dropped() -> None:
    made = routing([[0, -1], [0, -1], [-1, -1]])._replace(chosen_TK=torch.tensor([[0, 1], [0, 1], [0, -1]]))
    found = layer_stats(made, cuts(0, 3))
    assert found.load == [0.6, 0.4, 0.0, 0.0] and found.dropped == pytest.approx(3 / 5)
    assert found.repeats == found.repeats_any == 1.0


@pytest.mark.parametrize("n_experts", [2, 5, 64])
def test_gini_ends(n_experts: int) -> None:
    assert gini(torch.full((n_experts,), 1 / n_experts)) == pytest.approx(0, abs=1e-6)
    one = torch.eye(n_experts)[0]
    assert gini(one) == gini(10 * one) == pytest.approx((n_experts - 1) / n_experts)
    assert gini(torch.zeros(n_experts)) == 0


def test_entropy_is_a_share_of_the_highest() -> None:
    half = [[0.5, 0.5, 0.0, 0.0], [0.25] * 4]
    assert score_entropy(routing([[0], [0]], half)) == pytest.approx((0.5 + 1) / 2)
    # Scores of a sigmoid do not sum to 1: they are normalised first.
    assert score_entropy(routing([[0]], [[0.9, 0.9, 0.0, 0.0]])) == pytest.approx(math.log(2) / math.log(4))


def test_repeats_stop_at_the_end_of_a_sequence() -> None:
    same = routing([[2]] * 6)
    assert count_repeats(same, cuts(0, 6)).first_share == 1.0
    assert count_repeats(same, cuts(0, 3, 6)).first_share == 1.0
    switching = routing([[2], [2], [3], [3]])
    assert count_repeats(switching, cuts(0, 4)).first_share == pytest.approx(2 / 3)
    assert count_repeats(switching, cuts(0, 2, 4)).first_share == 1.0  # the switch lies between two sequences
    assert count_repeats(switching, cuts(0, 1, 3, 4)).first_share == 0.0  # only the switch lies inside one


def test_empty_sequences_change_nothing() -> None:
    switching = routing([[2], [2], [3], [3]])
    for ends in ((0, 0, 4), (0, 4, 4), (0, 0, 0, 4, 4)):
        assert count_repeats(switching, cuts(*ends)) == Repeats(pairs=3, first=2, any=2)
    assert count_repeats(switching, cuts(0, 2, 2, 4)) == Repeats(pairs=2, first=2, any=2)
    none = routing([[0]]).tokens(0, 0)
    assert count_repeats(none, cuts(0)) == count_repeats(none, cuts(0, 0)) == Repeats()


def test_single_tokens_have_no_neighbours() -> None:
    assert count_repeats(routing([[1], [1]]), cuts(0, 1, 2)).first_share == 0.0
    assert count_repeats(routing([[1]]), cuts(0, 1)).first_share == 0.0


def test_uniform_choices_repeat_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(4, (20_000, 1), generator=generator).tolist()
    assert count_repeats(routing(experts), cuts(0, 20_000)).first_share == pytest.approx(0.25, abs=0.01)


def test_overlapping_choices() -> None:
    chosen = routing([[0, 1], [1, 2], [3, 0], [0, 3], [2, 1]])
    assert count_repeats(chosen, cuts(0, 5)).any_share == 2 / 4  # 1 in common; nothing; 0 and 3; nothing
    assert count_repeats(chosen, cuts(0, 5)).first_share == 0.0
    assert count_repeats(chosen, cuts(0, 2, 5)).any_share == pytest.approx(2 / 3)
    assert count_repeats(chosen, cuts(0, 1, 3, 5)).any_share == 0.0
    assert count_repeats(routing([[1, 0]]), cuts(0, 1)).any_share == 0.0


def test_places_left_unused_do_not_repeat() -> None:
    dropped = routing([[0, -1], [1, -1], [-1, -1], [-1, -1]])
    assert count_repeats(dropped, cuts(0, 4)).any_share == count_repeats(dropped, cuts(0, 4)).first_share == 0.0


def test_uniform_pairs_overlap_by_chance() -> None:
    """13/28 at 8 experts, two a token: 1 - (6 choose 2) / (8 choose 2)."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.rand(20_000, 8, generator=generator).topk(2).indices.tolist()
    assert count_repeats(routing(experts, n_experts=8), cuts(0, 20_000)).any_share == pytest.approx(13 / 28, abs=0.01)


def test_repeats_by_hand() -> None:
    taken = routing([[0, 1], [0, 2], [1, 0], [1, -1], [-1, -1], [-1, -1]], n_experts=3)
    # pairs: same first; 0 in common; sequence ends; none in common as one takes nothing; both take nothing
    found = count_repeats(taken, cuts(0, 3, 6))
    assert found == Repeats(pairs=4, first=1, any=2)
    assert (found.first_share, found.any_share) == (0.25, 0.5)
    assert found.plus(found) == Repeats(8, 2, 4)
    assert Repeats().first_share == 0
