"""What calibration text sends through each matrix: the second moments of its inputs, by which rounding is weighted.

For an error e in a row of W the output is wrong by e . x, in the mean of squares e^T E[x x^T] e. All of E[x x^T] is
kept for attention and output; of the experts' its diagonal, since there would be a matrix for each of them, and F is
large. The model runs layer by layer, one layer's weights in memory at a time, in fp32.

Every expert is calibrated, whatever its share of tokens: on the rows that are routed to it, and on `SAMPLE` tokens
spread evenly over the text, which every expert sees. An expert with many rows is hardly moved by these; one with few
or none is rounded for the tokens there are, and not for noise. Mixing in the moments of all experts would not do for
w2: its inputs are the expert's own hidden units, which no other expert shares.

Legend: T tokens, D model width, F expert hidden width, E experts, V vocabulary, n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mixtral import kernels
from mixtral.config import ModelConfig
from mixtral.config.router import TokenK
from mixtral.model import Ragged
from mixtral.model.norm import RMSNorm
from mixtral.model.rope import rotary_angles
from mixtral.model.transformer import Block
from mixtral.moe import Experts, FeedForward, MoE, Routing
from mixtral.weights.load import StateReader
from mixtral.weights.names import fixed_dtype
from mixtral.weights.progress import Progress

SAMPLE = 128  # tokens that every expert sees: the mean square of an input is then known to some 15 %
_BATCH = 2048  # tokens that run at once


class _Moments:
    """Sums of squares, or of all products, of inputs by name, and how many rows they are of."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def add(self, name: str, x_nD: Tensor, pairs: bool = False) -> None:
        """Rows of the inputs of `name`; `pairs`: [D, D] of all products, not [D] of squares alone."""
        x_nD = x_nD.float()
        sums = x_nD.T @ x_nD if pairs else x_nD.square().sum(0)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._rows[name] = self._rows.get(name, 0) + len(x_nD)

    def mean(self, name: str) -> Tensor:
        return self._sums[name] / self._rows[name]


@torch.no_grad()
def second_moments(
    reader: StateReader, config: ModelConfig, sequences: Sequence[Sequence[int]], progress: Progress | None = None
) -> dict[str, Tensor]:
    """The importance of inputs for `quantise_folder`: by our parameter's name, in fp32.

    [D, D] for attention and output, [E, D] for experts, [D] for a dense or shared network.

    `progress` is called after each layer, with layers in the place of bytes.
    """
    batches = [Ragged.of(part) for part in _batches(sequences)]
    embedding_VD = reader.read("embedding.weight").float()
    hidden = [embedding_VD[batch.tokens_T] for batch in batches]
    del embedding_VD
    angles = [rotary_angles(batch.positions_T, config.head_dim, config.rope_theta) for batch in batches]
    by_token = isinstance(config.router_options, TokenK)
    k_V = reader.read("k_of_token") if by_token else None
    every = max(1, sum(len(batch.tokens_T) for batch in batches) // SAMPLE)
    found: dict[str, Tensor] = {}
    for layer in range(config.n_layers):
        watched = _Watched(reader, config, layer, every)
        for i, batch in enumerate(batches):
            hidden[i] = watched.run(hidden[i], angles[i], batch, None if k_V is None else k_V[batch.tokens_T])
        found |= watched.moments()
        del watched  # before the next layer comes into memory
        if progress is not None:
            progress("calibrating", layer + 1, config.n_layers)
    if not config.tie_embeddings:
        norm = RMSNorm(config.dim, config.norm_eps)
        norm.weight.copy_(reader.read("norm.weight"))
        seen = _Moments()
        for x_TD in hidden:
            seen.add("output.weight", norm(x_TD), pairs=True)
        found["output.weight"] = seen.mean("output.weight")
    return found


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Runs of sequences of some `_BATCH` tokens."""
    part: list[Sequence[int]] = []
    for sequence in sequences:
        part.append(sequence)
        if sum(map(len, part)) >= _BATCH:
            yield part
            part = []
    if part:
        yield part


def _before(module: nn.Module, look: Callable[[Tensor], None]) -> None:
    """Let `look` see the module's first input at every call."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        look(inputs[0])

    module.register_forward_pre_hook(hook)


class _Watched:
    """One layer, and what goes into its matrices."""

    def __init__(self, reader: StateReader, config: ModelConfig, layer: int, every: int) -> None:
        self.prefix, self.every, self.layer = f"layers.{layer}.", every, layer
        self.seen = _Moments()
        with torch.device("meta"):
            self.block = Block(config, layer).eval()
        wanted = {name: fixed_dtype(self.prefix + name, config) or torch.float32 for name in self.block.state_dict()}
        state = {name: reader.read(self.prefix + name).to(dtype) for name, dtype in wanted.items()}
        self.block.load_state_dict(state, assign=True)
        self.ffn_inputs: list[Tensor] = []
        # What the hooks hold must not hold the block: such a circle would keep it until the next garbage collection.
        seen, ffn_inputs = self.seen, self.ffn_inputs
        _before(self.block.attention.wqkv, lambda x: seen.add("attention.wqkv.weight", x, pairs=True))
        _before(self.block.attention.wo, lambda x: seen.add("attention.wo.weight", x, pairs=True))
        _before(self.block.ffn, ffn_inputs.append)

    def run(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], batch: Ragged, k: Tensor | None) -> Tensor:
        """The layer's output for a batch, whose inputs are counted on the way."""
        y_TD, routing = self.block(x_TD, angles, batch, self.layer, None, None, k)
        ffn, h_TD = self.block.ffn, self.ffn_inputs.pop()
        if isinstance(ffn, MoE):
            self._experts(ffn.experts, h_TD, routing)
            if ffn.shared is not None:
                self._network("ffn.shared.", ffn.shared.w13, h_TD)
        else:
            assert isinstance(ffn, FeedForward)
            self._network("ffn.", ffn.w13, h_TD)
        return y_TD

    def _experts(self, experts: Experts, x_TD: Tensor, routing: Routing) -> None:
        sample_n = torch.arange(0, len(x_TD), self.every)
        for e in range(len(experts.w13)):
            own_n = (routing.experts_TK == e).any(-1).nonzero().flatten()
            self._network(f"ffn.experts.{e}.", experts.w13[e], x_TD[torch.cat((own_n, sample_n))])

    def _network(self, name: str, w13_2FD: Tensor, x_nD: Tensor) -> None:
        self.seen.add(name + "w13", x_nD)
        gate_nF, up_nF = kernels.linear(x_nD, w13_2FD.flatten(0, 1)).chunk(2, dim=-1)
        self.seen.add(name + "w2", nn.functional.silu(gate_nF) * up_nF)

    def moments(self) -> dict[str, Tensor]:
        """By our parameters' full names; those of experts stacked."""
        names = [name for name in self.block.state_dict() if name.endswith((".wqkv.weight", ".wo.weight"))]
        found = {name: self.seen.mean(name) for name in names}
        ffn = self.block.ffn
        for w in ("w13", "w2"):
            if isinstance(ffn, MoE):
                each = [self.seen.mean(f"ffn.experts.{e}.{w}") for e in range(len(ffn.experts.w13))]
                found[f"ffn.experts.{w}"] = torch.stack(each)
                if ffn.shared is not None:
                    found[f"ffn.shared.{w}"] = self.seen.mean(f"ffn.shared.{w}")
            else:
                found[f"ffn.{w}"] = self.seen.mean(f"ffn.{w}")
        return {self.prefix + name: moments for name, moments in found.items()}
