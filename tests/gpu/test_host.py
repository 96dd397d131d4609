"""tests/gpu/host.py runs where there is no GPU, on stand-ins that go stale as what they stand for changes."""

import sys

import pytest

from tests.gpu import host


@pytest.mark.skipif(host.ON_GPU, reason="real kernels take its place")
def test_it_prints_what_the_host_spends_on_every_way(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["host", "--profile"])
    for name in ("CALLS", "ROUNDS"):
        monkeypatch.setattr(host, name, 1)
    host.main()
    lines = [line.split(", no kernel")[0] for line in capsys.readouterr().out.splitlines() if "at once" in line]
    assert lines == [name for name in ("ring of 1", "rank 0 of 4, pull", "rank 0 of 4, ring") for _ in range(2)]
