"""Score modifiers inside the Triton kernels: a chain of steps, each a function of scores, its derivative and a parameter.

Note [chain]: products q k^T become scores by factors and functions in turn, and a last factor brings them to base 2. SoftCap's
division and multiplication and the change of base are such factors, folded together on the host: it costs a tanh and a
multiplication. The product of all factors is scale * log2(e) whatever the steps, and a gradient is linear in what comes in, so
the way back leaves the factors out: `scale`, with which the backward ends, is all of them.

Note [positions]: a step that asks where a score lies gets global positions. They are linear in the rows of one entry, see Note
[block table] of `triton_blocks`. A difference of positions is taken from the first walked one of a block, near which float32
holds every position. Heads are counted from 0 in a launch; a user's function brings the number of the first one along, see Note
[parts of the heads] in `ring_attn.score`.

Note [powers of two]: tanh and exp2 go through one unit, 16 numbers a clock, while the tensor cores wait. Under a softcap the dq
kernel takes every second exp2 by multiply-adds, which run beside it: 2^x = 2^n * 2^f with the integer n next to x and a cubic
for 2^f, |f| <= 1/2, whose relative error is at most 7.5e-5, less than a sixth of that of the tanh before it.

Note [names]: Triton names generated code by the module and the qualified name of its function, so of two functions of one
name the second would silently run the first one's code. `check_names` refuses them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ring_attn.kernels.triton_blocks import ENTRY, PLACED_ENTRY
from ring_attn.score import Alibi, Score, Scores, SoftCap
from ring_attn.score_mod import ScoreMod
from ring_attn.tiles import Tile
from ring_attn.typed import is_jitted


class Links(NamedTuple):
    """A chain as the kernels take it. One item a step: the factor before it, its function, its derivative, its parameter."""

    factors: tuple[float, ...]
    forward: tuple
    backward: tuple
    parameters: tuple


class Step(NamedTuple):
    """`forward(score, cells, parameter)`, `backward(dscore, score, cells, parameter)`, and the factors before and after."""

    forward: Any
    backward: Any
    parameter: Any
    before: float = 1.0
    after: float = 1.0


@dataclass(frozen=True)
class Chain:
    """What happens to the scores of a launch.

    `placed`: some step asks for positions. `kind`: as in `triton_blocks.configs`. `alibi`: the step with slopes, which are
    tensor number `slopes` of the scores. `bound`: as in `Scores`.
    """

    steps: tuple[Step, ...] = ()
    placed: bool = False
    kind: str = "plain"
    alibi: int | None = None
    slopes: int | None = None
    bound: float = math.inf

    def arguments(self, scale: float) -> dict[str, Any]:
        """What the kernels take for products that are to be scaled."""
        factors = [scale]
        for step in self.steps:
            factors[-1] *= step.before
            factors.append(step.after)
        *before, last = factors
        _, *columns = zip(*((None, *step[:3]) for step in self.steps), strict=True) if self.steps else [None]
        return {
            "chain": Links(tuple(before), *columns) if self.steps else None,
            "scale_log2": last * math.log2(math.e),
            "ENTRY": PLACED_ENTRY if self.placed else ENTRY,
        }

    def baseline(self, dtype: torch.dtype) -> float | None:
        """In base 2 the baseline of every row, for probabilities rounded to `dtype`, or None; see Note [baseline] of
        `triton_forward`.

        The least takes at most 0.7 of the exponents below 1: it keeps its digits, and so does its product with a value as small
        as those that are left, 4e-12 in float32. The greatest is at most 2^60, so that values to 2^43 of 2^24 keys add up in
        float32, and in float16 2^15.
        """
        size, below = self.bound * math.log2(math.e), -0.7 * math.log2(torch.finfo(dtype).tiny)
        least, most = size - (15 if dtype == torch.float16 else 60), below - size
        return max(least, min(0.0, most)) if least <= most else None


PLAIN = Chain()


def chain_of(score: Scores | None, tiles: Sequence[Tile], dtype: torch.dtype) -> Chain:
    """The chain of score modifiers, then of the predicates of tiles, for q, k and v of `dtype`.

    Raises ValueError where two functions have one name.
    """
    score = score or Scores(())
    # A mask has the same ones in all of its tiles.
    predicates = tiles[0].predicates if tiles else ()
    functions = [fn for one in score.steps if isinstance(one, ScoreMod) for fn in one.triton] + [x.triton for x in predicates]
    check_names(functions)
    hiding = (Step(hidden, through_hidden, (x.triton, x.first_head)) for x in predicates)
    steps = *(_step(one, dtype) for one in score.steps), *hiding
    alibi = next((n for n, one in enumerate(score.steps) if isinstance(one, Alibi)), None)
    slopes = None if alibi is None else sum(len(one.tensors()) for one in score.steps[:alibi])
    kinds = ["functions"] if functions else [one.kind for one in score.steps] or ["plain"]
    kind = kinds[0] if len(kinds) == 1 else "several"
    return Chain(steps, bool(functions) or alibi is not None, kind, alibi, slopes, score.bound)


def _step(score: Score, dtype: torch.dtype) -> Step:
    match score:
        case SoftCap(cap):
            in_full = dtype == torch.float32 or triton.knobs.runtime.interpret
            tanh = (tanh_in_full, slope_in_full) if in_full else (tanh_in_hardware, slope_in_hardware)
            return Step(bent, through_bent, tanh, 1 / cap, cap)
        case Alibi(slopes):
            return Step(sloped, through_sloped, slopes.float().contiguous())
        case ScoreMod(_, functions):
            return Step(called, through_called, (*functions, score.first_head))
    raise AssertionError(score)


def check_names(functions: Sequence[Any]) -> None:
    """Raises ValueError where two of the jitted functions, or of those they call, have one name; see Note [names]."""
    met: dict[str, Callable] = {}
    left = list(functions)
    while left:
        fn = left.pop().fn
        name = f"{fn.__module__}.{fn.__qualname__}"
        if met.get(name) is fn:
            continue
        if name in met:
            raise ValueError(
                f"two different Triton functions are named {name}, and Triton would run the code of one for both; set the "
                f"__qualname__ of one of them before triton.jit"
            )
        met[name] = fn
        left += _called_by(fn)


def _called_by(fn: Callable) -> Iterator[Any]:
    """The jitted functions that a function names, also as attributes of modules."""
    scope = inspect.getclosurevars(fn)
    for value in (*scope.globals.values(), *scope.nonlocals.values()):
        attributes = (getattr(value, name, None) for name in fn.__code__.co_names) if inspect.ismodule(value) else ()
        yield from filter(is_jitted, (value, *attributes))


@triton.jit
def entry_cells(entry, rows, batch, head, ENTRY: tl.constexpr):
    """What is alike for all blocks of an entry, as `block_cells` takes it."""
    cells = batch, head
    if ENTRY > 8:
        own = tl.load(entry + 8) + tl.load(entry + 9) * rows
        cells = batch, head, own, tl.load(entry + 10), tl.load(entry + 11)
    return cells


@triton.jit
def block_cells(cells, j, BLOCK: tl.constexpr, OWN_QUERIES: tl.constexpr):
    """Where the scores of a block lie: (batch, head), and in a placed table (.., q_pos, kv_pos, origin).

    q_pos and kv_pos broadcast to the block; for `origin` see Note [positions]. `j`: the first of BLOCK walked rows.
    """
    if len(cells) > 2:
        batch, head, own, at, step = cells
        origin = at + step * j
        walked = origin + step * tl.arange(0, BLOCK)
        if OWN_QUERIES:
            cells = batch, head, own[:, None], walked[None, :], origin
        else:
            cells = batch, head, walked[None, :], own[:, None], origin
    return cells


@triton.jit
def modified(score, cells, chain, STEPS: tl.constexpr):
    """What the first STEPS steps make of products; the factor that follows them is left to do."""
    for n in tl.static_range(STEPS):
        score = chain.forward[n](score * chain.factors[n], cells, chain.parameters[n])
    return score


@triton.jit
def pulled_back(dscore, products, cells, chain, FIRST: tl.constexpr):
    """The gradient of what enters step FIRST, without factors, given that of the scores."""
    STEPS: tl.constexpr = len(chain.forward)
    for back in tl.static_range(STEPS - FIRST):
        # A compiler sees that these were computed before.
        score = modified(products, cells, chain, STEPS - 1 - back) * chain.factors[STEPS - 1 - back]
        dscore = chain.backward[STEPS - 1 - back](dscore, score, cells, chain.parameters[STEPS - 1 - back])
    return dscore


@triton.jit
def bent(score, cells, functions):
    return functions[0](score)


@triton.jit
def through_bent(dscore, score, cells, functions):
    return dscore * functions[1](score)


@triton.jit
def tanh_in_hardware(x):
    """tanh to a relative error of 2^-11, in one instruction."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def slope_in_hardware(x):
    """The derivative of tanh, from the same tanh."""
    ratio = tanh_in_hardware(x)
    return 1 - ratio * ratio


@triton.jit
def power_of_two(x, MIXED: tl.constexpr):
    """2^x of x below 128; MIXED: every second one by multiply-adds, see Note [powers of two]."""
    if MIXED:
        return tl.inline_asm_elementwise(MIXED_EXP2, "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)
    return tl.exp2(x)


# Of two numbers the second is n + f: adding 1.5 * 2^23 + 127 rounds it to an integer, n + 127 in the lowest bits, which are the
# exponent of 2^n once they are in its place, 0 for -127 and what is below.
MIXED_EXP2 = tl.constexpr("""{
    .reg .f32 x, n, f, power, scale;
    .reg .b32 bits;
    ex2.approx.ftz.f32 $0, $2;
    max.NaN.ftz.f32 x, $3, 0fC2FE0000;
    add.rn.f32 n, x, 0f4B40007F;
    mov.b32 bits, n;
    shl.b32 bits, bits, 23;
    mov.b32 scale, bits;
    sub.rn.f32 n, n, 0f4B40007F;
    sub.rn.f32 f, x, n;
    fma.rn.f32 power, f, 0f3D61FB73, 0f3E786EF1;
    fma.rn.f32 power, power, f, 0f3F31798D;
    fma.rn.f32 power, power, f, 0f3F7FFB4A;
    mul.ftz.f32 $1, power, scale;
}""")


@triton.jit
def tanh_in_full(x):
    """tanh to float32's rounding."""
    size = tl.abs(x)
    decay = tl.exp(-2.0 * size)
    # Near 0 the quotient loses the digits that it subtracts.
    near = tl.minimum(size, 0.25)
    square = near * near
    series = near * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    size = tl.where(size < 0.25, series, (1 - decay) / (1 + decay))
    return tl.where(x < 0, -size, size)


@triton.jit
def slope_in_full(x):
    """The derivative of tanh to float32's rounding, also where tanh is all but 1."""
    decay = tl.exp(-2.0 * tl.abs(x))
    return 4 * decay / ((1 + decay) * (1 + decay))


@triton.jit
def sloped(score, cells, slopes):
    return score - tl.load(slopes + cells[1]) * distance(cells)


@triton.jit
def through_sloped(dscore, score, cells, slopes):
    return dscore


@triton.jit
def distance(cells):
    """|q_pos - kv_pos| of a block's cells, float32."""
    return tl.abs((cells[2] - cells[4]).to(tl.float32) - (cells[3] - cells[4]).to(tl.float32))


@triton.jit
def called(score, cells, mod):
    return mod[0](score, cells[0], cells[1] + mod[2], cells[2], cells[3])


@triton.jit
def through_called(dscore, score, cells, mod):
    return mod[1](dscore, score, cells[0], cells[1] + mod[2], cells[2], cells[3])


@triton.jit
def hidden(score, cells, mask):
    return tl.where(mask[0](cells[0], cells[1] + mask[1], cells[2], cells[3]), score, float("-inf"))


@triton.jit
def through_hidden(dscore, score, cells, mask):
    # The probability of what is hidden is 0, and so is its gradient.
    return dscore
