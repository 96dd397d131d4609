"""Gradients as they add up: as they come without Triton, late with it; there in the interpreter or on a GPU."""

from __future__ import annotations

import random

import pytest
import torch

from ring_attn.kernels import sums
from ring_attn.kernels.sums import MOST, Addend, Grads, RowsOfSum, Sum, lay_beside
from ring_attn.kernels.triton_kernel import interpreted
from tests.support import FLOAT32_LIMIT, rel_error

pytest.importorskip("triton")
from ring_attn.kernels import triton_sum
from ring_attn.kernels.triton_sum import sum_call

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LATE = pytest.param(
    True, marks=pytest.mark.skipif(DEVICE.type == "cpu" and not interpreted(), reason="needs TRITON_INTERPRET=1")
)
B, S, H, DIMS = 2, 70, 3, (16, 9)


def normal(gen, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(DEVICE, dtype)


def some_places(gen, batch, rows, width, found):
    """int32 [batch, rows, width]: which of `found` rows is where, some nowhere, none twice."""
    places = torch.full((batch * rows * width,), -1, dtype=torch.int32)
    at = torch.randperm(len(places), generator=gen)[: min(found, len(places) // 2)]
    places[at] = torch.randperm(found, generator=gen)[: len(at)].to(torch.int32)
    return places.view(batch, rows, width).to(DEVICE)


def plainly(total, addend):
    """Adds it to float64 tensors, row by row where it has places."""
    tensors, rows, places = addend
    for x, one in zip(total, tensors, strict=True):
        if places is None:
            x[:, rows.start : rows.stop] += one.double()
            continue
        for b, row, n in (places >= 0).nonzero().tolist():
            x[b, rows.start + row] += one[0, places[b, row, n]].double()


def an_addend(gen, rows, dims, dtype, width=0):
    count = B * len(rows) * width // 2 + 3
    shape = (1, count, H) if width else (B, len(rows), H)
    # Slices of heads, and what no place names may be NaN.
    tensors = [torch.cat([normal(gen, *shape, dim, dtype=dtype)] * 2, 2)[:, :, H:] for dim in dims]
    places = some_places(gen, B, len(rows), width, count) if width else None
    if width:
        named = torch.zeros(count, dtype=torch.bool, device=DEVICE)
        named[places[places >= 0].long()] = True
        for x in tensors:
            x[0, ~named] = torch.nan
    return Addend(tensors, rows, places)


@pytest.mark.skipif(DEVICE.type == "cpu" and not interpreted(), reason="needs CUDA, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [DIMS[:1], DIMS])
@pytest.mark.parametrize("kinds", ["all", "some", "one each", "several each", "all some one", "all all some one several"])
def test_one_pass(kinds, dims, dtype):
    """Rows that nothing is for are 0; what is beside the targets' rows stays as it is."""
    gen = torch.Generator().manual_seed(len(kinds))
    made = {"all": (range(S), 0), "some": (range(5, 41), 0), "one": (range(64, 70), 1), "several": (range(3, 60), 3)}
    addends = [
        an_addend(gen, rows, dims, dtype, width) for rows, width in (made[kind] for kind in kinds.split() if kind != "each")
    ]
    sums_in = torch.float64 if dtype == torch.float64 else torch.float32
    for rows in (range(S), range(4, 45)):
        whole = [torch.full((B, S + 7, H, dim), 7.0, dtype=sums_in, device=DEVICE) for dim in dims]
        want = [torch.zeros(B, S, H, dim, dtype=torch.float64, device=DEVICE) for dim in dims]
        for one in addends:
            plainly(want, one)
        targets = [x[:, 3 : 3 + len(rows)] for x in whole]
        sum_call(targets, addends, rows, sums_in)()
        for found, x, beside in zip(targets, want, whole, strict=True):
            limit = 1e-12 if dtype == torch.float64 else FLOAT32_LIMIT
            assert rel_error(found, x[:, rows.start : rows.stop]) < limit
            assert (beside[:, :3] == 7).all() and (beside[:, 3 + len(rows) :] == 7).all()


@pytest.fixture
def passes(request, monkeypatch):
    """(addends, rows) of each pass over memory; by parameter whether there are any."""
    made, call = [], triton_sum.sum_call
    monkeypatch.setattr(sums, "fused", lambda device: request.param)
    monkeypatch.setattr(triton_sum, "sum_call", lambda *args: made.append((len(args[1]), args[2])) or call(*args))
    return made


def a_history(seed, late):
    """What comes for a sum in some order, of all kinds, and the sum in float64."""
    gen, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    found = Sum([(B, S, H, dim) for dim in DIMS], torch.float32, DEVICE, lambda: poisoned(torch.float32))
    want = [torch.zeros(B, S, H, dim, dtype=torch.float64, device=DEVICE) for dim in DIMS]
    for _ in range(chance.randrange(9)):
        start, stop = sorted(chance.sample(range(S + 1), 2))
        rows, kind = range(start, stop), chance.choice(["rows", "places", "batch", "total"])
        place = RowsOfSum(found, rows)
        if kind == "total":
            total, unwritten = place.claim()
            for x, y in zip(total, want, strict=True):
                value = normal(gen, *x.shape)
                if unwritten:
                    assert x.isnan().all(), "what holds nothing yet is left to the one who writes it"
                    x.copy_(value)
                else:
                    x.add_(value)
                y[:, start:stop] += value.double()
        elif kind == "batch":
            values = [normal(gen, 1, len(rows), H, dim) for dim in DIMS]
            place.add(values, range(len(rows)), batch=1)
            for y, value in zip(want, values, strict=True):
                y[1:, start:stop] += value.double()
        else:
            addend = an_addend(gen, rows, DIMS, torch.float16, 2 if kind == "places" else 0)
            place.add(addend.tensors, range(len(rows)), addend.places)
            plainly(want, addend)
    return found, want


def poisoned(dtype):
    return [torch.full((B, S, H, dim), torch.nan, dtype=dtype, device=DEVICE) for dim in DIMS]


@pytest.mark.parametrize("passes", [False, LATE], indirect=True, ids=["as it comes", "late"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whatever_comes_adds_up(passes, dtype):
    for seed in range(12):
        found, want = a_history(seed, passes)
        targets = poisoned(dtype)
        found.write(targets)
        for x, y in zip(targets, want, strict=True):
            assert rel_error(x, y) < (FLOAT32_LIMIT if dtype == torch.float32 else 2**-11) or not (x.any() or y.any()), seed
        assert found.claim(found.rows)[1], "nothing is left"


@pytest.mark.parametrize("passes", [LATE], indirect=True)
def test_few_are_read_once_and_many_put_together(passes):
    gen = torch.Generator().manual_seed(1)
    found, halves = Sum([(B, S, H, 16)], torch.float32, DEVICE), (range(30), range(30, S))
    for n in range(MOST):
        found.add(an_addend(gen, halves[n % 2], (16,), torch.float16).tensors, halves[n % 2])
    found.write([torch.empty(B, S, H, 16, device=DEVICE)])
    assert passes == [(MOST, range(S))]
    del passes[:]
    for _ in range(MOST):
        found.add(an_addend(gen, halves[0], (16,), torch.float16).tensors, halves[0])
    found.add(an_addend(gen, halves[1], (16,), torch.float16).tensors, halves[1])
    found.write([torch.empty(B, S, H, 16, device=DEVICE)])
    assert passes == [(MOST, halves[0]), (2, range(S))], "only rows that something came for are put together"


@pytest.mark.parametrize("passes", [False, LATE], indirect=True, ids=["as it comes", "late"])
def test_a_total_is_written_where_it_lies(passes):
    """As what goes out in the dtype of sums: without a copy, also where something comes late."""
    for late in (False, True):
        total = poisoned(torch.float32)
        found = Sum([x.shape for x in total], torch.float32, DEVICE, lambda total=total: total)
        (x, _), unwritten = found.claim(range(S))
        assert unwritten
        for x in total:
            x.fill_(2.0)
        if late:
            found.add([torch.ones_like(x) for x in total], range(S))
        before = len(passes)
        found.write(total)
        assert len(passes) - before == (late and sums.fused(DEVICE))
        assert all((x == (3.0 if late else 2.0)).all() for x in total)


@pytest.mark.parametrize("passes", [LATE], indirect=True)
@pytest.mark.parametrize("other", [None, "dtype", "order", "rows", "places", "two", "memory"])
def test_what_is_alone_may_be_taken(passes, other):
    """Unless it is not what is wanted."""
    gen = torch.Generator().manual_seed(2)
    rows = range(S - 1) if other == "rows" else range(S)
    addend = an_addend(gen, rows, DIMS, torch.float16, 1 if other == "places" else 0)
    addend = addend._replace(tensors=[x.contiguous() for x in addend.tensors])
    if other == "memory":
        addend = addend._replace(tensors=[torch.cat([x, x])[:B] for x in addend.tensors])
    if other == "order":
        addend = addend._replace(tensors=[x.transpose(1, 2).contiguous().transpose(1, 2) for x in addend.tensors])
    found = Sum([(B, S, H, dim) for dim in DIMS], torch.float32, DEVICE)
    for _ in range(2 if other == "two" else 1):
        found.add(addend.tensors, rows, addend.places)
    targets = poisoned(torch.float32 if other == "dtype" else torch.float16)
    got = found.made(targets[0].dtype, lambda: targets)
    assert [x is y for x, y in zip(got, targets if other else addend.tensors, strict=True)] == [True] * 2
    assert bool(passes) == bool(other) and not any(x.isnan().any() for x in got)
    assert found.claim(found.rows)[1], "nothing is left"


def test_what_is_aimed_is_made_by_one_visit():
    total = Sum([(1, 4, 1, 2)], torch.float32, DEVICE)
    total.claim(range(4))
    total.aim = lambda: [torch.empty(1, 4, 1, 2, device=DEVICE)]
    with pytest.raises(RuntimeError, match="a sum is aimed that more than one visit makes"):
        total.claim(range(4), once=True)


@pytest.mark.parametrize("passes", [False], indirect=True)
def test_what_is_made_in_part_is_written_elsewhere_with_zeros(passes):
    total, target = (torch.full((1, 4, 1, 2), torch.nan, device=DEVICE) for _ in range(2))
    found = Sum([total.shape], torch.float32, DEVICE, lambda: [total])
    found.add([torch.ones(1, 2, 1, 2, device=DEVICE)], range(1, 3))
    (made,) = found.made(torch.float32, lambda: [target])
    assert made[0, :, 0, 0].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("passes", [False, LATE], indirect=True, ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("widths", [(96, 96), (96, 48), (40, 40), (32,), (16, 16, 16)])
def test_pieces_of_rows_are_laid_beside_each_other(passes, widths, dtype):
    """As whole as they came: by one pass where they are parts of longer rows, and of a kind that it takes."""
    gen = torch.Generator().manual_seed(3)
    of_rows = [(normal(gen, B, S, 3 * width) * 100).to(dtype) for width in widths]
    parts = [x[..., width : 2 * width] for x, width in zip(of_rows, widths, strict=True)]
    for pieces in (parts, [x.contiguous() for x in parts]):
        out = torch.empty(B, S, sum(widths), dtype=dtype, device=DEVICE)
        lay_beside(pieces, out)
        assert torch.equal(out, torch.cat(pieces, -1))
    taken = sums.fused(DEVICE) and widths == (96, 96) and dtype != torch.int64
    assert len(passes) == taken


def test_kernels_that_add_by_themselves_are_told_what_is_there():
    q, k, v = (torch.ones(1, 5, 1, dim, device=DEVICE) for dim in (4, 4, 3))
    into = Grads.like(q, k, v)
    first, then = into.totals(), into.totals()
    assert (first.unwritten_q, first.unwritten_kv, then.unwritten_q, then.unwritten_kv) == (True, True, False, False)
    assert first.dv.shape == v.shape and first.dq.data_ptr() == then.dq.data_ptr()
    half = first._replace(dq=first.dq.fill_(torch.nan), unwritten_kv=False).zeroed()
    assert not half.dq.any() and not half.unwritten_q
