"""Rings of nodes: KV shards travel from node to node, every rank over its own link, and inside a node ranks pull them.

Note [two levels]: at level m a rank holds the shard of its namesake m nodes back, which came over the link between the nodes
while the level before was computed. It attends that shard, and meanwhile pulls what it needs of the other shards that its
node's ranks hold: only a shard's first way into a node takes the slow link, and it takes it once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from ring_attn.comm.transport import Parts, Pending, Pieces, Transport
from ring_attn.exchange.base import KV, Homeward, HowHome, OwnApart, PackedSum, Visit, Widths, at_hand, of_own, own_visits
from ring_attn.kernels.sums import Sum
from ring_attn.layout import Layout, Part
from ring_attn.mask import Mask
from ring_attn.parts import needed
from ring_attn.plan import Meets, Plan


@dataclass(frozen=True)
class TwoLevelExchange:
    """A ring between nodes of `ranks_per_node` neighbouring ranks, and pulls inside them; see Note [two levels].

    Steps 2 m and 2 m + 1 are level m: the shard that the rank holds, then those that its node's other ranks hold. `halved`: the
    own shard is met in halves, as a backward may, of which the last has a step behind all levels; see Note [way home] of
    `ring_attn.exchange.base`.
    """

    ranks_per_node: int
    halved: bool = False
    name = "two-level"

    def meets(self, layout: Layout, kv_layout: Layout, mask: Mask, max_rows: int | None) -> Meets:
        size, everything = layout.ring_size, range(kv_layout.shard_len)
        if size % self.ranks_per_node:
            raise ValueError(f"a ring of {size} ranks is not made of nodes of {self.ranks_per_node} ranks")
        if max_rows is not None and max_rows < len(everything) * self.ranks_per_node:
            raise ValueError(
                f"the two-level exchange holds the shards of a node, {len(everything) * self.ranks_per_node} KV rows, but "
                f"kv_memory is enough for {max_rows}; exchange='pull' and 'gather' take less at a time"
            )
        wanted = [needed(layout, kv_layout, mask, rank) for rank in range(size)]
        first, *rest = own_visits(size, len(everything), self.halved)
        steps = []
        for level in range(size // self.ranks_per_node):
            held = [(rank - level * self.ranks_per_node) % size for rank in range(size)]
            steps.append(tuple((Part(source, everything),) for source in held) if level else first)
            node = [source // self.ranks_per_node for source in held]
            steps.append(
                tuple(
                    tuple(part for part in parts if part.rank // self.ranks_per_node == node[rank] and part.rank != held[rank])
                    for rank, parts in enumerate(wanted)
                )
            )
        return (*steps, *rest)

    def tour(self, transport: Transport, kv: list[KV], plan: Plan, *, what: str) -> Iterator[Visit]:
        unpack, steps, own = Widths.of(kv[0]).unpack, plan.steps, plan.own_rows
        levels = sorted({step // 2 for step in (0, *plan.steps_away)})
        held = at_hand(kv, plan).received
        arriving: Pending[list[Tensor]] | None = None
        for level, following in zip(levels, [*levels[1:], None], strict=True):
            if arriving is not None:
                held = arriving.wait()
            inside = 2 * level + 1
            if inside in steps:
                # First, as this level waits for it: wires that have a queue would keep it behind the slow link.
                pulled = transport.pull(
                    [Pieces((x,)) for x in held], self.holders(plan, inside), what=f"{what}, KV for step {inside}"
                )
            if following is not None:
                away = (following - level) * self.ranks_per_node
                arriving = transport.shift(held, away, what=f"{what}, KV of {following} nodes back")
            if 2 * level in steps:
                yield Visit(2 * level, list(map(unpack, held)) if level else of_own(kv, own[0]), 2 * level == steps[-1])
            if inside in steps:
                yield Visit(inside, list(map(unpack, pulled.wait())), inside == steps[-1])
        if steps[-1] > 0 and steps[-1] in own:
            yield Visit(steps[-1], of_own(kv, own[steps[-1]]), True)

    def holders(self, plan: Plan, step: int) -> Parts:
        """The parts of a step inside a node, by the ranks that hold them then."""
        return _held(plan.meets[step], step // 2 * self.ranks_per_node)

    def homeward(self, transport: Transport, plan: Plan, how: HowHome) -> Homeward:
        return _TwoLevelHomeward(transport, plan, how, self)


@lru_cache(maxsize=256)
def _held(parts: Parts, away: int) -> Parts:
    """The parts, of which each is held by a rank that is `away` further on; kept, as transports keep what they make of them."""
    held = ((part._replace(rank=(part.rank + away) % len(parts)) for part in wanted) for wanted in parts)
    return tuple(map(tuple, held))


class _TwoLevelHomeward(OwnApart):
    """dK and dV are pushed to the rank that holds the shard, and follow it from node to node, one level behind."""

    def __init__(self, transport: Transport, plan: Plan, how: HowHome, exchange: TwoLevelExchange) -> None:
        super().__init__(transport, plan, how)
        self.exchange, self.level = exchange, 0
        self.held: list[PackedSum] = []
        self.pushed: Pending | None = None

    def add(self, visit: Visit) -> None:
        if not self.of_visit:
            return
        level, inside = divmod(visit.step, 2)
        if level != self.level:
            self._leave_for(level)
        if inside:
            self.held = self.held or (self.of_shards(visit) if level else self.own)
            what, parts = f"two-level backward, dK and dV of step {visit.step}", self.exchange.holders(self.plan, visit.step)
            self.pushed = self.transport.push(self.of_visit, parts, self.held, what=what)
        else:
            self.held = self.of_visit
        self.of_visit = []
        if level and visit.step == self.plan.steps_away[-1]:
            self._leave_for(0)

    def collect(self) -> list[Sum]:
        self._close()
        return super().collect()

    def _leave_for(self, level: int) -> None:
        """What the shards of this level gathered goes on to another, 0 being home; at level 0 they are home."""
        self._close()
        if self.level > 0:
            self.add_arrived(self.held)
            away = (level - self.level) * self.exchange.ranks_per_node
            what = f"two-level backward, dK and dV {'on' if level else 'home'} from {self.level} nodes away"
            sent = self.transport.shift([one.packed() for one in self.held], away, what=what)
            self.pending = [(range(self.plan.kv_layout.shard_len), sent)]
        self.held, self.level = [], level

    def _close(self) -> None:
        """Nothing more is pushed to what this level's ranks hold."""
        if self.pushed is not None:
            self.pushed.wait()
            self.pushed = None
