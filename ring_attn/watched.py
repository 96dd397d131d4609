"""Whether anything watches the operators of PyTorch, to which a call is to be one, and what compilers leave to Python.

An operator of one's own costs the host as much as the rest of a call, so where nothing would see the difference what it runs is
run by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P, _R = ParamSpec("_P"), TypeVar("_R")
_ASIDE = "caches, and what decodes over them, stay out of graphs"


def watched(*tensors: Tensor) -> bool:
    """Whether a compiler, a profiler, a mode or a transform of operators does, such as a policy of activation checkpointing, or
    one of the tensors has operators of its own.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd._profiler_enabled()
        # A compiler that has left this frame to Python would look into those that it calls.
        or _callback() is not None
        or not _PLAIN.issuperset(map(type, tensors))
    )


_PLAIN = {Tensor, torch.nn.Parameter}
_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback


def between_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which compilers leave to Python between two graphs: what it goes by is another at every call."""
    aside: list[Callable[_P, _R]] = []

    @wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        torch._dynamo.graph_break(msg=_ASIDE)
        if not aside:
            # Not earlier: what that imports takes as long as torch.
            aside.append(torch.compiler.disable(function, reason=_ASIDE))
        return aside[0](*args, **kwargs)

    # What is compiled around it is kept by its code, of one's own for each.
    called.__code__ = called.__code__.replace(co_name=function.__name__)
    return called


def unseen() -> AbstractContextManager:
    """Inside, modes see no operator: of what a call does the first time alone, those that count them would find too few when
    checkpointing does the rest again.
    """
    return torch._C._DisableTorchDispatch()
