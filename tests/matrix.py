"""One matrix, one body: layout x mask x ring size x exchange x kernel, against a dense float64 softmax on the whole sequence.

The body is the same for a simulated ring and for real processes; only the `Ring` it is handed differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import torch

import ring_attn as ra
from ring_attn.mask import Mask
from tests.support import FLOAT64_LIMIT, allowed, dense, random_qkv, rel_error

LAYOUTS = ("contiguous", "striped", "zigzag")
EXCHANGES = ("ring", "gather", "pull")

MASKS: dict[str, Callable[[int], Mask]] = {
    "full": lambda t: ra.Full(),
    "causal": lambda t: ra.Causal(),
    "window": lambda t: ra.Window(t // 4, 2),
    "causal window": lambda t: ra.Causal() & ra.Window(t // 3),
    "causal documents": lambda t: ra.Causal() & ra.Documents(lengths=[t // 3, 1, 0, t - t // 3 - 1]),
    "documents": lambda t: ra.Documents(lengths=[t // 3, t - t // 3]),
    "documents by row": lambda t: ra.Documents(lengths=[[t // 3, t - t // 3], [t - 2, 2]]),
    "padding": lambda t: ra.KeyPadding([t - 3, t // 4]),
    "left padding": lambda t: ra.KeyPadding([t, t - 2], starts=[3, t // 2]),
    "causal padding": lambda t: ra.Causal() & ra.KeyPadding([0, t - 1]),
}


@dataclass(frozen=True)
class Case:
    layout: str
    exchange: str
    mask: str
    heads: tuple[int, int] = (4, 2)
    head_dims: tuple[int, int] = (5, 3)
    rows_per_chunk: int = 5
    kernel: str = "reference"
    ulysses: int = 1
    seed: int = field(default=0, compare=False)

    def seq_len(self, ring_size: int) -> int:
        return 2 * ring_size * self.rows_per_chunk


def cases(**fixed) -> list[Case]:
    """Every layout x exchange x mask; grouped, single and odd head counts take turns over them."""
    u = fixed.get("ulysses", 1)
    heads = ((4, 2), (3, 1), (5, 5), (6, 3)) if u == 1 else ((2 * u, u), (u, 1), (u, u), (2 * u, u // 2 or 1))
    found = []
    for layout, exchange, mask in product(LAYOUTS, EXCHANGES, MASKS):
        number = len(found)
        options = {"heads": heads[number % 4], "rows_per_chunk": (5, 3, 7)[number % 3], "seed": number}
        found.append(Case(layout, exchange, mask, **{**options, **fixed}))
    return found


def errors(case: Case, ring: ra.Ring, device="cpu") -> dict[str, float]:
    """Relative errors of out, lse, dq, dk, dv: the worst of the ranks this process hosts, each on its own rows."""
    t = case.seq_len(ring.size)
    (h, g), (d, dv) = case.heads, case.head_dims
    q, k, v, dout = random_qkv(2, t, t, h, g, d, dv, dtype=torch.float64, seed=case.seed)
    mask = MASKS[case.mask](t)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, allowed(mask, t, 2), d**-0.5)
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    grads = torch.autograd.grad((out * dout).sum() + (finite * dlse).sum(), leaves)

    local = [ring.shard(x.detach()).to(device).requires_grad_() for x in leaves]
    up = [ring.shard(dout).to(device), ring.shard(dlse, 2).to(device)]
    got = ra.ring_attention(*local, ring=ring, mask=mask, return_lse=True)
    got_grads = torch.autograd.grad(got, local, up)
    want = [ring.shard(out), ring.shard(lse, 2), *(ring.shard(x) for x in grads)]
    names = ("out", "lse", "dq", "dk", "dv")
    return {
        name: _worst(x.cpu(), ref, ring, dim)
        for name, x, ref, dim in zip(names, (*got, *got_grads), want, (1, 2, 1, 1, 1), strict=True)
    }


def check(case: Case, ring: ra.Ring, device="cpu") -> None:
    """Raises AssertionError where an error is above the limit."""
    found = errors(case, ring, device)
    wrong = {name: error for name, error in found.items() if not error <= FLOAT64_LIMIT}
    assert not wrong, f"{case} on {ring}: {wrong}"


def simulated(case: Case, ring_size: int) -> ra.Ring:
    options = {"exchange": case.exchange, "kernel": case.kernel, "ulysses": case.ulysses}
    return ra.Ring.simulated(ring_size * case.ulysses, case.layout, **options, hostile=True)


def _worst(x: torch.Tensor, ref: torch.Tensor, ring: ra.Ring, dim: int) -> float:
    parts = zip(x.chunk(len(ring.hosted), dim), ref.chunk(len(ring.hosted), dim), strict=True)
    return max((rel_error(a, b) for a, b in parts), key=lambda e: (e != e, e))
