"""`ring-attn check`: which devices, kernels and exchanges work on this machine, how exactly, and why others do not.

A simulated ring is held against one dense softmax in float64, forward and backward, over every layout and several masks. Limits
are relative errors of whole tensors: 1e-12 in float64, 1e-5 in float32, and in 16 bits twice (out) and three times (gradients)
the error that the plain softmax makes in that dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from ring_attn.attention import ring_attention
from ring_attn.capabilities import capabilities, report
from ring_attn.exchange import EXCHANGE_NAMES
from ring_attn.kernels import KERNEL_NAMES, KernelUnavailable
from ring_attn.layout import LAYOUTS
from ring_attn.mask import Causal, Documents, Full, KeyPadding, Mask, Window
from ring_attn.ring import Ring

NAMES = ("out", "dq", "dk", "dv")
_EXACT_LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
_FACTORS = {"out": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}


@dataclass(frozen=True)
class CheckOptions:
    """Checks kernels, exchanges and devices on this machine; the exit status is 1 where one that claims to work is wrong.

    Attributes:
        ring_size: Ranks of the simulated ring. The two-level exchange is checked where they make several nodes of 2.
        seq_len: Positions of the whole sequence.
        num_heads: Query heads; there are half as many KV heads.
        head_dim: Size of a head.
        seed: Of the random inputs.
        kernels: Which kernels to check.
        dtypes: Which dtypes to check.
        capabilities: Only print which masks, scores, dtypes and head dims each kernel takes on this machine, and why not.
    """

    ring_size: int = 4
    seq_len: int = 256
    num_heads: int = 4
    head_dim: int = 64
    seed: int = 0
    kernels: tuple[str, ...] = KERNEL_NAMES
    dtypes: tuple[Literal["float64", "float32", "bfloat16", "float16"], ...] = ("float64", "float32", "bfloat16", "float16")
    capabilities: bool = False

    def __post_init__(self) -> None:
        for name in ("kernels", "dtypes"):
            if not getattr(self, name):
                raise ValueError(f"--{name} names nothing to check; leave it out for all")

    @property
    def exchanges(self) -> dict[str, int | None]:
        """The exchanges to check, each with the ranks of a node where it knows nodes."""
        several_nodes = self.ring_size > 2 and self.ring_size % 2 == 0
        return {name: 2 if name == "two-level" else None for name in EXCHANGE_NAMES if name != "two-level" or several_nodes}

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.seq_len, self.num_heads, max(1, self.num_heads // 2), self.head_dim, self.seed)


@dataclass(frozen=True)
class Sizes:
    """What random inputs look like: positions, query and KV heads, head dim; and their seed."""

    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seq_len", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


@dataclass
class Row:
    """What is known of one combination: the worst error a tensor, cases that ran, why others did not, and what was wrong."""

    device: str
    dtype: torch.dtype
    kernel: str
    exchange: str
    cases: int = 0
    errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    refusals: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def verdict(self) -> str:
        """The last column of the table."""
        if self.wrong:
            more = f"; and {len(self.wrong) - 2} more" if len(self.wrong) > 2 else ""
            return f"WRONG: {'; '.join(self.wrong[:2])}{more}"
        reasons = "; ".join(dict.fromkeys(self.refusals))
        if not self.cases:
            return f"not here: {reasons}"
        return f"ok, {self.cases} cases" + (f"; not {len(self.refusals)} others: {reasons}" if self.refusals else "")


def main(argv: Sequence[str]) -> int:
    """Prints the table, row by row; 1 where something that claims to work is wrong, 2 where an option breaks a rule."""
    import tyro

    options = tyro.cli(CheckOptions, args=list(argv), prog="ring-attn check")
    if options.capabilities:
        print("\n\n".join(report(device, table) for device, table in capabilities().items()))
        return 0
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(f"simulated ring of {options.ring_size}, {options.seq_len} positions, against one dense softmax in float64")
    if "cuda" not in devices:
        print("device cuda: not here, PyTorch sees no CUDA device")
    if "two-level" not in options.exchanges:
        print(f"exchange two-level: not here, a ring of {options.ring_size} is not several nodes of 2 ranks; --ring-size 4 is")
    print(f"{'device':7}{'dtype':9}{'kernel':11}{'exchange':10}" + "".join(f"{name:>9}" for name in NAMES) + "  verdict")
    wrong = 0
    try:
        for row in rows(options, devices):
            numbers = "".join(f"{row.errors[name]:9.1e}" if row.cases else f"{'-':>9}" for name in NAMES)
            dtype = str(row.dtype).removeprefix("torch.")
            print(f"{row.device:7}{dtype:9}{row.kernel:11}{row.exchange:10}{numbers}  {row.verdict()}", flush=True)
            wrong += bool(row.wrong)
    except ValueError as error:
        print(f"ring-attn check: {error}", file=sys.stderr)
        return 2
    print("everything that claims to work is right" if not wrong else f"{wrong} rows are WRONG")
    return 1 if wrong else 0


def rows(options: CheckOptions, devices: Sequence[str]) -> Iterator[Row]:
    """One row a device, dtype, kernel and exchange; where a kernel does nothing there, one row for all exchanges."""
    for device, dtype in product(devices, (getattr(torch, name) for name in options.dtypes)):
        problems = [make_problem(mask, options.sizes, device, dtype) for mask in masks(options.seq_len)]
        for kernel in options.kernels:
            found = [check_one(kernel, exchange, problems, options) for exchange in options.exchanges]
            if any(row.cases or row.wrong for row in found):
                yield from found
            else:
                found[0].exchange = "any"
                yield found[0]


def masks(seq_len: int) -> list[Mask]:
    """The masks of the matrix, made to fit a length."""
    cut = seq_len // 3
    return [
        Full(),
        Causal(),
        Causal() & Window(seq_len // 5),
        Causal() & Documents(lengths=[cut, 1, seq_len - cut - 1]),
        KeyPadding(seq_len - cut),
    ]


@dataclass(frozen=True)
class Problem:
    """Inputs q, k, v, dout, the mask, what attention gives in float64, and in 16 bits what a plain softmax gives in them."""

    inputs: tuple[Tensor, ...]
    mask: Mask
    truth: dict[str, Tensor]
    plain: dict[str, Tensor] | None

    def error(self, name: str, got: Tensor, rows: Tensor | slice = slice(None)) -> tuple[float, float]:
        """(relative error of these rows of a tensor, how large it may be); the first is NaN where a number is."""
        truth = self.truth[name][:, rows]
        if self.plain is None:
            return rel_error(got, truth), _EXACT_LIMITS[self.inputs[0].dtype]
        return rel_error(got, truth), _FACTORS[name] * rel_error(self.plain[name][:, rows], truth)


def make_problem(mask: Mask, sizes: Sizes, device: str, dtype: torch.dtype) -> Problem:
    """A random problem; the truth is that of the inputs as rounded to `dtype`."""
    gen = torch.Generator().manual_seed(sizes.seed)
    heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads, sizes.num_heads)
    shapes = [(1, sizes.seq_len, h, sizes.head_dim) for h in heads]
    inputs = tuple(torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype).to(device) for shape in shapes)
    seen = allowed(mask, sizes.seq_len, device)
    truth = differentiated(lambda q, k, v: dense(q, k, v, seen), *(x.double() for x in inputs))
    exact = dtype in _EXACT_LIMITS
    return Problem(inputs, mask, truth, None if exact else differentiated(lambda q, k, v: dense(q, k, v, seen), *inputs))


def check_one(kernel: str, exchange: str, problems: Sequence[Problem], options: CheckOptions) -> Row:
    """Every layout and problem for one kernel and exchange."""
    first = problems[0].inputs[0]
    row = Row(first.device.type, first.dtype, kernel, exchange)
    for layout, problem in product(LAYOUTS, problems):
        choice = {"exchange": exchange, "ranks_per_node": options.exchanges[exchange], "kernel": kernel}
        ring = Ring.simulated(options.ring_size, layout, **choice)
        try:
            got = on_ring(problem, ring)
        except KernelUnavailable as refusal:
            row.refusals.append(_reason(refusal))
            continue
        except RuntimeError as error:
            row.wrong.append(f"it fails for {layout}, {problem.mask}: {error}")
            continue
        row.cases += 1
        for name in NAMES:
            error, limit = problem.error(name, got[name])
            row.errors[name] = max(row.errors[name], error, key=lambda x: (x != x, x))  # NaN is the largest
            if not error <= limit:
                row.wrong.append(f"{name} off by {error:.1e} > {limit:.1e} for {layout}, {problem.mask}")
    return row


def on_ring(problem: Problem, ring: Ring) -> dict[str, Tensor]:
    """out, dq, dk, dv of ring attention, in global order."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shards = (ring.shard(x) for x in (q, k, v))
        return ring.unshard(ring_attention(*shards, ring=ring, mask=problem.mask))

    return differentiated(attention, *problem.inputs)


def differentiated(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """out, dq, dk and dv of `attention(q, k, v)` under the upstream gradient dout."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, dout)), strict=True))


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """One plain softmax over all keys, in the inputs' dtype; every row must see a key."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def allowed(mask: Mask, seq_len: int, device: str) -> Tensor:
    """[t, t] bool from the mask's one rule, cell by cell, without layouts and tiles."""
    (rule,) = mask.rules()
    q, k = torch.arange(seq_len, device=device).unsqueeze(1), torch.arange(seq_len, device=device)
    seen = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device)
    if rule.left is not None:
        seen &= k >= q - rule.left
    if rule.right is not None:
        seen &= k <= q + rule.right
    if rule.num_keys is not None:
        seen &= k < rule.num_keys
    for ends, _ in rule.documents:
        document = torch.bucketize(k, torch.tensor(ends, device=device), right=True)
        seen &= document.unsqueeze(1) == document
    return seen


def rel_error(x: Tensor, truth: Tensor) -> float:
    """‖x - truth‖ / ‖truth‖ in float64; NaN where x holds one."""
    return ((x.double() - truth).norm() / truth.norm()).item()


def _reason(refusal: KernelUnavailable) -> str:
    """The kernel's own words out of a refusal."""
    return str(refusal).split(": ", 1)[-1].split("; kernel=")[0]
