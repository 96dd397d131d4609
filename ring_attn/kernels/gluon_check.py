"""Whether a kernel agrees with another one here: what the Gluon kernel is asked once a process before it is chosen."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ring_attn.kernels import Kernel
from ring_attn.mask import Causal, Documents
from ring_attn.partial import only_sinks
from ring_attn.score import Scores, SoftCap
from ring_attn.tiles import Tile, tiles

logger = logging.getLogger("ring_attn")

ROWS = 640
# Where each visit's KV ends: one visit, then three, which from nothing and from sinks take every launch a forward has.
VISITS = ((ROWS,), (200, 431, ROWS))
MASK = Causal() & Documents(lengths=[5, 113, 1, 409, 112])
LSE_LIMIT = 1e-4

_found: dict[tuple, str | None] = {}


def check_refusal(
    kernel: Kernel, other: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, *, softcap: bool = False
) -> str | None:
    """`disagreement`, found and logged once; without an answer yet it refuses while a CUDA graph is captured."""
    key = kernel, device, dtype, head_dim, softcap
    if key not in _found:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "it was not checked here yet, and cannot be while a CUDA graph is captured: call it once before"
        _found[key] = disagreement(kernel, other, device, dtype, head_dim, softcap=softcap)
        where = f"{kernel.name} on {device}, {dtype}, head dim {head_dim}{', with a softcap' * softcap}"
        if _found[key] is None:
            logger.info("%s: agrees with %s", where, other.name)
        else:
            logger.warning("%s: %s", where, _found[key])
    return _found[key]


def disagreement(
    kernel: Kernel, other: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, *, softcap: bool = False
) -> str | None:
    """None where `kernel` gives the out and lse of `other` on a small problem, or in words what it does instead.

    The problem: causal, ragged documents, two query heads a KV head, in one visit and carried over three, with sinks and
    without; `softcap`: with a softcap that bends most scores.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(2, ROWS, heads, head_dim, generator=generator, device=device).to(dtype) for heads in (4, 2, 2))
    score = Scores((SoftCap(1.0),)) if softcap else None
    starts = None, torch.randn(4, generator=generator, device=device)
    # Whatever an experimental compiler raises is the answer: other kernels are there to be used.
    try:
        # Before the other's, so that no memory it takes holds the results already.
        found = {(ends, n): _run(kernel, q, k, v, score, ends, sinks) for ends in VISITS for n, sinks in enumerate(starts)}
        right = [_run(other, q, k, v, score, VISITS[0], sinks) for sinks in starts]
        for (ends, n), (found_out, found_lse) in found.items():
            out, lse = right[n]
            # Both round the same sum of V, of weights rounded before: errors of a few units in the last place.
            limit = torch.finfo(dtype).eps * (1 + 2 * out.float().abs())
            wrong = int(((found_out.float() - out.float()).abs() <= limit).logical_not().sum())
            off = int(((found_lse - lse).abs() <= LSE_LIMIT * (1 + lse.abs())).logical_not().sum())
            if wrong or off:
                visits = f"{len(ends)} visits{' with sinks' * n}"
                return (
                    f"it failed its check against {other.name} in {visits}: {wrong} of {out.numel()} outputs and {off} of "
                    f"{lse.numel()} log-sum-exps differ"
                )
    except Exception as error:
        return f"it failed to run its check: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _run(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, score: Scores | None, ends: tuple[int, ...], sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) after a visit to the KV up to each end."""
    out, partial = torch.full_like(q, torch.nan), None if sinks is None else only_sinks(q, sinks)
    for start, end in zip((0, *ends), ends, strict=False):
        kv = slice(start, end)
        options = {"scale": q.shape[-1] ** -0.5, "score": score, "into": partial, "out": out if end == ends[-1] else None}
        partial = kernel.forward(q, k[:, kv], v[:, kv], _plan(start, end), **options)
    return out, partial.lse


def _plan(start: int, end: int) -> tuple[Tile, ...]:
    return tiles((range(ROWS),), [(range(start, end),)], MASK)
