"""`ring-attn bench kernels`: every kernel on this GPU, forward and backward: right first, then how fast.

A kernel is timed at a mask only after its result at a small length has passed the 16-bit limits: at most 2x (out) and 3x
(gradients) the error of plain PyTorch in that dtype. Floating-point operations count the allowed cells alone: 4 * d a cell and
head forward, 10 * d backward. Times are those of the GPU, of replays of a CUDA graph: of few rows a kernel takes less than the
host does to ask for it, which differs from machine to machine and is hidden where the host runs ahead.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ring_attn.bench.results import Row, append, check_folders, draw, machine, table, write_order
from ring_attn.bench.timing import captured, last_of_some, timed
from ring_attn.check import rel_error
from ring_attn.kernels import KERNEL_NAMES, Kernel, Problem, Upstream, get_kernel, resolve
from ring_attn.kernels.sums import Grads
from ring_attn.mask import Causal, Documents, Full, Mask, Window
from ring_attn.partial import accumulator_dtype
from ring_attn.score import Cells, Scores
from ring_attn.tiles import Tile, tiles

GATE_ROWS = 1283
OUT_LIMIT, GRAD_LIMIT = 2.0, 3.0


@dataclass(frozen=True)
class KernelBenchOptions:
    """Times the kernels of one rank's visit and appends a row a measurement to a results file.

    Attributes:
        kernels: Kernel names with commas between them; "all" for every one.
        masks: Of causal, full, window (1,024 keys back) and documents (packed, log-normal lengths).
        lengths: Sequence lengths.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Head dimension of q, k and v.
        dtype: Of the inputs.
        repeats: Timed rounds over all kernels, of which the median counts.
        results: A JSONL file that rows are appended to; empty for none.
        plot: A PNG file to draw TFLOP/s over length to; empty for none.
        table: Write the order that kernel="auto" goes by for these masks, this head dim and this GPU.
    """

    kernels: str = "all"
    masks: tuple[Literal["causal", "full", "window", "documents"], ...] = ("causal", "full", "window", "documents")
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    repeats: int = 7
    results: str = ""
    plot: str = ""
    table: bool = False


def main(argv: Sequence[str]) -> int:
    """Prints a table and returns 0, or 1 where a kernel that claims a problem got it wrong."""
    import tyro

    options = tyro.cli(KernelBenchOptions, args=list(argv), prog="ring-attn bench kernels")
    if not torch.cuda.is_available():
        print(
            "ring-attn bench kernels times GPU kernels, and torch sees no GPU here; ring-attn check needs none", file=sys.stderr
        )
        return 2
    try:
        check_folders(options)
        kernels = [get_kernel(name) for name in _names(options)]
    except ValueError as error:
        print(f"ring-attn bench kernels: {error}", file=sys.stderr)
        return 2
    rows = [row for mask in options.masks for row in bench(kernels, mask, options)]
    print(table(rows, options))
    if options.results:
        append(rows, options, machine())
    if options.plot:
        draw(rows, options)
    if options.table:
        write_order(rows, options)
    return int(any(row.why_not and row.why_not.startswith("wrong") for row in rows))


def bench(kernels: Sequence[Kernel], mask_name: str, options: KernelBenchOptions) -> list[Row]:
    """The measurements of kernels under one mask, at every length and in both directions."""
    rows = []
    for direction in ("forward", "backward"):
        problem = problem_of(mask_name, options, direction)
        reasons = {one: one.supports(problem) or gate(one, mask_name, options, direction) for one in kernels}
        right = [kernel for kernel, reason in reasons.items() if reason is None]
        for length in options.lengths:
            auto = resolve("auto", problem_of(mask_name, options, direction, length)).name
            timed_rows = measure(right, mask_name, length, direction, options)
            rows += [replace(row, auto=row.kernel == auto) for row in timed_rows]
            rows += [Row(one.name, direction, mask_name, length, why_not=reason) for one, reason in reasons.items() if reason]
    return rows


def problem_of(mask_name: str, options: KernelBenchOptions, direction: str, length: int = GATE_ROWS) -> Problem:
    dims = options.heads, options.kv_heads, options.head_dim, options.head_dim
    kind = {"left_bounded": mask_name == "window", "kind": mask_name, "rows": length}
    return Problem(direction, "cuda", getattr(torch, options.dtype), *dims, **kind)


def mask_of(name: str, length: int, window: int = 1024, documents: Sequence[int] | None = None) -> Mask:
    """The mask of that name at that length. `window`: how far it reaches; `documents`: their lengths where not log-normal."""
    match name:
        case "full":
            return Full()
        case "causal":
            return Causal()
        case "window":
            return Causal() & Window(window)
        case "documents":
            return Causal() & Documents(lengths=document_lengths(length) if documents is None else documents)
    raise ValueError(f"mask {name!r} is not one of causal, full, window, documents")


def document_lengths(length: int, multiple: int = 1, scale: float = 1.0) -> list[int]:
    """Multiples of `multiple` that add up to `length`, log-normal about 2,048 * scale and at most a quarter of it."""
    generator, lengths = random.Random(0), []
    while (left := length - sum(lengths)) > 0:
        wanted = min(left, length // 4, int(scale * generator.lognormvariate(7.6, 1.0)))
        lengths.append(max(1, wanted // multiple) * multiple)
    return lengths


def gate(kernel: Kernel, mask_name: str, options: KernelBenchOptions, direction: str) -> str | None:
    """None where the kernel's result at a small length is within the limits, else what is wrong."""
    visit = Visit.random(mask_name, GATE_ROWS, options)
    exact = visit.dense(torch.float64)
    plain = visit.dense(visit.q.dtype)
    found = visit.run(kernel) if direction == "backward" else [visit.forward(kernel)]
    limits = (OUT_LIMIT, GRAD_LIMIT, GRAD_LIMIT, GRAD_LIMIT)
    for name, x, ref, other, limit in zip(("out", "dq", "dk", "dv"), found, exact, plain, limits, strict=False):
        ratio = rel_error(x, ref) / rel_error(other, ref)
        if not ratio <= limit:
            return f"wrong: {name} has {ratio:.3g} times the error of plain PyTorch, the limit is {limit:g}"
    return None


@dataclass
class Visit:
    """One rank's visit of its own shard."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    tiles: tuple[Tile, ...]
    scale: float
    score: Scores | None = None

    @classmethod
    def random(cls, mask_name: str, length: int, options: KernelBenchOptions) -> Visit:
        heads = options.heads, options.kv_heads, options.kv_heads, options.heads
        generator = torch.Generator("cuda").manual_seed(0)
        make = {"generator": generator, "device": "cuda", "dtype": getattr(torch, options.dtype)}
        tensors = [torch.randn(1, length, h, options.head_dim, **make) for h in heads]
        found = tiles((range(length),), [(range(length),)], mask_of(mask_name, length))
        return cls(*tensors, found, options.head_dim**-0.5)

    @property
    def cells(self) -> int:
        return sum(tile.cells for tile in self.tiles)

    def forward(self, kernel: Kernel, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(self.dout) if out is None else out
        made = kernel.forward(self.q, self.k, self.v, self.tiles, scale=self.scale, score=self.score, out=out)
        self.lse = made.lse
        return made.acc

    def grads(self, targets: Sequence[Tensor] = ()) -> Grads:
        """Where a backward adds; `targets`: where dq, dk and dv will be written."""
        dtype = accumulator_dtype(self.q.dtype)
        of_scores = () if self.score is None else tuple(torch.zeros_like(x, dtype=dtype) for x in self.score.tensors())
        found = Grads.like(self.q, self.k, self.v, of_scores)
        if targets:
            found.q.sum.aim, found.kv.sum.aim = (lambda of=of: of for of in (targets[:1], targets[1:]))
        return found

    def backward(self, kernel: Kernel, up: Upstream, targets: Sequence[Tensor]) -> list[Tensor]:
        """dq, dk and dv in the dtype of `targets`: written there, or as the kernel made them, where that is all of them."""
        into = self.grads(targets)
        kernel.backward(up, self.q, self.k, self.v, self.tiles, scale=self.scale, into=into)
        made = [one.made(of[0].dtype, lambda of=of: of) for one, of in ((into.q.sum, targets[:1]), (into.kv.sum, targets[1:]))]
        return [x for of in made for x in of]

    def run(self, kernel: Kernel) -> list[Tensor]:
        """out, dq, dk, dv."""
        out, dtype = self.forward(kernel), accumulator_dtype(self.q.dtype)
        targets = [torch.empty_like(x, dtype=dtype) for x in (self.q, self.k, self.v)]
        return [out, *self.backward(kernel, Upstream(self.dout, out, self.lse), targets)]

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """out, dq, dk, dv by one plain softmax in `dtype`, with autograd."""
        q, k, v = leaves = [x.to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        group = q.shape[2] // k.shape[2]
        scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)) * self.scale
        if self.score is not None:
            scores = self.score.apply(scores, self._cells())
        p = scores.masked_fill(~self._seen(), -torch.inf).softmax(-1)
        out = torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(group, 2))
        return [out.detach(), *torch.autograd.grad(out, leaves, self.dout.to(dtype))]

    def _cells(self) -> Cells:
        """Of all scores; the rows of a whole sequence are its positions."""
        b, s, h, skv = *self.q.shape[:3], self.k.shape[1]
        numbers = (torch.arange(size, device=self.q.device) for size in (b, h, s, s, skv))
        return Cells(*numbers)

    def _seen(self) -> Tensor:
        seen = torch.zeros(self.q.shape[1], self.k.shape[1], dtype=torch.bool, device=self.q.device)
        for tile in self.tiles:
            i, j = (torch.arange(len(rows), device=self.q.device) for rows in (tile.q_rows, tile.kv_rows))
            offset = j - i.unsqueeze(1)
            lo, hi = tile.bounds
            rows, columns = (slice(r.start, r.stop) for r in (tile.q_rows, tile.kv_rows))
            seen[rows, columns] |= (offset >= lo) & (offset <= hi)
        return seen


def measure(kernels: Sequence[Kernel], mask_name: str, length: int, direction: str, options: KernelBenchOptions) -> list[Row]:
    """A measurement of each kernel: the median of as many rounds over all of them, which a GPU's clock meets alike.

    Or the reason why there is none: what a library does in a call may be nothing that a CUDA graph can hold.
    """
    if not kernels:
        return []
    visit = Visit.random(mask_name, length, options)
    out = visit.forward(kernels[0])
    up = Upstream(visit.dout, out, visit.lse)
    runs = {kernel.name: _run(kernel, visit, up, direction) for kernel in kernels}
    extra = {name: timed(run, 1, visit.q.device)[1] for name, run in runs.items()}
    replays, refused = {}, []
    for name, run in runs.items():
        try:
            replays[name], _ = captured(run)
        except RuntimeError as error:
            refused.append(Row(name, direction, mask_name, length, why_not=f"no CUDA graph can be made of it: {error}"))
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(options.repeats):
        for name, replay in replays.items():
            times[name].append(last_of_some(replay, visit.q.device))
    per_cell = 4 if direction == "forward" else 10
    flops = per_cell * options.head_dim * options.heads * visit.cells
    ms = {name: statistics.median(taken) for name, taken in times.items()}
    return [Row(n, direction, mask_name, length, ms[n], flops / ms[n] / 1e9, extra[n] / 2**30) for n in ms] + refused


def _run(kernel: Kernel, visit: Visit, up: Upstream, direction: str) -> Callable[[], object]:
    """What is timed of a kernel: a forward or a backward, to results in the dtype of the inputs."""
    if direction == "forward":
        return lambda: visit.forward(kernel, up.out)
    targets = [torch.empty_like(x) for x in (visit.q, visit.k, visit.v)]
    return lambda: visit.backward(kernel, up, targets)


def _names(options: KernelBenchOptions) -> list[str]:
    if options.kernels == "all":
        return [name for name in KERNEL_NAMES if name not in ("auto", "reference")]
    return options.kernels.split(",")
