"""Checkpoints by torch.distributed.checkpoint: a folder a step, visible once complete, loadable by any number of processes.

Note [atomic]: every process writes into `step-N.tmp`; the save returns on the leader only after all have written, and the
leader then renames the folder. A run that dies before that leaves a `.tmp` behind, which nothing reads.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict

KEPT = 2


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, leads: bool) -> None:
    """Writes the checkpoint of `step`; afterwards the newest KEPT ones are there. Called by every process of the job."""
    final = _path(folder, step)
    unfinished = final.with_suffix(".tmp")
    with _quietly():
        dcp.save(_state(step, model, optimizer), checkpoint_id=unfinished)
    if leads:
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
        for old in steps_in(folder)[:-KEPT]:
            shutil.rmtree(_path(folder, old))


def load(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fills model and optimizer from the checkpoint of `step`; returns the step it says it was. Called by every process."""
    state = _state(step, model, optimizer)
    _load(state, _path(folder, step))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def load_weights(folder: Path, step: int, model: nn.Module) -> None:
    """Fills the model alone, whether the training wrapped it or not, from the checkpoint of `step`. Called by every process."""
    weights = get_model_state_dict(model)
    _load({"model": weights}, _path(folder, step))
    set_model_state_dict(model, weights)


def _load(state: dict, path: Path) -> None:
    """Fills what is in the state. Raises ValueError where the checkpoint is not whole."""
    try:
        with _quietly():
            dcp.load(state, checkpoint_id=path)
    except dcp.CheckpointException as error:
        raise ValueError(f"{path} cannot be read, delete it to go on from the one before: {error}") from error


def steps_in(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending; none where there is no folder."""
    return sorted(int(number) for path in folder.glob("step-*") if (number := path.name.removeprefix("step-")).isdigit())


def remove_unfinished(folder: Path) -> None:
    """Deletes what runs that died while saving have left. For the leader, before anybody saves."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _state(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Parameters by name and optimizer state by parameter name: the same for plain, DDP and FSDP2 models."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": torch.tensor(step)}


@contextmanager
def _quietly() -> Iterator[None]:
    """A single process without a process group is meant, so the warning about it is not needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
        yield
