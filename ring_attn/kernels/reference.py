"""Attention in plain PyTorch, block by block: any device, any floating dtype, memory of one block of scores. The truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ring_attn.kernels import Problem, Upstream
from ring_attn.kernels.sums import Grads, Totals
from ring_attn.partial import Partial, accumulator_dtype, finish, merge_, to_add_to
from ring_attn.score import Cells, Scores
from ring_attn.score_mod import allowed_cells, function_transforms, global_positions
from ring_attn.tiles import Tile


@dataclass(frozen=True)
class ReferenceKernel:
    """`q_block` x `kv_block` scores are held at a time, for all batch rows and heads."""

    q_block: int = 512
    kv_block: int = 512
    name: str = "reference"

    def supports(self, problem: Problem) -> str | None:
        return None if problem.dtype.is_floating_point else f"it takes floating dtypes, not {problem.dtype}"

    @function_transforms()
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        *,
        scale: float,
        score: Scores | None = None,
        into: Partial | None = None,
        out: Tensor | None = None,
    ) -> Partial:
        into = to_add_to(into, q, v.shape[-1])
        for block in self._blocks(q, k, v, tiles, scale, score):
            if block.has_cells:
                merge_(into.rows(block.q_rows, block.tile.batch), block.forward())
        return into if out is None else finish(into, out)

    @function_transforms()
    def backward(
        self,
        up: Upstream,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        *,
        scale: float,
        score: Scores | None = None,
        into: Grads,
    ) -> None:
        into = into.totals().zeroed()
        if score is not None and score.steps:
            # Gradients have their tensors' dtype: so none is rounded block by block.
            tensors = zip(score.tensors(), into.score, strict=True)
            score = score.with_tensors([x if total is None else x.to(total.dtype) for x, total in tensors])
        for block in self._blocks(q, k, v, tiles, scale, score):
            if block.has_cells:
                block.backward(up, into)

    def _blocks(self, q, k, v, tiles: Sequence[Tile], scale: float, score: Scores | None) -> Iterator[_Block]:
        """Every block of every tile that the band enters."""
        for tile in tiles:
            lo, hi = tile.bounds
            for i in range(0, len(tile.q_rows), self.q_block):
                rows = range(i, min(i + self.q_block, len(tile.q_rows)))
                for j in range(0, len(tile.kv_rows), self.kv_block):
                    columns = range(j, min(j + self.kv_block, len(tile.kv_rows)))
                    if lo <= columns[-1] - i and j - rows[-1] <= hi:
                        yield _Block(q, k, v, tile, rows, columns, lo, hi, scale, score)


@dataclass(frozen=True)
class _Block:
    """The scores of some `rows` x `columns` of a tile, counted from its corner."""

    q: Tensor
    k: Tensor
    v: Tensor
    tile: Tile
    rows: range
    columns: range
    lo: int
    hi: int
    scale: float
    score: Scores | None

    def forward(self) -> Partial:
        scores = self._masked(self._modified(self._raw()))
        m = scores.amax(-1)
        p = (scores - torch.where(m == -torch.inf, 0.0, m).unsqueeze(-1)).exp()
        acc = torch.einsum("bgnij,bjgd->bignd", self._dropped(p), self._take(self.v, self.kv_rows))
        return Partial(acc.flatten(2, 3), m.flatten(1, 2), p.sum(-1).flatten(1, 2))

    def backward(self, up: Upstream, into: Totals) -> None:
        rows, kv, b = _slice(self.q_rows), _slice(self.kv_rows), self._batch
        lse, delta = (x[b, :, rows].unflatten(1, (self._groups, -1)).unsqueeze(-1) for x in (up.lse, up.delta))
        raw, dout = self._raw(), self._grouped(up.dout)
        p = (self._masked(self._modified(raw)) - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
        dp = self._dropped(torch.einsum("bignd,bjgd->bgnij", dout, self._take(self.v, self.kv_rows)))
        ds = self._before_modifiers(raw, p * (dp - delta), into) * self.scale
        into.dq[b, rows] += torch.einsum("bgnij,bjgd->bignd", ds, self._take(self.k, self.kv_rows)).flatten(2, 3)
        into.dk[b, kv] += torch.einsum("bgnij,bignd->bjgd", ds, self._grouped(self.q))
        into.dv[b, kv] += torch.einsum("bgnij,bignd->bjgd", self._dropped(p), dout)

    @property
    def q_rows(self) -> range:
        return self.tile.q_rows[self.rows.start : self.rows.stop]

    @property
    def kv_rows(self) -> range:
        return self.tile.kv_rows[self.columns.start : self.columns.stop]

    @property
    def has_cells(self) -> bool:
        """Whether a predicate leaves any cell of the block."""
        return not self.tile.predicates or bool(self._allowed.any())

    @property
    def _batch(self) -> slice:
        return slice(None) if self.tile.batch is None else slice(self.tile.batch, self.tile.batch + 1)

    @property
    def _groups(self) -> int:
        return self.k.shape[2]

    def _take(self, x: Tensor, rows: range) -> Tensor:
        return x[self._batch, rows.start : rows.stop].to(accumulator_dtype(x.dtype))

    def _grouped(self, x: Tensor) -> Tensor:
        """Query-side rows [b, i, h, d] as [b, i, g, n, d]: n query heads read one KV head."""
        return self._take(x, self.q_rows).unflatten(2, (self._groups, -1))

    def _raw(self) -> Tensor:
        """Scaled products [b, g, n, i, j]."""
        return torch.einsum("bignd,bjgd->bgnij", self._grouped(self.q), self._take(self.k, self.kv_rows)) * self.scale

    def _modified(self, raw: Tensor) -> Tensor:
        return self._apply(self.score, raw) if self.score and self.score.steps else raw

    def _apply(self, score: Scores, raw: Tensor) -> Tensor:
        return score.apply(raw.flatten(1, 2), self._cells).unflatten(1, raw.shape[1:3])

    def _before_modifiers(self, raw: Tensor, ds: Tensor, into: Totals) -> Tensor:
        """The gradient of the scaled products, given that of the modified scores; adds those of the modifiers' tensors."""
        if not (self.score and self.score.steps):
            return ds
        tensors = list(self.score.tensors())
        wanted = [n for n, total in enumerate(into.score) if total is not None]

        def modified(raw: Tensor, *leaves: Tensor) -> Tensor:
            for n, leaf in zip(wanted, leaves, strict=True):
                tensors[n] = leaf
            return self._apply(self.score.with_tensors(tensors), raw)

        # Not autograd, which does not record inside a custom op.
        _, pull_back = torch.func.vjp(modified, raw, *(tensors[n] for n in wanted))
        ds, *grads = pull_back(ds)
        for n, grad in zip(wanted, grads, strict=True):
            into.score[n].add_(grad)
        return ds

    def _dropped(self, x: Tensor) -> Tensor:
        """x [b, g, n, i, j] where dropout leaves it, scaled up; else 0."""
        if self.score is None or self.score.dropout is None:
            return x
        keep = self.score.dropout.keep(self._cells).to(x.dtype)
        return x * keep.unflatten(1, x.shape[1:3])

    def _masked(self, scores: Tensor) -> Tensor:
        allowed = self._allowed
        return scores.masked_fill(~(allowed.unflatten(1, scores.shape[1:3]) if allowed.dim() == 4 else allowed), -torch.inf)

    @cached_property
    def _allowed(self) -> Tensor:
        """bool [i, j], or [b, h, i, j] where a predicate decides."""
        rows, columns = (torch.arange(r.start, r.stop, device=self.q.device) for r in (self.rows, self.columns))
        offset = columns - rows.unsqueeze(-1)
        allowed = (offset >= self.lo) & (offset <= self.hi)
        for predicate in self.tile.predicates:
            c = self._cells
            allowed = allowed & allowed_cells(predicate, c.batch, c.heads, c.q_pos, c.kv_pos)
        return allowed

    @cached_property
    def _cells(self) -> Cells:
        device, batch = self.q.device, self.tile.batch
        batch_rows = range(self.q.shape[0]) if batch is None else range(batch, batch + 1)
        parts = zip(self.tile.positions, (self.rows, self.columns), strict=True)
        q_pos, kv_pos = (global_positions(part, rows, device) for part, rows in parts)
        numbers = (torch.arange(r.start, r.stop, device=device) for r in (batch_rows, range(self.q.shape[2]), self.q_rows))
        batches, heads, q_rows = numbers
        return Cells(batches, heads, q_pos, q_rows, kv_pos)


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)


KERNELS = {"reference": ReferenceKernel()}
