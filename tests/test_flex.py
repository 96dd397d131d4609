"""Score and mask functions beside torch's flex_attention: the same functions, unchanged, give the same.

flex_attention has no backward on a CPU, so gradients are compared where there is a GPU.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import ring_attn as ra
from tests.support import FLOAT64_LIMIT, random_qkv, rel_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, G, D = 2, 24, 4, 2, 8


def table(*shape):
    gen = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(DEVICE).requires_grad_(DEVICE == "cuda")


def causal(b, h, q, k):
    return q >= k


def prefix(b, h, q, k):
    return (k < 5 + b) | (q >= k)


def dilated_by_head(b, h, q, k):
    return (q - k) % (h + 1) == 0


MASKS = {"causal": causal, "prefix": prefix, "dilated by head": dilated_by_head}
SLOPES, BIAS, GAIN, CELLS = table(H), table(H, 2 * T), table(B), table(T, T)
# The function, the tensors it closes over, and our own score of the same meaning where there is one.
SCORES = {
    "nothing": (None, [], None),
    "alibi": (lambda s, b, h, q, k: s - SLOPES[h] * (q - k).abs(), [SLOPES], lambda: ra.Alibi(SLOPES)),
    "softcap": (lambda s, b, h, q, k: 3.0 * torch.tanh(s / 3.0), [], lambda: ra.SoftCap(3.0)),
    # Entry T + d of the table is distance d; RelativeBias counts from -reach, here -(T - 1).
    "relative": (lambda s, b, h, q, k: s + BIAS[h, q - k + T], [BIAS], lambda: ra.RelativeBias(BIAS[:, 1:])),
    "by batch row": (lambda s, b, h, q, k: s * GAIN[b].cos() + CELLS[q, k], [GAIN, CELLS], None),
}


def by_flex(leaves, fn, mask):
    blocks = create_block_mask(mask, B, H, T, T, device=DEVICE)
    q, k, v = (x.transpose(1, 2) for x in leaves)
    return flex_attention(q, k, v, score_mod=fn, block_mask=blocks, enable_gqa=True).transpose(1, 2)


def by_ring(leaves, score, mask, layout):
    ring = ra.Ring.simulated(3, layout, hostile=True)
    return ring.unshard(ra.ring_attention(*map(ring.shard, leaves), ring=ring, mask=mask, score=score))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("layout", ["striped", "zigzag"])
def test_the_same_functions_and_our_own_scores_give_the_same(name, mask, layout):
    fn, tensors, own = SCORES[name]
    q, k, v, dout = (x.to(DEVICE) for x in random_qkv(B, T, T, H, G, D, dtype=torch.float64))
    leaves = [x.requires_grad_(DEVICE == "cuda") for x in (q, k, v)]

    def with_gradients(out):
        return [out, *(torch.autograd.grad(out, [*leaves, *tensors], dout) if DEVICE == "cuda" else [])]

    want = with_gradients(by_flex(leaves, fn, MASKS[mask]))
    for score in (None if fn is None else ra.ScoreMod(fn), *([own()] if own else [])):
        found = with_gradients(by_ring(leaves, score, ra.MaskMod(MASKS[mask]), layout))
        assert max(rel_error(x, ref) for x, ref in zip(found, want, strict=True)) <= FLOAT64_LIMIT
