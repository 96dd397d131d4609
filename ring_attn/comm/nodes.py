"""Rings over hosts whose GPUs have copy engines: what stays inside a node goes by these, everything else as messages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch.distributed as dist
from torch import Tensor

from ring_attn.comm.process_group import ProcessGroupTransport
from ring_attn.comm.symmetric import SymmetricTransport
from ring_attn.comm.transport import Parts, Pending, Pieces, Sums, Unpacked


class NodesTransport(ProcessGroupTransport):
    """A ring over a group, one rank a process, in which `inside` is the transport of this process's node, neighbouring ranks.

    A `pull` or `push` goes by copy engines where no rank wants anything from another node.
    """

    def __init__(self, group: dist.ProcessGroup, inside: SymmetricTransport, *, among: str = "") -> None:
        super().__init__(group, among=among)
        self.link, self._inside = "nodes", inside

    def _over(self, group: dist.ProcessGroup) -> ProcessGroupTransport:
        # Over whichever wires the rest goes, pulls and pushes go over one memory, in one order.
        if group is self.group:
            return self
        beside = NodesTransport(super()._over(group).group, self._inside, among=self.among)
        beside._second = beside
        return beside

    @property
    def memory_bytes(self) -> int:
        return self._inside.memory_bytes

    def pull(self, shards: Sequence[Pieces], parts: Parts, *, what: str = "pull") -> Pending[list[Tensor]]:
        inside = self._of_node(parts)
        return super().pull(shards, parts, what=what) if inside is None else self._inside.pull(shards, inside, what=what)

    def push(self, grads: Sequence[Unpacked], parts: Parts, into: Sequence[Sums], *, what: str = "push") -> Pending[None]:
        inside = self._of_node(parts)
        if inside is None:
            return super().push(grads, parts, into, what=what)
        return self._inside.push(grads, inside, into, what=what)

    def _of_node(self, parts: Parts) -> Parts | None:
        first = self.process - self._inside.process
        return inside_node(tuple(map(tuple, parts)), range(first, first + self._inside.num_processes))


@lru_cache(maxsize=256)
def inside_node(parts: Parts, node: range) -> Parts | None:
    """What the ranks of a node want, counted inside it; None where a rank of the ring wants what another node holds.

    The same for the same, as `SymmetricTransport` keeps routes by what it is given.
    """
    of_nodes = all(part.rank // len(node) == rank // len(node) for rank, wanted in enumerate(parts) for part in wanted)
    counted = (tuple(part._replace(rank=part.rank - node.start) for part in parts[rank]) for rank in node)
    return tuple(counted) if of_nodes else None
