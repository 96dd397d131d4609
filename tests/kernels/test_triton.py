"""The Triton kernel against the reference in float64: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ring_attn.kernels import Problem, Upstream, get_kernel, resolve
from ring_attn.kernels.triton_blocks import Config, Configs, TableKey, chosen, configs, kv_table, query_table
from ring_attn.kernels.triton_kernel import TritonKernel, interpreted
from ring_attn.mask import Causal, Documents, Full, Window
from ring_attn.partial import Partial, empty
from ring_attn.tiles import Band, Tile, tiles
from tests.support import (
    BAND_KINDS,
    FLOAT32_LIMIT,
    GRAD_FACTOR,
    OUT_FACTOR,
    adding_to,
    allowed,
    band_tiles,
    dense,
    random_qkv,
    rel_error,
    run_kernel,
    split_tiles,
    truth,
)

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1"),
    # The interpreter's own: sizes as arrays of one element, and -inf - -inf in a branch of a `where` that is not taken.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore:invalid value:RuntimeWarning"),
]

# Small blocks, and none alike, so that short sequences meet many of them.
SMALL = TritonKernel(Configs(Config(16, 32, 4, 1), Config(32, 16, 4, 1), Config(16, 32, 4, 1)))
TABLE = TritonKernel()


def check(visits, q, k, v, dout, *, scale=0.2, dlse=None, kernel=SMALL, limit=FLOAT32_LIMIT):
    """Holds every result of a kernel to the truth."""
    inputs = [x.to(DEVICE) for x in (q, k, v, dout)]
    got = run_kernel(kernel, *inputs, visits, scale=scale, dlse=None if dlse is None else dlse.to(DEVICE))
    expected = truth(q, k, v, dout, visits, scale=scale, dlse=dlse)
    errors = {name: rel_error(got[name].cpu(), expected[name]) for name in expected}
    assert all(error < limit for error in errors.values()), errors


def cut(tile_list, at):
    """Two visits: every tile cut at a KV row of the shard. A row may then meet nothing in a piece."""
    pieces = [[], []]
    for tile in tile_list:
        column = min(max(at - tile.kv_rows.start, 0), len(tile.kv_rows))
        for visit, shift, kv_rows in ((0, 0, tile.kv_rows[:column]), (1, column, tile.kv_rows[column:])):
            band = Band(*(None if bound is None else bound - shift for bound in tile.band))
            if kv_rows:
                pieces[visit].append(replace(tile, kv_rows=kv_rows, band=band))
    return [tuple(piece) for piece in pieces]


@pytest.mark.parametrize("kind", BAND_KINDS)
def test_one_visit(kind):
    check([band_tiles(kind, 37, 44)], *random_qkv(2, 37, 44, 2, 1, 33))


@pytest.mark.parametrize("kind", BAND_KINDS)
def test_carried_over_two_visits(kind):
    check(cut(band_tiles(kind, 37, 44), 21), *random_qkv(2, 37, 44, 2, 2, 16, outliers=True, seed=1))


@pytest.mark.parametrize("kind", ["documents", "batch rows", "many"])
def test_carried_over_three_visits(kind):
    check(split_tiles(band_tiles(kind, 37, 44), 3), *random_qkv(2, 37, 44, 2, 1, 16, seed=2))


@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (6, 1)])
def test_grouped_heads(h, g):
    check(cut(band_tiles("causal", 40, 40), 10), *random_qkv(1, 40, 40, h, g, 16, seed=3))


@pytest.mark.parametrize(("d", "dv"), [(80, 24), (1, 3), (17, 130), (64, 16), (200, 256)])
def test_head_dims(d, dv):
    check([band_tiles("window", 21, 35)], *random_qkv(1, 21, 35, 2, 1, d, dv, seed=4), scale=d**-0.5)


@pytest.mark.parametrize(("num_q", "num_kv"), [(1, 70), (70, 3), (130, 200)])
@pytest.mark.parametrize("kind", ["full", "window"])
def test_odd_lengths_with_the_blocks_of_the_table(kind, num_q, num_kv):
    check([band_tiles(kind, num_q, num_kv)], *random_qkv(1, num_q, num_kv, 2, 1, 40, seed=5), kernel=TABLE)


@pytest.mark.parametrize(("num_q", "num_kv"), [(16, 32), (17, 33), (48, 64), (15, 31)])
def test_around_block_sizes(num_q, num_kv):
    for kind in ("full", "far window"):
        check([band_tiles(kind, num_q, num_kv)], *random_qkv(1, num_q, num_kv, 1, 1, 16, seed=6))


@pytest.mark.parametrize(
    "band", [Band(None, hi) for hi in (14, 15, 29, 30, 31, 32)] + [Band(lo, None) for lo in (16, 17, 18, 19)], ids=str
)
def test_bands_that_end_near_a_block(band):
    """What needs no mask and what does meet within a row of where a block starts or stops."""
    num_kv = 64 if band.hi is None else 20 + band.hi
    check([(Tile(range(20), range(num_kv), band, ((), ())),)], *random_qkv(1, 20, num_kv, 1, 1, 16, seed=16))


def test_strided_inputs():
    """Slices of a longer sequence, heads before rows, and a dout without unit stride."""
    q, k, v, dout = random_qkv(2, 60, 90, 4, 2, 20, 12, seed=7)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)[:, 7:44]
    k, v = k[:, 40:84, :, ::1], v.transpose(0, 1).contiguous().transpose(0, 1)[:, 40:84]
    dout = dout[:, 3:40].transpose(2, 3).contiguous().transpose(2, 3)
    check(cut(band_tiles("causal", 37, 44), 20), q, k, v, dout)


@pytest.mark.skipif(DEVICE == "cpu", reason="allocates 9 GB")
def test_rows_more_than_2_to_the_31_elements_apart():
    q, k, v, dout = (x.to(DEVICE) for x in random_qkv(1, 20, 33, 2, 1, 16, dtype=torch.float16, seed=18))
    spread = torch.empty(2, 33, 1 << 26, dtype=torch.float16, device=DEVICE)[:, :, None, :16]
    spread[0], spread[1] = k[0], v[0]
    near = run_kernel(SMALL, q, k, v, dout, [band_tiles("full", 20, 33)], scale=0.2)
    far = run_kernel(SMALL, q, spread[:1], spread[1:], dout, [band_tiles("full", 20, 33)], scale=0.2)
    assert all(torch.equal(near[name], far[name]) for name in near)


def test_strided_results():
    """Partials, out and gradients that are views of larger tensors: what lies around them is left alone."""
    q, k, v, dout = (x.to(DEVICE) for x in random_qkv(2, 37, 44, 2, 1, 16, 8, seed=8))
    visits = cut(band_tiles("causal", 37, 44), 20)
    whole = empty(torch.zeros(2, 60, 2, 16, device=DEVICE), 8)
    wide = torch.full((2, 2, 60, 8), 7.0, device=DEVICE).transpose(1, 2)
    rows = range(9, 46)
    for tile_list, out in zip(visits, (None, wide[:, 9:46]), strict=True):
        partial = SMALL.forward(q, k, v, tile_list, scale=0.2, into=whole.rows(rows), out=out)
    expected = truth(q.cpu(), k.cpu(), v.cpu(), dout.cpu(), visits, scale=0.2)
    assert rel_error(wide[:, 9:46].cpu(), expected["out"]) < FLOAT32_LIMIT
    assert rel_error(partial.lse.cpu(), expected["lse"]) < FLOAT32_LIMIT
    assert (wide[:, :9] == 7).all()
    assert (wide[:, 46:] == 7).all()
    assert (whole.lse[..., :9] == -torch.inf).all()
    grads = [torch.ones(2, x.shape[1] + 10, *x.shape[2:], device=DEVICE) for x in (q, k, v)]
    up = Upstream(dout, wide[:, 9:46], partial.lse)
    for tile_list in visits:
        SMALL.backward(up, q, k, v, tile_list, scale=0.2, into=adding_to(*(x[:, 4:-6] for x in grads)))
    for name, got in zip(("dq", "dk", "dv"), grads, strict=True):
        assert rel_error(got[:, 4:-6].cpu() - 1, expected[name]) < FLOAT32_LIMIT, name
        assert (got[:, :4] == 1).all(), name
        assert (got[:, -6:] == 1).all(), name


@pytest.mark.parametrize("visits", [1, 2])
def test_gradient_of_lse(visits):
    q, k, v, dout = random_qkv(1, 37, 44, 2, 1, 16, seed=9)
    dlse = torch.randn(1, 2, 37, generator=torch.Generator().manual_seed(10))
    check(cut(band_tiles("causal", 37, 44), 21)[:visits], q, k, v, dout, dlse=dlse)


def test_a_row_whose_lse_is_minus_infinity_has_no_gradient():
    q, k, v, dout = random_qkv(1, 37, 44, 2, 1, 16, seed=17)
    tile_list, reference = band_tiles("full", 37, 44), get_kernel("reference")
    partial = reference.forward(q, k, v, tile_list, scale=0.2, out=torch.empty_like(q))
    partial.lse[..., 3] = partial.lse[..., 20:] = -torch.inf
    up = Upstream(dout, dout, partial.lse)
    got, expected = ([torch.zeros_like(x, device=device) for x in (q, k, v)] for device in (DEVICE, "cpu"))
    reference.backward(up, q, k, v, tile_list, scale=0.2, into=adding_to(*expected))
    up = Upstream(*(x.to(DEVICE) for x in (dout, dout, partial.lse)))
    SMALL.backward(up, *(x.to(DEVICE) for x in (q, k, v)), tile_list, scale=0.2, into=adding_to(*got))
    for name, found, want in zip(("dq", "dk", "dv"), got, expected, strict=True):
        assert rel_error(found.cpu(), want) < FLOAT32_LIMIT, name
    assert (got[0][:, 20:] == 0).all()


def test_rows_in_no_tile():
    """A tile over the middle of a few blocks: the other rows have output 0, lse -inf and no gradient."""
    middle = Tile(range(5, 29), range(7, 40), Band(None, 20), ((), ()))
    q, k, v, dout = random_qkv(2, 37, 44, 2, 2, 16, seed=11)
    for visits in ([(middle,)], [(middle,), ()], [(), (middle,)], [(replace(middle, batch=1),)]):
        check(visits, q, k, v, dout)
    got = run_kernel(SMALL, *(x.to(DEVICE) for x in (q, k, v, dout)), [(middle,)], scale=0.2)
    assert (got["out"][:, :5] == 0).all()
    assert (got["out"][:, 29:] == 0).all()
    assert (got["lse"][..., :5] == -torch.inf).all()
    assert (got["dq"][:, 29:] == 0).all()
    assert (got["dk"][:, 40:] == 0).all()


@pytest.mark.parametrize("visits", [[()], [(), ()]])
def test_no_tile_at_all(visits):
    got = run_kernel(SMALL, *(x.to(DEVICE) for x in random_qkv(1, 20, 20, 2, 2, 16)), visits, scale=0.2)
    assert (got["lse"] == -torch.inf).all()
    assert all((got[name] == 0).all() for name in ("out", "dq", "dk", "dv"))


def test_a_partial_without_work_is_left_alone():
    q, k, v, _ = (x.to(DEVICE) for x in random_qkv(1, 20, 20, 2, 2, 16))
    into = Partial(*(torch.full_like(x, 3.0) for x in empty(q, 16)))
    assert SMALL.forward(q, k, v, (), scale=0.2, into=into) is into
    assert all((x == 3).all() for x in into)


@pytest.mark.parametrize(("name", "scale"), [("reference", 1.0), ("triton", math.log(2))])
def test_what_is_carried_keeps_its_digits_however_large_scores_are(name, scale):
    """Scores of some thousands, which fp32 holds: an lse of that size would have lost three digits, the output has them all."""
    q, k = (torch.randint(-1, 2, x.shape).float() for x in random_qkv(1, 37, 44, 2, 1, 16)[:2])
    q[..., 0], k[..., 0] = torch.arange(41, 78)[:, None], 64.0
    q, k, v = (x.to(DEVICE) for x in (q, k, random_qkv(1, 37, 44, 2, 1, 16, seed=21)[2]))
    kernel, partial, out = SMALL if name == "triton" else get_kernel(name), None, torch.empty_like(q)
    for tile_list, target in zip(cut(band_tiles("full", 37, 44), 20), (None, out), strict=True):
        partial = kernel.forward(q, k, v, tile_list, scale=scale, into=partial, out=target)
    wanted, _ = dense(q.double(), k.double(), v.double(), torch.ones(1, 37, 44, dtype=torch.bool, device=DEVICE), scale)
    assert rel_error(out, wanted) < 1e-6


def test_what_is_carried_from_many_keys_leaves_float16_its_digits():
    """Keys that weigh little beside all before, whose v is 0: relative to the log-sum-exp they would be no float16."""
    wide, many, few = Config(16, 1024, 4, 1), 16_384, 64
    kernel, gen = TritonKernel(Configs(wide, wide, wide)), torch.Generator().manual_seed(3)
    q, none = torch.ones(1, 16, 1, 16).half(), torch.zeros(1, many, 1, 16).half()
    k = (torch.randn(1, few, 1, 16, generator=gen) / 2 - 6).half()
    v = torch.randn(1, few, 1, 16, generator=gen).half()
    before, after = (tiles((range(16),), [(range(n),)], Full()) for n in (many, few))
    q, none, k, v = (x.to(DEVICE) for x in (q, none, k, v))
    partial = kernel.forward(q, none, none, before, scale=1 / 16)
    partial = kernel.forward(q, k, v, after, scale=1 / 16, into=partial)
    weights = (k.double()[0, :, 0].sum(-1) / 16).exp()
    exact = (weights @ v.double()[0, :, 0]) / (many + weights.sum())
    assert rel_error(partial.acc / partial.sum.transpose(1, 2).unsqueeze(-1), exact.expand(1, 16, 1, 16)) < 1e-3


def test_keys_outside_the_tiles_are_not_read():
    q, k, v, dout = random_qkv(1, 37, 44, 2, 1, 16, seed=12)
    tile_list = (Tile(range(37), range(3, 40), Band(), ((), ())),)
    expected = truth(q, k, v, dout, [tile_list], scale=0.2)
    for x in (k, v):
        x[:, :3] = x[:, 40:] = torch.nan
    got = run_kernel(SMALL, *(x.to(DEVICE) for x in (q, k, v, dout)), [tile_list], scale=0.2)
    for name in ("out", "lse", "dq"):
        assert rel_error(got[name].cpu(), expected[name]) < FLOAT32_LIMIT, name


@pytest.mark.parametrize("dtype", [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [Causal(), Full(), Window(30, 4)], ids=["causal", "full", "window"])
def test_16_bit_errs_as_little_as_plain_torch(mask, dtype):
    n = 100
    inputs = random_qkv(1, n, n, 4, 2, 64, dtype=dtype, outliers=True, seed=14)
    visits = cut(tiles((range(n),), [(range(n),)], mask), 37)
    seen, scale = allowed(mask, n, 1), 0.125
    expected = truth(*inputs, visits, scale=scale)
    medium = TritonKernel(Configs(Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(64, 32, 4, 1)))
    got = run_kernel(medium, *(x.to(DEVICE) for x in inputs), visits, scale=scale)
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])
    out, _ = dense(q, k, v, seen, scale)
    plain = dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, (q, k, v), inputs[3])), strict=True))
    for name, factor in {"out": OUT_FACTOR, "dq": GRAD_FACTOR, "dk": GRAD_FACTOR, "dv": GRAD_FACTOR}.items():
        assert rel_error(got[name].cpu(), expected[name]) < factor * rel_error(plain[name], expected[name]), name
    assert rel_error(got["lse"].cpu(), expected["lse"]) < FLOAT32_LIMIT


def test_results_are_bitwise_repeatable():
    inputs = [x.to(DEVICE) for x in random_qkv(1, 37, 44, 2, 1, 16, seed=15)]
    first, second = (run_kernel(SMALL, *inputs, [band_tiles("causal", 37, 44)], scale=0.2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_16_bit_output_of_a_single_visit_is_its_partial():
    """A normalised output is the partial with m = lse, so nothing else is allocated."""
    q, k, v, _ = (x.to(DEVICE) for x in random_qkv(1, 20, 20, 2, 2, 16, dtype=torch.float16))
    out = torch.empty_like(q)
    partial = SMALL.forward(q, k, v, band_tiles("full", 20, 20), scale=0.2, out=out)
    assert partial.acc is out
    assert partial.sum is None
    assert partial.lse.dtype == torch.float32


@pytest.mark.parametrize("kind", BAND_KINDS)
def test_tables_list_every_allowed_cell_once(kind):
    num_q, num_kv, batch = 37, 44, 2
    tile_list = band_tiles(kind, num_q, num_kv)
    q, k = torch.empty(batch, num_q, 1, 1), torch.empty(batch, num_kv, 1, 1)
    expected = torch.zeros(batch, num_q, num_kv, dtype=torch.int)
    for tile in tile_list:
        for i, row in enumerate(tile.q_rows):
            for j, column in enumerate(tile.kv_rows):
                lo, hi = (j - i if bound is None else bound for bound in tile.band)
                expected[slice(None) if tile.batch is None else tile.batch, row, column] += lo <= j - i <= hi
    assert torch.equal(_listed(query_table(tile_list, q, 16), 16, expected.shape), expected)
    transposed = expected.transpose(1, 2)
    assert torch.equal(_listed(kv_table(tile_list, k, 32), 32, transposed.shape), transposed)


def _listed(table, block, shape):
    """The cells of a block table, counted."""
    cells, ints, work = torch.zeros(shape, dtype=torch.int), table.ints.tolist(), []
    for program in range(table.programs):
        number, batch, first, last = ints[4 * program : 4 * program + 4]
        before = cells.sum()
        for at in range(first, last, 8):
            start, stop, walk_start, walk_stop, lo, hi = ints[at : at + 6]
            for own in range(max(start, number * block), min(stop, (number + 1) * block)):
                cells[batch, own, max(walk_start, own + lo) : max(0, min(walk_stop, own + hi + 1))] += 1
        work.append((cells.sum() > before).item())
    assert work == [True] * table.busy + [False] * (table.programs - table.busy)
    assert table.programs == shape[0] * -(-shape[1] // block)
    return cells


def test_tables_are_made_once_for_a_tuple_of_tiles():
    q = torch.empty(1, 40, 1, 1)
    tile_list = band_tiles("causal", 40, 40)
    assert query_table(tile_list, q, 16) is query_table(tile_list, q, 16)
    assert query_table(tile_list, q, 16) is not query_table(tile_list, q, 32)
    assert query_table(tile_list, q, 16) is not kv_table(tile_list, q, 16)
    # A list may change between visits, so it is never recognised.
    assert query_table([], q, 16).busy == 0
    assert query_table(list(tile_list), q, 16).busy == 3
    # To hash tiles would take longer than a launch.
    assert hash(TableKey(([],), False, 8, 4, 1, q.device, 0, 9, False, 0))


def problem(**changed):
    facts = {"direction": "backward", "device": "cpu", "dtype": torch.float32, "num_heads": 4, "num_kv_heads": 2}
    return Problem(**(facts | {"head_dim": 64, "v_head_dim": 64} | changed))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": torch.float64}, "float16, bfloat16 and float32, not torch.float64"),
        ({"score": ("bias",)}, "it has no bias"),
        ({"head_dim": 257}, "head dims up to 256, not 257 and 64"),
    ],
)
def test_refuses_in_words(changed, reason):
    kernel = get_kernel("triton")
    assert kernel.supports(problem(device=DEVICE)) is None
    assert kernel.supports(problem(device=DEVICE, lse_grad=True, left_bounded=True)) is None
    assert reason in kernel.supports(problem(device=DEVICE, **changed))
    with pytest.raises(ValueError, match=reason):
        resolve("triton", problem(device=DEVICE, **changed))


def test_refuses_the_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "set TRITON_INTERPRET=1" in TABLE.supports(problem())
    assert "on CUDA devices, not on mps" in TABLE.supports(problem(device="mps"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TABLE.supports(problem()) is None
    assert "wrong bfloat16 dots" in TABLE.supports(problem(dtype=torch.bfloat16))


def test_imports_and_refuses_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from ring_attn.kernels import Problem, get_kernel\n"
        "print(get_kernel('triton').supports(Problem('forward', 'cuda', torch.float16, 1, 1, 64, 64)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == "triton is not installed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", ["large", "small"])
def test_every_head_dim_has_a_configuration(dtype, size):
    for d in range(1, 257):
        assert configs(dtype, d, 1, size) == configs(dtype, 1, d, size)


@pytest.mark.parametrize(
    ("mask", "rows", "heads", "narrow"),
    [
        (Causal() & Window(1024), 8192, 16, True),
        (Causal() & Window(2048), 8192, 16, False),
        (Causal() & Window(1024), 8192, 8, False),
        (Causal(), 2048, 16, False),
        (Causal(), 8192, 16, False),
        (Causal() & Documents(lengths=[512] * 16), 8192, 16, True),
    ],
)
def test_narrow_blocks_are_for_many_short_walks(mask, rows, heads, narrow):
    tile_list, q = tiles((range(rows),), [(range(rows),)], mask), torch.empty(1, rows, 1, 1)
    config = Config(128, 64, 8, 3, narrow=Config(64, 64, 4, 3))
    found, table = chosen(config, heads, lambda own: query_table(tile_list, q, own))
    assert found is (config.narrow if narrow else config)
    assert table.programs == rows // found.own
