"""The skeleton of the adapters: libraries that attend one rectangle a call and hand back normalised output and lse.

A normalised output is a partial with m = lse, so calls merge like any partials, two in one pass over memory; backwards add up
because each is given the **final** out and lse of its rows. A subclass says which tiles its library can express (`pieces`) and
how to call it.

Note [apart]: an output stays as the library made it until something is merged into it. Where the calls of the last visit have
no query row in common and leave none out, as those on what a zigzag rank got from all others, each is the last of its own rows
and goes straight to the result: nothing is widened on the way.

Note [in place]: where one call made all of what was gathered before the last visit, that is the result but for the rows that
the last visit meets, which are merged where they are: few under a window, or where most documents lie whole on their rank.

Note [contiguous lse]: flash-attention and cuDNN read lse through its raw pointer and check neither strides nor shape. A slice
of rows is strided, and every head after the first would read another head's values. It is copied here, once, for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ring_attn.kernels import Problem, Upstream, modifier_refusal
from ring_attn.kernels.packs import Pack, Rows, all_rows, groups, make_pack
from ring_attn.kernels.split import met_once, share_no_keys
from ring_attn.kernels.sums import Grads, RowsOfSum, fused, on_its_own
from ring_attn.partial import Partial, finish, merge, merge_, to_add_to, to_merge_into
from ring_attn.score import Scores, SoftCap
from ring_attn.tiles import Tile

Gradients = tuple[Tensor, Tensor, Tensor]


ONE_SOFTCAP = "it takes one SoftCap, not two; triton and reference take any number"


def refusal(
    problem: Problem,
    dtypes: tuple[torch.dtype, ...],
    *,
    head_dim_step: int = 1,
    head_dim_max: int | None = None,
    any_v_head_dim: bool = False,
    takes_lse_grad: bool = False,
    takes_softcap: bool = False,
) -> str | None:
    """None, or why a library with these limits cannot do the problem."""
    if problem.dtype not in dtypes:
        return f"it takes {', '.join(_word(d) for d in dtypes)}, not {_word(problem.dtype)}"
    if problem.v_head_dim != problem.head_dim and not any_v_head_dim:
        return f"it needs v_head_dim = head_dim, not {problem.v_head_dim} and {problem.head_dim}; triton and reference do not"
    for dim in (problem.head_dim, problem.v_head_dim):
        if dim % head_dim_step:
            return f"it needs a head_dim that is a multiple of {head_dim_step}, not {dim}"
        if head_dim_max is not None and dim > head_dim_max:
            return f"it takes a head_dim up to {head_dim_max}, not {dim}"
    refused = modifier_refusal(problem, ("softcap",) if takes_softcap else ())
    if refused is not None:
        return refused
    if len(problem.score or ()) > 1:
        return ONE_SOFTCAP
    if problem.direction == "backward" and problem.lse_grad and not takes_lse_grad:
        return "its backward recomputes delta from out and dout: no gradient through lse enters; triton and reference take one"
    return None


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Scaling:
    """How a library makes scores of products: times `scale`; then, unless `softcap` is 0, softcap * tanh(score / softcap)."""

    scale: float
    softcap: float = 0.0

    @staticmethod
    def of(scale: float, score: Scores | None) -> Scaling:
        match score.steps if score else ():
            case ():
                return Scaling(scale)
            case (SoftCap(cap),):
                return Scaling(scale, cap)
        raise AssertionError(score)


class Tilewise(ABC):
    """A kernel whose library attends one rectangle a call."""

    name: str

    @abstractmethod
    def supports(self, problem: Problem) -> str | None: ...

    @abstractmethod
    def pieces(self, tile: Tile) -> Iterable[Tile]:
        """Tiles with the same cells, each of which `attend` can express."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """(out [b, i, h, dv], lse [b, h, i]) of the tile's queries [b, i, h, d] on its keys [b, j, g, d]."""

    @abstractmethod
    def differentiate(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> Gradients:
        """(dq, dk, dv) of one such tile; `up` holds its rows, with lse contiguous."""

    def scaling(self, scale: float, score: Scores | None) -> Scaling:
        """What its calls are told of the scores; a library that knows more of them has a class of its own."""
        return Scaling.of(scale, score)

    def number_of_calls(self, tiles: Sequence[Tile]) -> int:
        return sum(1 for tile in tiles for _ in self.pieces(tile))

    def calls(self, tiles: Sequence[Tile], q: Tensor, k: Tensor) -> Iterator[Dense | Packed]:
        """The library calls of a visit."""
        for tile in tiles:
            yield from map(Dense, self.pieces(tile))

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
        calls, scaling = list(self.calls(tiles, q, k)), self.scaling(scale, score)
        if into is None and len(calls) == 1 and calls[0].covers(q):
            return _alone(*calls[0].attend(self, q, k, v, scaling), out)
        into = to_add_to(into, q, v.shape[-1])
        fuses = out is not None and all(call.fuses(q) for call in calls)
        in_place = fuses and _is_output(into, out)
        apart = fuses and _apart(calls, q, gaps=in_place)
        at_once = 1 if apart else 2
        if in_place and (apart or len(calls) <= at_once):
            out = into.acc
        for n in range(0, len(calls), at_once):
            done = [(call, *call.attend(self, q, k, v, scaling)) for call in calls[n : n + at_once]]
            into = _merged(into, done, out if apart or n + at_once >= len(calls) else None, apart)
            # Before the next are attended.
            del done
        if out is None:
            return into
        return Partial(out, into.m) if calls or out is into.acc else finish(into, out)

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
        scaling = self.scaling(scale, score)
        for call in self.calls(met_once(tiles, self.number_of_calls), q, k):
            call.add(into, *call.differentiate(self, up, q, k, v, scaling))

    def rounds(self, device: str, tiles: Sequence[Tile]) -> bool:
        return share_no_keys(piece for tile in met_once(tiles, self.number_of_calls) for piece in self.pieces(tile))


class Packing(Tilewise):
    """A tilewise kernel whose library also takes packs; see Note [packs] of `packs.py`."""

    @abstractmethod
    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """(out [n, h, dv], lse [h, n]) of packed queries [n, h, d] on packed keys [nkv, g, d]."""

    @abstractmethod
    def differentiate_packed(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, pack: Pack, scaling: Scaling) -> Gradients:
        """(dq, dk, dv) of a pack; `up` holds dout and out [n, h, dv] and lse [h, n], contiguous."""

    def number_of_calls(self, tiles: Sequence[Tile]) -> int:
        return sum(1 for _ in self._groups(tiles))

    def calls(self, tiles: Sequence[Tile], q: Tensor, k: Tensor) -> Iterator[Dense | Packed]:
        sizes = *q.shape[:2], k.shape[1], q.device
        for group in self._groups(tiles):
            yield Dense(group[0]) if len(group) == 1 else Packed(make_pack(group, *sizes))

    def _groups(self, tiles: Sequence[Tile]) -> Iterator[tuple[Tile, ...]]:
        return groups(piece for tile in tiles for piece in self.pieces(tile))


@dataclass(frozen=True)
class Dense:
    """One rectangle, for one batch row or for all."""

    tile: Tile

    def covers(self, q: Tensor) -> bool:
        """Whether it holds every row of q."""
        return len(self.tile.q_rows) == q.shape[1] and self.tile.batch is None

    def fuses(self, x: Tensor) -> bool:
        """Whether Triton merges its results, in one pass over memory; `x`: any of its tensors."""
        return self.tile.batch is None and _can_fuse(x)

    def attend(self, kernel: Tilewise, q: Tensor, k: Tensor, v: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
        return kernel.attend(self._q(q), self._kv(k), self._kv(v), self.tile, scaling)

    @property
    def places(self) -> range | Tensor:
        """Its query rows, as a merge reads them."""
        return self.tile.q_rows

    def merge(self, into: Partial, out: Tensor, lse: Tensor) -> None:
        """Merges a result into its rows, where no kernel does."""
        merge_(into.rows(self.tile.q_rows, self.tile.batch), Partial(out, lse))

    def differentiate(self, kernel: Tilewise, up: Upstream, q: Tensor, k: Tensor, v: Tensor, scaling: Scaling) -> Gradients:
        dlse = None if up.dlse is None else self._q(up.dlse, 2).contiguous()
        rest = None if up.rest is None else self._q(up.rest)
        up = Upstream(self._q(up.dout), self._q(up.out), self._q(up.lse, 2).contiguous(), dlse, rest)
        return kernel.differentiate(up, self._q(q), self._kv(k), self._kv(v), self.tile, scaling)

    def add(self, into: Grads, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        into.q.add([dq], self.tile.q_rows, batch=self.tile.batch)
        into.kv.add([dk, dv], self.tile.kv_rows, batch=self.tile.batch)

    def _q(self, x: Tensor, dim: int = 1) -> Tensor:
        return self._part(x, self.tile.q_rows, dim)

    def _kv(self, x: Tensor) -> Tensor:
        return self._part(x, self.tile.kv_rows, 1)

    def _part(self, x: Tensor, rows: range, dim: int) -> Tensor:
        """The tile's part of x, which may be all of it."""
        x = x if self.tile.batch is None else x[self.tile.batch : self.tile.batch + 1]
        return x if len(rows) == x.shape[dim] else x.narrow(dim, rows.start, len(rows))


@dataclass(frozen=True)
class Packed:
    """One variable-length call; its rows act as one batch row."""

    pack: Pack

    def fuses(self, x: Tensor) -> bool:
        return _can_fuse(x)

    def covers(self, q: Tensor) -> bool:
        """Whether it holds every row of q, in order."""
        return all_rows(self.pack.q_rows, q)

    def attend(self, kernel: Packing, q: Tensor, k: Tensor, v: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
        out, lse = kernel.attend_packed(self._q(q), self._kv(k), self._kv(v), self.pack, scaling)
        return out.unsqueeze(0), lse.unsqueeze(0)

    @property
    def places(self) -> range | Tensor:
        return self.pack.q_places

    def merge(self, into: Partial, out: Tensor, lse: Tensor) -> None:
        rows, m_rows, sum_rows = self.pack.q_rows, into.m.transpose(1, 2), into.sum.transpose(1, 2)
        before = Partial(*(x.unsqueeze(0) for x in (into.acc[rows], m_rows[rows].T, sum_rows[rows].T)))
        acc, m, total = (x.squeeze(0) for x in merge(before, Partial(out, lse)))
        into.acc[rows], m_rows[rows], sum_rows[rows] = acc, m.T, total.T

    def differentiate(self, kernel: Packing, up: Upstream, q: Tensor, k: Tensor, v: Tensor, scaling: Scaling) -> Gradients:
        lse, dlse = (None if x is None else x.transpose(1, 2)[self.pack.q_rows].T.contiguous() for x in (up.lse, up.dlse))
        rest = None if up.rest is None else self._q(up.rest)
        up = Upstream(self._q(up.dout), self._q(up.out), lse, dlse, rest)
        return kernel.differentiate_packed(up, self._q(q), self._kv(k), self._kv(v), self.pack, scaling)

    def add(self, into: Grads, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        _add_pack(into.q, [dq], self.pack.q_rows, self.pack.q_places)
        _add_pack(into.kv, [dk, dv], self.pack.kv_rows, self.pack.kv_places)

    def _q(self, x: Tensor) -> Tensor:
        return self._part(x, self.pack.q_rows)

    def _kv(self, x: Tensor) -> Tensor:
        return self._part(x, self.pack.kv_rows)

    def _part(self, x: Tensor, rows: Rows) -> Tensor:
        """The pack's rows [n, h, d] of x."""
        if isinstance(rows[1], slice) or not self.fuses(x):
            return x[rows]
        from ring_attn.kernels.triton_take import taken

        return taken(x, *rows)


def _add_pack(to: RowsOfSum, packed: Sequence[Tensor], rows: Rows, places: Tensor) -> None:
    """Adds results [n, h, d] whose rows are those, and of which `places` [b, s] says where each row of the sum is."""
    batched, (_, numbers) = [x.unsqueeze(0) for x in packed], rows
    if len(places) == 1 and isinstance(numbers, slice):
        to.add(batched, range(numbers.start, numbers.stop))
    else:
        to.add(batched, range(places.shape[1]), places.unsqueeze(-1))


def _merged(
    into: Partial, done: Sequence[tuple[Dense | Packed, Tensor, Tensor]], target: Tensor | None, apart: bool
) -> Partial:
    """`into` with the (call, out, lse) of one or two calls merged into it. With `target`, the normalised output of all rows is
    there then, or, where calls are `apart`, that of their own, and the final lse in the m of what is returned.
    """
    fuses = all(call.fuses(out) for call, out, _ in done)
    if target is None or not fuses:
        into = to_merge_into(into)
    if fuses:
        from ring_attn.kernels.triton_merge import Result, merge_call

        results = [Result(call.places, out, lse) for call, out, lse in done]
        merge_call(into, results, target, met_only=apart)()
        return into
    for call, out, lse in done:
        call.merge(into, out, lse)
    return into if target is None else finish(into, target)


def _apart(calls: Sequence[Dense | Packed], q: Tensor, gaps: bool) -> bool:
    """Whether calls have no query row in common and, without `gaps`, leave none out; see Note [apart]."""
    if len(calls) == 1:
        return calls[0].covers(q)
    if not all(isinstance(call, Dense) and call.tile.batch is None for call in calls):
        return False
    runs = sorted((call.tile.q_rows.start, call.tile.q_rows.stop) for call in calls)
    if gaps:
        return all(before <= start for (_, before), (start, _) in pairwise(runs))
    return [0, *(stop for _, stop in runs)] == [*(start for start, _ in runs), q.shape[1]]


def _is_output(into: Partial, out: Tensor) -> bool:
    """Whether a partial is what a library made, and may be returned in place of `out`; see Note [in place]."""
    alike = into.sum is None and (into.acc.dtype, into.acc.shape) == (out.dtype, out.shape)
    return alike and on_its_own(into.acc) and on_its_own(out)


def _alone(out: Tensor, lse: Tensor, target: Tensor | None) -> Partial:
    """A library's result as the partial of a whole visit, without a merge."""
    if target is not None and not on_its_own(out):
        out = target.copy_(out)
    return Partial(out, lse.contiguous())


def _can_fuse(out: Tensor) -> bool:
    """Whether the Triton merge runs here: one pass over memory, where plain PyTorch takes about ten."""
    return fused(out.device) and out.dtype != torch.float64
