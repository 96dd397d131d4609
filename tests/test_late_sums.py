"""Whole rings whose gradients are summed up late, as on GPUs: the launches interpreted, over kernels that hand back results and
kernels that add by themselves, against a dense float64 softmax.
"""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

import ring_attn as ra
from ring_attn import call
from ring_attn.kernels import sums
from tests.scores import MASKS, Sizes, compared
from tests.support import FLOAT64_LIMIT, rel_error

pytest.importorskip("triton")
from ring_attn.kernels import triton_sum
from ring_attn.kernels.triton_kernel import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
BY_HEADS, HALVED = patch.object(call, "_SUMS", 1), patch("ring_attn.exchange.HALVES_FROM", 0)


@pytest.fixture
def passes(monkeypatch):
    """(tensors, by places or not) of each launch."""
    made, launch = [], triton_sum.sum_call
    monkeypatch.setattr(sums, "fused", lambda device: True)
    monkeypatch.setattr(triton_sum, "sum_call", lambda x, of, rows: made.append((len(x), len(of))) or launch(x, of, rows))
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
    assert {tensors for tensors, _ in passes} == {1, 2}


def test_what_travels_is_written_in_the_dtype_of_the_wire(passes):
    n = Sizes(t=24, d=6, dv=6)
    ring = ra.Ring.simulated(4, "zigzag", exchange="pull", kernel="aten", hostile=True, grad_dtype=torch.float32)
    found = {name: rel_error(x, ref) for name, (x, ref) in compared(ring, n, ra.Causal(), [], lse_grad=False).items()}
    assert all(1e-10 < found.pop(name) < 1e-6 for name in ("dk", "dv")), found
    assert max(found.values()) <= FLOAT64_LIMIT
