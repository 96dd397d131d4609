"""The space of attention calls, each a `case(...)` of plain values: against the dense truth, or refused in words.

`case` runs one and returns "right" or "refused"; a failure's message is the line that runs it again. `cases` is the hypothesis
strategy over all of them.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from math import lcm
from operator import and_
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from torch import Tensor

import ring_attn as ra
from ring_attn import exchange as exchanges
from ring_attn.call import Call
from ring_attn.kernels import KernelUnavailable, get_kernel
from ring_attn.mask import Mask
from tests.scores import (
    Piece,
    Sizes,
    alibi,
    bias,
    closure_mod,
    compared,
    constant_mod,
    cosine,
    dropout,
    global_mod,
    learned_cosine,
    plain,
    relative,
    seen_cells,
    sinks,
    softcap,
)
from tests.support import GRAD_FACTOR, OUT_FACTOR, random_qkv, rel_error

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
ROUNDINGS = 2  # to the nearest number of a 16-bit dtype, see `limits_in_16_bits`
LSE_LIMIT = 1e-4  # in 16 bits: lse is in fp32, of which PyTorch's exp in 16 bits on CPUs keeps this much
LAYOUTS = ("contiguous", "striped", "zigzag")
KERNELS = ("reference", "auto", "aten", "cudnn")
FUNCTIONS = {
    "dilated": lambda n: lambda b, h, q, k: (q - k) % n == 0,
    "prefix": lambda n: lambda b, h, q, k: (k < n) | (k <= q),
    "blocks": lambda n: lambda b, h, q, k: (q // n == k // n) | (k % n == 0),
    "heads": lambda n: lambda b, h, q, k: (q + k * (h + 1) + b) % (n + 1) > 0,
    "table": lambda n: _by_table(torch.rand(42, 42, generator=torch.Generator().manual_seed(n)) < 0.4),
}


MASKS = {
    "MaskMod": lambda name, n: ra.MaskMod(FUNCTIONS[name](n)),
    "Documents": lambda lengths, kv_lengths=None: ra.Documents(lengths, kv_lengths=kv_lengths),
    "KeyPadding": lambda lengths, starts=None: ra.KeyPadding(lengths, starts=starts),
}


def _by_table(table: Tensor):
    return lambda b, h, q, k: table[q, k]


SCORES = {
    "softcap": lambda cap: lambda n: softcap(n, cap),
    "alibi": lambda: alibi,
    "relative": relative,
    "bias": bias,
    "closure mod": lambda: closure_mod,
    "global mod": lambda: global_mod,
    "constant mod": lambda: constant_mod,
    "sinks": lambda: sinks,
    "cosine": cosine,
    "learned cosine": learned_cosine,
    "dropout": dropout,
}


def mask_of(parts: tuple[tuple, ...]) -> Mask:
    """("Window", 3, None) is ra.Window(3, None); several are joined, each made as MASKS says."""
    return reduce(and_, (MASKS.get(kind, getattr(ra, kind))(*x) for kind, *x in parts), ra.Full())


def case(
    ring: int = 1,
    ulysses: int = 1,
    layout: str | tuple[int, ...] = "contiguous",
    exchange: str = "ring",
    kernel: str = "reference",
    kv_rows: int | None = None,
    t: int = 8,
    b: int = 1,
    kv: tuple[str | tuple[int, ...], int] | None = None,
    heads: tuple[int, int] = (1, 1),
    dims: tuple[int, int] = (4, 4),
    dtype: str = "float64",
    mask: tuple = (("Causal",),),
    scores: tuple = (),
    scale: float | None = None,
    lse_grad: bool = True,
    keep_kv: bool = False,
    per_node: int | None = None,
    own_last: bool = False,
    strided: bool = False,
    seed: int = 0,
) -> str:
    """ "right", or "refused" by a kernel named that says it cannot. Raises AssertionError with the line that runs it again."""
    line = f"case({', '.join(f'{name}={value!r}' for name, value in locals().items())})"
    (h, g), (d, dv) = heads, dims
    kv_layout, kv_len = kv or (None, None)
    # Lengths are those of the layout by document.
    layout, kv_layout = (ra.ByDocument(x) if isinstance(x, tuple) else x for x in (layout, kv_layout))
    n = Sizes(b, t, h, g, d, dv, getattr(torch, dtype), seed, kv_len, kv_layout)
    memory = kv_rows and kv_rows * 2 * b * g * (d + dv) * n.dtype.itemsize
    options = {"exchange": exchange, "kernel": kernel, "ulysses": ulysses, "kv_memory": memory, "keep_kv": keep_kv}
    options["ranks_per_node"] = per_node and per_node * ulysses
    simulated = ra.Ring.simulated(ring * ulysses, layout, **options, hostile=True)
    made, pieces = mask_of(mask), [SCORES[kind](*options)(n) for kind, *options in scores]
    reason = refusal(simulated, n, made, pieces, lse_grad)
    try:
        # Where anything comes home, some of the own shard is met last.
        with patch.object(exchanges, "HALVES_FROM", 1 if own_last else exchanges.HALVES_FROM):
            found = compared(simulated, n, made, pieces, scale=scale, lse_grad=lse_grad, strided=strided)
    except KernelUnavailable as unavailable:
        if reason is None or reason not in str(unavailable):
            raise AssertionError(f"refused against its word ({unavailable}): {line}") from unavailable
        return "refused"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {line}") from error
    assert reason is None, f"done against its word ({reason}): {line}"
    sizes = sizes_of(n, pieces)
    limits = [LIMITS[n.dtype]] * len(found) if n.dtype in LIMITS else limits_in_16_bits(found, n, made, pieces, scale, lse_grad)
    errors = [error_of(x, ref, size) for (x, ref), size in zip(found.values(), sizes, strict=True)]
    wrong = {name: e for name, e, limit in zip(found, errors, limits, strict=True) if not e <= limit}
    assert not wrong, f"{wrong}: {line}"
    return "right"


def refusal(ring: ra.Ring, n: Sizes, mask: Mask, pieces: list[Piece], lse_grad: bool) -> str | None:
    """Why the kernel named says it cannot do this, or None."""
    if ring.kernel == "auto":
        return None
    shapes = (n.t, n.h, n.d), (n.keys, n.g, n.d), (n.keys, n.g, n.dv)
    q, k, v = (torch.empty(n.b, *shape, dtype=n.dtype) for shape in shapes)
    call = Call.make(ring, mask, [piece.make(piece.leaves, ring) for piece in pieces], 1.0)
    part, *qkv = call.of_part(q, k, v)
    problems = part.problem(*qkv, "forward"), part.problem(*qkv, "backward", lse_grad)
    return next((reason for p in problems if (reason := get_kernel(ring.kernel).supports(p))), None)


def sizes_of(n: Sizes, pieces: list[Piece]) -> list[float]:
    """How large the numbers are that are rounded on the way to out, lse and every gradient."""
    num_tensors, far = sum(len(piece.leaves) for piece in pieces), max(n.t, n.keys)
    # Terms of q's, k's and v's sums are about 1; a score tensor's carry a distance up to t and a factor of dropout up to 10.
    if n.dtype in LIMITS:
        return [1] * 5 + [10 * far] * num_tensors
    # In 16 bits are out, from which each row's gradients take one number off, rows of unit norm, and the dq that a scale of
    # theirs sums up; all else is in 32. Errors of rows add up like their roots.
    dropped = max([1, *(piece.keep.max().item() for piece in pieces if piece.keep is not None)])
    row, tensor = (10 * dropped, far * dropped) if any(piece.cosine for piece in pieces) else (dropped, dropped)
    rows = row * (n.t * n.h / n.g) ** 0.5
    return [1, 1, row, rows, rows] + [tensor] * num_tensors


def limits_in_16_bits(
    found: dict[str, tuple[Tensor, Tensor]], n: Sizes, mask: Mask, pieces: list[Piece], scale: float | None, lse_grad: bool
) -> list[float]:
    """What the error of plain PyTorch in that dtype allows; `found` as `compared` has it, here for the truth.

    Of a few numbers plain PyTorch may happen to have almost no error: some roundings of what is as large as the truth, or as
    `sizes_of`, are allowed as well. In 6,000 cases none took 1.5.
    """
    q, k, v, dout = random_qkv(n.b, n.t, n.keys, n.h, n.g, n.d, n.dv, dtype=n.dtype, seed=n.seed)
    leaves = [x.requires_grad_() for x in (q, k, v)] + [x for piece in pieces for x in piece.leaves]
    rough = plain(*leaves[:3], seen_cells(mask, n), pieces, scale)
    dlse = torch.randn(rough[1].shape, generator=torch.Generator().manual_seed(n.seed), dtype=torch.float64).to(n.dtype)
    asked = slice(2 if lse_grad else 1)
    grads = torch.autograd.grad(rough[asked], leaves, (dout, dlse)[asked], allow_unused=True, materialize_grads=True)
    # A gradient is rounded as its tensor is.
    rounded, truths = [x.to(n.dtype) for x in (*rough, *grads)], [truth for _, truth in found.values()]
    errors = map(error_of, rounded, truths, sizes_of(n, pieces))
    factors, least = [OUT_FACTOR] * 2 + [GRAD_FACTOR] * len(leaves), ROUNDINGS * torch.finfo(n.dtype).eps / 2
    limits = [max(factor * error, least) for factor, error in zip(factors, errors, strict=True)]
    # Rows of unit norm are in 16 bits, and scores with them.
    return limits if any(piece.cosine for piece in pieces) else [limits[0], LSE_LIMIT, *limits[2:]]


def error_of(x: Tensor, ref: Tensor, size: float) -> float:
    """The relative error; where the truth all but cancels, relative to entries of `size`, as the terms of its sums are."""
    norm = ref.masked_fill(ref == -torch.inf, 0).detach().double().norm().item()
    floor = size * ref.numel() ** 0.5
    return rel_error(x, ref) * min(1.0, (norm or 1.0) / floor)


@st.composite
def partitions(draw, *totals: int, rows: int | None) -> tuple:
    """Lengths, some of them 0, that add up to each of the totals, as many for each; `rows` such tuples, or one."""
    if rows is not None:
        by_row = [draw(partitions(*totals, rows=None)) for _ in range(rows)]
        return tuple(zip(*by_row, strict=True))
    places = draw(st.lists(st.tuples(*(st.integers(0, total) for total in totals)), max_size=4))
    cuts = [sorted(side) for side in zip(*places, strict=True)] or [[] for _ in totals]
    lengths = ([b - a for a, b in pairwise([0, *side, total])] for side, total in zip(cuts, totals, strict=True))
    return tuple(map(tuple, lengths))


def by_document(t: int) -> st.SearchStrategy:
    """Lengths for the layout by document."""
    return partitions(t, rows=None).map(lambda sides: sides[0])


def masks(t: int, keys: int | None, b: int) -> st.SearchStrategy:
    """Masks of t queries and, in cross-attention, `keys` keys."""
    side, totals = st.none() | st.integers(0, t), (t,) if keys is None else (t, keys)
    counts = st.lists(st.integers(0, keys or t), min_size=b, max_size=b).map(tuple)
    one = st.one_of(
        st.just(("Causal",)),
        st.just(("Full",)),
        st.tuples(st.just("Window"), side, side),
        st.sampled_from([None, b]).flatmap(lambda rows: partitions(*totals, rows=rows)).map(lambda x: ("Documents", *x)),
        st.tuples(st.just("KeyPadding"), counts) | st.tuples(st.just("KeyPadding"), counts, counts),
        st.tuples(st.just("MaskMod"), st.sampled_from(sorted(FUNCTIONS)), st.integers(1, 9)),
    )
    return st.lists(one, max_size=3).map(tuple)


def scores(d: int, dtype: str) -> st.SearchStrategy:
    # The gradient of a norm over one number cancels, and over two it all but does: float32 keeps no digits of it.
    smallest = 2 if dtype == "float64" else 3
    groups = [n for n in range(1, d + 1) if d % n == 0 and d // n >= smallest]
    one = st.one_of(
        st.tuples(st.just("softcap"), st.sampled_from([0.5, 2.0, 30.0])),
        st.sampled_from([("alibi",), ("closure mod",), ("global mod",), ("constant mod",), ("sinks",)]),
        st.tuples(st.just("relative"), st.integers(0, 9)),
        st.sampled_from([("bias", *x) for x in ("tt", "1tt", "htt", "11tt", "1htt", "b1tt", "bhtt")]),
        st.tuples(st.just("cosine"), st.sampled_from([1.0, 10.0]), st.sampled_from(groups)) if groups else st.nothing(),
        st.tuples(st.just("learned cosine"), st.sampled_from(groups)) if groups else st.nothing(),
        st.tuples(st.just("dropout"), st.sampled_from([0.0, 0.2, 0.9]), st.integers(0, 2**64 - 1)),
    )
    only_once = lambda x: "cosine" if "cosine" in x[0] else x[0] if x[0] in ("sinks", "dropout", "global mod") else x  # noqa: E731
    return st.lists(one, max_size=4, unique_by=only_once).map(tuple)


@st.composite
def cases(draw) -> dict:
    """The arguments of a case."""
    ring, ulysses, layout = draw(st.integers(1, 7)), draw(st.sampled_from([1, 1, 2, 3, 4])), draw(st.sampled_from(LAYOUTS))
    multiple = ring * lcm(2 if layout == "zigzag" else 1, ulysses)
    t, b, kv = multiple * draw(st.integers(1, max(1, 40 // multiple))), draw(st.integers(1, 3)), None
    if not draw(st.integers(0, 3)):
        kv_layout = draw(st.sampled_from(LAYOUTS))
        multiple = ring * lcm(2 if kv_layout == "zigzag" else 1, ulysses)
        kv_len = multiple * draw(st.integers(1, max(1, 40 // multiple)))
        kv = kv_layout if draw(st.integers(0, 3)) else draw(by_document(kv_len)), kv_len
    layout = layout if draw(st.integers(0, 3)) else draw(by_document(t))
    dtype = draw(st.sampled_from([*["float64"] * 4, *["float32"] * 2, "bfloat16", "float16"]))
    g = draw(st.integers(1, 3).map(lambda g: g if ulysses % g == 0 else ulysses * g))
    d = draw(st.integers(1 if dtype == "float64" else 3, 9))
    scored = draw(scores(d, dtype) if draw(st.integers(0, 3)) else st.just(()))
    exchange = draw(st.sampled_from(["ring", "gather", "pull", "two-way", "two-level"]))
    per_node = st.sampled_from([n for n in range(1, ring + 1) if ring % n == 0])
    in_parts = exchange in ("gather", "pull")
    rows = draw(st.none() | st.integers(2 * ring if exchange == "gather" else 1, 50)) if in_parts else None
    return {
        "ring": ring,
        "ulysses": ulysses,
        "layout": layout,
        "exchange": exchange,
        "kv_rows": rows,
        "keep_kv": exchange == "pull" and rows is None and draw(st.booleans()),
        "per_node": draw(per_node) if exchange == "two-level" else None,
        "own_last": exchange != "gather" and draw(st.booleans()),
        "kernel": draw(st.sampled_from(KERNELS)),
        "t": t,
        "b": b,
        "kv": kv,
        "heads": (lcm(g, ulysses) * draw(st.integers(1, 3)), g),
        "dims": (d, draw(st.just(d) | st.integers(1, 9))),
        "dtype": dtype,
        "mask": draw(masks(t, kv and kv[1], b)),
        "scores": scored,
        "scale": None if any("cosine" in x[0] for x in scored) else draw(st.sampled_from([None, None, 0.3, -1.0, 0.0])),
        "lse_grad": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }
