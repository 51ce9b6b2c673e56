"""KVPool: keys and values of earlier tokens in blocks, handed out to sequences by id (arXiv 2309.06180).

Position p of a sequence lies in the block number p // block_size of its table. With a sliding window, blocks that no
later token sees are freed. Sequences may share blocks; what one of them changes it copies first.

Legend: T new tokens of all sequences, L layers, G key/value heads, S slots, C head width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.errors import MixtralError, UsageError
from mixtral.model import Ragged

BLOCK_SIZE = 32  # as many positions as native attention reads at once
_KEPT_BYTES = 64 << 20  # of an empty pool; the rest is given back


@dataclass
class _Sequence:
    length: int = 0  # positions so far
    blocks: list[int] = field(default_factory=list)  # -1: freed, out of the window


class KVPool:
    """Blocks of slots for keys and values, and which sequence has which. Implements model.KVCache.

    Its methods may be called by several threads.

    Args:
        n_blocks: to begin with.
        grows: make room for twice as many blocks when none is free; else that is an error.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu",
        block_size: int = BLOCK_SIZE, n_blocks: int = 0, grows: bool = True,
    ) -> None:  # fmt: skip
        if block_size < 1 or n_blocks < 0:
            raise UsageError(f"KV pool: {n_blocks} blocks of {block_size} slots: a block needs at least one slot")
        self.block_size, self.window, self.grows = block_size, config.sliding_window, grows
        self.lock = threading.RLock()  # also held by whoever reads or writes the slots
        shape = (config.n_layers, 2, config.n_kv_heads, n_blocks * block_size, config.head_dim)
        self.pool_L2GSC = torch.empty(shape, dtype=dtype, device=device)
        self._users = [0] * n_blocks  # of each block
        self._free = n_blocks  # how many have none
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._tables: tuple[tuple[int, ...], Tensor] | None = None  # of the last batch; None once some block changed

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.pool_L2GSC.dtype

    @property
    def n_blocks(self) -> int:
        return len(self._users)

    @property
    def n_free(self) -> int:
        """Blocks that no sequence uses."""
        return self._free

    @property
    def nbytes(self) -> int:
        return self.pool_L2GSC.nbytes

    @property
    def ids(self) -> list[int]:
        """The sequences in the pool, oldest first."""
        return list(self._sequences)

    def length(self, id: int) -> int:
        """Positions of a sequence so far: where its next token stands."""
        return self._sequence(id).length

    def layer(self, layer: int) -> Tensor:
        """See model.KVCache -> [2, G, S, C]."""
        return self.pool_L2GSC[layer]

    # -- sequences -----------------------------------------------------------------------------------------------------

    def add(self) -> int:
        """A new, empty sequence -> its id."""
        with self.lock:
            self._next_id += 1
            self._sequences[self._next_id] = _Sequence()
            return self._next_id

    def share(self, id: int, length: int | None = None) -> int:
        """A new sequence that begins with the first `length` positions of another (all by default) -> its id.

        Nothing is copied until one of the two writes into a block that both use. Raises UsageError where some of these
        positions are not in the pool (any more).
        """
        with self.lock:
            of = self._sequence(id)
            length = of.length if length is None else length
            self._check_within(id, of, length)
            new = self.add()
            self._sequences[new] = _Sequence(length, of.blocks[: self._blocks_of(length)])
            for block in self._sequences[new].blocks:
                if block >= 0:
                    self._users[block] += 1
            return new

    def truncate(self, id: int, length: int) -> None:
        """Forget the positions from `length` on. Raises UsageError where its next token would miss freed positions."""
        with self.lock:
            sequence = self._sequence(id)
            self._check_within(id, sequence, length)
            self._release(sequence.blocks[self._blocks_of(length) :])
            del sequence.blocks[self._blocks_of(length) :]
            sequence.length = length

    def free(self, id: int) -> None:
        """Forget a sequence."""
        with self.lock:
            self._release(self._sequence(id).blocks)
            del self._sequences[id]
            if not self._sequences and self.grows and self.nbytes > _KEPT_BYTES:
                self.pool_L2GSC = self.pool_L2GSC.new_empty((*self.pool_L2GSC.shape[:3], 0, self.pool_L2GSC.shape[4]))
                self._users, self._free = [], 0

    def batch(self, chunks: Sequence[tuple[int, Sequence[int]]]) -> Ragged:
        """The next tokens of some sequences, by id, as a batch; the pool counts them as seen and has room for them.

        Raises MixtralError when there is no room: nothing has changed then but for blocks out of the window.
        """
        with self.lock:
            sequences = [self._sequence(id) for id, _ in chunks]
            starts = [s.length for s in sequences]
            for sequence in sequences:
                self._free_before_window(sequence)
            self._reserve(sum(self._needed(s, len(t)) for s, (_, t) in zip(sequences, chunks, strict=True)))
            for sequence, (_, tokens) in zip(sequences, chunks, strict=True):
                self._extend(sequence, len(tokens))
            tokens = [t for _, chunk in chunks for t in chunk]
            positions = [p for s, start in zip(sequences, starts, strict=True) for p in range(start, s.length)]
            slots = [slot for s, start in zip(sequences, starts, strict=True) for slot in self._slots(s, start)]
            of_tokens = torch.tensor([tokens, positions, slots], dtype=torch.int64, device=self.pool_L2GSC.device)
            tokens_T, positions_T, slots_T = of_tokens.unbind()
            context_lens = torch.tensor([s.length for s in sequences], dtype=torch.int64)
            cu_seqlens = Ragged.offsets([len(chunk) for _, chunk in chunks])
            tables = self._block_tables(tuple(id for id, _ in chunks), sequences)
            return Ragged(tokens_T, positions_T, cu_seqlens, tables, context_lens, slots_T)

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _sequence(self, id: int) -> _Sequence:
        if id not in self._sequences:
            raise UsageError(f"KV pool: no sequence {id}; it was never added, or has been freed")
        return self._sequences[id]

    def _block_tables(self, ids: tuple[int, ...], sequences: list[_Sequence]) -> Tensor:
        """See Ragged. Read only: that of the last batch, while these sequences have the blocks that they had."""
        if self._tables is None or self._tables[0] != ids:
            most = max((len(s.blocks) for s in sequences), default=0)
            tables = [s.blocks + [-1] * (most - len(s.blocks)) for s in sequences]
            self._tables = ids, torch.tensor(tables, dtype=torch.int64).view(len(sequences), most)
        return self._tables[1]

    def _blocks_of(self, length: int) -> int:
        return -(-length // self.block_size)

    def _oldest(self, length: int) -> int:
        """The oldest position that the token at position `length` sees."""
        return 0 if self.window is None else max(0, length - self.window + 1)

    def _check_within(self, id: int, sequence: _Sequence, length: int) -> None:
        if not 0 <= length <= sequence.length:
            raise UsageError(f"KV pool: sequence {id} has {sequence.length} positions, not {length}")
        if -1 in sequence.blocks[self._oldest(length) // self.block_size : self._blocks_of(length)]:
            raise UsageError(f"KV pool: positions before {length} of sequence {id} are out of its window, and freed")

    def _release(self, blocks: Iterable[int]) -> None:
        self._tables = None
        for block in blocks:
            if block >= 0:
                self._users[block] -= 1
                self._free += self._users[block] == 0

    def _free_before_window(self, sequence: _Sequence) -> None:
        end = self._oldest(sequence.length) // self.block_size
        for i in reversed(range(min(end, len(sequence.blocks)))):
            if sequence.blocks[i] < 0:
                break
            self._release([sequence.blocks[i]])
            sequence.blocks[i] = -1

    def _shared_end(self, sequence: _Sequence) -> bool:
        """Whether its next token belongs in a block that others use too."""
        return sequence.length % self.block_size > 0 and self._users[sequence.blocks[-1]] > 1

    def _needed(self, sequence: _Sequence, n: int) -> int:
        """Blocks that `n` more positions take, a copy of the last one included."""
        new = self._blocks_of(sequence.length + n) - len(sequence.blocks)
        return new + (n > 0 and self._shared_end(sequence))

    def _reserve(self, n: int) -> None:
        """Make sure that `n` blocks are free."""
        if n <= self._free:
            return
        if not self.grows:
            raise MixtralError(f"KV pool: {n} blocks of {self.block_size} positions are needed and {self._free} of "
                               f"{self.n_blocks} are free; give it more, or run fewer sequences at once")
        more = max(n - self._free, self.n_blocks)
        old, (layers, two, heads, slots, width) = self.pool_L2GSC, self.pool_L2GSC.shape
        self.pool_L2GSC = old.new_empty((layers, two, heads, slots + more * self.block_size, width))
        self.pool_L2GSC[:, :, :, :slots] = old
        self._users += [0] * more
        self._free += more

    def _extend(self, sequence: _Sequence, n: int) -> None:
        if n and self._shared_end(sequence):
            self._copy_end(sequence)
        for _ in range(self._blocks_of(sequence.length + n) - len(sequence.blocks)):
            sequence.blocks.append(self._take(sequence.blocks[-1] + 1 if sequence.blocks else -1))
        sequence.length += n

    def _copy_end(self, sequence: _Sequence) -> None:
        old, new = sequence.blocks[-1], self._take(-1)
        slots = self.pool_L2GSC.unflatten(3, (-1, self.block_size))
        slots[:, :, :, new] = slots[:, :, :, old]
        self._release([old])
        sequence.blocks[-1] = new

    def _take(self, wanted: int) -> int:
        """A free block: `wanted` if it is one, so that a sequence lies in a row, else where the most room is."""
        if not 0 <= wanted < self.n_blocks or self._users[wanted]:
            wanted = self._roomiest()
        self._users[wanted] = 1
        self._free -= 1
        self._tables = None
        return wanted

    def _roomiest(self) -> int:
        """The middle of the longest run of free blocks, so that the sequence before it can grow too; its start at 0."""
        best, length, begin = 0, 0, None
        for i, users in enumerate([*self._users, 1]):
            if users == 0 and begin is None:
                begin = i
            elif users and begin is not None:
                if i - begin > length:
                    best, length = begin, i - begin
                begin = None
        return best + length // 2 if best else best

    def _slots(self, sequence: _Sequence, start: int) -> list[int]:
        """The slots of the positions from `start` on."""
        size, blocks = self.block_size, sequence.blocks
        return [blocks[p // size] * size + p % size for p in range(start, sequence.length)]
