"""The Gluon kernel: a forward for Hopper, compute capability 9.0, that reaches for the speed of hand-written CUDA.

It takes the Triton kernel's tables and partials, so visits may change between the two, and of score modifiers a softcap. It is
chosen only where the two have agreed on a small problem. Gluon is imported when a kernel first runs, so this module can be
imported without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ring_attn.kernels import Problem, get_kernel, modifier_refusal
from ring_attn.kernels.tilewise import ONE_SOFTCAP, Scaling
from ring_attn.kernels.triton_blocks import query_table
from ring_attn.kernels.triton_kernel import interpreted, target_of
from ring_attn.partial import Partial
from ring_attn.score import Scores
from ring_attn.tiles import Tile

if TYPE_CHECKING:
    from ring_attn.kernels.gluon_forward import GluonConfig

HEAD_DIMS = (64, 128)
# Gluon is experimental: what other versions make of these kernels is not known.
VERSIONS = ("3.6", "3.7")
_DTYPES = (torch.float16, torch.bfloat16)
_BACKWARD = "it has no backward: name another kernel for that direction, or leave the choice to 'auto'"


@dataclass(frozen=True)
class GluonKernel:
    """`config`: the launch configuration to use whatever the problem; None takes it from the table."""

    config: GluonConfig | None = None
    name: str = "gluon"

    def supports(self, problem: Problem) -> str | None:
        if problem.direction == "backward":
            return _BACKWARD
        if problem.dtype not in _DTYPES:
            return f"it takes float16 and bfloat16, not {problem.dtype}"
        refused = modifier_refusal(problem, ("softcap",))
        if refused is not None:
            return refused
        if len(problem.score or ()) > 1:
            return ONE_SOFTCAP
        dims = problem.head_dim, problem.v_head_dim
        if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
            return f"it takes head dims {' and '.join(map(str, HEAD_DIMS))}, alike for V, not {dims[0]} and {dims[1]}"
        if problem.device != "cuda":
            return f"it runs on CUDA devices, not on {problem.device}"
        return _installation_refusal() or _device_refusal() or self._check_refusal(problem)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        *,
        scale: float,
        score: Scores | None = None,
        into: Partial | None = None,
        out: Tensor | None = None,
    ) -> Partial:
        from ring_attn.kernels.gluon_forward import config_for, forward_call

        config = self.config or config_for(q.shape[-1])
        table = query_table(tiles, q, config.own)
        target = target_of(q, v, into, out)
        forward_call(q, k, v, table, config, scaling=Scaling.of(scale, score), carried=into, target=target, out=out)()
        return target if out is None else Partial(out, target.m)

    def backward(self, *_: object, **__: object) -> None:
        raise NotImplementedError(f"kernel 'gluon': {_BACKWARD}")

    def _check_refusal(self, problem: Problem) -> str | None:
        """None where this kernel has agreed with the Triton kernel on the current device, or where there is none to ask."""
        if not torch.cuda.is_available():
            return None
        from ring_attn.kernels.gluon_check import check_refusal

        device = torch.device("cuda", torch.cuda.current_device())
        return check_refusal(self, get_kernel("triton"), device, problem.dtype, problem.head_dim, softcap=bool(problem.score))


def _installation_refusal() -> str | None:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    if not installed.startswith(tuple(f"{known}." for known in VERSIONS)):
        return f"it is written for Triton {' and '.join(VERSIONS)}, not {installed}"
    return "Triton's interpreter does not run Gluon: unset TRITON_INTERPRET" if interpreted() else None


def _device_refusal() -> str | None:
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) != (9, 0):
        return f"it needs compute capability 9.0, this device has {'.'.join(map(str, capability))}"
    return None


KERNELS = {"gluon": GluonKernel()}
