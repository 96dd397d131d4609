"""A default device of the user's, as torch.set_default_device makes it, is where the user's tensors go, and none of ours."""

import pytest
import torch

import ring_attn as ra
from ring_attn.comm.reads import arrivals
from ring_attn.kernels import has_triton
from ring_attn.kernels.packs import make_pack
from ring_attn.kernels.triton_kernel import interpreted
from ring_attn.tiles import Band, Tile
from tests.support import random_qkv

MASKS = {
    "causal": ra.Causal(),
    "window": ra.Window(5, 2),
    "batch rows": ra.Causal() & ra.Documents([[20, 28], [48]]),
}


INTERPRETED = pytest.mark.skipif(not (interpreted() and has_triton()), reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", ["reference", "aten", pytest.param("triton", marks=INTERPRETED)])
def test_a_call_makes_its_tensors_where_its_inputs_are(kernel, mask):
    check(kernel, MASKS[mask])


def test_so_does_one_whose_mask_is_a_function():
    check("reference", ra.MaskMod(lambda b, h, q, k: (q - k) % 3 != 1))


def check(kernel, mask):
    *qkv, dout = random_qkv(2, 48, 48, 4, 2, 16, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in qkv]

    def gradients():
        ring = ra.Ring.simulated(2, "zigzag", exchange="pull", kernel=kernel)
        return torch.autograd.grad(ra.ring_attention(*leaves, ring=ring, mask=mask), leaves, dout)

    # First, before anything is kept of another call.
    with torch.device("meta"):
        found = gradients()
    assert all(map(torch.equal, found, gradients()))


def test_what_calls_of_gpus_read_is_made_on_the_cpu_and_taken_there():
    cpu = torch.device("cpu")
    tiles = tuple(Tile(range(4 * n, 4 * n + 3), range(5 * n, 5 * n + 5), Band(), ((), ()), n % 2) for n in range(3))
    with torch.device("meta"):
        pack = make_pack.__wrapped__(tiles, 2, 12, 15, cpu)
        assert arrivals([range(2, 4), range(1)], 2).device == cpu
    tensors = *pack.q_rows, *pack.kv_rows, pack.q_places, pack.kv_places, pack.cu_q, pack.cu_kv
    assert {x.device for x in tensors} == {cpu}
