"""Rows out of several places added to each of a tensor's rows, such as the dK and dV that other ranks pushed."""

from __future__ import annotations

from torch import Tensor

from ring_attn.kernels import has_triton


def add_rows(total: Tensor, received: Tensor, places: Tensor) -> None:
    """Adds to each row of total [b, s, e] those of received [b, n, e] that places [s, k] name, int32, -1 for none.

    Sums are in the order of places. One launch where Triton is there; without it, a GPU synchronises with the host.
    """
    if total.is_cuda and has_triton():
        from ring_attn.kernels.triton_add_rows import add_rows_call

        add_rows_call(total, received, places)()
        return
    for column in places.unbind(1):
        rows = (column >= 0).nonzero().squeeze(1)
        total[:, rows] += received[:, column[rows]]
