"""A backward by parts of the heads: the same gradients as of all at once, where there are many rows, and only where it may."""

import weakref
from unittest.mock import patch

import pytest
import torch

import ring_attn as ra
from ring_attn import call
from ring_attn.call import Call
from ring_attn.kernels.reference import ReferenceKernel
from tests.scores import MASKS, Sizes, errors, pieces_of
from tests.support import FLOAT64_LIMIT


@pytest.fixture
def heads_seen():
    """The KV heads of every call of a backward, while as little as one byte of sums is too much."""
    seen, backward = [], ReferenceKernel.backward

    def noted(self, up, q, k, v, *rest, **options):
        seen.append((q.shape[2], k.shape[2]))
        return backward(self, up, q, k, v, *rest, **options)

    with patch.object(call, "_SUMS", 1), patch.object(ReferenceKernel, "backward", noted):
        yield seen


@pytest.mark.parametrize("exchange", ["ring", "gather", "pull", "two-way", "two-level"])
@pytest.mark.parametrize(("ring_size", "ulysses"), [(1, 1), (4, 1), (4, 2)])
def test_it_gives_the_same_on_every_exchange(heads_seen, exchange, ring_size, ulysses):
    if exchange == "two-level" and ring_size == 1:
        return
    nodes = {"ranks_per_node": 2} if exchange == "two-level" else {}
    ring = ra.Ring.simulated(ring_size, exchange=exchange, kernel="reference", ulysses=ulysses, hostile=True, **nodes)
    n = Sizes(h=12, g=6)
    for mask in ("causal", "documents"):
        assert max(errors(ring, n, MASKS[mask](n.t), []).values()) <= FLOAT64_LIMIT
    assert set(heads_seen) == {(2, 1)}


@pytest.mark.parametrize(
    ("score", "parts"),
    [("softcap", True), ("sinks", True), ("cosine", True), ("alibi", False), ("dropout", False), ("softcap, sinks", True)],
)
def test_what_tells_heads_apart_or_learns_goes_at_once(heads_seen, score, parts):
    n = Sizes(h=4, g=2)
    ring = ra.Ring.simulated(3, kernel="reference", exchange="pull")
    pieces = [piece for name in score.split(", ") for piece in pieces_of(name, n)]
    assert max(errors(ring, n, ra.Causal(), pieces).values()) <= FLOAT64_LIMIT
    assert set(heads_seen) == {(2, 1) if parts else (4, 2)}


def test_a_mask_that_tells_heads_apart_goes_at_once(heads_seen):
    n = Sizes(h=4, g=2)
    ring = ra.Ring.simulated(3, kernel="reference")
    mask = ra.Causal() & ra.MaskMod(lambda b, h, q, k: (q - k) % (h + 2) == 0)
    assert max(errors(ring, n, mask, []).values()) <= FLOAT64_LIMIT
    assert set(heads_seen) == {(4, 2)}


def test_a_ring_that_keeps_kv_goes_at_once(heads_seen):
    ring = ra.Ring.simulated(3, kernel="reference", exchange="pull", keep_kv=True)
    assert max(errors(ring, Sizes(), ra.Causal(), []).values()) <= FLOAT64_LIMIT
    assert set(heads_seen) == {(4, 2)}


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "parts"),
    [
        (2048, 32, 8, 1),
        (8192, 32, 8, 1),
        (16384, 32, 8, 2),
        (32768, 32, 8, 4),
        (32768, 32, 1, 1),
        (131072, 32, 8, 8),
        (8192, 32, 32, 4),
    ],
)
def test_so_many_parts_as_it_takes(rows, heads, kv_heads, parts):
    """Of a rank among four, with what it pulls from three."""
    q, k, v = (torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, rows, h, 128) for h in (heads, kv_heads, kv_heads))
    ring = ra.Ring.simulated(4, exchange="pull")
    ring.transport.hosted = (0,)
    assert Call.make(ring, ra.Causal(), None, 1.0).settle(q, k, v).head_parts == parts


def test_sums_of_a_part_are_gone_before_the_next_has_its_own():
    seen, most, backward = [], [], ReferenceKernel.backward

    def noted(self, up, q, k, v, *rest, into, **options):
        backward(self, up, q, k, v, *rest, into=into, **options)
        (dq,), _ = into.q.claim()
        # It has a view of them.
        seen.append(weakref.ref(dq._base))
        most.append(len({id(sums()) for sums in seen if sums() is not None}))

    ring = ra.Ring.simulated(2, exchange="pull", kernel="reference")
    with patch.object(call, "_SUMS", 1), patch.object(ReferenceKernel, "backward", noted):
        assert max(errors(ring, Sizes(h=6, g=3), ra.Causal(), []).values()) <= FLOAT64_LIMIT
    assert most == [1, 2, 2, 2] * 3, "of two ranks, in either visit, for every part"
