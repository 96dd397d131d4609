"""Who may attend to whom, in global positions; masks are combined with `&`.

Every mask here reduces, for one batch row, to one `Rule`: a band on `q_pos - kv_pos`, the ends of packed documents, and a
range of valid keys. The rules of two masks intersect into a rule, so kernels and loops never learn which masks were asked for.
A key-padding or document mask may differ between batch rows; then there is one rule a row. What is no band (`MaskMod`) stays a
predicate beside it.

In cross-attention queries and keys count their positions each from the start of their own sequence: `Causal` lines up the
starts, and `Window(None, kv_len - q_len)` the ends, as flash-attn does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from ring_attn.typed import is_jitted, whole

Ends = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One batch row's mask: query i sees key j iff `i - left <= j <= i + right`, both lie in one document of every packing, and
    `first_key <= j < num_keys`.

    `left`, `right`: None leaves that side open. `documents`: packings, each the cumulated ends of the queries' documents and of
    the keys'. `num_keys`: None means all. `predicates`: what must hold as well.
    """

    left: int | None = None
    right: int | None = None
    documents: tuple[tuple[Ends, Ends], ...] = ()
    first_key: int = 0
    num_keys: int | None = None
    predicates: tuple[MaskMod, ...] = ()

    def __and__(self, other: Rule) -> Rule:
        return Rule(
            _smaller(self.left, other.left),
            _smaller(self.right, other.right),
            tuple(dict.fromkeys((*self.documents, *other.documents))),
            max(self.first_key, other.first_key),
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

    def check(self, seq_len: int, kv_len: int, batch: int) -> None:
        """Raises ValueError where this mask does not fit `batch` rows of seq_len queries and kv_len keys."""

    def from_head(self, first: int) -> Mask:
        """The mask of a call whose head 0 is this one's head `first`."""
        return self

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return All((*parts_of(self), *parts_of(other)))


def check_mask(mask: object) -> None:
    """Raises TypeError for what is none."""
    if not isinstance(mask, Mask):
        kind = isinstance(mask, type) and issubclass(mask, Mask)
        got = f"the class {mask.__name__}: write {mask.__name__}(...)" if kind else type(mask).__name__
        raise TypeError(f"mask must be a ring_attn mask such as Causal() & Window(1024), got {got}")


def parts_of(mask: Mask) -> tuple[Mask, ...]:
    """The masks that were joined to make this one, or itself."""
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
            reach = whole("Window", reach)
            if reach < 0:
                raise ValueError(f"Window {side} must be at least 0 positions, or None for an open side, got {reach}")
            object.__setattr__(self, side, reach)

    def rules(self) -> tuple[Rule, ...]:
        return (Rule(left=self.left, right=self.right),)


@dataclass(frozen=True, init=False)
class Documents(Mask):
    """Packed documents: query and key must lie in the same one.

    Pass `lengths=[5, 9, 2]`, or `cu_seqlens=[0, 5, 14, 16]` as varlen kernels take it, or one such list a batch row. The
    lengths of a row must add up to the sequence length. Sequences of ints and integer tensors are both taken. In
    cross-attention `kv_lengths` (or `kv_cu_seqlens`) are those of the keys: query document n sees key document n.
    """

    ends: tuple[Ends, ...]
    kv_ends: tuple[Ends, ...]

    def __init__(
        self,
        lengths: Sequence | None = None,
        *,
        cu_seqlens: Sequence | None = None,
        kv_lengths: Sequence | None = None,
        kv_cu_seqlens: Sequence | None = None,
    ) -> None:
        if kv_lengths is not None and kv_cu_seqlens is not None:
            raise ValueError("Documents takes at most one of kv_lengths=... and kv_cu_seqlens=...")
        ends = kv_ends = document_ends("Documents", lengths, cu_seqlens)
        if kv_lengths is not None or kv_cu_seqlens is not None:
            kv_ends = document_ends("Documents", kv_lengths, kv_cu_seqlens)
            counts = [len(row) for row in ends], [len(row) for row in kv_ends]
            if counts[0] != counts[1]:
                raise ValueError(f"every document needs queries and keys, of 0 rows at least, got {counts[0]} and {counts[1]}")
        object.__setattr__(self, "ends", ends)
        object.__setattr__(self, "kv_ends", kv_ends)

    def rules(self) -> tuple[Rule, ...]:
        return tuple(Rule(documents=(pair,)) for pair in zip(self.ends, self.kv_ends, strict=True))

    def check(self, seq_len: int, kv_len: int, batch: int) -> None:
        _check_rows("Documents", len(self.ends), batch)
        for name, length, rows in (("seq_len", seq_len, self.ends), ("the keys' length", kv_len, self.kv_ends)):
            for row in rows:
                total = row[-1] if row else 0
                if total != length:
                    raise ValueError(
                        f"the documents add up to {total} positions, but {name} is {length}; count padding as one more "
                        f"document, or leave it out of the sequence; keys of another length than queries need kv_lengths"
                    )


@dataclass(frozen=True, init=False)
class KeyPadding(Mask):
    """Keys before starts[row] (padding on the left) and from lengths[row] on (on the right) are seen by no query of that row.

    Both count from position 0: a row of 3 valid keys behind 5 of padding is `starts=[5]`. Each is one int a batch row, or a
    single one for all rows; an integer tensor is taken too. A start beyond the keys leaves a row none.
    """

    lengths: Ends | None
    starts: Ends | None

    def __init__(self, lengths: Sequence[int] | int | None = None, *, starts: Sequence[int] | int | None = None) -> None:
        if lengths is None and starts is None:
            raise ValueError("KeyPadding takes lengths=... (padding on the right), starts=... (on the left), or both")
        for name, given in (("lengths", lengths), ("starts", starts)):
            object.__setattr__(self, name, None if given is None else _counts(name, given))
        if None not in (self.lengths, self.starts):
            rows = max(len(self.lengths), len(self.starts))
            for name in ("lengths", "starts"):
                counts = getattr(self, name)
                object.__setattr__(self, name, counts * rows if len(counts) == 1 else counts)
        if None not in (self.lengths, self.starts) and len(self.lengths) != len(self.starts):
            raise ValueError(f"KeyPadding needs as many starts as lengths, got {len(self.starts)} and {len(self.lengths)}")

    def rules(self) -> tuple[Rule, ...]:
        rows = len(self.lengths or self.starts)
        starts, lengths = self.starts or (0,) * rows, self.lengths or (None,) * rows
        return tuple(Rule(first_key=start, num_keys=length) for start, length in zip(starts, lengths, strict=True))

    def check(self, seq_len: int, kv_len: int, batch: int) -> None:
        _check_rows("KeyPadding", len(self.lengths or self.starts), batch)
        if max(self.lengths or (0,)) > kv_len:
            raise ValueError(f"KeyPadding lengths {list(self.lengths)} must not exceed the number of keys, {kv_len}")


@dataclass(frozen=True, repr=False)
class MaskMod(Mask):
    """Query i of batch row b and head h sees key j iff fn(b, h, i, j), in global positions, as torch's flex_attention takes it.

    `fn` gets and returns integer and bool scalars (tensors under vmap). Two masks are the same only if their functions are.

    `triton`: the same for the Triton kernels, which need it: a @triton.jit function (b, h, q_pos, kv_pos) -> bool that works on
    each element of a block: q_pos and kv_pos are int32 that broadcast to it, b and h int32 scalars. `fn` is asked beside it, on
    the device of q, which blocks are hidden or whole.

    Kernels keep what a function leaves of a block. So where anything changes that it reads, make a new MaskMod of a new
    function, and capture CUDA graphs anew; of tensors that it closes over or names as globals, in-place operations are noticed,
    between a forward and its backward by a RuntimeError (in eager mode).
    """

    fn: Callable
    triton: Callable | None = None
    first_head: int = field(default=0, kw_only=True)  # the number of a call's head 0, where ranks attend to a part of the heads

    def __post_init__(self) -> None:
        if self.triton is not None and not is_jitted(self.triton):
            raise TypeError(f"{self!r} takes triton=predicate, a @triton.jit function, got {self.triton!r}")

    def __repr__(self) -> str:
        return f"MaskMod({getattr(self.fn, '__qualname__', type(self.fn).__name__)})"

    def rules(self) -> tuple[Rule, ...]:
        return (Rule(predicates=(self,)),)

    def from_head(self, first: int) -> Mask:
        return replace(self, first_head=self.first_head + first)


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

    def check(self, seq_len: int, kv_len: int, batch: int) -> None:
        for mask in self.masks:
            mask.check(seq_len, kv_len, batch)

    def from_head(self, first: int) -> Mask:
        return All(tuple(mask.from_head(first) for mask in self.masks))


def _rows_of_ints(name: str, values) -> tuple[tuple[int, ...], ...]:
    """`values` (an int, ints, or rows of ints, in lists or integer tensors) as a tuple of rows of Python ints."""
    values = values.tolist() if hasattr(values, "tolist") else values
    values = [v.tolist() if hasattr(v, "tolist") else v for v in (values if isinstance(values, Iterable) else [values])]
    nested = [isinstance(value, Iterable) for value in values]
    if any(nested) and not all(nested):
        raise ValueError(f"{name} takes ints, or one list of ints a batch row, not a mixture: {values}")
    rows = values if nested and all(nested) else [values]
    return tuple(tuple(whole(name, value) for value in row) for row in rows)


def document_ends(who: str, lengths: Sequence | None, cu_seqlens: Sequence | None) -> tuple[Ends, ...]:
    """The cumulated ends of the documents, a tuple a batch row, from the one of the two that is given to `who`."""
    if (lengths is None) == (cu_seqlens is None):
        raise ValueError(f"{who} takes exactly one of lengths=... and cu_seqlens=...")
    if lengths is not None:
        return tuple(map(_ends_from_lengths, _rows_of_ints(who, lengths)))
    return tuple(map(_ends_from_cu_seqlens, _rows_of_ints(who, cu_seqlens)))


def _counts(name: str, values: Sequence[int] | int) -> Ends:
    if getattr(values, "dtype", None) is not None and str(values.dtype).endswith("bool"):
        raise ValueError(f"KeyPadding {name} are numbers of keys, got a mask; those of a padding mask are lengths=mask.sum(1)")
    counts, *more = _rows_of_ints("KeyPadding", values)
    if more or not counts:
        raise ValueError(f"KeyPadding {name} are one int a batch row, such as [5, 9], or one for all rows, got {values}")
    if any(count < 0 for count in counts):
        raise ValueError(f"KeyPadding {name} must be at least 0, got {list(counts)}")
    return counts


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
