"""A transfer that does not finish is named, once; one that does is not."""

import logging
import time

from ring_attn.comm.watch import Watch


class Work:
    done = False

    def is_completed(self):
        return self.done


def test_an_overdue_transfer_is_named_once_and_then_ends_the_process(caplog):
    ended = []
    watch, stuck, quick = Watch(0.4, lambda: ended.append(time.monotonic())), Work(), Work()
    watch.add([quick], "the quick one")
    quick.done = True
    watch.add([stuck], "rank [0] of 2: ring forward, KV for step 1")
    start = time.monotonic()
    with caplog.at_level(logging.ERROR, "ring_attn"):
        time.sleep(1)
    assert [record.getMessage() for record in caplog.records] == [
        "rank [0] of 2: ring forward, KV for step 1 is not done after 0 s: a peer died, stalls or makes other calls",
        "rank [0] of 2: ring forward, KV for step 1: the group's timeout of 0 s has passed, ending this process",
    ]
    assert len(ended) == 1 and 0.39 < ended[0] - start < 0.8


def test_what_is_done_in_time_is_not_named(caplog):
    watch, works = Watch(0.4, lambda: None), [Work() for _ in range(3)]
    for work in works:
        watch.add([work], "a transfer")
        time.sleep(0.05)
        work.done = True
    time.sleep(0.6)
    assert caplog.records == []
