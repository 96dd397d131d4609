"""Cross-attention: keys of another length and layout than the queries', and inputs of three dimensions."""

from itertools import product

import pytest
import torch

import ring_attn as ra
from tests.scores import MASKS, SCORES, Sizes, errors, pieces_of
from tests.support import FLOAT64_LIMIT, random_qkv, rel_error

LAYOUTS = ("contiguous", "striped", "zigzag")
CROSS_MASKS = {
    "full": lambda n: ra.Full(),
    "causal": lambda n: ra.Causal(),
    "ends": lambda n: ra.Window(None, n.keys - n.t) if n.keys > n.t else ra.Window(n.t - n.keys, None),
    "window": lambda n: ra.Window(5, 3),
    "documents": lambda n: ra.Documents([n.t - 5, 0, 5], kv_lengths=[n.keys // 2, 1, n.keys - n.keys // 2 - 1]),
    "documents by row": lambda n: (
        ra.Causal() & ra.Documents([[3, n.t - 3], [0, n.t]], kv_lengths=[[n.keys, 0], [2, n.keys - 2]])
    ),
    "padding": lambda n: ra.KeyPadding([n.keys - 1, 4], starts=[3, 0]),
    "function": lambda n: ra.Window(9, 2) & ra.MaskMod(lambda b, h, q, k: (q + k + h) % 3 > 0),
}


def cells():
    """Every pair of layouts with every mask; ring sizes, exchanges and lengths take turns."""
    for number, (layout, kv_layout, mask) in enumerate(product(LAYOUTS, LAYOUTS, CROSS_MASKS)):
        ring_size, chunks = ((3, (4, 7)), (4, (3, 1)), (2, (3, 8)), (1, (12, 5)))[number % 4]
        n = Sizes(t=ring_size * 2 * chunks[0], kv_len=ring_size * 2 * chunks[1], kv_layout=kv_layout, seed=number)
        yield layout, ("ring", "gather", "pull")[number // 4 % 3], ring_size, mask, n


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_keys_and_every_mask(layout):
    for own, exchange, ring_size, mask, n in cells():
        if own == layout:
            ring = ra.Ring.simulated(ring_size, layout, exchange=exchange, kernel="reference", hostile=True)
            found = errors(ring, n, CROSS_MASKS[mask](n), [])
            assert max(found.values()) <= FLOAT64_LIMIT, (exchange, ring_size, mask, n, found)


@pytest.mark.parametrize("score", SCORES)
def test_every_score(score):
    n = Sizes(t=12, kv_len=30, kv_layout="striped")
    ring = ra.Ring.simulated(3, "zigzag", kernel="reference", hostile=True)
    found = errors(ring, n, CROSS_MASKS["window"](n), pieces_of(score, n))
    assert max(found.values()) <= FLOAT64_LIMIT, found


def test_keys_of_the_own_length_in_another_layout():
    n = Sizes(kv_layout="contiguous")
    ring = ra.Ring.simulated(3, "striped", exchange="gather", kernel="reference", hostile=True)
    for mask in MASKS.values():
        assert max(errors(ring, n, mask(n.t), pieces_of("softcap", n)).values()) <= FLOAT64_LIMIT


def test_a_window_shortens_the_tour_over_other_keys():
    q, k, v, _ = random_qkv(1, 16, 32, 1, 1, 4)
    ring, sent = ra.Ring.simulated(8, "contiguous", exchange="ring"), []
    shift = ring.transport.shift
    ring.transport.shift = lambda shards, offset=1, *, what: sent.append(what) or shift(shards, offset, what=what)
    ra.ring_attention(q, k, v, ring=ring, mask=ra.Window(2, 2), kv_layout="contiguous")
    assert 0 < len(sent) < 7
    sent.clear()
    ra.ring_attention(q, k, v, ring=ring, mask=ra.Full(), kv_layout="contiguous")
    assert len(sent) == 7


def test_other_lengths_and_layouts_are_never_guessed():
    ring = ra.Ring.simulated(2, "zigzag")
    q, k, v, _ = random_qkv(1, 8, 12, 2, 1, 4)
    with pytest.raises(ValueError, match=r"q has 8 rows here and k 12.*cross-attention.*kv_layout='zigzag'"):
        ra.ring_attention(q, k, v, ring=ring)
    with pytest.raises(ValueError, match=r"layout 'spiral' is not one of contiguous, striped, zigzag"):
        ra.ring_attention(q, k, v, ring=ring, kv_layout="spiral")
    with pytest.raises(ValueError, match=r"seq_len 6 must be a multiple of 2 \* ring_size = 4 for the zigzag layout"):
        ra.ring_attention(q, k[:, :6], v[:, :6], ring=ring, kv_layout="zigzag")
    with pytest.raises(ValueError, match=r"the documents add up to 8 positions, but the keys' length is 12.*need kv_lengths"):
        ra.ring_attention(q, k, v, ring=ring, mask=ra.Documents([3, 5]), kv_layout="zigzag")
    with pytest.raises(ValueError, match=r"Bias must be .*rows 8, keys 12"):
        ra.ring_attention(q, k, v, ring=ring, score=ra.Bias(torch.zeros(8, 8)), kv_layout="contiguous")


@pytest.mark.parametrize("exchange", ["ring", "gather", "pull"])
def test_merged_batch_and_heads_and_a_single_kv_head(exchange):
    """[b * h, s, d] is b * h batch rows of one head; k and v [b, s, d] are one head for all query heads."""
    ring = ra.Ring.simulated(3, "zigzag", exchange=exchange, hostile=True)
    q, k, v, dout = random_qkv(2, 18, 18, 3, 1, 4, 5, dtype=torch.float64)
    k, v, score = k.squeeze(2), v.squeeze(2), ra.Alibi(torch.tensor([0.3]))

    def grads(x, out, up):
        return out.detach(), *torch.autograd.grad(out, x, up)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = grads(leaves, ra.ring_attention(leaves[0], *(x.unsqueeze(2) for x in leaves[1:]), ring=ring), dout)
    found = grads(leaves, ra.ring_attention(*leaves, ring=ring), dout)
    assert all(torch.equal(x, ref) for x, ref in zip(found, want, strict=True))

    merged = [q.transpose(1, 2).flatten(0, 1), *(x.repeat_interleave(3, 0) for x in (k, v))]
    leaves = [x.clone().requires_grad_() for x in merged]
    up = dout.transpose(1, 2).flatten(0, 1)
    out, lse = ra.ring_attention(*leaves, ring=ring, score=score, return_lse=True)
    assert (out.shape, lse.shape) == ((6, 18, 5), (6, 18))
    full = [x.detach().unsqueeze(2).requires_grad_() for x in leaves]
    want = grads(full, ra.ring_attention(*full, ring=ring, score=score), up.unsqueeze(2))
    for x, ref in zip(grads(leaves, out, up), want, strict=True):
        assert rel_error(x, ref.squeeze(2)) == 0
    with pytest.raises(ValueError, match=r"num_heads 1 must be a multiple of num_kv_heads 2"):
        ra.ring_attention(merged[0], *(x.unsqueeze(2).expand(-1, -1, 2, -1) for x in merged[1:]), ring=ring)
