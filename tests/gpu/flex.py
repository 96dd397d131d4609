"""Users' functions on a GPU by torch's flex_attention: `python -m tests.gpu.flex [--only NAME ...] [--times]`, a line a check.

On a simulated ring of three in zigzag, beside the reference kernel, against one dense softmax in float64. In 16 bits an error
may be OUT_FACTOR (out) or GRAD_FACTOR (gradients, those of captured tensors too) times that of plain PyTorch in that dtype, in
fp32 FLOAT32_LIMIT, and CAPTURED_LIMIT for captured tensors.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

import ring_attn as ra
from ring_attn.score import Score
from ring_attn.score_mod import over_cells
from tests.support import FLOAT32_LIMIT, GRAD_FACTOR, OUT_FACTOR, dense, random_qkv, rel_error

B, H, G, D = 2, 8, 2, 64
# torch adds the terms of a captured tensor's gradient one by one in fp32, here millions to one number.
CAPTURED_LIMIT = 10 * FLOAT32_LIMIT
REACH = 40


def by_distance(table: Tensor) -> Callable:
    return lambda s, b, h, q, k: s + table[h, (q - k).clamp(-REACH, REACH) + REACH]


def by_documents(table: Tensor) -> Callable:
    """By what is looked up, and counted from the table's end where keys come later."""
    ids = torch.arange(1 << 14, device=table.device) // 100
    return lambda s, b, h, q, k: s + table[h, (ids[q] - ids[k]).clamp(-2, 2)]


def with_slopes(slopes: Tensor) -> Callable:
    return lambda s, b, h, q, k: s - slopes[h] * (q - k).abs()


def capped() -> Callable:
    return lambda s, b, h, q, k: 2 * torch.tanh(s / 2)


def with_a_scalar(gain: Tensor, rows: Tensor) -> Callable:
    """A scalar, and a tensor that is read in two places."""
    return lambda s, b, h, q, k: s * gain + rows[b].cos() * (q % 5) / 5 + rows[b] * (k % 3)


def of_both(slopes: Tensor, keys: Tensor) -> Callable:
    return lambda s, b, h, q, k: torch.where(q >= k, s - slopes[h] * (q - k) / 100, s + keys[k])


def nothing() -> None:
    return None


def documents(t: int, device: str) -> Callable:
    ids = torch.stack([torch.arange(t, device=device) // 100, torch.arange(t, device=device) // 333])
    return lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (k <= q)


def dilated(t: int, device: str) -> Callable:
    """Rows that see no key are among them."""
    return lambda b, h, q, k: ((q - k) % (h + 1) == 0) & (q > 7) & ((q - k).abs() < 300)


def prefix(t: int, device: str) -> Callable:
    return lambda b, h, q, k: (k < 150) | (k <= q)


# A function of scores, the shapes of the tensors that it captures, and a function of the mask.
CASES = {
    "by distance, prefix": (by_distance, lambda t: [(H, 2 * REACH + 1)], prefix),
    "by documents, prefix": (by_documents, lambda t: [(H, 5)], prefix),
    "relative, prefix": (by_distance, lambda t: [(H, 2 * REACH + 1)], prefix),
    "alibi, dilated": (with_slopes, lambda t: [(H,)], dilated),
    "softcap, documents": (capped, lambda t: [], documents),
    "a scalar, documents": (with_a_scalar, lambda t: [(), (B,)], documents),
    "of both, dilated": (of_both, lambda t: [(H,), (t,)], dilated),
    "no score, dilated": (nothing, lambda t: [], dilated),
}
# Our own scores of the same meaning, which are asked for in place of the function.
OWN = {"relative, prefix": ra.RelativeBias, "alibi, dilated": ra.Alibi, "softcap, documents": lambda: ra.SoftCap(2.0)}


def modifier(name: str, captured: list[Tensor]) -> Score | None:
    """What a ring is asked for."""
    if name in OWN:
        return OWN[name](*captured)
    fn = CASES[name][0](*captured)
    return None if fn is None else ra.ScoreMod(fn)


def gradients(attend: Callable, inputs: list[Tensor], tensors: list[Tensor], dout: Tensor) -> list[Tensor]:
    """out and the gradients of q, k, v and the captured tensors."""
    leaves, captured = ([x.detach().clone().requires_grad_() for x in given] for given in (inputs, tensors))
    out = attend(*leaves, captured)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *captured], dout)]


def by_dense(score: Callable, seen: Tensor, cells: list[Tensor]) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor, captured: list[Tensor]) -> Tensor:
        fn, wide = score(*captured), torch.promote_types(q.dtype, torch.float32)
        modify = fn and (lambda scores: over_cells(fn, (0, 0, 0, 0))(scores.to(wide), *cells).to(scores.dtype))
        return dense_by_head(q, k, v, seen, modify or (lambda scores: scores))

    return attend


def dense_by_head(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, modify: Callable) -> Tensor:
    """`dense` with a mask [b, h, t, t]: heads that share a mask with no other go as batch rows of one head."""
    hidden = torch.where(seen, 0.0, -torch.inf).to(q.dtype)
    blind = ~seen.any(-1)
    some_key = hidden.masked_fill(blind.unsqueeze(-1), 0)
    everything = torch.ones(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    out, _ = dense(q, k, v, everything, D**-0.5, lambda scores: modify(scores) + some_key)
    return out.masked_fill(blind.transpose(1, 2).unsqueeze(-1), 0)


def by_ring(kernel: str, name: str, t: int, device: str) -> Callable:
    ring = ra.Ring.simulated(3, "zigzag", kernel=kernel)
    masked = ra.MaskMod(CASES[name][2](t, device))

    def attend(q: Tensor, k: Tensor, v: Tensor, captured: list[Tensor]) -> Tensor:
        given = {"mask": masked, "score": modifier(name, captured)}
        return ring.unshard(ra.ring_attention(*map(ring.shard, (q, k, v)), ring=ring, **given))

    return attend


def check(name: str, dtype: torch.dtype, device: str, t: int) -> list[str]:
    """Prints a line for each kernel; the kernels that were wrong."""
    score, shapes, mask = CASES[name]
    *inputs, dout = random_qkv(B, t, t, H, G, D, dtype=dtype, device=device, seed=1)
    gen = torch.Generator().manual_seed(2)
    tensors = [(torch.randn(shape, generator=gen) * 0.5 + 0.5).to(device) for shape in shapes(t)]
    cells = [torch.arange(size, device=device) for size in (B, H, t, t)]
    seen = over_cells(mask(t, device))(*cells).bool()
    plain = by_dense(score, seen, cells)
    exact = gradients(plain, [x.double() for x in inputs], [x.double() for x in tensors], dout.double())
    rounded = gradients(plain, inputs, tensors, dout)
    wrong = []
    for kernel in ("flex", "reference"):
        start = time.monotonic()
        try:
            found = gradients(by_ring(kernel, name, t, device), inputs, tensors, dout)
        except Exception:  # a report: one failure must not hide the others
            traceback.print_exc()
            wrong.append(f"{name} {kernel}: raised")
            continue
        errors = [rel_error(x, ref) for x, ref in zip(found, exact, strict=True)]
        limits = [FLOAT32_LIMIT] * 4 + [CAPTURED_LIMIT] * (len(errors) - 4)
        if dtype != torch.float32:
            errors = [error / max(rel_error(x, ref), 1e-4) for error, x, ref in zip(errors, rounded, exact, strict=True)]
            limits = [OUT_FACTOR, *[GRAD_FACTOR] * (len(errors) - 1)]
        fine = all(error <= limit for error, limit in zip(errors, limits, strict=True))
        numbers = " ".join(f"{error:8.2g}" for error in errors)
        print(f"{name:22s} {str(dtype)[6:]:9s} {kernel:10s} {numbers}  {'ok' if fine else 'FAILED'}", end="  ")
        print(f"[{time.monotonic() - start:.1f} s]", flush=True)
        if not fine:
            wrong.append(f"{name} {dtype} {kernel}: {numbers}")
    return wrong


def times(name: str, t: int) -> None:
    """Prints what a forward, and a forward and backward, of one device take in ms, after the first, which compiles."""
    _, shapes, mask = CASES[name]
    *inputs, dout = random_qkv(1, t, t, H, G, 128, dtype=torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in inputs]
    tensors = [torch.rand(shape, device="cuda", requires_grad=True) for shape in shapes(t)]
    for kernel in ("flex", "reference"):
        ring, masked = ra.Ring.simulated(1, kernel=kernel), ra.MaskMod(mask(t, "cuda"))
        given = {"ring": ring, "mask": masked, "score": modifier(name, tensors)}
        for way in ("forward", "both"):
            taken = []
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                with torch.set_grad_enabled(way == "both"):
                    out = ra.ring_attention(*leaves, **given)
                if way == "both":
                    torch.autograd.grad(out, [*leaves, *tensors], dout)
                torch.cuda.synchronize()
                taken.append(1e3 * (time.perf_counter() - start))
            print(f"{name:22s} t {t} {kernel:10s} {way:8s} {min(taken[1:]):9.2f} ms, the first {taken[0]:9.0f} ms", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", action="store_true", help="also what 16384 rows take")
    parser.add_argument("--rows", type=int, default=894, help="of the whole sequence, a multiple of 6")
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'no GPU'}; out dq dk dv captured")
    wrong = []
    for dtype, name in product((torch.bfloat16, torch.float32), options.only):
        wrong += check(name, dtype, device, options.rows)
    if options.times:
        for name in options.only:
            times(name, 16384)
    print("\n".join(wrong) if wrong else "all within the limits")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
