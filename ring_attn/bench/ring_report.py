"""What `ring-attn bench ring` found: a table, and a drawing of TFLOP/s over length above timelines of the exchanges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ring_attn.bench.results import draw_panels

if TYPE_CHECKING:
    from ring_attn.bench.ring import RingBenchOptions
    from ring_attn.bench.timeline import Timeline


@dataclass(frozen=True)
class RingRow:
    """One measurement of a contender, or the reason why there is none.

    `tflops`: TFLOP/s a process; `bound`: the same without communication; `percent`: the first of the second.
    """

    name: str
    layout: str
    chosen: str
    ring_size: int
    mask: str
    length: int
    direction: str
    ms: float | None = None
    tflops: float | None = None
    extra_gib: float | None = None
    bound: float | None = None
    percent: float | None = None
    why_not: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name} ({self.layout})"


_COLUMNS = ("ms", "TFLOP/s", "% bound", "GiB more")


def table(rows: Sequence[RingRow], options: RingBenchOptions, where: str) -> str:
    """A block a mask and length, a line a contender; then why contenders are missing. `where`: ring, machine and versions."""
    lines = [
        f"{where}, {options.dtype}, head dim {options.head_dim}, {options.heads} query and {options.kv_heads} KV heads",
        "ms: median of the slowest process; TFLOP/s: a process; % bound: of a ring, what it reaches of the same loop without "
        "communication; of the others, of the fastest such loop",
    ]
    for mask, length in dict.fromkeys((row.mask, row.length) for row in rows):
        lines += ["", *_block([row for row in rows if (row.mask, row.length) == (mask, length) and row.ms], mask, length)]
    missing = defaultdict(list)
    for row in rows:
        if row.why_not:
            missing[row.label, row.why_not].append(f"{row.mask} {row.length:,}")
    reasons = (f"{label}: {why_not} [{', '.join(cases)}]" for (label, why_not), cases in missing.items())
    return "\n".join([*lines, "", *reasons])


def _block(rows: Sequence[RingRow], mask: str, length: int) -> Iterator[str]:
    if not rows:
        yield f"{mask}, {length:,} positions: nothing timed"
        return
    by_label = {label: [row for row in rows if row.label == label] for label in dict.fromkeys(row.label for row in rows)}
    widths = max(map(len, by_label)), max(len(row.chosen) for row in rows)
    head = f"  {{:{widths[0]}}}  {{:{widths[1]}}}".format
    directions = dict.fromkeys(row.direction for row in rows)
    yield f"{mask}, {length:,} positions"
    yield head("", "") + "".join(f" | {direction:^36}" for direction in directions)
    yield head("", "taken") + (" | " + "".join(f"{name:>9}" for name in _COLUMNS)) * len(directions)
    for label, mine in by_label.items():
        yield head(label, mine[0].chosen) + "".join(f" | {_cells(row)}" for row in mine)


def _cells(row: RingRow) -> str:
    numbers = (row.ms, ".2f"), (row.tflops, ".3g"), (row.percent, ".0f"), (row.extra_gib, ".2f")
    return "".join(f"{'-' if number is None else format(number, form):>9}" for number, form in numbers)


def draw(rows: Sequence[RingRow], timelines: Sequence[Timeline], options: RingBenchOptions) -> None:
    """Draws TFLOP/s over length, a panel a mask and direction, and below it the visits of each exchange as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(options.masks), 10 + 2 * len(timelines)), layout="constrained")
    heights = [10, *(2 for _ in timelines)]
    above, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_panels(above, rows, options.masks, options.lengths)
    for part, timeline in zip(below, timelines, strict=True):
        _draw_timeline(part.subplots(), timeline)
    figure.savefig(options.plot, dpi=120)


def _draw_timeline(axes, timeline: Timeline) -> None:
    """One line of bars a process, coloured by step; backward bars are hatched."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    steps = sorted({bar.step for bar in timeline.bars})
    colours = {step: colormaps["viridis"]((n + 0.5) / len(steps)) for n, step in enumerate(steps)}
    for bar in timeline.bars:
        hatch = "//" if bar.direction == "backward" else None
        axes.barh(bar.process, bar.stop - bar.start, left=bar.start, color=colours[bar.step], edgecolor="white", hatch=hatch)
    handles = [Patch(color=colour, label=f"step {step}") for step, colour in colours.items()]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(title=f"{timeline.title} (backward hatched)", xlabel="ms", ylabel="process")
    axes.set_yticks(sorted({bar.process for bar in timeline.bars}))
    axes.set_xlim(left=0)
