"""torch.distributed: one or more ranks of the ring in each process of a group, over NCCL, gloo or any other backend.

Note [at exit]: gloo's threads may still hold tensors of the last transfers, and end the process by SIGABRT where their group
goes while the interpreter is being taken down. So a ring that lives as long as its process, in a variable of the script, lets
go of its groups before: those that `destroy_process_group` was called for then end in good order. What is registered first runs
last, hence at import: rings serve what their users do at exit.
"""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from ring_attn.comm.backend import may_split, over_nccl, split_off, timeout_of
from ring_attn.comm.second import second_group
from ring_attn.comm.transport import Parts, Pending, Pieces, Sums, T, Unpacked, check_parts, check_payloads
from ring_attn.comm.two_axes import TwoAxes
from ring_attn.comm.watch import Roll, watch
from ring_attn.layout import places, total_rows

# torch 2.13 renamed these two and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Message(NamedTuple):
    """One tensor from a rank to another: what this process sends, and where to it receives; None where it does not."""

    source: int
    target: int
    send: Tensor | None
    receive: Tensor | None


_ELSEWHERE = (
    "; unless it is this rank's own, another rank died, raised (see its error), or made another call: of forwards of one kind "
    "the first is compared among ranks, with RING_ATTN_COMPARE_CALLS=1 each"
)


class ProcessGroupTransport:
    """A ring over the processes of `group` (None: the default group), `ranks_per_process` neighbouring ranks in each.

    Process p of the group hosts ranks p * n ... p * n + n - 1. Ranks are those of the ring, never the job's. A transfer that
    fails (a peer died, or the group's timeout passed) raises RuntimeError naming this rank, its peer and the operation; `among`
    says of which ranks, where there are more than those of this transport.

    `beside`: the group whose wires `beside` goes over, of the same processes in the same order; `group` itself for none of its
    own. None: between hosts over NCCL a second communicator, split off on first use, see `second_group`, and otherwise the
    group itself: between two H100s of one host it won nothing and took 0.6 GB of each.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        ranks_per_process: int = 1,
        among: str = "",
        beside: dist.ProcessGroup | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialised; call torch.distributed.init_process_group first")
        self.group = dist.group.WORLD if group is None else group
        self.process = dist.get_rank(self.group)
        if self.process < 0:
            raise ValueError(f"process {dist.get_rank()} is not in the group it was given; build the ring on its own group")
        self._processes = dist.get_process_group_ranks(self.group)
        self.num_processes = len(self._processes)
        self.ranks_per_process = ranks_per_process
        self.ring_size = self.num_processes * ranks_per_process
        first = self.process * ranks_per_process
        self.hosted = tuple(range(first, first + ranks_per_process))
        self.link, on_node = _link(self.group)
        self.ranks_per_node = on_node * ranks_per_process if self.link == "network" else None
        self.among, self.replays = among, None
        self._tag = 0
        self._watch = watch(timeout_of(self.group).total_seconds()) if over_nccl(self.group) else None
        self._roll = Roll.of(self.group, ranks_per_process)
        self._second = None if beside is None else self._over(beside)
        _living.add(self)

    @property
    def beside(self) -> ProcessGroupTransport:
        if self._second is None:
            split = self.ranks_per_node is not None
            group = self._guarded(lambda: second_group(self.group), "a second communicator", hint="") if split else self.group
            self._second = self._over(group)
        return self._second

    def _over(self, group: dist.ProcessGroup) -> ProcessGroupTransport:
        """This transport over another group of the same processes."""
        if group is self.group:
            return self
        processes = dist.get_process_group_ranks(group)
        if processes != self._processes:
            raise ValueError(
                f"the group beside must have the same processes in the same order, {self._processes}, not {processes}"
            )
        return ProcessGroupTransport(group, ranks_per_process=self.ranks_per_process, among=self.among, beside=group)

    def shift(self, shards: Sequence[Tensor], offset: int = 1, *, what: str = "shift") -> Pending[list[Tensor]]:
        check_payloads(self, shards, what)
        received: list[Tensor] = [None] * len(shards)
        messages = []
        for source in range(self.ring_size):
            target = (source + offset) % self.ring_size
            send, receive = self._own(shards, source), None
            if target in self.hosted:
                receive = send if send is not None else torch.empty_like(shards[0])
                received[target - self.hosted[0]] = receive
            messages.append(_Message(source, target, send, receive))
        return self._deliver(messages, received, what, keep=shards)

    def pull(self, shards: Sequence[Pieces], parts: Parts, *, what: str = "pull") -> Pending[list[Tensor]]:
        shards = [x.packed() for x in shards]
        check_payloads(self, shards, what)
        b, _, e = shards[0].shape
        received = [shards[0].new_empty(b, total_rows(parts[rank]), e) for rank in self.hosted]
        messages = []
        for target in range(self.ring_size):
            into = self._own(received, target)
            for part, place in places(parts[target]):
                source = self._own(shards, part.rank)
                send = None if source is None else source[:, part.rows.start : part.rows.stop]
                messages.append(_Message(part.rank, target, send, None if into is None else into[:, place]))
        return self._deliver(messages, received, what, keep=shards)

    def push(self, grads: Sequence[Unpacked], parts: Parts, into: Sequence[Sums], *, what: str = "push") -> Pending[None]:
        sent = [x.packed() for x in grads]
        b, _, e = sent[0].shape
        messages, arrivals = [], []
        for source in range(self.ring_size):
            rank_grads = self._own(sent, source)
            for part, place in places(parts[source]):
                send, receive = None if rank_grads is None else rank_grads[:, place], None
                total = self._own(into, part.rank)
                if total is not None:
                    receive = send if send is not None else sent[0].new_empty(b, len(part.rows), e)
                    arrivals.append((total, receive, part.rows))
                messages.append(_Message(source, part.rank, send, receive))

        def add_up() -> None:
            for total, arrived, rows in arrivals:
                total.add(arrived, rows)

        return self._deliver(messages, None, what, keep=sent, after=add_up)

    def _own(self, tensors: Sequence[T], rank: int) -> T | None:
        """A hosted rank's tensor, None for a rank that lives elsewhere."""
        return tensors[rank - self.hosted[0]] if rank in self.hosted else None

    def _deliver(
        self,
        messages: Sequence[_Message],
        received: T,
        what: str,
        *,
        keep,
        after: Callable[[], None] | None = None,
    ) -> Pending[T]:
        """Posts the messages that this process sends or receives, out of all the ring's, which every process lists alike."""
        ops, copies = [], []
        peers: dict[str, set[int]] = {"from": set(), "to": set()}
        for number, (source, target, send, receive) in enumerate(messages):
            tag = (self._tag + number) % (1 << 30)
            if send is not None and receive is not None:
                if send is not receive:
                    receive.copy_(send)
            elif send is not None:
                ops.append(dist.P2POp(dist.isend, send.contiguous(), self._global(target), self.group, tag))
                peers["to"].add(target)
            elif receive is not None:
                buffer = receive
                if not receive.is_contiguous():
                    buffer = receive.new_empty(receive.shape)
                    copies.append((receive, buffer))
                ops.append(dist.P2POp(dist.irecv, buffer, self._global(source), self.group, tag))
                peers["from"].add(source)
        self._tag += len(messages)
        what = f"{what}, from rank {sorted(peers['from'])} to rank {sorted(peers['to'])}"
        works = self._guarded(lambda: dist.batch_isend_irecv(ops) if ops else [], what)

        def finish() -> None:
            for target, buffer in copies:
                target.copy_(buffer)
            if after is not None:
                after()

        return self._pending(received, works, what, keep=(keep, [op.tensor for op in ops]), after=finish)

    def all_gather(self, shards: Sequence[Tensor], *, what: str = "all-gather") -> Pending[list[Tensor]]:
        check_payloads(self, shards, what)
        mine = _bytes(torch.stack(tuple(shards)) if len(shards) > 1 else shards[0])
        everything = mine.new_empty(self.num_processes * mine.numel())
        works = self._guarded(lambda: [_all_gather(everything, mine, group=self.group, async_op=True)], what)
        received = list(everything.view(shards[0].dtype).view(self.ring_size, *shards[0].shape).unbind(0))
        return self._pending(received, works, what, keep=mine)

    def reduce_scatter(self, parts: Sequence[Sequence[Tensor]], *, what: str = "reduce-scatter") -> Pending[list[Tensor]]:
        check_parts(self, parts, what)
        mine = torch.stack([torch.stack([row[rank] for row in parts]).sum(0) for rank in range(self.ring_size)])
        if not (mine.is_cuda and over_nccl(self.group)):
            return self._reduce_scatter_by_all_to_all(mine, what)
        sums = mine.new_empty(self.ranks_per_process, *mine.shape[1:])
        works = self._guarded(lambda: [_reduce_scatter(sums, mine, group=self.group, async_op=True)], what)
        return self._pending(list(sums.unbind(0)), works, what, keep=mine)

    def _reduce_scatter_by_all_to_all(self, mine: Tensor, what: str) -> Pending[list[Tensor]]:
        """For backends without the collective: every process sums what the others sent it, in rank order."""
        parts = torch.empty_like(mine)
        sums = mine.new_empty(self.ranks_per_process, *mine.shape[1:])
        works = self._guarded(
            lambda: [dist.all_to_all_single(_bytes(parts), _bytes(mine), group=self.group, async_op=True)], what
        )

        def add_up() -> None:
            torch.sum(parts.view(self.num_processes, *sums.shape), 0, out=sums)

        return self._pending(list(sums.unbind(0)), works, what, keep=mine, after=add_up)

    def all_to_all(self, parts: Sequence[Sequence[Tensor]], *, what: str = "all-to-all") -> Pending[list[list[Tensor]]]:
        check_parts(self, parts, what)
        n = self.ranks_per_process
        targets = range(self.ring_size)
        # [process, target on it, source here]: each process gets, for each of its ranks, what our ranks send it.
        mine = torch.stack([torch.stack([row[target] for row in parts]) for target in targets])
        got = torch.empty_like(mine)
        works = self._guarded(
            lambda: [dist.all_to_all_single(_bytes(got), _bytes(mine), group=self.group, async_op=True)], what
        )
        by_rank = got.view(self.num_processes, n, n, *mine.shape[2:])
        received = [[by_rank[source // n, i, source % n] for source in targets] for i in range(n)]
        return self._pending(received, works, what, keep=mine)

    def _global(self, rank: int) -> int:
        return self._processes[rank // self.ranks_per_process]

    def _guarded(self, post: Callable, what: str, hint: str = _ELSEWHERE):
        """`post()`, with a failure named; backends raise RuntimeError or its subclass DistBackendError."""
        try:
            return post()
        except RuntimeError as error:
            raise RuntimeError(f"{self._who(what)} failed: {error}{hint}") from error

    def _who(self, what: str) -> str:
        return f"rank {list(self.hosted)} of {self.ring_size}{self.among}: {what}"

    def _pending(self, received, works, what: str, *, keep, after: Callable[[], None] | None = None) -> Pending:
        if self._watch is not None:
            self._watch.add(works, self._who(what), self._roll)

        def finish(_sent=keep) -> None:  # sent buffers live until the transfer is done
            for work in works:
                self._guarded(work.wait, what)
            if after is not None:
                after()

        return Pending(received, finish, what)


_living: WeakSet[ProcessGroupTransport] = WeakSet()


@atexit.register
def _let_go() -> None:
    """See Note [at exit]."""
    for transport in _living:
        # None would be the default group to PyTorch.
        del transport.group


def _bytes(x: Tensor) -> Tensor:
    """The same memory as flat bytes: backends then move any dtype."""
    return x.reshape(-1).view(torch.uint8)


def _link(group: dist.ProcessGroup) -> tuple[str, int]:
    """What lies between the processes, see Transport, and how many of them share a host: as torchrun tells, without it all."""
    if not over_nccl(group):
        return "gloo", dist.get_world_size(group)
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    hosts = [rank // on_host for rank in dist.get_process_group_ranks(group)]
    # Where hosts hold uneven runs of them, nodes are what divides all.
    return "gpus" if len(set(hosts)) == 1 else "network", math.gcd(*(len(list(run)) for _, run in groupby(hosts)))


def split_group(group: dist.ProcessGroup | None, ring_size: int, ranks_per_process: int) -> dist.ProcessGroup:
    """The group of this process's ring where `group` is cut into rings of `ring_size` ranks; all its processes must call."""
    group = dist.group.WORLD if group is None else group
    processes = dist.get_process_group_ranks(group)
    if ring_size % ranks_per_process or ring_size < 1:
        raise ValueError(f"ring_size {ring_size} must be a multiple of ranks_per_process {ranks_per_process}")
    each = ring_size // ranks_per_process
    if each > len(processes):
        raise ValueError(
            f"a ring of {ring_size} ranks needs {each} processes, but the group has {len(processes)}; "
            f"start more processes, or host more ranks in each with ranks_per_process"
        )
    if len(processes) % each:
        raise ValueError(f"a group of {len(processes)} processes cannot be cut into rings of {each} processes")
    if each == len(processes):
        return group
    return own_part(group, [range(start, start + each) for start in range(0, len(processes), each)])


def two_axes(traders: dist.ProcessGroup, ring: dist.ProcessGroup) -> TwoAxes:
    """The ranks of a (ulysses, ring) mesh, one a process, from the two groups that this process is in."""
    u, r = dist.get_rank(traders), dist.get_rank(ring)
    return TwoAxes(
        [ProcessGroupTransport(traders, among=f" that trade heads for ring rank {r}")],
        [ProcessGroupTransport(ring, among=f" in the ring of Ulysses rank {u}")],
    )


def cut_two_axes(group: dist.ProcessGroup, ulysses: int) -> TwoAxes:
    """The axes of a group whose every `ulysses` neighbours trade heads; all its processes must call."""
    size = dist.get_world_size(group)
    traders = split_group(group, ulysses, 1)
    return two_axes(traders, own_part(group, [range(place, size, ulysses) for place in range(ulysses)]))


def own_part(group: dist.ProcessGroup, parts: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The one of these parts of a group, numbered in it, that has this process, as a group with the same timeout; all processes
    of the group must call, and no others. See Note [split] of `second.py`: the group may be a part of the job itself.
    """
    if may_split(group):
        return split_off(group, parts)
    processes, mine = dist.get_process_group_ranks(group), dist.get_rank(group)
    (part,) = (part for part in parts if mine in part)
    return dist.new_group([processes[n] for n in part], timeout=timeout_of(group), use_local_synchronization=True)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A new tensor with `x` summed over the group."""
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total
