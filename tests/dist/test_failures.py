"""What goes wrong between processes is named, in bounded time: unequal calls, a rank that dies, a rank that stalls."""

import math
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import ring_attn as ra
from tests.dist.harness import run_processes
from tests.support import random_qkv


def _call(ring, rows=8, mask=None, seed=0, head_dim=4, **options):
    q, k, v, _ = random_qkv(1, rows, rows, 2, 1, head_dim, 4, seed=seed)
    return ra.ring_attention(q, k, v, ring=ring, mask=mask or ra.Causal(), **options)


def _calls(ring, count):
    for seed in range(count):
        _call(ring, seed=seed)


def _unequal_lengths(rank):
    with pytest.raises(
        ValueError, match=r"every rank must call with the same shapes.*by rank.*\(1, 8, 2, 4\).*\(1, 12, 2, 4\)"
    ):
        _call(ra.Ring.from_group(None, "contiguous"), rows=8 + 4 * (rank == 1))


def test_unequal_lengths_are_found_on_every_rank():
    run_processes(_unequal_lengths, 3)


def _unequal_masks_and_choices(rank):
    ring = ra.Ring.from_group(None, "contiguous")
    windows = ", ".join(rf"Window\(left={3 + n}, right=0\) on ranks \[{n}\]" for n in range(2))
    with pytest.raises(ValueError, match=f"differ in mask: {windows}$"):
        _call(ring, mask=ra.Window(3 + rank))
    _call(ring, mask=ra.Window(3))
    here = f"layout='contiguous', kv_layout=None, exchange='pull', ranks_per_node=None, kv_memory={10000 + rank}"
    with pytest.raises(ValueError, match=f"differ in layout, exchange and wires: .*Choices.{here}.* on ranks .{rank}"):
        _call(ra.Ring.from_group(None, "contiguous", exchange="pull", kv_memory=10000 + rank))


def test_unequal_masks_and_choices_are_found_and_the_ring_goes_on():
    run_processes(_unequal_masks_and_choices, 2)


def _calls_get_out_of_step(rank, ranks_per_process):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RING_ATTN_COMPARE_CALLS", "1")
        ring = ra.Ring.from_group(None, "contiguous", ranks_per_process=ranks_per_process)
    q, k, v, _ = random_qkv(1, 16, 16, 2, 1, 4)
    cache, packings = ra.KVCache(ring), [ra.Documents([4, 12]), ra.Documents([16])]
    cache.append(k, v)
    for mask in packings:
        _call(ring, mask=mask)
    with pytest.raises(ValueError, match=r"differ in mask: Documents.* on ranks .*, Documents.* on ranks"):
        _call(ring, mask=packings[rank])
    for window in (3, 4):
        ra.tree_decode(q[:, -1:], cache, ring=ring, mask=ra.Window(window))
    with pytest.raises(ValueError, match=r"differ in mask: Window.* on ranks .*, Window.* on ranks"):
        ra.tree_decode(q[:, -1:], cache, ring=ring, mask=ra.Window(3 + rank))
    wants = r"differ in whether gradients are wanted: (False|True) on ranks .*, (False|True) on ranks .*"
    with torch.set_grad_enabled(rank == 1), pytest.raises(ValueError, match=wants):
        ra.ring_attention(q, k.requires_grad_(), v, ring=ring)
    _call(ring)


@pytest.mark.parametrize("ranks_per_process", [1, 2])
def test_calls_that_get_out_of_step_are_found_where_every_one_is_compared(ranks_per_process):
    """Each has been made before, by all ranks at once."""
    run_processes(_calls_get_out_of_step, 2, ranks_per_process)


def _rings_are_made_in_other_ways(rank, last):
    for way in ({"ulysses": 1 + rank}, {"ring_size": 1 + rank}, {"ranks_per_process": 1 + rank}):
        if rank != last:
            ra.Ring.from_group(None, **way)
        dist.barrier()
        if rank == last:
            here, there = ({"ring_size": 2, "ranks_per_process": 1, "ulysses": 1} for _ in range(2))
            ((name, made),) = way.items()
            here[name], there[name] = made, 3 - made
            for one in (here, there):
                one["ring_size"] *= one["ranks_per_process"]
            other, mine = (", ".join(f"{key}={x}" for key, x in one.items()) for one in (there, here))
            words = f"process {1 - rank} made this one with {other}, and process {rank} with {mine}$"
            with pytest.raises(ValueError, match=words):
                ra.Ring.from_group(None, **way)
    _call(ra.Ring.from_group(None, ulysses=2))


@pytest.mark.parametrize("last", [0, 1])
def test_rings_that_are_made_in_other_ways(last):
    run_processes(_rings_are_made_in_other_ways, 2, last)


def _a_group_without_a_store(rank):
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    assert ra.Ring.from_group(None).size == 4
    os._exit(0)


def test_a_job_that_is_none_keeps_no_notes():
    """As it is made to find out what a job of many would do."""
    run_processes(_a_group_without_a_store, 1)


def _one_rank_alone_compares(rank):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RING_ATTN_COMPARE_CALLS", "01"[rank])
        ring = ra.Ring.from_group(None, "contiguous")
        monkeypatch.setenv("RING_ATTN_COMPARE_CALLS", "yes")
        with pytest.raises(ValueError, match="RING_ATTN_COMPARE_CALLS must be 0 or 1, got 'yes'"):
            ra.Ring.from_group(None, "contiguous")
    with pytest.raises(
        ValueError, match=r"compares_every_call=False.* on ranks \[0\], .*compares_every_call=True.* on ranks \[1\]"
    ):
        _call(ring)


def test_one_rank_alone_does_not_compare_every_call():
    run_processes(_one_rank_alone_compares, 2)


def _long_masks(rank):
    ring, lengths = ra.Ring.from_group(None, "contiguous"), [1] * 300
    lengths[290:292] = [[1, 1], [2, 0]][rank]
    with pytest.raises(
        ValueError, match=r"differ in mask: Documents\(.* on ranks \[0\], .* on ranks \[1\] \(they differ further on\)$"
    ):
        _call(ring, rows=150, mask=ra.Documents(lengths))


def test_masks_that_differ_behind_what_is_told():
    run_processes(_long_masks, 2)


def _one_rank_alone_breaks_a_rule(rank):
    alone = rank == 1
    differ = pytest.raises(
        ValueError, match="every rank must call with the same shapes, dtype, mask and scale, but ranks differ"
    )
    zigzag, contiguous = ra.Ring.from_group(None, "zigzag"), ra.Ring.from_group(None, "contiguous")
    with differ:
        _call(zigzag, rows=8 - alone)
    with differ:
        _call(contiguous, rows=8 - 2 * alone, mask=ra.Documents([16]))
    with differ:
        _call(contiguous, mask=ra.KeyPadding(16 + alone))
    with differ:
        _call(contiguous if alone else ra.Ring.from_group(None, "striped"))
    with differ:
        _call(contiguous if alone else ra.Ring.from_group(None, "contiguous", exchange="gather"))
    with differ:
        _call(contiguous, softmax_scale=math.nan if alone else 0.5)
    scale = torch.ones(2)
    with differ:
        _call(contiguous, score=ra.CosineSim(scale, groups=2 if alone else 1))
    with differ:
        _call(contiguous, score=ra.CosineSim(scale, groups=3 if alone else 1))
    with differ:
        _call(contiguous, head_dim=0 if alone else 4, score=ra.CosineSim(scale))
    with differ:
        _call(contiguous, score=ra.Alibi(scale.double() if alone else scale))
    ring = ra.Ring.from_group(None, "contiguous", kernel="cudnn" if alone else "reference")
    why = "kernel 'cudnn' cannot do this forward" if alone else r"ranks \[1\] cannot make this call"
    with pytest.raises(ValueError, match=why):
        _call(ring)
    _call(contiguous)


def test_what_only_one_rank_finds_wrong_is_raised_on_every_rank():
    run_processes(_one_rank_alone_breaks_a_rule, 2)


def _a_rank_dies(rank, exchange):
    ring = ra.Ring.from_group(None, "contiguous", exchange=exchange)
    _call(ring)
    if rank == 2:
        os._exit(0)
    time.sleep(rank)  # rank 0 finds out amid its transfer, rank 1 as it posts one
    start = time.monotonic()
    named = rf"rank \[{rank}\] of 3: {exchange} forward.*failed(?s:.*) RING_ATTN_COMPARE_CALLS=1 each"
    with pytest.raises(RuntimeError, match=named):
        _calls(ring, 4)
    assert time.monotonic() - start < 20
    os._exit(0)  # the group is broken: nothing more can be agreed on


@pytest.mark.parametrize("exchange", ["ring", "gather", "pull"])
def test_a_rank_that_dies_is_named(exchange):
    run_processes(_a_rank_dies, 3, exchange, timeout_s=10)


def _a_rank_stalls(rank):
    ring = ra.Ring.from_group(None, "contiguous", exchange="ring")
    _call(ring)
    if rank == 1:
        time.sleep(8)
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"rank \[0\] of 2: ring forward, KV for step 1, from rank \[1\] to rank \[1\] failed"
    ):
        _call(ring)
    assert time.monotonic() - start < 7
    os._exit(0)


def test_a_rank_that_stalls_is_named_within_the_timeout():
    run_processes(_a_rank_stalls, 2, timeout_s=3)


def _too_large(rank):
    with pytest.raises(ValueError, match="a ring of 4 ranks needs 4 processes, but the group has 2; start more processes"):
        ra.Ring.from_group(None, ring_size=4)
    with pytest.raises(ValueError, match="ring_size 3 must be a multiple of ranks_per_process 2"):
        ra.Ring.from_group(None, ring_size=3, ranks_per_process=2)
    for ring_size in (None, 2):
        with pytest.raises(ValueError, match="ranks_per_process must be at least 1, got 0"):
            ra.Ring.from_group(None, ring_size=ring_size, ranks_per_process=0)
    group = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="process 1 is not in the group"):
            ra.Ring.from_group(group)


def test_a_ring_larger_than_its_group_is_refused():
    run_processes(_too_large, 2)


def _cannot_be_cut(rank):
    with pytest.raises(ValueError, match="a group of 3 processes cannot be cut into rings of 2 processes"):
        ra.Ring.from_group(None, ring_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (3, 1), mesh_dim_names=("cp", "dp"))
    assert ra.Ring.from_mesh(mesh["cp"]).hosted == (rank,)
    assert ra.Ring.from_mesh(mesh["dp"]).size == 1


def test_groups_and_meshes_that_do_not_fit():
    run_processes(_cannot_be_cut, 3)


def _compiled(rank):
    ring = ra.Ring.from_group(None, "zigzag")
    q, k, v, up = random_qkv(1, 8, 8, 2, 1, 4, dtype=torch.float64, seed=rank)

    def function(q, k, v):
        return ra.ring_attention(q + 1, k, v, ring=ring)

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, up)])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(*results, strict=True))


def test_compiles_around_real_processes():
    run_processes(_compiled, 2)
