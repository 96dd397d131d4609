"""What the flex kernel calls, in plain differentiable PyTorch, so that it runs where nothing compiled does.

It believes the blocks: one that is listed as whole is not asked about, and one that is not listed is hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ring_attn.kernels.flex_call import BLOCK, Work
from ring_attn.score_mod import over_cells


def dense_flex(q: Tensor, k: Tensor, v: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """(out, lse) of q [b, h, i, d] on k, v [b, g, j, ...], by one softmax over the tile's keys, in fp32 for 16 bits."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    assert q.shape[0] == k.shape[0] == v.shape[0]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * work.scale
    sizes = (*q.shape[:3], k.shape[2])
    cells = [torch.arange(size, dtype=torch.int32, device=q.device) for size in sizes]
    if work.score_mod is not None:
        scores = over_cells(work.score_mod, (0, 0, 0, 0))(scores, *cells)
    some, every, *by_kv = (_dense(*work.blocks[n : n + 2]) for n in range(0, 8, 2))
    assert all(torch.equal(x.mT, y) for x, y in zip((some, every), by_kv, strict=True))
    assert not (some & every).any()
    seen = _cells(some, sizes) & over_cells(work.mask_mod)(*cells) | _cells(every, sizes)
    blind = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(blind, 0)
    out = scores.softmax(-1).masked_fill(blind, 0) @ v
    return out.to(dtype), scores.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)


def _dense(counts: Tensor, order: Tensor) -> Tensor:
    """Which blocks are listed, bool [b or 1, h or 1, rows, columns]."""
    assert counts.dtype == order.dtype == torch.int32
    listed = torch.arange(order.shape[-1], device=order.device) < counts.unsqueeze(-1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order.long(), listed)


def _cells(blocks: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return blocks.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., : sizes[2], : sizes[3]]
