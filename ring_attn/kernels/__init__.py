"""The `Kernel` protocol, and `resolve`, which picks a kernel for a problem and says why.

A kernel does the local work of one visit: one rank's queries against the KV at hand. It knows no ranks. Kernels are listed by
name and imported when first asked for, so a missing optional package costs nothing until it is named.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ring_attn.kernels.order import order_for
from ring_attn.partial import Partial
from ring_attn.score import Scores
from ring_attn.tiles import Tile

if TYPE_CHECKING:
    from ring_attn.kernels.sums import Grads

logger = logging.getLogger("ring_attn")


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


@dataclass(frozen=True)
class Problem:
    """What a kernel must be able to do, as far as it decides which kernel can. Hashable, and alike on every rank.

    `left_bounded`: some tile's band has a lower bound, as under a sliding window. `lse_grad`: the backward gets a gradient
    through lse, so delta is not rowsum(dout * out) alone. `score`: the kinds of score modifiers, None for none. `predicate`:
    the mask is more than a band, "triton" where a Triton function stands beside every one of its functions, else "python".
    `deterministic`: two runs must give the same bits. `kind` ("full", "causal", "window", "documents" or "decode") and `rows`
    (a rank's queries, as a power of two) decide which is fastest. `brief`: the forward takes a GPU less than it takes a host to
    ask a library for it, as it does each time anew, see Note [brief] of `order.py`.
    """

    direction: str  # "forward" or "backward"
    device: str  # torch.device.type
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    left_bounded: bool = False
    lse_grad: bool = False
    score: tuple[str, ...] | None = None
    predicate: str | None = None
    deterministic: bool = False
    kind: str = "causal"
    rows: int = 8192
    brief: bool = False


@dataclass(frozen=True)
class Upstream:
    """What a backward gets: `dout`, final `out` [b, s, h, dv], final `lse` [b, h, s], and the gradient `dlse` of it or None.

    `rest`: what rounding took from out, where that is known; see Note [rest] of `ring_attn.attention`.
    """

    dout: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None = None
    rest: Tensor | None = None

    @cached_property
    def delta(self) -> Tensor:
        """rowsum(dout * out) - dlse, [b, h, s] in the dtype of lse: computed once, used by every visit."""
        out = self.out.to(self.lse.dtype) if self.rest is None else self.out.to(self.lse.dtype) + self.rest
        delta = (self.dout.to(self.lse.dtype) * out).sum(-1).transpose(1, 2)
        return (delta if self.dlse is None else delta - self.dlse).contiguous()

    def head_parts(self, count: int) -> list[Upstream]:
        """The same for each of so many parts of the heads."""
        if count == 1:
            return [self]
        of_rows = ([None] * count if x is None else x.chunk(count, 2) for x in (self.dout, self.out, self.rest))
        of_lse = ([None] * count if x is None else x.chunk(count, 1) for x in (self.lse, self.dlse))
        (dout, out, rest), (lse, dlse) = of_rows, of_lse
        return [Upstream(*part) for part in zip(dout, out, lse, dlse, rest, strict=True)]


class Kernel(Protocol):
    """The local attention of one visit.

    q [b, s, h, d], k [b, skv, g, d], v [b, skv, g, dv] share dtype and device, have unit stride in the last dimension and any
    other strides; h is a multiple of g, and query head i reads KV head i // (h // g). `tiles` are disjoint, so a cell counts
    once.

    A kernel whose gradients a library makes also has `rounds(device, tiles)`: whether each row of dk and dv of a visit with
    these tiles comes from one call of it, rounded to the dtype of the inputs.
    """

    name: str

    def supports(self, problem: Problem) -> str | None:
        """None, or the reason why this kernel cannot do the problem here, in the user's words."""

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
        """The partial of all tiles, merged into `into` (written to) where given. `scale` is above 0, see `scaling.scaled`.

        `out` [b, s, h, dv] marks the last visit: the partial returned is normalised, its acc the output of every row, its m the
        final lse, and `into` is not meant to be read again. That acc is `out`, or where a library made all of it in one call,
        in this visit or an earlier one, what that returned, contiguous and in memory of its own, with what this visit adds
        merged into it: `out` is then not written.
        """

    def backward(
        self,
        up: Upstream,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        *,
        scale: float,
        score: Scores | None = None,
        into: Grads,
    ) -> None:
        """Adds this visit's gradients to those of `into`. Exact for a part of the keys because `up.lse` is the final one."""


def modifier_refusal(problem: Problem, kinds: tuple[str, ...] = ()) -> str | None:
    """None, or why a kernel that knows these kinds of score modifiers, and no predicates, cannot do the problem."""
    unknown = [kind for kind in problem.score or () if kind not in kinds]
    if unknown:
        return f"it has no {', '.join(unknown)}"
    return "it takes masks that are bands, not functions" if problem.predicate else None


class KernelUnavailable(ValueError, NotImplementedError):
    """A kernel asked for by name cannot do the problem here; the message says why."""


_MODULES = {
    "reference": "reference",
    "triton": "triton_kernel",
    "gluon": "gluon_kernel",
    "flash2": "flash",
    "flash4": "flash",
    "cudnn": "aten",
    "aten": "aten",
    "flex": "flex",
}
KERNEL_NAMES = ("auto", *_MODULES)


def check_kernel_name(name: str) -> None:
    """Raises ValueError unless `name` is a kernel, "auto", or a pair FORWARD+BACKWARD of kernels."""
    for part in name.split("+", 1) if "+" in name else [name]:
        if part not in (_MODULES if "+" in name else KERNEL_NAMES):
            raise ValueError(f"kernel {part!r} is not one of {', '.join(KERNEL_NAMES)}, nor a pair such as triton+flash2")


def get_kernel(name: str) -> Kernel:
    """The kernel of that name. Raises ValueError for a name that is none."""
    if name not in _MODULES:
        raise ValueError(f"kernel {name!r} is not one of {', '.join(KERNEL_NAMES)}")
    return import_module(f"ring_attn.kernels.{_MODULES[name]}").KERNELS[name]


@lru_cache(maxsize=1024)
def resolve(name: str, problem: Problem, quietly: bool = False) -> Kernel:
    """The kernel for a problem: the one named, or under "auto" the fastest that supports it, by `order_for`.

    `name` may be a pair such as triton+flash2: the first for the forward, the second for the backward.

    Raises KernelUnavailable (a ValueError) with the reason where a named kernel cannot do it. What "auto" chose, and why not
    the ones before it, is logged once for a problem, unless it is only asked about, `quietly`.
    """
    if "+" in name:
        name = name.split("+", 1)[problem.direction == "backward"]
    if name != "auto":
        kernel = get_kernel(name)
        reason = kernel.supports(problem)
        if reason is not None:
            raise KernelUnavailable(
                f"kernel {name!r} cannot do this {problem.direction}: {reason}; kernel='auto' picks one that can"
            )
        return kernel
    refused = []
    of_order = problem.device, problem.direction, problem.kind, problem.head_dim, problem.rows
    for candidate in order_for(*of_order, brief=problem.brief):
        kernel = get_kernel(candidate)
        reason = kernel.supports(problem)
        if reason is None:
            if not quietly:
                logger.info("%s kernel: %s%s", problem.direction, candidate, "".join(f"; not {n}: {r}" for n, r in refused))
            return kernel
        refused.append((candidate, reason))
    raise KernelUnavailable("no kernel can do this: " + "; ".join(f"{n}: {r}" for n, r in refused))
