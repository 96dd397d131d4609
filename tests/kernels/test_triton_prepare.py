"""What the Triton backward reads of query rows, against plain PyTorch; on the CPU in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
from ring_attn.kernels import Upstream
from ring_attn.kernels.triton_kernel import interpreted
from ring_attn.kernels.triton_prepare import prepared
from tests.support import FLOAT32_LIMIT, poison_memory, random_qkv, rel_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs CUDA, or TRITON_INTERPRET=1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "dv"), [(1, 16), (16, 5), (61, 24), (64, 16), (130, 33)])
@pytest.mark.parametrize("more", [(), ("rest",), ("dlse",), ("rest", "dlse", "strides")], ids="-".join)
def test_against_pytorch(rows, dv, dtype, more):
    """Every number of every copy; what is past the last row is 0, also in memory that was full of NaN."""
    out, rest, _, dout = (x.to(dtype) for x in random_qkv(2, rows, rows, 3, 3, dv, seed=4, device=DEVICE))
    gen = torch.Generator(DEVICE).manual_seed(5)
    lse, dlse = (torch.randn(2, 3, rows, generator=gen, device=DEVICE) for _ in range(2))
    lse[:, 1, ::3] = -torch.inf
    if "strides" in more:
        dout, dlse = dout.transpose(1, 3).contiguous().transpose(1, 3), dlse.mT.contiguous().mT
    poison_memory(DEVICE)
    up = Upstream(dout, out, lse, dlse if "dlse" in more else None, rest if "rest" in more else None)
    found = prepared(up)
    assert prepared(up) is found
    assert found.dout.stride(-1) == 1 and torch.equal(found.dout, dout)
    lse2 = torch.where(lse == -torch.inf, torch.inf, lse * math.log2(math.e))
    for name, want in (("lse2", lse2), ("delta", up.delta)):
        copies = getattr(found, name).unflatten(0, (4, 2))
        assert copies.shape[3] == -(-rows // 16) * 16
        for shift, copy in enumerate(copies):
            kept = max(0, rows - shift)
            assert (copy[..., kept:] == 0).all()
            finite = want[..., shift:].isfinite()
            assert (copy[..., :kept].isfinite() == finite).all()
            assert not kept or rel_error(copy[..., :kept][finite], want[..., shift:][finite]) < FLOAT32_LIMIT
            assert (copy[..., :kept][~finite] == torch.inf).all()
