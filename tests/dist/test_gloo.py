"""The matrix on real processes over gloo: the body of the simulated ring, handed a ring of processes."""

import math
from contextlib import ExitStack, nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ring_attn as ra
from ring_attn import call, exchange
from ring_attn.comm.backend import timeout_of
from ring_attn.kernels import sums, tilewise
from ring_attn.kernels.flash import Flash4Kernel
from ring_attn.kernels.triton_kernel import interpreted
from tests.dist.harness import run_processes
from tests.kernels.fake_flash import installed4
from tests.matrix import cases, check
from tests.support import random_qkv, rel_error, way_home_hidden


def _matrix(rank: int, ranks_per_process: int) -> None:
    for case in cases():
        ring = ra.Ring.from_group(
            None, case.layout, exchange=case.exchange, kernel=case.kernel, ranks_per_process=ranks_per_process
        )
        check(case, ring)


@pytest.mark.parametrize(("num_processes", "ranks_per_process"), [(2, 1), (3, 1), (4, 1), (2, 2)])
def test_matrix(num_processes: int, ranks_per_process: int):
    run_processes(_matrix, num_processes, ranks_per_process)


def _two_levels(rank: int) -> None:
    for case in cases():
        if case.exchange == "ring":
            check(case, ra.Ring.from_group(None, case.layout, exchange="two-level", ranks_per_node=2, kernel=case.kernel))


def test_two_levels():
    run_processes(_two_levels, 4)


def _two_ways(rank: int, ranks_per_process: int) -> None:
    for case in cases():
        if case.exchange == "ring":
            options = {"exchange": "two-way", "kernel": case.kernel, "ranks_per_process": ranks_per_process}
            check(case, ra.Ring.from_group(None, case.layout, **options))


@pytest.mark.parametrize(("num_processes", "ranks_per_process"), [(2, 1), (4, 1), (2, 3)])
def test_two_ways(num_processes: int, ranks_per_process: int):
    run_processes(_two_ways, num_processes, ranks_per_process)


def _some_in_halves(rank: int) -> None:
    for case in cases():
        if case.exchange == "pull":
            with patch.object(exchange, "HALVES_FROM", 0) if rank == 1 else nullcontext():
                check(case, ra.Ring.from_group(None, case.layout, exchange="pull", kernel=case.kernel))


def test_ranks_may_differ_in_how_they_meet_their_own_shard():
    """As where only some replay their calls, for which shorter ways home are hidden."""
    run_processes(_some_in_halves, 3)


def _own_last(rank: int, ranks_per_process: int) -> None:
    with way_home_hidden(by_heads=False):
        for case in cases():
            for exchange in ("ring", "two-way", "two-level") if case.exchange == "ring" else ():
                options = {"ranks_per_node": 2} if exchange == "two-level" else {}
                options |= {"kernel": case.kernel, "ranks_per_process": ranks_per_process}
                check(case, ra.Ring.from_group(None, case.layout, exchange=exchange, **options))


@pytest.mark.parametrize("ranks_per_process", [1, 2])
def test_backwards_that_end_with_the_own_shard(ranks_per_process: int):
    run_processes(_own_last, 4 // ranks_per_process, ranks_per_process)


def _by_heads(rank: int, ranks_per_process: int) -> None:
    more = {"ring": ("two-way", "two-level")}
    with way_home_hidden(by_heads=True):
        for case in cases():
            for exchange in (case.exchange, *more.get(case.exchange, ())):
                options = {"ranks_per_node": 2} if exchange == "two-level" else {}
                options |= {"kernel": case.kernel, "ranks_per_process": ranks_per_process}
                check(case, ra.Ring.from_group(None, case.layout, exchange=exchange, **options))


@pytest.mark.parametrize("ranks_per_process", [1, 2])
def test_backwards_by_parts_of_the_heads(ranks_per_process: int):
    """Tours that overlap post the same in the same order everywhere."""
    run_processes(_by_heads, 4 // ranks_per_process, ranks_per_process)


def _side_by_side(rank: int) -> None:
    for case in cases():
        ring = ra.Ring.from_group(None, case.layout, exchange=case.exchange, kernel=case.kernel, ring_size=2)
        assert ring.hosted == (rank % 2,)
        check(case, ring)
    group = dist.new_group([1, 3])
    if rank in (1, 3):
        for case in cases():
            check(case, ra.Ring.from_group(group, case.layout, exchange=case.exchange, kernel=case.kernel))


def test_rings_side_by_side_and_on_a_subgroup():
    run_processes(_side_by_side, 4)


def _cut(rank: int) -> None:
    rings = ra.Ring.from_group(ring_size=2), ra.Ring.from_group(ulysses=2)
    axes = rings[1].transport
    parts = [transport.group for transport in (rings[0].transport, *axes.traders, *axes.rings)]
    assert [timeout_of(part).total_seconds() for part in (dist.group.WORLD, *parts)] == [17, 17, 17, 17]


def test_groups_cut_from_another_have_its_timeout():
    run_processes(_cut, 4, timeout_s=17)


def _in_place(rank: int) -> None:
    """Rows that meet nothing from other ranks are what a library made of them, in the memory where it made them."""
    made, forward = [], Flash4Kernel._forward

    def noted(*x, **options):
        made.append([x.contiguous() for x in forward(*x, **options)])
        return made[-1]

    with ExitStack() as stack:
        for owner, name, value in (
            (Flash4Kernel, "supports", lambda self, problem: None),
            (Flash4Kernel, "_forward", noted),
            (tilewise, "_can_fuse", lambda x: True),
            (sums, "fused", lambda device: True),
            (call, "_WAIT", math.inf),  # all heads at once
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(installed4())
        for layout, mask in (("zigzag", ra.Causal() & ra.Window(3)), ("contiguous", ra.Causal()), ("zigzag", ra.Causal())):
            ring = ra.Ring.from_group(None, layout, exchange="pull", kernel="flash4")
            q, k, v, dout = random_qkv(1, 48, 48, 4, 2, 16, dtype=torch.float16, seed=3)
            mine = [ring.shard(x).requires_grad_() for x in (q, k, v)]
            whole = [x.double().requires_grad_() for x in (q, k, v)]
            made.clear()
            out = ra.ring_attention(*mine, ring=ring, mask=mask)
            assert out.data_ptr() == made[0][0].data_ptr()
            exact = ra.ring_attention(*whole, ring=ra.Ring.simulated(1, kernel="reference"), mask=mask)
            found = out, *torch.autograd.grad(out, mine, ring.shard(dout))
            for x, want in zip(found, (exact, *torch.autograd.grad(exact, whole, dout.double())), strict=True):
                assert rel_error(x, ring.shard(want)) < 2**-9


@pytest.mark.parametrize("num_processes", [2, 3])
def test_outputs_are_finished_in_place(num_processes):
    pytest.importorskip("triton")
    if not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    run_processes(_in_place, num_processes)


def _first_call_under_a_policy(rank: int) -> None:
    rings = [ra.Ring.from_group(None, exchange="pull", kernel="reference") for _ in range(2)]
    *qkv, dout = random_qkv(1, 16, 16, 4, 2, 8, dtype=torch.float64, seed=rank)
    qkv = [x.requires_grad_() for x in qkv]
    squares = [lambda *x, ring=ring: ra.ring_attention(*x, ring=ring).view(-1) ** 2 for ring in rings]
    contexts = partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE)
    outs = squares[0](*qkv), checkpoint(squares[1], *qkv, use_reentrant=False, context_fn=contexts)
    plain, again = (torch.autograd.grad(out, qkv, dout.view(-1)) for out in outs)
    assert all(map(torch.equal, plain, again))


def test_checkpointing_sees_in_a_first_call_what_it_sees_in_any():
    """Under a policy that saves all: what ranks agree on is not called for again."""
    run_processes(_first_call_under_a_policy, 2)
