"""What the kernels' tests hold results to: a dense softmax with autograd, limits by dtype, and the largest tensor made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ring_attn.tiles import Tile
from tests.support import FLOAT32_LIMIT, FLOAT64_LIMIT, GRAD_FACTOR, OUT_FACTOR, cells_of, dense, rel_error

# lse is fp32 in every dtype, from products that fp32 holds exactly: what is left is the rounding of an fp32 sum.
LIMITS = {torch.float64: FLOAT64_LIMIT, torch.float32: FLOAT32_LIMIT}
HALF_LSE_LIMIT = 1e-5


def exact(q, k, v, dout, tile_lists, **options) -> dict[str, Tensor]:
    """`plain` in float64."""
    return plain(*(x.double() for x in (q, k, v, dout)), tile_lists, **options)


def plain(
    q, k, v, dout, tile_lists: Sequence[tuple[Tile, ...]], *, scale: float, dlse=None, modify=lambda scores: scores
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of one dense softmax of `modify(scores)` over the cells of all visits, in the inputs' dtype."""
    seen = cells_of([tile for visit in tile_lists for tile in visit], q.shape[0], q.shape[1], k.shape[1])
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = dense(*inputs, seen, scale, modify)
    target = (out * dout).sum()
    if dlse is not None:
        target = target + (lse.masked_fill(lse == -torch.inf, 0) * dlse).sum()
    dq, dk, dv = torch.autograd.grad(target, inputs)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def check_equal(got: dict[str, Tensor], want: dict[str, Tensor], limit: float) -> None:
    """Holds every result to a relative error."""
    errors = {name: rel_error(got[name], want[name]) for name in want}
    assert all(error < limit for error in errors.values()), errors


def check_half(got: dict[str, Tensor], want: dict[str, Tensor], dense_half: dict[str, Tensor]) -> None:
    """Holds 16-bit results to multiples of the error that a dense softmax makes in that dtype, and lse to fp32 rounding."""
    factors = {"out": OUT_FACTOR, "dq": GRAD_FACTOR, "dk": GRAD_FACTOR, "dv": GRAD_FACTOR}
    ratios = {name: rel_error(got[name], want[name]) / rel_error(dense_half[name], want[name]) for name in factors}
    assert all(ratios[name] <= factors[name] for name in factors), ratios
    assert got["out"].dtype == dense_half["out"].dtype
    assert rel_error(got["lse"], want["lse"]) < HALF_LSE_LIMIT


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements behind the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *made])
        return result
