"""Other libraries in `ring-attn bench ring`: how each is imported, called and sharded. Each is optional, and checked as ours.

Note [imports]: two of them cannot be imported as they are beside current packages. ring-flash-attn's `__init__` wants private
names of transformers that come and go, so its modules are imported without it. ring-attention-pytorch ends the process unless
a distribution named triton-nightly tells a version, so it is told Triton's.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_attn.bench.contenders import Attend, Case, Contender
from ring_attn.comm.transport import Transport
from ring_attn.layout import LAYOUTS, Layout
from ring_attn.sharding import positions


@dataclass(frozen=True)
class Peer:
    """What peers share: a rank a process of the default group. `head_groups`: into how many parts they cut the KV heads."""

    variant: str
    layout: str
    transport: Transport

    staging = 0
    chosen = ""
    gate_rows = 512  # a multiple of a block, as some of them need
    distribution = ""
    masks = ("causal",)
    head_groups = 1

    @property
    def rank(self) -> int:
        return self.transport.hosted[0]

    @property
    def processes(self) -> int:
        return self.transport.ring_size

    @property
    def name(self) -> str:
        return f"{self.distribution} {self.variant}"

    def why_not(self, case: Case) -> str | None:
        try:
            self.load()
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except (ImportError, AssertionError, SystemExit) as error:
            return f"it cannot be imported: {error}"
        if case.name not in self.masks:
            return f"it has no {case.name} mask here, only {' and '.join(self.masks)}"
        if case.shape.kv_heads % self.head_groups:
            return f"it needs KV heads, here {case.shape.kv_heads}, in {self.head_groups} equal parts"
        if len(self.transport.hosted) > 1:
            return "it needs a process a rank: start with torchrun"
        return None

    def load(self) -> object:
        """What is called. Raises ImportError, or what the package raises in its place."""
        raise NotImplementedError

    def positions(self, case: Case) -> Tensor:
        return positions(LAYOUTS[self.layout](case.length, self.processes), (self.rank,))


_STEMS = {"zigzag": "zigzag_ring", "basic": "ring", "stripe": "stripe"}


class RingFlashAttn(Peer):
    """ring-flash-attn: zigzag, basic, stripe and llama3 (all-gather by KV heads); packed documents by all but stripe."""

    distribution = "ring-flash-attn"

    @property
    def masks(self) -> tuple[str, ...]:
        # All but llama3 apply a window to every shard pair on its own, which is another mask.
        more = {"stripe": (), "llama3": ("documents", "window")}
        return "causal", *more.get(self.variant, ("documents",))

    def load(self, stem: str = "ring_flash_attn") -> ModuleType:
        _without_init("ring_flash_attn")
        return import_module(f"ring_flash_attn.{stem}")

    def positions(self, case: Case) -> Tensor:
        if case.documents is None or self.variant == "llama3":
            return super().positions(case)
        # Every document is sharded on its own.
        starts = _ends(case.documents).tolist()
        layouts = [LAYOUTS[self.layout](length, self.processes) for length in case.documents]
        return torch.cat([start + positions(x, (self.rank,)) for start, x in zip(starts, layouts, strict=False)])

    @contextmanager
    def attention(self, case: Case) -> Iterator[Attend]:
        if case.documents is None and self.variant != "llama3":
            yield partial(self._function("flash_attn"), causal=True)
            return
        packed = self._llama3(case) if self.variant == "llama3" else self._varlen(case)
        yield lambda q, k, v: packed(q.squeeze(0), k.squeeze(0), v.squeeze(0)).unsqueeze(0)

    def _function(self, kind: str) -> Attend:
        stem = f"{_STEMS[self.variant]}_{kind}"
        return getattr(self.load(stem), f"{stem}_func")

    def _varlen(self, case: Case) -> Attend:
        ends = _ends(case.documents).to(case.shape.device) // self.processes
        most = max(case.documents) // self.processes
        return partial(self._function("flash_attn_varlen"), cu_seqlens=ends, max_seqlen=most, causal=True)

    def _llama3(self, case: Case) -> Attend:
        module = self.load("llama3_flash_attn_varlen")
        ends = _ends(case.documents or (case.length,)).to(case.shape.device)
        q_ends, k_ends, q_most, k_most, rows = module.llama3_flash_attn_prepare_cu_seqlens(
            ends, causal=True, rank=self.rank, world_size=self.processes
        )
        return partial(
            module.llama3_flash_attn_varlen_func,
            cu_seqlens_q=q_ends,
            cu_seqlens_k=k_ends,
            max_seqlen_q=q_most,
            max_seqlen_k=k_most,
            heads_k_stride=1,
            local_k_slice=rows,
            causal=True,
            window_size=(-1, -1) if case.window is None else (case.window, 0),
        )


class Yunchang(Peer):
    """yunchang: `head_groups` neighbouring ranks trade rows for heads, and between their groups there is a zigzag ring."""

    distribution = "yunchang"

    @property
    def head_groups(self) -> int:
        return self.processes if self.variant == "Ulysses" else 2

    def load(self) -> ModuleType:
        return import_module("yunchang")

    def why_not(self, case: Case) -> str | None:
        uneven = f"it needs ranks, here {self.processes}, in {self.head_groups} equal parts"
        return super().why_not(case) or (uneven if self.processes % self.head_groups else None)

    def positions(self, case: Case) -> Tensor:
        zigzag: Layout = LAYOUTS["zigzag"](case.length, self.processes // self.head_groups)
        group, member = divmod(self.rank, self.head_groups)
        return positions(zigzag, (group,)).chunk(self.head_groups)[member]

    @contextmanager
    def attention(self, case: Case) -> Iterator[Attend]:
        yield partial(_yunchang(self.head_groups, self.rank, self.processes), causal=True)


@lru_cache
def _yunchang(head_groups: int, rank: int, processes: int) -> torch.nn.Module:
    """Its attention, made once: it makes process groups, which stay."""
    yunchang = import_module("yunchang")
    yunchang.set_seq_parallel_pg(head_groups, processes // head_groups, rank, processes)
    return yunchang.LongContextAttention(ring_impl_type="zigzag", attn_type=yunchang.kernels.AttnType.FA)


class RingAttentionPytorch(Peer):
    """ring-attention-pytorch, its Triton kernels. Query head i reads KV head i % g there, so heads change places on the way."""

    distribution = "ring-attention-pytorch"

    def load(self) -> Attend:
        version = importlib.metadata.version
        told = lambda name: version("triton" if name == "triton-nightly" else name)  # noqa: E731
        with patch.object(importlib.metadata, "version", told):
            import_module("ring_attention_pytorch.triton_flash_attn")
            return import_module("ring_attention_pytorch.ring_flash_attention_cuda").ring_flash_attn_cuda

    @contextmanager
    def attention(self, case: Case) -> Iterator[Attend]:
        call = partial(self.load(), causal=True, ring_reduce_col=True, striped_ring_attn=True, ring_size=self.processes)
        g, n = case.shape.kv_heads, case.shape.heads // case.shape.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = call(q.unflatten(2, (g, n)).transpose(2, 3).flatten(2, 3), k, v)
            return out.unflatten(2, (n, g)).transpose(2, 3).flatten(2, 3)

        yield attend


_BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class ContextParallel(Peer):
    """torch's own context_parallel, with KV heads repeated: it does not document grouped ones."""

    distribution = "torch context_parallel"

    def load(self) -> ModuleType:
        return import_module("torch.distributed.tensor.experimental._attention")

    @contextmanager
    def attention(self, case: Case) -> Iterator[Attend]:
        module, (moves, backend) = self.load(), self.variant.split()
        module.set_rotate_method(moves.replace("-", ""))
        # It takes the length from a buffer, which it shards in place.
        buffer = torch.arange(case.length, device=case.shape.device)
        context = module.context_parallel(
            _mesh(case.shape.device.type, self.processes), buffers=[buffer], buffer_seq_dims=[0], no_restore_buffers={buffer}
        )
        group = case.shape.heads // case.shape.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (x.repeat_interleave(group, 2) for x in (k, v))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        with context, sdpa_kernel(_BACKENDS[backend]):
            yield attend


@lru_cache
def _mesh(device: str, processes: int):
    return init_device_mesh(device, (processes,))


def _without_init(package: str) -> None:
    """Makes modules of a package importable whose `__init__` is not, see Note [imports]. Raises ModuleNotFoundError."""
    if package in sys.modules:
        return
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    module = ModuleType(package)
    module.__path__ = spec.submodule_search_locations
    sys.modules[package] = module


def _ends(lengths: tuple[int, ...]) -> Tensor:
    """0 and where each document ends, int32."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def peers(transport: Transport) -> list[Contender]:
    """Every peer, for this process of a ring with one rank a process."""
    return [
        *(
            ContextParallel(variant, "zigzag", transport)
            for variant in ("all-gather cuDNN", "all-to-all cuDNN", "all-gather flash")
        ),
        RingFlashAttn("zigzag", "zigzag", transport),
        RingFlashAttn("basic", "contiguous", transport),
        RingFlashAttn("stripe", "striped", transport),
        RingFlashAttn("llama3", "contiguous", transport),
        Yunchang("Ulysses", "contiguous", transport),
        Yunchang("Ulysses 2 x ring", "zigzag", transport),
        RingAttentionPytorch("striped", "striped", transport),
    ]
