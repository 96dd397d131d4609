"""`Settled`: what a call comes to for tensors of some shapes, found out once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ring_attn.exchange import Exchange, PullExchange
from ring_attn.kernels import Kernel, Problem, resolve
from ring_attn.plan import Plan


@dataclass(frozen=True)
class Settled:
    """What a call comes to for tensors of some shapes, so that it is found out once. `problem`: of its forward.

    `back`, `plan_back`, `head_parts`: exchange and plan of the backward, and in how many parts of the heads it goes.
    `forward_parts`: for how many the forward meets others' KV.
    """

    exchange: Exchange
    back: Exchange
    plan: Plan
    plan_back: Plan
    head_parts: int
    problem: Problem
    kernel_name: str
    forward_parts: int

    def kernel(self, direction: str, *, lse_grad: bool = False) -> Kernel:
        """The kernel for a direction. Raises KernelUnavailable where there is none."""
        wanted = direction, lse_grad, torch.are_deterministic_algorithms_enabled()
        found = self._kernels.get(wanted)
        if found is None:
            problem = replace(self.problem, direction=direction, lse_grad=lse_grad, deterministic=wanted[2])
            found = self._kernels[wanted] = resolve(self.kernel_name, problem)
        return found

    @cached_property
    def overlaps(self) -> bool:
        """Whether the parts of a backward are begun one ahead: only what begins at home need not wait for its KV."""
        return self.head_parts > 1 and self.plan_back.begins_at_home

    @cached_property
    def ends_at_home(self) -> bool:
        """Whether these parts, behind the first, end with the own shard, see Note [parts] of `ring_attn.exchange.pull`."""
        return self.overlaps and self.back.name == PullExchange.name and len(self.plan_back.steps) > 1

    @cached_property
    def _kernels(self) -> dict[tuple[str, bool, bool], Kernel]:
        return {}
