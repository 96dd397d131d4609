"""In which order a rank meets which KV rows, and how dK and dV get home.

An exchange answers three questions: what each rank `meets` at each step (pure integers, so every rank knows every other's
plan), how KV travels on a `tour` over the steps that are needed, and how gradients go `homeward` to the rank that owns the
keys. Attention knows none of this; it walks the visits.

Note [position order]: where a visit holds KV of several ranks, its rows are in the order of their positions. A mask is then a
band over all of them, so the tiles of a visit are as few as on one device, and so are the calls and merges of a kernel.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ring_attn.exchange.base import Exchange
from ring_attn.exchange.gather import GatherExchange
from ring_attn.exchange.pull import PullExchange
from ring_attn.exchange.ring import RingExchange
from ring_attn.exchange.two_level import TwoLevelExchange
from ring_attn.exchange.two_way import TwoWayExchange
from ring_attn.layout import Layout, total_rows
from ring_attn.mask import Mask
from ring_attn.plan import Plan

# Bytes, from where on a way home takes longer than one more call of a kernel does, which a replay does not ask a host for.
HALVES_FROM, HALVES_FROM_REPLAYED = 64 << 20, 16 << 20

EXCHANGES: dict[str, Exchange] = {exchange.name: exchange for exchange in (RingExchange(), GatherExchange(), PullExchange())}
"""Those among which auto chooses, and beside them "two-level" where nodes are known."""

_BY_NAME = EXCHANGES | {TwoWayExchange.name: TwoWayExchange()}
EXCHANGE_NAMES = (*_BY_NAME, TwoLevelExchange.name)


def get_exchange(name: str, ranks_per_node: int | None) -> Exchange:
    """The exchange of that name; `ranks_per_node` is for the one that knows nodes."""
    return TwoLevelExchange(ranks_per_node) if name == TwoLevelExchange.name else _BY_NAME[name]


def for_backward(exchange: Exchange, plan: Plan, row_home: int, replayed: bool = False) -> Exchange:
    """The exchange of the backward of a forward by that plan; dK and dV of a KV row take `row_home` bytes on their way home.
    `replayed`: when it comes again, as a CUDA graph.
    """
    if isinstance(exchange, GatherExchange):
        return exchange
    most = max((total_rows(parts) for step in plan.steps[1:] for parts in plan.meets[step]), default=0)
    return replace(exchange, halved=most * row_home >= (HALVES_FROM_REPLAYED if replayed else HALVES_FROM))


@lru_cache(maxsize=128)
def make_plan(
    exchange: Exchange, mask: Mask, layout: Layout, kv_layout: Layout | None = None, max_rows: int | None = None
) -> Plan:
    """The plan of an exchange, made once and kept: plans fill lazily and are shared between layers and passes.

    `kv_layout`: that of the keys where it is not `layout`, in cross-attention. `max_rows`: how many KV rows a visit may hold.
    """
    kv_layout = layout if kv_layout is None else kv_layout
    return Plan(layout, kv_layout, mask, exchange.meets(layout, kv_layout, mask, max_rows))
