"""What the Triton kernels share: tensors as pointers with strides, rows of them, and which walked rows an own row meets.

All offsets that reach a pointer are 64-bit. Head dims are padded to a power of two; padding is loaded as 0 and never stored.

Note [whole blocks]: the tensor memory accelerator (TMA) copies blocks of rows without a thread computing an address, but it
masks no row, and what lies outside an entry may hold anything: 0 * NaN is no 0. So a block that would reach past an entry's
rows is moved back to end with them; what it meets for the second time is masked. An entry of fewer rows than a block goes
through pointers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ring_attn.kernels.triton_blocks import Table, padded
from ring_attn.kernels.triton_launch import Rows, launch
from ring_attn.partial import Partial

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# How far below its log-sum-exp, in base 2, what is carried on is left; see Note [base 2] of triton_forward.
LEFT_BELOW = tl.constexpr(24.0)


def rows_of(x: Tensor) -> Rows:
    """`Rows` of x [b, s, h, d] with unit stride in the last dimension."""
    b, s, h, _ = x.stride()
    return Rows(x, b, s, h)


def blocks_of(x: Tensor, rows: int) -> TensorDescriptor | None:
    """What TMA copies blocks of `rows` rows of one batch row and head of x [b, s, h, d] by; None where it cannot."""
    b, s, h, d = x.shape
    return _descriptor(x, [b, h, s, d], [x.stride(0), x.stride(2), x.stride(1)], [1, 1, rows, padded(d)])


def number_blocks_of(x: Tensor, rows: int) -> TensorDescriptor | None:
    """The same for numbers x [4 * b, h, s] as Note [shifted] of triton_prepare says."""
    return _descriptor(x, list(x.shape), list(x.stride()[:2]), [1, 1, rows])


def _descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor | None:
    # A dimension of one has no stride to speak of.
    strides = [16 if size == 1 else stride for size, stride in zip(shape, strides, strict=False)]
    addresses = [x.data_ptr(), *(stride * x.element_size() for stride in strides)]
    if not x.numel() or x.stride(-1) != 1 or 0 in strides or any(address % 16 for address in addresses):
        return None
    return TensorDescriptor(x, shape, [*strides, 1], block)


def numbers_of(x: Tensor) -> Rows:
    """`Rows` of x [b, h, s], one number a row."""
    b, h, s = x.stride()
    return Rows(x, b, s, h)


def visit_arguments(
    q: Tensor, k: Tensor, table: Table, carried: Partial | None, target: Partial, out: Tensor | None
) -> dict[str, Any]:
    """What a forward's launch takes of a table, of what it carries on from and of where it writes, see `forward_call`."""
    adding = carried is not None and carried.acc is not None
    return {
        "acc": rows_of(target.acc) if adding or out is None else None,
        "m": numbers_of(target.m),
        "sums": None if carried is None and out is not None else numbers_of(target.sum),
        "out": None if out is None else rows_of(out),
        "table": table.ints,
        "num_q": q.shape[1],
        "programs": table.programs if not adding or out is not None else table.busy,
        "group": q.shape[2] // k.shape[2],
        "CARRIED": carried is not None,
        "ADDING": adding,
        "LAST": out is not None,
        "DIM": q.shape[3],
    }


@dataclass(frozen=True)
class Call:
    """One kernel launch, built in one place for the launch itself and for the test that compiles it.

    `finish`: what is left to do with what its programs wrote, each its own part, so that sums have one order.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    finish: Callable[[], None] | None = None

    def __call__(self) -> None:
        if not self.grid:
            return
        tensors = (x[0] if type(x) is tuple else x for x in self.arguments.values())
        device = next(x for x in tensors if isinstance(x, Rows)).ptr.get_device()
        if device < 0 or device == torch.cuda.current_device():
            launch(self.kernel, self.grid, self.arguments, device)
        else:
            # Triton launches on the current device.
            with torch.cuda.device(device):
                launch(self.kernel, self.grid, self.arguments, device)
        if self.finish is not None:
            self.finish()


@triton.jit
def at_head(x, batch, head):
    """The tensor of one batch row and head, as (pointer, stride over rows)."""
    return x.ptr + batch.to(tl.int64) * x.b + head.to(tl.int64) * x.h, x.s


@triton.jit
def block_at(place, blocks, heads):
    """(block of rows, batch, head) number `place` of all: the heads of one block of rows are neighbours, as in memory."""
    return place // heads % blocks, place // heads // blocks, place % heads


@triton.jit
def row_pointers(at, rows, WIDTH: tl.constexpr):
    """Pointers [rows, WIDTH] to rows of one batch row and head."""
    return at[0] + rows.to(tl.int64)[:, None] * at[1] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def row_mask(live, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Which of [rows, WIDTH] exist: the live rows, without the padding of the head dim."""
    mask = live[:, None]
    if DIM != WIDTH:
        mask = mask & (tl.arange(0, WIDTH) < DIM)[None, :]
    return mask


@triton.jit
def load_rows(at, rows, live, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] of one batch row and head, 0 where not live and in the padding."""
    return tl.load(row_pointers(at, rows, WIDTH), mask=row_mask(live, DIM, WIDTH), other=0.0)


@triton.jit
def store_rows(at, value, rows, live, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Writes value [rows, WIDTH] to the live rows, in their dtype."""
    tl.store(row_pointers(at, rows, WIDTH), value.to(at[0].dtype.element_ty), mask=row_mask(live, DIM, WIDTH))


@triton.jit
def load_block(blocks, batch, head, row, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] of one batch row and head from `row` on, by TMA."""
    return tl.reshape(blocks.load([batch, head, row, 0]), (ROWS, WIDTH))


@triton.jit
def load_number_block(blocks, batch, head, row, batches, ROWS: tl.constexpr):
    """[ROWS] of one batch row and head of shifted numbers from `row` on, by TMA, which wants a multiple of 4."""
    return tl.reshape(blocks.load([row % 4 * batches + batch, head, row // 4 * 4]), (ROWS,))


@triton.jit
def load_numbers(at, rows, live, other: tl.constexpr):
    """[rows], `other` where not live."""
    return tl.load(at[0] + rows.to(tl.int64) * at[1], mask=live, other=other)


@triton.jit
def store_numbers(at, value, rows, live):
    tl.store(at[0] + rows.to(tl.int64) * at[1], value, mask=live)


@triton.jit
def whole_block(i, entry, clear_start, clear_stop, BLOCK: tl.constexpr):
    """(place, partly) of the block to meet the walked rows from `i` on, see Note [whole blocks]: it holds those from `place`.

    `partly`: not every own row meets all of it, or it holds rows from before `i`.
    """
    place = tl.minimum(i, tl.load(entry + 3) - BLOCK)
    return place, (place < clear_start) | (place + BLOCK > clear_stop) | (place < i)


@triton.jit
def met_by(place, i, low, high, BLOCK: tl.constexpr):
    """[own rows, BLOCK]: which walked rows, from `place` on, an own row meets: those in low to high that are at least `i`."""
    steps = tl.arange(0, BLOCK)
    # Relative to the block, the walked rows are constants of a thread.
    low = tl.maximum(low, i) - place
    return (steps[None, :] >= low[:, None]) & (steps[None, :] <= (high - place)[:, None])


@triton.jit
def program_work(table, program):
    """(block, batch, first, last) of a program, see Note [block table] of `triton_blocks`."""
    at = table + program * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def entry_span(entry, rows, block_start, block_stop):
    """(low, high, start, stop, clear_start, clear_stop): which walked rows the own `rows` of a block meet in one entry.

    Row r meets the walked rows low[r] to high[r], ends included; a row outside the entry meets none. The block walks over
    [start, stop), and every row of it that exists meets all of [clear_start, clear_stop), where no mask is needed.
    """
    own_start, own_stop = tl.load(entry), tl.load(entry + 1)
    walk_start, walk_stop = tl.load(entry + 2), tl.load(entry + 3)
    lo, hi = tl.load(entry + 4), tl.load(entry + 5)
    inside = (rows >= own_start) & (rows < own_stop)
    low = tl.maximum(walk_start, rows + lo)
    high = tl.where(inside, tl.minimum(walk_stop - 1, rows + hi), -1)
    first, last = tl.maximum(own_start, block_start), tl.minimum(own_stop, block_stop) - 1
    start = tl.maximum(walk_start, first + lo)
    stop = tl.minimum(walk_stop, last + hi + 1)
    clear_start = tl.maximum(walk_start, last + lo)
    clear_stop = tl.minimum(walk_stop, first + hi + 1)
    covered = (own_start <= block_start) & (own_stop >= block_stop)
    return low, high, start, stop, clear_start, tl.where(covered, clear_stop, clear_start)
