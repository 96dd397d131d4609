"""Scores over real processes: the body of tests/scores.py, with sharded biases and gradients summed over the ranks."""

import pytest
import torch

import ring_attn as ra
from tests.dist.harness import run_processes
from tests.scores import MASKS, Sizes, errors, pieces_of
from tests.support import FLOAT64_LIMIT, random_qkv

CELLS = [
    ("bias bhtt", "causal", "zigzag", "ring", Sizes()),
    ("bias tt", "documents", "striped", "pull", Sizes()),
    ("closure mod, bias htt, softcap", "window", "contiguous", "ring", Sizes()),
    ("global mod, closure mod, sinks", "function", "zigzag", "gather", Sizes()),
    ("learned cosine groups, softcap, sinks", "padding", "striped", "ring", Sizes()),
    ("all", "blind rows", "zigzag", "pull", Sizes()),
    ("all", "function, documents, window", "striped", "gather", Sizes()),
    ("dropout", "causal", "contiguous", "gather", Sizes()),
    ("closure mod, bias htt, softcap", "window", "zigzag", "ring", Sizes(kv_len=36, kv_layout="striped")),
    ("bias 1htt", "function", "striped", "gather", Sizes(kv_len=12, kv_layout="contiguous")),
]


def _cells(rank: int, ranks_per_process: int) -> None:
    for score, mask, layout, exchange, n in CELLS:
        ring = ra.Ring.from_group(None, layout, exchange=exchange, kernel="reference", ranks_per_process=ranks_per_process)
        found = errors(ring, n, MASKS[mask](n.t), pieces_of(score, n))
        assert max(found.values()) <= FLOAT64_LIMIT, (score, mask, layout, exchange, found)


@pytest.mark.parametrize(("num_processes", "ranks_per_process"), [(2, 1), (3, 1), (2, 2)])
def test_cells(num_processes: int, ranks_per_process: int):
    run_processes(_cells, num_processes, ranks_per_process)


def _unequal(rank: int) -> None:
    ring = ra.Ring.from_group(None, "contiguous", kernel="reference")
    q, k, v, _ = random_qkv(1, 8, 8, 2, 1, 4)
    for mine in (
        (ra.SoftCap(1.0 + rank)),
        [ra.SoftCap(1.0)] * (1 + rank),
        ra.Dropout(0.1, rank),
        [None, ra.Sinks(torch.ones(2))][rank],
    ):
        with pytest.raises(ValueError, match="every rank must call with the same shapes"):
            ra.ring_attention(q, k, v, ring=ring, score=mine)
    whole = torch.zeros(16, 16)
    with pytest.raises(ValueError, match=r"rows 8, keys 16\].*got \(16, 16\); shard the whole bias with ring.shard"):
        ra.ring_attention(q, k, v, ring=ring, score=ra.Bias(whole))
    ra.ring_attention(q, k, v, ring=ring, score=ra.Bias(ring.shard(whole, -2)))


def test_ranks_that_ask_for_different_scores_are_told_and_the_ring_goes_on():
    run_processes(_unequal, 2)
