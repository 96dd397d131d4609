"""The folder of a run: config.toml, metrics.jsonl, loss.png, checkpoints/. Who may write there, and where a run goes on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from ring_attn.train import checkpoint
from ring_attn.train.config import TrainConfig, load, to_toml

CONFIG, METRICS, CURVE, CHECKPOINTS = "config.toml", "metrics.jsonl", "loss.png", "checkpoints"


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and the step it goes on from (0: it starts)."""

    path: Path
    start: int

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS


def claim(config: TrainConfig) -> RunFolder:
    """The run's folder, made and with its configuration in it. For the leader.

    With run.resume = "new" a run never writes into another's folder: it takes the first of DIR, DIR-2, DIR-3, ... that holds
    no configuration. With "auto" the folder is this run's, and a run that stopped before its first checkpoint starts again.
    Raises ValueError where there is nothing to resume, where the checkpoint is of another model, and where it cannot write.
    """
    path = Path(config.run.dir)
    steps = checkpoint.steps_in(path / CHECKPOINTS) if config.run.resume != "new" else []
    if steps:
        _check_same_model(path / CONFIG, config)
    elif config.run.resume == "must":
        raise ValueError(f"run.resume = 'must', but {path / CHECKPOINTS} holds no complete checkpoint; name another run.dir")
    elif config.run.resume == "new":
        path = _unused(path)
    try:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        checkpoint.remove_unfinished(path / CHECKPOINTS)
        (path / CONFIG).write_text(to_toml(config))
    except OSError as error:
        raise ValueError(f"run.dir = {config.run.dir!r} cannot be written to, {error}; name another") from error
    return RunFolder(path, steps[-1] if steps else 0)


def _unused(path: Path) -> Path:
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in count(1))
    return next(name for name in names if not (name / CONFIG).exists())


def _check_same_model(saved: Path, config: TrainConfig) -> None:
    if not saved.is_file():
        raise ValueError(f"{saved} is missing beside its checkpoints, so the model they hold is not known")
    before, now = dataclasses.asdict(load(saved).model), dataclasses.asdict(config.model)
    changed = [
        f"model.{key} was {before[key]}, is {now[key]}" for key in now if before[key] != now[key] and key != "checkpoint_blocks"
    ]
    if changed:
        raise ValueError(
            f"the run in {saved.parent} cannot go on with another model: {'; '.join(changed)}; start a new run.dir"
        )
