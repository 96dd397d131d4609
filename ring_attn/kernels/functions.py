"""What a kernel may learn of a user's function of cells without running it over all of them.

Note [state]: what a kernel makes from a function once, such as which blocks a mask leaves, holds as long as the function gives
the same. It gives the same while it reads the same: `state` is all that it reads by name, in a form to compare, where a tensor
counts as another once it was written to. What is reached without a name, or written by the replay of a CUDA graph, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from ring_attn.score_mod import function_transforms

_PLAIN = int | float | str | torch.dtype | torch.device | None


@dataclass(frozen=True, eq=False)
class Read:
    """Something that a function reads, kept alive. Equal: the same number, or the same object and not written to since."""

    value: Any
    version: int | None = None

    @staticmethod
    def of(value: Any) -> Read:
        # A tensor of inference mode counts no writes, so it has no version and equals nothing.
        return Read(value, value._version if isinstance(value, Tensor) and not value.is_inference() else None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Read) or type(self.value) is not type(other.value):
            return False
        if isinstance(self.value, _PLAIN):
            return self.value == other.value
        return self.value is other.value and self.version == other.version and not self._is_untold

    def __hash__(self) -> int:
        return hash(self.value) if isinstance(self.value, _PLAIN) else hash((id(self.value), self.version))

    @property
    def _is_untold(self) -> bool:
        return isinstance(self.value, Tensor) and self.version is None


def state(fn: Callable) -> tuple[Read, ...]:
    """All that a function reads by name, itself and through the functions and objects it names, see Note [state]."""
    return tuple(_reads(fn, frozenset(), set()))


def _reads(value: Any, names: frozenset[str], met: set[int]) -> Iterator[Read]:
    """`value` and what is read through it, of objects the attributes of these names; `met`: what was gone through before."""
    if not isinstance(value, _PLAIN):
        if id(value) in met:
            return
        met.add(id(value))
    yield Read.of(value)
    match value:
        case FunctionType() if (value.__module__ or "").partition(".")[0] != "torch":
            names = frozenset(_names(value.__code__))
            read = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            parts = [value.__code__, *cells, *read, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        case MethodType():
            parts, names = [value.__func__, value.__self__], names | frozenset(_names(value.__func__.__code__))
        case partial():
            parts = [value.func, *value.args, *value.keywords.values()]
        case list() | tuple():
            parts = value
        case dict():
            parts = value.values()
        case Tensor() | FunctionType() | CodeType() | type():
            parts = ()
        case _:
            call = vars(type(value)).get("__call__")
            if isinstance(call, FunctionType):
                names = names | frozenset(_names(call.__code__))
            parts = _attributes(value, names)
    for part in parts:
        yield from _reads(part, names, met)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _attributes(value: Any, names: frozenset[str]) -> list:
    own = getattr(value, "__dict__", {})
    if isinstance(value, torch.nn.Module):
        own = own | value._buffers | value._parameters | value._modules
    return [own[name] for name in names if name in own]


def depends_on(fn: Callable, device: torch.device) -> tuple[bool, bool]:
    """Whether a mask's function of scalars (b, h, q_pos, kv_pos) depends on b, and whether on h."""
    return _depends(fn, 0, device), _depends(fn, 1, device)


def _depends(fn: Callable, argument: int, device: torch.device) -> bool:
    found = []

    def watched(x: Tensor) -> Tensor:
        scalars = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)]
        result = fn(*scalars[:argument], x, *scalars[argument + 1 :])
        found.append(isinstance(result, Tensor) and torch._C._functorch.is_batchedtensor(result))
        return result

    with function_transforms():
        torch.vmap(watched)(torch.zeros(1, dtype=torch.int64, device=device))
    return found[0]
