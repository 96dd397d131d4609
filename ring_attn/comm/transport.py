"""The `Transport` protocol: the contract every way of moving shards between ranks keeps.

A process hosts one or more ranks of the ring. Real training hosts one; `LocalTransport` hosts all of them in one process; the
loops above are the same for both. A payload is one contiguous tensor a hosted rank, for `pull` some that lie side by side, for
`push` rows that are yet to be written, of equal shape and dtype on all ranks.

Contract. Every process calls the same operations in the same order with the same offsets. What is sent may be read, and not
written, from the call until `wait()` has returned; afterwards its content is undefined (it may serve as the next receive
buffer), but for `pull`, which leaves it as it was. What is received may be read only after `wait()`. Once its buffers are
there, no operation synchronises the host with a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ring_attn.comm.replay import Replays
from ring_attn.layout import Part

Parts = Sequence[Sequence[Part]]
T = TypeVar("T")


class Pieces(tuple[Tensor, ...]):
    """Tensors [b, s, *] that lie beside each other in rows [b, s, e]."""

    def write(self, to: Tensor) -> None:
        """Writes the rows there."""
        torch.cat(list(self), -1, out=to)

    def packed(self) -> Tensor:
        """The rows in memory of their own, or as they were given where that is one tensor."""
        return self[0] if len(self) == 1 else torch.cat(list(self), -1)


class Unpacked(Protocol):
    """Rows [b, n, e], not yet put together."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def write(self, to: Tensor) -> None:
        """Writes them there; once."""

    def packed(self) -> Tensor:
        """The rows in memory that is the transport's from now on; once, in place of `write`."""


class Sums(Protocol):
    """What received rows are added to."""

    def add(self, x: Tensor, rows: range, places: Tensor | None = None) -> None:
        """Adds x [b, len(rows), e] to those rows of a shard, or, with `places`, int32 [b, len(rows), k] and contiguous, to each
        row those of x [1, n, e] that these name, -1 for none. Nobody may write to x afterwards.
        """


class Pending(Generic[T]):
    """An operation under way. `received` may be read only after `wait()`, which returns it, once."""

    def __init__(self, received: T, finish: Callable[[], None], what: str) -> None:
        self.received = received
        self._finish: Callable[[], None] | None = finish
        self._what = what

    def wait(self) -> T:
        """What was received. Raises RuntimeError on a second call, and where the transfer failed (naming it)."""
        if self._finish is None:
            raise RuntimeError(f"{self._what}: wait() was already called; a transfer is waited for exactly once")
        finish, self._finish = self._finish, None
        finish()
        return self.received


class Collective(Protocol):
    """What all ranks do together. `what` names the operation in errors, such as "ring forward, step 2".

    `ranks_per_node`: how many neighbours share a host where a network lies between the ranks, else None.
    """

    ranks_per_node: int | None
    ring_size: int
    hosted: tuple[int, ...]

    def all_gather(self, shards: Sequence[Tensor], *, what: str = "all-gather") -> Pending[list[Tensor]]:
        """The payloads of all ranks, in rank order."""

    def reduce_scatter(self, parts: Sequence[Sequence[Tensor]], *, what: str = "reduce-scatter") -> Pending[list[Tensor]]:
        """`parts[i][r]`: hosted rank i's contribution to rank r. Returns the sum for each hosted rank, in the parts' dtype."""


class Transport(Collective, Protocol):
    """Moves payloads between the ranks of one ring.

    `link`: what lies between the ranks, alike on all of them: "process", "gloo", "gpus" (of one host),
    "symmetric" (the same with symmetric memory), "network", or "nodes" (the same with symmetric memory inside hosts).
    `replays`: what CUDA graphs of calls over it share; None where no call should be made one.
    """

    link: str
    replays: Replays | None

    @property
    def beside(self) -> Transport:
        """The same ranks over wires on which nothing waits in line for what is under way here; itself where nothing does anyway
        or there are no others. Every process must ask for it at the same point of its calls.
        """

    def shift(self, shards: Sequence[Tensor], offset: int = 1, *, what: str = "shift") -> Pending[list[Tensor]]:
        """Sends each hosted rank's payload to rank + offset; receives from rank - offset, in the order of `hosted`."""

    def all_to_all(self, parts: Sequence[Sequence[Tensor]], *, what: str = "all-to-all") -> Pending[list[list[Tensor]]]:
        """`parts[i][r]`: what hosted rank i sends to rank r. Returns `[i][r]`: what hosted rank i got from rank r."""

    def pull(self, shards: Sequence[Pieces], parts: Parts, *, what: str = "pull") -> Pending[list[Tensor]]:
        """`parts[rank]`: which rows of others each rank of the ring wants, the same on every process. Returns them for each
        hosted rank, [b, n, e] in the order of its parts, out of the shards [b, s, e], each given as what lies beside each other
        in it.
        """

    def push(self, grads: Sequence[Unpacked], parts: Parts, into: Sequence[Sums], *, what: str = "push") -> Pending[None]:
        """The way back of `pull`: every part of `grads[i]`, which is [b, n, e] in the order of hosted rank i's parts, is added
        to the rows that it came from of `into`, one a hosted rank, when it is waited for. Sums go by rank.
        """


def check_payloads(transport: Collective, shards: Sequence[Tensor], what: str) -> None:
    """Raises ValueError unless there is one contiguous payload a hosted rank, all alike."""
    if len(shards) != len(transport.hosted):
        raise ValueError(f"{what}: {len(shards)} payloads for {len(transport.hosted)} hosted ranks; give one a hosted rank")
    if len(shards) > 1 and len({(x.shape, x.dtype, x.device) for x in shards}) > 1:
        raise ValueError(f"{what}: payloads differ in shape, dtype or device: {[(tuple(x.shape), x.dtype) for x in shards]}")
    if not all(x.is_contiguous() for x in shards):
        raise ValueError(f"{what}: payloads must be contiguous; pack or copy them first")


def check_parts(transport: Collective, parts: Sequence[Sequence[Tensor]], what: str) -> None:
    """Raises ValueError unless every hosted rank gives one part a rank of the ring."""
    if len(parts) != len(transport.hosted) or any(len(row) != transport.ring_size for row in parts):
        raise ValueError(
            f"{what}: got {[len(row) for row in parts]} parts; give {transport.ring_size} (one a rank of the ring) "
            f"for each of {len(transport.hosted)} hosted ranks"
        )
