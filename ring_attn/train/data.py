"""Bytes to train on: any text files joined into one memory-mapped file, and batches drawn from it.

A batch is a function of (seed, step, data rank) and nothing else: no state is kept between steps, so a resumed run sees the
same batches whatever its ring size. Sequences are numbered over all data ranks, so the batch does not depend on their number
either. All ranks of a ring take the same sequences; the ring shards them afterwards.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import logging
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ring_attn.train.config import DataConfig

logger = logging.getLogger("ring_attn")

VOCAB_SIZE = 256
_SEPARATOR = b"\0"  # ends every file; text holds no zero byte
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """The joined bytes, in two parts that share none: `train` comes first, `held_out` is the rest. uint8, memory-mapped."""

    train: np.ndarray
    held_out: np.ndarray
    config: DataConfig

    def batch(self, step: int, data_rank: int = 0, data_size: int = 1) -> Tensor:
        """This data rank's sequences of a step, int64 [batch_size / data_size, seq_len], from random places in `train`."""
        share = self.config.batch_size // data_size
        numbers = range(data_rank * share, (data_rank + 1) * share)
        last = len(self.train) - self.config.seq_len
        return self._rows(self.train, (_draw(last + 1, self.config.seed, step, number) for number in numbers))

    def evaluation(self, count: int, data_rank: int = 0, data_size: int = 1) -> Tensor:
        """This data rank's part of `count` evenly spaced held-out sequences, int64 [count / data_size, seq_len].

        Raises ValueError where the held-out part has no room for so many that share no byte.
        """
        room = len(self.held_out) // self.config.seq_len
        if count > room:
            raise ValueError(
                f"the held-out part of {len(self.held_out):,} bytes has room for {room} sequences of data.seq_len = "
                f"{self.config.seq_len:,}, but run.eval_sequences = {count}; lower it, raise data.held_out, or name more text"
            )
        share = count // data_size
        gap = len(self.held_out) // count
        return self._rows(self.held_out, (number * gap for number in range(data_rank * share, (data_rank + 1) * share)))

    def _rows(self, part: np.ndarray, starts: Iterable[int]) -> Tensor:
        rows = [np.asarray(part[start : start + self.config.seq_len]) for start in starts]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus a configuration names, joined into the cache folder first where it is not there yet.

    Several processes may call this at once: one joins the files, the others wait for it. Raises ValueError where no file
    matches or there is too little text for one sequence.
    """
    path = _joined(find_files(config.path), Path(config.cache))
    text = np.memmap(path, dtype=np.uint8, mode="r")
    cut = round(len(text) * (1 - config.held_out))
    if cut < config.seq_len:
        raise ValueError(
            f"{config.path or 'the standard library'} leaves {cut:,} bytes for training, too few for one sequence of "
            f"data.seq_len = {config.seq_len:,}; name more text or shorten the sequence"
        )
    return Corpus(text[:cut], text[cut:], config)


def find_files(path: str) -> list[tuple[str, Path]]:
    """(name, file) of the text files of a file, folder or glob, in an order that mixes them but is the same everywhere.

    The empty path is the standard library's *.py. Files with a zero byte near their start are no text and are left out.
    """
    if not path:
        root = Path(sysconfig.get_path("stdlib"))
        found = [file for file in root.rglob("*.py") if not _NOT_THE_LIBRARY.intersection(file.relative_to(root).parts)]
    elif Path(path).is_dir():
        root = Path(path)
        found = [file for file in root.rglob("*") if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    else:
        found = [Path(name).absolute() for name in glob.glob(path, recursive=True)]
        root = Path(os.path.commonpath(found)) if found else Path()
    files = [file for file in found if file.is_file()]
    texts = [(str(file.relative_to(root)), file) for file in files if _is_text(file)]
    if not texts:
        binary = f" ({len(files)} files were found, but they hold zero bytes)" if files else ""
        raise ValueError(
            f"data.path = {path!r} matches no text file{binary}; name a file, a folder or a glob such as 'src/**/*.py'"
        )
    if len(texts) < len(files):
        logger.warning("%d of %d files are left out: they hold zero bytes", len(files) - len(texts), len(files))
    return sorted(texts, key=lambda pair: (hashlib.sha256(pair[0].encode(errors="surrogateescape")).digest(), pair[0]))


def _is_text(file: Path) -> bool:
    with file.open("rb") as stream:
        return b"\0" not in stream.read(8192)


def _joined(files: list[tuple[str, Path]], cache: Path) -> Path:
    """The file that holds all `files`, each with a zero byte behind it; made under a lock, and visible only once complete."""
    stats = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in files]
    target = cache / f"{hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}.bin"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = target.with_suffix(".lock").open("w")
    except OSError as error:
        raise ValueError(f"data.cache = {str(cache)!r} cannot be written to, {error}; name another") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}.tmp")
            with unfinished.open("wb") as stream:
                for _, file in files:
                    stream.write(file.read_bytes() + _SEPARATOR)
            unfinished.replace(target)
    return target


def _draw(count: int, *key: int) -> int:
    """A number in range(count), a function of the key alone: the same on every machine and with every library version."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % count
