"""tree_decode and KVCache: the newest rows of attention over a growing sharded cache, beside one dense softmax."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import ring_attn as ra
from ring_attn import cache as cache_module
from ring_attn import decode
from ring_attn.cache import CacheShard
from ring_attn.kernels import KernelUnavailable
from ring_attn.kernels.order import order_for
from tests.scores import MASKS, SCORES, Sizes, pieces_of, plain, seen_cells
from tests.support import FLOAT32_LIMIT, FLOAT64_LIMIT, OUT_FACTOR, dense, random_qkv, rel_error

LAYOUTS = ("contiguous", "striped", "zigzag")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels that then need one


def filled(ring, k, v, prefill, **options):
    """A cache of a sharded prefill and then three appends, the first of one token."""
    cache = ra.KVCache(ring, **options)
    if prefill:
        cache.extend(ring.shard(k[:, :prefill]), ring.shard(v[:, :prefill]))
    at = prefill
    for stop in (prefill + 1, (prefill + k.shape[1]) // 2, k.shape[1]):
        if at < stop <= k.shape[1]:
            cache.append(k[:, at:stop], v[:, at:stop])
            at = stop
    assert len(cache) == cache.seq_len == k.shape[1]
    return cache


def errors(ring, n, mask, pieces, *, prefill, new, scale=None, device="cpu"):
    """Relative errors of out and lse of the `new` last of n.t positions."""
    q, k, v, _ = random_qkv(n.b, n.t, n.t, n.h, n.g, n.d, n.dv, dtype=n.dtype, seed=n.seed)
    with torch.no_grad():
        want = plain(q.double(), k.double(), v.double(), seen_cells(mask, n), pieces, scale)
        newest = SimpleNamespace(shard=lambda x, dim: x[..., -new:, :])  # a Bias has the rows of the queries
        scores = [piece.make([leaf.to(device, n.dtype) for leaf in piece.leaves], newest) for piece in pieces]
        q, k, v = (x.to(device) for x in (q, k, v))
        cache = filled(ring, k, v, prefill)
        options = {"mask": mask, "score": scores or None, "softmax_scale": scale, "return_lse": True}
        out, lse = ra.tree_decode(q[:, -new:], cache, ring=ring, **options)
    assert out.dtype == n.dtype
    return rel_error(out.cpu(), want[0][:, -new:]), rel_error(lse.cpu(), want[1][..., -new:])


def hostile(ring_size, layout, **options):
    return ra.Ring.simulated(ring_size, layout, hostile=True, **options)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("ring_size", "layout", "new"), [(1, "striped", 2), (2, "zigzag", 1), (3, "contiguous", 3)])
def test_every_score(score, ring_size, layout, new):
    n = Sizes()
    found = errors(hostile(ring_size, layout), n, MASKS["causal"](n.t), pieces_of(score, n), prefill=12, new=new)
    assert all(error <= FLOAT64_LIMIT for error in found), found


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", ["nothing", "all"])
@pytest.mark.parametrize(("ring_size", "layout", "new"), [(2, "striped", 3), (3, "zigzag", 2), (5, "contiguous", 1)])
def test_every_mask(mask, score, ring_size, layout, new):
    n = Sizes(t=25)
    found = errors(hostile(ring_size, layout), n, MASKS[mask](n.t), pieces_of(score, n), prefill=ring_size * 4, new=new)
    assert all(error <= FLOAT64_LIMIT for error in found), found


@pytest.mark.parametrize("scale", [0.3, 0.0, -1.5])
def test_a_scale_of_any_sign(scale):
    n = Sizes()
    found = errors(hostile(2, "zigzag"), n, ra.Causal(), pieces_of("alibi", n), prefill=8, new=2, scale=scale)
    assert all(error <= FLOAT64_LIMIT for error in found), found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 5])
def test_token_by_token(ring_size, layout):
    """From an empty cache and from a prefill, one to three tokens at a time: shards are uneven, and at first empty."""
    ring, t = hostile(ring_size, layout), ring_size * 2 + 9
    q, k, v, _ = random_qkv(2, t, t, 6, 2, 4, 7, dtype=torch.float64)
    want, want_lse = dense(q, k, v, torch.ones(1, t, t, dtype=torch.bool).tril(), 0.5)
    for prefill in (0, ring_size * 2):
        cache, at = ra.KVCache(ring), prefill
        if prefill:
            cache.extend(ring.shard(k[:, :prefill]), ring.shard(v[:, :prefill]))
        for new in (1, 2, 1, 3, 1, 1):
            cache.append(k[:, at : at + new], v[:, at : at + new])
            at += new
            out, lse = ra.tree_decode(q[:, at - new : at], cache, ring=ring, return_lse=True)
            assert rel_error(out, want[:, at - new : at]) <= FLOAT64_LIMIT
            assert rel_error(lse, want_lse[..., at - new : at]) <= FLOAT64_LIMIT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ring_of_two_axes(layout):
    """No heads are traded: all ranks of both axes hold rows."""
    n = Sizes(t=30)
    ring = hostile(4, layout, ulysses=2)
    found = errors(ring, n, MASKS["window"](n.t), pieces_of("all", n), prefill=24, new=2)
    assert all(error <= FLOAT64_LIMIT for error in found), found


@pytest.mark.parametrize("kernel", ["reference", "aten", "triton", "auto"])
@pytest.mark.parametrize("mask", ["causal", "window", "documents"])
def test_every_kernel_here(kernel, mask):
    n, device = Sizes(t=70, d=16, dv=16, dtype=torch.float32), DEVICE if kernel == "triton" else "cpu"
    for new in (1, 3):
        ring, pieces = hostile(3, "zigzag", kernel=kernel), pieces_of("sinks", n)
        found = errors(ring, n, MASKS[mask](n.t), pieces, prefill=48, new=new, device=device)
        assert all(error <= FLOAT32_LIMIT for error in found), found


@pytest.mark.parametrize("score", ["softcap, alibi", "cosine"])
def test_the_triton_kernel_with_scores_that_are_bounded_and_that_are_not(score):
    n = Sizes(t=40, d=16, dv=16, dtype=torch.float32)
    pieces = [*pieces_of(score, n), *pieces_of("sinks", n)]
    ring, mask = hostile(3, "striped", kernel="triton"), ra.Causal() & ra.Window(20)
    found = errors(ring, n, mask, pieces, prefill=24, new=2, device=DEVICE)
    assert all(error <= FLOAT32_LIMIT for error in found), found


def test_bfloat16_is_as_good_as_plain_attention():
    ring = hostile(4, "striped")
    q, k, v, _ = random_qkv(1, 64, 64, 4, 2, 32, dtype=torch.bfloat16)
    seen = torch.ones(1, 64, 64, dtype=torch.bool).tril()
    want, _ = dense(q.double(), k.double(), v.double(), seen, 32**-0.5)
    theirs, _ = dense(q, k, v, seen, 32**-0.5)
    found = ra.tree_decode(q[:, -2:], filled(ring, k, v, 48), ring=ring)
    assert rel_error(found, want[:, -2:]) <= OUT_FACTOR * rel_error(theirs[:, -2:], want[:, -2:])


def test_autocast_changes_nothing():
    ring = hostile(4, "striped", kernel="reference")
    q, k, v, _ = random_qkv(1, 64, 64, 4, 2, 32)
    found = []
    for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with autocast:
            found.append(ra.tree_decode(q[:, -2:], filled(ring, k, v, 48), ring=ring))
    assert torch.equal(*found)


def test_a_query_that_sees_no_key():
    ring = hostile(3, "contiguous")
    q, k, v, _ = random_qkv(1, 9, 9, 2, 1, 4)
    out, lse = ra.tree_decode(q[:, -1:], filled(ring, k, v, 6), ring=ring, mask=ra.KeyPadding(0), return_lse=True)
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, -torch.inf))


def held(cache):
    """{position: (k, v)} of every row; fails where two ranks hold one."""
    rows = {}
    for shard in cache.shards:
        positions = [p for r in shard.positions for p in r]
        assert len(positions) == shard.rows == shard.k.shape[1] == shard.v.shape[1]
        for row, position in enumerate(positions):
            assert position not in rows
            rows[position] = shard.k[:, row], shard.v[:, row]
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size", [1, 3, 4])
def test_every_row_lies_on_one_rank_at_its_position(ring_size, layout):
    """Two prefills, the first with padding of any length, and tokens before, between and after."""
    ring, padded = ra.Ring.simulated(ring_size, layout), ring_size * 4
    _, k, v, _ = random_qkv(1, 1, 2 * padded + 7, 2, 2, 3, 5)
    for length in range(padded + 1):
        cache, at = ra.KVCache(ring), 0
        for new, step in ((2, 2), (length, padded), (4, 4), (padded, padded), (1, 1)):
            part = [ra.pad_to(x[:, at : at + new], padded) if step == padded else x[:, at : at + new] for x in (k, v)]
            if step != padded:
                cache.append(*part)
            elif new:
                cache.extend(*map(ring.shard, part), seq_len=new)
            else:
                cache.extend(*(ring.shard(x[:, :padded]) for x in (k, v)), seq_len=0)
            at += new
        rows = held(cache)
        assert sorted(rows) == list(range(at)) and len(cache) == at
        assert all(torch.equal(a, k[:, p]) and torch.equal(b, v[:, p]) for p, (a, b) in rows.items())
        assert all(len(shard.positions) <= 9 for shard in cache.shards)


def test_shards_stay_even_and_positions_few():
    ring = ra.Ring.simulated(4, "zigzag")
    x = torch.randn(1, 32, 1, 2)
    cache = ra.KVCache(ring)
    cache.extend(ring.shard(x), ring.shard(x))
    for n in range(1001):
        cache.append(x[:, :1], x[:, :1])
        rows = [shard.rows for shard in cache.shards]
        assert sum(rows) == len(cache) == 33 + n and max(rows) - min(rows) <= 1
    assert all(len(shard.positions) <= 3 for shard in cache.shards)
    assert repr(cache) == "KVCache(seq_len=1033, rows=[259, 258, 258, 258])"


@pytest.mark.parametrize(("capacity", "copies"), [(0, 10), (512, 1), (1000, 0), (5000, 0)])
def test_buffers_double(capacity, copies):
    cache, x = ra.KVCache(ra.Ring.simulated(2), capacity=capacity), torch.randn(2, 1, 1, 3)
    before, found = None, 0
    for _ in range(1000):
        cache.append(x, x)
        # A view keeps the buffer alive, so a new one has another address.
        now = cache.shards[0].k
        found += before is not None and now.data_ptr() != before.data_ptr()
        before = now
    assert found <= copies and (found > 0) == (copies > 0)
    assert torch.equal(before, x.expand_as(before))


def red(sabotage) -> bool:
    n = Sizes(t=23)
    with sabotage:
        found = errors(hostile(4, "contiguous"), n, ra.Causal(), pieces_of("sinks", n), prefill=16, new=1)
    return not all(error <= FLOAT64_LIMIT for error in found)


def wrong_owner():
    """Rank 0 stores rank 1's tokens."""

    def append(self, k, v):
        end = self.seq_len + k.shape[1]
        for rank, shard in zip(self.ring.hosted, self.shards, strict=True):
            first = (max(rank, 1) - self.seq_len) % self.ring.size
            rows = slice(first, None, self.ring.size)
            shard.add(range(self.seq_len + first, end, self.ring.size), k[:, rows], v[:, rows])
        self.seq_len = end

    return patch.object(ra.KVCache, "append", append)


def forgotten_rank():
    merge_all = decode.merge_all
    return patch.object(decode, "merge_all", lambda partials: merge_all(partials[1:]))


def sinks_on_every_rank():
    merge_all = decode.merge_all
    return patch.object(decode, "merge_all", lambda partials: merge_all([*partials, *partials[-1:] * 3]))


def positions_off_by_one():
    add = CacheShard.add

    def broken(self, positions, k, v):
        shift = 1 if self.rows else 0
        add(self, cache_module._later(positions, shift), k, v)

    return patch.object(CacheShard, "add", broken)


def forgotten_wait():
    return patch("ring_attn.comm.transport.Pending.wait", lambda self: self.received)


def forgetful_growth():
    with_room = cache_module._with_room
    return patch.object(cache_module, "_with_room", lambda buffer, *rows: with_room(torch.zeros_like(buffer), *rows))


@pytest.mark.parametrize(
    "sabotage", [wrong_owner, forgotten_rank, sinks_on_every_rank, positions_off_by_one, forgotten_wait, forgetful_growth]
)
def test_sabotage_is_noticed(sabotage):
    assert not red(nullcontext())
    assert red(sabotage()), sabotage.__name__


def test_decoding_asks_for_a_kernel_that_does_not_build_a_graph_a_shape():
    order = order_for("cuda", "forward", "decode", 64, 1)
    assert order.index("cudnn") > order.index("triton")


def small(ring, t=8, **options):
    q, k, v, _ = random_qkv(1, t, t, 4, 2, 6, **options)
    return q, k, v, filled(ring, k, v, t)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q[0], r"q must be \[batch, rows, heads, head_dim\], got"),
        (lambda q: q.double(), r"share one dtype, got torch.float64, torch.float32"),
        (lambda q: q.repeat(2, 1, 1, 1), r"same batch.*got \(2, 8, 4, 6\), \(1, 8, 2, 6\)"),
        (lambda q: q[:, :, :3], r"num_heads 3 must be a multiple of num_kv_heads 2"),
        (lambda q: q[..., :4], r"k must share q's head_dim"),
        (lambda q: q[:, :0], r"every dimension of q must be at least 1"),
        (lambda q: q.repeat(1, 2, 1, 1), r"q has 16 rows, but the cache 8 positions; append their keys"),
    ],
)
def test_queries_that_do_not_fit_are_named(change, message):
    ring = ra.Ring.simulated(2)
    q, _, _, cache = small(ring)
    for score in (None, ra.CosineSim(2.0)):
        with pytest.raises(ValueError, match=message):
            ra.tree_decode(change(q), cache, ring=ring, score=score)


def test_calls_that_do_not_fit_are_named():
    ring = ra.Ring.simulated(2)
    q, _, _, cache = small(ring)
    q = q[:, -1:]
    with pytest.raises(TypeError, match=r"mask must be a ring_attn mask such as Causal\(\) & Window\(1024\), got str"):
        ra.tree_decode(q, cache, ring=ring, mask="causal")
    with pytest.raises(TypeError, match=r"q must be a tensor \[batch, rows, heads, head_dim\], got list"):
        ra.tree_decode([0.0], cache, ring=ring)
    with pytest.raises(
        ValueError, match=r"the cache was made for another Ring object than this Ring.*; make it of the ring that decodes"
    ):
        ra.tree_decode(q, cache, ring=ra.Ring.simulated(2))
    with pytest.raises(ValueError, match="the cache is empty; add the keys of the queries first"):
        ra.tree_decode(q, ra.KVCache(ring), ring=ring)
    with pytest.raises(ValueError, match="the documents add up to 7 positions, but seq_len is 8"):
        ra.tree_decode(q, cache, ring=ring, mask=ra.Documents(lengths=[7]))
    with pytest.raises(ValueError, match="CosineSim has a scale of its own"):
        ra.tree_decode(q, cache, ring=ring, score=ra.CosineSim(2.0), softmax_scale=1.0)
    with pytest.raises(ValueError, match=r"Bias must be \[1 or 1, 4 or 1, rows 1, keys 8\].*or take tree_decode's rows of it"):
        ra.tree_decode(q, cache, ring=ring, score=ra.Bias(torch.zeros(8, 8)))
    with pytest.raises(ValueError, match=r"Sinks logits must be \[num_heads\]"):
        ra.tree_decode(q, cache, ring=ring, score=ra.Sinks(torch.zeros(3)))
    aten = ra.Ring.simulated(2, kernel="aten")
    q, _, _, cache = small(aten)
    with pytest.raises(KernelUnavailable, match="kernel 'aten' cannot do this forward"):
        ra.tree_decode(q, cache, ring=aten, score=ra.SoftCap(3.0))


def test_a_mask_that_fitted_before_the_cache_grew_is_refused():
    ring = ra.Ring.simulated(2)
    q, k, v, cache = small(ring)
    mask = ra.Documents(lengths=[3, 5])
    ra.tree_decode(q[:, -1:], cache, ring=ring, mask=mask)
    cache.append(k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="the documents add up to 8 positions, but seq_len is 9"):
        ra.tree_decode(q[:, -1:], cache, ring=ring, mask=mask)


def test_a_gradient_is_refused():
    ring = ra.Ring.simulated(2)
    q, k, v, cache = small(ring)
    for leaf, score in ((q, None), (torch.zeros(4), ra.Sinks), (torch.zeros(4), ra.Alibi), (torch.ones(4), ra.CosineSim)):
        leaf.requires_grad_()
        given = None if score is None else score(leaf)
        with pytest.raises(NotImplementedError, match=r"tree_decode passes no gradient on; call it under torch\.no_grad\(\)"):
            ra.tree_decode(q[:, -1:], cache, ring=ring, score=given)
        with torch.no_grad():
            assert not ra.tree_decode(q[:, -1:], cache, ring=ring, score=given).requires_grad
        q = q.detach()
    with pytest.raises(NotImplementedError, match="a KVCache passes no gradient on"):
        cache.append(k.requires_grad_(), v)


def test_rows_that_do_not_fit_a_cache_are_named():
    ring = ra.Ring.simulated(2)
    x = torch.randn(1, 8, 2, 6)
    cache = ra.KVCache(ring)
    for k, v in ((x[0], x[0]), (x, x[:, :4]), (x, x[:, :, :1]), (x[:, :0], x[:, :0])):
        with pytest.raises(ValueError, match=r"k and v must be \[batch, rows, heads, head_dim\], alike but for head_dim"):
            cache.append(k, v)
    with pytest.raises(ValueError, match=r"k and v must share dtype and device, got torch\.float32 on cpu, torch\.float64"):
        cache.append(x, x.double())
    with pytest.raises(ValueError, match="seq_len 9 must be between 0 and the 8 positions"):
        cache.extend(x, x, seq_len=9)
    with pytest.raises(ValueError, match=r"7 rows cannot be the equal shards of 2 hosted ranks"):
        cache.extend(x[:, :7], x[:, :7])
    with pytest.raises(TypeError, match="k"):
        cache.append([1.0], x)
    with pytest.raises(ValueError, match="capacity must be at least 0 positions, got -1"):
        ra.KVCache(ring, capacity=-1)
    assert len(cache) == 0
    cache.extend(x, x)
    for other in (x.repeat(2, 1, 1, 1), x[:, :, :1], x[..., :3], x.double()):
        with pytest.raises(ValueError, match=r"the cache holds .* make a new cache for another model or batch"):
            cache.append(other, other)


@pytest.mark.parametrize("capacity", [0, 40])
def test_modes_may_change_between_a_prefill_and_what_is_decoded(capacity):
    """Buffers made in inference mode would refuse to be written to outside of it, also where they double."""
    ring, (q, k, v, _) = ra.Ring.simulated(2), random_qkv(1, 24, 24, 2, 1, 4)
    found = {}
    for modes in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode), (torch.no_grad, torch.no_grad)):
        cache = ra.KVCache(ring, capacity=capacity)
        for n in range(0, 24, 4):
            rows = slice(n, n + 4)
            with modes[n // 4 % 2]():
                cache.append(k[:, rows], v[:, rows])
                found[modes] = ra.tree_decode(q[:, rows], cache, ring=ring).clone()
    first, *others = found.values()
    assert len(others) == 2 and all(torch.equal(first, other) for other in others)


def test_keys_that_are_no_numbers_with_a_point_are_named():
    k = torch.ones(1, 2, 1, 4, dtype=torch.int64)
    cache = ra.KVCache(ra.Ring.simulated(2))
    with pytest.raises(ValueError, match=r"k and v must be of floating dtype, got torch\.int64"):
        cache.append(k, k)
    assert not cache.seq_len
