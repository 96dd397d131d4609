"""Every kernel on a GPU against the float64 truth: `python -m tests.gpu.kernels [--quick]`.

In 16 bits an error may be OUT_FACTOR (out) or GRAD_FACTOR (gradients) times the error of plain PyTorch in that dtype: a dense
softmax attention with autograd. lse is computed in fp32 from products that fp32 holds exactly, so its relative error is that
of an fp32 sum and of the hardware's exp2 and log2, about 1e-7 to 1e-6 of its size: 1e-5 leaves room for that and for nothing in
16 bits; where scores are capped, the hardware's tanh has a relative error of 2^-11, and lse one of LSE_LIMIT_CAPPED. In fp32
every tensor keeps FLOAT32_LIMIT, but for the slopes of ALiBi, see Note [slopes].

Note [slopes]: the gradient of a slope is a sum of distance * ds whose ds of a row cancel. delta, which comes from out, and dp
round apart, so that each row keeps about 1e-7 * delta times its distance: 600 where rows see far keys alone, as here, for sums
near the size of one row's spread. A plain softmax, which subtracts what it has of the same dp, has 1e-5 on these problems.

Each pair of kernels runs in processes of its own, so a crash that takes the CUDA context along hides no other pair, and in
several, so that kernels are compiled side by side; a pair's rows are printed as soon as it is done. flash-attn 4 keeps what it
compiled where FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, cycle, product
from pathlib import Path

import torch

from ring_attn.kernels import Problem, get_kernel
from ring_attn.layout import LAYOUTS, Shard
from ring_attn.mask import Causal, Documents, Full, KeyPadding, Window
from ring_attn.tiles import Tile, tiles
from tests.gpu.scores import BOUND, NAMES, WIDE, modifying, of_unit_norm, scores_of
from tests.support import (
    BAND_KINDS,
    FLOAT32_LIMIT,
    GRAD_FACTOR,
    OUT_FACTOR,
    band_tiles,
    cells_of,
    dense,
    random_qkv,
    rel_error,
    run_kernel,
    split_tiles,
    truth,
)

PAIRS = (
    ("triton", "triton"),
    ("gluon", "triton"),
    ("triton", "flash2"),
    ("flash2", "flash2"),
    ("flash4", "flash4"),
    ("aten", "aten"),
    ("cudnn", "cudnn"),
    ("cudnn", "flash2"),
    ("flex", "flex"),
    ("reference", "reference"),
)
PARTS = {"triton": 6, "gluon": 16, "flash4": 16, "flex": 8}  # processes for a pair whose forward is this; two for the others
GRADS = ("dq", "dk", "dv")
TENSORS = ("out", *GRADS, "lse")
HEADING = " ".join(["forward+backward  dtype     d       cases ", *(f"{name:>7s}" for name in TENSORS)])
LSE_LIMIT, LSE_LIMIT_CAPPED = 1e-5, 1e-3
SLOPES_LIMIT = 1e-4
HALF = (torch.bfloat16, torch.float16)
HEADS = ((4, 4), (16, 2), (4, 1))
SIZES = ((515, 643), (643, 260))
OWN = {"triton", "reference"}  # no limits on head dims, fp32, and a gradient through lse


@dataclass(frozen=True)
class Case:
    kind: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    heads: tuple[int, int]
    size: tuple[int, int]
    visits: int = 1
    outliers: bool = False
    lse_grad: bool = False
    seed: int = 1
    score: str = ""  # one of tests.gpu.scores.NAMES

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles of its kind; those of a random kind are drawn from its seed."""
        return random_tiles(self.seed, *self.size) if self.kind == "random" else band_tiles(self.kind, *self.size)

    def problem(self, direction: str) -> Problem:
        left_bounded = any(tile.band.lo is not None for tile in self.tiles)
        lse_grad = self.lse_grad and direction == "backward"
        dims = self.head_dim, self.v_head_dim
        kinds = scores_of(self.score, self.heads[0], "cpu").kinds or None
        return Problem(
            direction, "cuda", self.dtype, *self.heads, *dims, left_bounded=left_bounded, lse_grad=lse_grad, score=kinds
        )

    def __str__(self) -> str:
        flags = " outliers" * self.outliers + " dlse" * self.lse_grad
        sizes = f"{self.size[0]}x{self.size[1]} d {self.head_dim}/{self.v_head_dim} heads {self.heads[0]}/{self.heads[1]}"
        return f"{self.kind} {self.score} {_word(self.dtype)} {sizes} visits {self.visits}{flags}"


@dataclass
class Row:
    """What became of one pair, dtype and head dim: the worst ratio (16 bits) or error (fp32) of each tensor."""

    pair: str
    dtype: str
    dims: str
    cases: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def cases(pair: tuple[str, str], quick: bool) -> Iterator[Case]:
    """All that a pair is asked to do; what it refuses, it refuses itself."""
    if pair[0] == "flex":
        yield from cases_to_compile(quick)
        return
    sizes, visits, heads = cycle(SIZES), cycle((1, 1, 2)), cycle(HEADS)
    for dtype in HALF:
        for dim in (64, 80, 128):
            for kind in BAND_KINDS:
                for h in [next(heads)] if quick else HEADS:
                    yield Case(kind, dtype, dim, dim, h, next(sizes), next(visits))
            yield Case("causal", dtype, dim, dim, (4, 2), SIZES[0], outliers=True)
    for seed in range(20 if quick else 200):
        yield random_case(seed, set(pair) <= OWN)
    if set(pair) <= OWN | {"cudnn"}:
        for dims in ((64, 128), (128, 64)):
            for kind in ("full", "causal", "documents"):
                yield Case(kind, torch.bfloat16, *dims, next(heads), next(sizes), next(visits))
    if not set(pair) <= OWN:
        kinds, scores = ("causal", "strict", "batch rows", "many"), ("softcap", "wide softcap")
        for dtype, dim, kind, score in product(HALF, (64, 128), kinds, scores):
            yield Case(kind, dtype, dim, dim, next(heads), next(sizes), next(visits), score=score)
        return
    for dtype in HALF:
        for dim in (33, 256):
            for kind in ("full", "causal", "far window"):
                yield Case(kind, dtype, dim, dim, next(heads), next(sizes), next(visits))
    for dims in ((64, 64), (128, 128), (33, 33), (80, 48)):
        for kind in BAND_KINDS:
            yield Case(kind, torch.float32, *dims, next(heads), next(sizes), next(visits))
    for dtype in (torch.bfloat16, torch.float32):
        for kind in ("causal", "many"):
            yield Case(kind, dtype, 64, 64, (4, 2), next(sizes), 2, lse_grad=True)
    for (dtype, dim), score in product(
        [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 128), (torch.float32, 64)], NAMES
    ):
        for kind in ("causal", "strict", "batch rows", "many"):
            yield Case(kind, dtype, dim, dim, next(heads), next(sizes), next(visits), score=score)


def cases_to_compile(quick: bool) -> Iterator[Case]:
    """Few of what compiles anew, which takes seconds: dtypes, head counts and dims, scores; and bands and sizes for each."""
    kinds = ("causal", "many") if quick else ("causal", "strict", "far window", "batch rows", "many")
    sizes, visits = cycle(SIZES), cycle((1, 2))
    for (dtype, d, dv), heads in zip(
        [(torch.bfloat16, 128, 128), (torch.float16, 80, 48), (torch.float32, 64, 64)], HEADS, strict=True
    ):
        for kind in kinds:
            yield Case(kind, dtype, d, dv, heads, next(sizes), next(visits))
            yield Case(kind, dtype, d, dv, heads, next(sizes), next(visits), lse_grad=True)
    for score in ("softcap", "alibi, softcap", "function"):
        for kind in kinds:
            yield Case(kind, torch.bfloat16, 64, 64, (8, 2), next(sizes), next(visits), score=score)


def random_case(seed: int, any_head_dim: bool) -> Case:
    """A problem drawn from a seed: masks, layouts, head counts, sizes, visits and outliers."""
    rng = random.Random(seed)
    dim = rng.choice((16, 24, 40, 64, 72, 96, 128, 192) if any_head_dim else (64, 128))
    group = rng.choice((1, 4, 8))
    heads = group * rng.choice((1, 2)), 1
    heads = (heads[0] * 2, 2) if rng.random() < 0.5 else heads
    size = rng.randint(2, 700), rng.randint(2, 900)
    return Case("random", rng.choice(HALF), dim, dim, heads, size, rng.randint(1, 3), rng.random() < 0.2, seed=seed)


def random_tiles(seed: int, num_q: int, num_kv: int) -> tuple[Tile, ...]:
    """What some rank of some ring meets: `num_q` query rows of one shard against `num_kv` rows of others, as far as they go."""
    rng = random.Random(seed)
    ring_size = rng.randint(1, 5)
    layout_class = rng.choice(tuple(LAYOUTS.values()))
    rows = max(num_q, -(-num_kv // ring_size))
    layout = layout_class((rows + rows % 2) * ring_size, ring_size)
    mask = rng.choice((Full(), Causal(), Causal(), Window(rng.randint(0, rows), rng.choice((0, 0, 5, None)))))
    if rng.random() < 0.4:
        cuts = sorted(rng.choices(range(layout.seq_len + 1), k=rng.randint(1, 12)))
        mask = mask & Documents(cu_seqlens=[0, *cuts, layout.seq_len])
    if rng.random() < 0.2:
        mask = mask & KeyPadding([rng.randint(0, layout.seq_len), layout.seq_len])
    sources = rng.sample(range(ring_size), rng.randint(1, ring_size))
    q_shard = _first(layout.shard(rng.randrange(ring_size)), num_q)
    left, kv_shards = num_kv, []
    for source in sources:
        kv_shards.append(_first(layout.shard(source), left))
        left -= sum(map(len, kv_shards[-1]))
    return tiles(q_shard, kv_shards, mask)


def _first(shard: Shard, count: int) -> Shard:
    """The first rows of a shard."""
    taken = []
    for positions in shard:
        taken.append(positions[: max(0, count - sum(map(len, taken)))])
    return tuple(taken)


def check_pair(pair: tuple[str, str], quick: bool = False, part: int = 0, parts: int = 1) -> list[Row]:
    """Runs every case of a pair (forward kernel, backward kernel), or one of several parts of them."""
    rows: dict[tuple, Row] = {}
    # What compiles alike comes to one process, as far as it may.
    ordered = sorted(cases(pair, quick), key=lambda case: (_word(case.dtype), case.head_dim, case.v_head_dim, case.score))
    for case in ordered[len(ordered) * part // parts : len(ordered) * (part + 1) // parts]:
        dims = str(case.head_dim) if case.head_dim == case.v_head_dim else f"{case.head_dim}/{case.v_head_dim}"
        row = rows.setdefault((case.dtype, dims), Row("+".join(dict.fromkeys(pair)), _word(case.dtype), dims))
        # Whatever a kernel raises is a result here: it belongs in the table, beside the others.
        try:
            _check(case, pair, row)
        except Exception as error:
            row.cases += 1
            row.failures.append(f"{case}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if "CUDA error" in str(error):
                row.failures.append("the CUDA context is lost: no further case of this pair was run")
                break
    return list(rows.values())


def _check(case: Case, pair: tuple[str, str], row: Row) -> None:
    kernels = [get_kernel(name) for name in pair]
    for kernel, direction in zip(kernels, ("forward", "backward"), strict=True):
        reason = kernel.supports(case.problem(direction))
        if reason is not None:
            row.refused.append(f"{kernel.name}: {reason}")
            return
    row.cases += 1
    for name, (ratio, limit) in measure(case, *kernels).items():
        # A NaN is larger than any limit.
        row.worst[name] = max(row.worst.get(name, 0.0), ratio if ratio == ratio else float("inf"))
        if not ratio <= limit:
            row.failures.append(f"{case}: {name} is {ratio:.3g}, the limit is {limit:.3g}")


def measure(case: Case, forward, backward) -> dict[str, tuple[float, float]]:
    """name -> (measure, limit) of out, lse, dq, dk, dv: times plain PyTorch's error in 16 bits, else the relative error."""
    (num_q, num_kv), (h, g) = case.size, case.heads
    shape = 2, num_q, num_kv, h, g, case.head_dim, case.v_head_dim
    q, k, v, dout = random_qkv(*shape, dtype=case.dtype, device="cuda", seed=case.seed, outliers=case.outliers)
    dlse = torch.randn(2, h, num_q, generator=torch.Generator().manual_seed(2)).cuda() if case.lse_grad else None
    tile_list, scale, score = case.tiles, case.head_dim**-0.5, scores_of(case.score, h, "cuda")
    if case.score == "bounded":
        (q, k), scale = of_unit_norm(q, k), BOUND
    if case.score == "wide softcap":
        scale *= WIDE
    visits = split_tiles(tile_list, case.visits)
    exact = truth(q, k, v, dout, visits, scale=scale, dlse=dlse, score=score)
    found = run_kernel(forward, q, k, v, dout, visits, scale=scale, dlse=dlse, backward=backward, score=score)
    errors = {name: rel_error(found[name], exact[name]) for name in exact}
    assert not any(found[name].isnan().any() for name in found), "a NaN was written"
    if case.dtype == torch.float32:
        of_slopes = {name: SLOPES_LIMIT for name in errors if name.startswith("gradient of tensor")}
        return {name: (error, of_slopes.get(name, FLOAT32_LIMIT)) for name, error in errors.items()}
    modify = modifying(score, tile_list, (2, h, num_q, num_kv), "cuda")
    plain = _plain(q, k, v, dout, dlse, cells_of(tile_list, 2, num_q, num_kv, "cuda"), scale, modify)
    # A problem whose rows see one key each has no rounding to compare with; its gradients are zeros.
    ratios = {name: errors[name] / max(rel_error(plain[name], exact[name]), 1e-4) for name in ("out", *GRADS)}
    limits = {"out": OUT_FACTOR} | dict.fromkeys(GRADS, GRAD_FACTOR)
    lse_limit = LSE_LIMIT_CAPPED if "softcap" in case.score else LSE_LIMIT
    return {name: (ratios[name], limits[name]) for name in ratios} | {"lse": (errors["lse"], lse_limit)}


def _plain(q, k, v, dout, dlse, seen, scale, modify) -> dict:
    """out, dq, dk, dv of a dense softmax attention in the inputs' dtype."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = dense(q, k, v, seen, scale, modify)
    target = (out * dout).sum()
    if dlse is not None:
        target = target + (lse.masked_fill(lse == -torch.inf, 0) * dlse.to(lse.dtype)).sum()
    return {"out": out, **dict(zip(GRADS, torch.autograd.grad(target, (q, k, v)), strict=True))}


def table(rows: list[Row]) -> list[str]:
    """One line a row under HEADING: measures are ratios to plain PyTorch's error in 16 bits, relative errors in fp32."""
    lines = []
    for row in rows:
        measures = " ".join(f"{row.worst[n]:7.2g}" if n in row.worst else "      -" for n in TENSORS)
        refused = f"; {len(row.refused)} refused: {row.refused[0]}" if row.refused else ""
        verdict = f"{len(row.failures)} FAILED" if row.failures else "ok" if row.cases else "-"
        lines.append(f"{row.pair:17s} {row.dtype:9s} {row.dims:7s} {row.cases:5d}  {measures}  {verdict}{refused[:110]}")
    return lines


def _in_process(arguments: list[str]) -> list | str:
    """What a child process wrote as JSON, or the end of its error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        command = [sys.executable, "-m", "tests.gpu.kernels", *arguments, "--json", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        except subprocess.TimeoutExpired:
            return "it took more than 900 s"
        return json.loads(path.read_text()) if done.returncode == 0 else f"exit {done.returncode}: {done.stderr[-600:]}"


def joined(parts: Iterable[list[Row]]) -> list[Row]:
    """The rows of a pair's parts, those of one dtype and head dim as one."""
    rows: dict[tuple, Row] = {}
    for row in chain.from_iterable(parts):
        total = rows.setdefault((row.dtype, row.dims), Row(row.pair, row.dtype, row.dims))
        total.cases += row.cases
        total.refused += row.refused
        total.failures += row.failures
        total.worst = {name: max(total.worst.get(name, 0.0), row.worst.get(name, 0.0)) for name in total.worst | row.worst}
    return list(rows.values())


def check_in_processes(pair: tuple[str, str], arguments: list[str], pool: ThreadPoolExecutor) -> Callable[[], list[str]]:
    """Starts a pair's processes; the result prints its rows and gives its failures."""
    name = "+".join(pair)
    count = PARTS.get(pair[0], 2)
    found = [pool.submit(_in_process, ["--pair", name, "--part", f"{i}/{count}", *arguments]) for i in range(count)]

    def finish() -> list[str]:
        results = [future.result() for future in found]
        rows = joined([Row(**row) for row in result] for result in results if not isinstance(result, str))
        print("\n".join(table(rows)), flush=True)
        failures = [f"{row.pair}: {text}" for row in rows for text in row.failures[:3]]
        return failures + [f"{name}: {result}" for result in results if isinstance(result, str)]

    return finish


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer head groupings and random problems")
    parser.add_argument("--pair", action="append", help="only this pair, as forward+backward; may be given several times")
    parser.add_argument("--part", default="0/1", help="which of how many parts of a pair's cases")
    parser.add_argument("--json", help="run the one pair's part in this process, write the result there and print nothing")
    args = parser.parse_args()
    pairs = [tuple(pair.split("+")) for pair in args.pair] if args.pair else PAIRS
    if args.json:
        result = check_pair(*pairs, args.quick, *map(int, args.part.split("/")))
        Path(args.json).write_text(json.dumps([asdict(row) for row in result]))
        return 0
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    print(HEADING)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [check_in_processes(pair, ["--quick"] * args.quick, pool) for pair in pairs]
        failures = [failure for finish in running for failure in finish()]
    print("\n".join(failures[:40]))
    print(f"{len(failures)} failures" if failures else "all within the limits")
    return 1 if failures else 0


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    raise SystemExit(main())
