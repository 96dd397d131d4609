"""Score modifiers and mask functions in the Triton kernels, against the reference in float64; on the CPU in the interpreter."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from functools import reduce
from itertools import cycle

import pytest
import torch

from ring_attn.kernels.triton_blocks import Config, Configs, kv_table, query_table
from ring_attn.kernels.triton_kernel import TritonKernel, interpreted
from ring_attn.layout import Striped, Zigzag
from ring_attn.mask import Causal, Full, Window
from ring_attn.score import Alibi, Scores, SoftCap
from ring_attn.tiles import Tile, tiles
from tests.kernels.comparison import check_half
from tests.scores import Piece, Sizes, plain, softcap
from tests.support import FLOAT32_LIMIT, band_tiles, random_qkv, rel_error, run_kernel, split_tiles, truth

functions = pytest.importorskip("tests.kernels.triton_functions")
BOW, SHRINK, SEES, SEES_NEAR = functions.BOW, functions.SHRINK, functions.SEES, functions.SEES_NEAR
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
    "early": Configs(OWN_QUERIES, *(replace(config, tma=True, early=True) for config in (OWN_KEYS, OWN_QUERIES))),
}
KERNELS = {name: TritonKernel(configs) for name, configs in KERNELS.items() if HAS_TMA or name == "pointers"}
KERNEL = KERNELS["pointers"]


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
    partial = None if partial is None else type(partial)(*(x if x is None else x.to(DEVICE) for x in partial))
    got = run_kernel(kernel, *inputs, visits, scale=scale, score=mine, partial=partial)
    found = {name: rel_error(got[name].cpu(), expected[name]) for name in expected}
    assert all(error < limit for error in found.values()), found


# Single modifiers and what holds them all meet every kind of tile, the other compositions two of them.
CASES = [
    (name, kind)
    for number, name in enumerate(MODIFIERS)
    for kind in (
        KINDS if name in ("softcap", "alibi", "functions, softcaps, alibi", "mask functions, all") else KINDS[number::5]
    )
]
CASES = list(zip(CASES, cycle(KERNELS), cycle([(2, 1), (2, 2), (3, 1), (2, 2)]), strict=False))


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
    out, _ = plain(*leaves, (i[:, None] >= i).expand(1, 4, -1, -1), meaning[name], 0.2)
    dense = dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, inputs[3])), strict=True))
    check_half(got, {key: expected[key] for key in ("out", "lse", "dq", "dk", "dv")}, dense)


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


def test_the_cubic_of_mixed_powers_is_as_near_as_said():
    """Its coefficients, the highest first, are read from the instructions; on a GPU tests/gpu/scores.py runs them."""
    from ring_attn.kernels.triton_scores import MIXED_EXP2

    code = " ".join(re.findall("fma.*", MIXED_EXP2.value))
    factors = [struct.unpack(">f", bytes.fromhex(digits))[0] for digits in re.findall("0f([0-9A-F]{8})", code)]
    f = torch.linspace(-0.5, 0.5, 10001, dtype=torch.float64)
    found = reduce(lambda total, factor: total * f + factor, factors, torch.zeros_like(f))
    assert len(factors) == 4
    assert ((found - torch.exp2(f)) / torch.exp2(f)).abs().max() < 7.5e-5
