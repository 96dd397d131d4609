"""Attention in plain PyTorch, block by block: any device, any floating dtype, memory of one block of scores. The truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ring_attn.kernels import Grads, Problem, Upstream
from ring_attn.partial import Partial, accumulator_dtype, empty, merge_, normalize
from ring_attn.tiles import Tile


@dataclass(frozen=True)
class ReferenceKernel:
    """`q_block` x `kv_block` scores are held at a time, for all batch rows and heads."""

    q_block: int = 512
    kv_block: int = 512
    name: str = "reference"

    def supports(self, problem: Problem) -> str | None:
        if not problem.dtype.is_floating_point:
            return f"it takes floating dtypes, not {problem.dtype}"
        if problem.score is not None:
            return "score modifiers are not implemented"
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        *,
        scale: float,
        score: object = None,
        into: Partial | None = None,
        out: Tensor | None = None,
    ) -> Partial:
        into = empty(q, v.shape[-1]) if into is None else into
        for block in self._blocks(q, k, v, tiles):
            merge_(into.rows(block.q_rows, block.batch), block.forward(scale))
        if out is not None:
            out.copy_(normalize(into, out.dtype))
        return into

    def backward(
        self,
        up: Upstream,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        *,
        scale: float,
        score: object = None,
        into: Grads,
    ) -> None:
        for block in self._blocks(q, k, v, tiles):
            block.backward(up, scale, into)

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> Iterator[_Block]:
        """Every block of every tile that has an allowed cell."""
        for tile in tiles:
            lo = -len(tile.q_rows) if tile.band.lo is None else tile.band.lo
            hi = len(tile.kv_rows) if tile.band.hi is None else tile.band.hi
            for i in range(0, len(tile.q_rows), self.q_block):
                q_rows = tile.q_rows[i : i + self.q_block]
                for j in range(0, len(tile.kv_rows), self.kv_block):
                    kv_rows = tile.kv_rows[j : j + self.kv_block]
                    if lo <= j - i + len(kv_rows) - 1 and j - i - len(q_rows) + 1 <= hi:
                        yield _Block(q, k, v, q_rows, kv_rows, lo - j + i, hi - j + i, tile.batch)


@dataclass(frozen=True)
class _Block:
    """A rectangle of scores; cell (i, j) is allowed iff `lo <= j - i <= hi`, counted from its corner."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_rows: range
    kv_rows: range
    lo: int
    hi: int
    batch: int | None

    def forward(self, scale: float) -> Partial:
        scores = self._scores(scale)
        m = scores.amax(-1)
        p = (scores - torch.where(m == -torch.inf, 0.0, m).unsqueeze(-1)).exp()
        acc = torch.einsum("bgnij,bjgd->bignd", p, self._take(self.v, self.kv_rows))
        lse = p.sum(-1).log() + m
        return Partial(acc.flatten(2, 3), m.flatten(1, 2), lse.flatten(1, 2))

    def backward(self, up: Upstream, scale: float, into: Grads) -> None:
        groups = self.k.shape[2]
        rows, b = slice(self.q_rows.start, self.q_rows.stop), self._batch
        lse, delta = (x[b, :, rows].unflatten(1, (groups, -1)).unsqueeze(-1) for x in (up.lse, up.delta))
        p = (self._scores(scale) - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
        dout = self._grouped(up.dout)
        ds = p * (torch.einsum("bignd,bjgd->bgnij", dout, self._take(self.v, self.kv_rows)) - delta) * scale
        kv = slice(self.kv_rows.start, self.kv_rows.stop)
        into.dq[b, rows] += torch.einsum("bgnij,bjgd->bignd", ds, self._take(self.k, self.kv_rows)).flatten(2, 3)
        into.dk[b, kv] += torch.einsum("bgnij,bignd->bjgd", ds, self._grouped(self.q))
        into.dv[b, kv] += torch.einsum("bgnij,bignd->bjgd", p, dout)

    @property
    def _batch(self) -> slice:
        return slice(None) if self.batch is None else slice(self.batch, self.batch + 1)

    def _take(self, x: Tensor, rows: range) -> Tensor:
        return x[self._batch, rows.start : rows.stop].to(accumulator_dtype(x.dtype))

    def _grouped(self, x: Tensor) -> Tensor:
        """Query-side rows [b, i, h, d] as [b, i, g, n, d]: n query heads read one KV head."""
        return self._take(x, self.q_rows).unflatten(2, (self.k.shape[2], -1))

    def _scores(self, scale: float) -> Tensor:
        """[b, g, n, i, j], -inf where not allowed."""
        q, k = self._grouped(self.q), self._take(self.k, self.kv_rows)
        scores = torch.einsum("bignd,bjgd->bgnij", q, k) * scale
        offset = _offsets(len(self.q_rows), len(self.kv_rows), scores.device)
        return scores.masked_fill((offset < self.lo) | (offset > self.hi), -torch.inf)


def _offsets(num_q: int, num_kv: int, device: torch.device) -> Tensor:
    """j - i of every cell."""
    return torch.arange(num_kv, device=device) - torch.arange(num_q, device=device).unsqueeze(-1)


KERNELS = {"reference": ReferenceKernel()}
