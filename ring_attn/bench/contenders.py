"""What `ring-attn bench ring` holds against each other: the cases, what a contender is, ring attention itself, and its bound.

Note [bound]: the bound of a ring is the same call over wires that bring nothing, at once: the same plan, loop, kernels and
merges, and no communication; a way home by pushes is neither written for others nor added when it comes. What it computes is
nonsense, how long it takes is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol
from unittest.mock import patch

import torch
from torch import Tensor

from ring_attn import call
from ring_attn.attention import ring_attention
from ring_attn.by_document import ByDocument
from ring_attn.call import Call, validate
from ring_attn.comm.nodes import NodesTransport
from ring_attn.comm.replay import Replays
from ring_attn.comm.symmetric import SymmetricTransport
from ring_attn.comm.transport import Parts, Pending, Pieces, Sums, Transport, Unpacked
from ring_attn.comm.two_axes import TwoAxes
from ring_attn.exchange import Exchange
from ring_attn.layout import total_rows
from ring_attn.mask import Mask
from ring_attn.ring import Ring
from ring_attn.tiles import tiles

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From this process's rows of q, k and v to its rows of the output."""


@dataclass(frozen=True)
class Shape:
    """Inputs beside their length."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")

    def random(self, rows: int, seed: int) -> list[Tensor]:
        """q, k, v, which want gradients, and dout."""
        generator = torch.Generator(self.device).manual_seed(seed)
        make = {"generator": generator, "device": self.device, "dtype": self.dtype}
        heads = self.heads, self.kv_heads, self.kv_heads, self.heads
        *leaves, dout = (torch.randn(1, rows, h, self.head_dim, **make) for h in heads)
        return [*(x.requires_grad_() for x in leaves), dout]

    def blank(self, rows: int) -> list[Tensor]:
        """q, k and v that hold nothing, for questions about sizes."""
        one = torch.empty(1, dtype=self.dtype, device=self.device)
        return [one.expand(1, rows, h, self.head_dim) for h in (self.heads, self.kv_heads, self.kv_heads)]


@dataclass(frozen=True)
class Case:
    """The work of a measurement: a mask over a whole sequence. `documents`: lengths of packed documents; `window`: its keys."""

    name: str
    mask: Mask
    length: int
    shape: Shape
    documents: tuple[int, ...] | None = None
    window: int | None = None

    @cached_property
    def cells(self) -> int:
        """The allowed cells, for one head."""
        return sum(tile.cells for tile in tiles((range(self.length),), [(range(self.length),)], self.mask))


class Contender(Protocol):
    """A way to do a case. `chosen`: what it took where it had a choice. `processes`: among how many its work is spread.

    `gate_rows`: of a rank, at the length at which it is checked. `staging`: bytes it holds that PyTorch's allocator does not
    count.
    """

    staging: int
    name: str
    layout: str
    chosen: str
    processes: int
    gate_rows: int

    def why_not(self, case: Case) -> str | None:
        """None, or why it cannot do the case, in the user's words."""

    def positions(self, case: Case) -> Tensor:
        """The global positions of this process's rows, int64 [rows], in row order."""

    def attention(self, case: Case) -> AbstractContextManager[Attend]:
        """Within it, forward and backward may run."""


@dataclass(frozen=True)
class OnRing:
    """Ring attention. Once `settled`, `chosen` is its exchange and kernels, and how the backward goes where that differs: in
    `head_parts`, and `back` with its own shard in halves. `forward_parts`: for how many parts of the heads others' KV comes.
    """

    name: str
    ring: Ring
    chosen: str = ""
    head_parts: int = 1
    forward_parts: int = 1
    back: Exchange | None = None

    gate_rows = 298  # no multiple of a block

    @property
    def layout(self) -> str:
        return self.ring.layout_name

    @property
    def processes(self) -> int:
        return self.ring.size // len(self.ring.hosted)

    @property
    def staging(self) -> int:
        transport = self.ring.transport
        rings = transport.rings if isinstance(transport, TwoAxes) else [transport]
        pulling = self.ring.exchange in ("pull", "two-level")
        return sum(ring.memory_bytes for ring in rings if pulling and isinstance(ring, SymmetricTransport | NodesTransport))

    def why_not(self, case: Case) -> str | None:
        try:
            self.settled(case)
        except ValueError as reason:
            return str(reason)
        return None

    def settled(self, case: Case) -> OnRing:
        """The same with exchange and kernels by name, as "auto" takes them for this case, and its parts as at this length.

        So what is checked at one length is what is timed at another. Raises ValueError where the ring cannot do the case.
        """
        ring, whole = self.at(case), case.shape.blank(len(self.positions(case)))
        asked = Call.make(ring, case.mask, None, case.shape.head_dim**-0.5)
        validate(*whole, [], asked)
        part, *of_part = asked.of_part(*whole)
        found = validate(*of_part, [], part)
        kernels = [found.kernel(direction).name for direction in ("forward", "backward")]
        halves = [] if found.back == found.exchange else ["halves"]
        parts = [f"{found.forward_parts} parts forward"] if found.forward_parts > 1 else []
        parts += [f"{found.head_parts} parts"] if found.head_parts > 1 else []
        chosen = ", ".join([found.exchange.name, " + ".join(dict.fromkeys(kernels)), *halves, *parts])
        settled = self._with(exchange=found.exchange.name, kernel="+".join(kernels), grad_dtype=found.home)
        as_here = {"forward_parts": found.forward_parts, "head_parts": found.head_parts, "back": found.back}
        return replace(self, ring=settled, chosen=chosen, **as_here)

    def keeping(self) -> OnRing:
        """The same with what it pulls kept for the backward."""
        return replace(self, name=f"{self.name}, KV kept", ring=self._with(keep_kv=True))

    def singly(self) -> OnRing:
        """The same with every call asked for anew."""
        return replace(self, name=f"{self.name}, singly", ring=self._with(replay=False))

    def sending(self, grad_dtype: torch.dtype) -> OnRing:
        """The same with dK and dV travelling in that dtype."""
        name = f"{self.name}, dK dV in {str(grad_dtype).removeprefix('torch.')}"
        return replace(self, name=name, ring=self._with(grad_dtype=grad_dtype))

    def without_wires(self) -> OnRing:
        """Its bound, see Note [bound]."""
        return replace(self, ring=self._with(silent(self.ring.transport)))

    def _with(self, transport: Transport | TwoAxes | None = None, **changed) -> Ring:
        """The ring with something else in it."""
        ring = self.ring
        options = {name: getattr(ring, name) for name in ("exchange", "kernel", "keep_kv", "replay", "grad_dtype")} | changed
        nodes = ring.ranks_per_node if options["exchange"] == "two-level" else None
        return Ring(transport or ring.transport, layout=ring.layout_choice, ranks_per_node=nodes, **options)

    def at(self, case: Case) -> Ring:
        """The ring in its layout for that case."""
        return self.ring

    def positions(self, case: Case) -> Tensor:
        return self.at(case).positions(case.length)

    @contextmanager
    def attention(self, case: Case) -> Iterator[Attend]:
        with ExitStack() as stack:
            if self.back is not None:
                stack.enter_context(patch.object(call, "for_backward", lambda *given: self.back))
                stack.enter_context(patch.object(call.Call, "_head_parts", lambda *given: self.head_parts))
                waits = math.inf if self.forward_parts > 1 else -math.inf
                stack.enter_context(patch.object(call, "longest_wait", lambda *given: waits))
            yield partial(ring_attention, ring=self.at(case), mask=case.mask)


class OnDocuments(OnRing):
    """Ring attention in the layout made for the documents of a case; that of its `ring` is for none."""

    def why_not(self, case: Case) -> str | None:
        if case.documents is None:
            return f"it needs documents, and the {case.name} mask has none"
        return super().why_not(case)

    def at(self, case: Case) -> Ring:
        return self.ring.with_layout(ByDocument(lengths=case.documents))


def silent(transport: Transport | TwoAxes) -> Transport | TwoAxes:
    """The same without communication."""
    if isinstance(transport, TwoAxes):
        return TwoAxes([Silent(traders) for traders in transport.traders], [Silent(ring) for ring in transport.rings])
    return Silent(transport)


@dataclass
class Silent:
    """A transport that moves nothing: what is received has the right size, is there at once, and was never sent by anybody.
    Calls are replayed where they are over `inner`.

    Where own payloads have the size, they are what is received. Other rows are kept from call to call: filling them would take
    time that no bound has.
    """

    inner: Transport
    _rows: dict[tuple, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.link, self.ranks_per_node = self.inner.link, self.inner.ranks_per_node
        self.ring_size, self.hosted = self.inner.ring_size, self.inner.hosted
        self.replays = None if self.inner.replays is None else Replays()

    @property
    def beside(self) -> Silent:
        return self

    def shift(self, shards: Sequence[Tensor], offset: int = 1, *, what: str = "shift") -> Pending[list[Tensor]]:
        return _at_once(list(shards), what)

    def all_gather(self, shards: Sequence[Tensor], *, what: str = "all-gather") -> Pending[list[Tensor]]:
        return _at_once([shards[rank % len(shards)] for rank in range(self.ring_size)], what)

    def reduce_scatter(self, parts: Sequence[Sequence[Tensor]], *, what: str = "reduce-scatter") -> Pending[list[Tensor]]:
        return _at_once([row[rank] for rank, row in zip(self.hosted, parts, strict=True)], what)

    def all_to_all(self, parts: Sequence[Sequence[Tensor]], *, what: str = "all-to-all") -> Pending[list[list[Tensor]]]:
        return _at_once([list(row) for row in parts], what)

    def pull(self, shards: Sequence[Pieces], parts: Parts, *, what: str = "pull") -> Pending[list[Tensor]]:
        return _at_once(
            [self._kept(x, total_rows(parts[rank]), rank) for rank, x in zip(self.hosted, shards, strict=True)], what
        )

    def push(self, grads: Sequence[Unpacked], parts: Parts, into: Sequence[Sums], *, what: str = "push") -> Pending[None]:
        return _at_once(None, what)

    def _kept(self, pieces: Pieces, rows: int, rank: int) -> Tensor:
        like, width = pieces[0], sum(x.shape[2] for x in pieces)
        key = rows, width, like.dtype, rank
        if key not in self._rows:
            self._rows[key] = torch.randn(len(like), rows, width, dtype=like.dtype, device=like.device)
        return self._rows[key]


def _at_once(received: Sequence | None, what: str) -> Pending:
    return Pending(received, lambda: None, what)
