"""Do experts specialise? What routing says about the domain of a text: pure functions of counts.

With P(m, e) the share of all assignments that are of domain m to expert e, the mutual information

    I(M; E) = sum over m, e of P(m, e) log2(P(m, e) / (P(m) P(e)))      bits an assignment

is 0 when every domain uses the experts alike, and H(M), log2 M for equal domains, when the expert is the domain's.

Domains have words of their own, so a router that looks at the token alone has information about the domain as well.
`token_information` is what such a router would have: each token's assignments, pooled over domains, given to every
domain in which the token stands. What I(M; E) has beyond it comes from context. (A token that occurs in one domain
alone counts as explained, so it is an upper bound of what words explain.)

Both are estimated too high from few tokens, by about (M - 1) (E - 1) / (2 N ln 2) for N independent assignments.

Legend: T tokens, E experts, K the most experts a token may take, M domains, V vocabulary, N assignments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixtral.moe import Routing


def domain_counts(routing: Routing, tokens_T: Tensor, domains_T: Tensor, n_domains: int, vocab_size: int) -> Tensor:
    """Assignments of each domain's tokens to each expert -> int64 [M, V, E]; unknown domains (-1) do not count.

    Assignments are the router's choice: what a capacity dropped of it says nothing of the text.
    """
    n_experts = routing.logits_TE.shape[1]
    used_TK = (routing.chosen_TK >= 0) & (domains_T >= 0)[:, None]
    cell_T = domains_T * vocab_size + tokens_T
    cell_N = (cell_T[:, None] * n_experts + routing.chosen_TK)[used_TK]
    counts = torch.bincount(cell_N, minlength=n_domains * vocab_size * n_experts)
    return counts.view(n_domains, vocab_size, n_experts)


def mutual_information(counts_ME: Tensor) -> float:
    """I(M; E) = H(M) + H(E) - H(M, E) in bits of a table of counts or shares; 0 for an empty one."""
    return _entropy(counts_ME.sum(1)) + _entropy(counts_ME.sum(0)) - _entropy(counts_ME.flatten())


def domain_entropy(counts_ME: Tensor) -> float:
    """H(M) in bits: the most that mutual information can be."""
    return _entropy(counts_ME.sum(1))


def _entropy(counts_N: Tensor) -> float:
    """Of the shares that counts stand for, in bits."""
    p_N = counts_N.double() / counts_N.double().sum().clamp(min=1e-300)
    return float(torch.special.entr(p_N).sum()) / math.log(2)


def token_information(counts_MVE: Tensor) -> float:
    """The mutual information in bits that a router would have which chose by the token alone; see above."""
    counts_VE = counts_MVE.sum(0).double()
    choice_VE = counts_VE / counts_VE.sum(1, keepdim=True).clamp(min=1)
    return mutual_information(counts_MVE.sum(2).double() @ choice_VE)
