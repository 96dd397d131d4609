"""A user's function of scores, `ScoreMod`, and what runs functions of one cell, of scores or of masks, over a block of them.

A function takes scalars, as for torch's flex_attention. The tensors that it closes over or names as globals are listed, so that
they enter the custom op as inputs of their own, and put back, see Note [tensors] in `ring_attn.score`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import CellType, FunctionType, MethodType

import torch
from torch import Tensor

from ring_attn.mask import MaskMod
from ring_attn.score import Cells, Score
from ring_attn.typed import is_jitted


@dataclass(frozen=True, repr=False)
class ScoreMod(Score):
    """fn(score, b, h, q_pos, kv_pos) -> score, as torch's flex_attention takes it, on scalars and in global positions.

    Tensors that `fn` closes over or names as globals get gradients; one that it reaches in another way may not need one. It is
    also asked about cells beside those that the mask allows, and must be finite there. Tensors may change; where something else
    does that it reads, make a new ScoreMod of a new function.

    `triton`: the same for the Triton kernels, which need it: two @triton.jit functions, forward(score, b, h, q_pos, kv_pos) ->
    score and backward(dscore, score, b, h, q_pos, kv_pos) -> the gradient of the score that the forward was given. They work on
    each element of a block: score and dscore are fp32, q_pos and kv_pos int32 that broadcast to them, b and h int32 scalars.
    Nothing they capture gets a gradient.
    """

    fn: Callable
    triton: tuple[Callable, Callable] | None = None
    first_head: int = field(default=0, kw_only=True)  # see Note [parts of the heads] in `ring_attn.score`

    def __post_init__(self) -> None:
        if self.triton is not None and not (
            isinstance(self.triton, tuple) and len(self.triton) == 2 and all(map(is_jitted, self.triton))
        ):
            raise TypeError(f"{self!r} takes triton=(forward, backward), two @triton.jit functions, got {self.triton!r}")

    @property
    def kind(self) -> str:
        """The name that kernels know it by: whether Triton functions stand beside the function."""
        return "score_mod" if self.triton is None else "triton_score_mod"

    def __repr__(self) -> str:
        return f"ScoreMod({getattr(self.fn, '__qualname__', type(self.fn).__name__)})"

    def tensors(self) -> tuple[Tensor, ...]:
        return captured(self.fn)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Score:
        # In 16 bits a table's gradient, a sum over many cells, would stop growing after a few hundred of them.
        wide = (x.to(torch.promote_types(x.dtype, torch.float32)) if x.dtype.is_floating_point else x for x in tensors)
        return replace(self, fn=recapture(self.fn, tuple(wide)))

    def from_head(self, first: int) -> Score:
        return replace(self, first_head=self.first_head + first)

    def check_gradients(self) -> None:
        if self.triton is not None and any(x.requires_grad for x in self.tensors()):
            raise ValueError(
                f"{self!r} captures a tensor that needs a gradient, which its Triton functions cannot give; leave triton=... "
                f"out, or detach the tensor"
            )
        first = torch.zeros((), dtype=torch.int64, device=next((x.device for x in self.tensors()), None))
        known = recapture(self.fn, tuple(x.detach() for x in self.tensors()))
        with self._in_words():
            score = known(first.double(), first, first, first, first)
        if not isinstance(score, Tensor):
            raise TypeError(f"{self!r} must return a tensor that it makes of the score, got {score!r}")
        if score.dim():
            raise ValueError(f"{self!r} must return one score for one cell, a scalar, got shape {tuple(score.shape)}")
        if score.dtype.is_complex or score.dtype == torch.bool:
            raise TypeError(f"{self!r} must return a real score, got {score.dtype}; to allow some cells alone there is MaskMod")
        if score.requires_grad:
            raise ValueError(
                f"{self!r} reaches a tensor that needs a gradient in a way that cannot be followed (an attribute, a "
                f"default, a function it calls); close over the tensor itself"
            )

    def apply(self, scores: Tensor, cells: Cells) -> Tensor:
        heads = cells.heads + self.first_head
        with self._in_words():
            modified = over_cells(self.fn, (0, 0, 0, 0))(scores, cells.batch, heads, cells.q_pos, cells.kv_pos)
        # On scalars, a captured float64 table makes a float64 score.
        return modified.to(scores.dtype)

    def _in_words(self) -> AbstractContextManager:
        arguments = "(score, b, h, q_pos, kv_pos) -> score of tensors"
        return in_words(f"{self!r} must be a function {arguments}, without `if` about them")


@contextmanager
def in_words(rule: str) -> Iterator[None]:
    """What a user's function raises inside names the rule as well, where it takes other arguments, returns something else or
    asks for a tensor's truth. That memory runs out is not its fault.
    """
    try:
        yield
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        if not isinstance(error, torch.OutOfMemoryError):
            error.add_note(rule)
        raise


@contextmanager
def function_transforms() -> Iterator[None]:
    """Inside, torch.vmap and torch.func.vjp work even where a custom op runs under a TorchDispatchMode.

    Such a mode (selective checkpointing, a FLOP counter, the first run of a compiled graph) excludes their dispatch keys.
    """
    with ExitStack() as stack:
        for key in ("DynamicLayerFrontMode", "DynamicLayerBackMode", "Batched", "VmapMode", "GradWrapper"):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, f"FuncTorch{key}"), False))
        yield


def over_cells(fn: Callable, score_dims: tuple[int, ...] = ()) -> Callable:
    """`fn` of scalars as a function of axes: batch rows [b], heads [h], q [i] and kv [j] positions, result [b, h, i, j]."""
    dims = [(None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)]
    for axes in dims:
        fn = torch.vmap(fn, in_dims=((0,) if score_dims else ()) + axes)
    return fn


def allowed_cells(mask: MaskMod, batch: Tensor, heads: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    """Which cells a mask's function allows, bool [b, h, i, j], of batch rows [b], heads [h] and positions [i] and [j]."""
    arguments = "(b, h, q_pos, kv_pos) -> bool of integer tensors"
    with in_words(f"{mask!r} must be a function {arguments}, without `if`, `and`, `or` or `not` about them, for all positions"):
        allowed = over_cells(mask.fn)(batch, heads + mask.first_head, q_pos, kv_pos)
        if allowed.dtype.is_floating_point or allowed.dtype.is_complex:
            raise TypeError(f"{mask!r} returned {allowed.dtype}; compare, as in x > 0, or change scores by a ScoreMod")
        if allowed.dim() != 4:
            raise ValueError(f"{mask!r} must return one value for one cell, a scalar, got shape {tuple(allowed.shape[4:])}")
        return allowed.bool()


def global_positions(shard: tuple[range, ...], rows: range, device: torch.device) -> Tensor:
    """The global positions of some rows of a shard, int64."""
    parts, start = [torch.empty(0, dtype=torch.int64, device=device)], 0
    for positions in shard:
        part = positions[max(0, rows.start - start) : max(0, rows.stop - start)]
        parts.append(torch.arange(part.start, part.stop, part.step, device=device))
        start += len(positions)
    return torch.cat(parts)


def captured(fn: Callable) -> tuple[Tensor, ...]:
    """The tensors that a function closes over or names as globals, in a fixed order."""
    cells = [cell.cell_contents for cell in getattr(fn, "__closure__", None) or ()]
    return tuple(x for x in (*cells, *_globals_of(fn).values()) if isinstance(x, Tensor))


def recapture(fn: Callable, tensors: tuple[Tensor, ...]) -> Callable:
    """The function with other tensors in the places of `captured`."""
    if not tensors:
        return fn
    rest = iter(tensors)
    closure = fn.__closure__ and tuple(
        CellType(next(rest)) if isinstance(cell.cell_contents, Tensor) else cell for cell in fn.__closure__
    )
    names = fn.__globals__ | {name: next(rest) for name in _globals_of(fn)}
    copy = FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__, closure)
    copy.__kwdefaults__ = fn.__kwdefaults__
    copy.origin = origin(fn)
    return MethodType(copy, fn.__self__) if isinstance(fn, MethodType) else copy


def origin(fn: Callable) -> Callable:
    """The function that the user gave, of which this may be a copy with other tensors."""
    return getattr(fn, "origin", fn)


def _globals_of(fn: Callable) -> dict[str, Tensor]:
    names = getattr(getattr(fn, "__code__", None), "co_names", ())
    return {name: fn.__globals__[name] for name in names if isinstance(fn.__globals__.get(name), Tensor)}
