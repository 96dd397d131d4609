"""What a benchmark leaves: rows in a results file, a drawing, and of the kernels a table and the order that auto goes by."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from ring_attn.kernels.order import MEASURED, TAKEN_BY_AUTO

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.figure import FigureBase

    from ring_attn.bench.kernels import KernelBenchOptions

# Distributions whose code kernels run, torch apart.
LIBRARIES = ("triton", "flash-attn", "flash-attn-4")


class Options(Protocol):
    """What the options of every benchmark say."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    results: str


class Measured(Protocol):
    """What a row needs to be drawn; `label` names its curve."""

    label: str
    direction: str
    mask: str
    length: int
    tflops: float | None


@dataclass(frozen=True)
class Row:
    """One measurement of a kernel, or the reason why there is none.

    `extra_gib`: the most it takes beside inputs and results; `auto`: whether kernel="auto" takes it there.
    """

    kernel: str
    direction: str
    mask: str
    length: int
    ms: float | None = None
    tflops: float | None = None
    extra_gib: float | None = None
    why_not: str | None = None
    auto: bool = False

    @property
    def label(self) -> str:
        return self.kernel


def table(rows: list[Row], options: KernelBenchOptions) -> str:
    """Speed and memory by kernel and length, and what auto takes; then why kernels are missing."""
    lines = [
        f"{machine()}, {software()}, {options.dtype}, head dim {options.head_dim}, {options.heads} query and "
        f"{options.kv_heads} KV heads",
        "TFLOP/s (percentage of the fastest), and the most GiB that a kernel takes beside inputs and results",
    ]
    for mask in options.masks:
        for direction in ("forward", "backward"):
            mine = [row for row in rows if (row.mask, row.direction) == (mask, direction)]
            best = {n: max((row.tflops or 0 for row in mine if row.length == n), default=0) for n in options.lengths}
            lines += ["", f"{mask + ' ' + direction:20s}" + "".join(f"{n:>20,}" for n in options.lengths)]
            for kernel in dict.fromkeys(row.kernel for row in mine):
                cells = [row for row in mine if row.kernel == kernel]
                lines.append(f"  {kernel:18s}" + "".join(_cell(row, best[row.length]) for row in cells))
            taken = {row.length: f"{row.kernel} ({100 * row.tflops / best[row.length]:3.0f})" for row in mine if row.auto}
            lines.append(f"  {'auto takes':18s}" + "".join(f"{taken.get(n, '-'):>20s}" for n in options.lengths))
    reasons = sorted({f"{r.kernel} {r.mask} {r.direction}: {r.why_not}" for r in rows if r.why_not})
    return "\n".join([*lines, "", *reasons])


def _cell(row: Row, best: float) -> str:
    if row.tflops is None:
        return f"{'-':>20s}"
    memory = "-" if row.extra_gib is None else f"{row.extra_gib:.3f}"
    return f"{row.tflops:7.0f} ({100 * row.tflops / best:3.0f}) {memory:>6s}"


def machine(device: str = "cuda") -> str:
    """The name of this process's GPU, or how many cores the CPU has."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"


def versions(also: Iterable[str] = ()) -> dict[str, str]:
    """Of torch, and of those of LIBRARIES and the distributions `also` that are installed; none of them is imported."""
    found = {"torch": torch.__version__}
    for name in (*LIBRARIES, *also):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def software(also: Iterable[str] = ()) -> str:
    """The versions in words."""
    return ", ".join(map(" ".join, versions(also).items()))


def commit() -> str:
    """The commit of the source tree that holds this package; the package's version where git keeps no such tree."""
    # Git answers anywhere below a repository: also where an environment is that this package is only installed in.
    with suppress(OSError):
        if _git("ls-files", Path(__file__).name) and (found := _git("rev-parse", "--short", "HEAD")):
            return found
    try:
        return f"ring-attn {version('ring-attn')}"
    except PackageNotFoundError:
        return "unknown"


def _git(*words: str) -> str:
    """What git says in this file's folder. Raises OSError where there is no git."""
    asked = ["git", *words]
    return subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()


def check_folders(options: Options) -> None:
    """Raises ValueError where what is measured could not be written in the end."""
    for name in ("results", "plot"):
        path = getattr(options, name, "")
        if path and not Path(path).parent.is_dir():
            raise ValueError(f"{name} {path!r} cannot be written: there is no folder {str(Path(path).parent)!r}; make it first")


def append(rows: Sequence[DataclassInstance], options: Options, machine: str, also: Iterable[str] = ()) -> None:
    """Adds a JSON line a measurement to the results file, with commit, machine, versions and the shape of the inputs.

    `also`: distributions that take part beside those of `versions`.
    """
    where = {"machine": machine, **versions(also), "commit": commit()}
    shape = {k: getattr(options, k) for k in ("heads", "kv_heads", "head_dim", "dtype")}
    when = {"when": datetime.now(UTC).isoformat(timespec="seconds")}
    with Path(options.results).open("a") as file:
        file.writelines(json.dumps(when | where | shape | asdict(row)) + "\n" for row in rows)


def write_order(rows: list[Row], options: KernelBenchOptions) -> None:
    """Replaces the entries of this GPU, head dim and these masks in the table of ring_attn.kernels.order."""
    everything = json.loads(MEASURED.read_text())
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    timed = [row for row in rows if row.tflops and row.kernel in TAKEN_BY_AUTO]
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(options.masks), 7), layout="constrained")
    draw_panels(figure, rows, options.masks, options.lengths)
    figure.savefig(options.plot, dpi=120)


def draw_panels(figure: FigureBase, rows: Sequence[Measured], masks: Sequence[str], lengths: Sequence[int]) -> None:
    """Draws TFLOP/s over length into a figure: a column a mask, a line of panels a direction, a curve a label."""
    timed = [row for row in rows if row.tflops]
    directions = tuple(dict.fromkeys(row.direction for row in timed))
    if not timed:
        return
    axes = figure.subplots(len(directions), len(masks), sharex=True, squeeze=False)
    for (line, direction), (column, mask) in product(enumerate(directions), enumerate(masks)):
        panel = axes[line, column]
        for number, label in enumerate(dict.fromkeys(row.label for row in timed)):
            mine = [row for row in timed if (row.mask, row.direction, row.label) == (mask, direction, label)]
            points = [(row.length, row.tflops) for row in mine]
            panel.plot(
                *zip(*points, strict=True), f"C{number % 10}{'os^vD'[number // 10 % 5]}-", label=label
            ) if points else None
        panel.set(title=f"{mask}, {direction}", ylim=(0, None), ylabel="TFLOP/s", xlabel="length")
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
        panel.minorticks_off()
    handles = {label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right upper")
