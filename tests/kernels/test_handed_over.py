"""What a library makes of a whole visit in one call is handed over as it is: no pass over memory copies it."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

import ring_attn as ra
from ring_attn.kernels import sums, tilewise
from ring_attn.kernels.flash import Flash4Kernel
from ring_attn.mask import Causal, Documents, Full, KeyPadding
from tests import matrix
from tests.support import by_head, random_qkv, rel_error

triton_sum = pytest.importorskip("ring_attn.kernels.triton_sum")
from ring_attn.kernels.triton_kernel import interpreted  # noqa: E402
from tests.kernels.test_flash_versions import installed4  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
T = 40


@pytest.fixture
def made(monkeypatch):
    """What flash-attn 4 returned, out, dq, dk and dv, as often as each call of it; beside it, under "passes", our launches."""
    found, launch = {"out": [], "grads": [], "passes": []}, triton_sum.sum_call
    for name, of in (("_forward", "out"), ("_backward", "grads")):
        call = getattr(Flash4Kernel, name)

        def noted(*x, call=call, of=of, **options):
            found[of].append([x.contiguous() for x in call(*x, **options)])
            return found[of][-1]

        monkeypatch.setattr(Flash4Kernel, name, noted)
    monkeypatch.setattr(Flash4Kernel, "supports", lambda self, problem: None)
    monkeypatch.setattr(tilewise, "_can_fuse", lambda x: True)
    monkeypatch.setattr(sums, "fused", lambda device: True)
    monkeypatch.setattr(triton_sum, "sum_call", lambda *x: found["passes"].append(len(x[0])) or launch(*x))
    return found


MASKS = {"causal": Causal(), "full": Full(), "documents": Causal() & Documents(lengths=[7, 20, 13])}


def run(made, ring, mask, batch=1, t=T):
    """out, dq, dk, dv, each checked against float64."""
    inputs = random_qkv(batch, t, t, 4, 2, 16, dtype=torch.float16, seed=1)
    exact = attend(ra.Ring.simulated(1, kernel="reference"), [x.double() for x in inputs], mask)
    sharded = [ring.shard(x) for x in inputs]
    made["passes"].clear()
    with installed4():
        found = attend(ring, sharded, mask)
    for x, want in zip(found, exact, strict=True):
        assert rel_error(ring.unshard(x), want) < 2**-9
        assert x.is_contiguous(), "as it is where it is written to memory of ours"
    return found


def attend(ring, tensors, mask):
    *inputs, dout = (x.detach().requires_grad_() for x in tensors)
    out = ra.ring_attention(*inputs, ring=ring, mask=mask)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.parametrize("mask", MASKS)
def test_on_a_ring_of_one_nothing_is_copied(made, mask):
    found = run(made, ra.Ring.simulated(1, kernel="flash4"), MASKS[mask])
    ((out, _),), (grads,) = made["out"], made["grads"]
    assert [x.data_ptr() for x in found] == [x.data_ptr() for x in (out, *grads)] and not made["passes"]


def test_where_it_comes_in_another_order_it_is_copied(made):
    """As from libraries that want the heads before the rows."""
    call, flip = Flash4Kernel._forward, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    back = Flash4Kernel._backward
    flipped = patch.object(Flash4Kernel, "_forward", lambda *x, **o: (flip(call(*x, **o)[0]), call(*x, **o)[1]))
    with flipped, patch.object(Flash4Kernel, "_backward", lambda *x, **o: list(map(flip, back(*x, **o)))):
        run(made, ra.Ring.simulated(1, kernel="flash4"), Causal())
    assert made["passes"] == [1, 2]


@pytest.mark.parametrize(
    ("size", "exchange", "mask", "batch"),
    [
        (1, "pull", MASKS["documents"], 2),
        (1, "pull", MASKS["documents"] & KeyPadding(lengths=[0, T]), 2),
        (2, "gather", MASKS["documents"], 1),
        (2, "pull", MASKS["documents"], 1),
    ],
    ids=["several batch rows", "one batch row of two", "several ranks in one process", "several visits"],
)
def test_where_more_is_to_be_put_together_it_is(made, size, exchange, mask, batch):
    run(made, ra.Ring.simulated(size, exchange=exchange, kernel="flash4"), mask, batch)
    assert set(made["passes"]) == {1, 2}


@pytest.mark.parametrize("mask", matrix.MASKS)
@pytest.mark.parametrize("exchange", matrix.EXCHANGES)
@pytest.mark.parametrize("layout", matrix.LAYOUTS)
def test_the_matrix_by_a_library_and_the_launches_that_join_its_calls(made, layout, exchange, mask):
    """What GPUs run, on rings of two and of three; also results in place, as where each rank has a process of its own."""
    size, batch = 2 + len(mask + exchange + layout) % 2, 2 if "row" in mask or "padding" in mask else 1
    t = 14 * size
    # Of several ranks in one process the outputs are slices.
    with patch.object(tilewise, "on_its_own", lambda x: x.is_contiguous()):
        run(made, ra.Ring.simulated(size, layout, exchange=exchange, kernel="flash4"), matrix.MASKS[mask](t), batch, t)


def test_by_parts_of_the_heads_it_is_copied_to_its_place(made):
    with by_head():
        run(made, ra.Ring.simulated(1, kernel="flash4"), Causal())
    assert made["passes"] == [1, 2] * 2
