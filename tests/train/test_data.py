"""Batches are functions of (seed, step, data rank); the cache survives several processes that make it at once."""

import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from ring_attn.train import data
from ring_attn.train.config import DataConfig
from ring_attn.train.data import find_files, open_corpus


@pytest.fixture
def text(tmp_path):
    """A file whose every 8 bytes are its own, so that a sequence tells where it is from."""
    (tmp_path / "text.txt").write_bytes(b"".join(b"%07d," % n for n in range(2000)))
    return tmp_path / "text.txt"


def config(path, **changes) -> DataConfig:
    return DataConfig(**({"path": str(path), "seq_len": 64, "batch_size": 8, "cache": str(path.parent / "cache")} | changes))


def test_data_ranks_share_out_one_batch(text):
    corpus = open_corpus(config(text))
    for step in (0, 1, 777):
        whole = corpus.batch(step)
        assert whole.shape == (8, 64) and whole.dtype == torch.int64
        for size in (2, 4, 8):
            assert torch.equal(torch.cat([corpus.batch(step, rank, size) for rank in range(size)]), whole)
    parts = [corpus.evaluation(4, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat(parts), corpus.evaluation(4))


def test_batches_depend_on_seed_and_step_alone(text):
    corpora = [open_corpus(config(text, seed=seed)) for seed in (0, 0, 1)]
    batches = [[corpus.batch(step) for step in range(4)] for corpus in corpora]
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[1], strict=True))
    rows = {tuple(row.tolist()) for run in (batches[0], batches[2]) for batch in run for row in batch}
    assert len(rows) == 2 * 4 * 8


def test_training_never_sees_the_held_out_part(text):
    corpus = open_corpus(config(text, held_out=0.25))
    assert (len(corpus.train), len(corpus.held_out)) == (12001, 4000)  # one byte ends the file
    assert np.array_equal(np.concatenate([corpus.train, corpus.held_out])[:-1], np.fromfile(text, np.uint8))
    training = bytes(corpus.train)
    starts = set()
    for step in range(200):
        for row in corpus.batch(step).to(torch.uint8):
            starts.add(training.index(bytes(row.numpy())))
    assert min(starts) < 100
    assert 12001 - 64 - 100 < max(starts) <= 12001 - 64
    evaluated = [bytes(row.numpy()) for row in corpus.evaluation(62).to(torch.uint8)]
    assert len(set(evaluated)) == 62
    assert all(row not in training for row in evaluated)


def test_folders_globs_and_the_standard_library(tmp_path):
    for name, content in (("b.txt", b"bb"), ("a/c.py", b"cc"), (".hidden", b"no"), ("image.bin", b"x\0y")):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    assert {name for name, _ in find_files(str(tmp_path / "files"))} == {"b.txt", "a/c.py"}
    assert [file.name for _, file in find_files(str(tmp_path / "files" / "**" / "*.py"))] == ["c.py"]
    library = [name for name, _ in find_files("")]
    assert "argparse.py" in library
    assert not any("site-packages" in name for name in library)
    assert library != sorted(library)


def test_a_changed_file_is_read_again(text):
    before = open_corpus(config(text))
    text.write_bytes(text.read_bytes().replace(b"0", b"O"))
    after = open_corpus(config(text))
    assert b"O" in bytes(after.train)
    assert b"O" not in bytes(before.train)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (None, {}, r"matches no text file; name a file, a folder or a glob"),
        (b"a\0b", {}, r"matches no text file \(1 files were found, but they hold zero bytes\)"),
        (b"short", {}, r"leaves 6 bytes for training, too few for one sequence of data\.seq_len = 64"),
    ],
)
def test_too_little_text_is_refused(tmp_path, content, changes, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_corpus(config(tmp_path / "text", **changes))


def test_a_cache_that_cannot_be_made_is_named(text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache = '.*file/cache' cannot be written to, .*; name another"):
        open_corpus(config(text, cache=str(tmp_path / "file" / "cache")))
    refused = patch.object(Path, "open", side_effect=PermissionError("not yours"))
    with refused, pytest.raises(ValueError, match=r"data\.cache = '.*/cache' cannot be written to, not yours; name another"):
        data._joined([], tmp_path / "cache")


def test_an_evaluation_without_room_is_refused(text):
    with pytest.raises(ValueError, match=r"800 bytes has room for 12 sequences .* run\.eval_sequences = 13"):
        open_corpus(config(text)).evaluation(13)


def _checksum(data: DataConfig) -> tuple[int, int]:
    corpus = open_corpus(data)
    return len(corpus.train), int(corpus.train.astype(np.int64).sum())


def test_processes_that_start_at_once_make_one_cache(tmp_path):
    rng = random.Random(1)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_bytes(rng.randbytes(50_000).replace(b"\0", b" "))
    with ProcessPoolExecutor(4, mp_context=get_context("forkserver")) as pool:
        sums = set(pool.map(_checksum, [config(folder)] * 8))
    assert len(sums) == 1
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))
