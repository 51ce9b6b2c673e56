"""Blocks: which blocks of a pool are in use, by how many sequences, and which prefixes they hold. Numbers alone.

A full block may be remembered by the tokens that led to it. When its last user leaves, it stays findable until the room
is needed; what was left longest ago goes first. Keys are compared token by token: there are no collisions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence

Prefix = Hashable  # stands for all the tokens before a block: a number given by `remember`, or what a text begins with


class Blocks:
    """Numbers of blocks from 0 on, handed out so that a sequence tends to lie in a row.

    Args:
        n: how many there are.
    """

    def __init__(self, n: int = 0) -> None:
        self._users = [0] * n
        self.n_free = n  # that no sequence uses; remembered ones count
        self._left: dict[int, None] = {}  # used before, and free; the oldest first
        self._kept: dict[int, None] = {}  # free, and remembered; the oldest first
        self._fresh = 0  # blocks from here on have never been handed out, but for some that followed others
        self._gaps: deque[range] = deque()  # left out so that sequences could grow
        self._found: dict[tuple[Prefix, tuple[int, ...]], tuple[int, int]] = {}  # -> (block, number of the prefix)
        self._keys: dict[int, tuple[Prefix, tuple[int, ...]]] = {}  # of each block that is remembered
        self._next_prefix = 0

    def __len__(self) -> int:
        return len(self._users)

    @property
    def n_remembered(self) -> int:
        """Blocks that can be found by their tokens, in use or not."""
        return len(self._keys)

    def users(self, block: int) -> int:
        return self._users[block]

    def grow(self, more: int) -> None:
        """Add free blocks at the end."""
        self._users += [0] * more
        self.n_free += more

    # -- handing out -------------------------------------------------------------------------------------------------

    def take(self, wanted: int = -1, room: int = 1) -> int:
        """A free block for one user: `wanted` if it is free and holds nothing remembered; else one with `room` blocks
        behind it that were never used, if there are; else any, and at last what is remembered. There must be one."""
        if not (0 <= wanted < len(self._users) and self._is_empty(wanted)):
            wanted = self._any(room)
        self._left.pop(wanted, None)
        self._users[wanted] = 1
        self.n_free -= 1
        return wanted

    def hold(self, block: int) -> None:
        """One more user."""
        if self._users[block] == 0:
            self._kept.pop(block, None)
            self._left.pop(block, None)
            self.n_free -= 1
        self._users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user less of each, -1 for none. Of what is remembered, the last block is forgotten first: the first ones
        of a text are those that others share."""
        for block in blocks:
            if block >= 0 and block not in self._keys:
                self._leave(block, self._left)
        for block in reversed(blocks):
            if block in self._keys:
                self._leave(block, self._kept)

    def _leave(self, block: int, free: dict[int, None]) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            free[block] = None
            self.n_free += 1

    def _is_empty(self, block: int) -> bool:
        return self._users[block] == 0 and block not in self._kept

    def _any(self, room: int) -> int:
        if self._left:
            return next(iter(self._left))
        if (block := self._never_used(room)) is not None:
            return block
        block = next(iter(self._kept))
        self.forget(block)
        return block

    def _never_used(self, room: int) -> int | None:
        n = len(self._users)
        while self._fresh < n and not self._is_empty(self._fresh):
            self._fresh += 1
        if self._fresh < n:
            block, end = self._fresh, min(n, self._fresh + max(1, room))
            self._fresh = end
            if end > block + 1:
                self._gaps.append(range(block + 1, end))
            return block
        while self._gaps:
            gap = self._gaps.popleft()
            for block in gap:
                if self._is_empty(block):
                    self._gaps.appendleft(range(block + 1, gap.stop))
                    return block
        return None

    # -- prefixes ----------------------------------------------------------------------------------------------------

    def remember(self, block: int, prefix: Prefix, tokens: tuple[int, ...]) -> int:
        """A full block in use holds these tokens, which stand behind `prefix` -> the prefix of what follows."""
        key = (prefix, tokens)
        if key not in self._found:
            self._next_prefix += 1
            self._found[key] = (block, self._next_prefix)
            self._keys[block] = key
        return self._found[key][1]

    def is_remembered(self, block: int) -> bool:
        return block in self._keys

    def find(self, prefix: Prefix, tokens: tuple[int, ...]) -> tuple[int, int] | None:
        """(block, prefix of what follows) where these tokens are remembered behind `prefix`."""
        return self._found.get((prefix, tokens))

    def forget(self, block: int) -> None:
        """What the block holds cannot be found any more."""
        if (key := self._keys.pop(block, None)) is not None:
            del self._found[key]
            if block in self._kept:
                del self._kept[block]
                self._left[block] = None

    def forget_all(self) -> None:
        """Nothing is remembered."""
        for block in list(self._keys):
            self.forget(block)

    def used(self) -> Iterable[int]:
        """The number of users of each block."""
        return iter(self._users)
