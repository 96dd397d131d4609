"""What Triton would launch, without a GPU: its own binder and compiler, and a driver that writes down what it is given.

Run in a process without TRITON_INTERPRET: `python -m tests.kernels.triton_launches again` launches twice what the kernels
launch, and `... apart [sabotage]` holds the keys of many launches against Triton's own. Prints what it found wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.compiler.compiler import LazyDict
from triton.runtime.jit import create_function_from_signature

from ring_attn.kernels import triton_launch
from ring_attn.kernels.sums import Addend
from ring_attn.kernels.triton_launch import Rows
from ring_attn.kernels.triton_merge import Result, merge_call
from ring_attn.kernels.triton_rows import Call
from ring_attn.kernels.triton_scores import Links
from ring_attn.kernels.triton_sum import sum_call
from ring_attn.kernels.triton_take import take_call
from ring_attn.kernels.triton_unit_norm import norm_call
from ring_attn.partial import empty
from tests.kernels.triton_compile import calls, scores

TARGET = GPUTarget("cuda", 90, 32)


class Driver:
    """A GPU of compute capability 9.0 on which nothing runs. `launched`: all that its launchers were called with."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *rest: (object(), f"{name} as loaded", 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

    def launcher_cls(self, source, metadata) -> Callable:
        return lambda *given: self.launched.append((metadata.hash, *given))

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def sample(dtype: torch.dtype = torch.bfloat16, *, rows: int = 40, heads: int = 2, dim: int = 64, start: int = 0) -> Tensor:
    """[1, rows, heads, dim], `start` elements into its memory."""
    return torch.zeros(start + rows * heads * dim, dtype=dtype)[start:].view(1, rows, heads, dim)


def merging(x: Tensor, target: bool, count: int = 1) -> Call:
    lse = torch.zeros(x.shape[0], x.shape[2], x.shape[1])
    results = [Result(range(3, x.shape[1]), x[:, 3:], lse[..., 3:])] * count
    return merge_call(empty(x, x.shape[3]), results, x if target else None)


def adding(x: Tensor, count: int, *, places: int = 0) -> Call:
    """Of so many addends, the last of which has so many rows for each."""
    rows = range(x.shape[1])
    last = Addend([x, x], rows, torch.zeros(*x.shape[:2], places, dtype=torch.int32) if places else None)
    return sum_call([x, x.float()], [*[Addend([x.float(), x], rows[3:])] * (count - 1), last], rows, torch.float32)


def taking(x: Tensor) -> Call:
    rows = torch.arange(x.shape[1])
    return take_call(x, rows * 0, rows, x[0].contiguous())


def attending(*of_scores: str) -> Iterator[Call]:
    """Forward and backward, with what TMA copies by."""
    for name in of_scores:
        yield from (call for _, call in calls(torch.bfloat16, 64, "large", scores(name)))


def launches() -> list[Call]:
    ours = (
        merging(sample(), False),
        merging(sample(), True),
        merging(sample(), True, 2),
        adding(sample(), 1),
        adding(sample(), 2, places=1),
        adding(sample(), 5, places=3),
        taking(sample()),
        norm_call(sample(), sample()),
        norm_call(sample(), sample(), sample()),
    )
    return [*ours, *attending("plain", "function")]


def launched_again(driver: Driver) -> Iterator[str]:
    """Each launch is Triton's own the first time and the kept one the second, with the same arguments for the same code."""
    for call in launches():
        name, before = call.kernel.__name__, len(driver.launched)
        triton_launch._kept.clear()
        call()
        # Without its caches Triton would have to make them anew.
        call.kernel.device_caches.clear()
        call()
        if call.kernel.device_caches:
            yield f"{name}: Triton launched it the second time, too"
        first, *others = driver.launched[before:]
        if len(others) != 1 or not _same(first, others[0]):
            yield f"{name}: launched {len(others) + 1} times, not twice with the same"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, LazyDict):
        return a.data == b.data
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return a is b or (not isinstance(a, Tensor) and a == b)


def variants() -> Iterator[Call]:
    """Launches that differ in one thing, which Triton may or may not tell apart."""
    for call in (
        merging(sample(), True),
        adding(sample(), 2, places=3),
        taking(sample()),
        next(attending("plain")),
    ):
        yield call
        for name, given in call.arguments.items():
            for other in others_for(given):
                yield Call(call.kernel, call.grid, call.arguments | {name: other})
    yield from attending("plain", "softcap", "alibi", "function", "softcap alibi")


def others_for(x: Any) -> list:
    """In place of an argument."""
    if isinstance(x, Rows):
        ptr = x.ptr
        moved = torch.zeros(ptr.numel() + 8, dtype=ptr.dtype)
        pointers = [ptr.clone(), ptr.double(), moved[4 : 4 + ptr.numel()], moved[1 : 1 + ptr.numel()]]
        numbers = [x._replace(**{side: value}) for side in "bsh" for value in (1, 2, 16, 48, 2**31, 2**33 + 1)]
        return [None, *(x._replace(ptr=pointer) for pointer in pointers), *numbers]
    if type(x) is tuple:
        return [(*x[:n], other, *x[n + 1 :]) for n, one in enumerate(x) for other in others_for(one)]
    if isinstance(x, Tensor):
        return [x.clone(), x.long(), torch.zeros(99, dtype=x.dtype)[1:]]
    if isinstance(x, bool | int):
        return [True, False, 1, 1.0, 2, 16, 17, 32, 2**31, 2**63]
    return [None, 1, 1.0, 0.5, 16.0]


def told_apart() -> Iterator[str]:
    """Launches with one key that Triton would compile differently."""
    found: dict[tuple, set[str]] = {}
    for call in variants():
        key = call.kernel, *triton_launch.key_of(call.arguments.values())
        found.setdefault(key, set()).add(by_triton(call))
    print(f"{len(found)} keys, {len(set.union(*found.values()))} of Triton's", file=sys.stderr)
    for (kernel, *_), several in found.items():
        if len(several) > 1:
            yield f"{kernel.__name__}: one key for {sorted(several)}"


def by_triton(call: Call) -> str:
    """All by which Triton 3.6 finds what it has compiled for a launch."""
    bind = create_function_from_signature(call.kernel.signature, call.kernel.params, make_backend(TARGET))
    _, specialization, options = bind(**call.arguments)
    return f"{call.kernel.__name__} {specialization} {options}"


def _without(kind: type, key: Callable[[Any], Any]) -> Callable[[Any], Any]:
    told_by = triton_launch._told_by
    return lambda x: key(x) if isinstance(x, kind) else told_by(x)


# What is left of a key without one thing.
SABOTAGES = {
    "alignment": _without(Rows, lambda x: (x.ptr.dtype, x[1:])),
    "dtype": _without(Rows, lambda x: (x.ptr.data_ptr() % 16 == 0, x[1:])),
    "strides": _without(Rows, lambda x: (x.ptr.dtype, x.ptr.data_ptr() % 16 == 0)),
    "coarse alignment": _without(Rows, lambda x: (x.ptr.dtype, x.ptr.data_ptr() % 8 == 0, x[1:])),
    "functions": _without(Links, len),
    "tables": _without(Tensor, lambda x: x.dtype),
}


def main(what: str, sabotage: str = "") -> None:
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    if sabotage == "types":
        key_of = triton_launch.key_of
        triton_launch.key_of = lambda values: key_of(values)[1:]
    elif sabotage:
        triton_launch._told_by = SABOTAGES[sabotage]
    for line in launched_again(driver) if what == "again" else told_apart():
        print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
