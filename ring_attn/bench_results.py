"""What a kernel benchmark leaves: a table, rows in a results file, a drawing, and the order that kernel="auto" goes by."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ring_attn.kernels.order import MEASURED

if TYPE_CHECKING:
    from ring_attn.bench_kernels import KernelBenchOptions


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none."""

    kernel: str
    direction: str
    mask: str
    length: int
    ms: float | None = None
    tflops: float | None = None
    extra_gib: float | None = None
    why_not: str | None = None


def table(rows: list[Row], options: KernelBenchOptions) -> str:
    """TFLOP/s by kernel and length, with the percentage of the fastest; then why kernels are missing."""
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}, head dim {options.head_dim}, "
             f"{options.heads} query and {options.kv_heads} KV heads: TFLOP/s (percentage of the fastest)"]  # fmt: skip
    for mask in options.masks:
        for direction in ("forward", "backward"):
            mine = [row for row in rows if (row.mask, row.direction) == (mask, direction)]
            best = {n: max((row.tflops or 0 for row in mine if row.length == n), default=0) for n in options.lengths}
            lines += ["", f"{mask + ' ' + direction:20s}" + "".join(f"{n:>13,}" for n in options.lengths)]
            for kernel in dict.fromkeys(row.kernel for row in mine):
                cells = [row for row in mine if row.kernel == kernel]
                lines.append(f"  {kernel:18s}" + "".join(_cell(row, best[row.length]) for row in cells))
    reasons = sorted({f"{r.kernel} {r.mask} {r.direction}: {r.why_not}" for r in rows if r.why_not})
    return "\n".join([*lines, "", *reasons])


def _cell(row: Row, best: float) -> str:
    return f"{'-':>13s}" if row.tflops is None else f"{row.tflops:7.0f} ({100 * row.tflops / best:3.0f})"


def append(rows: list[Row], options: KernelBenchOptions) -> None:
    """Adds a JSON line a measurement to the results file, with commit, GPU and versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit or "unknown"}
    shape = {k: getattr(options, k) for k in ("heads", "kv_heads", "head_dim", "dtype")}
    when = {"when": datetime.now(UTC).isoformat(timespec="seconds")}
    with Path(options.results).open("a") as file:
        file.writelines(json.dumps(when | machine | shape | asdict(row)) + "\n" for row in rows)


def write_order(rows: list[Row], options: KernelBenchOptions) -> None:
    """Replaces the entries of this GPU, head dim and these masks in the table of ring_attn.kernels.order."""
    everything = json.loads(MEASURED.read_text())
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    timed = [row for row in rows if row.tflops]
    places = dict.fromkeys((row.direction, row.mask, row.length) for row in timed)
    made = []
    for direction, mask, length in places:
        mine = [row for row in timed if (row.direction, row.mask, row.length) == (direction, mask, length)]
        order = [row.kernel for row in sorted(mine, key=lambda row: -row.tflops)]
        where = {"direction": direction, "mask": mask, "head_dim": options.head_dim, "length": length}
        made.append(where | {"order": order})
    replaced = {(entry["mask"], entry["head_dim"]) for entry in made}
    kept = [entry for entry in everything.get(capability, []) if (entry["mask"], entry["head_dim"]) not in replaced]
    everything[capability] = kept + made
    lines = [f"  {json.dumps(c)}: [\n    " + ",\n    ".join(map(json.dumps, e)) + "\n  ]" for c, e in everything.items()]
    MEASURED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def draw(rows: list[Row], options: KernelBenchOptions) -> None:
    """Draws TFLOP/s over length, a panel a mask and direction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(options.masks), 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(options.masks), sharex=True, squeeze=False)
    for column, mask in enumerate(options.masks):
        for line, direction in zip(axes[:, column], ("forward", "backward"), strict=True):
            for kernel in dict.fromkeys(row.kernel for row in rows if row.tflops):
                points = [
                    (r.length, r.tflops)
                    for r in rows
                    if (r.kernel, r.mask, r.direction) == (kernel, mask, direction) and r.tflops
                ]
                line.plot(*zip(*points, strict=True), marker="o", label=kernel) if points else None
            line.set(title=f"{mask}, {direction}", ylim=(0, None), ylabel="TFLOP/s", xlabel="length")
            line.set_xscale("log", base=2)
            line.set_xticks(options.lengths, [f"{length // 1024}k" for length in options.lengths])
            line.minorticks_off()
            line.legend()
    figure.savefig(options.plot, dpi=120)
