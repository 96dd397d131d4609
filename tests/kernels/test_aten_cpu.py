"""PyTorch's flash attention on the CPU as the kernel "aten", against a dense softmax in float64."""

from __future__ import annotations

import re

import pytest
import torch

from ring_attn.kernels import KernelUnavailable, Problem, Upstream, get_kernel, resolve
from ring_attn.kernels.aten import CpuFlash
from ring_attn.mask import Causal, Window
from ring_attn.tiles import Band, Tile, tiles
from tests.kernels.comparison import LIMITS, LargestTensor, check_equal, check_half, exact, plain
from tests.support import BAND_KINDS, adding_to, band_tiles, random_qkv, run_kernel, split_tiles

ATEN = get_kernel("aten")
SHORT_STRIPS = CpuFlash(strip=5)


def check(visits, q, k, v, dout, *, kernel=ATEN, scale=0.3):
    got = run_kernel(kernel, q, k, v, dout, visits, scale=scale)
    want = exact(q, k, v, dout, visits, scale=scale)
    if q.dtype in LIMITS:
        check_equal(got, want, LIMITS[q.dtype])
    else:
        check_half(got, want, plain(q, k, v, dout, visits, scale=scale))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_q", "num_kv"), [(37, 44), (53, 20)])
@pytest.mark.parametrize("kind", BAND_KINDS)
def test_every_band(kind, num_q, num_kv, dtype):
    check([band_tiles(kind, num_q, num_kv)], *random_qkv(2, num_q, num_kv, 4, 2, 16, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["documents", "batch rows", "many"])
def test_several_visits(kind, dtype):
    visits = split_tiles(band_tiles(kind, 37, 44), 3)
    check(visits, *random_qkv(2, 37, 44, 4, 2, 16, dtype=dtype, seed=2, outliers=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["causal", "window", "batch rows"])
def test_grouped_heads(kind, h, g, dtype):
    check([band_tiles(kind, 37, 44)], *random_qkv(2, 37, 44, h, g, 16, dtype=dtype, seed=3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [1, 3, 33, 80, 200])
def test_head_dims(d, dtype):
    check([band_tiles("many", 37, 44)], *random_qkv(1, 37, 44, 2, 1, d, dtype=dtype, seed=4), scale=d**-0.5)


@pytest.mark.parametrize(("num_q", "num_kv"), [(1, 1), (1, 70), (70, 1), (70, 3), (33, 33), (530, 610), (610, 530)])
@pytest.mark.parametrize("kind", ["full", "causal", "strict", "window", "far window"])
def test_lengths(kind, num_q, num_kv):
    check([band_tiles(kind, num_q, num_kv)], *random_qkv(1, num_q, num_kv, 2, 1, 8, dtype=torch.float64, seed=5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("kind", BAND_KINDS)
def test_strips_shorter_than_the_tile(kind, dtype):
    inputs = random_qkv(2, 53, 44, 4, 2, 16, dtype=dtype, seed=6)
    check([band_tiles(kind, 53, 44)], *inputs, kernel=SHORT_STRIPS)


def rectangle(kv_rows, batch=None):
    return Tile(range(37), kv_rows, Band(), ((), ()), batch)


@pytest.mark.parametrize(
    "visits",
    [
        [(rectangle(range(20)),), (rectangle(range(20, 44)),)],
        [(rectangle(range(20)),), (rectangle(range(20, 44), batch=1),)],
        [(rectangle(range(44), batch=1),)],
        [(), (rectangle(range(44)),), ()],
    ],
)
def test_visits_of_one_call(visits):
    """A call that holds all rows is a partial as it stands, but only if it is the first, and for all batch rows."""
    check(visits, *random_qkv(2, 37, 44, 4, 2, 16, dtype=torch.float64, seed=9))


def test_strided_inputs():
    """Slices of a longer sequence, and heads before rows."""
    q, k, v, dout = random_qkv(2, 60, 90, 4, 2, 16, dtype=torch.float64, seed=7)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)[:, 7:44]
    k, v = k[:, 40:84], v.transpose(0, 1).contiguous().transpose(0, 1)[:, 40:84]
    check(split_tiles(band_tiles("many", 37, 44), 2), q, k, v, dout[:, 3:40])


def test_no_tile_at_all():
    q, k, v, dout = random_qkv(1, 7, 9, 2, 1, 4)
    got = run_kernel(ATEN, q, k, v, dout, [()], scale=0.3)
    assert (got["lse"] == -torch.inf).all()
    assert all((got[name] == 0).all() for name in ("out", "dq", "dk", "dv"))


def test_no_mask_as_large_as_the_rectangle():
    """A window goes in strips of 512 rows, of a width to match; a causal square needs no mask."""
    t, left = 2048, 20
    q, k, v, dout = random_qkv(1, t, t, 1, 1, 4, seed=8)
    for mask, most in ((Window(left, 0), 512 * (512 + left)), (Causal(), q.numel())):
        plan = tiles((range(t),), [(range(t),)], mask)
        out = torch.empty_like(q)
        with LargestTensor() as largest:
            partial = ATEN.forward(q, k, v, plan, out=out, scale=0.3)
            grads = adding_to(*(torch.zeros_like(x) for x in (q, k, v)))
            ATEN.backward(Upstream(dout, out, partial.lse), q, k, v, plan, scale=0.3, into=grads)
        assert largest.numel == most


def problem(**change):
    fields = {"direction": "forward", "device": "cpu", "dtype": torch.float32, "num_heads": 4, "num_kv_heads": 2}
    return Problem(**({**fields, "head_dim": 33, "v_head_dim": 33} | change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"score": ("softcap",)}, "it has no .*softcap.*"),
        ({"direction": "backward", "lse_grad": True}, "no gradient through lse enters; triton and reference take one"),
        ({"v_head_dim": 8}, "it needs v_head_dim = head_dim, not 8 and 33; triton and reference do not"),
        ({"dtype": torch.int32}, "it takes float64, float32, bfloat16, float16, not int32"),
        ({"device": "mps"}, "no flash attention for device 'mps' that takes part in a ring; use cpu or cuda"),
    ],
)
def test_what_it_refuses(change, reason):
    with pytest.raises(KernelUnavailable, match=reason):
        resolve("aten", problem(**change))


@pytest.mark.parametrize(
    "change", [{"lse_grad": True}, {"left_bounded": True}, {"direction": "backward", "dtype": torch.float64}]
)
def test_what_it_takes(change):
    assert resolve("aten", problem(**change)) is ATEN


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "cuDNN attention runs on CUDA, not on 'cpu'"),
        (
            {"device": "cuda", "left_bounded": True},
            "no lower bound on the band, as sliding windows need; triton, flash2 and aten have",
        ),
        (
            {"device": "cuda", "direction": "backward", "deterministic": True},
            "cuDNN's backward is not deterministic; triton's is",
        ),
    ],
)
def test_what_cudnn_refuses(change, reason):
    with pytest.raises(KernelUnavailable, match=re.escape(reason)):
        resolve("cudnn", problem(**change))
