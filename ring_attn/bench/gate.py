"""The gate of `ring-attn bench ring`: who is right, and so may be timed.

Each process holds its rows of out, dq, dk and dv, at a small length on the same ring, against one dense softmax in float64, by
the limits of `ring-attn check`. All of them then know the worst.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from ring_attn.bench.contenders import Case, Contender
from ring_attn.bench.timing import Everyone
from ring_attn.check import NAMES, Problem, Sizes, differentiated, make_problem

logger = logging.getLogger("ring_attn")

AGAIN = 3
"""So many calls go before the second one that is checked, which is then replayed where any is."""

# What somebody else's library may raise, as far as it is about the call and not about this process.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError)


class Gate:
    """Checks contenders, each once for a mask. `case_of` makes the case of a mask at a length."""

    def __init__(self, everyone: Everyone, case_of: Callable[[str, int], Case]) -> None:
        self._everyone, self._case_of = everyone, case_of
        self._faults: dict[tuple[str, ...], str | None] = {}
        self._problems: dict[tuple[str, int], Problem] = {}

    def fault(self, contender: Contender, mask: str) -> str | None:
        """None where every process's rows are within the limits, else what is wrong; every process must ask alike."""
        key = contender.name, contender.layout, contender.chosen, mask
        if key not in self._faults:
            case = self._case_of(mask, contender.gate_rows * self._everyone.transport.ring_size)
            self._faults[key] = self._fault(contender, case)
        return self._faults[key]

    def _fault(self, contender: Contender, case: Case) -> str | None:
        reason, failed, excess = "see what the other processes print", 0.0, [0.0] * len(NAMES)
        try:
            excess = self._excess(contender, case)
        except FAILURES as error:
            reason, failed = f"{type(error).__name__}: {error}", 1.0
        told = self._everyone.tell([failed, *excess]).nan_to_num(nan=torch.inf, posinf=torch.inf)
        if told[:, 0].any():
            if failed and not told[0, 0]:  # the leader's is printed
                logger.warning("%s: %s", contender.name, reason)
            return f"it fails: {reason}"
        worst, where = told[:, 1:].flatten().max(0)
        process, tensor = divmod(int(where), len(NAMES))
        return f"wrong: {NAMES[tensor]} of process {process} has {worst:.3g} times the error allowed" if worst > 1 else None

    def _excess(self, contender: Contender, case: Case) -> list[float]:
        """The errors of this process's rows over what is allowed, by tensor: of a first call or one that comes again."""
        problem = self._problem(case)
        rows = contender.positions(case).to(case.shape.device)
        mine = [x[:, rows] for x in problem.inputs]
        with contender.attention(case) as attend:
            # What comes again may be done otherwise than what is new, and which of them is timed depends on the length.
            found = [differentiated(attend, *mine)]
            for _ in range(AGAIN - 1):
                differentiated(attend, *map(torch.randn_like, mine))
            found.append(differentiated(attend, *mine))
        errors = ([problem.error(name, got[name], rows) for got in found] for name in NAMES)
        return [max((error / limit for error, limit in both), key=lambda x: (x != x, x)) for both in errors]

    def _problem(self, case: Case) -> Problem:
        key = case.name, case.length
        if key not in self._problems:
            shape = case.shape
            sizes = Sizes(case.length, shape.heads, shape.kv_heads, shape.head_dim)
            self._problems[key] = make_problem(case.mask, sizes, shape.device, shape.dtype)
        return self._problems[key]
