"""The formula behind exchange="auto": its terms by hand, what it prefers where, and that a call goes by it."""

import logging

import pytest

import ring_attn as ra
from ring_attn import cli
from ring_attn.cost import MACHINES, Link, Machine, Question, Work, asked, estimates
from ring_attn.layout import Contiguous, Zigzag
from ring_attn.mask import Causal, Full, Window
from tests.support import random_qkv

SIZES = Work(batch=1, num_heads=32, num_kv_heads=8, head_dim=128, v_head_dim=128, itemsize=2)


def by_name(mask, layout, machine, max_rows=None, work=SIZES, nodes=None):
    return {found.exchange: found for found in estimates(Question(mask, layout, layout, work, machine, max_rows, nodes))}


def test_the_terms_by_hand():
    """Two ranks of 1,000 rows, one head of 1 + 1 numbers: a visit of a shard is 4e6 operations, a row 2 numbers of 2 bytes."""
    link = Link(latency_us=1.0, gb_s=1.0, slowdown=2.0)
    machine = Machine("test", tflops=1.0, call_us=3.0, ring=link, gather=link, pull=link)
    found = by_name(Full(), Contiguous(2000, 2), machine, work=Work(1, 1, 1, 1, 1, 2))
    # Forward 2 visits of 4 us, backward 2 of 10.
    assert {estimate.compute for estimate in found.values()} == {28.0}
    # 4,000 bytes of KV take 1 + 4 us, dK and dV of 8,000 bytes 1 + 8.
    assert found["ring"].calls == found["pull"].calls == pytest.approx((3 + 3) * 3.5)
    assert found["gather"].calls == pytest.approx(3 * 3.5)
    # Beside the own visit: 5 us of transfer cost the compute half of it. The way home is waited for.
    assert found["ring"].slowed == found["pull"].slowed == pytest.approx(2.5 + 2.5)
    assert found["ring"].waiting == found["pull"].waiting == pytest.approx(9.0)
    assert (found["gather"].slowed, found["gather"].waiting) == (0.0, pytest.approx(5 + 5 + 9))


def test_of_a_large_ring_some_ranks_are_asked():
    """The last one among them, which under a causal mask has the most to do of a sequence in order."""
    assert [asked(size) for size in (1, 2, 3, 4)] == [tuple(range(size)) for size in (1, 2, 3, 4)]
    assert asked(16) == (0, 5, 10, 15)
    few, many = (by_name(Causal(), Contiguous(4096 * size, size), MACHINES["gpus"])["ring"].compute for size in (4, 16))
    assert many / few == pytest.approx((15 + 0.5) / (3 + 0.5), rel=0.01)


def test_what_it_prefers():
    def best(mask, layout, machine, max_rows=None, nodes=None):
        return estimates(Question(mask, layout, layout, SIZES, MACHINES[machine], max_rows, nodes))[0].exchange

    assert best(Causal(), Zigzag(8192, 4), "gpus") == "gather", "few launches where the sequence is short"
    assert best(Causal(), Zigzag(8192, 4), "symmetric") == "pull", "copy engines leave attention alone"
    assert best(Causal(), Zigzag(131072, 4), "network") in ("ring", "pull"), "transfers beside compute where links are slow"
    assert best(Causal(), Zigzag(131072, 16), "network", nodes=8) == "two-level", "what many ranks of a node need comes once"
    assert best(Window(4096), Zigzag(131072, 4), "gpus") == "pull", "only what a window needs"
    assert best(Causal(), Zigzag(64, 4), "process") == "gather", "in one process nothing is moved"
    assert "ring" not in by_name(Causal(), Zigzag(131072, 4), MACHINES["gpus"], max_rows=1000), "it holds whole shards"
    assert "two-way" not in by_name(Causal(), Zigzag(131072, 16), MACHINES["network"], nodes=8), "no link tells what it wins"


def test_short_calls_that_are_replayed_take_no_host_by_copy_engines():
    def found(length, machine, alike):
        layout = Zigzag(length, 4)
        of_call = estimates(Question(Causal(), layout, layout, SIZES, MACHINES[machine], alike=alike))
        return of_call[0].exchange, {estimate.exchange: estimate.calls for estimate in of_call}

    assert found(1024, "symmetric", alike=True)[0] == "pull"
    assert found(512, "symmetric", alike=False)[0] == "gather", "functions may do something else the next time"
    assert found(1024, "gpus", alike=True) == found(1024, "gpus", alike=False), "messages are not replayed"
    # The slowest rank has a visit of its own shard and one of others, which between the first and the last rank is two tiles.
    replayed, asked_for = (found(1024, "symmetric", alike)[1] for alike in (True, False))
    assert (replayed.pop("pull"), asked_for.pop("pull")) == (pytest.approx(3 * 10 * 3.5), pytest.approx(3 * 25 * 3.5))
    assert replayed == asked_for
    assert found(131072, "symmetric", alike=True) == found(131072, "symmetric", alike=False), "long ones are not replayed"


def test_a_call_goes_by_it(caplog):
    q, k, v, _ = random_qkv(1, 24, 24, 2, 1, 4)
    ring, used = ra.Ring.simulated(3, "zigzag"), []
    gather = ring.transport.all_gather
    ring.transport.all_gather = lambda shards, *, what: used.append(what) or gather(shards, what=what)
    with caplog.at_level(logging.INFO, logger="ring_attn"):
        ra.ring_attention(q, k, v, ring=ring, mask=ra.Window(17, 3))
        ra.ring_attention(q, k, v, ring=ring, mask=ra.Window(17, 3))
    assert len(used) == 2
    (line,) = [record.message for record in caplog.records if "exchange: " in record.message]
    assert line.startswith("exchange: gather, as on one process; gather ") and "; pull " in line and "; ring " in line


def test_plan_explains(capsys):
    assert cli.main(["plan", "--explain", "--exchange", "auto", "--seq-len", "8192", "--machine", "gpus"]) == 0
    text = capsys.readouterr().out
    assert "gather exchange, 8,192 positions over 4 ranks" in text
    assert "gather moves 320 GB/s after 35 us; compute beside it takes 1.6 times as long" in text
    assert "auto takes gather" in text
    for estimate in estimates(Question(Causal(), Zigzag(8192, 4), Zigzag(8192, 4), SIZES, MACHINES["gpus"])):
        assert f"  {estimate}" in text
    assert cli.main(["plan", "--explain", "--num-heads", "0"]) == 2
    assert "--num-heads must be at least 1, got 0" in capsys.readouterr().err
