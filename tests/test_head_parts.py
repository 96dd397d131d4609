"""A backward by parts of the heads: the same gradients as of all at once, where there are many rows, and only where it may."""

import math
import weakref
from unittest.mock import patch

import pytest
import torch

import ring_attn as ra
from ring_attn import call
from ring_attn.call import Call
from ring_attn.kernels.reference import ReferenceKernel
from ring_attn.kernels.triton_kernel import interpreted
from tests.scores import MASKS, Sizes, compared, errors, pieces_of
from tests.support import FLOAT32_LIMIT, FLOAT64_LIMIT, by_head, rel_error


@pytest.fixture
def heads_seen():
    """The KV heads of every call of a backward, while as little as one byte of sums is too much."""
    seen, backward = [], ReferenceKernel.backward

    def noted(self, up, q, k, v, *rest, **options):
        seen.append((q.shape[2], k.shape[2]))
        return backward(self, up, q, k, v, *rest, **options)

    with by_head(), patch.object(ReferenceKernel, "backward", noted):
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
    ("rows", "heads", "kv_heads", "mask", "parts"),
    [
        (2048, 32, 8, ra.Causal(), 1),
        (8192, 32, 8, ra.Causal(), 1),
        (16384, 32, 8, ra.Causal(), 2),
        (32768, 32, 8, ra.Causal(), 4),
        (32768, 32, 1, ra.Causal(), 1),
        (131072, 32, 8, ra.Causal(), 8),
        # Here more would be too little work each.
        (32768, 32, 8, ra.Window(4095), 2),
        (32768, 32, 8, ra.Causal() & ra.Documents([8192] * 16), 2),
        (8192, 32, 32, ra.Causal(), 2),
        (4096, 32, 32, ra.Causal(), 1),
    ],
)
def test_so_many_parts_as_it_takes(rows, heads, kv_heads, mask, parts):
    """Of a rank among four GPUs, with what it pulls from three."""
    q, k, v = (torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, rows, h, 128) for h in (heads, kv_heads, kv_heads))
    ring = ra.Ring.simulated(4, exchange="pull")
    ring.transport.hosted, ring.transport.link = (0,), "gpus"
    assert Call.make(ring, mask, None, 1.0).settle(q, k, v).head_parts == parts


def test_sums_of_a_part_are_gone_before_the_next_has_its_own():
    seen, most, backward = [], [], ReferenceKernel.backward

    def noted(self, up, q, k, v, *rest, into, **options):
        backward(self, up, q, k, v, *rest, into=into, **options)
        (dq,), _ = into.q.claim()
        # It has a view of them.
        seen.append(weakref.ref(dq._base))
        most.append(len({id(sums()) for sums in seen if sums() is not None}))

    ring = ra.Ring.simulated(2, exchange="pull", kernel="reference")
    with by_head(), patch.object(ReferenceKernel, "backward", noted):
        assert max(errors(ring, Sizes(h=6, g=3), ra.Causal(), []).values()) <= FLOAT64_LIMIT
    assert most == [1, 2, 2, 2] * 3, "of two ranks, in either visit, for every part"


@pytest.fixture
def forwards():
    """The query and KV heads of every call of a forward, while any wait for others' KV is too long."""
    seen, forward = [], ReferenceKernel.forward

    def noted(self, q, k, *rest, **options):
        seen.append((q.shape[2], k.shape[2]))
        return forward(self, q, k, *rest, **options)

    with patch.object(call, "_WAIT", -math.inf), patch.object(ReferenceKernel, "forward", noted):
        yield seen


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize(("ring_size", "ulysses"), [(1, 1), (2, 1), (3, 1), (3, 2)])
def test_a_forward_meets_others_by_parts_of_the_heads(forwards, layout, ring_size, ulysses):
    ring = ra.Ring.simulated(ring_size * ulysses, layout, exchange="pull", kernel="reference", ulysses=ulysses, hostile=True)
    n = Sizes(t=36, h=8, g=4)
    for mask in ("causal", "documents", "full"):
        assert max(errors(ring, n, MASKS[mask](n.t), []).values()) <= FLOAT64_LIMIT
    all_heads = 8 // ulysses, 4 // ulysses
    assert set(forwards) == ({all_heads} if ring_size == 1 else {all_heads, (4 // ulysses, 2 // ulysses)})


@pytest.mark.parametrize("kernel", ["aten", "triton"])
def test_by_kernels_that_carry_on_in_other_ways(forwards, kernel):
    """From a library's own output, and in place."""
    if kernel == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    n = Sizes(t=24, d=16, dv=16, dtype=torch.float32)
    ring, mask = ra.Ring.simulated(3, "zigzag", exchange="pull", kernel=kernel, hostile=True), MASKS["documents"](n.t)
    found = compared(ring, n, mask, [], lse_grad=False)
    assert max(rel_error(x, ref) for x, ref in found.values()) <= FLOAT32_LIMIT
    assert Call.make(ring, mask, None, 0.25).settle(*(torch.zeros(1, 24, h, 16) for h in (4, 2, 2))).forward_parts == 2


@pytest.mark.parametrize(
    ("score", "parts"), [("softcap", True), ("sinks", True), ("cosine", True), ("alibi", False), ("dropout", False)]
)
def test_a_forward_goes_at_once_where_heads_are_told_apart(forwards, score, parts):
    n = Sizes(h=4, g=2)
    ring = ra.Ring.simulated(3, kernel="reference", exchange="pull")
    assert max(errors(ring, n, ra.Causal(), pieces_of(score, n)).values()) <= FLOAT64_LIMIT
    assert ((2, 1) in forwards) == parts


def test_what_is_kept_and_an_odd_head_go_at_once(forwards):
    for options, n in (({"keep_kv": True}, Sizes(h=4, g=2)), ({}, Sizes(h=6, g=3)), ({"kv_memory": 3000}, Sizes(h=4, g=2))):
        ring = ra.Ring.simulated(3, kernel="reference", exchange="pull", **options)
        assert max(errors(ring, n, ra.Causal(), []).values()) <= FLOAT64_LIMIT
        assert set(forwards) == {(n.h, n.g)}
        del forwards[:]


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "parts"), [(8192, 32, 32, 2), (8192, 32, 8, 1), (2048, 32, 32, 2), (32768, 32, 32, 1)]
)
def test_so_much_must_be_waited_for(rows, heads, kv_heads, parts):
    """Of a rank among four that copy engines serve."""
    q, k, v = (torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, rows, h, 128) for h in (heads, kv_heads, kv_heads))
    ring = ra.Ring.simulated(4, exchange="pull")
    ring.transport.hosted, ring.transport.link = (0,), "symmetric"
    assert Call.make(ring, ra.Causal(), None, 1.0).settle(q, k, v).forward_parts == parts
