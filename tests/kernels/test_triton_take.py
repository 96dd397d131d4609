"""Rows taken out of a tensor against PyTorch's own index, in the interpreter or on a GPU."""

import pytest
import torch

pytest.importorskip("triton")
from ring_attn.kernels.triton_kernel import interpreted
from ring_attn.kernels.triton_take import taken

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs CUDA, or TRITON_INTERPRET=1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [8, 33])
@pytest.mark.parametrize("count", [1, 32, 75])
def test_rows_of_a_slice(count, dim, dtype):
    """Of some of the heads, as a part of a backward has them, and of any batch row in any order."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(3, 50, 6, dim, generator=gen, device=DEVICE).to(dtype)[:, 4:, 2:4]
    batches, numbers = (torch.randint(0, size, (count,), generator=gen, device=DEVICE) for size in x.shape[:2])
    found = taken(x, batches, numbers)
    assert found.is_contiguous() and torch.equal(found, x[batches, numbers])
