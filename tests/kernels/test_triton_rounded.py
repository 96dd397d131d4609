"""Gradients that one launch makes are written where they go, rounded: nothing in fp32 is written for them and read again."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

import ring_attn as ra
from ring_attn.kernels import Upstream
from ring_attn.kernels.sums import Grads, Sum
from ring_attn.kernels.triton_kernel import TritonKernel, interpreted
from ring_attn.mask import Causal, Documents
from ring_attn.tiles import tiles
from tests.kernels.test_triton_tma import KERNEL
from tests.support import poison_memory, random_qkv

pytest.importorskip("triton")
SEES_NEAR = pytest.importorskip("tests.kernels.triton_functions").SEES_NEAR
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore:invalid value:RuntimeWarning"),
]
T, FULL, ROUNDED = 70, torch.float32, torch.float16
MASKS = {
    "causal": (Causal(), KERNEL, [ROUNDED, ROUNDED]),
    "short documents": (Causal() & Documents(lengths=[10] * 7), KERNEL, [ROUNDED, ROUNDED]),
    # By TMA, and what is too short for that in a launch of its own.
    "long and short documents": (Causal() & Documents(lengths=[40, 10, 20]), KERNEL, [ROUNDED, FULL]),
    # Blocks that ask the function, and then those that it keeps whole.
    "function": (Causal() & SEES_NEAR, TritonKernel(block=16), [FULL, FULL]),
    "nothing": (ra.Full() & Documents(lengths=[0, T]), TritonKernel(), [ROUNDED, ROUNDED]),
}


@contextmanager
def claimed():
    """The dtypes of what kernels write their gradients to, in turn."""
    found, claim = [], Sum.claim

    def noted(self, *given):
        total, unwritten = claim(self, *given)
        found.append(total[0].dtype)
        return total, unwritten

    with patch.object(Sum, "claim", noted):
        yield found


@pytest.mark.parametrize("name", MASKS)
def test_as_if_rounded_from_fp32(name):
    mask, kernel, dtypes = MASKS[name]
    q, k, v, dout = (x.to(DEVICE) for x in random_qkv(2, T, T, 4, 2, 16, dtype=ROUNDED, seed=1))
    tile_list = () if name == "nothing" else tiles((range(T),), [(range(T),)], mask)
    out = torch.empty_like(q)
    lse = kernel.forward(q, k, v, tile_list, scale=0.2, out=out).lse

    def grads(*aim):
        into = Grads.like(q, k, v)
        if aim:
            into.q.sum.aim, into.kv.sum.aim = aim[:1], aim[1:]
        poison_memory(DEVICE)
        kernel.backward(Upstream(dout, out, lse), q, k, v, tile_list, scale=0.2, into=into)
        found = aim or [torch.empty_like(x) for x in (q, k, v)]
        into.write(*found)
        return found

    want = grads()
    with claimed() as found:
        got = grads(*(torch.full_like(x, torch.nan) for x in (q, k, v)))
    assert found[:2] == dtypes
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("size", "exchange", "dtypes"),
    [(1, "pull", {ROUNDED}), (1, "ring", {ROUNDED}), (3, "gather", {ROUNDED, FULL}), (3, "pull", {FULL}), (3, "ring", {FULL})],
)
def test_on_rings_where_one_visit_makes_them(size, exchange, dtypes):
    ring = ra.Ring.simulated(size, exchange=exchange, kernel="triton", hostile=True)
    q, k, v, dout = (x.to(DEVICE) for x in random_qkv(1, 48, 48, 4, 2, 16, dtype=ROUNDED, seed=2))
    with claimed() as found:
        ra.ring_attention(*(x.requires_grad_() for x in (q, k, v)), ring=ring).backward(dout)
    assert set(found) == dtypes
    whole = ra.Ring.simulated(1, kernel="reference")
    inputs = [ring.unshard(x.detach()).double().requires_grad_() for x in (q, k, v)]
    ra.ring_attention(*inputs, ring=whole).backward(ring.unshard(dout).double())
    for x, exact in zip((q, k, v), inputs, strict=True):
        assert (ring.unshard(x.grad) - exact.grad).norm() < 2**-9 * exact.grad.norm()
