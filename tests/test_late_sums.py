"""Whole rings whose gradients are summed up late, as on GPUs: the launches interpreted, over kernels that hand back results and
kernels that add by themselves, against a dense float64 softmax.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch

import ring_attn as ra
from ring_attn.exchange.base import Beside
from ring_attn.kernels import sums
from ring_attn.kernels.sums import Sum
from tests.scores import MASKS, Sizes, compared
from tests.support import FLOAT64_LIMIT, by_head, random_qkv, rel_error
from tests.test_exchange import Living

pytest.importorskip("triton")
from ring_attn.kernels import triton_sum
from ring_attn.kernels.triton_kernel import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
BY_HEADS, HALVED = by_head(), patch("ring_attn.exchange.HALVES_FROM", 0)


@pytest.fixture
def passes(monkeypatch):
    """How many tensors each launch sums up."""
    made, launch = [], triton_sum.sum_call
    monkeypatch.setattr(sums, "fused", lambda device: True)
    monkeypatch.setattr(triton_sum, "sum_call", lambda x, *more: made.append(len(x)) or launch(x, *more))
    return made


@pytest.mark.parametrize(("kernel", "mask"), [("aten", "causal"), ("aten", "documents"), ("reference", "window")])
@pytest.mark.parametrize(
    ("exchange", "how"),
    [
        ("ring", {}),
        ("gather", {}),
        ("gather", {"kv_memory": 768 * 14}),
        ("pull", {}),
        ("pull", {"halved": HALVED}),
        ("pull", {"by heads": BY_HEADS}),
        ("pull", {"keep_kv": True}),
        ("pull", {"kv_memory": 768 * 3}),
        ("two-way", {}),
        ("two-level", {"ranks_per_node": 2}),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(x) or "plain",
)
def test_a_ring_is_right(passes, exchange, how, mask, kernel):
    n = Sizes(t=24, d=6, dv=6)
    options = {name: value for name, value in how.items() if name not in ("halved", "by heads")}
    with how.get("halved") or how.get("by heads") or nullcontext():
        ring = ra.Ring.simulated(4, "zigzag", exchange=exchange, kernel=kernel, hostile=True, **options)
        found = compared(ring, n, MASKS[mask](n.t), [], lse_grad=False)
    assert max(rel_error(x, ref) for x, ref in found.values()) <= FLOAT64_LIMIT
    assert set(passes) == {1, 2}


def test_what_travels_is_written_in_the_dtype_of_the_wire(passes):
    n = Sizes(t=24, d=6, dv=6)
    ring = ra.Ring.simulated(4, "zigzag", exchange="pull", kernel="aten", hostile=True, grad_dtype=torch.float32)
    found = {name: rel_error(x, ref) for name, (x, ref) in compared(ring, n, ra.Causal(), [], lse_grad=False).items()}
    assert all(1e-10 < found.pop(name) < 1e-6 for name in ("dk", "dv")), found
    assert max(found.values()) <= FLOAT64_LIMIT


@contextmanager
def kept_of(tensors):
    """What sums of so many tensors hold, results and totals, by rows; see `Living`."""
    living, add, claim = Living(), Sum.add, Sum.claim

    def added(self, given, *rest, **options):
        living.note(given if len(given) == tensors else [])
        add(self, given, *rest, **options)

    def claimed(self, rows, once=False):
        total, unwritten = claim(self, rows, once)
        living.note(total if len(total) == tensors else [])
        return total, unwritten

    with patch.object(Sum, "add", added), patch.object(Sum, "claim", claimed):
        yield living


def backward(ring, t):
    q, k, v, dout = random_qkv(1, t, t, 1, 1, 4)
    ra.ring_attention(*(x.requires_grad_() for x in (q, k, v)), ring=ring, mask=ra.Full()).backward(dout)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kernel", ["aten", "reference"])
@pytest.mark.parametrize("exchange", ["ring", "gather", "pull", "two-level"])
def test_nothing_of_a_backward_lives_on(monkeypatch, exchange, kernel, late):
    """Not even until Python looks for objects that hold each other."""
    nodes = {"ranks_per_node": 2} if exchange == "two-level" else {}
    ring = ra.Ring.simulated(4, exchange=exchange, kernel=kernel, **nodes)
    # Without launches: Triton's interpreter keeps what it ran on in such cycles.
    monkeypatch.setattr(triton_sum, "sum_call", lambda *given: lambda: None)
    monkeypatch.setattr(sums, "fused", lambda device: late)
    with kept_of(1) as of_q, kept_of(2) as of_kv:
        gc.collect()
        gc.disable()
        try:
            backward(ring, 32)
            assert (of_q.count(), of_kv.count()) == (0, 0)
        finally:
            gc.enable()
    assert of_q.peak and of_kv.peak


def test_kv_of_some_heads_is_laid_beside_each_other_in_one_pass(passes):
    pair = tuple(torch.randn(1, 24, 4, 16)[:, :, :2] for _ in range(2))
    rows = Beside.of(pair).packed()
    assert torch.equal(rows, torch.cat([x.flatten(2) for x in pair], -1)) and passes == [2]


def test_what_came_home_is_put_together_before_more_comes(passes):
    """As `kv_memory` bounds visits."""
    with kept_of(2) as living:
        backward(ra.Ring.simulated(4, "contiguous", exchange="pull", kernel="aten", kv_memory=2 * 16 * 32), 192)
    # Of two tensors and four ranks: own rows, a visit's, and as many that came home.
    assert living.peak <= 2 * 4 * (48 + 2 * 16)


def test_a_long_tour_keeps_one_result_of_dq_beside_their_total(passes):
    with kept_of(1) as living:
        backward(ra.Ring.simulated(6, "contiguous", exchange="ring", kernel="aten"), 96)
    assert living.peak <= 2 * 96


def test_sums_in_float64_are_so_whatever_comes():
    """As over a wire of fp32."""
    total, far = Sum([(1, 1, 1, 1)], torch.float64, torch.device("cpu")), torch.empty(1, 1, 1, 1, dtype=torch.float64)
    with patch.object(sums, "fused", lambda device: True):
        for value in (1.0, 2.0**-30):
            total.add([torch.full((1, 1, 1, 1), value)], range(1))
        total.write([far])
    assert far.item() == 1 + 2.0**-30
