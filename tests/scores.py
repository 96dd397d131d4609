"""Every score as the package takes it, and beside it what it means, written the plain way: one dense softmax over all keys.

Nothing here calls into score.py but the constructors. `errors` is one body for simulated rings and for real processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from operator import and_
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ring_attn as ra
from ring_attn.mask import All, Mask
from ring_attn.score import Score
from tests.support import allowed, random_qkv, rel_error


@dataclass(frozen=True)
class Sizes:
    """b, t, h, g, d, dv of a problem, its dtype and the seed of everything random in it; in cross-attention the keys' too.

    `merged`: batch and heads are merged where the package is asked.
    """

    b: int = 2
    t: int = 24
    h: int = 4
    g: int = 2
    d: int = 6
    dv: int = 5
    dtype: torch.dtype = torch.float64
    seed: int = 0
    kv_len: int | None = None
    kv_layout: str | None = None
    merged: bool = False

    @property
    def keys(self) -> int:
        return self.t if self.kv_len is None else self.kv_len

    def tensor(self, *shape: int, name: str = "", add: float = 0.0) -> Tensor:
        """A random leaf in float64, of numbers that `dtype` holds; they depend on the seed, the shape and `name` alone."""
        gen = torch.Generator().manual_seed(hash((self.seed, shape, *map(ord, name))) % 2**31)
        return (torch.randn(shape, generator=gen, dtype=torch.float64) + add).to(self.dtype).double().requires_grad_()


@dataclass(frozen=True)
class Piece:
    """One score. `make(tensors, ring)` is the package's, of its leaves in the dtype of the call; the rest is what it means."""

    make: Callable[[Sequence[Tensor], ra.Ring], Score]
    leaves: tuple[Tensor, ...] = ()
    step: Callable[[Tensor], Tensor] | None = None  # scores [b, h, t, keys] -> scores
    sinks: Tensor | None = None  # [h]
    keep: Tensor | None = None  # [b, h, t, keys]: 0 or 1 / (1 - p)
    cosine: tuple[float | Tensor, int] | None = None  # scale, groups
    sharded: bool = False  # leaves enter through ring.shard, whose gradient is whole on every process


def positions(n: Sizes) -> tuple[Tensor, Tensor]:
    """Query positions [t, 1] and key positions [keys]."""
    return torch.arange(n.t).unsqueeze(1), torch.arange(n.keys)


def softcap(n: Sizes, cap: float = 1.5) -> Piece:
    return Piece(lambda x, ring: ra.SoftCap(cap), step=lambda s: cap * torch.tanh(s / cap))


def alibi(n: Sizes) -> Piece:
    slopes, (i, j) = n.tensor(n.h, name="alibi"), positions(n)
    return Piece(lambda x, ring: ra.Alibi(x[0]), (slopes,), lambda s: s - 0.1 * (10 * slopes[:, None, None]) * (i - j).abs())


def relative(reach: int) -> Callable[[Sizes], Piece]:
    """A table by distance, which beyond `reach` goes on as at it."""

    def piece(n: Sizes) -> Piece:
        table, (i, j) = n.tensor(n.h, 2 * reach + 1, name="relative"), positions(n)
        far = torch.where(i - j > reach, reach, torch.where(j - i > reach, -reach, i - j))
        return Piece(lambda x, ring: ra.RelativeBias(x[0]), (table,), lambda s: s + table[:, far + reach])

    return piece


def bias(*shape: str) -> Callable[[Sizes], Piece]:
    """A bias of dimensions such as "h", "t", "t"; "1" is one, and the last is the keys'."""

    def piece(n: Sizes) -> Piece:
        tensor = n.tensor(*(1 if x == "1" else getattr(n, x) for x in shape[:-1]), n.keys, name="bias")
        return Piece(lambda x, ring: ra.Bias(ring.shard(x[0], -2)), (tensor,), lambda s: s + tensor, sharded=True)

    return piece


def closure_mod(n: Sizes) -> Piece:
    """Three captured tensors: by head, by distance, and integers by position."""
    by_head, by_distance, (i, j) = n.tensor(n.h, name="head"), n.tensor(n.t + n.keys, name="far"), positions(n)
    group = torch.arange(max(n.t, n.keys)) // 5

    def make(x: Sequence[Tensor], ring: ra.Ring) -> Score:
        (head, far), of_position = x, group.to(x[0].device)

        def mod(score, b, h, q, k):
            return score * torch.cos(head[h]) + far[q - k + n.keys] * (of_position[q] == of_position[k])

        return ra.ScoreMod(mod)

    same = group[i] == group[j]
    return Piece(make, (by_head, by_distance), lambda s: s * by_head.cos()[:, None, None] + by_distance[i - j + n.keys] * same)


SHIFT = torch.zeros(())  # set by `global_mod`: a global of the function below, which has no closure


def _shifted(score, b, h, q, k):
    return score + SHIFT[b, h] * torch.sin(0.3 * q - 0.7 * k)


def global_mod(n: Sizes) -> Piece:
    shift, (i, j) = n.tensor(n.b, n.h, name="shift"), positions(n)

    def make(x: Sequence[Tensor], ring: ra.Ring) -> Score:
        globals()["SHIFT"] = x[0]
        return ra.ScoreMod(_shifted)

    return Piece(make, (shift,), lambda s: s + shift[:, :, None, None] * torch.sin(0.3 * i - 0.7 * j))


def constant_mod(n: Sizes) -> Piece:
    """A score that forgets q and k."""
    slope, (i, j) = n.tensor(n.h, name="constant"), positions(n)

    def make(x: Sequence[Tensor], ring: ra.Ring) -> Score:
        (tensor,) = x
        return ra.ScoreMod(lambda score, b, h, q, k: tensor[h] * 0.1 * (q - k))

    return Piece(make, (slope,), lambda s: (slope[:, None, None] * 0.1 * (i - j)).expand_as(s))


def sinks(n: Sizes) -> Piece:
    logits = n.tensor(n.h, name="sinks")
    return Piece(lambda x, ring: ra.Sinks(x[0]), (logits,), sinks=logits)


def cosine(scale: float, groups: int) -> Callable[[Sizes], Piece]:
    return lambda n: Piece(lambda x, ring: ra.CosineSim(scale, groups), cosine=(scale, groups))


def learned_cosine(groups: int) -> Callable[[Sizes], Piece]:
    def piece(n: Sizes) -> Piece:
        scale = n.tensor(n.h, name="cosine", add=5.0)
        return Piece(lambda x, ring: ra.CosineSim(x[0], groups), (scale,), cosine=(scale, groups))

    return piece


def dropout(p: float, seed: int) -> Callable[[Sizes], Piece]:
    return lambda n: Piece(lambda x, ring: ra.Dropout(p, seed), keep=kept(p, seed, n.b, n.h, n.t, n.keys))


@lru_cache(maxsize=32)
def kept(p: float, seed: int, b: int, h: int, t: int, keys: int) -> Tensor:
    """Dropout's factors [b, h, t, keys], of a hash in numpy's 64-bit integers."""
    axes = np.ix_(*(np.arange(size, dtype=np.uint64) for size in (b, h, t, keys)))
    state = reduce(mix, (np.uint64(seed >> 32), *axes), np.uint64(seed % 2**32))
    return torch.from_numpy(np.broadcast_to(state >= round(p * 2**32), (b, h, t, keys)) / (1 - p))


def mix(state: np.ndarray, value: np.ndarray) -> np.ndarray:
    """murmur3's finaliser of a state and a value, 32 bits."""
    low = np.uint64(2**32 - 1)
    x = (state ^ (value * np.uint64(0x9E3779B1) + np.uint64(0x7F4A7C15))) & low
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ x >> np.uint64(16)) * np.uint64(factor) & low
    return x ^ x >> np.uint64(16)


SINGLE: dict[str, Callable[[Sizes], Piece]] = {
    "softcap": softcap,
    "alibi": alibi,
    "relative bias": relative(4),
    "relative bias of one": relative(0),
    "bias tt": bias("t", "t"),
    "bias 1tt": bias("1", "t", "t"),
    "bias htt": bias("h", "t", "t"),
    "bias 1htt": bias("1", "h", "t", "t"),
    "bias b1tt": bias("b", "1", "t", "t"),
    "bias bhtt": bias("b", "h", "t", "t"),
    "closure mod": closure_mod,
    "global mod": global_mod,
    "constant mod": constant_mod,
    "sinks": sinks,
    "cosine": cosine(7.0, 1),
    "cosine groups": cosine(4.0, 3),
    "learned cosine": learned_cosine(1),
    "learned cosine groups": learned_cosine(2),
    "dropout": dropout(0.3, 7),
}
COMPOSED = {
    "nothing": (),
    "alibi, softcap": ("alibi", "softcap"),
    "softcap, alibi": ("softcap", "alibi"),
    "closure mod, bias htt, softcap": ("closure mod", "bias htt", "softcap"),
    "global mod, closure mod, sinks": ("global mod", "closure mod", "sinks"),
    "learned cosine groups, softcap, sinks": ("learned cosine groups", "softcap", "sinks"),
    "all": ("dropout", "alibi", "softcap", "relative bias", "bias b1tt", "sinks", "cosine groups", "global mod"),
}
SCORES = {name: (name,) for name in SINGLE} | COMPOSED


def pieces_of(name: str, n: Sizes) -> list[Piece]:
    return [SINGLE[part](n) for part in SCORES[name]]


def by_batch_and_head(b, h, q, k):
    return (q - k) % (2 + (b + h) % 3) == 0


MASKS: dict[str, Callable[[int], Mask]] = {
    "full": lambda t: ra.Full(),
    "causal": lambda t: ra.Causal(),
    "window": lambda t: ra.Window(t // 3, 1),
    "documents": lambda t: ra.Causal() & ra.Documents(lengths=[[t // 3, t - t // 3], [t - 2, 2]]),
    "padding": lambda t: ra.KeyPadding([t - 3, 0]),  # the second batch row sees nothing
    "blind rows": lambda t: ra.MaskMod(lambda b, h, q, k: (q % 3 != h % 3) & (k <= q)),
    "function": lambda t: ra.Causal() & ra.MaskMod(by_batch_and_head),
    "function, documents, window": lambda t: (
        ra.MaskMod(by_batch_and_head) & ra.Documents(lengths=[t // 2 + 1, t - t // 2 - 1]) & ra.Window(t // 3)
    ),
}


class Check(NamedTuple):
    """A score, the masks that it is checked under, and what differs from the usual sizes; `decodes`: without gradients."""

    score: str
    masks: Sequence[str] = ("causal", "documents", "function")
    sizes: dict[str, object] = {}  # noqa: RUF012 (of a NamedTuple)
    decodes: bool = False


# The gradient of a table of one number is 0: no softmax notices what all scores of a row have in common.
CHECKS = {name: Check(name) for name in SCORES if name != "relative bias of one"}
CHECKS |= {f"{mask} mask": Check("nothing", (mask,)) for mask in MASKS}
CHECKS |= {f"decoding, {mask} mask": Check("sinks", (mask,), decodes=True) for mask in MASKS}
CHECKS |= {
    "cross-attention": Check("nothing", ("full", "causal", "window"), {"kv_len": 144, "kv_layout": "striped"}),
    "head dims 192 and 128": Check("nothing", sizes={"d": 192, "dv": 128}),
    "one KV head": Check("nothing", sizes={"g": 1}),
    "batch and heads merged": Check("nothing", ("full", "causal", "window"), {"b": 8, "h": 1, "g": 1, "merged": True}),
}
WAYS = tuple(product((3, 4), ("ring", "gather", "pull"), ("contiguous", "striped", "zigzag")))
"""Ring size, exchange and layout of the rings on which each of these is checked."""


def seen_cells(mask: Mask, n: Sizes) -> Tensor:
    """[b, h, t, keys] bool: which cells a mask allows; functions are asked about all cells at once."""
    b, h, q, k = (
        torch.arange(size).view([-1 if d == dim else 1 for d in range(4)]) for dim, size in enumerate((n.b, n.h, n.t, n.keys))
    )
    parts = mask.masks if isinstance(mask, All) else (mask,)
    found = [p.fn(b, h, q, k) if isinstance(p, ra.MaskMod) else allowed(p, n.t, n.b, kv_len=n.keys).unsqueeze(1) for p in parts]
    return reduce(and_, found).expand(n.b, n.h, n.t, n.keys)


def plain(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, pieces: Sequence[Piece], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out [b, t, h, dv], lse [b, h, t]): scores, each piece in order, one softmax; a row without keys gives 0 and -inf.

    All in the dtype of q, whatever the leaves of the pieces are.
    """
    scale, group = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[2] // k.shape[2]
    for piece in pieces:
        if piece.cosine is not None:
            factor, parts = piece.cosine
            q, k, scale = of_unit_norm(q, parts), of_unit_norm(k, parts), 1.0
            q = (q * (factor[:, None] if isinstance(factor, Tensor) else factor)).to(k.dtype)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    for piece in pieces:
        scores = scores if piece.step is None else piece.step(scores).to(q.dtype)
    scores = scores.masked_fill(~seen, -torch.inf)
    for piece in pieces:
        if piece.sinks is not None:
            column = piece.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column.to(scores.dtype)], -1)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    lse = scores.masked_fill(blind, 0).logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)
    p = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)[..., : k.shape[1]]
    for piece in pieces:
        p = p if piece.keep is None else (p * piece.keep).to(v.dtype)
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def of_unit_norm(x: Tensor, groups: int) -> Tensor:
    parts = x.unflatten(-1, (groups, -1))
    return (parts / parts.square().sum(-1, keepdim=True).sqrt()).flatten(-2)


def errors(ring: ra.Ring, n: Sizes, mask: Mask, pieces: Sequence[Piece], device: str = "cpu") -> dict[str, float]:
    """Relative errors of out, lse and the gradient of q, k, v and every leaf of the scores."""
    return {name: rel_error(x, ref) for name, (x, ref) in compared(ring, n, mask, pieces, device=device).items()}


def compared(
    ring: ra.Ring,
    n: Sizes,
    mask: Mask,
    pieces: Sequence[Piece],
    *,
    scale: float | None = None,
    lse_grad: bool = True,
    strided: bool = False,
    device: str = "cpu",
) -> dict[str, tuple[Tensor, Tensor]]:
    """out, lse and every gradient from a ring in any processes, on `device`, each beside the plain one."""
    q, k, v, dout = random_qkv(n.b, n.t, n.keys, n.h, n.g, n.d, n.dv, dtype=n.dtype, seed=n.seed)
    leaves = [x.double().requires_grad_() for x in (q, k, v)] + [x for piece in pieces for x in piece.leaves]
    want = plain(*leaves[:3], seen_cells(mask, n), pieces, scale)
    dlse = torch.randn(want[1].shape, generator=torch.Generator().manual_seed(n.seed), dtype=torch.float64).to(n.dtype)
    asked = slice(2 if lse_grad else 1)
    unused = {"allow_unused": True, "materialize_grads": True}
    want = [*want, *torch.autograd.grad(want[asked], leaves, [dout.double(), dlse.double()][asked], **unused)]

    mine = [x.detach().to(device, n.dtype).requires_grad_() for x in leaves]
    rest = iter(mine[3:])
    scores = [piece.make([next(rest) for _ in piece.leaves], ring) for piece in pieces]
    layouts = None, n.kv_layout, n.kv_layout
    local = [ring.shard(x, layout=layout) for x, layout in zip(mine, layouts, strict=False)]
    local = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in local] if strided else local
    options = {"softmax_scale": scale, "return_lse": True, "kv_layout": n.kv_layout}
    if n.merged:
        local = [x.squeeze(2) for x in local]
    found = ra.ring_attention(*local, ring=ring, mask=mask, score=scores or None, **options)
    if n.merged:
        found = found[0].unsqueeze(2), found[1].unsqueeze(1)
    got = [ring.unshard(found[0]), ring.unshard(found[1], 2)]
    up = dout.to(device), dlse.to(device, got[1].dtype)
    grads = torch.autograd.grad(got[asked], mine, up[asked], **unused)
    sharded = [True] * 3 + [piece.sharded for piece in pieces for _ in piece.leaves]
    grads = [grad if whole else ring.sum_over_processes(grad) for grad, whole in zip(grads, sharded, strict=True)]
    names = ["out", "lse", "dq", "dk", "dv", *(f"gradient of tensor {i}" for i in range(len(mine) - 3))]
    return dict(zip(names, zip([x.cpu() for x in (*got, *grads)], want, strict=True), strict=True))
