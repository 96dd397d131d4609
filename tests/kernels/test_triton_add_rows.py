"""Rows out of several places added to those of a tensor, in the interpreter or on a GPU."""

import pytest
import torch

from tests.support import FLOAT32_LIMIT, rel_error

pytest.importorskip("triton")
from ring_attn.kernels.triton_add_rows import add_rows_call
from ring_attn.kernels.triton_kernel import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs CUDA, or TRITON_INTERPRET=1")


@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize(("batch", "width"), [(1, 16), (2, 300), (1, 513)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_are_added_where_they_belong(count, batch, width, dtypes):
    """What nothing is added to stays as it is, NaN or not; received rows that belong nowhere are not read."""
    gen = torch.Generator().manual_seed(count)
    random = lambda *shape: torch.randn(shape, generator=gen, dtype=torch.float64)  # noqa: E731
    total, received = (random(batch, n, width).to(dtype) for n, dtype in zip((70, 90), dtypes, strict=True))
    places = torch.full((70, count), -1, dtype=torch.int32)
    for column in range(count):
        rows = torch.randperm(40, generator=gen)[: 20 + column]
        places[rows, column] = torch.randperm(80, generator=gen)[: len(rows)].to(torch.int32)
    alone = (places < 0).all(1)
    total[:, alone], received[:, 80:] = torch.nan, torch.nan
    want = total.double().clone()
    for batch_row, row, column in ((b, r, c) for b in range(batch) for r in range(70) for c in range(count)):
        if places[row, column] >= 0:
            want[batch_row, row] += received[batch_row, places[row, column]].double()
    # Own rows behind the last that anything is for are not among them.
    whole = torch.cat([total, torch.full_like(total[:, :3], 7.0)], 1).to(DEVICE)
    add_rows_call(whole[:, :70], received.to(DEVICE), places.to(DEVICE))()
    found, behind = whole.cpu().split([70, 3], 1)
    assert (behind == 7.0).all()
    assert found[:, alone].isnan().all() and alone.sum() >= 30
    assert rel_error(found[:, ~alone], want[:, ~alone]) < (1e-12 if dtypes[0] == torch.float64 else FLOAT32_LIMIT)
