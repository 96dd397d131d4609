"""Whether anything watches the operators of PyTorch, to which a call is to be one.

An operator of one's own costs the host as much as the rest of a call, so where nothing would see the difference what it runs is
run by itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


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


def unseen() -> AbstractContextManager:
    """Inside, modes see no operator: of what a call does the first time alone, those that count them would find too few when
    checkpointing does the rest again.
    """
    return torch._C._DisableTorchDispatch()
