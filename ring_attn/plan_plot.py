"""The picture of a plan: who meets which cell at which step, and the cells of each rank and step as bars."""

from __future__ import annotations

import numpy as np

from ring_attn.layout import Shard
from ring_attn.plan import Plan
from ring_attn.tiles import Tile

_SAMPLES = 512


def draw(plan: Plan, title: str, path: str) -> None:
    """Draws to `path`: the mask coloured by step and by rank (queries down, keys across), and the work of ranks and steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    by_step, by_rank, bars = figure.subplots(1, 3)
    picture = paint(plan)
    _image(by_step, picture[0], len(plan.meets), "step", plan.layout.seq_len)
    _image(by_rank, picture[1], plan.layout.ring_size, "rank", plan.layout.seq_len)
    _bars(bars, plan)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def paint(plan: Plan, samples: int = _SAMPLES) -> np.ndarray:
    """[2, n, n] int: the step at which each sampled (query, key) cell is met, and the rank that meets it; -1 where masked."""
    where = _where(plan, samples)
    n = int(where.max()) + 1
    picture = np.full((2, n, n), -1)
    for step in plan.steps:
        for rank in range(plan.layout.ring_size):
            for tile in plan[rank, step]:
                rows, columns, allowed = _cells(tile, where)
                window = np.ix_(rows, columns)
                for layer, value in enumerate((step, rank)):
                    picture[layer][window] = np.where(allowed, value, picture[layer][window])
    return picture


def _where(plan: Plan, samples: int) -> np.ndarray:
    """For each position its index in the picture, or -1 where it is not sampled.

    Samples are evenly spaced, each moved by less than a ring size, so that a striped layout shows all its ranks.
    """
    seq_len, ring_size = plan.layout.seq_len, plan.layout.ring_size
    stride = -(-seq_len // samples)
    picked = np.arange(0, seq_len, stride)
    if stride > 1:
        picked = np.unique(np.minimum(picked + np.arange(len(picked)) % ring_size, seq_len - 1))
    where = np.full(seq_len, -1)
    where[picked] = np.arange(len(picked))
    return where


def _cells(tile: Tile, where: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture rows and columns of a tile's sampled positions, and which of their cells the band allows."""
    q, kv = (where[_indices(shard)] for shard in tile.positions)
    i, j = np.flatnonzero(q >= 0), np.flatnonzero(kv >= 0)
    offset = j - i[:, None]
    lo, hi = tile.bounds
    return q[i], kv[j], (offset >= lo) & (offset <= hi)


def _indices(shard: Shard) -> np.ndarray:
    return np.concatenate([np.arange(r.start, r.stop, r.step) for r in shard])


def _colours(count: int):
    from matplotlib import colormaps

    return colormaps["viridis"].resampled(count) if count > 10 else colormaps["tab10"]


def _image(axes, picture: np.ndarray, count: int, what: str, seq_len: int) -> None:
    from matplotlib.patches import Patch

    colours = _colours(count)
    shades = [colours(i) for i in range(count)]
    image = np.array([*shades, (1.0, 1.0, 1.0, 1.0)])[picture]
    axes.imshow(image, extent=(0, seq_len, seq_len, 0), interpolation="nearest")
    axes.set(title=f"cells by {what}", xlabel="key position", ylabel="query position")
    if count <= 16:
        axes.legend(handles=[Patch(color=shades[i], label=f"{what} {i}") for i in range(count)], loc="upper right", fontsize=8)


def _bars(axes, plan: Plan) -> None:
    """One group of bars a step, one bar a rank."""
    size = plan.layout.ring_size
    colours = _colours(size)
    for rank in range(size):
        cells = [plan.cells(rank, step) for step in plan.steps]
        axes.bar(np.arange(len(cells)) + (rank - (size - 1) / 2) * 0.8 / size, cells, 0.8 / size, color=colours(rank))
    axes.set_xticks(range(len(plan.steps)), [str(step) for step in plan.steps])
    axes.set(title="work, one bar a rank", xlabel="step", ylabel="allowed cells")
