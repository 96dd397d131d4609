"""Score modifiers on a GPU: what tests/gpu/kernels.py checks of them, whether rings are right with them, and what they cost.

    python -m tests.gpu.scores                               costs of the Triton kernel
    python -m tests.gpu.scores --check triton reference      whether rings are right with these kernels

Rings of 3 and 4 in one process by ring, gather and pull, in every layout; every score of tests/scores.py, every mask, other
shapes, cross-attention and decoding; both 16-bit dtypes: at most OUT_FACTOR (out) and GRAD_FACTOR (gradients, also those of the
scores' tensors) times the error of the same written plainly in that dtype. The costs are of one visit, causal where nothing is
said, or of a whole call on a ring of one, over those of a visit without modifiers. Without a GPU the same runs in Triton's
interpreter, which shows that it runs and no speed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product, repeat

import torch
from torch import Tensor
from torch.nn.functional import normalize

import ring_attn as ra
from ring_attn.bench import kernels
from ring_attn.bench.timing import last_of_some
from ring_attn.kernels import KernelUnavailable, Upstream, get_kernel
from ring_attn.kernels.triton_kernel import interpreted
from ring_attn.partial import only_sinks
from ring_attn.score import Alibi, Cells, Scores, SoftCap, sort_scores
from ring_attn.tiles import Tile, tiles
from tests.scores import CHECKS, MASKS, WAYS, Sizes, compared, pieces_of, plain, seen_cells
from tests.support import GRAD_FACTOR, OUT_FACTOR, random_qkv, rel_error
from tests.test_decode import filled

BOUND = 3.0  # of "bounded": in every dtype one that the Triton forward uses
DIRECTIONS = "forward", "backward"
NAMES = ("softcap", "wide softcap", "alibi", "softcap, alibi", "alibi, softcap", "function", "bounded")
WIDE = 20.0  # how many times as large scores are under "wide softcap", so that many come near its 50


def scores_of(name: str, heads: int, device: str, bound: float = BOUND, cap: float = 2.0) -> Scores:
    """The modifiers of a name, with slopes for so many heads; but for "bounded" without a bound, which kernels need not use."""
    from tests.kernels.triton_functions import BOW

    slopes = torch.linspace(0.02, 0.3, heads, device=device)
    steps = {"softcap": SoftCap(cap), "wide softcap": SoftCap(50.0), "alibi": Alibi(slopes), "function": BOW}
    chosen = tuple(steps[word] for word in name.split(", ") if word in steps)
    return Scores(chosen, bound=bound) if name == "bounded" else Scores(chosen)


def of_unit_norm(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(normalize(x.double(), dim=-1).to(x.dtype) for x in inputs)


def modifying(score: Scores, tile_list: Sequence[Tile], shape: tuple[int, int, int, int], device: str) -> Callable:
    """What the modifiers do to dense scores of `shape` [b, h, num_q, num_kv], by the positions that tiles give their rows."""
    b, h, *rows = shape
    q_pos, kv_pos = (torch.zeros(size, dtype=torch.int64) for size in rows)
    for tile in tile_list:
        for pos, own, parts in zip((q_pos, kv_pos), (tile.q_rows, tile.kv_rows), tile.positions, strict=True):
            pos[own.start : own.stop] = torch.tensor([x for part in parts for x in part])
    numbers = [torch.arange(size, device=device) for size in (b, h, rows[0])]
    cells = Cells(*numbers[:2], q_pos.to(device), numbers[2], kv_pos.to(device))
    return lambda scores: score.apply(scores, cells)


@dataclass
class Visit(kernels.Visit):
    """One visit of the Triton kernel to time, from these sinks on."""

    sinks: Tensor | None = None

    @staticmethod
    def of(name: str, rows: int, heads: int, dim: int, device: str) -> Visit:
        dtype = torch.bfloat16 if device == "cuda" else torch.float16
        q, k, v, dout = random_qkv(1, rows, rows, heads, heads, dim, dtype=dtype, device=device)
        if name == "cosine":
            q, k = of_unit_norm(q, k)
        mask = kernels.mask_of(name if name in ("window", "documents") else "causal", rows)
        score = scores_of("bounded" if name == "cosine" else name, heads, device, bound=10.0, cap=50.0)
        if score.steps:
            score = sort_scores(score.steps)[1]
        sinks = torch.zeros(heads, device=device) if name == "sinks" else None
        scale = 10.0 if name == "cosine" else dim**-0.5
        return Visit(q, k, v, dout, tiles((range(rows),), [(range(rows),)], mask), scale, score, sinks)

    def attend(self) -> tuple[Tensor, Tensor]:
        """(out, lse)"""
        into = None if self.sinks is None else only_sinks(self.q, self.sinks)
        inputs, out = (self.q, self.k, self.v, self.tiles), torch.empty_like(self.dout)
        partial = get_kernel("triton").forward(*inputs, scale=self.scale, score=self.score, into=into, out=out)
        return out, partial.lse

    def backward(self) -> Callable[[], None]:
        """A backward to run again and again."""
        up, inputs = Upstream(self.dout, *self.attend()), (self.q, self.k, self.v, self.tiles)
        return lambda: get_kernel("triton").backward(up, *inputs, scale=self.scale, score=self.score, into=self.grads())


def whole_call(name: str, score: ra.CosineSim | None, shape: Sequence[int], device: str) -> dict[tuple[str, str], Callable]:
    """What a ring of one does: with what comes before and after its one visit, such as norms and their gradients."""
    ring = ra.Ring.simulated(1, "contiguous", exchange="ring", kernel="triton")
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    *inputs, dout = (torch.randn(shape, dtype=dtype, device=device).requires_grad_() for _ in range(4))
    call = partial(ra.ring_attention, *inputs, ring=ring, score=score)
    out = call()
    backward = partial(torch.autograd.grad, out, inputs, dout.detach(), retain_graph=True)
    return {(name, "forward"): torch.no_grad()(call), (name, "backward"): backward}


def milliseconds(runs: dict[tuple[str, str], Callable[[], object]], device: str, rounds: int) -> dict[tuple, tuple]:
    """(milliseconds, those of "plain" the same way beside it) of all (name, way): medians of some rounds over all of them.

    A clock that drifts meets both. Two rounds do not count.
    """
    taken: dict[tuple, list[tuple[float, float]]] = {key: [] for key in runs}
    for _, key in product(range(2 + rounds), runs):
        taken[key].append(tuple(last_of_some(run, torch.device(device)) for run in (runs[key], runs["plain", key[1]])))
    return {key: tuple(map(statistics.median, zip(*times[2:], strict=True))) for key, times in taken.items()}


def line_of(name: str, kernel: str, device: str, ways: Sequence[tuple] = WAYS) -> tuple[str, bool]:
    """(a line, whether it is right) for a check and a kernel, over all of these ways."""
    check, worst, refused = CHECKS[name], {"out": 0.0, "gradients": 0.0}, ""
    for mask, dtype, way in product(check.masks, (torch.bfloat16, torch.float16), ways):
        try:
            found = times_plain(check.score, mask, kernel, dtype, device, *way, sizes=check.sizes, decodes=check.decodes)
        except KernelUnavailable as refusal:
            refused = f"  without {mask}: {str(refusal)[:60]}"
            continue
        worst["out"] = max(worst["out"], found.pop("out"))
        worst["gradients"] = max([worst["gradients"], *found.values()])
    right = worst["out"] <= OUT_FACTOR and worst["gradients"] <= GRAD_FACTOR
    verdict = refused + ("" if right else "  FAILED")
    return f"{name:38s} {kernel:10s} {worst['out']:5.2f} {worst['gradients']:5.2f}{verdict}", right


def lines(kernel_names: Sequence[str], device: str) -> Iterator[tuple[str, bool]]:
    """Those of every check and kernel, each from one of as many processes as there are CPUs: little of it is the device's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        asked = [(name, kernel) for kernel in kernel_names for name in CHECKS]
        yield from pool.map(line_of, *zip(*asked, strict=True), repeat(device))


def times_plain(
    name: str,
    mask_name: str,
    kernel: str,
    dtype: torch.dtype,
    device: str,
    *way,
    seeds: int = 4,
    sizes: dict[str, object] | None = None,
    decodes: bool = False,
) -> dict[str, float]:
    """Errors of out and every gradient, as multiples of those of plain PyTorch in that dtype; NaN counts as infinite.

    Root mean squares over some problems: of a gradient of few numbers, plain PyTorch may happen to have almost no error once.
    """
    ring_size, exchange, layout = way
    ring = ra.Ring.simulated(ring_size, layout, exchange=exchange, kernel=kernel)
    problems = (Sizes(**({"t": 96, "d": 48, "dv": 48, "dtype": dtype, "seed": n} | (sizes or {}))) for n in range(seeds))
    errors = errors_of_decoding if decodes else both_errors
    found = [errors(name, mask_name, ring, problem, device) for problem in problems]
    ratios = {
        tensor: math.hypot(*(x[tensor][0] for x in found)) / math.hypot(*(x[tensor][1] for x in found)) for tensor in found[0]
    }
    return {tensor: ratio if ratio == ratio else math.inf for tensor, ratio in ratios.items()}


def both_errors(name: str, mask_name: str, ring: ra.Ring, n: Sizes, device: str) -> dict[str, tuple[float, float]]:
    """The errors of out and every gradient, and those of plain PyTorch in the dtype of the problem."""
    dtype, mask, pieces = n.dtype, MASKS[mask_name](n.t), pieces_of(name, n)
    found = compared(ring, n, mask, pieces, lse_grad=False, device=device)
    q, k, v, dout = random_qkv(n.b, n.t, n.keys, n.h, n.g, n.d, n.dv, dtype=dtype, seed=n.seed)
    leaves = [x.requires_grad_() for x in (q, k, v)] + [x for piece in pieces for x in piece.leaves]
    out, _ = plain(*leaves[:3], seen_cells(mask, n), pieces)
    grads = torch.autograd.grad(out, leaves, dout, allow_unused=True, materialize_grads=True)
    found.pop("lse")
    # A gradient is rounded as its tensor is.
    return {
        tensor: (rel_error(x, exact), max(rel_error(rough.to(dtype), exact), 1e-4))
        for (tensor, (x, exact)), rough in zip(found.items(), (out, *grads), strict=True)
    }


@torch.no_grad()
def errors_of_decoding(name: str, mask_name: str, ring: ra.Ring, n: Sizes, device: str) -> dict[str, tuple[float, float]]:
    """The same of the newest 3 positions over a cache, without gradients."""
    dtype, mask, pieces = n.dtype, MASKS[mask_name](n.t), pieces_of(name, n)
    q, k, v, _ = random_qkv(n.b, n.t, n.t, n.h, n.g, n.d, n.dv, dtype=dtype, seed=n.seed)
    rough, exact = (plain(*(x.to(wide) for x in (q, k, v)), seen_cells(mask, n), pieces)[0] for wide in (dtype, torch.float64))
    q, k, v = (x.to(device) for x in (q, k, v))
    scores = [piece.make([leaf.to(device, dtype) for leaf in piece.leaves], ring) for piece in pieces]
    out = ra.tree_decode(q[:, -3:], filled(ring, k, v, n.t // 2), ring=ring, mask=mask, score=scores or None).cpu()
    return {"out": (rel_error(out, exact[:, -3:]), max(rel_error(rough.to(dtype)[:, -3:], exact[:, -3:]), 1e-4))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--check", nargs="+", help="check rings with these kernels, and take no times")
    options = parser.parse_args()
    device = "cpu" if interpreted() or not torch.cuda.is_available() else "cuda"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'interpreted'}, {options}")
    if options.check:
        print("rings in 16 bits: worst error of out and of gradients, as multiples of plain PyTorch's")
        wrong = 0
        for line, right in lines(options.check, device):
            print(line, flush=True)
            wrong += not right
        return int(wrong > 0)
    runs = {}
    for name in ("plain", "window", "documents", "softcap", "alibi", "softcap, alibi", "function", "sinks", "cosine"):
        visit = Visit.of(name, options.rows, options.heads, options.dim, device)
        runs |= {(name, "forward"): visit.attend, (name, "backward"): visit.backward()}
    for name, score in (("a call", None), ("a call, cosine", ra.CosineSim(BOUND))):
        runs |= whole_call(name, score, (1, options.rows, options.heads, options.dim), device)
    found = milliseconds(runs, device, options.repeats)
    for name in dict.fromkeys(name for name, _ in runs):
        ways = {way: found[name, way] for way in DIRECTIONS}
        ways["both"] = tuple(map(sum, zip(*ways.values(), strict=True)))
        costs = (f"{way} {mine:8.3f} ms ({mine / plain - 1:+6.1%})" for way, (mine, plain) in ways.items())
        print(f"{name:15s} {'  '.join(costs)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
