"""Routers that explore: noise in training, none in evaluation. It comes from torch's own generator.

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixtral.config.router import Jitter
from mixtral.moe.routers.topk import TopKRouter


class NoisyRouter(TopKRouter):
    """logits = x W^T + normal * softplus(x W_noise^T) (arXiv 1701.06538, equation 4)."""

    noise_weight: Tensor

    def _logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = super()._logits(x_TD)
        if not self.training:
            return logits_TE
        size_TE = nn.functional.softplus(nn.functional.linear(x_TD.float(), self.noise_weight.float()))
        return logits_TE + torch.randn_like(logits_TE) * size_TE


class JitterRouter(TopKRouter):
    """logits = (x * uniform(1 - eps, 1 + eps)) W^T (arXiv 2101.03961, section 2.4); experts see x itself."""

    options: Jitter

    def _logits(self, x_TD: Tensor) -> Tensor:
        if not self.training:
            return super()._logits(x_TD)
        x_TD = x_TD.float()
        factor_TD = torch.empty_like(x_TD).uniform_(1 - self.options.eps, 1 + self.options.eps)
        return super()._logits(x_TD * factor_TD)
