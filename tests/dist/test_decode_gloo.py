"""Decoding over real processes: the same body as simulated, the same bits everywhere, and ranks that differ are told."""

from unittest.mock import patch

import pytest
import torch

import ring_attn as ra
from ring_attn.models.generate import generate
from tests.dist.harness import run_processes
from tests.scores import MASKS, Sizes, pieces_of
from tests.support import FLOAT64_LIMIT, random_qkv
from tests.test_decode import errors, filled
from tests.test_generate import decoders, dense_generate

CELLS = [
    ("nothing", "causal", "zigzag", 1),
    ("all", "function, documents, window", "striped", 3),
    ("global mod, closure mod, sinks", "window", "contiguous", 2),
    ("learned cosine groups, softcap, sinks", "padding", "zigzag", 1),
]


def _ring(layout: str = "contiguous", **options) -> ra.Ring:
    return ra.Ring.from_group(None, layout, kernel="reference", **options)


def _cells(rank: int, ranks_per_process: int) -> None:
    n = Sizes(t=31)
    for score, mask, layout, new in CELLS:
        ring = _ring(layout, ranks_per_process=ranks_per_process)
        for prefill in (0, ring.shard_multiple * 2):
            found = errors(ring, n, MASKS[mask](n.t), pieces_of(score, n), prefill=prefill, new=new)
            assert all(error <= FLOAT64_LIMIT for error in found), (score, mask, layout, prefill, found)
    _tokens(rank, ranks_per_process)
    _one_exchange_a_call(ranks_per_process)


def _tokens(rank: int, ranks_per_process: int) -> None:
    """The same bits on every process, greedy and drawn, though every process has a generator of its own."""
    ring = _ring("zigzag", ranks_per_process=ranks_per_process)
    plain, ringed = decoders(ring)
    torch.manual_seed(5)
    prompt = torch.randint(0, 11, (2, 15))
    assert torch.equal(generate(ringed, prompt, 10), dense_generate(plain, prompt, 10))
    drawn = generate(ringed, prompt, 10, temperature=0.9, generator=torch.Generator().manual_seed(rank))
    assert torch.equal(drawn, dense_generate(plain, prompt, 10, 0.9, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        logits = ringed.decode(prompt, ringed.new_caches())
    everyone = ring.transport.all_gather([logits] * ranks_per_process).wait()
    assert all(torch.equal(x, logits) for x in everyone)


def _one_exchange_a_call(ranks_per_process: int) -> None:
    ring = _ring(ranks_per_process=ranks_per_process)
    q, k, v, _ = random_qkv(1, 9, 9, 2, 1, 4)
    cache, counts = ra.KVCache(ring), []
    for at in range(9):
        cache.append(k[:, at : at + 1], v[:, at : at + 1])
        with patch.object(ring.transport, "all_gather", wraps=ring.transport.all_gather) as gathers:
            ra.tree_decode(q[:, at : at + 1], cache, ring=ring)
        counts.append(gathers.call_count)
    assert counts == [2] + [1] * 8


@pytest.mark.parametrize(("num_processes", "ranks_per_process"), [(2, 1), (3, 1), (2, 2)])
def test_cells(num_processes: int, ranks_per_process: int):
    run_processes(_cells, num_processes, ranks_per_process)


def _unequal(rank: int) -> None:
    ring = _ring()
    q, k, v, _ = random_qkv(1, 12, 12, 2, 1, 4)
    last = q[:, -1:]
    shorter = filled(ring, k[:, : 12 - rank], v[:, : 12 - rank], 8)
    with pytest.raises(ValueError, match=r"every rank must call with the same shapes.*\(1, 12, 1, 4\).*\(1, 11, 1, 4\)"):
        ra.tree_decode(last, shorter, ring=ring)
    cache = filled(ring, k, v, 8)
    with pytest.raises(ValueError, match="every rank must call with the same shapes"):
        ra.tree_decode(q[:, -1 - rank :], cache, ring=ring)
    for options in ({"mask": ra.Window(3 + rank)}, {"score": ra.SoftCap(1.0 + rank)}, {"softmax_scale": 0.5 + rank}):
        with pytest.raises(ValueError, match="every rank must call with the same shapes"):
            ra.tree_decode(last, cache, ring=ring, **options)
    with pytest.raises(ValueError, match="every rank must call with the same shapes"):
        ra.tree_decode(last[0] if rank else last, cache, ring=ring, score=ra.CosineSim(2.0))
    # The rank that cannot do it says so to the other.
    said = [r"ranks \[1\] cannot make this call", "kernel 'aten' cannot do this forward"][rank]
    with patch.object(ring, "kernel", ["reference", "aten"][rank]), pytest.raises(ValueError, match=said):
        ra.tree_decode(last, cache, ring=ring, score=ra.Alibi(torch.zeros(2)))
    assert ra.tree_decode(last, cache, ring=ring).isfinite().all()


def test_ranks_that_differ_are_told_and_the_ring_goes_on():
    run_processes(_unequal, 2)
