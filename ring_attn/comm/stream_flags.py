"""Flags by which GPUs of one host tell each other what may be written and read, without a multiprocessor: their front ends
write flags into each other's memory and wait for those in their own, as stream memory operations of CUDA's driver.

Note [flags]: a rank has two flags for each rank. "There" means that the other has written what it puts up; it is taken down
when this rank has read. "Read" means that the other, or this rank itself, has read what it wanted, also where that was nothing;
it is taken down before this rank writes the next. A rank raises "read" only behind "there" of all, and "there" only behind
"read" of all. So a flag is raised again only when it is down. Between transfers all that is left over is "read", as when the
memory was made, and what a rank does about the next comes behind its own "read" on whatever stream: transfers may be captured
in CUDA graphs, replayed, and mixed with others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ring_attn.driver import EQUAL, WAIT, WRITE, Operation, Operations

_BYTES = 4


class Signals(NamedTuple):
    """What a rank does about a transfer, each for `enqueue`: before it writes what it puts up, when that is written, before it
    reads what others put up, and when it has read that.
    """

    to_write: Operations
    written: Operations
    to_read: Operations
    have_read: Operations


class Flags:
    """A rank's flags at all ranks: `at` are the addresses of each rank's, 32 bits a flag and at first as
    `flags_at_first` says, in the addresses of this process.
    """

    def __init__(self, at: Sequence[int], rank: int) -> None:
        self._at, self._rank = at, rank

    def signals(self, sources: Collection[int]) -> Signals:
        """Of a transfer in which this rank reads from `sources`."""
        mine, ranks = self._rank, range(len(self._at))
        others = [rank for rank in ranks if rank != mine]
        to_write = [_wait(self._read(mine, rank)) for rank in ranks] + [_write(self._read(mine, rank), 0) for rank in ranks]
        written = [_write(self._there(rank, mine), 1) for rank in others]
        to_read = [_wait(self._there(mine, rank)) for rank in others if rank in sources]
        have_read = [_wait(self._there(mine, rank)) for rank in others if rank not in sources]
        have_read += [_write(self._there(mine, rank), 0) for rank in others]
        have_read += [_write(self._read(rank, mine), 1) for rank in ranks]
        return Signals(*map(_array, (to_write, written, to_read, have_read)))

    def _there(self, at: int, of: int) -> int:
        return self._at[at] + of * _BYTES

    def _read(self, at: int, of: int) -> int:
        return self._at[at] + (len(self._at) + of) * _BYTES


def flags_at_first(ranks: int) -> list[int]:
    """What a rank's flags must be before anybody uses them."""
    return [0] * ranks + [1] * ranks


def _wait(address: int) -> Operation:
    return Operation(WAIT, address, 1, EQUAL)


def _write(address: int, value: int) -> Operation:
    return Operation(WRITE, address, value)


def _array(operations: Sequence[Operation]) -> Operations:
    return (Operation * len(operations))(*operations)
