"""The Gluon forward on a Hopper GPU, right and fast: `python -m tests.gpu.gluon [--only WORD]`.

Every launch configuration below is held to the float64 truth and to the Triton kernel, each in a process of its own with a
time limit, so a hang or a crash hides no other. Then those that ran are timed beside the Triton kernel, cuDNN and flash-attn 4
where it is installed, in rounds so that a clock that drifts meets them all. The tables come last.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch

from ring_attn.kernels import Problem, get_kernel
from ring_attn.kernels.gluon_forward import GluonConfig
from ring_attn.kernels.gluon_kernel import GluonKernel
from ring_attn.mask import Causal, Documents, Full
from ring_attn.partial import normalize
from ring_attn.tiles import tiles
from tests.support import BAND_KINDS, band_tiles, cells_of, poison_memory, random_qkv, rel_error, split_tiles

_THREE = {"consumers": 3, "registers": (160, 32)}
CONFIGS = {
    "two": GluonConfig(128, 2),
    "three": GluonConfig(128, 3, **_THREE),
    "three-plain": GluonConfig(128, 3, overlap=False, **_THREE),
}
BY_DIM = {64: ("two", "three", "three-plain"), 128: ("two",)}
SHIPPED = {64: "three-plain", 128: "two"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = ((515, 643), (643, 260), (131, 70))
HEADS = ((4, 4), (8, 2), (8, 1))
LENGTHS = (2048, 4096, 8192, 16384, 32768)
LSE_LIMIT = 1e-5


@dataclass(frozen=True)
class Case:
    kind: str
    size: tuple[int, int]
    heads: tuple[int, int]
    visits: int
    note: str = ""

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.size[0]}x{self.size[1]} heads {self.heads[0]}/{self.heads[1]} visits {self.visits} {self.note}"
        )


def cases() -> Iterator[Case]:
    """The easiest first, so that the first failure says most."""
    yield Case("full", (128, 128), (1, 1), 1)
    yield Case("full", (256, 512), (2, 2), 1)
    heads, visits = cycle(HEADS), cycle((1, 2, 3))
    for kind in BAND_KINDS:
        for size in SIZES:
            yield Case(kind, size, next(heads), next(visits))
        next(visits)
    yield Case("full", (1100, 2300), (2, 1), 1)
    yield Case("window", (2300, 2300), (2, 1), 1)
    yield Case("causal", (515, 515), (8, 2), 1, "outliers")
    yield Case("causal", (515, 515), (8, 2), 2, "no out")
    for visits_ in (1, 2):
        yield Case("gaps", (1003, 1003), (8, 2), visits_, "NaN outside tiles")
        yield Case("gaps", (1003, 1003), (4, 4), visits_, "NaN outside tiles")
    # More items than a GPU has multiprocessors, several times over: a program does more than one.
    yield Case("causal", (2300, 2300), (16, 4), 1)
    yield Case("causal", (2300, 2300), (20, 20), 2)
    yield Case("window", (2300, 2300), (40, 8), 3)
    yield Case("gaps", (1003, 1003), (80, 16), 1, "NaN outside tiles")
    yield Case("gaps", (1003, 1003), (48, 48), 2, "NaN outside tiles")
    for note in ("packed", "heads first", "misaligned"):
        yield Case("causal", (515, 515), (4, 4), 1, note)
    yield Case("nothing", (203, 203), (4, 2), 1)
    yield Case("nothing", (203, 203), (4, 2), 2)


def tiles_of(case: Case):
    if case.kind == "nothing":
        return ()
    if case.kind == "gaps":
        lengths = [5, 37, 64, 1, 100, 128, 130, 3, 200, 17, 60, 15, 16, 49, 90, 88]
        mask = Causal() & Documents(lengths=lengths)
        return tuple(tiles((range(case.size[0]),), [(range(case.size[1]),)], mask))[::2]
    return band_tiles(case.kind, *case.size)


def check(name: str, dim: int, dtype_name: str) -> list[str]:
    """One line for every case that fails, then one with the worst errors."""
    kernel, dtype = GluonKernel(CONFIGS[name]), DTYPES[dtype_name]
    worst, lines, count = {"out": 0.0, "beside triton": 0.0, "lse": 0.0}, [], 0
    for case in cases():
        count += 1
        # Whatever a kernel raises is a result here: it belongs in the table, beside the others.
        try:
            found = measure(case, kernel, dim, dtype)
        except Exception as error:
            lines.append(f"{case}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
            if "CUDA" in str(error):
                break
            continue
        worst = {key: max(worst[key], found[key] if found[key] == found[key] else float("inf")) for key in worst}
        if not (found["out"] <= 1.2 and found["beside triton"] <= 1.5 and found["lse"] <= LSE_LIMIT):
            lines.append(f"{case}: {found}")
    summary = " ".join(f"{key} {value:.3g}" for key, value in worst.items())
    verdict = f"{len(lines)} FAILED" if lines else "ok"
    return [f"{name:12s} d{dim:<4d} {dtype_name} {count} cases: {summary}  {verdict}", *(f"    {line}" for line in lines[:6])]


def measure(case: Case, kernel, dim: int, dtype: torch.dtype) -> dict:
    """Error of out against the truth and distance from Triton's, both in Triton's own errors; relative error of lse.

    And where the error is, if it is large: query rows by consumer, dims by half, how many NaN.
    """
    (num_q, num_kv), (h, g) = case.size, case.heads
    q, k, v, _ = random_qkv(2, num_q, num_kv, h, g, dim, dtype=dtype, device="cuda", seed=1, outliers=case.note == "outliers")
    tile_list = tiles_of(case)
    scale = dim**-0.5
    visits = split_tiles(tile_list, case.visits)
    exact_out, exact_lse = _run(get_kernel("reference"), *(x.double() for x in (q, k, v)), visits, scale, case.note)
    if case.kind == "gaps":
        seen = cells_of(tile_list, 2, num_q, num_kv, "cuda")
        q = q.masked_fill(~seen.any(2)[:, :, None, None], torch.nan)
        k, v = (x.masked_fill(~seen.any(1)[:, :, None, None], torch.nan) for x in (k, v))
    q, k, v = _arranged(q, k, v, case.note)
    base, _ = _run(get_kernel("triton"), q, k, v, visits, scale, case.note)
    out, lse = _run(kernel, q, k, v, visits, scale, case.note)
    torch.cuda.synchronize()
    own = max(rel_error(base, exact_out), 1e-6)
    found = {
        "out": rel_error(out, exact_out) / own,
        "beside triton": rel_error(out, base) / own,
        "lse": rel_error(lse, exact_lse),
    }
    if not found["out"] <= 1.2:
        off = (out.double() - exact_out).nan_to_num(1e3).abs()
        found["nan"] = int(out.isnan().sum())
        rows = torch.arange(num_q, device="cuda") // 64 % 2
        found["rows"] = [round(off[:, rows == part].amax().item(), 4) if (rows == part).any() else None for part in (0, 1)]
        found["dims"] = [round(off[..., part].amax().item(), 4) for part in (slice(0, dim // 2), slice(dim // 2, dim))]
        found["batch, row, head, dim of the worst"] = [int(i) for i in torch.unravel_index(off.argmax(), off.shape)]
    return found


def _run(kernel, q, k, v, visits, scale: float, note: str):
    """(out, lse); under "no out" no visit is the last one, and the partial is normalised here."""
    poison_memory(q.device.type)
    state = None
    out = torch.full((*q.shape[:3], v.shape[-1]), torch.nan, dtype=q.dtype, device=q.device)
    for i, visit in enumerate(visits):
        last = i == len(visits) - 1 and note != "no out"
        state = kernel.forward(q, k, v, visit, scale=scale, into=state, out=out if last else None)
    return (normalize(state, q.dtype) if note == "no out" else out), state.lse


def _arranged(q, k, v, note: str):
    """The same values in another memory layout."""
    if note == "packed":
        return torch.stack((q, k, v), 2).unbind(2)
    if note == "heads first":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if note == "misaligned":
        return tuple(torch.cat((x, x), -1)[..., 4 : 4 + x.shape[-1]].copy_(x) for x in (q, k, v))
    return q, k, v


def timing(dim: int, names: list[str]) -> Iterator[str]:
    """Tables of TFLOP/s full/causal by length, bf16, 16 heads, medians of CUDA events."""
    kernels = {name: GluonKernel(CONFIGS[name]) for name in names}
    kernels |= {name: get_kernel(name) for name in ("gluon", "triton", "cudnn")}
    yield f"d{dim}: TFLOP/s full/causal, bf16, 16 heads; {torch.cuda.get_device_name()}, torch {torch.__version__}"
    for name in ("gluon", "flash4"):
        refusal = get_kernel(name).supports(Problem("forward", "cuda", torch.bfloat16, 16, 16, dim, dim))
        yield f"  {name}: {refusal or 'takes it'}"
        kernels |= {} if refusal else {name: get_kernel(name)}
    for length in LENGTHS:
        yield f"  {length} tokens: " + ", ".join(_speeds(dim, length, kernels))
    for name in (*names, "triton"):
        yield carrying(dim, name, kernels[name])


def carrying(dim: int, name: str, kernel, length: int = 8192) -> str:
    """What it costs to carry on from a partial and to leave one, in percent of a full visit that ends in the output."""
    q, k, v, _ = random_qkv(1, length, length, 16, 16, dim, dtype=torch.bfloat16, device="cuda")
    plan, out = tuple(tiles((range(length),), [(range(length),)], Full())), torch.empty_like(q)
    visit = partial(kernel.forward, q, k, v, plan, scale=dim**-0.5)
    state = visit()
    visits = {"only": partial(visit, out=out), "first": visit, "middle": partial(visit, into=state)}
    visits["last"] = partial(visit, into=visit(), out=out)
    times = {which: [] for which in visits}
    for _ in range(6):
        for which, call in visits.items():
            times[which] += [_ms(call) for _ in range(4)][1:]
    only = statistics.median(times["only"])
    costs = [f"{which} {100 * statistics.median(times[which]) / only - 100:+.1f} %" for which in ("first", "middle", "last")]
    return f"  a visit of {length} x {length}, {name}: {only:.3f} ms, " + ", ".join(costs)


def _speeds(dim: int, length: int, kernels: dict) -> list[str]:
    q, k, v, _ = random_qkv(1, length, length, 16, 16, dim, dtype=torch.bfloat16, device="cuda")
    out, speeds = torch.empty_like(q), {name: [] for name in kernels}
    for mask in (Full(), Causal()):
        plan = tuple(tiles((range(length),), [(range(length),)], mask))
        flops = 4 * 16 * dim * sum(tile.cells for tile in plan)
        visits = {name: partial(x.forward, q, k, v, plan, scale=dim**-0.5, out=out) for name, x in kernels.items()}
        times = {name: [] for name in kernels}
        for visit in visits.values():
            for _ in range(3):
                visit()
        for _ in range(4):
            for name, visit in visits.items():
                times[name] += [_ms(visit) for _ in range(4)][1:]
        for name in kernels:
            speeds[name].append(flops / statistics.median(times[name]) / 1e9)
    return [f"{name} {full:.0f}/{causal:.0f}" for name, (full, causal) in speeds.items()]


def _ms(call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def launch_us(dim: int = 128) -> str:
    """Host time of one forward on a small problem, which the GPU does not fill."""
    q, k, v, _ = random_qkv(1, 256, 256, 2, 2, dim, dtype=torch.bfloat16, device="cuda")
    plan, out, found = tuple(tiles((range(256),), [(range(256),)], Full())), torch.empty_like(q), []
    for name, kernel in ((name, get_kernel(name)) for name in ("gluon", "triton")):
        for repeats in (20, 300):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                kernel.forward(q, k, v, plan, scale=0.1, out=out)
            each = (time.perf_counter() - start) / repeats * 1e6
        found.append(f"{name} {each:.0f} us")
    return "host time of a launch: " + ", ".join(found)


def _in_process(arguments: list[str], limit: float) -> tuple[bool, list[str]]:
    """(whether it ended by itself, the lines it printed)."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpu.gluon", *arguments], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        found = (error.stdout or b"").decode().splitlines()
        return False, [f"{' '.join(arguments)}: HUNG, or slower than {limit:.0f} s", *found]
    if done.returncode:
        found = done.stdout.splitlines()
        return False, [f"{' '.join(arguments)}: exit {done.returncode}: {' '.join(done.stderr.split())[-600:]}", *found]
    return True, done.stdout.splitlines()


def _checked(request: tuple) -> tuple[bool, list[str]]:
    """The check of one configuration in a process of its own, printed as soon as it is there."""
    found = _in_process(["--check", ":".join(map(str, request))], 130)
    print("\n".join(found[1]), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    parser.add_argument("--check", help="NAME:DIM:DTYPE in this process")
    parser.add_argument("--time", help="DIM:NAME,NAME,... in this process")
    args = parser.parse_args()
    if args.check:
        name, dim, dtype = args.check.split(":")
        print("\n".join(check(name, int(dim), dtype)))
        return 0
    if args.time:
        dim, names = args.time.split(":")
        # Line by line, so that what hangs takes nothing along.
        print(launch_us(int(dim)), flush=True)
        for line in timing(int(dim), names.split(",")):
            print(line, flush=True)
        return 0
    requests = [(n, d, t) for d, names in BY_DIM.items() for n in names for t in DTYPES if args.only in n]
    # In float16 nothing differs but the type of the products.
    requests = [r for r in requests if r[2] == "bf16" or r[0] == SHIPPED[r[1]]]
    with ThreadPoolExecutor(16) as pool:
        checked = list(pool.map(_checked, requests))
    failed = [lines for ended, lines in checked if not ended or "FAILED" in lines[0]]
    timed = []
    for dim in (128, 64):
        names = [n for (n, d, t), (ended, _) in zip(requests, checked, strict=True) if d == dim and t == "bf16" and ended]
        timed += _in_process(["--time", f"{dim}:{','.join(names)}"], 100)[1] if names else []
        print("\n".join(timed[-12:]), flush=True)
    print(f"{len(failed)} of {len(checked)} checks failed" if failed else "all checks ok")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
