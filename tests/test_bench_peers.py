"""`ring-attn bench ring`: other libraries, in stand-ins: how they are imported, sharded, checked, timed and named."""

from __future__ import annotations

import sys
from itertools import product

import pytest

from ring_attn.bench.peers import RingAttentionPytorch, RingFlashAttn
from ring_attn.cli import main
from ring_attn.comm.local import LocalTransport
from tests import fake_peers
from tests.dist.harness import run_processes
from tests.test_bench_kernels import install
from tests.test_bench_ring import command, no_other_library, read


def test_rows_and_table_have_the_versions_of_peers_where_they_take_part(tmp_path, monkeypatch, capsys):
    versions = {"ring-flash-attn": "0.1.8", "yunchang": "0.6.3", "ring-attention-pytorch": "0.7.2"}
    install(tmp_path, **{name.replace("-", "_"): version for name, version in versions.items()})
    monkeypatch.syspath_prepend(tmp_path)
    args = command("--lengths", "32", "--masks", "full", "--layouts", "zigzag", "--exchanges", "ring", "--simulated", "2")
    for peers_too, more in ((True, []), (False, ["--no-peers"])):
        results = tmp_path / f"rows-{peers_too}.jsonl"
        with no_other_library():
            assert main([*args, *more, "--results", str(results)]) == 0
        (head, *_) = capsys.readouterr().out.splitlines()
        for name, version in versions.items():
            assert [row.get(name) for row in read(results)] == [version if peers_too else None] * len(read(results))
            assert (f", {name} {version}, " in head) == peers_too


def _peers(rank: int, folder: str) -> None:
    fake_peers.install()
    args = command("--lengths", "64", "--masks", "causal", "documents", "window", "--layouts", "zigzag", "--exchanges", "ring")
    assert main([*args, "--results", f"{folder}/rows.jsonl"]) == 0


def test_peers_are_sharded_checked_and_timed_as_they_want_it(tmp_path):
    run_processes(_peers, 2, str(tmp_path))
    rows = [row for row in read(tmp_path / "rows.jsonl") if "-" in row["name"] or "yunchang" in row["name"]]
    timed = {(row["name"], row["mask"]) for row in rows if row["ms"]}
    by_name = "ring-flash-attn zigzag", "ring-flash-attn basic", "ring-flash-attn llama3"
    others = "yunchang Ulysses", "yunchang Ulysses 2 x ring", "ring-attention-pytorch striped"
    assert timed == {
        *product((*by_name, *others), ("causal",)),
        *product(by_name, ("documents",)),
        ("ring-flash-attn llama3", "window"),
    }
    (wrong,) = (row for row in rows if row["name"] == "ring-flash-attn stripe" and row["mask"] == "causal")
    assert wrong["why_not"].startswith("wrong: ") and wrong["ms"] is None


def test_a_package_whose_init_fails_is_imported_without_it(tmp_path, monkeypatch):
    package = tmp_path / "ring_flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("from transformers import gone_since_5_0")
    (package / "zigzag_ring_flash_attn.py").write_text("from .utils import one\nzigzag_ring_flash_attn_func = one")
    (package / "utils.py").write_text("one = 1")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        peer = RingFlashAttn("zigzag", "zigzag", LocalTransport(2))
        assert peer.load("zigzag_ring_flash_attn").zigzag_ring_flash_attn_func == 1
    finally:
        _forget("ring_flash_attn")


def test_a_package_that_ends_the_process_without_triton_nightly_is_told_tritons_version(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    package = tmp_path / "ring_attention_pytorch"
    package.mkdir()
    check = "from importlib.metadata import version\ntry:\n    version('triton-nightly')\nexcept Exception:\n    exit()\n"
    (package / "__init__.py").write_text("")
    (package / "triton_flash_attn.py").write_text(check)
    (package / "ring_flash_attention_cuda.py").write_text("ring_flash_attn_cuda = len")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert RingAttentionPytorch("striped", "striped", LocalTransport(2)).load() is len
    finally:
        _forget("ring_attention_pytorch")


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
