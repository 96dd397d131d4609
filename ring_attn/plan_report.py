"""`ring-attn plan`: every step of a tour in words and numbers, and how evenly the work is spread over the ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ring_attn.by_document import ByDocument
from ring_attn.cost import MACHINES, Estimate, Link, Question, Work, asked, estimates
from ring_attn.exchange import EXCHANGE_NAMES, EXCHANGES, get_exchange, make_plan
from ring_attn.layout import LAYOUTS, Layout
from ring_attn.mask import Causal, Documents, Full, Mask, Window
from ring_attn.plan import Plan
from ring_attn.tiles import Tile

MASKS = {"causal": Causal, "full": Full}


@dataclass(frozen=True)
class PlanOptions:
    """Prints for every step and rank the sources, the tiles and the cells of a plan, and draws it.

    Attributes:
        layout: Which positions each rank holds; by-document is made for --documents.
        mask: Who may attend to whom.
        exchange: In which order a rank meets the KV shards: ring, gather, pull, two-way or two-level; auto is what a call of
            these sizes takes.
        explain: Also print what the exchanges that auto chooses among would take, by its formula.
        ranks_per_node: How many neighbouring ranks share a node, for the two-level exchange.
        machine: What lies between the ranks: gpus of one host (symmetric: with copy engines), a network (nodes: with copy
            engines inside hosts), gloo or one process.
        num_heads: Query heads, for the formula.
        num_kv_heads: KV heads, for the formula.
        head_dim: Of queries, keys and values, for the formula.
        ring_size: Number of ranks.
        seq_len: Positions in the whole sequence.
        window: Together with the mask: query i sees only keys j with |i - j| <= window.
        documents: Lengths of packed documents, as 100,200,...; they add up to seq_len.
        max_tiles: How many tiles of a visit are printed; the others are counted.
        plot: A PNG, PDF or SVG file to draw to.
    """

    layout: Literal["contiguous", "striped", "zigzag", "by-document"] = "zigzag"
    mask: Literal["causal", "full"] = "causal"
    exchange: str = "ring"
    ranks_per_node: int | None = None
    explain: bool = False
    machine: Literal["symmetric", "gpus", "network", "nodes", "gloo", "process"] = "symmetric"
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    ring_size: int = 4
    seq_len: int = 65536
    window: int | None = None
    documents: str = ""
    max_tiles: int = 4
    plot: str | None = None


def main(argv: Sequence[str]) -> int:
    """Prints the plan that `argv` asks for; 2 where the options break a rule or name no file to draw to."""
    import tyro

    options = tyro.cli(PlanOptions, args=list(argv), prog="ring-attn plan")
    try:
        plan = plan_of(options)
        if options.plot:
            from ring_attn.plan_plot import draw

            draw(plan, title_of(options), options.plot)
        print(report(plan, options))
        if options.plot:
            print(f"\ndrawn to {options.plot}")
    except (ValueError, OSError) as error:
        print(f"ring-attn plan: {error}", file=sys.stderr)
        return 2
    return 0


def plan_of(options: PlanOptions) -> Plan:
    """The plan asked for. Raises ValueError where layout, mask and sizes do not fit."""
    for name, least in (("max_tiles", 0), ("seq_len", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    if options.exchange not in ("auto", *EXCHANGE_NAMES):
        raise ValueError(f"exchange {options.exchange!r} is not one of auto, {', '.join(EXCHANGE_NAMES)}")
    if options.exchange == "two-level" and options.ranks_per_node is None:
        raise ValueError("the two-level exchange needs --ranks-per-node")
    if options.ranks_per_node is not None and options.exchange not in ("auto", "two-level") and not options.explain:
        raise ValueError(f"--ranks-per-node is for the two-level exchange and for --explain, not for {options.exchange}")
    if options.ranks_per_node is not None and (options.ranks_per_node < 1 or options.ring_size % options.ranks_per_node):
        raise ValueError(f"--ranks-per-node {options.ranks_per_node} must divide --ring-size {options.ring_size}")
    layout, mask = layout_of(options), mask_of(options)
    mask.check(options.seq_len, options.seq_len, 1)
    return make_plan(get_exchange(exchange_of(options), options.ranks_per_node), mask, layout)


def exchange_of(options: PlanOptions) -> str:
    """The exchange asked for; auto's choice is the first of the estimates."""
    return estimates_of(options)[0].exchange if options.exchange == "auto" else options.exchange


def estimates_of(options: PlanOptions) -> tuple[Estimate, ...]:
    """What each exchange would take in bf16, the fastest first."""
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.num_heads % options.num_kv_heads:
        raise ValueError(f"--num-heads {options.num_heads} must be a multiple of --num-kv-heads {options.num_kv_heads}")
    layout = layout_of(options)
    work = Work(1, options.num_heads, options.num_kv_heads, options.head_dim, options.head_dim, itemsize=2)
    return estimates(Question(mask_of(options), layout, layout, work, MACHINES[options.machine], None, options.ranks_per_node))


def explained(options: PlanOptions) -> list[str]:
    """The estimates as text."""
    machine, found = MACHINES[options.machine], estimates_of(options)
    heads = f"{options.num_heads} query and {options.num_kv_heads} KV heads of {options.head_dim}"
    ranks = asked(options.ring_size)
    slowest = f"the slowest {'rank' if len(ranks) == options.ring_size else f'of ranks {ranks}'}"
    lines = [f"on {machine.name}: {machine.tflops:g} TFLOP/s a rank, {heads}, bf16; forward and backward of {slowest}"]
    lines += [_moves(name, machine.link(name, 0)) for name in EXCHANGES]
    if "two-level" in (estimate.exchange for estimate in found):
        places = {"two-level between nodes": 0, "two-level inside nodes": 1}
        lines += [_moves(place, machine.link("two-level", step)) for place, step in places.items()]
    shown = "" if options.exchange in ("auto", found[0].exchange) else f"; the steps above are those of {options.exchange}"
    return [*lines, *(f"  {estimate}" for estimate in found), f"auto takes {found[0].exchange}{shown}"]


def _moves(what: str, link: Link) -> str:
    moves = f"{what} moves {link.gb_s:g} GB/s after {link.latency_us:g} us"
    return f"  {moves}; compute beside it takes {link.slowdown:g} times as long"


def layout_of(options: PlanOptions) -> Layout:
    """The layout asked for."""
    if options.layout != ByDocument.name:
        return LAYOUTS[options.layout](options.seq_len, options.ring_size)
    if not options.documents:
        raise ValueError(f"--layout {ByDocument.name} is made for documents: give their lengths as --documents 100,200,...")
    return ByDocument(lengths=documents_of(options))(options.seq_len, options.ring_size)


def mask_of(options: PlanOptions) -> Mask:
    """The mask asked for, with its window and documents."""
    mask: Mask = MASKS[options.mask]()
    if options.window is not None:
        mask &= Window(options.window, options.window)
    return mask & Documents(lengths=documents_of(options)) if options.documents else mask


def documents_of(options: PlanOptions) -> list[int]:
    """The lengths of the documents."""
    try:
        return [int(length) for length in options.documents.split(",")]
    except ValueError:
        raise ValueError(f"--documents takes whole numbers with commas between them, got {options.documents!r}") from None


def title_of(options: PlanOptions) -> str:
    """The plan in one line."""
    parts = [f"{options.layout} layout", f"{options.mask} mask"]
    parts += [f"window {options.window:,}"] if options.window is not None else []
    parts += [f"{options.documents.count(',') + 1} documents"] if options.documents else []
    return ", ".join(
        [*parts, f"{exchange_of(options)} exchange", f"{options.seq_len:,} positions over {options.ring_size} ranks"]
    )


def report(plan: Plan, options: PlanOptions) -> str:
    """The plan as text: visits step by step, then the balance."""
    lines = [title_of(options)]
    for rank in range(plan.layout.ring_size):
        lines.append(f"  rank {rank} holds {', '.join(map(_positions, plan.layout.shard(rank)))}")
    for step in plan.steps:
        lines += ["", f"step {step}"]
        for rank in range(plan.layout.ring_size):
            lines += _visit(plan, rank, step, options.max_tiles)
    skipped = [str(step) for step in range(len(plan.meets)) if step not in plan.steps]
    if skipped:
        lines += ["", f"steps {', '.join(skipped)} hold no allowed cell for any rank: no KV is sent for them"]
    lines += ["", *explained(options)] if options.explain else []
    return "\n".join([*lines, "", *_balance(plan)])


def _positions(positions: range) -> str:
    if not positions:
        return "nothing"
    every = f" every {positions.step}" if positions.step > 1 else ""
    return f"{positions[0]:,}..{positions[-1]:,}{every}"


def _visit(plan: Plan, rank: int, step: int, max_tiles: int) -> list[str]:
    sources = ", ".join(map(str, sorted({part.rank for part in plan.meets[step][rank]}))) or "nobody"
    found = plan[rank, step]
    head = f"  rank {rank} meets {sources}: {plan.cells(rank, step):>{_width(plan)},} cells"
    lines = [f"{head} in {len(found)} tile{'s' * (len(found) != 1)}"]
    lines += [f"      {_tile(tile)}" for tile in found[:max_tiles]]
    hidden = found[max_tiles:]
    if hidden:
        lines.append(f"      and {len(hidden)} more tiles with {sum(tile.cells for tile in hidden):,} cells")
    return lines


def _width(plan: Plan) -> int:
    return max(len(f"{plan.cells(rank, step):,}") for rank in range(plan.layout.ring_size) for step in plan.steps)


def kind_of(tile: Tile) -> str:
    """`full`, `causal` (bounded above), `anticausal` (bounded below) or `band` (both)."""
    bounded = tile.band.lo is not None, tile.band.hi is not None
    return {(False, False): "full", (False, True): "causal", (True, False): "anticausal", (True, True): "band"}[bounded]


def _tile(tile: Tile) -> str:
    q, kv = tile.q_rows, tile.kv_rows
    left, right = ("open" if side is None else f"{side:,}" for side in tile.window)
    window = "" if kind_of(tile) == "full" else f", window ({left}, {right})"
    return f"{kind_of(tile):10} rows {q.start:,}..{q.stop - 1:,} x {kv.start:,}..{kv.stop - 1:,}: {tile.cells:,} cells{window}"


@dataclass(frozen=True)
class Balance:
    """How evenly a plan spreads its cells. Ranks are taken to meet at the end of each step.

    `ranks`: cells a rank. `steps`: (step, the busiest rank's cells over the mean). `efficiency`: all cells over ring size x
    the busiest rank's cells, summed over the steps; 1 is perfect.
    """

    ranks: tuple[int, ...]
    steps: tuple[tuple[int, float], ...]
    efficiency: float


def balance_of(plan: Plan) -> Balance:
    """The balance of a plan; a step or plan without work counts as even."""
    size = plan.layout.ring_size
    table = {step: [plan.cells(rank, step) for rank in range(size)] for step in plan.steps}
    total, slowest = sum(map(sum, table.values())), sum(map(max, table.values()))
    steps = tuple((step, max(row) * size / sum(row) if sum(row) else 1.0) for step, row in table.items())
    ranks = tuple(sum(row[rank] for row in table.values()) for rank in range(size))
    return Balance(ranks, steps, total / (size * slowest) if slowest else 1.0)


def _balance(plan: Plan) -> list[str]:
    balance = balance_of(plan)
    mean = sum(balance.ranks) / len(balance.ranks)
    width = len(f"{max(balance.ranks):,}")
    lines = ["balance"]
    for rank, cells in enumerate(balance.ranks):
        lines.append(f"  rank {rank}: {cells:>{width},} cells, {cells / mean if mean else 1:.3f} of the mean")
    lines += [f"  step {step}: busiest rank has {ratio:.3f} times the mean" for step, ratio in balance.steps]
    return [*lines, f"  total {sum(balance.ranks):,} cells, efficiency {balance.efficiency:.1%} if ranks meet after every step"]
