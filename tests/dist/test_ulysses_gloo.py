"""Two axes over real processes: the bodies of the matrix, scores, shards and loss, and what goes wrong is named."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ring_attn as ra
from tests.dist.harness import run_processes
from tests.dist.test_scores_gloo import CELLS
from tests.matrix import cases, check
from tests.scores import MASKS, errors, pieces_of
from tests.support import FLOAT64_LIMIT, random_qkv
from tests.test_sharding import check_loss, check_shard_and_unshard
from tests.test_transport import together


def _matrix(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ulysses", "ring"))
    for case in cases(ulysses=2)[::5]:
        ring = ra.Ring.from_mesh(mesh, case.layout, exchange=case.exchange, kernel=case.kernel)
        assert (ring.size, ring.ulysses, ring.hosted) == (4, 2, ((0, 2, 1, 3)[rank],))
        check(case, ring)
    for n, (size, parts) in enumerate(((4, 2), (4, 4), (2, 2))):
        for case in cases(ulysses=parts)[n::17]:
            options = {"exchange": case.exchange, "kernel": case.kernel, "ring_size": size, "ulysses": parts}
            ring = ra.Ring.from_group(None, case.layout, **options)
            assert ring.hosted == (rank % size,)
            check(case, ring)
    ring = ra.Ring.from_mesh(mesh, "striped")
    check_shard_and_unshard(ring)
    check_loss(ring)
    together(ring.transport)


def test_matrix():
    run_processes(_matrix, 4)


def _scores(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for score, mask, layout, exchange, n in CELLS:
        ring = ra.Ring.from_mesh(mesh, layout, exchange=exchange, kernel="reference")
        found = errors(ring, n, MASKS[mask](n.t), pieces_of(score, n))
        assert max(found.values()) <= FLOAT64_LIMIT, (score, mask, layout, exchange, found)


def test_scores():
    run_processes(_scores, 4)


def _call(ring, rows=8, h=2, mask=None):
    q, k, v, _ = random_qkv(1, rows, rows, h, 2, 4)
    return ra.ring_attention(q, k, v, ring=ring, mask=mask or ra.Causal())


def _unequal(rank: int) -> None:
    ring, alone = ra.Ring.from_group(None, "contiguous", ulysses=2), rank == 2
    compiled = torch.compile(_call, backend="eager")
    for call, options in (
        (_call, {"rows": 8 + 2 * alone}),
        (_call, {"h": 2 + 2 * alone}),
        (_call, {"mask": ra.Window(3 + alone)}),
        (compiled, {"rows": 8 + 2 * alone}),
    ):
        with pytest.raises(
            ValueError, match=r"every rank must call with the same shapes, dtype, mask and scale, but ranks differ"
        ):
            call(ring, **options)
    _call(ring)


def test_unequal_calls_are_found_before_anything_is_traded():
    run_processes(_unequal, 4)


def _calls(ring):
    for _ in range(4):
        _call(ring)


def _dies(rank: int) -> None:
    ring = ra.Ring.from_group(None, "contiguous", ulysses=2)
    _call(ring)
    if rank == 3:
        os._exit(0)
    start = time.monotonic()
    who = {
        0: r"rank \[\d\] of 2 (that trade heads for ring rank 0|in the ring of Ulysses rank 0): ",
        1: r"rank \[0\] of 2 in the ring of Ulysses rank 1: ring forward, KV for step 1, from rank \[1\] to rank \[1\] failed",
        2: r"rank \[0\] of 2 that trade heads for ring rank 1: rows for heads failed",
    }
    with pytest.raises(RuntimeError, match=who[rank]):
        _calls(ring)
    assert time.monotonic() - start < 20
    os._exit(0)  # the group is broken: nothing more can be agreed on


def test_a_rank_that_dies_is_named_on_its_axis():
    run_processes(_dies, 4, timeout_s=10)


def _do_not_fit(rank: int) -> None:
    with pytest.raises(NotImplementedError, match=r"ulysses=2 needs one rank a process, .*got ranks_per_process=2"):
        ra.Ring.from_group(None, ulysses=2, ranks_per_process=2)
    with pytest.raises(ValueError, match=r"ulysses must be at least 1 and a divisor of the ring's 4 ranks, got 3"):
        ra.Ring.from_group(None, ulysses=3)
    with pytest.raises(
        ValueError, match=r"such as mesh\['cp'\], or two, which are named \('ulysses', 'ring'\) .*got \('ring', 'ulysses'\)"
    ):
        ra.Ring.from_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses")))
    with pytest.raises(ValueError, match=r"the one that the sequence is sharded over, .*got \('dp', 'cp'\)"):
        ra.Ring.from_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp")))
    with pytest.raises(ValueError, match=r"must have one axis, .*, or two, .*got a mesh of 3 axes"):
        ra.Ring.from_mesh(init_device_mesh("cpu", (2, 2, 1)))
    with pytest.raises(
        ValueError, match=r"ranks must rise along both axes of a \(ulysses, ring\) mesh, got \[\[0, 3\], \[2, 1\]\]"
    ):
        ra.Ring.from_mesh(DeviceMesh("cpu", [[0, 3], [2, 1]]))
    one = ra.Ring.from_mesh(init_device_mesh("cpu", (1, 4)))
    assert (one.size, one.ulysses, one.hosted) == (4, 1, (rank,))
    near = ra.Ring.from_mesh(DeviceMesh("cpu", torch.arange(4).view(2, 2).T))
    assert (near.ulysses, near.hosted) == (2, (dist.get_rank(),)), "neighbours trade heads, as from_group has it"


def test_groups_and_meshes_that_do_not_fit():
    run_processes(_do_not_fit, 4)
