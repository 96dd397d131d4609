"""The fused merge against the merge of two partials, in the interpreter or on a GPU."""

import pytest
import torch

from ring_attn.partial import Partial, empty, merge_, normalize, to_merge_into
from tests.support import FLOAT32_LIMIT, rel_error

pytest.importorskip("triton")
from ring_attn.kernels.triton_kernel import interpreted
from ring_attn.kernels.triton_merge import Result, merge_call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs CUDA, or TRITON_INTERPRET=1")


def random_partial(b, s, h, d, blind=()):
    partial = empty(torch.empty(b, s, h, d), d)
    for target in partial:
        target.copy_(torch.randn(target.shape))
    partial.sum.exp_()
    for row in blind:
        partial.acc[:, row], partial.m[:, :, row], partial.sum[:, :, row] = 0, -torch.inf, 0
    return Partial(*(x.to(DEVICE) for x in partial))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("d", [8, 33])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("rows", [range(70), range(5, 41), range(64, 70)])
def test_merge(rows, last, d, dtype):
    torch.manual_seed(d)
    b, s, h = 2, 70, 3
    into = random_partial(b, s, h, d, blind=(0, 20, 66))
    out = torch.randn(b, len(rows), h, d, device=DEVICE).to(dtype)
    lse = torch.randn(b, h, len(rows), device=DEVICE)
    lse[:, :, 2:4] = -torch.inf
    out[:, 2:4] = 0
    want = Partial(*(x.double() for x in into))
    merge_(want.rows(rows), Partial(out.double(), lse.double()))
    target = torch.full((b, s, h, d), torch.nan, device=DEVICE, dtype=dtype) if last else None
    merge_call(into, [Result(rows, out, lse)], target)()
    assert rel_error(into.m if last else into.lse, want.lse) < FLOAT32_LIMIT
    if last:
        limit = FLOAT32_LIMIT if dtype == torch.float32 else 1e-3
        assert rel_error(target, normalize(want, torch.float64)) < limit
    else:
        assert rel_error(into.acc, want.acc) < FLOAT32_LIMIT
        assert rel_error(into.m, want.m) < FLOAT32_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_last_merge_of_some_rows_of_an_output(dtype):
    """What it merges into is an output and no sum; rows beside are another merge's."""
    torch.manual_seed(1)
    b, s, h, d, rows = 2, 70, 3, 16, range(5, 41)
    acc, m = torch.randn(b, s, h, d, device=DEVICE).to(dtype), torch.randn(b, h, s, device=DEVICE)
    acc[:, 7], m[:, :, 7] = 0, -torch.inf
    out, lse = torch.randn(b, len(rows), h, d, device=DEVICE).to(dtype), torch.randn(b, h, len(rows), device=DEVICE)
    lse[:, :, 2:4], out[:, 2:4] = -torch.inf, 0
    want = to_merge_into(Partial(acc.double(), m.double()))
    merge_(want.rows(rows), Partial(out.double(), lse.double()))
    kept, before, target = acc.clone(), m.clone(), torch.full((b, s, h, d), torch.nan, device=DEVICE, dtype=dtype)
    merge_call(Partial(acc, m), [Result(rows, out, lse)], target, met_only=True)()
    limit = FLOAT32_LIMIT if dtype == torch.float32 else 1e-3
    assert rel_error(target[:, rows], normalize(want, torch.float64)[:, rows]) < limit
    assert rel_error(m[..., rows], want.lse[..., rows]) < FLOAT32_LIMIT
    beside = [*range(rows.start), *range(rows.stop, s)]
    assert target[:, beside].isnan().all() and torch.equal(m[..., beside], before[..., beside]) and torch.equal(acc, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("packed", ["neither", "first", "second", "both"])
@pytest.mark.parametrize("spans", [(range(70), range(5, 41)), (range(30), range(40, 70)), (range(33, 50), range(64, 70))])
def test_two_at_once(spans, packed, last, dtype):
    """Results that share rows or not, each as a rectangle for all batch rows or as a pack of one."""
    torch.manual_seed(2)
    b, s, h, d = 2, 70, 3, 16
    into = random_partial(b, s, h, d, blind=(0, 20, 66))
    if last:
        # What an earlier visit left as a library made it.
        into = Partial(normalize(into, dtype), into.lse, None)
    want, results = to_merge_into(Partial(*(None if x is None else x.double() for x in into))), []
    for rows, pack in zip(spans, (packed in ("first", "both"), packed in ("second", "both")), strict=True):
        of = 1 if pack else b
        out = torch.randn(of, len(rows), h, d, device=DEVICE).to(dtype)
        lse = torch.randn(of, h, len(rows), device=DEVICE)
        lse[:, :, 2:4], out[:, 2:4] = -torch.inf, 0
        there = want.rows(rows)
        merge_(Partial(*(x[-of:] for x in there)), Partial(out.double(), lse.double()))
        places = torch.full((b, s), -1, dtype=torch.int32, device=DEVICE)
        places[-1, rows] = torch.arange(len(rows), dtype=torch.int32, device=DEVICE)
        results.append(Result(places if pack else rows, out, lse))
    target = torch.full((b, s, h, d), torch.nan, device=DEVICE, dtype=dtype) if last else None
    merge_call(into, results, target)()
    assert rel_error(into.m if last else into.lse, want.lse) < FLOAT32_LIMIT
    limit = FLOAT32_LIMIT if dtype == torch.float32 or not last else 1e-3
    assert rel_error(target if last else into.acc, normalize(want, torch.float64) if last else want.acc) < limit


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_in_place_rows_that_no_result_has_are_not_touched(count, packed):
    torch.manual_seed(3)
    b, s, h, d = 2, 70, 3, 16
    acc, m = torch.randn(b, s, h, d, device=DEVICE).half(), torch.randn(b, h, s, device=DEVICE)
    results, met = [], torch.zeros(b, s, dtype=torch.bool, device=DEVICE)
    for rows in (range(5, 41), range(36, 66))[:count]:
        of = 1 if packed else b
        places = torch.full((b, s), -1, dtype=torch.int32, device=DEVICE)
        places[-1, rows] = torch.arange(len(rows), dtype=torch.int32, device=DEVICE)
        out, lse = torch.randn(of, len(rows), h, d, device=DEVICE).half(), torch.randn(of, h, len(rows), device=DEVICE)
        results.append(Result(places if packed else rows, out, lse))
        met[-of:, rows] = True
    elsewhere, m_elsewhere = torch.empty_like(acc), m.clone()
    merge_call(Partial(acc, m_elsewhere), results, elsewhere)()
    # Were they merged with nothing, they would be 0.
    m_rows = m.transpose(1, 2)
    acc[~met], m_rows[~met] = 7.0, -torch.inf
    merge_call(Partial(acc, m), results, acc)()
    assert torch.equal(acc[met], elsewhere[met]) and (acc[~met] == 7.0).all()
    assert torch.equal(m_rows[met], m_elsewhere.transpose(1, 2)[met]) and (m_rows[~met] == -torch.inf).all()
