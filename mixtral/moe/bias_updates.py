"""Balancing without a loss: rules that move an expert's bias or threshold after a step. Pure functions of tensors.

A bias is added to the scores for the choice of experts alone, never for their weights. Its level means nothing, so
every rule for it ends with a zero mean.

Legend: T tokens, E experts, K experts a token, B bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixtral.moe.router import Routing

BINS = 1024  # of a histogram, for each expert


def loss_free(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """b += rate * sign(mean load - load), recentred (arXiv 2408.15664, algorithm 1) -> the new bias.

    `counts_E` are the assignments of the whole global batch.
    """
    return centred(bias_E + rate * torch.sign(counts_E.float().mean() - counts_E))


def smebu(
    bias_E: Tensor, momentum_E: Tensor, counts_E: Tensor, rate: float, scale: float, decay: float
) -> tuple[Tensor, Tensor]:
    """Soft-clamped momentum expert bias updates (arXiv 2602.17004) -> (new bias, new momentum).

    With the violation v = (mean load - load) / mean load: d = rate * tanh(scale * v), centred;
    m = decay * m + (1 - decay) * d; b += m. Near balance the step shrinks with the violation, where a sign would keep
    its full size and swing.
    """
    mean = counts_E.float().mean().clamp(min=1e-20)
    step_E = centred(rate * torch.tanh(scale * (mean - counts_E) / mean))
    momentum_E = decay * momentum_E + (1 - decay) * step_E
    return centred(bias_E + momentum_E), momentum_E


def centred(bias_E: Tensor) -> Tensor:
    """With zero mean."""
    return bias_E - bias_E.mean()


def margins(routing: Routing, bias_E: Tensor, k: int) -> Tensor:
    """a_i - s_ij of Quantile Balancing -> fp32 [T, E]: the bias that expert j needs to be among token i's k.

    a_i is the (k+1)-th largest of s_i + b, the score that a chosen expert must beat. k < E.
    """
    scores_TE = routing.scores_TE.detach()
    bar_T1 = (scores_TE + bias_E).topk(k + 1, dim=-1).values[:, -1:]
    return bar_T1 - scores_TE


class Histogram:
    """Counts of values in bins for each expert, from which quantiles are read; sums over parts of a batch and ranks.

    Bins are centred on a value of each expert's own, the last known quantile, and spaced by sinh: about 3e-6 wide there
    and 3 % of the distance far away. So a rough first quantile becomes exact within a few steps, whatever the scale of
    the scores. Bins depend on `centre_E` alone; histograms with the same centres add up.
    """

    NEAR = 1e-4  # below this distance bins are equally wide
    REACH = math.asinh(100 / NEAR)  # values further away than 100 count in the last bins

    def __init__(self, centre_E: Tensor) -> None:
        self.centre_E = centre_E.clone()
        self.counts_EB = centre_E.new_zeros((len(centre_E), BINS), dtype=torch.int64)

    def add(self, values_TE: Tensor) -> None:
        """Count values, one a token and expert."""
        place_TE = torch.asinh((values_TE - self.centre_E) / self.NEAR) / self.REACH  # -1..1
        bin_TE = ((place_TE + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        self.counts_EB.scatter_add_(1, bin_TE.T, torch.ones_like(bin_TE.T))

    def edges(self) -> Tensor:
        """Where bins begin and end -> fp32 [E, B + 1]."""
        place_B = torch.linspace(-1, 1, BINS + 1, device=self.counts_EB.device) * self.REACH
        return self.centre_E[:, None] + self.NEAR * torch.sinh(place_B)

    def quantile(self, q: float) -> Tensor:
        """The value below which a share 0 < q <= 1 of each expert's values lies, linear inside its bin -> fp32 [E]."""
        ends_EB = self.counts_EB.cumsum(1).double()
        wanted_E1 = q * ends_EB[:, -1:]
        bin_E1 = torch.searchsorted(ends_EB, wanted_E1).clamp(max=BINS - 1)
        inside_E1 = self.counts_EB.gather(1, bin_E1)
        before_E1 = ends_EB.gather(1, bin_E1) - inside_E1
        share_E1 = ((wanted_E1 - before_E1) / inside_E1.clamp(min=1)).clamp(0, 1).float()
        edges = self.edges()
        return edges.gather(1, bin_E1).lerp(edges.gather(1, bin_E1 + 1), share_E1).squeeze(1)
