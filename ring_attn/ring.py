"""`Ring`: transport, layout, exchange and kernel choice, built once and passed down to every attention call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ring_attn import sharding
from ring_attn.agreement import compares_every_call, differences_of, numbers_of, words_of
from ring_attn.by_document import LayoutChoice, recipe_of
from ring_attn.comm.alike import check_alike
from ring_attn.comm.copy_engines import with_copy_engines
from ring_attn.comm.local import LocalTransport
from ring_attn.comm.process_group import ProcessGroupTransport, all_reduce_sum, cut_two_axes, split_group, two_axes
from ring_attn.comm.transport import Transport
from ring_attn.comm.two_axes import TwoAxes
from ring_attn.exchange import EXCHANGE_NAMES
from ring_attn.kernels import check_kernel_name
from ring_attn.layout import Layout, Shared
from ring_attn.typed import counts, typed
from ring_attn.watched import unseen

if TYPE_CHECKING:
    from ring_attn.comm.replay import Replays
    from ring_attn.settled import Settled


class Ring:
    """A ring of ranks and how it works. Make one with simulated, from_group or from_mesh, which take

    layout: "contiguous", "striped", "zigzag", or a ByDocument made for packed documents: which positions each rank holds;
    exchange: "ring", "gather", "pull", "two-way" or "two-level": how ranks meet each other's KV; "auto" takes the fastest for a
    call, by the formula that `ring-attn plan --explain` prints, which leaves "two-way" out;
    kernel: "auto", the name of a kernel, or a pair such as "triton+flash2" for forward and backward;
    kv_memory: how many bytes of KV that came from other ranks a rank may hold in a forward, what is under way included; a
    backward holds dK and dV of the same rows beside them, in fp32. None: as many as the exchange takes at once;
    keep_kv: what "pull" brought for a forward stays until its backward, which then moves only dK and dV, while the own shard is
    attended: less time, for as much memory a layer as kv_memory speaks of. Otherwise it is pulled again;
    grad_dtype: in what dtype dK and dV travel, such as torch.bfloat16 for half the bytes; None: as they are summed, in fp32
    (float64 for float64 inputs), or by "pull" in the dtype of q, where nothing is lost by that: where on every rank each row is
    from one call of a library, which has rounded it, whatever gradients come: flash-attn 4's, or any other that is named;
    replay: whether short calls by copy engines that come again are asked for at once, as CUDA graphs, where 1 GiB is
    free beside their inputs; these and the outputs take up to as much for each ring; ranks may differ in it;
    ranks_per_node: of the "two-level" exchange, how many neighbouring ranks share a node; torchrun tells it to NCCL's rings.

    With `ulysses` above 1 the sequence is sharded over all `size` ranks, but the layout is that of `size // ulysses` ring
    ranks: `ulysses` neighbouring ranks hold one ring rank's shard together, each a run of its rows, and while attention runs
    they trade rows for heads. `hosted`, `seq_len`, `shard_multiple`, `positions`, `shard` and `unshard` speak of all ranks.
    """

    def __init__(
        self,
        transport: Transport | TwoAxes,
        *,
        layout: LayoutChoice = "zigzag",
        exchange: str = "auto",
        kernel: str = "auto",
        kv_memory: int | None = None,
        keep_kv: bool = False,
        grad_dtype: torch.dtype | None = None,
        ranks_per_node: int | None = None,
        replay: bool = True,
    ) -> None:
        if not hasattr(transport, "ring_size"):
            raise TypeError(f"make a ring with Ring.simulated, Ring.from_group or Ring.from_mesh, not of {transport!r}")
        check_kernel_name(kernel)
        floating = isinstance(grad_dtype, torch.dtype) and grad_dtype.is_floating_point and grad_dtype.itemsize > 1
        if grad_dtype is not None and not floating:
            raise ValueError(f"grad_dtype must be a floating torch.dtype, of at least 16 bits, or None, got {grad_dtype!r}")
        if not (ranks_per_node is None or counts(ranks_per_node)):
            raise ValueError(f"ranks_per_node must be a whole number of ranks, at least 1, or None, got {ranks_per_node!r}")
        for name, choice in (("keep_kv", keep_kv), ("replay", replay)):
            if not isinstance(choice, bool):
                raise TypeError(f"{name} must be True or False, got {choice!r}")
        if not (kv_memory is None or counts(kv_memory)):
            raise ValueError(f"kv_memory must be a whole number of bytes, at least 1, or None for no limit, got {kv_memory!r}")
        if keep_kv and (exchange != "pull" or kv_memory is not None):
            raise ValueError(f"keep_kv=True is for exchange='pull' without kv_memory, not for {exchange!r} with {kv_memory=}")
        self.kv_memory, self.keep_kv, self.grad_dtype, self.replay = kv_memory, keep_kv, grad_dtype, replay
        self.ranks_per_node = transport.ranks_per_node if ranks_per_node is None else ranks_per_node
        self.transport = transport
        self.layout_choice, self._recipe = layout, recipe_of(layout)
        if exchange not in ("auto", *EXCHANGE_NAMES):
            raise ValueError(f"exchange {exchange!r} is not one of auto, {', '.join(EXCHANGE_NAMES)}")
        self.exchange = exchange
        self._check_nodes(ranks_per_node)
        self.kernel = kernel
        self.compares_every_call = compares_every_call()
        self._agreed: dict[tuple, bool] = {}  # with what `all_round` tells
        # By `Call.key`, what calls of agreed signatures come to: none stays where a signature is forgotten.
        self.settled: dict[tuple, Settled] = {}
        rings = dict(zip(transport.ulysses_hosted, transport.rings, strict=True)) if isinstance(transport, TwoAxes) else {}
        # By the Ulysses ranks hosted here: the rings in which they attend, each with its part of the heads.
        choices = {"exchange": exchange, "kernel": kernel, "kv_memory": kv_memory, "keep_kv": keep_kv, "grad_dtype": grad_dtype}
        choices["replay"] = replay
        self._choices = {**choices, "ranks_per_node": ranks_per_node}
        choices["ranks_per_node"] = ranks_per_node and ranks_per_node // self.ulysses
        self.of_parts = {u: Ring(one, layout=layout, **choices) for u, one in rings.items()}

    def _check_nodes(self, given: int | None) -> None:
        if given is not None and self.exchange not in ("auto", "two-level"):
            raise ValueError(f"ranks_per_node={given} is for exchange='two-level' or 'auto', not for {self.exchange!r}")
        if self.exchange == "two-level" and self.ranks_per_node is None:
            raise ValueError("exchange='two-level' needs ranks_per_node, how many neighbouring ranks share a node")
        if given is not None and given % self.ulysses:
            raise ValueError(f"ranks_per_node {given} must be a multiple of ulysses {self.ulysses}: neighbours trade heads")
        if self.ranks_per_node is not None and self.size % self.ranks_per_node:
            raise ValueError(f"ranks_per_node {self.ranks_per_node} must divide the ring size {self.size}")

    @classmethod
    @typed
    def simulated(
        cls, ring_size: int, layout: LayoutChoice = "zigzag", *, ulysses: int = 1, hostile: bool = False, **choices
    ) -> Ring:
        """A ring whose ranks all live in this process, in one tensor [b, t, ...] joined rank by rank.

        `ulysses`: as in `from_group`. `hostile`: for tests; see LocalTransport. `choices`: what every ring takes, see Ring.
        """
        transport: Transport | TwoAxes = LocalTransport(ring_size, hostile=hostile)
        _check_ulysses(ulysses, ring_size)
        if ulysses > 1:
            traders = [LocalTransport(ulysses, hostile=hostile) for _ in range(ring_size // ulysses)]
            transport = TwoAxes(traders, [LocalTransport(ring_size // ulysses, hostile=hostile) for _ in range(ulysses)])
        return cls(transport, layout=layout, **choices)

    @classmethod
    @typed
    def from_group(
        cls,
        group: ProcessGroup | int | None = None,  # an int is what new_group gives to processes outside the group
        layout: LayoutChoice = "zigzag",
        *,
        ring_size: int | None = None,
        ranks_per_process: int = 1,
        ulysses: int = 1,
        **choices,
    ) -> Ring:
        """A ring over a torch.distributed group (None: the default group), one rank a process unless `ranks_per_process` says
        more. `choices`: what every ring takes, see Ring.

        `ring_size` below the group's makes several rings side by side of neighbouring processes; every process of the group
        must then call this. `ulysses`: so many neighbouring processes trade heads, one ring rank together; a divisor of the
        ring's size, of num_heads, and of num_kv_heads or a multiple of these; every process of the group must call this, too.
        On GPUs of one host over NCCL "pull" goes by copy engines, and so does what "two-level" pulls inside a host of several,
        where TORCH_SYMM_MEM_DISABLE_MULTICAST=1 is set and all GPUs reach each other.

        Every process of the group makes the same rings in the same order. Raises ValueError where another one made this ring of
        other sizes, where it is larger than the group or does not divide it, and where "pull" by name finds GPUs of one host
        without copy engines.
        """
        if ranks_per_process < 1:
            raise ValueError(f"ranks_per_process must be at least 1, got {ranks_per_process}")
        if ulysses > 1 and ranks_per_process > 1:
            raise NotImplementedError(
                f"ulysses={ulysses} needs one rank a process, or all in one with Ring.simulated; got {ranks_per_process=}"
            )
        if torch.distributed.is_initialized() and not isinstance(group, int):
            check_alike(group, ring_size, ranks_per_process, ulysses)
        if ring_size is not None:
            group = split_group(group, ring_size, ranks_per_process)
        messages = ProcessGroupTransport(group, ranks_per_process=ranks_per_process)
        _check_ulysses(ulysses, messages.ring_size)
        if ulysses > 1:
            return cls._of_axes(cut_two_axes(messages.group, ulysses), layout, choices)
        transport = with_copy_engines(messages, choices.get("exchange", "auto"))
        return cls(transport, layout=layout, **choices)

    @classmethod
    @typed
    def from_mesh(cls, mesh: DeviceMesh, layout: LayoutChoice = "zigzag", **choices) -> Ring:
        """A ring over a one-axis DeviceMesh, such as `mesh["cp"]`, or over a (ulysses, ring) mesh of two axes: along the first
        processes trade heads, along the second they stand in one ring. Copy engines and errors are as in `from_group`.
        """
        if mesh.ndim == 1:
            return cls.from_group(mesh.get_group(), layout, **choices)
        _check_mesh(mesh)
        if mesh.size(0) == 1:
            return cls.from_group(mesh.get_group(1), layout, **choices)
        return cls._of_axes(two_axes(mesh.get_group(0), mesh.get_group(1)), layout, choices)

    @classmethod
    def _of_axes(cls, axes: TwoAxes, layout: LayoutChoice, choices: dict) -> Ring:
        rings = [with_copy_engines(ring, choices.get("exchange", "auto")) for ring in axes.rings]
        return cls(TwoAxes(axes.traders, rings), layout=layout, **choices)

    @property
    def size(self) -> int:
        """The number of ranks that the sequence is sharded over."""
        return self.transport.ring_size

    @property
    def ulysses(self) -> int:
        """The number of ranks that trade heads; 1 where none do."""
        return self.transport.ulysses if isinstance(self.transport, TwoAxes) else 1

    @property
    def hosted(self) -> tuple[int, ...]:
        """The ranks whose shards live in this process."""
        return self.transport.hosted

    @property
    def layout_name(self) -> str:
        """What the ring's layout is called."""
        return self._recipe.name

    @property
    def shard_multiple(self) -> int:
        """What a sequence length must be a multiple of; see `pad_to`."""
        return self.size // self.ulysses * math.lcm(self._recipe.chunks_per_rank, self.ulysses)

    def seq_len(self, rows: int) -> int:
        """The length of the whole sequence of which this process hosts `rows`. Raises ValueError where they do not divide."""
        if rows % len(self.hosted):
            raise ValueError(f"{rows} rows cannot be the equal shards of {len(self.hosted)} hosted ranks; use ring.shard")
        return rows // len(self.hosted) * self.size

    @typed
    def with_layout(self, layout: LayoutChoice) -> Ring:
        """The same ring in another layout: over the same transport, all other choices alike. For packed batches, each with
        documents of its own: `ring.with_layout(ByDocument(lengths))`.

        To make it costs no communication, so it may be made anew at every step; its first call agrees as that of any new ring
        does. Every rank must come to the same layout. Under torch.compile keep it: each new one is compiled for.
        """
        return Ring(self.transport, layout=layout, **self._choices)

    def layout(self, seq_len: int, choice: LayoutChoice | None = None) -> Layout:
        """The layout of a sequence, the ring's own or that of a choice. Raises ValueError where it does not divide."""
        recipe = self._recipe if choice is None else recipe_of(choice)
        layout = recipe(seq_len, self.size // self.ulysses)
        return Shared(layout, self.ulysses) if self.ulysses > 1 else layout

    @typed
    def shard(self, x: Tensor, dim: int = 1, *, layout: LayoutChoice | None = None) -> Tensor:
        """Rows of a whole `x` along `dim` that this process hosts. Differentiable: every process gets all of the gradient.

        `layout`: one to use in place of the ring's, for the keys of cross-attention.
        """
        return sharding.shard(x, self.layout(sharding.length(x, dim), layout), self.transport, dim)

    @typed
    def unshard(self, x: Tensor, dim: int = 1, *, grad: str = "replicated", layout: LayoutChoice | None = None) -> Tensor:
        """The whole tensor, in global order and on every process, from hosted rows: the inverse of `shard`. Differentiable.

        grad="replicated": every process computes the same from the result, so this process's rows of its gradient are the
        answer; "partial": each goes on differently and losses add up, so gradients are summed over the processes.
        """
        return sharding.unshard(x, self.layout(self.seq_len(sharding.length(x, dim)), layout), self.transport, dim, grad)

    @typed
    def positions(
        self, seq_len: int, device: torch.device | str | None = None, *, layout: LayoutChoice | None = None
    ) -> Tensor:
        """Global positions of the hosted rows, int64 [rows]: for rotary embeddings and the like."""
        return sharding.positions(self.layout(seq_len, layout), self.hosted, device)

    def replays(self, device: torch.device) -> Replays | None:
        """What graphs of calls on that device share; None where none are to be made."""
        found = self.transport.replays
        return found if self.replay and found is not None and found.serve(device) else None

    def has_agreed(self, signature: tuple) -> bool:
        """Whether a call of this signature has been found good and alike on every rank, and need not be compared again."""
        return signature in self._agreed and not self.compares_every_call

    def all_round(self, signature: tuple) -> bool:
        """Whether every rank said when they agreed on a call that it rounds, see `Settled.rounds`."""
        return self._agreed[signature]

    def agree(self, signature: tuple, device: torch.device, refusal: ValueError | None = None, rounds: bool = False) -> None:
        """Raises ValueError on every rank where ranks differ in what they are about to do, or some rank cannot do it.

        `signature`: three shapes, then anything with a telling repr. `refusal`: why this rank cannot, raised here once the
        others know. `rounds`: whether it does, for `all_round`. One small all-gather, the first time a signature is seen, or
        with RING_ATTN_COMPARE_CALLS=1 every time; a ring in one process has nobody to ask. Every rank forgets the oldest
        signatures at the same point.
        """
        if len(self.hosted) < self.size:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "ranks compare their calls, which cannot be captured in a CUDA graph: make the same call once before, and "
                    "without RING_ATTN_COMPARE_CALLS=1"
                )
            numbers = numbers_of(signature, refusal is not None, rounds)
            everyone = self._told(torch.tensor(numbers, dtype=torch.int64, device=device), "agreeing on shapes, dtype and mask")
            refused, each_rounds, *columns = zip(*everyone, strict=True)
            rounds = all(each_rounds)
            if any(len(set(column)) > 1 for column in columns):
                cannot = "" if refusal is None else f"; and this rank cannot make its call: {refusal}"
                words = torch.tensor(words_of(signature), dtype=torch.uint8, device=device)
                differences = "; and in ".join(differences_of(columns, self._told(words, "telling what differs")))
                raise ValueError(
                    "every rank must call with the same shapes, dtype, mask and scale, but ranks differ in "
                    f"{differences}{cannot}"
                ) from refusal
            if refusal is None and any(refused):
                ranks = [rank for rank, cannot in enumerate(refused) if cannot]
                raise ValueError(f"ranks {ranks} cannot make this call and say why themselves, so no rank makes it")
        if refusal is not None:
            raise refusal
        self._agreed[signature] = rounds
        # Each keeps its masks and functions alive, and what those close over.
        if len(self._agreed) > 256:
            del self._agreed[next(iter(self._agreed))]
            self.settled.clear()

    def _told(self, mine: Tensor, what: str) -> list[list]:
        """What each rank has there, as lists."""
        with unseen():
            return [x.tolist() for x in self.transport.all_gather([mine] * len(self.hosted), what=what).wait()]

    def sum_over_processes(self, x: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """`x` summed over the processes of the ring, or of `group`, without gradient."""
        if group is not None:
            return all_reduce_sum(x, group)
        if len(self.hosted) == self.size:
            return x
        shards = [x.contiguous().clone()] + [torch.zeros_like(x) for _ in self.hosted[1:]]
        return torch.stack(self.transport.all_gather(shards, what="sum over processes").wait()).sum(0)

    def __copy__(self) -> Ring:
        return self

    def __deepcopy__(self, memo: dict) -> Ring:
        """Itself: the copy of a model that holds a ring is on the same one."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled of a simulated ring, the only one that can be."""
        if self.transport.link != "process":
            raise TypeError(
                f"{self} is of a process group and cannot be pickled; take it from what holds it, a model of Hugging Face by "
                f"use_ring(model, None), and save state_dict() or by save_pretrained"
            )
        return self.__dict__ | {"_agreed": {}, "settled": {}}

    def __repr__(self) -> str:
        choices = f"layout={self.layout_name}, exchange={self.exchange}, kernel={self.kernel}"
        ulysses = f"ulysses={self.ulysses}, " if self.ulysses > 1 else ""
        return f"Ring(size={self.size}, {ulysses}hosted={self.hosted}, {choices})"


def _check_ulysses(ulysses: int, ring_size: int) -> None:
    if ulysses < 1 or ring_size % ulysses:
        raise ValueError(f"ulysses must be at least 1 and a divisor of the ring's {ring_size} ranks, got {ulysses}")


def _check_mesh(mesh: DeviceMesh) -> None:
    """Raises ValueError unless it is a (ulysses, ring) mesh whose groups number their ranks as its axes do."""
    axes = "ulysses", "ring"
    # By any other names an axis may hold other sequences.
    if mesh.ndim != 2 or (mesh.mesh_dim_names or axes) != axes:
        given = mesh.mesh_dim_names or f"a mesh of {mesh.ndim} axes"
        raise ValueError(
            f"a mesh must have one axis, the one that the sequence is sharded over, such as mesh['cp'], or two, which are "
            f"named {axes} or have no names, got {given}"
        )
    if any((mesh.mesh.diff(dim=axis) < 0).any() for axis in (0, 1)):
        raise ValueError(f"ranks must rise along both axes of a (ulysses, ring) mesh, got {mesh.mesh.tolist()}")
