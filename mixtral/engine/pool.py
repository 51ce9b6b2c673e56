"""KVPool: keys and values of earlier tokens in blocks, handed out to sequences by id (arXiv 2309.06180).

Position p of a sequence lies in the block number p // block_size of its table. With a sliding window, blocks that no
later token sees are freed. Sequences may share blocks; what one of them changes it copies first. Full blocks may be
remembered by their tokens, so that a sequence that begins alike need not be computed again (engine/blocks.py).

Legend: T new tokens of all sequences, L layers, G key/value heads, S slots, C head width.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.engine.blocks import Blocks, Prefix
from mixtral.errors import MixtralError, UsageError
from mixtral.hardware import free_memory_bytes
from mixtral.model import Ragged

BLOCK_SIZE = 32  # as many positions as native attention reads at once
_SHARE = 4  # of the free memory, a pool takes one part of so many unless told otherwise
_MOST_SEQUENCES = 64  # of the whole context: more room is of no use
_KEPT_BYTES = 64 << 20  # of an empty pool; the rest is given back


@dataclass
class _Sequence:
    length: int = 0  # positions so far
    blocks: list[int] = field(default_factory=list)  # -1: freed, out of the window
    room: int = 1  # blocks that it may come to need
    prefixes: list[Prefix] = field(default_factory=list)  # of what follows each remembered block, the start first


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
        self.blocks = Blocks(n_blocks)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._tables: tuple[tuple[int, ...], Tensor] | None = None  # of the last batch; None once some block changed

    @classmethod
    def within(
        cls, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu", n_bytes: int | None = None
    ) -> KVPool:
        """A pool that takes `n_bytes` and does not grow; by default a quarter of the free memory, or half of it where a
        text of the whole context needs as much. On a CPU the system gives memory only once it is written to.

        Raises UsageError when not even one block fits.
        """
        block = BLOCK_SIZE * config.kv_bytes(1, 8 * dtype.itemsize)
        if n_bytes is None:
            free, whole = free_memory_bytes(torch.device(device)), -(-config.context // BLOCK_SIZE) * block
            n_bytes = min(max(free // _SHARE, min(whole, free // 2), block), _MOST_SEQUENCES * whole)
        if n_bytes < block:
            raise UsageError(f"cache: {n_bytes:,} bytes hold no block of {BLOCK_SIZE} positions, which takes {block:,}")
        return cls(config, dtype, device, n_blocks=n_bytes // block, grows=False)

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.pool_L2GSC.dtype

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def n_free(self) -> int:
        """Blocks that no sequence uses."""
        return self.blocks.n_free

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        layers, two, heads, _, width = self.pool_L2GSC.shape
        return layers * two * heads * width * self.block_size * self.dtype.itemsize

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

    def add(self, most: int = 1) -> int:
        """A new, empty sequence, which may come to have `most` positions -> its id."""
        with self.lock:
            self._next_id += 1
            self._sequences[self._next_id] = _Sequence(room=self._blocks_of(most))
            return self._next_id

    def add_remembered(self, tokens: Sequence[int], start: Hashable, most: int = 1) -> int:
        """A new sequence with as many of the first tokens as are remembered, but for the last token -> its id.

        Args:
            start: what else keys and values depend on, such as the number of experts a token takes.
        """
        with self.lock:
            id = self.add(most)
            sequence, size = self._sequences[id], self.block_size
            sequence.prefixes.append(("start", start))
            for end in range(size, len(tokens), size):
                found = self.blocks.find(sequence.prefixes[-1], tuple(tokens[end - size : end]))
                if found is None:
                    break
                self.blocks.hold(found[0])
                sequence.blocks.append(found[0])
                sequence.prefixes.append(found[1])
                sequence.length = end
            return id

    def remember(self, id: int, tokens: Sequence[int]) -> None:
        """Remember the full blocks of a sequence of `add_remembered`, whose positions hold these tokens."""
        with self.lock:
            sequence, size = self._sequence(id), self.block_size
            for i in range(len(sequence.prefixes) - 1, sequence.length // size):
                block = sequence.blocks[i]
                if block < 0:  # out of the window already
                    return
                chunk = tuple(tokens[i * size : (i + 1) * size])
                sequence.prefixes.append(self.blocks.remember(block, sequence.prefixes[-1], chunk))

    def forget_remembered(self) -> None:
        """Whatever is remembered is not found any more."""
        with self.lock:
            self.blocks.forget_all()
            for sequence in self._sequences.values():
                sequence.prefixes = []

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
            prefixes = of.prefixes[: 1 + length // self.block_size]
            self._sequences[new] = _Sequence(length, of.blocks[: self._blocks_of(length)], of.room, prefixes)
            for block in self._sequences[new].blocks:
                if block >= 0:
                    self.blocks.hold(block)
            return new

    def truncate(self, id: int, length: int) -> None:
        """Forget the positions from `length` on. Raises UsageError where its next token would miss freed positions."""
        with self.lock:
            sequence = self._sequence(id)
            self._check_within(id, sequence, length)
            self._release(sequence.blocks[self._blocks_of(length) :])
            del sequence.blocks[self._blocks_of(length) :]
            del sequence.prefixes[1 + length // self.block_size :]
            sequence.length = length

    def free(self, id: int) -> None:
        """Forget a sequence."""
        with self.lock:
            self._release(self._sequence(id).blocks)
            del self._sequences[id]
            if not self._sequences and self.grows and self.nbytes > _KEPT_BYTES:
                self.pool_L2GSC = self.pool_L2GSC.new_empty((*self.pool_L2GSC.shape[:3], 0, self.pool_L2GSC.shape[4]))
                self.blocks = Blocks()

    def held(self, id: int) -> int:
        """Blocks that a sequence has."""
        return len(self._sequence(id).blocks)

    def needed(self, id: int, n: int) -> int:
        """Blocks that `n` more positions of a sequence take, a copy of a shared one included."""
        return self._needed(self._sequence(id), n)

    def blocks_of(self, length: int) -> int:
        """Blocks of so many positions."""
        return self._blocks_of(length)

    def batch(self, chunks: Sequence[tuple[int, Sequence[int]]]) -> Ragged:
        """The next tokens of some sequences, by id, as a batch; the pool counts them as seen and has room for them.

        Raises MixtralError when there is no room: nothing has changed then but for blocks out of the window.
        """
        with self.lock:
            sequences = [self._sequence(id) for id, _ in chunks]
            starts = [s.length for s in sequences]
            if all(len(chunk) == 1 and self._has_room(s) for s, (_, chunk) in zip(sequences, chunks, strict=True)):
                for sequence in sequences:  # the usual case in decoding: the same, sooner
                    sequence.length += 1
                tokens, positions = [chunk[0] for _, chunk in chunks], starts
                size, ends = self.block_size, [s.blocks[-1] for s in sequences]
                slots = [end * size + p % size for end, p in zip(ends, starts, strict=True)]
            else:
                self._make_room([(s, len(tokens)) for s, (_, tokens) in zip(sequences, chunks, strict=True)])
                tokens = [t for _, chunk in chunks for t in chunk]
                positions = [p for s, start in zip(sequences, starts, strict=True) for p in range(start, s.length)]
                slots = [slot for s, start in zip(sequences, starts, strict=True) for slot in self._slots(s, start)]
            of_tokens = torch.tensor([tokens, positions, slots], dtype=torch.int64, device=self.pool_L2GSC.device)
            tokens_T, positions_T, slots_T = of_tokens.unbind()
            context_lens = torch.tensor([s.length for s in sequences], dtype=torch.int64)
            cu_seqlens = Ragged.offsets([len(chunk) for _, chunk in chunks])
            tables = self._block_tables(tuple(id for id, _ in chunks), sequences)
            return Ragged(tokens_T, positions_T, cu_seqlens, tables, context_lens, slots_T)

    def _has_room(self, sequence: _Sequence) -> bool:
        """Whether another position goes into its last block, and that is all there is to do."""
        if self.window is not None or not sequence.length % self.block_size:
            return False
        end = sequence.blocks[-1]
        return self.blocks.users(end) == 1 and not self.blocks.is_remembered(end)

    def _make_room(self, wanted: Sequence[tuple[_Sequence, int]]) -> None:
        """Room for so many more positions of each."""
        for sequence, _ in wanted:
            self._free_before_window(sequence)
        self._reserve(sum(self._needed(sequence, n) for sequence, n in wanted))
        for sequence, n in wanted:
            self._extend(sequence, n)

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

    def _release(self, blocks: Sequence[int]) -> None:
        self._tables = None
        self.blocks.release(blocks)

    def _free_before_window(self, sequence: _Sequence) -> None:
        end = self._oldest(sequence.length) // self.block_size
        for i in reversed(range(min(end, len(sequence.blocks)))):
            if sequence.blocks[i] < 0:
                break
            self._release([sequence.blocks[i]])
            sequence.blocks[i] = -1

    def _shared_end(self, sequence: _Sequence) -> bool:
        """Whether its next token belongs in a block that others use too."""
        return sequence.length % self.block_size > 0 and self.blocks.users(sequence.blocks[-1]) > 1

    def _needed(self, sequence: _Sequence, n: int) -> int:
        """Blocks that `n` more positions take, a copy of the last one included."""
        new = self._blocks_of(sequence.length + n) - len(sequence.blocks)
        return new + (n > 0 and self._shared_end(sequence))

    def _reserve(self, n: int) -> None:
        """Make sure that `n` blocks are free."""
        if n <= self.n_free:
            return
        if not self.grows:
            raise MixtralError(
                f"KV pool: {n} blocks of {self.block_size} positions are needed and {self.n_free} of "
                f"{self.n_blocks} are free; give it more, or run fewer sequences at once"
            )
        more = max(n - self.n_free, self.n_blocks)
        old, (layers, two, heads, slots, width) = self.pool_L2GSC, self.pool_L2GSC.shape
        self.pool_L2GSC = old.new_empty((layers, two, heads, slots + more * self.block_size, width))
        self.pool_L2GSC[:, :, :, :slots] = old
        self.blocks.grow(more)

    def _extend(self, sequence: _Sequence, n: int) -> None:
        if n and self._shared_end(sequence):
            self._copy_end(sequence)
        elif n and sequence.length % self.block_size:
            self.blocks.forget(sequence.blocks[-1])  # cut off inside; what is written now is another text
        for _ in range(self._blocks_of(sequence.length + n) - len(sequence.blocks)):
            wanted = sequence.blocks[-1] + 1 if sequence.blocks else -1
            sequence.blocks.append(self._take(wanted, sequence.room - len(sequence.blocks)))
        sequence.length += n

    def _copy_end(self, sequence: _Sequence) -> None:
        old, new = sequence.blocks[-1], self._take(-1, 1)
        slots = self.pool_L2GSC.unflatten(3, (-1, self.block_size))
        slots[:, :, :, new] = slots[:, :, :, old]
        self._release([old])
        sequence.blocks[-1] = new

    def _take(self, wanted: int, room: int) -> int:
        self._tables = None
        return self.blocks.take(wanted, room)

    def _slots(self, sequence: _Sequence, start: int) -> list[int]:
        """The slots of the positions from `start` on."""
        size, blocks = self.block_size, sequence.blocks
        return [blocks[p // size] * size + p % size for p in range(start, sequence.length)]
