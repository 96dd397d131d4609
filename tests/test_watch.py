"""A transfer that does not finish is named, once; one that does is not."""

import logging
import threading
import time

import pytest
import torch.distributed as dist

from ring_attn.comm.watch import Roll, Watch


class Work:
    done = False

    def is_completed(self):
        return self.done


def test_an_overdue_transfer_is_named_once_and_then_ends_the_process(caplog):
    ended = []
    watch, stuck, quick = Watch(0.4, lambda: ended.append(time.monotonic())), Work(), Work()
    store = dist.HashStore()
    Roll(store, 2, range(4)).sign()
    watch.add([quick], "the quick one", Roll(store, 0, range(4)))
    quick.done = True
    watch.add([stuck], "rank [0] of 4: ring forward, KV for step 1", Roll(store, 0, range(4)))
    start = time.monotonic()
    with caplog.at_level(logging.ERROR, "ring_attn"):
        time.sleep(1)
    assert [record.getMessage() for record in caplog.records] == [
        "rank [0] of 4: ring forward, KV for step 1 is not done after 0 s: a peer died, stalls or makes other calls",
        "rank [0] of 4: ring forward, KV for step 1: the group's timeout of 0 s has passed, ending this process; "
        "rank [1, 3] does not wait as long: it died or stalls",
    ]
    assert len(ended) == 1 and 0.39 < ended[0] - start < 0.8


def test_many_that_are_done_before_it_do_not_put_its_end_off():
    ended, works, start = [], [Work() for _ in range(100)], time.monotonic()
    watch = Watch(0.4, lambda: ended.append(time.monotonic()))
    watch.add([*works, Work()], "of a step", Roll(dist.HashStore(), 0, range(2)))
    for work in works:
        work.done = True
    time.sleep(0.8)
    assert len(ended) == 1 and ended[0] - start < 0.6


def test_what_is_done_in_time_is_not_named(caplog):
    watch, works = Watch(0.4, lambda: None), [Work() for _ in range(3)]
    for work in works:
        watch.add([work], "a transfer", Roll(dist.HashStore(), 0, range(2)))
        time.sleep(0.05)
        work.done = True
    time.sleep(0.6)
    assert caplog.records == []


def test_who_posts_does_not_wait_for_who_looks():
    """Where a device does not answer the watch, which is why it looks."""
    asked, answer = threading.Event(), threading.Event()

    class Silent(Work):
        def is_completed(self):
            if threading.current_thread() is not threading.main_thread():
                asked.set()
                answer.wait(5)
            return False

    watch = Watch(0.4, lambda: None)
    watch.add([Silent()], "a transfer", Roll(dist.HashStore(), 0, range(2)))
    assert asked.wait(5)
    start = time.monotonic()
    watch.add([Work()], "another one", Roll(dist.HashStore(), 0, range(2)))
    assert time.monotonic() - start < 1
    answer.set()


def test_who_waited_and_does_no_longer_is_missed():
    store, late = dist.HashStore(), Work()
    watch = Watch(0.4, lambda: None)
    watch.add([late], "a transfer", Roll(store, 0, range(2)))
    time.sleep(0.3)
    assert Roll(store, 1, range(2)).absent() == "rank [1] does not wait as long: it died or stalls"
    late.done = True
    time.sleep(0.1)
    assert Roll(store, 1, range(2)).absent() == "rank [0, 1] does not wait as long: it died or stalls"


def test_ranks_are_named_by_their_processes():
    store = dist.HashStore()
    Roll(store, 0, range(2), ranks_per_process=3).sign()
    assert Roll(store, 0, range(2), ranks_per_process=3).absent().startswith("rank [3, 4, 5] ")
    Roll(store, 1, range(2), ranks_per_process=3).sign()
    assert Roll(store, 0, range(2)).absent() == "all ranks wait: their calls differ"


class Gone:
    def check(self, *_):
        raise RuntimeError("connection reset")

    set = delete_key = check


class Silent:
    def check(self, *_):
        time.sleep(60)

    set = delete_key = check


class Failed:
    def is_completed(self):
        raise RuntimeError("CUDA error: unspecified launch failure")


@pytest.mark.parametrize(
    ("work", "store", "said"),
    [
        (Work(), Gone(), "which ranks wait cannot be told: connection reset"),
        (Work(), Silent(), "which ranks wait cannot be told: the store does not answer"),
        (Failed(), dist.HashStore(), "rank [1] does not wait as long: it died or stalls"),
    ],
)
def test_nothing_that_died_keeps_the_process(work, store, said, caplog):
    """Neither the store, with or without a word, nor the device."""
    ended, watch = [], Watch(0.4, lambda: ended.append(1))
    with caplog.at_level(logging.ERROR, "ring_attn"):
        watch.add([work], "a transfer", Roll(store, 0, range(2)))
        time.sleep(1)
    assert ended and caplog.records[-1].getMessage().endswith(said)


def test_who_waits_in_another_group_waits():
    store = dist.HashStore()
    Roll(store, 6, [6, 7]).sign()
    assert Roll(store, 2, [2, 6, 4]).absent() == "rank [0, 2] does not wait as long: it died or stalls"
