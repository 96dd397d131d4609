"""Adapters to flash-attn 2 (`flash_attn.flash_attn_interface`), versions 2.5 to 2.8, and to flash-attn 4 (`flash_attn.cute`).

The only file that knows their versions.

Note [versions]: the four private functions, as released:

| version | window | softcap | forward returns | lse of a pack |
|---|---|---|---|---|
| 2.5 | `window_size` tuple | no | 8 values, lse sixth | [count, h, max_q] |
| 2.6 | `window_size` tuple | yes, used from 2.6.3 on | 8 values, lse sixth | [h, n] |
| 2.7, 2.8 | `window_size_left`, `window_size_right` | yes | 4 values, lse second | [h, n] |

All of them fill the dq, dk, dv they are given, so what a backward returns is never needed. From 2.7 on the functions are custom
operators, whose Python signature says nothing; before, a parameter that a patch release added is found by `inspect`.

Note [softcap]: that a backward takes a softcap does not say that it applies one: flash-attn 4 inside flash_attn 2.8.3 leaves
it out of the gradient. So it is handed only to versions whose source does, flash-attn 2 from 2.6.3 on and a flash-attn 4 that
makes a derivative of it.

Note [imports]: a library that does not fit its machine raises what it likes while it is imported, such as RuntimeError where no
toolkit matches the driver. Whatever it is becomes the reason why the kernel cannot be used: told where it is asked for by name,
and for "auto" no reason to fail.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ring_attn.kernels import Problem, Upstream
from ring_attn.kernels.packs import Pack
from ring_attn.kernels.split import windows
from ring_attn.kernels.tilewise import Gradients, Packing, Scaling, refusal
from ring_attn.tiles import Tile


@dataclass(frozen=True)
class Flash2Kernel(Packing):
    """flash-attn 2: a tile is a window, tiles with one window are a pack."""

    name: str = "flash2"

    def supports(self, problem: Problem) -> str | None:
        library = load()
        if isinstance(library, str):
            return library
        if problem.device != "cuda":
            return f"flash-attn runs on CUDA, not on {problem.device!r}"
        if _capped(problem) and not library.takes_softcap:
            return f"it takes a softcap from flash_attn 2.6.3 on, {'.'.join(map(str, library.version))} is installed"
        return refusal(problem, (torch.float16, torch.bfloat16), head_dim_step=8, head_dim_max=256, takes_softcap=True)

    def pieces(self, tile: Tile) -> Iterable[Tile]:
        return windows(tile)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> tuple[Tensor, Tensor]:
        library = load()
        return library.forward("_flash_attn_forward", tile.window, scaling, q=q, k=k, v=v)

    def differentiate(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> Gradients:
        return load().backward("_flash_attn_backward", tile.window, scaling, up, up.lse, q=q, k=k, v=v)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, scaling: Scaling) -> tuple[Tensor, Tensor]:
        library = load()
        out, lse = library.forward("_flash_attn_varlen_forward", pack.window, scaling, q=q, k=k, v=v, **_lengths(pack))
        return out, _from_padded(lse, pack, len(q)) if library.pads_lse else lse

    def differentiate_packed(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, pack: Pack, scaling: Scaling) -> Gradients:
        library = load()
        lse = _to_padded(up.lse, pack) if library.pads_lse else up.lse
        return library.backward("_flash_attn_varlen_backward", pack.window, scaling, up, lse, q=q, k=k, v=v, **_lengths(pack))


@dataclass(frozen=True)
class _Library:
    """flash-attn's functions behind one calling convention."""

    module: ModuleType
    version: tuple[int, int, int]

    @property
    def pads_lse(self) -> bool:
        return self.version < (2, 6)

    @property
    def takes_softcap(self) -> bool:
        """Whether it applies a softcap in both directions, see Note [softcap]."""
        return self.version >= (2, 6, 3)

    def forward(self, name: str, window: tuple, scaling: Scaling, **tensors) -> tuple[Tensor, Tensor]:
        function = getattr(self.module, name)
        result = function(**tensors, **self._options(function, window, scaling), return_softmax=False)
        return result[0], result[1 if self.version >= (2, 7) else 5]

    def backward(self, name: str, window: tuple, scaling: Scaling, up: Upstream, lse: Tensor, **tensors) -> Gradients:
        function = getattr(self.module, name)
        dq, dk, dv = (torch.empty(tensors[x].shape, dtype=up.out.dtype, device=lse.device) for x in "qkv")
        function(
            **tensors, dout=up.dout, out=up.out, softmax_lse=lse, dq=dq, dk=dk, dv=dv,
            **self._options(function, window, scaling), deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv

    def _options(self, function: Callable, window: tuple, scaling: Scaling) -> dict:
        left, right = (-1 if side is None else side for side in window)
        options = {"dropout_p": 0.0, "softmax_scale": scaling.scale, "causal": False, "alibi_slopes": None}
        if self.version >= (2, 6):
            options["softcap"] = scaling.softcap
        if self.version >= (2, 7):
            return options | {"window_size_left": left, "window_size_right": right}
        options["window_size"] = left, right
        if "block_table" in inspect.signature(function).parameters:
            options["block_table"] = None
        return options


@cache
def load() -> _Library | str:
    """flash-attn 2, or the reason why it cannot be used."""
    try:
        import flash_attn
        from flash_attn import flash_attn_interface
    except Exception as error:  # See Note [imports].
        missing = isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"
        return "flash_attn is not installed" if missing else f"flash_attn 2 does not import here: {error}"
    release = getattr(flash_attn, "__version__", "unknown")
    known = re.match(r"2\.([5-8])(?:\.(\d+)|$)", release)
    if known is None:
        return f"flash_attn {release} is installed; this adapter is written for 2.5 to 2.8"
    return _Library(flash_attn_interface, (2, int(known[1]), int(known[2] or 0)))


@dataclass(frozen=True)
class Flash4Kernel(Packing):
    """flash-attn 4, written in CuTe for compute capability 9.0 and 10.0; allowed here only what a test has shown right.

    It reads both sides of a window as they are given, however long, and None as open, so no tile need be cut. Those of single
    batch rows are: what they are cut into has few windows, and goes in as few packs.

    On 9.0 version 4.0.0b36 returned wrong gradients, without a word, at head dims 40, 48, 72 and 80; 112 did not compile.
    """

    name: str = "flash4"

    def supports(self, problem: Problem) -> str | None:
        library = load4()
        if isinstance(library, str):
            return library
        if problem.device != "cuda":
            return f"flash-attn runs on CUDA, not on {problem.device!r}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
            return "it was shown right on compute capability 9.0 only"
        if problem.head_dim not in _FLASH4_HEAD_DIMS:
            return f"it was shown right at head dims {', '.join(map(str, _FLASH4_HEAD_DIMS))} only, not at {problem.head_dim}"
        if _capped(problem) and not hasattr(library.utils, "create_softcap_scoremod_bwd"):
            return "this flash-attn 4 has no derivative of a softcap, version 4.0.0b36 has"
        return refusal(problem, (torch.float16, torch.bfloat16), takes_lse_grad=True, takes_softcap=True)

    def pieces(self, tile: Tile) -> Iterable[Tile]:
        return (tile,) if tile.batch is None else windows(tile)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> tuple[Tensor, Tensor]:
        return self._forward(q, k, v, tile.window, scaling)

    def differentiate(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scaling: Scaling) -> Gradients:
        return self._backward(up, q, k, v, tile.window, scaling)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, scaling: Scaling) -> tuple[Tensor, Tensor]:
        return self._forward(q, k, v, pack.window, scaling, **_lengths(pack))

    def differentiate_packed(self, up: Upstream, q: Tensor, k: Tensor, v: Tensor, pack: Pack, scaling: Scaling) -> Gradients:
        return self._backward(up, q, k, v, pack.window, scaling, **_lengths(pack))

    def _forward(self, q, k, v, window: tuple, scaling: Scaling, **lengths) -> tuple[Tensor, Tensor]:
        out, lse, *_ = load4()._flash_attn_fwd(q, k, v, **self._options(window, scaling), **lengths, return_lse=True)
        return out, lse

    def _backward(self, up: Upstream, q, k, v, window: tuple, scaling: Scaling, **lengths) -> Gradients:
        options = self._options(window, scaling) | {"deterministic": torch.are_deterministic_algorithms_enabled()}
        return load4()._flash_attn_bwd(q, k, v, up.out, up.dout, up.lse, **options, **lengths, dlse=up.dlse)[:3]

    def _options(self, window: tuple, scaling: Scaling) -> dict:
        left, right = window
        scores = {"softmax_scale": scaling.scale, "softcap": scaling.softcap}
        return scores | {"window_size_left": left, "window_size_right": right}


_FLASH4_HEAD_DIMS = (32, 64, 96, 128)


@cache
def load4() -> ModuleType | str:
    """flash-attn 4's interface, or the reason why it cannot be used."""
    try:
        from flash_attn.cute import interface
    except Exception as error:  # See Note [imports].
        missing = isinstance(error, ModuleNotFoundError) and error.name in ("flash_attn", "flash_attn.cute")
        return "flash-attn 4 (flash_attn.cute) is not installed" if missing else f"flash-attn 4 does not import here: {error}"
    return interface


def _capped(problem: Problem) -> bool:
    return "softcap" in (problem.score or ())


def _lengths(pack: Pack) -> dict:
    return {
        "cu_seqlens_q": pack.cu_q,
        "cu_seqlens_k": pack.cu_kv,
        "max_seqlen_q": pack.max_q,
        "max_seqlen_k": pack.max_kv,
    }


def _from_padded(lse: Tensor, pack: Pack, num_rows: int) -> Tensor:
    """lse [count, h, max_q] of version 2.5 as [h, n]."""
    member, row = _members(pack, num_rows)
    return lse[member, :, row].T


def _to_padded(lse: Tensor, pack: Pack) -> Tensor:
    """lse [h, n] as the [count, h, max_q] that version 2.5 reads."""
    member, row = _members(pack, lse.shape[1])
    padded = lse.new_zeros(len(pack.cu_q) - 1, lse.shape[0], pack.max_q)
    padded[member, :, row] = lse.T
    return padded


def _members(pack: Pack, num_rows: int) -> tuple[Tensor, Tensor]:
    """Of every packed row: its rectangle, and its row in there."""
    starts = pack.cu_q[:-1].long()
    member = torch.repeat_interleave(pack.cu_q.diff(), output_size=num_rows)
    return member, torch.arange(num_rows, device=starts.device) - starts[member]


KERNELS = {"flash2": Flash2Kernel(), "flash4": Flash4Kernel()}
