"""A second communicator without GPUs: gloo groups that pass for NCCL's, and a record of what goes over which."""

import os
import time
from collections import defaultdict
from contextlib import ExitStack
from datetime import timedelta
from itertools import chain
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import ring_attn as ra
from ring_attn.comm import backend, process_group, second
from ring_attn.comm.backend import timeout_of
from ring_attn.comm.process_group import ProcessGroupTransport, cut_two_axes, split_group
from tests.dist.harness import run_processes
from tests.matrix import cases, check
from tests.support import random_qkv
from tests.test_transport import conform, make_payload


class PassesForNccl:
    """torch.distributed as seen on GPUs, where the default group is bound to one; `split`: what groups were split into."""

    def __init__(self, bound=True):
        self.group = SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=torch.device("cuda", 0) if bound else None))
        self.split = []

    def __getattr__(self, name):
        return getattr(dist, name)

    def get_backend(self, group):
        return dist.Backend.NCCL

    def split_group(self, group, ranks, *, timeout, group_desc):
        """Only the processes of the group come here, all with the same parts."""
        assert sorted(chain(*ranks)) == list(range(dist.get_world_size(group))) and timeout == timeout_of(group)
        self.split.append((group, ranks))
        (part,) = (part for part in ranks if dist.get_rank(group) in part)
        processes = dist.get_process_group_ranks(group)
        return dist.new_group([processes[n] for n in part], timeout=timeout, use_local_synchronization=True)


class pretended:
    """Inside, transports find a second communicator as over NCCL; gives what stands in for torch.distributed."""

    def __init__(self, *, bound=True, capturing=False):
        self.nccl, self.stack = PassesForNccl(bound), ExitStack()
        self.capturing = capturing

    def __enter__(self):
        for patched in (
            patch.object(second, "dist", self.nccl),
            patch.object(backend, "dist", self.nccl),
            patch.object(process_group, "_link", lambda group: ("network", 1)),
            patch.object(torch.cuda, "synchronize", lambda: None),
            patch.object(torch.cuda, "is_current_stream_capturing", lambda: self.capturing),
        ):
            self.stack.enter_context(patched)
        return self.nccl

    def __exit__(self, *error):
        self.stack.close()


def recorded(ring):
    """By group, what a forward and a backward send: dtypes of messages, names of collectives. KV is float64, dK and dV fp32."""
    found = defaultdict(set)
    post, gather, scatter = dist.batch_isend_irecv, process_group._all_gather, dist.all_to_all_single

    def posted(ops):
        for op in ops:
            found[op.group].add(op.tensor.dtype)
        return post(ops)

    def collective(name, function):
        return lambda *tensors, group, **options: found[group].add(name) or function(*tensors, group=group, **options)

    rows = 8 * len(ring.hosted)
    q, k, v, up = (x.requires_grad_() for x in random_qkv(1, rows, rows, 2, 1, 4, dtype=torch.float64, seed=ring.hosted[0]))
    call = lambda: ra.ring_attention(q, k, v, ring=ring, mask=ra.Full())  # noqa: E731
    call()
    with (
        patch.object(dist, "batch_isend_irecv", posted),
        patch.object(process_group, "_all_gather", collective("all-gather", gather)),
        patch.object(dist, "all_to_all_single", collective("reduce-scatter", scatter)),
    ):
        call().backward(up)
    return dict(found)


MESSAGES = {torch.float64}, {torch.float32}
CASES = {
    "ring": (MESSAGES, {"exchange": "ring"}),
    "two-way": (MESSAGES, {"exchange": "two-way"}),
    "pull in parts": (MESSAGES, {"exchange": "pull", "kv_memory": 2 * 8 * 64}),
    "gather in parts": (({"all-gather"}, {"reduce-scatter"}), {"exchange": "gather", "kv_memory": 2 * 16 * 64}),
    "two-level": (MESSAGES, {"exchange": "two-level", "ranks_per_node": 2}),
}


def _kv_and_gradients_part(rank, ranks_per_process):
    for name, ((out, home), choice) in CASES.items():
        with pretended():
            transport = ProcessGroupTransport(ranks_per_process=ranks_per_process)
            found = recorded(ra.Ring(transport, grad_dtype=torch.float32, **choice))
        # Those of two levels inside a process are no messages.
        home = home if ranks_per_process == 1 or name != "two-level" else MESSAGES[1]
        assert found == {transport.group: out, transport.beside.group: home}, (name, found)
        assert transport.beside.group is not transport.group and transport.beside.beside is transport.beside


@pytest.mark.parametrize(("num_processes", "ranks_per_process"), [(4, 1), (2, 2)])
def test_gradients_go_home_over_a_communicator_of_their_own(num_processes, ranks_per_process):
    run_processes(_kv_and_gradients_part, num_processes, ranks_per_process)


def _one_will_do(rank):
    everything = {torch.float64, torch.float32}
    with pretended() as nccl:
        transport = ProcessGroupTransport(beside=dist.group.WORLD)
        assert recorded(ra.Ring(transport, exchange="ring", grad_dtype=torch.float32)) == {transport.group: everything}
        for exchange in ("pull", "ring"):
            ring = ra.Ring.from_group(None, exchange=exchange, ring_size=2, grad_dtype=torch.float32)
            assert recorded(ring) == {ring.transport.group: everything}, "no KV is left when they leave"
    with pretended(bound=False) as unbound, patch.object(second.logger, "info") as log:
        transport = ProcessGroupTransport()
        assert transport.beside is transport and "init_process_group(device_id=...)" in log.call_args.args[0]
    with pretended() as on_one_host, patch.object(process_group, "_link", lambda group: ("gpus", 4)):
        transport = ProcessGroupTransport()
        assert transport.beside is transport
    assert not any(len(parts) == 1 for _, parts in nccl.split) and unbound.split == on_one_host.split == []
    transport = ProcessGroupTransport()
    assert transport.beside is transport, "gloo's messages wait for none"


def test_there_is_no_second_communicator_where_none_is_of_use_or_wanted():
    run_processes(_one_will_do, 4)


def _matrix(rank, ranks_per_process):
    with pretended() as nccl:
        for case in cases():
            transport = ProcessGroupTransport(ranks_per_process=ranks_per_process)
            check(case, ra.Ring(transport, layout=case.layout, exchange=case.exchange, kernel=case.kernel))
        assert len(nccl.split) == 1, "one serves all transports over a group"
        conform(ProcessGroupTransport(ranks_per_process=ranks_per_process).beside)
        assert len(nccl.split) == 1


@pytest.mark.parametrize(("num_processes", "ranks_per_process"), [(3, 1), (2, 2)])
def test_the_matrix_over_two_communicators(num_processes, ranks_per_process):
    run_processes(_matrix, num_processes, ranks_per_process)


def _on_a_subgroup(rank):
    group = dist.new_group([3, 1, 2])
    if rank == 0:
        return
    with pretended() as nccl:
        ring = ra.Ring.from_group(group, exchange="ring")
        check(next(case for case in cases() if case.exchange == "ring"), ring)
    assert nccl.split == [(group, [[0, 1, 2]])]
    assert dist.get_process_group_ranks(ring.transport.beside.group) == [1, 2, 3]


def test_a_ring_on_a_subgroup_asks_nobody_else():
    run_processes(_on_a_subgroup, 4)


def _cut(rank):
    group = dist.new_group([3, 1, 0, 2]) if rank < 4 else dist.new_group([0, 1, 2, 3])
    if rank == 4:
        return  # does nothing, and nobody waits for it
    with pretended() as nccl, patch.object(dist, "new_group", wraps=dist.new_group) as made:
        near, far = split_group(group, 2, 1), cut_two_axes(group, 2).rings[0].group
    assert nccl.split == [(group, [[0, 1], [2, 3]])] * 2 + [(group, [[0, 2], [1, 3]])] and made.call_count == 3
    assert dist.get_process_group_ranks(near) == ([0, 1] if rank < 2 else [2, 3])
    assert dist.get_process_group_ranks(far) == [rank % 2, rank % 2 + 2]


def test_a_part_of_a_job_bound_to_devices_is_cut_by_itself():
    run_processes(_cut, 5)


def _two_under_way(rank):
    """Transfers of both at once, posted and waited for in different orders, do not get into each other's rows."""
    named = ProcessGroupTransport(beside=dist.new_group([0, 1, 2]))
    with pretended():
        for transport in (named, ProcessGroupTransport()):
            for round_ in range(20):
                ways = (transport, transport.beside) if round_ % 2 else (transport.beside, transport)
                posted = [
                    way.shift([make_payload(rank, salt=2 * round_ + n)], n + 1, what=f"way {n}") for n, way in enumerate(ways)
                ]
                for n in (1, 0):
                    (got,) = posted[n].wait()
                    assert torch.equal(got, make_payload((rank - n - 1) % 3, salt=2 * round_ + n))


def test_transfers_of_both_are_under_way_at_once():
    run_processes(_two_under_way, 3)


def _a_rank_stalls(rank):
    wires = ProcessGroupTransport(beside=dist.new_group(timeout=timedelta(seconds=3)))
    ring = ra.Ring(wires, layout="contiguous", exchange="ring")
    q, k, v, up = (x.requires_grad_() for x in random_qkv(1, 8, 8, 2, 1, 4, seed=rank))
    out = ra.ring_attention(q, k, v, ring=ring, mask=ra.Full())
    if rank == 2:
        wires.beside.shift = lambda *shards, what: time.sleep(6) or os._exit(0)
    start = time.monotonic()
    where = rf"rank \[{rank}\] of 3: ring backward, dK and dV .* failed"
    if rank == 0:
        where = r"rank \[0\] of 3: ring backward, dK and dV on from step 1, from rank \[2\] to rank \[1\] failed"
    with pytest.raises(RuntimeError, match=where):
        out.backward(up)
    assert time.monotonic() - start < 6
    os._exit(0)


def test_a_transfer_that_fails_is_named_with_its_peers():
    run_processes(_a_rank_stalls, 3)


def _refusals(rank):
    named = rf"rank \[{rank}\] of 2: a second communicator failed: it cannot be made while a CUDA graph is captured.*=group\)$"
    with pretended(capturing=True), pytest.raises(RuntimeError, match=named):
        _ = ProcessGroupTransport().beside
    mine = dist.new_group([rank], use_local_synchronization=True)
    with pytest.raises(ValueError, match=rf"same processes in the same order, \[0, 1\], not \[{rank}\]"):
        ProcessGroupTransport(beside=mine)


def test_what_cannot_be_made_or_does_not_fit_is_named():
    run_processes(_refusals, 2)
