"""Who may attend to whom, in global positions; masks are combined with `&`.

Every mask here reduces, for one batch row, to one `Rule`: a band on `q_pos - kv_pos`, the ends of packed documents, and a
count of valid keys. The rules of two masks intersect into a rule, so kernels and loops never learn which masks were asked for.
A key-padding or document mask may differ between batch rows; then there is one rule a row. What is no band (`MaskMod`) stays a
predicate beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Rule:
    """One batch row's mask: query i sees key j iff `i - left <= j <= i + right`, both lie in one document, and `j < num_keys`.

    `left`, `right`: None leaves that side open. `document_ends`: the cumulated ends, or None. `num_keys`: None means all.
    `predicates`: functions (b, h, i, j) that must all hold as well.
    """

    left: int | None = None
    right: int | None = None
    document_ends: tuple[int, ...] | None = None
    num_keys: int | None = None
    predicates: tuple[Callable, ...] = ()

    def __and__(self, other: Rule) -> Rule:
        ends = self.document_ends
        if other.document_ends is not None:
            ends = other.document_ends if ends is None else tuple(sorted({*ends, *other.document_ends}))
        return Rule(
            _smaller(self.left, other.left),
            _smaller(self.right, other.right),
            ends,
            _smaller(self.num_keys, other.num_keys),
            tuple(dict.fromkeys((*self.predicates, *other.predicates))),
        )


def _smaller(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


class Mask:
    """Base of all masks. Frozen, hashable; `a & b` allows what both allow."""

    def rules(self) -> tuple[Rule, ...]:
        """One rule for every batch row alike, or one rule a batch row."""
        raise NotImplementedError

    def check(self, seq_len: int, batch: int) -> None:
        """Raises ValueError where this mask does not fit a [batch, seq_len] input."""

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return All((*_parts(self), *_parts(other)))


def _parts(mask: Mask) -> tuple[Mask, ...]:
    return mask.masks if isinstance(mask, All) else (mask,)


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def rules(self) -> tuple[Rule, ...]:
        return (Rule(),)


@dataclass(frozen=True)
class Causal(Mask):
    """Query i sees keys j <= i."""

    def rules(self) -> tuple[Rule, ...]:
        return (Rule(right=0),)


@dataclass(frozen=True)
class Window(Mask):
    """Query i sees keys `i - left <= j <= i + right`, both ends included; None leaves that side open."""

    left: int | None
    right: int | None = 0

    def __post_init__(self) -> None:
        for side in ("left", "right"):
            reach = getattr(self, side)
            if reach is None:
                continue
            reach = _whole("Window", reach)
            if reach < 0:
                raise ValueError(f"Window {side} must be at least 0 positions, or None for an open side, got {reach}")
            object.__setattr__(self, side, reach)

    def rules(self) -> tuple[Rule, ...]:
        return (Rule(left=self.left, right=self.right),)


@dataclass(frozen=True, init=False)
class Documents(Mask):
    """Packed documents: query and key must lie in the same one.

    Pass `lengths=[5, 9, 2]`, or `cu_seqlens=[0, 5, 14, 16]` as varlen kernels take it, or one such list a batch row. The
    lengths of a row must add up to the sequence length. Sequences of ints and integer tensors are both taken.
    """

    ends: tuple[tuple[int, ...], ...]

    def __init__(self, lengths: Sequence | None = None, *, cu_seqlens: Sequence | None = None) -> None:
        if (lengths is None) == (cu_seqlens is None):
            raise ValueError("Documents takes exactly one of lengths=... and cu_seqlens=...")
        rows = _rows_of_ints("Documents", cu_seqlens if lengths is None else lengths)
        ends = tuple(_ends_from_lengths(row) if lengths is not None else _ends_from_cu_seqlens(row) for row in rows)
        object.__setattr__(self, "ends", ends)

    def rules(self) -> tuple[Rule, ...]:
        return tuple(Rule(document_ends=row) for row in self.ends)

    def check(self, seq_len: int, batch: int) -> None:
        _check_rows("Documents", len(self.ends), batch)
        for row in self.ends:
            total = row[-1] if row else 0
            if total != seq_len:
                raise ValueError(
                    f"the documents add up to {total} positions, but seq_len is {seq_len}; "
                    f"count padding as one more document, or leave it out of the sequence"
                )


@dataclass(frozen=True, init=False)
class KeyPadding(Mask):
    """Keys at positions >= lengths[row] are padding that no query of that batch row sees.

    `lengths`: one int a batch row (or a single one for all rows), an integer tensor is taken too.
    """

    lengths: tuple[int, ...]

    def __init__(self, lengths: Sequence[int] | int) -> None:
        counts, *more = _rows_of_ints("KeyPadding", lengths)
        if more or not counts:
            raise ValueError(f"KeyPadding takes one length a batch row, such as [5, 9], or one for all, got {lengths}")
        if any(count < 0 for count in counts):
            raise ValueError(f"KeyPadding lengths must be at least 0, got {list(counts)}")
        object.__setattr__(self, "lengths", counts)

    def rules(self) -> tuple[Rule, ...]:
        return tuple(Rule(num_keys=count) for count in self.lengths)

    def check(self, seq_len: int, batch: int) -> None:
        _check_rows("KeyPadding", len(self.lengths), batch)
        if max(self.lengths, default=0) > seq_len:
            raise ValueError(f"KeyPadding lengths {list(self.lengths)} must not exceed seq_len {seq_len}")


@dataclass(frozen=True, repr=False)
class MaskMod(Mask):
    """Query i of batch row b and head h sees key j iff fn(b, h, i, j), in global positions, as torch's flex_attention takes it.

    `fn` gets and returns integer and bool scalars (tensors under vmap). Two masks are the same only if their functions are.
    """

    fn: Callable

    def __repr__(self) -> str:
        return f"MaskMod({getattr(self.fn, '__qualname__', type(self.fn).__name__)})"

    def rules(self) -> tuple[Rule, ...]:
        return (Rule(predicates=(self.fn,)),)


@dataclass(frozen=True)
class All(Mask):
    """What every one of `masks` allows; written `a & b & c`."""

    masks: tuple[Mask, ...]

    def rules(self) -> tuple[Rule, ...]:
        merged: tuple[Rule, ...] = (Rule(),)
        for mask in self.masks:
            rules = mask.rules()
            rows = max(len(merged), len(rules))
            if {len(merged), len(rules)} - {1, rows}:
                raise ValueError(f"masks for {len(merged)} and for {len(rules)} batch rows cannot be combined")
            merged = tuple(merged[i % len(merged)] & rules[i % len(rules)] for i in range(rows))
        return merged

    def check(self, seq_len: int, batch: int) -> None:
        for mask in self.masks:
            mask.check(seq_len, batch)


def _rows_of_ints(name: str, values) -> tuple[tuple[int, ...], ...]:
    """`values` (an int, ints, or rows of ints, in lists or integer tensors) as a tuple of rows of Python ints."""
    values = values.tolist() if hasattr(values, "tolist") else values
    values = [v.tolist() if hasattr(v, "tolist") else v for v in (values if isinstance(values, Iterable) else [values])]
    nested = [isinstance(value, Iterable) for value in values]
    if any(nested) and not all(nested):
        raise ValueError(f"{name} takes ints, or one list of ints a batch row, not a mixture: {values}")
    rows = values if nested and all(nested) else [values]
    return tuple(tuple(_whole(name, value) for value in row) for row in rows)


def _whole(name: str, value) -> int:
    """`value`, an int or an integer scalar of another library, as a Python int."""
    number = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{name} takes whole numbers, got {value!r}")
    return number


def _ends_from_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    if any(length < 0 for length in lengths):
        raise ValueError(f"document lengths must be at least 0, got {list(lengths)}")
    return tuple(accumulate(lengths))


def _ends_from_cu_seqlens(cu_seqlens: tuple[int, ...]) -> tuple[int, ...]:
    rising = all(a <= b for a, b in pairwise(cu_seqlens))
    if not cu_seqlens or cu_seqlens[0] != 0 or not rising:
        raise ValueError(f"cu_seqlens must start at 0 and never fall, got {list(cu_seqlens)}")
    return cu_seqlens[1:]


def _check_rows(name: str, rows: int, batch: int) -> None:
    if rows not in (1, batch):
        raise ValueError(f"{name} was given for {rows} batch rows, but the batch is {batch}; give one row or {batch}")
