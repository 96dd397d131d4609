"""Every rank of the ring in this process: for tests, for one device, and for understanding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ring_attn.comm.transport import Parts, Pending, Pieces, Sums, Unpacked, check_parts, check_payloads
from ring_attn.layout import places, total_rows


class LocalTransport:
    """Hosts all `ring_size` ranks; a transfer hands the payload over, nothing is copied.

    `hostile=True` takes every liberty the contract gives: what is received is NaN until `wait()`, payloads are read as late as
    `wait()`, and sent buffers are overwritten with NaN after it. Code that forgets a wait, or reads or writes a buffer it gave
    away, then fails its tests.
    """

    def __init__(self, ring_size: int, *, hostile: bool = False) -> None:
        if ring_size < 1:
            raise ValueError(f"ring_size must be at least 1, got {ring_size}")
        self.link, self.replays = "process", None
        self.ranks_per_node: int | None = None
        self.ring_size = ring_size
        self.hosted = tuple(range(ring_size))
        self.hostile = hostile

    @property
    def beside(self) -> LocalTransport:
        return self

    def shift(self, shards: Sequence[Tensor], offset: int = 1, *, what: str = "shift") -> Pending[list[Tensor]]:
        check_payloads(self, shards, what)
        sources = [shards[(rank - offset) % self.ring_size] for rank in self.hosted]
        return self._hand_over(sources, shards, what)

    def all_gather(self, shards: Sequence[Tensor], *, what: str = "all-gather") -> Pending[list[Tensor]]:
        check_payloads(self, shards, what)
        return self._hand_over(list(shards), shards, what)

    def reduce_scatter(self, parts: Sequence[Sequence[Tensor]], *, what: str = "reduce-scatter") -> Pending[list[Tensor]]:
        check_parts(self, parts, what)
        sums = [torch.stack([row[rank] for row in parts]).sum(0) for rank in self.hosted]
        return self._hand_over(sums, [x for row in parts for x in row], what)

    def all_to_all(self, parts: Sequence[Sequence[Tensor]], *, what: str = "all-to-all") -> Pending[list[list[Tensor]]]:
        check_parts(self, parts, what)
        sources = [row[rank] for rank in self.hosted for row in parts]
        flat = self._hand_over(sources, [x for row in parts for x in row], what)
        grid = [flat.received[i * self.ring_size : (i + 1) * self.ring_size] for i in self.hosted]
        return Pending(grid, lambda: flat.wait() and None, what)

    def pull(self, shards: Sequence[Pieces], parts: Parts, *, what: str = "pull") -> Pending[list[Tensor]]:
        shards = [x.packed() for x in shards]
        check_payloads(self, shards, what)
        received = [x.new_empty(x.shape[0], total_rows(parts[rank]), x.shape[2]) for rank, x in enumerate(shards)]

        def copy() -> None:
            for rank, target in enumerate(received):
                for part, place in places(parts[rank]):
                    target[:, place] = shards[part.rank][:, part.rows.start : part.rows.stop]

        return self._by(copy, received, (), what)

    def push(self, grads: Sequence[Unpacked], parts: Parts, into: Sequence[Sums], *, what: str = "push") -> Pending[None]:
        sent = [x.packed() for x in grads]

        def add() -> None:
            for rank, x in enumerate(sent):
                for part, place in places(parts[rank]):
                    came = x[:, place].clone() if self.hostile else x[:, place]
                    into[part.rank].add(came, part.rows)
                if self.hostile:
                    _poisoned(x)

        return Pending(None, add, what)

    def _by(
        self, transfer: Callable[[], None], received: list[Tensor], sent: Sequence[Tensor], what: str
    ) -> Pending[list[Tensor]]:
        """Fills `received` by `transfer`: at once, or, where hostile, as late as `wait()`."""
        if not self.hostile:
            transfer()
            return Pending(received, lambda: None, what)
        for x in received:
            _poisoned(x)

        def finish() -> None:
            transfer()
            for x in sent:
                _poisoned(x)

        return Pending(received, finish, what)

    def _hand_over(self, sources: list[Tensor], sent: Sequence[Tensor], what: str) -> Pending[list[Tensor]]:
        if not self.hostile:
            return Pending(sources, lambda: None, what)
        received = [torch.empty_like(x) for x in sources]

        def copy() -> None:
            for target, source in zip(received, sources, strict=True):
                target.copy_(source)

        return self._by(copy, received, sent, what)


def _poisoned(x: Tensor) -> Tensor:
    return x.fill_(torch.nan if x.dtype.is_floating_point else 77)
