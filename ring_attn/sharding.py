"""A sequence cut into shards and put together again, labels shifted before the cut, padding, and the loss over all ranks.

Note [one program]: `shard` and `unshard` follow the view that all processes of a ring run one program on one global tensor. So
the gradient of `shard` is the whole gradient on every process, and the gradient of `unshard` is this process's rows of a
gradient that every process computes alike. Where each process goes on differently with the whole tensor, say grad="partial".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ring_attn.comm.transport import Collective
from ring_attn.layout import Layout
from ring_attn.typed import typed

if TYPE_CHECKING:
    from ring_attn.ring import Ring

IGNORE_INDEX = -100


def positions(layout: Layout, ranks: tuple[int, ...], device: torch.device | str | None = None) -> Tensor:
    """Global positions of the rows of `ranks`, int64 [rows], in row order."""
    ranges = [r for rank in ranks for r in layout.shard(rank)]
    return torch.cat([torch.arange(r.start, r.stop, r.step, device=device) for r in ranges])


def shard(x: Tensor, layout: Layout, transport: Collective, dim: int) -> Tensor:
    """The rows of `x` along `dim` that this process hosts; see Note [one program] for the gradient."""
    return _Shard.apply(x, layout, transport, dim % x.dim())


def unshard(x: Tensor, layout: Layout, transport: Collective, dim: int, grad: str = "replicated") -> Tensor:
    """All rows along `dim` in global order, on every process: the inverse of `shard`."""
    if grad not in ("replicated", "partial"):
        raise ValueError(f"grad must be 'replicated' or 'partial', got {grad!r}")
    return _Unshard.apply(x, layout, transport, dim % x.dim(), grad)


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout, transport, dim):
        ctx.args = layout, transport, dim
        return _take(x, layout, transport, dim)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, *ctx.args), None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout, transport, dim, grad):
        ctx.args, ctx.grad = (layout, transport, dim), grad
        return _gather(x, layout, transport, dim)

    @staticmethod
    def backward(ctx, grad):
        local = _take(grad, *ctx.args) if ctx.grad == "replicated" else _scatter_sum(grad, *ctx.args)
        return local, None, None, None, None


def _take(x: Tensor, layout: Layout, transport: Collective, dim: int) -> Tensor:
    return x.index_select(dim, positions(layout, transport.hosted, x.device))


def _gather(x: Tensor, layout: Layout, transport: Collective, dim: int) -> Tensor:
    shards = [part.clone(memory_format=torch.contiguous_format) for part in x.chunk(len(transport.hosted), dim)]
    joined = torch.cat(transport.all_gather(shards, what="unshard").wait(), dim)
    order = positions(layout, tuple(range(transport.ring_size)), x.device)
    return joined.index_select(dim, torch.argsort(order))


def _scatter_sum(x: Tensor, layout: Layout, transport: Collective, dim: int) -> Tensor:
    rows = [x.index_select(dim, positions(layout, (rank,), x.device)) for rank in range(transport.ring_size)]
    # Every hosted rank reads the same whole tensor, so this process contributes once: through its first rank.
    idle = [torch.zeros_like(part) for part in rows]
    parts = [rows] + [list(idle) for _ in transport.hosted[1:]]
    return torch.cat(transport.reduce_scatter(parts, what="unshard backward").wait(), dim)


def length(x: Tensor, dim: int) -> int:
    """The size of x along `dim`. Raises ValueError where x has no such dimension."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim {dim} is none of x's {x.dim()}, whose shape is {tuple(x.shape)}")
    return x.shape[dim]


@typed
def shift_labels(tokens: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Next-token labels of whole sequences tokens [..., t], integers: labels[i] = tokens[i + 1], the last one `ignore_index`;
    int64, as a loss takes them.

    Shift before sharding: at a shard's last row the next token lies on another rank.
    """
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex:
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    following = tokens[..., 1:].long()
    return torch.cat([following, torch.full_like(tokens[..., :1], ignore_index, dtype=torch.int64)], -1)


@typed
def pad_to(x: Tensor, multiple: int, *, dim: int = 1, value: float = 0) -> Tensor:
    """`x` with `value` appended along `dim` up to the next multiple of `multiple`; `ring.shard_multiple` is the one to use.

    Under a causal mask nothing that was there sees the padding; under others add KeyPadding(lengths). Pad labels with -100.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    if not (x.is_floating_point() or x.is_complex()):
        low, high = (0, 1) if x.dtype == torch.bool else (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
        if not float(value).is_integer() or not low <= value <= high:
            raise ValueError(f"{x.dtype} cannot hold the padding {value}; cast x first, labels with .long()")
    missing = -length(x, dim) % multiple
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_full(shape, value)], dim) if missing else x


def global_token_loss(
    logits: Tensor, labels: Tensor, *, ring: Ring, group: object = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Mean cross-entropy over the valid tokens of all ranks, the same scalar on every rank, in nats.

    logits [..., rows, vocabulary] and labels [..., rows] (integers, already shifted) are the rows this process hosts; labels
    equal to `ignore_index` do not count. `group`: the process group to sum over where data-parallel ranks stand beside the ring
    (None: the ring alone). Each process's gradient is its own share: parameter gradients *summed* over all processes are those
    of the unsharded run, so scale the loss by the number of processes under DDP, which averages. 0 where no token is valid
    anywhere.
    """
    if not hasattr(ring, "sum_over_processes"):
        raise TypeError(f"ring must be a Ring, on one device Ring.simulated(1), got {type(ring).__name__}")
    if logits.dim() < 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits must be [..., rows, vocabulary] and labels [..., rows], got {tuple(logits.shape)}, {tuple(labels.shape)}"
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, as ring_attn.shift_labels makes them, got {labels.dtype}")
    labels = labels.long()
    flat = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    local = F.cross_entropy(flat, labels.flatten(), ignore_index=ignore_index, reduction="sum")
    valid = (labels != ignore_index).sum()
    total = ring.sum_over_processes(torch.stack([local.detach().double(), valid.double()]), group)
    num_valid = total[1].clamp(min=1)
    share = local / num_valid.to(local.dtype)
    return share + ((total[0] / num_valid).to(local.dtype) - share).detach()
