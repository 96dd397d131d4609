"""One launch to add rows out of several places to each of a tensor's rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ring_attn.kernels.triton_rows import Call, at_head, block_at, row_pointers, rows_of

BLOCK, WIDTH = 16, 256


def add_rows_call(total: Tensor, received: Tensor, places: Tensor) -> Call:
    """The launch that adds to each row of total [b, s, e] those of received [b, n, e] that places [s, k] name, int32 and
    contiguous, -1 for none. Sums are in the order of places; a block of rows to which nothing is added is not touched.
    """
    (b, rows, width), blocks = total.shape, -(-total.shape[1] // BLOCK)
    columns = -(-width // WIDTH)
    arguments = {
        "total": rows_of(total.unsqueeze(2)),
        "received": rows_of(received.unsqueeze(2)),
        "places": places,
        "rows": rows,
        "width": width,
        "blocks": blocks,
        "columns": columns,
        "COUNT": places.shape[1],
        "BLOCK": BLOCK,
        "WIDTH": WIDTH,
        "num_warps": 4,
    }
    return Call(add_rows_kernel, blocks * b * columns if places.shape[1] else 0, arguments)


@triton.jit(do_not_specialize=["rows", "blocks"])
def add_rows_kernel(
    total, received, places, rows, width, blocks, columns,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, batch, column = block_at(tl.program_id(0), blocks, columns)
    row = block * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    most = tl.full((BLOCK,), -1, tl.int32)
    for n in range(COUNT):
        most = tl.maximum(most, tl.load(places + row * COUNT + n, mask=live, other=-1))
    met = most >= 0
    if tl.max(most) >= 0:
        inside = (column * WIDTH + tl.arange(0, WIDTH) < width)[None, :]
        to = row_pointers(at_head(total, batch, batch * 0), row, WIDTH) + column * WIDTH
        value = tl.load(to, mask=met[:, None] & inside, other=0.0)
        for n in range(COUNT):
            place = tl.load(places + row * COUNT + n, mask=live, other=-1)
            come = row_pointers(at_head(received, batch, batch * 0), place, WIDTH) + column * WIDTH
            value += tl.load(come, mask=(place >= 0)[:, None] & inside, other=0.0).to(value.dtype)
        tl.store(to, value, mask=met[:, None] & inside)
