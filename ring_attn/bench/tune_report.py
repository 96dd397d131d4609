"""What `ring-attn bench tune` found: a table a launch, and the best as arguments of the kernel's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING

import torch

from ring_attn.bench.results import software
from ring_attn.kernels.triton_blocks import Config, configs

if TYPE_CHECKING:
    from ring_attn.bench.tune import TuneOptions
    from ring_attn.kernels.triton_ahead import Resources


@dataclass(frozen=True)
class Timed:
    """One candidate: TFLOP/s by case, or why there are none."""

    launch: str
    config: Config
    resources: Resources | None
    tflops: dict[str, float]
    why_not: str = ""

    @property
    def score(self) -> float:
        """The geometric mean over the first two cases."""
        first = list(self.tflops.values())[:2]
        return prod(first) ** (1 / len(first)) if first else 0.0


def report(rows: list[Timed], options: TuneOptions) -> str:
    """The candidates of each launch, best first, then the best as lines for the kernel's table."""
    heads = f"{options.heads} query and {options.kv_heads} KV heads"
    what = f"{options.dtype}, head dim {options.head_dim}, {heads}{options.score and f', {options.score}'}"
    lines = [f"{software()}, {what}: TFLOP/s"]
    best: dict[str, list[Timed]] = {}
    for launch in dict.fromkeys(row.launch for row in rows):
        mine = sorted((row for row in rows if row.launch == launch), key=lambda row: -row.score)
        best[launch] = mine
        lines += ["", f"{launch:8s} registers spills (in loop) KiB" + "".join(f"{case:>17s}" for case in options.cases)]
        lines += [line(row, options.cases) for row in mine]
    scores = options.score or "plain"
    shipped = configs(getattr(torch, options.dtype), options.head_dim, options.head_dim, "large", scores)
    lines.append("\nbest under each mask, as arguments of Configs, narrow launches apart:")
    for case in ("", *options.cases):
        chosen = {}
        for launch, mine in best.items():
            top = max(mine, key=lambda row: row.tflops.get(case, 0.0) if case else row.score)
            chosen[launch] = top.config if top.tflops else getattr(shipped, launch)
        lines.append(f"  {case or 'the first two':17s} " + ", ".join(f"{name}={brief(x)}" for name, x in chosen.items()))
    if {"dkdv", "dq"} <= set(best):
        lines.append("\nbackward, in both launches:")
        for case in options.cases:
            dkdv, dq = (max(row.tflops.get(case, 0.0) for row in best[name]) for name in ("dkdv", "dq"))
            lines.append(f"  {case:17s} {10 / (8 / dkdv + 6 / dq) if dkdv and dq else 0.0:6.0f}")
    return "\n".join(lines)


def line(row: Timed, cases: Sequence[str]) -> str:
    """One candidate's row of the table."""
    taken = row.resources
    head = "" if taken is None else f"{taken.registers:4d} {taken.spills:5d} ({taken.loop_spills:3d}) {taken.shared // 1024:4d}"
    cells = row.why_not or "".join(f"{row.tflops[case]:17.1f}" for case in cases)
    return f"  {head:22s} {cells}  {row.launch} {brief(row.config)}{' serialized' if taken and taken.serialized else ''}"


def brief(config: Config | None) -> str:
    """The expression that makes it, without what is as by default."""
    if config is None:
        return "None"
    named = [x for x in fields(config)[4:] if getattr(config, x.name) != x.default]
    values = [str(getattr(config, x.name)) for x in fields(config)[:4]]
    return f"Config({', '.join([*values, *(f'{x.name}={getattr(config, x.name)}' for x in named)])})"
