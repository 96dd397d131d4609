"""ALiBi and softcap beside flash-attn 2, cosine similarity beside flash-cosine-sim-attention: by those libraries themselves.

They need a GPU and are skipped where they are not installed; what they mean is held to plain formulas in tests/test_scores.py.
"""

import pytest
import torch

import ring_attn as ra
from tests.support import random_qkv, rel_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# Two 16-bit results differ by two roundings and what their products of rounded probabilities differ by.
LIMIT = 4 * torch.finfo(torch.bfloat16).eps


def by_ring(leaves, dout, layout, kernel, mask, score):
    ring = ra.Ring.simulated(3, layout, kernel=kernel)
    out = ring.unshard(ra.ring_attention(*map(ring.shard, leaves), ring=ring, mask=mask, score=score))
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("layout", ["striped", "zigzag"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", ["alibi", "softcap"])
def test_flash_attn_2(name, window, layout, kernel):
    flash_attn = pytest.importorskip("flash_attn")
    *leaves, dout = (x.cuda() for x in random_qkv(2, 384, 384, 4, 2, 64, dtype=torch.bfloat16))
    leaves = [x.requires_grad_() for x in leaves]
    slopes = torch.tensor([0.5, 0.1, 0.02, 0.004], device="cuda")
    options = {"alibi": {"alibi_slopes": slopes}, "softcap": {"softcap": 2.0}}[name]
    score = {"alibi": ra.Alibi(slopes), "softcap": ra.SoftCap(2.0)}[name]
    out = flash_attn.flash_attn_func(*leaves, causal=True, window_size=(-1 if window is None else window, 0), **options)
    theirs = [out, *torch.autograd.grad(out, leaves, dout)]
    ours = by_ring(leaves, dout, layout, kernel, ra.Window(window, 0), score)
    assert max(rel_error(x, y) for x, y in zip(ours, theirs, strict=True)) < LIMIT


@pytest.mark.parametrize("groups", [1, 4])
def test_flash_cosine_sim_attention(groups):
    library = pytest.importorskip("flash_cosine_sim_attention")
    *leaves, dout = (x.cuda() for x in random_qkv(2, 384, 384, 4, 4, 64, dtype=torch.float32))
    leaves = [x.requires_grad_() for x in leaves]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = library.flash_cosine_sim_attention(q, k, v, causal=True, scale=8, groups=groups).transpose(1, 2)
    theirs = [out, *torch.autograd.grad(out, leaves, dout)]
    ours = by_ring(leaves, dout, "zigzag", "triton", ra.Causal(), ra.CosineSim(8.0, groups))
    assert max(rel_error(x, y) for x, y in zip(ours, theirs, strict=True)) < 1e-4
