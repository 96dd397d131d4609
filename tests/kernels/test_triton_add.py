"""The fused addition of gradients against plain PyTorch, in the interpreter or on a GPU."""

import pytest
import torch

from ring_attn.kernels import Grads
from tests.support import FLOAT32_LIMIT, rel_error

pytest.importorskip("triton")
from ring_attn.kernels.triton_add import add_call
from ring_attn.kernels.triton_kernel import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs CUDA, or TRITON_INTERPRET=1")


@pytest.mark.parametrize("unwritten", [(), ("dq",), ("dk", "dv"), ("dq", "dk", "dv")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dims", [(8, 8), (33, 16)])
@pytest.mark.parametrize(
    ("q_rows", "kv_rows"), [(range(70), range(50)), (range(5, 41), range(49, 50)), (range(64, 70), range(3, 40))]
)
def test_add(q_rows, kv_rows, dims, dtype, unwritten):
    """Into sums of which dk and dv lie side by side, from parts that are slices; what is beside the rows is left alone.

    What is unwritten may hold NaN.
    """
    gen = torch.Generator(DEVICE).manual_seed(0)
    (d, dv), b, h, g = dims, 2, 4, 2
    random = lambda *shape: torch.randn(shape, generator=gen, device=DEVICE)  # noqa: E731
    dk, dv_ = (x.unflatten(-1, (g, -1)) for x in random(b, 50, g * (d + dv)).split([g * d, g * dv], -1))
    into = Grads(random(b, 70, h, d), dk, dv_, (), "dq" in unwritten, "dk" in unwritten)
    shapes = (len(q_rows), h, d), (len(kv_rows), g, d), (len(kv_rows), g, dv)
    parts = [random(b, rows, 2 * heads, dim).to(dtype)[:, :, heads:] for rows, heads, dim in shapes]
    want = [x.double() for x in (into.dq, into.dk, into.dv)]
    for name, x, part, rows in zip(("dq", "dk", "dv"), want, parts, (q_rows, kv_rows, kv_rows), strict=True):
        here = slice(rows.start, rows.stop)
        if name in unwritten:
            getattr(into, name)[:, here], x[:, here] = torch.nan, 0.0
        x[:, here] += part
    add_call(into, q_rows, kv_rows, *parts)()
    for found, x in zip((into.dq, into.dk, into.dv), want, strict=True):
        assert rel_error(found, x) < FLOAT32_LIMIT


@pytest.mark.parametrize("unwritten", [(), ("dq",), ("dk", "dv"), ("dq", "dk", "dv")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_add_packs(dtype, unwritten):
    """Rows of any batch row in any order, of which some are left out: unwritten ones get zeros, others stay as they are."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    b, h, g, d, dv = 2, 4, 2, 16, 9
    random = lambda *shape: torch.randn(shape, generator=gen, device=DEVICE)  # noqa: E731
    into = Grads(random(b, 70, h, d), random(b, 50, g, d), random(b, 50, g, dv), (), "dq" in unwritten, "dk" in unwritten)
    order = {"dq": torch.randperm(b * 70, generator=gen, device=DEVICE)[:75]}
    order["dk"] = order["dv"] = torch.randperm(b * 50, generator=gen, device=DEVICE)[:37]
    parts = [random(1, len(order[name]), x.shape[2], x.shape[3]).to(dtype) for name, x in sums_of(into)]
    want = [x.double() for _, x in sums_of(into)]
    places = {}
    for (name, sums), x, part in zip(sums_of(into), want, parts, strict=True):
        if name in unwritten:
            sums.fill_(torch.nan)
            x.zero_()
        x.flatten(0, 1).index_add_(0, order[name], part[0].double())
        places[name] = torch.full((b * x.shape[1],), -1, dtype=torch.int32, device=DEVICE)
        places[name][order[name]] = torch.arange(len(order[name]), dtype=torch.int32, device=DEVICE)
    add_call(into, places["dq"].view(b, -1), places["dk"].view(b, -1), *parts)()
    for (_, found), x in zip(sums_of(into), want, strict=True):
        assert rel_error(found, x) < FLOAT32_LIMIT


def sums_of(into):
    return [(name, getattr(into, name)) for name in ("dq", "dk", "dv")]
