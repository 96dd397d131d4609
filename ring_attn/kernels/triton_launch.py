"""Launches of Triton kernels, each kind of them bound by Triton once.

Note [launches]: at every launch Triton binds some forty arguments, works out what it would specialise on and turns that into
text, to find what it has compiled; on the host that takes longer than the rest of a call. What it can tell launches apart by is
the type of every argument, the value of every one that is no tensor, and of a tensor the dtype and whether its address is a
multiple of 16. So what it hands back from a first launch is kept under all of these, and launched as it is the next time. That
tells more apart than Triton does, which looks at few values, so launches that share a key share what is compiled. Triton
launches on the current device and keeps what it compiled by device, hence that is part of the key.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Rows(NamedTuple):
    """A tensor of rows for every batch row and head: its pointer, and its strides over batch, rows and heads."""

    ptr: Any
    b: Any
    s: Any
    h: Any


def launch(kernel: Any, grid: int, arguments: dict[str, Any], device: int) -> None:
    """Runs `grid` programs of a kernel on the current device, which is that one; see Note [launches]."""
    # Its interpreter compiles nothing, and what AMD's backend tells tensors apart by is not in the key.
    if not isinstance(kernel, triton.JITFunction) or torch.version.hip is not None:
        kernel[(grid,)](**arguments)
        return
    # What is kept keeps the kernel alive, so its number stays its own; to hash it takes Triton longer.
    key = id(kernel), device, *key_of(arguments.values())
    kept = _kept.get(key)
    if kept is not None:
        compiled, in_order = kept
        compiled[grid, 1, 1](*in_order(arguments))
        return
    _kept[key] = kernel[(grid,)](**arguments), itemgetter(*kernel.arg_names)
    if len(_kept) > _MOST:
        del _kept[next(iter(_kept))]


# By the key of a launch: what Triton compiled for it, and how its arguments are brought into the order of the parameters.
_kept: dict[tuple, tuple[Any, itemgetter]] = {}
_MOST = 1024


def key_of(values: Collection[Any]) -> tuple[tuple, tuple]:
    """All that Triton can tell these arguments apart by."""
    types = tuple(map(type, values))
    return types, tuple([x if kind in _PLAIN else _told_by(x) for kind, x in zip(types, values, strict=True)])


_PLAIN = frozenset((int, bool, float, str, type(None)))


def _told_by(x: Any) -> Any:
    if type(x) is Rows:
        return x[0].dtype, x[0].data_ptr() % 16 == 0, x[1:]
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, tuple):
        return key_of(x)
    if hasattr(x, "block_shape"):
        layout = getattr(x, "layout", None)
        return x.base.dtype, tuple(x.shape), tuple(x.strides), tuple(x.block_shape), x.padding, layout
    return x
