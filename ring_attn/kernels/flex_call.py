"""One call of torch's flex_attention: the blocks, mask and scores of a tile in its terms, and how it is compiled.

Note [one compilation]: a call compiles for its functions, dtype and head counts, and for any number of rows: what depends on a
tile comes in tensors. Positions, bands and the numbers of heads are looked up by flex_attention's own row numbers, and inputs
have the strides that follow from their shapes. Every such program has a code object of its own, since Dynamo counts the
compilations of a code object, and those of a user's flex_attention are not ours to use up.

Note [shifts]: a position is its row's number plus what is looked up. What is only looked up has no shape for torch 2.11 and
2.12, which cannot compile the gradient of a tensor indexed by what is worked out from it, such as a distance within bounds.

Note [stages]: Triton copies what the next stages of a loop read into shared memory ahead of time. Where a tensor of 32 or 64
bits a number (16 are widened first) is read by query and key, that is as much as a block of scores each, and torch reckons with
none: one such table asks for 250 KB in bf16 with head_dim 64, where an H100 has 227. So such calls have one stage, as in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType

import torch
from torch import Tensor

from ring_attn.kernels.block_map import ALL, SOME, block_map
from ring_attn.kernels.functions import Traced, any_size, traced, versions
from ring_attn.partial import accumulator_dtype
from ring_attn.score import Alibi, RelativeBias, Score, SoftCap
from ring_attn.score_mod import ScoreMod, captured, global_positions, recapture
from ring_attn.tiles import Tile

BLOCK = 128
KINDS = ("softcap", "alibi", "relative_bias", "score_mod", "triton_score_mod")


@dataclass(frozen=True, eq=False)
class Work:
    """What a call is told beside q, k and v. `blocks`: the eight tensors of a BlockMask, of `BLOCK` x `BLOCK` rows.

    `stages`: of the loops, None for torch's choice, see Note [stages]. `learns`: which of the scores' tensors get a gradient.
    `key`: equal for two calls if one compilation serves both.
    """

    blocks: tuple[Tensor, ...]
    mask_mod: Callable
    score_mod: Callable | None
    scale: float
    stages: int | None
    learns: tuple[bool, ...]
    key: Hashable


@dataclass(frozen=True, eq=False)
class Lookup:
    """By flex_attention's own numbers: batch rows [b]; how far positions are from rows, of queries [i] and of keys [j]."""

    batches: Tensor
    q_shifts: Tensor
    kv_shifts: Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """What of a call follows from its tile alone."""

    lookup: Lookup
    blocks: tuple[Tensor, ...]
    mask_mod: Callable
    functions: tuple[Traced, ...]


def work_of(tile: Tile, q: Tensor, steps: Sequence[Score], scale: float) -> Work:
    """The work of a tile with queries like q [b, i, h, d]; differentiable in the tensors of the scores."""
    written = tuple([versions(predicate.fn) for predicate in tile.predicates])
    prepared = _prepared(tile, q.shape[0], q.shape[2], q.device, written)
    parts = [_part(step, prepared.lookup, q) for step in steps]
    of_scores = tuple([function for function, _ in parts])
    score_mod = _score_mod(tuple((function.fn, *numbers) for function, numbers in parts)) if parts else None
    learns = tuple(x for function in of_scores for x in function.learns)
    by_cell = any(function.by_cell for function in (*prepared.functions, *of_scores))
    stages = 1 if by_cell or q.dtype == torch.float32 else None
    key = (*prepared.functions, None, *of_scores)
    return Work(prepared.blocks, prepared.mask_mod, score_mod, scale, stages, learns, key)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
@torch.no_grad()
def _prepared(tile: Tile, batch: int, num_heads: int, device: torch.device, written: tuple[tuple[int, ...], ...]) -> Prepared:
    """`written`: how often the tensors of its predicates were written to, see Note [kept] in `functions`."""
    rows = range(batch) if tile.batch is None else range(tile.batch, tile.batch + 1)
    i, j = len(tile.q_rows), len(tile.kv_rows)
    sides = zip(tile.positions, (range(i), range(j)), strict=True)
    shifts = (global_positions(shard, side, device) - torch.arange(len(side), device=device) for shard, side in sides)
    lookup = Lookup(torch.arange(rows.start, rows.stop, device=device), *shifts)
    scalars = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)]
    functions = tuple(traced(predicate.fn, scalars) for predicate in tile.predicates)
    parts = []
    for predicate, function in zip(tile.predicates, functions, strict=True):
        tensors = function.arguments(captured(predicate.fn), i)
        heads = _heads(num_heads, predicate.first_head, device)
        parts.append((function.fn, lookup.batches, heads, lookup.q_shifts, lookup.kv_shifts, tensors))
    lo, hi = tile.bounds
    own = torch.arange(i, dtype=torch.int32, device=device)
    first, last = own + lo, own + hi
    blocks = _blocks(block_map(tile, batch, num_heads, BLOCK, device))
    for x in (first, last, lookup.q_shifts, lookup.kv_shifts, *blocks):
        any_size(x, *range(2, x.dim()) if x.dim() > 1 else (0,))
    return Prepared(lookup, blocks, _mask_mod(first, last, tuple(parts)), functions)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _heads(count: int, first: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + count, device=device)


def _blocks(found: Tensor) -> tuple[Tensor, ...]:
    """What a BlockMask holds of a map [b or 1, h or 1, q blocks, kv blocks]: by query blocks and by KV blocks."""
    some, every = found == SOME, found == ALL
    return tuple(x for side in (lambda x: x, lambda x: x.mT) for chosen in (some, every) for x in _ordered(side(chosen)))


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the last dimension are chosen, and the numbers of all, the chosen ones first; int32, contiguous."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32).contiguous(), order.to(torch.int32).contiguous()


def _mask_mod(first: Tensor, last: Tensor, parts: tuple) -> Callable:
    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = (j >= first[i]) & (j <= last[i])
        for fn, batches, heads, q_shifts, kv_shifts, tensors in parts:
            seen = fn(i, batches[b], heads[h], i + q_shifts[i], j + kv_shifts[j], *tensors)
            allowed = allowed & seen.to(torch.bool)
        return allowed

    return mask_mod


def _score_mod(parts: tuple) -> Callable:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for fn, batches, heads, q_shifts, kv_shifts, tensors in parts:
            modified = fn(i, score, batches[b], heads[h], i + q_shifts[i], j + kv_shifts[j], *tensors)
            # A tensor that is reached, not captured, may make a wider score, which kernels cannot take on with.
            score = modified.to(score.dtype)
        return score

    return score_mod


def _part(step: Score, lookup: Lookup, q: Tensor) -> tuple[Traced, tuple]:
    """A step of the scores as a function of scalars, and what it is looked up in and handed."""
    dtype = accumulator_dtype(q.dtype)
    fn, first_head = _scalar(step)
    # As scores are: a wider table would make wider ones, and a gradient is a sum over many cells.
    tensors = tuple(x.to(dtype) if x.dtype.is_floating_point else x for x in captured(fn))
    score, *numbers = (torch.zeros((), dtype=x, device=q.device) for x in (dtype, *[torch.int64] * 4))
    function = traced(recapture(fn, tensors), (score, *numbers))
    heads = _heads(q.shape[2], first_head, q.device)
    return function, (lookup.batches, heads, lookup.q_shifts, lookup.kv_shifts, function.arguments(tensors, q.shape[1]))


def _scalar(step: Score) -> tuple[Callable, int]:
    """(a function of a score and its batch row, head, query and key positions; the number of head 0)."""
    match step:
        case SoftCap(cap):
            return (lambda s, b, h, q, k: cap * torch.tanh(s / cap)), 0
        case Alibi(slopes):
            return (lambda s, b, h, q, k: s - slopes[h] * (q - k).abs()), 0
        case RelativeBias(table):
            reach = table.shape[1] // 2
            return (lambda s, b, h, q, k: s + table[h, (q - k).clamp(-reach, reach) + reach]), 0
        case ScoreMod(fn):
            return fn, step.first_head
    raise AssertionError(step)


def compiled(q: Tensor, k: Tensor, v: Tensor, work: Work, backend: str = "inductor") -> tuple[Tensor, Tensor]:
    """(out [b, h, i, dv], lse [b, h, i]) of queries [b, h, i, d] on keys [b, g, j, d], by a compiled flex_attention."""
    inputs = tuple(map(_with_own_strides, (q, k, v)))
    shapes = tuple((x.shape[0], x.shape[1], x.shape[3]) for x in inputs)
    # Compilers take a size of one for a number.
    sizes = (*(x.shape[2] for x in inputs), *work.blocks[1].shape[2:])
    key = (work.key, work.scale, shapes, q.dtype, q.device, work.blocks[1].shape[:2], torch.is_grad_enabled())
    key += *(size == 1 for size in sizes), backend
    for x in inputs:
        any_size(x, 2)
    return _program(key)(*inputs, work.blocks, work.mask_mod, work.score_mod, work.scale, work.stages)


@lru_cache(maxsize=4096)
def _program(key: Hashable) -> Callable:
    own = FunctionType(attend.__code__.replace(), attend.__globals__)
    return torch.compile(own, fullgraph=True, backend=key[-1])


def _with_own_strides(x: Tensor) -> Tensor:
    """x [b, h, i, d], laid out as [b, i, h, d] and nothing else."""
    rows = x.transpose(1, 2)
    return rows.contiguous().flatten().view(rows.shape).transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: tuple[Tensor, ...],
    mask_mod: Callable,
    score_mod: Callable | None,
    scale: float,
    stages: int | None,
) -> tuple[Tensor, Tensor]:
    """What is compiled; uncompiled, torch holds all scores at once."""
    from torch.nn.attention import flex_attention as flex

    mask = flex.BlockMask((q.shape[2], k.shape[2]), *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)
    # One kernel for any number of queries, and products in fp32 that are fp32's.
    options = {"FORCE_USE_FLEX_ATTENTION": True, "FLOAT32_PRECISION": "'ieee'"}
    if stages is not None:
        options["num_stages"] = stages
    given = {"score_mod": score_mod, "block_mask": mask, "scale": scale, "kernel_options": options}
    given["enable_gqa"] = q.shape[1] != k.shape[1]
    out, found = flex.flex_attention(q, k, v, return_aux=flex.AuxRequest(lse=True), **given)
    return out, found.lse
