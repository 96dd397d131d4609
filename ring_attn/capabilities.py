"""What each kernel can do: features x kernels, each "yes" or the reason why not, in the words of `Kernel.supports`.

A feature is asked as a user would ask for it: a mask, scores, a dtype and head dims go through `Call.problem`, forward and
backward. tests/test_capabilities.py runs every yes and every no of the machine it is on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ring_attn.call import Call
from ring_attn.kernels import KERNEL_NAMES, Problem, get_kernel
from ring_attn.mask import Causal, Documents, Full, KeyPadding, Mask, MaskMod, Window
from ring_attn.ring import Ring
from ring_attn.score import Alibi, Bias, CosineSim, Dropout, RelativeBias, Score, Sinks, SoftCap
from ring_attn.score_mod import ScoreMod

YES = "yes"
FORWARD_ONLY = "forward only: "
BATCH, SEQ_LEN, NUM_HEADS = 2, 16, 2

Table = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Feature:
    """Something to ask of a kernel. `score`: made for the rows that a ring hosts. `dtype`: None is the device's usual one."""

    name: str
    mask: Mask = Causal()  # noqa: RUF009 (frozen)
    score: Callable[[Ring], Score] | None = None
    dtype: torch.dtype | None = None
    num_kv_heads: int = NUM_HEADS
    head_dim: int = 64
    v_head_dim: int = 64
    lse_grad: bool = False
    deterministic: bool = False

    def scores(self, ring: Ring) -> list[Score]:
        return [] if self.score is None else [self.score(ring)]

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k and v for the whole sequence."""
        heads = (NUM_HEADS, self.head_dim), (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.v_head_dim)
        return tuple((BATCH, SEQ_LEN, *x) for x in heads)

    def problem(self, device: str, direction: str) -> Problem:
        """What a kernel on such a device is asked; no tensor is put there."""
        q, k, v = (torch.empty(shape, dtype=self.dtype or usual_dtype(device)) for shape in self.shapes())
        ring = Ring.simulated(1)
        call = Call.make(ring, self.mask, self.scores(ring), 1.0)
        asked = call.problem(q, k, v, direction, self.lse_grad and direction == "backward")
        return replace(asked, device=device, deterministic=self.deterministic)


def usual_dtype(device: str) -> torch.dtype:
    """What features are asked in where they name no dtype."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def _per_head() -> Tensor:
    return torch.linspace(0.1, 1.0, NUM_HEADS)


def _bias(ring: Ring) -> Tensor:
    return ring.shard(torch.linspace(-1.0, 1.0, SEQ_LEN**2).sin().view(SEQ_LEN, SEQ_LEN), dim=-2)


FEATURES = (
    Feature("Full", Full()),
    Feature("Causal"),
    Feature("Window", Window(5, 2)),
    Feature("Causal & Window", Causal() & Window(5)),
    Feature("Documents", Causal() & Documents(lengths=[5, 1, 10])),
    Feature("Documents by batch row", Documents(lengths=[[5, 11], [9, 7]])),
    Feature("KeyPadding", KeyPadding([SEQ_LEN - 3, SEQ_LEN // 2])),
    Feature("MaskMod", Causal() & MaskMod(lambda b, h, q, k: (q - k) % 3 == 0)),
    Feature("SoftCap", score=lambda ring: SoftCap(2.0)),
    Feature("Alibi", score=lambda ring: Alibi(_per_head())),
    Feature("RelativeBias", score=lambda ring: RelativeBias(torch.linspace(-1.0, 1.0, NUM_HEADS * 7).cos().view(NUM_HEADS, 7))),
    Feature("Bias", score=lambda ring: Bias(_bias(ring))),
    Feature("ScoreMod", score=lambda ring: ScoreMod(lambda score, b, h, q, k: score - 0.1 * (h + 1) * (q - k))),
    Feature("CosineSim", score=lambda ring: CosineSim(8.0, groups=2)),
    Feature("Sinks", score=lambda ring: Sinks(_per_head())),
    Feature("Dropout", score=lambda ring: Dropout(0.3, seed=1)),
    Feature("float64", dtype=torch.float64),
    Feature("float32", dtype=torch.float32),
    Feature("bfloat16", dtype=torch.bfloat16),
    Feature("float16", dtype=torch.float16),
    Feature("grouped heads", num_kv_heads=1),
    Feature("head_dim 20", head_dim=20, v_head_dim=20),
    Feature("head_dim 128", head_dim=128, v_head_dim=128),
    Feature("head_dim 192", head_dim=192, v_head_dim=192),
    Feature("head_dim 256", head_dim=256, v_head_dim=256),
    Feature("head_dim 320", head_dim=320, v_head_dim=320),
    Feature("v_head_dim 32, head_dim 64", v_head_dim=32),
    Feature("v_head_dim 128, head_dim 192", head_dim=192, v_head_dim=128),
    Feature("gradients through lse", lse_grad=True),
    Feature("deterministic", deterministic=True),
)


def capabilities() -> dict[str, Table]:
    """`[device][feature][kernel]`: "yes", "forward only: ..." or the reason why not, for every device of this machine."""
    return {device: table(device) for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))}


def table(device: str) -> Table:
    """`[feature][kernel]` for a type of device."""
    return {feature.name: {name: answer(name, feature, device) for name in KERNEL_NAMES[1:]} for feature in FEATURES}


def answer(kernel: str, feature: Feature, device: str) -> str:
    """What a kernel says to one feature: "yes", "forward only: ..." or the reason why not."""
    forward, backward = (get_kernel(kernel).supports(feature.problem(device, way)) for way in ("forward", "backward"))
    return forward or (YES if backward is None else FORWARD_ONLY + backward)


def report(device: str, found: Table) -> str:
    """The table in text: a reason is a number that stands below, and a kernel that does nothing here is only a line."""
    names = list(next(iter(found.values())))
    absent = {name: reason for name in names if (reason := _only_reason(found, name)) is not None}
    names = [name for name in names if name not in absent]
    reasons: dict[str, int] = {}

    def cell(text: str) -> str:
        if text == YES:
            return text
        number = reasons.setdefault(_rule(text.removeprefix(FORWARD_ONLY)), len(reasons) + 1)
        return f"forward [{number}]" if text.startswith(FORWARD_ONLY) else f"[{number}]"

    width = max(map(len, found)) + 2
    lines = [f"{device}, {str(usual_dtype(device)).removeprefix('torch.')} and head_dim 64 where nothing else is said", ""]
    lines += [" " * width + "".join(f"{name:13}" for name in names).rstrip()]
    lines += [
        f"{name:{width}}" + "".join(f"{cell(row[kernel]):13}" for kernel in names).rstrip() for name, row in found.items()
    ]
    lines += ["", *(f"[{number}] {reason}" for reason, number in reasons.items())]
    lines += [f"{name} is not here: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def _rule(reason: str) -> str:
    """A reason without what was asked, which the table's row says."""
    return re.sub(r", not [^;,]+$", "", re.sub(r"^it has no \w+$", "it has no such score modifier", reason))


def _only_reason(found: Table, kernel: str) -> str | None:
    """The reason why a kernel can do nothing at all, where it is always the same."""
    said = {row[kernel] for row in found.values()}
    return said.pop() if len(said) == 1 and YES not in said else None
