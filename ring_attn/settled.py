"""`Settled`: what a call comes to for tensors of some shapes, found out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from ring_attn.comm.replay import Repeated, Replays
from ring_attn.exchange import Exchange, PullExchange
from ring_attn.kernels import Kernel, KernelUnavailable, Problem, resolve
from ring_attn.plan import Plan


@dataclass(frozen=True)
class Settled:
    """What a call comes to for tensors of some shapes, so that it is found out once. `problem`: of its forward.

    `back`, `plan_back`, `head_parts`: exchange and plan of the backward, and in how many parts of the heads it goes. `home`: in
    what dtype dK and dV go home. `forward_parts`: for how many the forward meets others' KV. `replays`: where calls that come
    again are replayed, see Note [replay] of `ring_attn.comm.replay`, what they share.
    """

    exchange: Exchange
    back: Exchange
    plan: Plan
    plan_back: Plan
    head_parts: int
    home: torch.dtype
    problem: Problem
    kernel_name: str
    forward_parts: int
    replays: Replays | None = None

    def kernel(self, direction: str, *, lse_grad: bool = False) -> Kernel:
        """The kernel for a direction. Raises KernelUnavailable where there is none."""
        wanted = direction, lse_grad, torch.are_deterministic_algorithms_enabled()
        found = self._kernels.get(wanted)
        if found is None:
            problem = replace(self.problem, direction=direction, lse_grad=lse_grad, deterministic=wanted[2])
            found = self._kernels[wanted] = resolve(self.kernel_name, problem)
        return found

    def rounds(self, ranks: Sequence[int]) -> bool:
        """Whether of dK and dV each row that leaves these ranks is what one call of a library made, rounded to the dtype of the
        inputs: then nothing is lost where it travels in that. Whatever the backward is, which may be another on each rank.
        """
        if self.back.name != PullExchange.name:
            return False
        plan, device = self.plan_back, self.problem.device
        visits = [plan[rank, step] for rank in ranks for step in plan.steps_away]
        for lse_grad, deterministic in product((False, True), repeat=2):
            problem = replace(self.problem, direction="backward", lse_grad=lse_grad, deterministic=deterministic)
            try:
                rounds = getattr(resolve(self.kernel_name, problem, quietly=True), "rounds", None)
            except KernelUnavailable:
                continue  # it is not made either
            if rounds is None or not all(rounds(device, tiles) for tiles in visits):
                return False
        return True

    @cached_property
    def overlaps(self) -> bool:
        """Whether the parts of a backward are begun one ahead: only what begins at home need not wait for its KV."""
        return self.head_parts > 1 and self.plan_back.begins_at_home

    @cached_property
    def ends_at_home(self) -> bool:
        """Whether these parts, behind the first, end with the own shard, see Note [parts] of `ring_attn.exchange.pull`."""
        return self.overlaps and self.back.name == PullExchange.name and len(self.plan_back.steps) > 1

    def run(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor | None],
        direction: str,
        *kind: bool,
        lse_grad: bool = False,
    ) -> Sequence[Tensor]:
        """`function(*inputs)`, replayed where it comes again; there is one function for each direction and `kind` of call."""
        if self.replays is None:
            return function(*inputs)
        kind = direction, lse_grad, torch.are_deterministic_algorithms_enabled(), *kind
        found = self._repeated.get(kind)
        if found is None:
            known = self.replays.know(self.kernel(direction, lse_grad=lse_grad).name)
            found = self._repeated[kind] = Repeated(self.replays) if known else False
        return found(function, inputs, f"{self.exchange.name} {direction}, replayed") if found else function(*inputs)

    @cached_property
    def _repeated(self) -> dict[tuple, Repeated | bool]:
        return {}

    @cached_property
    def _kernels(self) -> dict[tuple[str, bool, bool], Kernel]:
        return {}
