"""Score modifiers and mask functions in the Triton kernels, against the reference in float64; on the CPU in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product

import pytest
import torch

import ring_attn as ra
from ring_attn.kernels import KernelUnavailable
from ring_attn.kernels.triton_blocks import Config, Configs, kv_table, query_table
from ring_attn.kernels.triton_kernel import TritonKernel, interpreted
from ring_attn.layout import LAYOUTS, Striped, Zigzag
from ring_attn.mask import Causal, Full, MaskMod, Window
from ring_attn.partial import only_sinks
from ring_attn.score import Alibi, CosineSim, ScoreMod, Scores, SoftCap, sort_scores
from ring_attn.tiles import Tile, tiles
from tests.kernels.comparison import check_half
from tests.scores import Piece, Sizes, alibi, cosine, errors, positions, sinks, softcap
from tests.scores import plain as plain_scores
from tests.support import FLOAT32_LIMIT, band_tiles, random_qkv, rel_error, run_kernel, split_tiles, truth

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TMA = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

OWN_QUERIES, OWN_KEYS = Config(16, 32, 4, 1), Config(32, 16, 4, 1)
KERNELS = {
    "pointers": Configs(OWN_QUERIES, OWN_KEYS, OWN_QUERIES),
    "tma": Configs(OWN_QUERIES, replace(OWN_KEYS, tma=True), replace(OWN_QUERIES, tma=True)),
    "early": Configs(OWN_QUERIES, replace(OWN_KEYS, tma=True, early=True), OWN_QUERIES),
}
KERNELS = {name: TritonKernel(configs) for name, configs in KERNELS.items() if HAS_TMA or name == "pointers"}
KERNEL = KERNELS["pointers"]


@triton.jit
def bow(score, b, h, q_pos, kv_pos):
    return score + 0.1 * score * score + 0.3 * (h + 2 * b) * ((q_pos + 3 * kv_pos) % 7 == 0)


@triton.jit
def through_bow(dscore, score, b, h, q_pos, kv_pos):
    return dscore * (1 + 0.2 * score)


@triton.jit
def shrink(score, b, h, q_pos, kv_pos):
    return score / (1.0 + h)


@triton.jit
def through_shrink(dscore, score, b, h, q_pos, kv_pos):
    return dscore / (1.0 + h)


@triton.jit
def sees(b, h, q_pos, kv_pos):
    return (q_pos + 2 * kv_pos + h + b) % 3 != 0


@triton.jit
def sees_near(b, h, q_pos, kv_pos):
    return tl.abs(q_pos - kv_pos) < 40


BOW = ScoreMod(lambda s, b, h, q, k: s + 0.1 * s * s + 0.3 * (h + 2 * b) * ((q + 3 * k) % 7 == 0), triton=(bow, through_bow))
SHRINK = ScoreMod(lambda s, b, h, q, k: s / (1.0 + h), triton=(shrink, through_shrink))
SEES = MaskMod(lambda b, h, q, k: (q + 2 * k + h + b) % 3 != 0, triton=sees)
SEES_NEAR = MaskMod(lambda b, h, q, k: (q - k).abs() < 40, triton=sees_near)


def slopes(heads: int) -> torch.Tensor:
    return torch.linspace(0.03, 0.3, heads)


# Scores by the number of heads, and what a mask adds to the bands.
MODIFIERS = {
    "softcap": (lambda h: [SoftCap(1.5)], Full()),
    "alibi": (lambda h: [Alibi(slopes(h))], Full()),
    "softcap, alibi": (lambda h: [SoftCap(1.5), Alibi(slopes(h))], Full()),
    "alibi, softcap": (lambda h: [Alibi(slopes(h)), SoftCap(1.5)], Full()),
    "function": (lambda h: [BOW], Full()),
    "functions, softcaps, alibi": (lambda h: [SoftCap(2.0), BOW, Alibi(slopes(h)), SHRINK, SoftCap(1.0)], Full()),
    "mask function": (lambda h: [], SEES),
    "mask functions, all": (lambda h: [SHRINK, Alibi(slopes(h)), BOW, SoftCap(3.0)], SEES & SEES_NEAR),
}


def some_tiles(kind: str) -> tuple[Tile, ...]:
    """Tiles for 32 query rows and 48 keys, or for as many as a shard has."""
    if kind == "zigzag":
        layout = Zigzag(96, 3)
        return tiles(layout.shard(1), [layout.shard(source) for source in (1, 0)], Causal())
    if kind == "striped":
        layout = Striped(96, 3)
        return tiles(layout.shard(1), [layout.shard(source) for source in (2, 0)], Window(50, 30))
    return band_tiles(kind, 32, 48)


KINDS = ("full", "causal", "strict", "far window", "documents", "batch rows", "many", "zigzag", "striped")


def with_predicates(tile_list, mask):
    """The tiles of a band with the functions of a mask."""
    return tuple(replace(tile, predicates=mask.rules()[0].predicates) for tile in tile_list)


def check(visits, q, k, v, dout, score, *, scale=0.3, kernel=KERNEL, partial=None, limit=FLOAT32_LIMIT):
    """Holds every result of a kernel to the truth."""
    inputs = [x.to(DEVICE) for x in (q, k, v, dout)]
    mine = score.with_tensors([x.to(DEVICE) for x in score.tensors()])
    expected = truth(q, k, v, dout, visits, scale=scale, score=score, partial=partial)
    partial = None if partial is None else type(partial)(*(x.to(DEVICE) for x in partial))
    got = run_kernel(kernel, *inputs, visits, scale=scale, score=mine, partial=partial)
    found = {name: rel_error(got[name].cpu(), expected[name]) for name in expected}
    assert all(error < limit for error in found.values()), found


CASES = list(zip(product(MODIFIERS, KINDS), cycle(KERNELS), cycle([(2, 1), (2, 2), (3, 1), (2, 2)]), strict=False))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(map(str, (*CASES[n][0], *CASES[n][1:]))))
def test_every_modifier_and_kind_of_tile(number):
    (name, kind), kernel, heads = CASES[number]
    steps, mask = MODIFIERS[name]
    tile_list = with_predicates(some_tiles(kind), mask)
    num_kv = 64 if kind in ("zigzag", "striped") else 48
    inputs = random_qkv(2 if kind == "batch rows" else 1, 32, num_kv, *heads, 16, 8, seed=number)
    check(split_tiles(tile_list, 1 + number % 2), *inputs, Scores(tuple(steps(heads[0]))), kernel=KERNELS[kernel])


def test_grouped_heads_and_batch_rows_in_blocks_that_are_cut():
    steps, mask = MODIFIERS["mask functions, all"]
    tile_list = with_predicates(band_tiles("causal", 29, 47), mask)
    check([tile_list], *random_qkv(2, 29, 47, 4, 2, 20, seed=1), Scores(tuple(steps(4))))


@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_outside_a_tile_count_for_nothing(kernel):
    """A tile of rows 3 to 40, with NaN before and behind it in k and v."""
    rows = range(3, 40)
    tile_list = (Tile(rows, rows, band_tiles("causal", 37, 37)[0].band, ((range(9, 46),), (range(9, 46),))),)
    score, inputs = Scores(tuple(MODIFIERS["functions, softcaps, alibi"][0](2))), random_qkv(1, 50, 50, 2, 1, 16, seed=5)
    expected = truth(*inputs, [tile_list], scale=0.2, score=score)
    for x in inputs[1:3]:
        x[:, :3] = x[:, 40:] = torch.nan
    mine = score.with_tensors([x.to(DEVICE) for x in score.tensors()])
    got = run_kernel(KERNELS[kernel], *(x.to(DEVICE) for x in inputs), [tile_list], scale=0.2, score=mine)
    for key in ("out", "dq", "dk", "dv"):
        assert rel_error(got[key][:, 3:40].cpu(), expected[key][:, 3:40]) < FLOAT32_LIMIT, key
    for key in ("lse", "gradient of tensor 0"):
        assert rel_error(got[key].cpu(), expected[key]) < FLOAT32_LIMIT, key


@pytest.mark.parametrize(("cap", "scale"), [(0.01, 0.002), (2.0, 3.0), (3000.0, 0.3)])
def test_softcap_of_any_size(cap, scale):
    """Scores around the cap, beyond it, and so far below it that tanh is all but the identity."""
    check([band_tiles("causal", 32, 48)], *random_qkv(1, 32, 48, 2, 1, 16, seed=2), Scores((SoftCap(cap),)), scale=scale)


def test_softcap_of_scores_that_are_all_far_beyond_it():
    """Where 1 - tanh^2 would keep one digit."""
    q, k, v, dout = random_qkv(1, 32, 48, 2, 1, 16, seed=6)
    check([band_tiles("causal", 32, 48)], q.abs() + 2, k.abs() + 2, v, dout, Scores((SoftCap(1.4),)), scale=0.1)


def test_softcap_of_the_largest_scores():
    q, k, v, dout = (x.to(DEVICE) for x in random_qkv(1, 32, 48, 2, 1, 16, seed=6))
    got = run_kernel(
        KERNEL, q * 1e18, k * 1e18, v, dout, [band_tiles("causal", 32, 48)], scale=1.0, score=Scores((SoftCap(5.0),))
    )
    assert all(x.isfinite().all() for x in got.values())
    assert got["lse"].abs().max() < 5 + 4


def test_alibi_where_float32_holds_no_position():
    at = 1 << 25
    tile_list = tiles((range(at, at + 32),), [(range(at - 16, at + 32),)], Window(40, 3))
    check([tile_list], *random_qkv(1, 32, 48, 2, 1, 16, seed=3), Scores((Alibi(slopes(2)),)))


def test_gradients_of_slopes_are_bitwise_repeatable_and_add_up():
    inputs, score = [x.to(DEVICE) for x in random_qkv(1, 32, 48, 2, 1, 16, seed=4)], Scores((Alibi(slopes(2).to(DEVICE)),))
    visits = [band_tiles("causal", 32, 48)]
    first, second = (run_kernel(KERNEL, *inputs, visits, scale=0.3, score=score) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["softcap", "alibi, softcap", "function"])
def test_16_bit_errs_as_little_as_plain_torch(name):
    rows, steps = 70, tuple(MODIFIERS[name][0](4))
    inputs = random_qkv(1, rows, rows, 4, 2, 64, dtype=torch.float16, seed=14)
    visits = [tiles((range(rows),), [(range(rows),)], Causal())]
    score, i = Scores(steps), torch.arange(rows)
    expected = truth(*inputs, visits, scale=0.2, score=score)
    mine = score.with_tensors([x.to(DEVICE) for x in score.tensors()])
    medium = TritonKernel(Configs(Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(64, 32, 4, 1)))
    got = {
        key: x.cpu() for key, x in run_kernel(medium, *(x.to(DEVICE) for x in inputs), visits, scale=0.2, score=mine).items()
    }
    meaning = {
        "softcap": [softcap(Sizes(), 1.5)],
        "alibi, softcap": [
            Piece(None, step=lambda s: s - slopes(4).to(s)[:, None, None] * (i[:, None] - i).abs()),
            softcap(Sizes()),
        ],
        "function": [Piece(None, step=lambda s: BOW.fn(s, 0, torch.arange(4)[:, None, None], i[:, None], i).to(s))],
    }
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    out, _ = plain_scores(*leaves, (i[:, None] >= i).expand(1, 4, -1, -1), meaning[name], 0.2)
    dense = dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, inputs[3])), strict=True))
    check_half(got, {key: expected[key] for key in ("out", "lse", "dq", "dk", "dv")}, dense)


# What stands below also goes through ra.ring_attention, and is compared with one dense softmax.


def user_mod(n: Sizes) -> Piece:
    b, h, (i, j) = torch.arange(n.b)[:, None, None, None], torch.arange(n.h)[:, None, None], positions(n.t)
    return Piece(lambda x, ring: BOW, step=lambda s: BOW.fn(s, b, h, i, j))


RINGS = {
    "softcap, alibi": ([softcap, alibi], Causal()),
    "alibi, softcap, sinks": ([alibi, softcap, sinks], Window(9, 4)),
    "cosine, softcap, sinks": ([cosine(4.0, 2), softcap, sinks], Causal() & ra.Documents(lengths=[7, 0, 17])),
    "functions": ([user_mod, alibi], Causal() & SEES),
}
WAYS = list(product((3, 4), LAYOUTS, ("ring", "gather")))


@pytest.mark.parametrize("number", range(len(WAYS)), ids=lambda n: "-".join(map(str, WAYS[n])))
def test_over_a_ring(number):
    ring_size, layout, exchange = WAYS[number]
    ring = ra.Ring.simulated(ring_size, layout, exchange=exchange, kernel="triton", hostile=True)
    pieces, mask = RINGS[list(RINGS)[(number + number // 4) % 4]]
    n = Sizes(b=1 + number % 2, h=2, g=1, d=8, dv=6, dtype=torch.float32, seed=number)
    found = errors(ring, n, mask, [piece(n) for piece in pieces])
    assert all(error < FLOAT32_LIMIT for error in found.values()), found


def baseline(score: Scores, dtype=torch.float32) -> float | None:
    from ring_attn.kernels.triton_scores import chain_of

    return chain_of(score, (), dtype).baseline(dtype)


@pytest.mark.parametrize(
    ("score", "bound"),
    [
        (CosineSim(4.0, groups=2), 8.0),
        (CosineSim(-4.0), 4.0),
        ([CosineSim(4.0), SoftCap(3.0)], 3 * torch.tanh(torch.tensor(4 / 3)).item()),
        (SoftCap(2.5), 2.5),
        ([Alibi(slopes(2)), SoftCap(2.5)], 2.5),
        ([CosineSim(4.0), Alibi(slopes(2))], torch.inf),
        ([SoftCap(2.5), BOW], torch.inf),
        (CosineSim(torch.ones(2)), torch.inf),
        ([], torch.inf),
    ],
)
def test_what_bounds_a_score(score, bound):
    assert sort_scores(score)[1].bound == pytest.approx(bound)


@pytest.mark.parametrize(
    ("dtype", "bound", "used"),
    [
        (torch.float32, 30.0, True),
        (torch.float32, 31.0, False),
        (torch.float32, 0.0, True),
        (torch.float32, torch.inf, False),
        (torch.bfloat16, 30.0, True),
        (torch.bfloat16, 31.0, False),
        (torch.float16, 3.3, True),
        (torch.float16, 3.5, False),
    ],
)
def test_a_bound_is_used_where_no_probability_underflows(dtype, bound, used):
    found = baseline(Scores((), None, bound), dtype)
    assert (found is not None) == used
    assert not used or found == pytest.approx(bound / 0.6931471805599453)


def of_unit_norm(x):
    return (x / x.norm(dim=-1, keepdim=True)).float()


@pytest.mark.parametrize("kind", ["causal", "batch rows", "many", "zigzag"])
@pytest.mark.parametrize("bound", [0.5, 30.0])
def test_a_constant_baseline(kind, bound):
    """Scores from one end of the bound to the other, on one visit and carried on from it."""
    num_kv = 64 if kind == "zigzag" else 48
    q, k, v, dout = random_qkv(2, 32, num_kv, 2, 1, 4, seed=7)
    q, k = (of_unit_norm(x.double()) for x in (q, k))
    k[:, 5], k[:, 9] = q[:, 20, 0:1], -q[:, 20, 0:1]
    score = Scores((), None, bound)
    assert baseline(score) is not None
    for visits in (1, 2):
        check(split_tiles(some_tiles(kind), visits), q, k, v, dout, score, scale=bound)


@pytest.mark.parametrize("sink", [-200.0, -3.0, 3.0, 60.0])
def test_a_constant_baseline_joins_what_was_carried(sink):
    """Sinks far below, inside and far above the bound; some rows meet no key, some on one of two visits."""
    q, k, v, dout = random_qkv(1, 37, 44, 2, 1, 16, seed=8)
    q, k = (of_unit_norm(x.double()) for x in (q, k))
    middle = Tile(range(5, 29), range(7, 40), band_tiles("causal", 24, 33)[0].band, ((range(5, 29),), (range(7, 40),)))
    rest = Tile(range(20, 33), range(4), band_tiles("full", 13, 4)[0].band, ((range(20, 33),), (range(4),)))
    for visits in ([(middle,)], [(middle,), (rest,)], [(), (rest,)]):
        partial = only_sinks(q, 16, torch.tensor([sink, -torch.inf]))
        check(visits, q, k, v, dout, Scores((), None, 6.0), scale=6.0, partial=partial)


def test_rows_without_keys_under_a_constant_baseline():
    q, k, v, _ = (x.to(DEVICE) for x in random_qkv(1, 37, 44, 2, 2, 16, seed=11))
    middle = Tile(range(5, 29), range(7, 40), band_tiles("causal", 24, 33)[0].band, ((), ()))
    partial = KERNEL.forward(q, k, v, (middle,), scale=0.2, score=Scores((), None, 20.0))
    for rows in (slice(5), slice(29, None)):
        assert (partial.m[..., rows] == -torch.inf).all() and (partial.lse[..., rows] == -torch.inf).all()
        assert (partial.acc[:, rows] == 0).all()
    assert (partial.m[..., 5:29] == 20).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_placed_table_knows_every_position(kind):
    """Row by row and in both directions, over the same cells as a table without positions."""
    tile_list = some_tiles(kind)
    q, k = torch.empty(2, 32, 1, 1), torch.empty(2, 64, 1, 1)
    expected = {
        (q_row, kv_row, batch, q_pos, kv_pos)
        for tile in tile_list
        for i, (q_row, q_pos) in enumerate(zip(tile.q_rows, (x for part in tile.positions[0] for x in part), strict=True))
        for j, (kv_row, kv_pos) in enumerate(zip(tile.kv_rows, (x for part in tile.positions[1] for x in part), strict=True))
        if (tile.band.lo is None or tile.band.lo <= j - i) and (tile.band.hi is None or j - i <= tile.band.hi)
        for batch in (range(2) if tile.batch is None else [tile.batch])
    }
    assert sorted(listed(query_table(tile_list, q, 16, placed=True), 16)) == sorted(expected)
    found = listed(kv_table(tile_list, k, 16, placed=True), 16)
    assert sorted((q_row, kv_row, batch, q_pos, kv_pos) for kv_row, q_row, batch, kv_pos, q_pos in found) == sorted(expected)


def listed(table, block):
    """(own row, walked row, batch row, own position, walked position) of every cell of a placed block table."""
    ints = table.ints.tolist()
    for program in range(table.programs):
        number, batch, first, last = ints[4 * program : 4 * program + 4]
        for at in range(first, last, 12):
            start, stop, walk_start, walk_stop, lo, hi, _, _, own_at, own_step, walk_at, walk_step = ints[at : at + 12]
            for own in range(max(start, number * block), min(stop, (number + 1) * block)):
                for walked in range(max(walk_start, own + lo), min(walk_stop, own + hi + 1)):
                    yield own, walked, batch, own_at + own_step * own, walk_at + walk_step * walked


def shrunk_by(factor):
    """A pair of functions whose names are those of every other such pair."""

    @triton.jit
    def forward(score, b, h, q_pos, kv_pos):
        return score * factor

    @triton.jit
    def backward(dscore, score, b, h, q_pos, kv_pos):
        return dscore * factor

    return ScoreMod(lambda s, b, h, q, k: s * factor, triton=(forward, backward))


def test_two_functions_of_one_name_are_refused():
    from ring_attn.kernels.triton_scores import check_names

    halved, doubled = shrunk_by(0.5), shrunk_by(2.0)
    check_names(halved.triton * 2)
    inputs = [x.to(DEVICE) for x in random_qkv(1, 20, 20, 1, 1, 16)]
    with pytest.raises(ValueError, match=r"two different Triton functions are named .*shrunk_by.*__qualname__"):
        run_kernel(KERNEL, *inputs, [band_tiles("full", 20, 20)], scale=0.2, score=Scores((halved, doubled)))


def calling(helper):
    @triton.jit
    def forward(score, b, h, q_pos, kv_pos):
        return helper(score, b, h, q_pos, kv_pos)

    forward.fn.__qualname__ = f"forward_{id(helper)}"
    return forward


def test_so_are_two_functions_that_others_call():
    from ring_attn.kernels.triton_scores import check_names

    first, second = (calling(shrunk_by(factor).triton[0]) for factor in (0.5, 2.0))
    check_names([first, first])
    with pytest.raises(ValueError, match=r"two different Triton functions are named .*shrunk_by"):
        check_names([first, second])


@pytest.mark.parametrize("functions", [bow, (bow,), (bow, lambda *x: x[0]), [bow, through_bow], (bow, through_bow, bow)])
def test_functions_that_are_no_pair_are_refused(functions):
    with pytest.raises(TypeError, match=r"ScoreMod\(.*\) takes triton=\(forward, backward\), two @triton.jit functions, got"):
        ScoreMod(lambda s, b, h, q, k: s, triton=functions)


def test_a_predicate_that_is_not_jitted_is_refused():
    with pytest.raises(TypeError, match=r"MaskMod\(.*\) takes triton=predicate, a @triton.jit function, got"):
        MaskMod(lambda b, h, q, k: q == k, triton=lambda b, h, q, k: q == k)


def test_a_captured_tensor_that_needs_a_gradient_is_refused_beside_triton_functions():
    table = torch.ones(8, requires_grad=True)
    mod = ScoreMod(lambda s, b, h, q, k: s * table[h], triton=(bow, through_bow))
    q = torch.ones(1, 8, 1, 4)
    with pytest.raises(ValueError, match="captures a tensor that needs a gradient, which its Triton functions cannot give"):
        ra.ring_attention(q, q, q, ring=ra.Ring.simulated(2), score=mod)
    with torch.no_grad():
        ra.ring_attention(q, q, q, ring=ra.Ring.simulated(2, kernel="reference"), score=mod)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"score": ScoreMod(BOW.fn)}, r"by Triton functions beside it, ScoreMod\(fn, triton=\(forward, backward\)\)"),
        ({"mask": MaskMod(SEES.fn)}, r"masks that are bands, or MaskMod\(fn, triton=predicate\)"),
        ({"mask": MaskMod(SEES.fn) & SEES_NEAR}, r"masks that are bands, or MaskMod\(fn, triton=predicate\)"),
        ({"score": [Alibi(slopes(1)), Alibi(slopes(1))]}, "the gradient of one Alibi's slopes"),
        ({"score": [SoftCap(1.0), ra.Bias(torch.zeros(8, 8))]}, "it has no bias"),
        ({"score": ra.Dropout(0.1, 0)}, "it has no dropout"),
    ],
)
def test_refuses_in_words(change, reason):
    q = torch.ones(1, 8, 1, 4, device=DEVICE)
    with pytest.raises(KernelUnavailable, match=reason):
        ra.ring_attention(q, q, q, ring=ra.Ring.simulated(2, kernel="triton"), **change)


def test_other_kernels_are_asked_nothing_new_by_a_bound():
    """Cosine similarity needs nothing of a kernel, also where its scale is a number."""
    q = torch.randn(1, 8, 1, 4)
    ring = ra.Ring.simulated(2, kernel="aten")
    assert ra.ring_attention(q, q, q, ring=ring, score=CosineSim(5.0)).isfinite().all()
