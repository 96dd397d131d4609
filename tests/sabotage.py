"""Breaks the code on purpose: every sabotage here must turn the matrix red.

`python -m tests.sabotage` prints how many cases of the matrix notice each; tests/test_sabotage.py fails where none does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from unittest.mock import patch

from ring_attn import attention, exchange, mask, plan, tiles
from ring_attn.comm.local import LocalTransport
from ring_attn.comm.transport import Pending, Pieces
from ring_attn.exchange import base, gather
from ring_attn.kernels import Upstream, reference
from tests.matrix import Case, cases, check, simulated
from tests.support import forget_plans


def skip_a_visit(direction: str) -> AbstractContextManager:
    tour = exchange.RingExchange.tour

    def broken(self, transport, kv, plan, *, what):
        for visit in tour(self, transport, kv, plan, what=what):
            if direction in what and visit.step == 1 and not visit.last:
                continue
            yield visit

    return patch.object(exchange.RingExchange, "tour", broken)


def swap_two_sources() -> AbstractContextManager:
    meets = exchange.RingExchange.meets

    def broken(self, layout, *rest):
        steps = [list(step) for step in meets(self, layout, *rest)]
        if layout.ring_size > 2:
            steps[1][1], steps[1][2] = steps[1][2], steps[1][1]
        return tuple(tuple(step) for step in steps)

    return patch.object(exchange.RingExchange, "meets", broken)


def swap_gathered_sources() -> AbstractContextManager:
    gathered = LocalTransport.all_gather

    def broken(self, shards, *, what="all-gather"):
        pending = gathered(self, shards, what=what)
        first, *others = pending.received
        return Pending([*others, first], pending.wait, what) if "KV" in what else pending

    return patch.object(LocalTransport, "all_gather", broken)


def send_gradients_one_rank_too_far() -> AbstractContextManager:
    shift = LocalTransport.shift

    def broken(self, shards, offset=1, *, what="shift"):
        return shift(self, shards, offset + ("home" in what), what=what)

    return patch.object(LocalTransport, "shift", broken)


def scatter_gradients_one_rank_too_far() -> AbstractContextManager:
    scatter = LocalTransport.reduce_scatter

    def broken(self, parts, *, what="reduce-scatter"):
        return scatter(self, [[*row[1:], row[0]] for row in parts], what=what)

    return patch.object(LocalTransport, "reduce_scatter", broken)


def pull_from_the_next_rank() -> AbstractContextManager:
    pull = LocalTransport.pull

    def broken(self, shards, parts, *, what="pull"):
        return pull(self, [*shards[1:], shards[0]], parts, what=what)

    return patch.object(LocalTransport, "pull", broken)


def pull_a_row_too_late() -> AbstractContextManager:
    pull = LocalTransport.pull

    def broken(self, shards, parts, *, what="pull"):
        return pull(self, [Pieces(x.roll(-1, 1) for x in beside) for beside in shards], parts, what=what)

    return patch.object(LocalTransport, "pull", broken)


def push_to_the_next_rank() -> AbstractContextManager:
    push = LocalTransport.push

    def broken(self, grads, parts, rows, *, what="push"):
        moved = [[part._replace(rank=(part.rank + 1) % self.ring_size) for part in row] for row in parts]
        return push(self, grads, moved, rows, what=what)

    return patch.object(LocalTransport, "push", broken)


def forget_a_wait() -> AbstractContextManager:
    return patch.object(Pending, "wait", lambda self: self.received)


def write_into_what_was_sent() -> AbstractContextManager:
    pack = base.pack

    def aliased(pair):
        """A message that shares memory with the first message of this call, as a buffer reused too early does."""
        rows = pack(pair)
        return _SHARED.setdefault((rows.shape, rows.dtype), rows.clone()).copy_(rows)

    stack = ExitStack()
    for module in (base, gather):
        stack.enter_context(patch.object(module, "pack", aliased))
    return stack


_SHARED: dict = {}


def lse_in_base_2() -> AbstractContextManager:
    forward = reference.ReferenceKernel.forward

    def broken(self, *args, **kwargs):
        partial = forward(self, *args, **kwargs)
        return partial._replace(m=partial.m * math.log2(math.e)) if kwargs["out"] is not None else partial

    return patch.object(reference.ReferenceKernel, "forward", broken)


def drop_a_column() -> AbstractContextManager:
    masked = reference._Block._masked

    def broken(self, scores):
        found = masked(self, scores)
        if found.shape[-1] > 1:
            found[..., -1] = -math.inf
        return found

    return patch.object(reference._Block, "_masked", broken)


def normalise_with_a_local_lse() -> AbstractContextManager:
    """The backward of a visit with another lse than the final one."""
    return patch.object(attention, "Upstream", lambda dout, out, lse, *rest: Upstream(dout, out, lse + 0.01, *rest))


def forget_the_gradient_of_lse() -> AbstractContextManager:
    return patch.object(attention, "Upstream", lambda dout, out, lse, dlse, rest: Upstream(dout, out, lse, None, rest))


def swap_dk_and_dv() -> AbstractContextManager:
    unpack = base.Widths.unpack

    def broken(self, rows):
        k, v = unpack(self, rows)
        return (v, k) if self.d == self.dv else (k, v * 2)

    return patch.object(base.Widths, "unpack", broken)


def forget_documents() -> AbstractContextManager:
    by_document = tiles._by_document
    return patch.object(tiles, "_by_document", lambda pieces, packings: by_document(pieces, []))


def forget_padding() -> AbstractContextManager:
    return patch.object(mask.KeyPadding, "rules", lambda self: (mask.Rule(),) * len(self.lengths or self.starts))


def window_one_too_wide() -> AbstractContextManager:
    return patch.object(mask.Window, "rules", lambda self: (mask.Rule(self.left + 1, self.right),))


def trim_one_row_too_many() -> AbstractContextManager:
    with_band = tiles._with_band

    def broken(q0, q1, k0, k1, lo, hi, batch):
        first = q0 + (q1 - q0 > 1)
        return with_band(first, q1, k0, k1, lo + first - q0, hi + first - q0, batch)

    return patch.object(tiles, "_with_band", broken)


def local_positions() -> AbstractContextManager:
    """Every shard as if it started at position 0."""
    return patch.object(plan.Plan, "__getitem__", _local_plan)


def _local_plan(self, rank_step):
    own = self.layout.shard(0)
    return tiles.tiles(own, [own for _ in self.meets[rank_step[1]][0]], self.mask)


SABOTAGES: dict[str, Callable[[], AbstractContextManager]] = {
    "skip a visit of the forward": lambda: skip_a_visit("forward"),
    "skip a visit of the backward": lambda: skip_a_visit("backward"),
    "swap two sources": swap_two_sources,
    "swap two gathered sources": swap_gathered_sources,
    "send gradients one rank too far": send_gradients_one_rank_too_far,
    "scatter gradients one rank too far": scatter_gradients_one_rank_too_far,
    "pull from the next rank": pull_from_the_next_rank,
    "pull a row too late": pull_a_row_too_late,
    "push to the next rank": push_to_the_next_rank,
    "forget a wait": forget_a_wait,
    "reuse a buffer that is under way": write_into_what_was_sent,
    "lse in base 2": lse_in_base_2,
    "drop a column": drop_a_column,
    "backward with another lse": normalise_with_a_local_lse,
    "forget the gradient of lse": forget_the_gradient_of_lse,
    "swap or scale K and V on the wire": swap_dk_and_dv,
    "forget documents": forget_documents,
    "forget padding": forget_padding,
    "window one too wide": window_one_too_wide,
    "trim one row too many": trim_one_row_too_many,
    "local positions for global ones": local_positions,
}


def red_cases(
    sabotage: Callable[[], AbstractContextManager] | None, ring_size: int = 3, among: Sequence[Case] = ()
) -> Iterator[Case]:
    """The cases of the matrix, or of `among`, whose check fails under a sabotage; only a wrong number counts, not a crash."""
    forget_plans()
    try:
        with sabotage() if sabotage else nullcontext():
            for case in among or cases():
                try:
                    check(case, simulated(case, ring_size))
                except AssertionError:
                    yield case
    finally:
        forget_plans()


def main() -> None:
    total = len(cases())
    for name, sabotage in {"nothing": None, **SABOTAGES}.items():
        print(f"{name:40s} {len(list(red_cases(sabotage))):3d} of {total} cases red")


if __name__ == "__main__":
    main()
