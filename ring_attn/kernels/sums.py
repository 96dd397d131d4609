"""Gradients as they add up over the visits of a backward, and what a kernel is told of them.

Note [late]: what a library hands back, and what other ranks send, stays as it came until the sum is wanted. Then one pass over
memory reads all of it and writes the sum, rounded, to where it is wanted: to an input's gradient, or to what a peer reads. To
add each to a total in fp32 as it comes would read and write that every time, and once more in the end. What is kept takes
memory: three results in 16 bits as much as a total and a result that is added to it. So where more is to come, users `settle`,
as does a sum of which more has come than one pass takes. Without Triton all is added as it comes. Kernels that add by
themselves get the total, which is then one more of the things that are summed up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ring_attn.kernels import has_triton
from ring_attn.partial import accumulator_dtype

MOST = 4
"""So much is kept; one pass takes as many and a total."""


class Addend(NamedTuple):
    """What is added to rows `rows` of a sum's tensors: tensors [b, len(rows), h, d].

    With `places`, int32 [b, len(rows), k] and contiguous: tensors [1, n, h, d], of which these are the rows that are added to
    each of the sum's, -1 for none.
    """

    tensors: Sequence[Tensor]
    rows: range
    places: Tensor | None = None

    def is_all_of(self, rows: range, dtype: torch.dtype) -> bool:
        """Whether sums of those rows in `dtype` are these tensors."""
        return self.rows == rows and self.places is None and all(x.dtype == dtype and on_its_own(x) for x in self.tensors)


class Sum:
    """The sums of tensors [b, s, h, d] with the same rows, in `dtype`; see Note [late]. `make`: makes the total, unwritten.

    `aim`: set where a single visit makes all of the sums, what makes the tensors that they will be written to; a kernel may
    write there itself, rounded.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], Sequence[Tensor]] | None = None,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.rows = range(shapes[0][1])
        self.total: Sequence[Tensor] | None = None
        self.aim: Callable[[], Sequence[Tensor]] | None = None
        self._make = make or partial(_unwritten, shapes, dtype, device)
        self._unwritten = [self.rows]
        self._late: list[Addend] = []

    @property
    def all_rows(self) -> RowsOfSum:
        return RowsOfSum(self, self.rows)

    def claim(self, rows: range, once: bool = False) -> tuple[list[Tensor], bool]:
        """Those rows of the total for a kernel that adds to them, or, where True is beside them, writes all of them.

        `once`: it does nothing but write them, once, so that they may be in another dtype, those of `aim`; RuntimeError where
        something was added before.
        """
        if once and self.aim is not None:
            if self.total is not None or self._late:
                raise RuntimeError("a sum is aimed that more than one visit makes")
            self.total = list(self.aim())
        return self._of_total(rows), self._mark(rows)

    def add(self, tensors: Sequence[Tensor], rows: range, places: Tensor | None = None, batch: int | None = None) -> None:
        """Adds an `Addend`, or what is [1, len(rows), h, d] for one `batch` row; its tensors are not to be written to."""
        if batch is None and fused(self.device):
            if len(self._late) == MOST:
                self.settle()
            self._late.append(Addend(tensors, rows, places))
            return
        total, unwritten = self.claim(rows)
        if unwritten and not (places is None and batch is None):
            for x in total:
                x.zero_()
        for x, addend in zip(total, tensors, strict=True):
            if places is not None:
                _add_at(x, addend, places)
            elif batch is not None:
                x[batch : batch + 1] += addend
            elif unwritten:
                x.copy_(addend)
            else:
                x += addend

    def settle(self) -> None:
        """Adds to the total what was kept, which then takes no memory any more."""
        late, self._late = self._late, []
        if not late:
            return
        span = range(min(one.rows.start for one in late), max(one.rows.stop for one in late))
        total = self._of_total(span)
        base = [] if self._mark(span) else [Addend(total, span)]
        self._launch(total, [*base, *late], span)

    def made(self, dtype: torch.dtype, targets: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """The sums in `dtype`: what there is of them, where that is one thing in memory of its own, else what `targets` makes,
        written. Nothing is left of them here.
        """
        found = [*([] if self.total is None else [Addend(self.total, self.rows)]), *self._late]
        if len(found) == 1 and found[0].is_all_of(self.rows, dtype) and not (self.total and self._unwritten):
            self.total, self._late, self._unwritten = None, [], [self.rows]
            return found[0].tensors
        written = targets()
        self.write(written)
        return written

    def write(self, targets: Sequence[Tensor]) -> None:
        """Writes the sums to `targets`, in their dtype; nothing is left of them here."""
        late, self._late = self._late, []
        total, self.total = self.total, None
        if total is not None:
            self._write_rest(total)
        found = [*([] if total is None else [Addend(total, self.rows)]), *late]
        self._unwritten = [self.rows]
        if not found:
            for x in targets:
                x.zero_()
        elif late or total[0].data_ptr() != targets[0].data_ptr():
            if fused(self.device):
                self._launch(targets, found, self.rows)
            else:
                for x, y in zip(targets, total, strict=True):
                    x.copy_(y)

    def _launch(self, targets: Sequence[Tensor], addends: Sequence[Addend], rows: range) -> None:
        from ring_attn.kernels.triton_sum import sum_call

        # Sorted, there are fewer kinds of launches, each of which is compiled.
        addends = sorted(addends, key=lambda one: 0 if one.places is None else one.places.shape[2])
        sum_call(targets, addends, rows, self.dtype)()

    def _of_total(self, rows: range) -> list[Tensor]:
        if self.total is None:
            self.total = self._make()
        return [x[:, rows.start : rows.stop] for x in self.total]

    def _mark(self, rows: range) -> bool:
        """Whether those rows of the total held nothing at all; otherwise what of them holds nothing is made 0."""
        met = [range(max(rows.start, x.start), min(rows.stop, x.stop)) for x in self._unwritten]
        before = [range(x.start, min(x.stop, rows.start)) for x in self._unwritten]
        behind = [range(max(x.start, rows.stop), x.stop) for x in self._unwritten]
        self._unwritten = [x for x in (*before, *behind) if x]
        if sum(map(len, met)) == len(rows):
            return True
        for piece in met:
            for x in self.total if piece else ():
                x[:, piece.start : piece.stop].zero_()
        return False

    def _write_rest(self, total: Sequence[Tensor]) -> None:
        """What no visit has written of the total is 0."""
        for rows in self._unwritten:
            for x in total:
                x[:, rows.start : rows.stop].zero_()


class RowsOfSum(NamedTuple):
    """Those rows of a sum that a visit adds to, from 0 on."""

    sum: Sum
    rows: range

    def add(self, tensors: Sequence[Tensor], rows: range, places: Tensor | None = None, batch: int | None = None) -> None:
        first = self.rows.start
        self.sum.add(tensors, range(first + rows.start, first + rows.stop), places, batch)

    def claim(self, once: bool = False) -> tuple[list[Tensor], bool]:
        return self.sum.claim(self.rows, once)


class Grads(NamedTuple):
    """Where a visit's gradients are added: `q` has dq [b, s, h, d], `kv` dk [b, skv, g, d] and dv [b, skv, g, dv].

    `score`: where those of the score modifiers' tensors are, in their order and shapes; None where no gradient is wanted.
    """

    q: RowsOfSum
    kv: RowsOfSum
    score: tuple[Tensor | None, ...] = ()

    @classmethod
    def like(cls, q: Tensor, k: Tensor, v: Tensor, score: tuple[Tensor | None, ...] = ()) -> Grads:
        """For these inputs, and nothing added yet."""
        sums = (Sum([x.shape for x in of], accumulator_dtype(q.dtype), q.device) for of in ([q], [k, v]))
        return cls(*(one.all_rows for one in sums), score)

    def write(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        self.q.sum.write([dq])
        self.kv.sum.write([dk, dv])

    def totals(self, once_q: bool = False, once_kv: bool = False) -> Totals:
        """For a kernel that adds by itself; `once_q`, `once_kv`: that writes dq, or dk and dv, once."""
        (dq,), unwritten_q = self.q.claim(once_q)
        (dk, dv), unwritten_kv = self.kv.claim(once_kv)
        return Totals(dq, dk, dv, self.score, unwritten_q, unwritten_kv)


class Totals(NamedTuple):
    """The same as tensors, in the dtype of lse where they are added to. `unwritten_q`, `unwritten_kv`: dq, or dk and dv, hold
    nothing yet; a kernel writes all of their rows.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    score: tuple[Tensor | None, ...] = ()
    unwritten_q: bool = False
    unwritten_kv: bool = False

    @property
    def written(self) -> Totals:
        """The same, now that everything has been written."""
        return self._replace(unwritten_q=False, unwritten_kv=False)

    def zeroed(self) -> Totals:
        """The same with zeros in what was unwritten, for a kernel that can only add."""
        for x in (*((self.dq,) if self.unwritten_q else ()), *((self.dk, self.dv) if self.unwritten_kv else ())):
            x.zero_()
        return self.written


def fused(device: torch.device) -> bool:
    """Whether sums are made by Triton."""
    return device.type == "cuda" and has_triton()


def on_its_own(x: Tensor) -> bool:
    """Whether x can be handed over: it is contiguous, and all of its memory."""
    return x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.itemsize


def lay_beside(pieces: Sequence[Tensor], out: Tensor) -> None:
    """Writes pieces [b, n, e] beside each other to `out` [b, n, sum of e].

    Pieces of longer rows, as those of some heads, PyTorch reads at a third of the memory's speed: there a pass of ours does it.
    """
    width = pieces[0].shape[2]
    head = min(width & -width, 128)
    alike = len(pieces) == 2 and pieces[0].shape == pieces[1].shape and head >= 16 and out.is_floating_point()
    if not (alike and fused(out.device)) or all(x.is_contiguous() for x in pieces):
        torch.cat(list(pieces), -1, out=out)
        return
    from ring_attn.kernels.triton_sum import sum_call

    targets, found = ([x.unflatten(2, (-1, head)) for x in of] for of in (out.split(width, 2), pieces))
    rows = range(out.shape[1])
    sum_call(targets, [Addend(found, rows)], rows, accumulator_dtype(out.dtype))()


def _unwritten(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def _add_at(total: Tensor, x: Tensor, places: Tensor) -> None:
    """Adds by places as those of an `Addend`."""
    for column in places.unbind(-1):
        met = (column >= 0)[..., None, None]
        total += torch.where(met, x[0, column.clamp(min=0)], 0)
