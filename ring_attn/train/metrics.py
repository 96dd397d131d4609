"""What a run reports while it goes: a JSON line a step, a progress bar, and at the end a picture of the loss."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from ring_attn.train.config import TrainConfig
from ring_attn.train.folder import CURVE, METRICS, RunFolder


class Reporter(Protocol):
    """What the loop tells of. `finish` is called once, at the end of a run that went well."""

    def step(self, step: int, **numbers: float) -> None: ...

    def evaluated(self, step: int, eval_loss: float) -> None: ...

    def finish(self) -> None: ...


class Silent:
    """The reporter of a process that does not lead."""

    def step(self, step: int, **numbers: float) -> None: ...

    def evaluated(self, step: int, eval_loss: float) -> None: ...

    def finish(self) -> None: ...


class Recorder:
    """Writes metrics.jsonl, shows a bar on stderr and draws loss.png. For the leader.

    Lines: {"step", "seconds", "loss", "lr", "grad_norm", "tokens_per_s", "memory_gib"} after a step and {"step", "seconds",
    "eval_loss"} after an evaluation. Losses are nats per byte; seconds count from the start of the run, over its resumptions.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig, device: torch.device) -> None:
        from tqdm import tqdm

        self.path, self.device = folder.path, device
        before = [line for line in read(folder.path) if line["step"] <= folder.start] if folder.start else []
        self.stream = (folder.path / METRICS).open("w")
        for line in before:
            self._write(line)
        self.began = time.monotonic() - (before[-1]["seconds"] if before else 0)
        self.bar = tqdm(total=config.optim.steps, initial=folder.start, unit="step", dynamic_ncols=True)

    def step(self, step: int, **numbers: float) -> None:
        memory = memory_gib(self.device)
        self._write({"step": step, "seconds": self._seconds(), **numbers, "memory_gib": memory})
        self.bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {numbers['tokens_per_s']:,.0f} tokens/s, {memory:.1f} GiB")
        self.bar.update(step - self.bar.n)

    def evaluated(self, step: int, eval_loss: float) -> None:
        self._write({"step": step, "seconds": self._seconds(), "eval_loss": eval_loss})
        self.bar.write(f"step {step}: held-out loss {eval_loss:.4f} nats per byte", file=sys.stderr)

    def finish(self) -> None:
        self.stream.close()
        self.bar.close()
        draw_curve(self.path)

    def _seconds(self) -> float:
        return round(time.monotonic() - self.began, 3)

    def _write(self, line: dict) -> None:
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()


class Speed:
    """Tokens a second of the training steps alone, `tokens_a_step` each, since the question before."""

    def __init__(self, tokens_a_step: int) -> None:
        self.tokens_a_step = tokens_a_step
        self.since, self.steps = time.monotonic(), 0

    def after(self, steps: int) -> float:
        """The speed between the last call and this one, which is made after `steps` steps in all."""
        now = time.monotonic()
        speed = (steps - self.steps) * self.tokens_a_step / (now - self.since)
        self.since, self.steps = now, steps
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began


def read(folder: Path) -> list[dict]:
    """The lines of a run's metrics, in order; none where there are none yet. A line cut off by a crash is left out."""
    file = folder / METRICS
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def memory_gib(device: torch.device) -> float:
    """The most memory used so far: of the device on CUDA, of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def draw_curve(folder: Path) -> None:
    """Draws loss.png from metrics.jsonl."""
    from matplotlib.figure import Figure

    lines = read(folder)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot([step for step, _ in points], [loss for _, loss in points], style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="nats per byte", title=folder.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / CURVE, dpi=120)
