"""The Triton backward's copies by TMA, against the reference in float64; on the CPU in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ring_attn.kernels import Upstream
from ring_attn.kernels.sums import Grads
from ring_attn.kernels.triton_blocks import Config, Configs, kv_table
from ring_attn.kernels.triton_kernel import TritonKernel, interpreted
from ring_attn.mask import Causal, Documents, Full, Window
from ring_attn.partial import empty
from ring_attn.tiles import Band, Tile, tiles
from tests.kernels.test_triton import check, cut
from tests.support import (
    BAND_KINDS,
    FLOAT32_LIMIT,
    adding_to,
    band_tiles,
    random_qkv,
    rel_error,
    run_kernel,
    split_tiles,
    truth,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TMA = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1"),
    pytest.mark.skipif(not HAS_TMA, reason="needs compute capability 9.0"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore:invalid value:RuntimeWarning"),
]

OWN_QUERIES, OWN_KEYS = Config(16, 32, 4, 1, tma=True), Config(32, 16, 4, 1, tma=True)
KERNELS = {
    "late": Configs(Config(16, 32, 4, 1), OWN_KEYS, OWN_QUERIES),
    "early": Configs(Config(16, 32, 4, 1), replace(OWN_KEYS, early=True), OWN_QUERIES),
}
KERNELS = {name: TritonKernel(configs) for name, configs in KERNELS.items()}
KERNEL = KERNELS["late"]
every_kernel = pytest.mark.parametrize("name", KERNELS)


@every_kernel
@pytest.mark.parametrize("kind", BAND_KINDS)
def test_one_visit(kind, name):
    check([band_tiles(kind, 37, 44)], *random_qkv(2, 37, 44, 2, 1, 16), kernel=KERNELS[name])


@every_kernel
@pytest.mark.parametrize("kind", ["causal", "far window", "documents", "batch rows"])
def test_carried_over_two_visits(kind, name):
    visits = cut(band_tiles(kind, 70, 70), 21)
    check(visits, *random_qkv(2, 70, 70, 4, 2, 16, 8, seed=1), kernel=KERNELS[name])


def test_carried_over_three_visits():
    check(split_tiles(band_tiles("many", 37, 44), 3), *random_qkv(2, 37, 44, 2, 1, 16, seed=2), kernel=KERNEL)


@pytest.mark.parametrize(("d", "dv"), [(24, 8), (64, 16), (33, 16), (16, 33)])
def test_head_dims_that_tma_copies_and_others(d, dv):
    check([band_tiles("window", 21, 37)], *random_qkv(1, 21, 37, 2, 1, d, dv, seed=3), kernel=KERNEL)


@pytest.mark.parametrize(
    "band", [Band(None, hi) for hi in (14, 15, 29, 30, 31, 32)] + [Band(lo, None) for lo in (16, 17, 18, 19)], ids=str
)
def test_bands_that_end_near_a_block(band):
    num_kv = 64 if band.hi is None else 20 + band.hi
    visits = [(Tile(range(20), range(num_kv), band, ((), ())),)]
    check(visits, *random_qkv(1, 20, num_kv, 1, 1, 16, seed=4), kernel=KERNEL)


@every_kernel
@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("length", [2, 15, 16, 17, 31, 33, 49])
def test_what_lies_outside_a_tile_counts_for_nothing(length, first, name):
    """A tile of `length` rows from any row on, with NaN before and behind it in every tensor that is read."""
    rows = range(first, first + length)
    inputs = random_qkv(1, 60, 60, 2, 1, 16, seed=5)
    visits = [(Tile(rows, rows, Band(None, 0), ((), ())),)]
    expected = truth(*inputs, visits, scale=0.2)
    for x in inputs:
        x[:, :first] = x[:, first + length :] = torch.nan
    got = run_kernel(KERNELS[name], *(x.to(DEVICE) for x in inputs), visits, scale=0.2)
    for key in ("out", "dq", "dk", "dv"):
        mine, true = (x[key][:, first : first + length].cpu() for x in (got, expected))
        assert rel_error(mine, true) < FLOAT32_LIMIT, key


@every_kernel
def test_documents_of_every_length(name):
    lengths = [1, 2, 3, 5, 16, 17, 33, 4, 47]
    rows = range(sum(lengths))
    visits = [tiles((rows,), [(rows,)], Causal() & Documents(lengths=lengths))]
    check(visits, *random_qkv(1, len(rows), len(rows), 2, 2, 16, seed=6), kernel=KERNELS[name])


def test_a_row_whose_lse_is_minus_infinity_has_no_gradient():
    q, k, v, dout = (x.to(DEVICE) for x in random_qkv(1, 37, 44, 2, 1, 16, seed=7))
    tile_list = band_tiles("full", 37, 44)
    partial = KERNEL.forward(q, k, v, tile_list, scale=0.2, out=torch.empty_like(q))
    partial.lse[..., 20:] = -torch.inf
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    KERNEL.backward(Upstream(dout, dout, partial.lse), q, k, v, tile_list, scale=0.2, into=adding_to(dq, dk, dv))
    assert (dq[:, 20:] == 0).all()
    assert (dq[:, :20] != 0).any()


def test_tma_is_used_where_it_can_be():
    from ring_attn.kernels.triton_backward import Visited, backward_calls
    from ring_attn.kernels.triton_scores import PLAIN

    tile_list = band_tiles("causal", 37, 44)
    # Rows of 17 numbers are no multiple of 16 bytes apart.
    for width, wanted in ((16, True), (17, False)):
        q, k, v, dout = (x.to(DEVICE)[..., :16] for x in random_qkv(1, 37, 44, 2, 1, width, seed=8))
        visited = Visited(Upstream(dout, dout, empty(q, 16).lse), q, k, v, 0.2, PLAIN)
        calls = list(backward_calls(visited, Grads.like(q, k, v), tile_list, KERNEL.configs, once=True))
        assert [call.arguments["TMA"] for call in calls] == [wanted, wanted]


def test_short_tiles_go_through_pointers():
    k = torch.empty(1, 60, 1, 1)
    lengths = [20, 3, 16, 15, 6]
    tile_list = tiles((range(60),), [(range(60),)], Causal() & Documents(lengths=lengths))
    long, short = (kv_table(tile_list, k, 32, **limits).ints.tolist() for limits in ({"least": 16}, {"most": 15}))
    starts = [{table[at] for at in range(4 * 2, len(table), 8)} for table in (long, short)]
    assert starts == [{0, 23}, {20, 39, 54}]


@pytest.mark.parametrize("dtype", [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [Causal(), Full(), Window(30, 4)], ids=["causal", "full", "window"])
def test_16_bit_is_what_pointers_give(mask, dtype):
    """The same products of the same numbers: only the order of the sums may differ."""
    inputs = [x.to(DEVICE) for x in random_qkv(1, 101, 101, 4, 2, 64, dtype=dtype, seed=10)]
    visits = cut(tiles((range(101),), [(range(101),)], mask), 37)
    own_queries, own_keys = Config(64, 32, 4, 1), Config(32, 64, 4, 1)
    plain = TritonKernel(Configs(own_queries, own_keys, own_queries))
    configs = Configs(own_queries, *(replace(config, tma=True) for config in (own_keys, own_queries)))
    expected = run_kernel(plain, *inputs, visits, scale=0.125)
    got = run_kernel(TritonKernel(configs), *inputs, visits, scale=0.125)
    for key in expected:
        assert rel_error(got[key], expected[key]) < (1e-3 if dtype == torch.float16 else 8e-3), key
