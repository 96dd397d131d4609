"""Heads against sequence: every score in the caller's head numbers, shared KV heads, torch's own checks, what is refused.

The masks, layouts and exchanges are in the matrix, real processes in tests/dist.
"""

from contextlib import closing
from itertools import chain, cycle
from unittest.mock import patch

import pytest
import torch
from torch.library import opcheck

import ring_attn as ra
from ring_attn import call, ulysses
from ring_attn.comm.local import LocalTransport
from ring_attn.kernels import resolve
from ring_attn.layout import LAYOUTS, Shared
from tests.matrix import cases
from tests.sabotage import red_cases
from tests.scores import MASKS, SCORES, Sizes, errors, pieces_of
from tests.support import FLOAT32_LIMIT, FLOAT64_LIMIT, allowed, dense, random_qkv, rel_error
from tests.test_attention import gradients
from tests.test_sharding import check_loss, check_shard_and_unshard
from tests.test_transport import together
from tests.ulysses_sabotage import SCORE_SABOTAGES, ULYSSES_SABOTAGES

WAYS = [(2, 2, "zigzag", "ring"), (2, 3, "striped", "gather"), (4, 1, "contiguous", "ring"), (4, 2, "zigzag", "pull")]
SIZES = Sizes()


def ring_of(way, **options):
    parts, rings, layout, exchange = way
    return ra.Ring.simulated(parts * rings, layout, exchange=exchange, kernel="reference", ulysses=parts, **options)


def wrong(score, mask, way, n, limit=FLOAT64_LIMIT):
    found = errors(ring_of(way, hostile=True), n, MASKS[mask](n.t), pieces_of(score, n))
    return {name: error for name, error in found.items() if not error <= limit}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_every_score(way):
    found = {(score, mask): wrong(score, mask, way, SIZES) for score, mask in zip(SCORES, cycle(MASKS), strict=False)}
    assert not any(found.values()), {case: errors for case, errors in found.items() if errors}


@pytest.mark.parametrize("mask", ["blind rows", "function, documents, window"])
@pytest.mark.parametrize("score", ["all", "closure mod", "bias bhtt", "dropout"])
def test_a_function_of_the_head_with_scores_of_the_head(score, mask):
    assert not any(wrong(score, mask, way, SIZES) for way in WAYS)


@pytest.mark.parametrize("n", [Sizes(kv_len=36, kv_layout="striped"), Sizes(kv_len=12, kv_layout="contiguous")], ids=str)
def test_keys_of_another_sequence(n):
    for score, mask in (("nothing", "causal"), ("closure mod, bias htt, softcap", "window"), ("bias 1tt", "function")):
        assert not any(wrong(score, mask, way, n) for way in WAYS[:3])


@pytest.mark.parametrize("exchange", ["gather", "pull"])
def test_a_bound_on_memory_counts_the_heads_of_a_rank(exchange):
    n, mask = Sizes(h=4, g=4), MASKS["causal"](24)
    row = 2 * n.b * (n.g // 2) * (n.d + n.dv) * 8
    options = {"exchange": exchange, "kernel": "reference", "ulysses": 2, "hostile": True}
    operation, posted = "pull" if exchange == "pull" else "all_gather", []
    post = getattr(LocalTransport, operation)

    def counted(self, *payloads, what):
        posted.append("KV" in what)
        return post(self, *payloads, what=what)

    with patch.object(LocalTransport, operation, counted):
        transfers = []
        for memory in (None, 15 * row, 5 * row):
            posted.clear()
            found = errors(ra.Ring.simulated(6, **options, kv_memory=memory), n, mask, pieces_of("alibi", n))
            assert max(found.values()) <= FLOAT64_LIMIT
            transfers.append(sum(posted))
    assert transfers[0] < transfers[1] < transfers[2]
    with pytest.raises(ValueError, match=f"kv_memory {row - 1} is below the {row} bytes that one KV row at a time takes"):
        errors(ra.Ring.simulated(6, **options, kv_memory=row - 1), n, mask, [])


@pytest.mark.parametrize("score", ["bias htt", "bias 1tt", "sinks", "global mod"])
def test_float32(score):
    assert not wrong(score, "causal", WAYS[1], Sizes(dtype=torch.float32), FLOAT32_LIMIT)


def test_lower_dtypes_stay_as_close_as_plain_pytorch():
    """bf16, and the gradient of a KV head that four ranks read."""
    t = 48
    q, k, v, dout = random_qkv(2, t, t, 8, 2, 16, dtype=torch.bfloat16, seed=3)
    seen = allowed(ra.Causal(), t, 2)
    truth = gradients(lambda *x: dense(*x, seen, 0.25)[0], [x.double() for x in (q, k, v)], dout.double())
    plain = gradients(lambda *x: dense(*x, seen, 0.25)[0], (q, k, v), dout)
    ring = ra.Ring.simulated(24, "zigzag", ulysses=8, hostile=True)
    got = gradients(lambda *x: ring.unshard(ra.ring_attention(*map(ring.shard, x), ring=ring)), (q, k, v), dout)
    for n, (x, ref, other) in enumerate(zip(got, truth, plain, strict=True)):
        assert x.dtype == torch.bfloat16
        assert rel_error(x, ref) <= (3 if n else 2) * rel_error(other, ref)


def test_the_kernel_auto_picks():
    ring = ra.Ring.simulated(6, "zigzag", ulysses=3, hostile=True)
    reference = ra.Ring.simulated(6, "zigzag", ulysses=3, kernel="reference")
    *qkv, up = random_qkv(1, 48, 48, 6, 3, 16, seed=1)
    found = [gradients(lambda *x, ring=ring: ra.ring_attention(*x, ring=ring), qkv, up) for ring in (ring, reference)]
    assert all(rel_error(x, y) < FLOAT32_LIMIT for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_gradcheck_and_opcheck(num_kv_heads):
    ring = ra.Ring.simulated(4, "striped", ulysses=2)
    qkv = [x.requires_grad_() for x in random_qkv(1, 4, 4, 2, num_kv_heads, 2, 1, dtype=torch.float64)[:3]]
    slopes = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def both(q, k, v, slopes, bias):
        return ra.ring_attention(q, k, v, ring=ring, score=[ra.Alibi(slopes), ra.Bias(bias)], return_lse=True)

    assert torch.autograd.gradcheck(both, (*qkv, slopes, bias))
    name, kept = call.named(call.Call.make(ring, ra.Causal(), None, 0.5))
    opcheck(ulysses._enter, (*qkv, [], name))
    opcheck(ulysses._to_heads, (qkv, name))
    opcheck(ulysses._to_rows, (ulysses._to_heads([x.detach() for x in qkv], name), name))
    assert call.called(name) is kept


@pytest.mark.parametrize("score", ["nothing", "bias htt", "all"])
def test_compiles_in_one_graph(score):
    torch._dynamo.reset()
    ring, n = ra.Ring.simulated(4, "zigzag", ulysses=2), Sizes(t=8, g=1)
    pieces, mask = pieces_of(score, n), MASKS["function"](n.t)
    leaves = [x for piece in pieces for x in piece.leaves]
    scores = [piece.make(piece.leaves, ring) for piece in pieces]
    qkv = [x.requires_grad_() for x in random_qkv(n.b, n.t, n.t, n.h, n.g, n.d, n.dv, dtype=torch.float64)[:3]]

    def function(q, k, v):
        out, lse = ra.ring_attention(q * 2, k, v, ring=ring, mask=mask, score=scores, return_lse=True)
        return out * 3 + lse.masked_fill(lse == -torch.inf, 0).mT.unsqueeze(-1)

    found = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        out = run(*qkv)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [*qkv, *leaves])])
    assert all(rel_error(x, y) < FLOAT64_LIMIT for x, y in zip(*found, strict=True))


def test_an_eager_call_is_forgotten_with_its_graph():
    import gc

    ring = ra.Ring.simulated(4, "contiguous", ulysses=2)
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 8, 8, 2, 1, 4)[:3])
    gc.collect()
    before = len(call._calls)
    mask = ra.Causal() & ra.MaskMod(lambda b, h, i, j: i - j > h)
    out = ra.ring_attention(q, k, v, ring=ring, mask=mask)
    assert len(call._calls) == before + 3
    torch.autograd.grad(out.sin().sum(), (q, k, v))
    del out
    gc.collect()
    assert len(call._calls) == before


def test_lse_travels_only_where_it_is_asked_for(monkeypatch):
    """One trade before, one after, and one more for lse."""
    seen = []
    trade = ulysses._trade
    monkeypatch.setattr(ulysses, "_trade", lambda *args, what, **kw: seen.append(what) or trade(*args, what=what, **kw))
    ring, (q, k, v, _) = ra.Ring.simulated(4, ulysses=2), random_qkv(1, 8, 8, 2, 2, 4)
    ra.ring_attention(q, k, v, ring=ring)
    assert seen == ["rows for heads", "heads for rows"]
    ra.ring_attention(q, k, v, ring=ring, return_lse=True)
    assert seen[2:] == ["rows for heads", "heads for rows", "heads for rows"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ring_of_two_axes(layout):
    ring, plain = ra.Ring.simulated(6, layout, ulysses=3, hostile=True), ra.Ring.simulated(2, layout)
    assert (ring.size, ring.ulysses, ring.hosted) == (6, 3, tuple(range(6)))
    assert ring.seq_len(24) == 24 and "Ring(size=6, ulysses=3, hosted=(0, 1, 2, 3, 4, 5), layout=" in repr(ring)
    # Those that trade heads hold one ring rank's shard, in its order.
    assert torch.equal(ring.positions(24), plain.positions(24))
    with pytest.raises(
        ValueError, match=r"seq_len 8 must be a multiple of 2 \* 3 = 6: each shard of 2 ring ranks is held by 3"
    ):
        ring.positions(8)
    assert ring.positions(ring.shard_multiple).numel() == ring.shard_multiple
    check_shard_and_unshard(ring)
    check_loss(ring)
    together(ring.transport)


@pytest.mark.parametrize("layout_class", LAYOUTS.values())
def test_shared_shards_are_runs_of_the_rows_of_one(layout_class):
    for rings, parts in ((1, 2), (2, 3), (3, 4), (4, 1)):
        whole = layout_class(rings * parts * 6, rings)
        shared = Shared(whole, parts)
        for rank in range(rings):
            runs = [[p for r in shared.shard(rank * parts + u) for p in r] for u in range(parts)]
            assert {len(run) for run in runs} == {6}
            assert list(chain(*runs)) == [p for r in whole.shard(rank) for p in r]
        with pytest.raises(ValueError, match=f"rank {rings} is not in a ring of {rings}"):
            shared.shard(rings * parts)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((6, 6), r"num_heads 6 must be a multiple of ulysses 4"),
        (
            (12, 3),
            r"num_kv_heads 3 must be a multiple of ulysses 4, or a divisor of it.*k and v with repeat_interleave\(n, 2\)",
        ),
        ((12, 6), r"num_kv_heads 6 must be a multiple of ulysses 4, or a divisor of it"),
    ],
)
def test_heads_that_do_not_divide(heads, message):
    ring = ra.Ring.simulated(4, ulysses=4)
    q, k, v, _ = random_qkv(1, 8, 8, *heads, 4)
    with pytest.raises(ValueError, match=message):
        ra.ring_attention(q, k, v, ring=ring)
    with pytest.raises(ValueError, match=r"Bias must be \[1 or 1, 4 or 1, rows 8, keys 8\]"):
        ra.ring_attention(q[:, :, :4], k[:, :, :1], v[:, :, :1], ring=ring, score=ra.Bias(torch.zeros(2, 8, 8)))


def test_rows_that_do_not_divide():
    ring, (q, k, v, _) = ra.Ring.simulated(4, "contiguous", ulysses=2), random_qkv(1, 10, 10, 2, 2, 4)
    with pytest.raises(ValueError, match=r"10 rows cannot be the equal shards of 4 hosted ranks; use ring.shard"):
        ra.ring_attention(q, k, v, ring=ring)


def test_the_way_out_of_kv_heads_that_do_not_divide():
    ring, plain = ra.Ring.simulated(4, ulysses=4), ra.Ring.simulated(1)
    q, k, v, _ = random_qkv(1, 8, 8, 12, 3, 4)
    wide = [x.repeat_interleave(4, 2) for x in (k, v)]
    assert rel_error(ra.ring_attention(q, *wide, ring=ring), ra.ring_attention(q, k, v, ring=plain)) < FLOAT32_LIMIT


@pytest.mark.parametrize(("ring_size", "parts"), [(4, 3), (4, 0), (2, 4)])
def test_sizes_that_do_not_divide(ring_size, parts):
    with pytest.raises(
        ValueError, match=f"ulysses must be at least 1 and a divisor of the ring's {ring_size} ranks, got {parts}"
    ):
        ra.Ring.simulated(ring_size, ulysses=parts)


def test_nothing_is_red_without_sabotage():
    assert list(red_cases(None, 2, cases(ulysses=4)[::5])) == []


@pytest.mark.parametrize("name", ULYSSES_SABOTAGES)
def test_a_sabotage_turns_the_matrix_red(name):
    with closing(red_cases(ULYSSES_SABOTAGES[name], 2, cases(ulysses=4))) as red:
        assert next(red, None), f"no case of the matrix notices: {name}"


@pytest.mark.parametrize("name", SCORE_SABOTAGES)
def test_a_sabotage_of_a_score_turns_it_red(name):
    score, mask, sabotage = SCORE_SABOTAGES[name]
    resolve.cache_clear()
    with sabotage():
        assert any(wrong(score, mask, way, SIZES) for way in WAYS), f"nothing notices: {name}"
