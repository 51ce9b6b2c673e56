"""Keys and values of earlier tokens: one growing buffer a sequence, so that a ragged batch wastes nothing on padding.

FullCache keeps every position. RollingCache serves models with a sliding window of W positions: it keeps W slots, and
position p lies in slot p mod W (arXiv 2310.06825, figure 3), so its memory stops growing at the window.

Legend: T new tokens of all sequences, n new tokens of one sequence, L layers, S slots, G key/value heads, C head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.errors import ConfigError
from mixtral.model import KeysValues, Ragged

_FIRST_SLOTS = 64  # the smallest buffer; below it growing costs more than the memory it saves


class _Slots:
    """One sequence's buffer, and how many positions each layer has seen. Layers differ only during a forward pass.

    A head's slots lie one behind the other in memory, since attention reads them head by head.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device | str) -> None:
        shape = (2, config.n_layers, config.n_kv_heads, capacity, config.head_dim)
        self.kv_2LSGC = torch.empty(shape, dtype=dtype, device=device).transpose(2, 3)
        self.lengths_L = [0] * config.n_layers

    def reserve(self, slots: int, limit: int | None) -> None:
        """Make room for `slots` positions. A buffer that grows gets twice what is asked for, never beyond `limit`.

        So a long prompt is not copied for the first token after it; on a CPU what is not yet written takes no memory.
        """
        have = self.kv_2LSGC.shape[2]
        if slots <= have:
            return
        slots = max(2 * slots, _FIRST_SLOTS)
        slots = slots if limit is None else min(slots, limit)
        old_2LSGC = self.kv_2LSGC
        n_layers, _, n_heads, width = old_2LSGC.shape[1:]
        self.kv_2LSGC = old_2LSGC.new_empty(2, n_layers, n_heads, slots, width).transpose(2, 3)
        self.kv_2LSGC[:, :, :have] = old_2LSGC


class FullCache:
    """Every position of every sequence. Implements model.KVCache.

    Args:
        capacity: positions to reserve for each sequence at once; where more are needed, room is made for twice as many.
    """

    limit: int | None = None  # the most slots a sequence may have

    def __init__(
        self, config: ModelConfig, n_sequences: int, dtype: torch.dtype, device: torch.device | str = "cpu",
        capacity: int = 0,
    ) -> None:  # fmt: skip
        capacity = capacity if self.limit is None else min(capacity, self.limit)
        self._sequences = [_Slots(config, capacity, dtype, device) for _ in range(n_sequences)]
        self._places_S = torch.arange(max(capacity, _FIRST_SLOTS), device=device)

    @property
    def lengths(self) -> list[int]:
        """Positions seen so far by each sequence: where its next token stands."""
        return [slots.lengths_L[-1] for slots in self._sequences]

    def keep(self, indices: Sequence[int]) -> None:
        """Keep these sequences of the batch, in this order, and free the others."""
        self._sequences = [self._sequences[i] for i in indices]

    def extend(self, layer: int, keys_TGC: Tensor, values_TGC: Tensor, batch: Ragged) -> list[KeysValues]:
        """See model.KVCache. The batch's positions must go on where `lengths` says each sequence stands."""
        out, ends = [], batch.cu_seqlens.tolist()
        for slots, begin, end in zip(self._sequences, ends[:-1], ends[1:], strict=True):
            out.append(self._append(slots, layer, keys_TGC[begin:end], values_TGC[begin:end]))
            slots.lengths_L[layer] += end - begin
        return out

    def grow(self, counts: Sequence[int]) -> list[Tensor]:
        """Count `counts[i]` more positions of each sequence as seen, whose keys and values the caller writes himself.

        -> the sequences' buffers [2, L, S, G, C], keys and values, for all layers; position p belongs in slot p mod S.
        """
        for slots, count in zip(self._sequences, counts, strict=True):
            slots.lengths_L = [length + count for length in slots.lengths_L]
            needed = slots.lengths_L[-1]
            slots.reserve(needed if self.limit is None else min(needed, self.limit), self.limit)
        return [slots.kv_2LSGC for slots in self._sequences]

    def _append(self, slots: _Slots, layer: int, keys_nGC: Tensor, values_nGC: Tensor) -> KeysValues:
        begin, end = slots.lengths_L[layer], slots.lengths_L[layer] + len(keys_nGC)
        slots.reserve(end, self.limit)
        keys_SGC, values_SGC = slots.kv_2LSGC[:, layer].unbind()
        keys_SGC[begin:end] = keys_nGC
        values_SGC[begin:end] = values_nGC
        return KeysValues(keys_SGC[:end], values_SGC[:end], self._places(end))

    def _places(self, n: int) -> Tensor:
        """0 .. n - 1, a slice of one tensor that all layers and sequences share."""
        if n > len(self._places_S):
            self._places_S = torch.arange(max(n, 2 * len(self._places_S)), device=self._places_S.device)
        return self._places_S[:n]


class RollingCache(FullCache):
    """The last `config.sliding_window` positions of every sequence."""

    def __init__(
        self, config: ModelConfig, n_sequences: int, dtype: torch.dtype, device: torch.device | str = "cpu",
        capacity: int = 0,
    ) -> None:  # fmt: skip
        if config.sliding_window is None:
            raise ConfigError("rolling cache: this config has no sliding_window; use FullCache")
        self.limit = self.window = config.sliding_window
        super().__init__(config, n_sequences, dtype, device, capacity)

    def _append(self, slots: _Slots, layer: int, keys_nGC: Tensor, values_nGC: Tensor) -> KeysValues:
        begin, n = slots.lengths_L[layer], len(keys_nGC)
        if begin + n <= self.window:  # nothing falls out of the window yet
            return super()._append(slots, layer, keys_nGC, values_nGC)
        slots.reserve(self.window, self.limit)
        keys_SGC, values_SGC = slots.kv_2LSGC[:, layer].unbind()
        if n == 1:  # what the new token overwrites lies just outside its window, so it may be written first
            keys_SGC[begin % self.window] = keys_nGC[0]
            values_SGC[begin % self.window] = values_nGC[0]
            return KeysValues(keys_SGC, values_SGC, self._slot_positions(begin + 1))
        seen = self._with_older(keys_SGC, values_SGC, keys_nGC, values_nGC, begin)
        last = min(n, self.window)
        slot_n = torch.arange(begin + n - last, begin + n, device=keys_SGC.device) % self.window
        keys_SGC[slot_n] = keys_nGC[-last:]
        values_SGC[slot_n] = values_nGC[-last:]
        return seen

    def _with_older(
        self, keys_SGC: Tensor, values_SGC: Tensor, keys_nGC: Tensor, values_nGC: Tensor, begin: int
    ) -> KeysValues:
        """The buffer's positions and then the chunk's: early queries still see keys that late ones will overwrite."""
        older = min(begin, self.window)
        new_n = torch.arange(begin, begin + len(keys_nGC), device=keys_SGC.device)
        return KeysValues(
            torch.cat((keys_SGC[:older], keys_nGC)),
            torch.cat((values_SGC[:older], values_nGC)),
            torch.cat((self._slot_positions(begin)[:older], new_n)),
        )

    def _slot_positions(self, length: int) -> Tensor:
        """The position that each slot holds after `length` positions (negative: none yet) -> int64 [S].

        For a window of 4 after 6 positions: slots hold 4, 5, 2, 3.
        """
        last = length - 1
        return last - (last - self._places(self.window)) % self.window


def make_cache(
    config: ModelConfig, n_sequences: int, dtype: torch.dtype, device: torch.device | str = "cpu", capacity: int = 0
) -> FullCache:
    """An empty cache for `n_sequences`: rolling when the model has a sliding window, else full."""
    kind = FullCache if config.sliding_window is None else RollingCache
    return kind(config, n_sequences, dtype, device, capacity)
