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
from tests.support import FLOAT32_LIMIT, by_head, poison_memory, random_qkv, rel_error

pytest.importorskip("triton")
SEES_NEAR = pytest.importorskip("tests.kernels.triton_functions").SEES_NEAR
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("triton", "reference", "aten") if DEVICE == "cpu" else ("triton", "reference")  # aten takes no fp32 on GPUs
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
            into.q.sum.aim, into.kv.sum.aim = (lambda: aim[:1]), (lambda: aim[1:])
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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{}, {"kv_memory": 24 * 512}, {"ulysses": 2}], ids=str)
@pytest.mark.parametrize("exchange", ["ring", "gather", "pull", "two-way"])
@pytest.mark.parametrize("rows", [1, 32])
def test_rings_of_one_rank(rows, exchange, options, kernel):
    """By every exchange, however it brings one rank's own rows home."""
    if "kv_memory" in options and exchange in ("ring", "two-way"):
        return
    ring = ra.Ring.simulated(options.get("ulysses", 1), "contiguous", exchange=exchange, kernel=kernel, **options)
    t = rows * options.get("ulysses", 1)
    inputs = [x.to(DEVICE) for x in random_qkv(1, t, t, 4, 2, 16, seed=3)]
    found = attend(ring, inputs)
    whole = ra.Ring.simulated(1, "contiguous", kernel="reference")
    for x, want in zip(found, attend(whole, [x.double() for x in inputs]), strict=True):
        assert rel_error(ring.unshard(x), want) < FLOAT32_LIMIT
    assert len({x.untyped_storage().data_ptr() for x in found}) == 4, "one may be written to and the others stay"


def attend(ring, tensors):
    *inputs, dout = (ring.shard(x).requires_grad_() for x in tensors)
    out = ra.ring_attention(*inputs, ring=ring)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.parametrize(
    ("size", "exchange", "lengths", "dtypes"),
    [
        (1, "pull", [48], {ROUNDED}),
        (1, "ring", [48], {ROUNDED}),
        (3, "gather", [48], {ROUNDED, FULL}),
        (3, "pull", [48], {FULL}),
        (3, "ring", [48], {FULL}),
        # Nobody needs anything of others.
        (3, "pull", [16, 16, 10, 6], {ROUNDED}),
        (3, "ring", [16, 16, 10, 6], {ROUNDED}),
    ],
)
def test_on_rings_where_one_visit_makes_them(size, exchange, lengths, dtypes):
    ring = ra.Ring.simulated(size, "contiguous", exchange=exchange, kernel="triton", hostile=True)
    check_on(ring, lengths, dtypes)


def test_by_parts_of_the_heads():
    """To their places among the others."""
    with by_head():
        check_on(ra.Ring.simulated(1, kernel="triton"), [48], {ROUNDED})


def check_on(ring, lengths, dtypes):
    mask = Causal() & Documents(lengths=lengths)
    q, k, v, dout = (x.to(DEVICE) for x in random_qkv(1, 48, 48, 4, 2, 16, dtype=ROUNDED, seed=2))
    with claimed() as found:
        ra.ring_attention(*(x.requires_grad_() for x in (q, k, v)), ring=ring, mask=mask).backward(dout)
    assert set(found) == dtypes
    whole = ra.Ring.simulated(1, kernel="reference")
    inputs = [ring.unshard(x.detach()).double().requires_grad_() for x in (q, k, v)]
    ra.ring_attention(*inputs, ring=whole, mask=mask).backward(ring.unshard(dout).double())
    for x, exact in zip((q, k, v), inputs, strict=True):
        assert (ring.unshard(x.grad) - exact.grad).norm() < 2**-9 * exact.grad.norm()
