"""The reference kernel against one dense softmax in float64; every other kernel is then held to the reference."""

from __future__ import annotations

import pytest
import torch

from ring_attn.kernels import Problem, Upstream, get_kernel
from ring_attn.kernels.reference import ReferenceKernel
from ring_attn.mask import Full, KeyPadding
from ring_attn.tiles import Band, Tile, tiles
from tests.kernels.comparison import LargestTensor, check_equal, exact, plain
from tests.support import (
    BAND_KINDS,
    FLOAT64_LIMIT,
    adding_to,
    band_tiles,
    cells_of,
    dense,
    random_qkv,
    run_kernel,
    split_tiles,
)

KERNELS = {"8x16": ReferenceKernel(8, 16), "16x8": ReferenceKernel(16, 8), "512x512": ReferenceKernel()}


def check(kernel, visits, q, k, v, dout, *, scale=0.2, dlse=None):
    got = run_kernel(kernel, q, k, v, dout, visits, scale=scale, dlse=dlse)
    check_equal(got, plain(q, k, v, dout, visits, scale=scale, dlse=dlse), FLOAT64_LIMIT)


def random(*shape, **options):
    return random_qkv(*shape, dtype=torch.float64, **options)


@pytest.mark.parametrize("visits", [1, 3])
@pytest.mark.parametrize("kind", BAND_KINDS)
@pytest.mark.parametrize("blocks", KERNELS)
def test_every_band(blocks, kind, visits):
    check(KERNELS[blocks], split_tiles(band_tiles(kind, 37, 44), visits), *random(2, 37, 44, 2, 1, 5))


@pytest.mark.parametrize(("num_q", "num_kv"), [(1, 1), (1, 50), (50, 1), (16, 16), (17, 15), (50, 20)])
@pytest.mark.parametrize("kind", ["full", "causal", "window"])
def test_sizes(kind, num_q, num_kv):
    check(KERNELS["8x16"], [band_tiles(kind, num_q, num_kv)], *random(2, num_q, num_kv, 2, 2, 4, seed=1))


@pytest.mark.parametrize(("kind", "num_q", "num_kv"), [("causal", 600, 1050), ("full", 1050, 600), ("window", 1050, 1050)])
def test_sizes_past_the_default_blocks(kind, num_q, num_kv):
    check(get_kernel("reference"), [band_tiles(kind, num_q, num_kv)], *random(1, num_q, num_kv, 1, 1, 4, seed=2))


@pytest.mark.parametrize("blocks", ["8x16", "16x8"])
def test_narrow_bands_at_every_offset_from_the_blocks(blocks):
    """Blocks that a band only touches with a corner; here some rows of a tile see no key."""
    inputs = random(1, 37, 44, 1, 1, 3, seed=11)
    for lo in range(-25, 30):
        check(KERNELS[blocks], [(Tile(range(37), range(44), Band(lo, lo + 1), ((), ())),)], *inputs)


@pytest.mark.parametrize(("d", "dv"), [(6, 6), (3, 10), (10, 3), (1, 1)])
@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (6, 1)])
def test_grouped_heads_and_head_dims(h, g, d, dv):
    check(KERNELS["8x16"], split_tiles(band_tiles("many", 37, 44), 2), *random(2, 37, 44, h, g, d, dv, seed=3))


@pytest.mark.parametrize("visits", [1, 2])
@pytest.mark.parametrize("kind", BAND_KINDS)
def test_gradient_of_lse(kind, visits):
    dlse = torch.randn(2, 4, 37, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    check(KERNELS["8x16"], split_tiles(band_tiles(kind, 37, 44), visits), *random(2, 37, 44, 4, 2, 5, seed=4), dlse=dlse)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 300.0])
def test_scales(scale):
    """300 makes scores of some thousand, whose exp is no float64."""
    check(KERNELS["8x16"], [band_tiles("causal", 37, 44)], *random(1, 37, 44, 2, 1, 5, seed=5), scale=scale)


def test_batch_rows_of_unlike_length():
    mask = KeyPadding(lengths=[11, 30])
    check(KERNELS["8x16"], [tiles((range(30),), [(range(30),)], mask)], *random(2, 30, 30, 2, 2, 4, seed=6))


MIDDLE = Tile(range(5, 29), range(7, 40), Band(None, 20), ((), ()))


def test_rows_in_no_tile():
    """Their output is 0, their lse -inf, they get no gradient, and what they hold, NaN here, reaches no one."""
    q, k, v, dout = random(2, 37, 44, 4, 2, 6, seed=7)
    visits = [(MIDDLE,), ()]
    want = plain(q, k, v, dout, visits, scale=0.2)
    for x, rows in ((q, MIDDLE.q_rows), (dout, MIDDLE.q_rows), (k, MIDDLE.kv_rows), (v, MIDDLE.kv_rows)):
        x[:, : rows.start], x[:, rows.stop :] = torch.nan, torch.nan
    got = run_kernel(KERNELS["8x16"], q, k, v, dout, visits, scale=0.2)
    check_equal(got, want, FLOAT64_LIMIT)
    assert (got["out"][:, 29:] == 0).all()
    assert (got["lse"][..., :5] == -torch.inf).all()
    for name, rows in (("dq", MIDDLE.q_rows), ("dk", MIDDLE.kv_rows), ("dv", MIDDLE.kv_rows)):
        assert (got[name][:, : rows.start] == 0).all()
        assert (got[name][:, rows.stop :] == 0).all()


def test_no_tile_at_all():
    q, k, v, dout = random(1, 7, 9, 2, 1, 4, 3)
    got = run_kernel(get_kernel("reference"), q, k, v, dout, [()], scale=0.2)
    assert (got["lse"] == -torch.inf).all()
    assert all((got[name] == 0).all() for name in ("out", "dq", "dk", "dv"))


def test_results_are_written_to_what_is_given():
    """A partial is carried on in place, the output fills `out`, gradients are added to what is there."""
    q, k, v, dout = random(2, 37, 44, 2, 1, 5, seed=8)
    kernel, (first, second) = KERNELS["8x16"], split_tiles(band_tiles("many", 37, 44), 2)
    partial = kernel.forward(q, k, v, first, scale=0.2)
    assert partial.acc.shape == q.shape
    out = torch.full_like(q, torch.nan)
    partial = kernel.forward(q, k, v, second, scale=0.2, into=partial, out=out)
    assert partial.acc is out
    up = Upstream(dout, out, partial.lse)
    dq, dk, dv = (torch.full_like(x, 2.0) for x in (q, k, v))
    for tile_list in (first, second):
        kernel.backward(up, q, k, v, tile_list, scale=0.2, into=adding_to(dq, dk, dv))
    got = {"out": out, "lse": partial.lse, "dq": dq - 2, "dk": dk - 2, "dv": dv - 2}
    check_equal(got, plain(q, k, v, dout, [first, second], scale=0.2), FLOAT64_LIMIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_fp32_whatever_the_inputs(dtype):
    q, k, v, dout = random_qkv(2, 37, 44, 2, 1, 5, dtype=dtype, seed=9)
    visits = split_tiles(band_tiles("many", 37, 44), 2)
    got = run_kernel(KERNELS["8x16"], q, k, v, dout, visits, scale=0.2)
    want = exact(q, k, v, dout, visits, scale=0.2)
    assert got["out"].dtype == dtype
    # Gradients start from the rounded output, so only lse keeps all of fp32 in 16 bits.
    check_equal({"lse": got["lse"]}, {"lse": want["lse"]}, 1e-6)
    check_equal(got, want, 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def test_memory_is_that_of_one_block():
    """No tensor but the inputs' own size and a block of scores, forward or backward; the dense softmax makes all of them."""
    t = 256
    q, k, v, dout = random(1, t, t, 1, 1, 2, seed=10)
    plan, kernel = tiles((range(t),), [(range(t),)], Full()), ReferenceKernel(32, 64)
    with LargestTensor() as largest:
        dense(q, k, v, cells_of(plan, 1, t, t), 0.2)
    assert largest.numel >= t * t
    out = torch.empty_like(q)
    with LargestTensor() as largest:
        partial = kernel.forward(q, k, v, plan, out=out, scale=0.2)
        grads = adding_to(*(torch.zeros_like(x) for x in (q, k, v)))
        kernel.backward(Upstream(dout, out, partial.lse), q, k, v, plan, scale=0.2, into=grads)
    assert largest.numel == 32 * 64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.int64}, "it takes floating dtypes, not torch.int64"),
        ({"lse_grad": True, "direction": "backward", "v_head_dim": 3, "device": "mps"}, None),
    ],
)
def test_what_it_refuses(change, reason):
    fields = {"direction": "forward", "device": "cpu", "dtype": torch.float32, "num_heads": 2, "num_kv_heads": 1}
    assert get_kernel("reference").supports(Problem(**({**fields, "head_dim": 8, "v_head_dim": 8} | change))) == reason
