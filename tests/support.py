"""What the tests share: relative error, a dense truth, tile kinds, and one way to run a kernel."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from ring_attn import call, exchange, parts, plan
from ring_attn.kernels import Kernel, Upstream
from ring_attn.kernels.sums import Grads, Sum
from ring_attn.layout import Contiguous
from ring_attn.mask import All, Causal, Documents, Full, KeyPadding, Mask, Window
from ring_attn.partial import Partial, accumulator_dtype, to_add_to
from ring_attn.score import Scores
from ring_attn.tiles import Tile, tiles

FLOAT64_LIMIT = 1e-12
FLOAT32_LIMIT = 1e-5
OUT_FACTOR, GRAD_FACTOR = 2.0, 3.0  # 16-bit limits, as multiples of plain single-device PyTorch's own error


def rel_error(x: Tensor, ref: Tensor) -> float:
    """‖x - ref‖ / ‖ref‖ in float64; rows that hold -inf must hold it in both. Infinite where anything is NaN: of several errors
    the largest would be another one, as NaN compares with nothing.
    """
    x, ref = x.detach().double(), ref.detach().double()
    assert x.shape == ref.shape, f"shape {tuple(x.shape)} is not {tuple(ref.shape)}"
    both = (x == -torch.inf) & (ref == -torch.inf)
    x, ref = x.masked_fill(both, 0), ref.masked_fill(both, 0)
    norm = ref.norm().item()
    error = (x - ref).norm().item()
    return math.inf if math.isnan(error) else error if norm == 0 else error / norm


def allowed(mask: Mask, seq_len: int, batch: int, device="cpu", kv_len: int | None = None) -> Tensor:
    """[b, t, t_kv] bool, straight from what each mask promises and not from the rules the package works with."""
    kv_len = seq_len if kv_len is None else kv_len
    q, k = torch.arange(seq_len, device=device).unsqueeze(1), torch.arange(kv_len, device=device)
    everything = torch.ones(seq_len, kv_len, dtype=torch.bool, device=device)
    match mask:
        case All(masks):
            return torch.stack([allowed(part, seq_len, batch, device, kv_len) for part in masks]).all(0)
        case Full():
            rows = [everything]
        case Causal():
            rows = [k <= q]
        case Window(left, right):
            rows = [everything if left is None else k >= q - left]
            rows = [rows[0] if right is None else rows[0] & (k <= q + right)]
        case Documents():
            rows = [_same_document(*ends, device) for ends in zip(mask.ends, mask.kv_ends, strict=True)]
        case KeyPadding(lengths, starts):
            starts, lengths = starts or (0,) * batch, lengths or (kv_len,) * batch
            rows = [everything & (k >= start) & (k < stop) for start, stop in zip(starts, lengths, strict=False)]
        case _:
            raise AssertionError(mask)
    return torch.stack([rows[b % len(rows)] for b in range(batch)])


def _same_document(q_ends: tuple[int, ...], kv_ends: tuple[int, ...], device) -> Tensor:
    q, kv = (
        torch.repeat_interleave(
            torch.arange(len(ends), device=device),
            torch.tensor([b - a for a, b in zip((0, *ends), ends, strict=False)], device=device, dtype=torch.int64),
        )
        for ends in (q_ends, kv_ends)
    )
    return q.unsqueeze(1) == kv


def dense(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, modify: Callable[[Tensor], Tensor] = lambda scores: scores
) -> tuple[Tensor, Tensor]:
    """(out [b, t, h, dv], lse [b, h, t]) by one plain softmax over all keys, in the inputs' dtype; autograd follows it."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = modify(torch.einsum("bihd,bjhd->bhij", q, k) * scale)
    scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
    blind = ~seen.any(-1)[:, None, :, None]
    p = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    lse = scores.logsumexp(-1) if not blind.any() else _lse(scores, blind)
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def _lse(scores: Tensor, blind: Tensor) -> Tensor:
    return scores.masked_fill(blind, 0).logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)


def random_qkv(b, s, skv, h, g, d, dv=None, *, dtype=torch.float32, device="cpu", seed=0, outliers=False):
    """q, k, v and a random dout; `outliers` puts a few entries near 30 into q and k."""
    gen = torch.Generator().manual_seed(seed)
    dv = d if dv is None else dv
    shapes = (b, s, h, d), (b, skv, g, d), (b, skv, g, dv), (b, s, h, dv)
    q, k, v, dout = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes)
    if outliers:
        for x in (q, k):
            x[torch.rand(x.shape, generator=gen) < 1e-3] *= 30
    return tuple(x.to(dtype).to(device) for x in (q, k, v, dout))


def band_tiles(kind: str, num_q: int, num_kv: int) -> tuple[Tile, ...]:
    """Tiles of one kind for num_q query rows and num_kv keys: what a rank meets on its visits."""
    queries, keys = (range(num_q),), [(range(num_kv),)]
    late = (range(num_kv, num_kv + num_q),)  # queries behind all keys, as on a visit to an earlier rank
    t = max(num_q, num_kv)
    cut = t // 3
    match kind:
        case "full":
            return tiles(queries, keys, Full())
        case "causal":
            return tiles(queries, keys, Causal())
        case "strict":
            return tiles((range(0, 2 * num_q, 2),), [(range(1, 2 * num_kv + 1, 2),)], Causal())
        case "window":
            return tiles(queries, keys, Window(num_kv // 3, 2))
        case "far window":
            return tiles(late, keys, Window(num_kv // 2, 0))
        case "documents":
            return tiles(queries, keys, Causal() & Documents(lengths=[cut, 1, 0, t - cut - 1]))
        case "batch rows":
            return tiles(queries, keys, Causal() & Documents(lengths=[[cut, t - cut], [t - 1, 1]]))
        case "many":
            shards = [Contiguous(num_kv // 4 * 4, 4).shard(r) for r in (2, 0, 3, 1)]
            return tiles(queries, shards, Window(num_kv // 2, 3))
        case "zigzag":
            # A third of the keys, half of the queries, the other keys, the other queries: the first keys are seen by all.
            first, half = num_kv // 3, num_q // 2
            queries = range(first, first + half), range(half + num_kv, num_q + num_kv)
            return tiles(queries, [(range(first), range(first + half, half + num_kv))], Causal())
    raise AssertionError(kind)


BAND_KINDS = ("full", "causal", "strict", "window", "far window", "documents", "batch rows", "many", "zigzag")


def cells_of(tile_list: Sequence[Tile], batch: int, num_q: int, num_kv: int, device="cpu") -> Tensor:
    """[b, num_q, num_kv] bool: the cells the tiles allow, a mask for `dense`. Fails where two tiles share a cell."""
    seen = torch.zeros(batch, num_q, num_kv, dtype=torch.bool, device=device)
    for tile in tile_list:
        b = slice(None) if tile.batch is None else slice(tile.batch, tile.batch + 1)
        offset = torch.arange(len(tile.kv_rows), device=device) - torch.arange(len(tile.q_rows), device=device).unsqueeze(1)
        inside = torch.ones_like(offset, dtype=torch.bool)
        if tile.band.lo is not None:
            inside &= offset >= tile.band.lo
        if tile.band.hi is not None:
            inside &= offset <= tile.band.hi
        part = seen[b, tile.q_rows.start : tile.q_rows.stop, tile.kv_rows.start : tile.kv_rows.stop]
        assert not (part & inside).any(), f"{tile} overlaps another tile"
        part |= inside
    return seen


def poison_memory(device: str = "cpu") -> None:
    """Leaves freed memory full of NaN, so that an element a kernel forgets to write shows."""
    blocks = [torch.full((1 << power,), torch.nan, device=device) for power in range(8, 22) for _ in range(4)]
    del blocks


class Rows:
    """A tensor [b, s, e] that a transport is given to push, or pushes to."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.shape, self.dtype, self.device = rows, tuple(rows.shape), rows.dtype, rows.device

    def write(self, to: Tensor) -> None:
        to.copy_(self.rows)

    def packed(self) -> Tensor:
        return self.rows

    def add(self, x: Tensor, rows: range, places: Tensor | None = None) -> None:
        own = self.rows[:, rows.start : rows.stop]
        if places is None:
            own += x
            return
        for column in places.unbind(-1):
            batch, row = (column >= 0).nonzero(as_tuple=True)
            own[batch, row] += x[0, column[batch, row]]


def adding_to(dq: Tensor, dk: Tensor, dv: Tensor, score: tuple[Tensor | None, ...] = ()) -> Grads:
    """What a backward adds to these tensors, at the latest when `write` is given them."""
    sums = [Sum([x.shape for x in total], dq.dtype, dq.device, lambda total=total: total) for total in ([dq], [dk, dv])]
    for one in sums:
        one.claim(one.rows)
    return Grads(*(one.all_rows for one in sums), score)


def run_kernel(
    kernel: Kernel,
    q,
    k,
    v,
    dout,
    tile_lists: Sequence[tuple[Tile, ...]],
    *,
    scale: float,
    dlse=None,
    backward: Kernel | None = None,
    score: Scores | None = None,
    partial: Partial | None = None,
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv and the gradients of the scores' tensors, of a kernel that makes one visit per tile list.

    It carries on from visit to visit, and at first from `partial` (written to). Of the visits' dk and dv every second one is
    written on its own and then added, as on rings.
    """
    poison_memory(q.device.type)
    out = torch.full((*q.shape[:3], v.shape[-1]), torch.nan, dtype=q.dtype, device=q.device)
    for visit, tile_list in enumerate(tile_lists):
        last = visit == len(tile_lists) - 1
        partial = kernel.forward(q, k, v, tile_list, scale=scale, score=score, into=partial, out=out if last else None)
    assert partial.acc is out or partial.acc.is_contiguous()
    dtype, out = accumulator_dtype(q.dtype), partial.acc
    of_scores = tuple(torch.zeros_like(x, dtype=dtype) for x in (score.tensors() if score else ()))
    into, up = Grads.like(q, k, v, of_scores), Upstream(dout, out, partial.lse, dlse)
    for visit, tile_list in enumerate(tile_lists):
        own = Grads(into.q, Grads.like(q, k, v).kv, of_scores) if visit % 2 else into
        (backward or kernel).backward(up, q, k, v, tile_list, scale=scale, score=score, into=own)
        if visit % 2:
            came = [torch.full(x.shape, torch.nan, dtype=dtype, device=x.device) for x in (k, v)]
            own.kv.sum.write(came)
            into.kv.add(came, into.kv.rows)
    dq, dk, dv = (torch.full(x.shape, torch.nan, dtype=dtype, device=x.device) for x in (q, k, v))
    into.write(dq, dk, dv)
    found = {"out": out, "lse": partial.lse, "dq": dq, "dk": dk, "dv": dv}
    return found | {f"gradient of tensor {n}": x for n, x in enumerate(of_scores)}


def truth(q, k, v, dout, tile_lists, *, scale, dlse=None, score=None, partial=None) -> dict[str, Tensor]:
    """The same in float64 on the reference kernel, which tests/kernels/test_reference.py holds to the dense softmax."""
    from ring_attn.kernels import get_kernel

    up = [x.double() for x in (q, k, v, dout)]
    dlse = None if dlse is None else dlse.double()
    score = None if score is None else score.with_tensors([x.double() for x in score.tensors()])
    partial = None if partial is None else Partial(*(x.double() for x in to_add_to(partial, q, v.shape[-1])))
    return run_kernel(get_kernel("reference"), *up, tile_lists, scale=scale, dlse=dlse, score=score, partial=partial)


def split_tiles(tile_list: Sequence[Tile], visits: int) -> list[tuple[Tile, ...]]:
    """The same tiles spread over several visits (some may stay empty)."""
    order = list(tile_list)
    random.Random(0).shuffle(order)
    return [tuple(order[i::visits]) for i in range(visits)]


def by_head() -> AbstractContextManager:
    """Inside, a backward goes KV head by KV head, where it may: one byte of sums is too much, and no part too little work."""
    return patch.multiple(call, _SUMS=1, _LEAST=0.0)


@contextmanager
def way_home_hidden(by_heads: bool) -> Iterator[None]:
    """Inside, any backward but one by gather meets its own shard in halves; `by_heads`: it goes KV head by KV head, where it
    may, while a forward by pull meets others' KV for one half of the heads after the other.
    """
    of_heads = by_head() if by_heads else patch.object(call, "_SUMS", 1 << 60)
    halves = patch.multiple(exchange, HALVES_FROM=0, HALVES_FROM_REPLAYED=0)
    with halves, of_heads, patch.object(call, "_WAIT", -math.inf if by_heads else math.inf):
        yield


def forget_plans() -> None:
    """What is planned next is planned anew."""
    for kept in (exchange.make_plan, plan._made_for, parts.needed):
        kept.cache_clear()
