"""What a training run is told: frozen dataclasses, read from TOML, overridden on the command line, saved with the run."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ring_attn.models.decoder import DecoderConfig


@dataclass(frozen=True)
class DataConfig:
    """Which bytes a run learns from, and in what portions.

    Attributes:
        path: A file, a folder or a glob of text files; empty: the source text of Python's standard library.
        seq_len: Length of a sequence in bytes, over the whole ring.
        batch_size: Sequences a step, over all data ranks.
        micro_batch_size: Sequences in one forward pass of a data rank; default: a data rank's whole share.
        held_out: Share of the bytes, at the end, that is kept for evaluation.
        cache: Folder for the joined bytes.
        seed: Which sequences are drawn.
    """

    path: str = ""
    seq_len: int = 4096
    batch_size: int = 8
    micro_batch_size: int | None = None
    held_out: float = 0.05
    cache: str = "runs/data"
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("data", self, 1, "batch_size", "micro_batch_size")
        _at_least("data", self, 2, "seq_len")
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out is a share of the bytes, between 0 and 1, got {self.held_out}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up, a cosine down to `min_lr_ratio * lr`, decay on matrices only, and clipping.

    Attributes:
        lr: The highest learning rate.
        min_lr_ratio: The last learning rate over the highest.
        warmup_steps: Steps from 0 up to lr.
        steps: Length of the run in optimiser steps.
        weight_decay: Decay of matrices; embeddings, norms and biases do not decay.
        beta1: AdamW's first decay.
        beta2: AdamW's second decay.
        clip_norm: Greatest global norm of all gradients.
    """

    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    steps: int = 200
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _at_least("optim", self, 0, "warmup_steps", "weight_decay", "min_lr_ratio", "lr")
        _at_least("optim", self, 1, "steps")
        if not self.clip_norm > 0:
            raise ValueError(f"optim.clip_norm must be above 0, got {self.clip_norm}; inf never clips")


@dataclass(frozen=True)
class RingConfig:
    """The ring a run works on.

    Attributes:
        size: Ranks in a ring, over as many processes; default: all processes. The rest of the processes is data parallel.
        simulated: Host a ring of this many ranks in the one process there is.
        ulysses: So many neighbouring ranks of a ring trade heads for rows; a divisor of its ranks.
        layout: Which positions each rank holds.
        exchange: In which order a rank meets the KV shards.
        kernel: Which kernel does the local work.
        ranks_per_node: Neighbouring ranks that share a node, for the two-level exchange; default: what torchrun tells NCCL.
        keep_kv: What exchange = "pull" brought for a forward stays for its backward.
        kv_memory: Bytes of other ranks' KV that a rank may hold in a forward; default: what the exchange takes at once.
        grad_dtype: In what dtype dK and dV travel; default: that of their sums, or of the inputs where nothing is lost by it.
    """

    size: int | None = None
    simulated: int | None = None
    ulysses: int = 1
    layout: str = "zigzag"
    exchange: str = "auto"
    kernel: str = "auto"
    ranks_per_node: int | None = None
    kv_memory: int | None = None
    keep_kv: bool = False
    grad_dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        _at_least("ring", self, 1, "size", "simulated", "ulysses", "ranks_per_node", "kv_memory")
        if self.size is not None and self.simulated is not None:
            raise ValueError(
                f"ring.size = {self.size} is a ring over processes and ring.simulated = {self.simulated} one inside a process; "
                f"set one of the two"
            )


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out and what it leaves behind.

    Attributes:
        dir: Folder of the run. A new run that finds another there goes to DIR-2, DIR-3, ...
        resume: new: start afresh; auto: go on from the newest checkpoint of dir, if there is one; must: there has to be one.
        device: auto: CUDA where there is one, else CPU.
        dtype: auto: bfloat16 autocast on CUDA, float32 on CPU; float64 holds the weights in it as well.
        parallel: How gradients meet between processes: ddp keeps whole weights, fsdp shards them (FSDP2).
        seed: The weights at the start.
        eval_every: Steps between evaluations; there is one before the first step and one after the last.
        eval_sequences: Held-out sequences of an evaluation.
        checkpoint_every: Steps between checkpoints; there is one after the last step. 0: no checkpoints.
        log_every: Steps between lines of metrics.
    """

    dir: str = "runs/run"
    resume: Literal["new", "auto", "must"] = "new"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0
    eval_every: int = 50
    eval_sequences: int = 8
    checkpoint_every: int = 100
    log_every: int = 1

    def __post_init__(self) -> None:
        _at_least("run", self, 1, "eval_every", "eval_sequences", "log_every")
        _at_least("run", self, 0, "checkpoint_every")


@dataclass(frozen=True)
class TrainConfig:
    """All of a training run."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    run: RunConfig = field(default_factory=RunConfig)


def _at_least(section: str, config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{section}.{name} must be at least {least}, got {value}")


def load(path: str | Path) -> TrainConfig:
    """The configuration in a TOML file. Raises ValueError for unknown keys, wrong types and values that break a rule."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no configuration file {path}; configs/ holds some")
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    try:
        return from_table(TrainConfig, table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_table(cls: type, table: Mapping[str, Any], where: str = "") -> Any:
    """A dataclass from a TOML table. Keys left out keep their defaults. Only whole numbers for floats are converted."""
    kinds = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [key for key in table if key not in known]
    if unknown:
        raise ValueError(f"unknown key {where}{unknown[0]}; known ones here: {', '.join(known)}")
    return cls(**{key: _value(kinds[key], value, where + key) for key, value in table.items()})


def _value(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} is a table, written [{key}], got {value!r}")
        return from_table(kind, value, f"{key}.")
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and type(value) is int:
            return float(value)
        if type(value) is option:
            return value
    raise ValueError(f"{key} must be {_kind_name(options)}, got {value!r}")


def _kind_name(options: tuple) -> str:
    names = []
    for option in options:
        if get_origin(option) is Literal:
            names.append("one of " + ", ".join(map(repr, get_args(option))))
        elif option is not NoneType:
            names.append({int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[option])
    return " or ".join(names)


def to_toml(config: TrainConfig) -> str:
    """The configuration as TOML that `load` reads back to an equal one. None is written by leaving the key out."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        values = dataclasses.asdict(getattr(config, section.name))
        lines += [f"{key} = {_literal(value)}" for key, value in values.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def _literal(value: str | bool | int | float) -> str:
    """A value as TOML writes it: texts, true and false as in JSON, numbers as in Python (inf and nan included)."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
