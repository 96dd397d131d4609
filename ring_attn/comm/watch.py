"""Names a transfer that does not finish and ends the process, on backends whose `wait()` does not block the host.

NCCL waits on the device, so the host learns of a dead peer from nobody but the group's watchdog. That knows no step and no
exchange, and when the timeout has passed it writes a report for a minute or more before it ends the process. This thread looks
only at transfers that are overdue: it names one at half of the group's timeout, and ends the process at the whole, naming the
ranks that do not wait as well: in a ring of four it is rank 2 that hears nothing from a dead rank 1, but rank 3 from rank 2.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

logger = logging.getLogger("ring_attn")


class Roll:
    """Which processes wait, by notes in a store that all of the job reach, one a process whatever group it waits in.

    `process`: this one's number in the job; `group`: those of a group, in its order.
    """

    def __init__(self, store: dist.Store, process: int, group: Sequence[int], ranks_per_process: int = 1) -> None:
        self._store, self._process, self._group, self._each = store, process, group, ranks_per_process

    @classmethod
    def of(cls, group: dist.ProcessGroup, ranks_per_process: int) -> Roll:
        return cls(_get_default_store(), dist.get_rank(), dist.get_process_group_ranks(group), ranks_per_process)

    def sign(self) -> None:
        """This process waits."""
        self._store.set(self._key(self._process), "waits")

    def strike(self) -> None:
        """It does no longer."""
        self._store.delete_key(self._key(self._process))

    def absent(self) -> str:
        """Which ranks of the group do not wait, in words."""
        missing = [number for number, process in enumerate(self._group) if not self._store.check([self._key(process)])]
        ranks = [rank for number in missing for rank in range(number * self._each, (number + 1) * self._each)]
        return f"rank {ranks} does not wait as long: it died or stalls" if ranks else "all ranks wait: their calls differ"

    def _key(self, process: int) -> str:
        return f"ring_attn waits {process}"


class _Posted(NamedTuple):
    work: object
    what: str
    at: float
    roll: Roll


class Watch:
    """Logs an error naming the oldest transfer that is not done after half of `timeout_s`, and calls `end` at the whole, with
    an error naming the ranks that do not wait.

    `end` must not return to the work that waits: what it waits for never comes.
    """

    def __init__(self, timeout_s: float, end: Callable[[], None] = os.abort) -> None:
        self.timeout_s, self._end = timeout_s, end
        self._lock = threading.Lock()
        self._posted: deque[_Posted] = deque()
        self._named: _Posted | None = None
        threading.Thread(target=self._look, name="ring_attn watch", daemon=True).start()

    def add(self, works: Sequence[object], what: str, roll: Roll) -> None:
        """Watches `works`, which all belong to the transfer `what` of those on the roll. Not under CUDA graph capture, where
        nothing runs yet.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            with self._lock:
                self._posted.clear()
            return
        self._oldest()  # lets go of what is done
        with self._lock:
            self._posted.extend(_Posted(work, what, time.monotonic(), roll) for work in works)

    def _look(self) -> None:
        while True:
            time.sleep(self.timeout_s / 20)
            if self._named is not None and _is_done(self._named):
                _told(self._named.roll.strike, self.timeout_s / 10)
                self._named = None
            oldest = self._oldest(self.timeout_s / 2)
            if oldest is None:
                continue
            waited = time.monotonic() - oldest.at
            if oldest is not self._named:
                self._named = oldest
                logger.error("%s is not done after %.0f s: a peer died, stalls or makes other calls", oldest.what, waited)
                _told(oldest.roll.sign, self.timeout_s / 10)
            if waited >= self.timeout_s:
                absent = _told(oldest.roll.absent, self.timeout_s / 10)
                text = "%s: the group's timeout of %.0f s has passed, ending this process; %s"
                logger.error(text, oldest.what, self.timeout_s, absent)
                self._end()
                return

    def _oldest(self, age_s: float = 0.0) -> _Posted | None:
        """The oldest transfer that is not done, where it is that old. All before it are let go: a host asks for many in little
        time, and may then ask for none that would.
        """
        while True:
            with self._lock:
                first = self._posted[0] if self._posted else None
            if first is None or time.monotonic() - first.at < age_s:
                return None
            # Without the lock: a device may be slow to answer, and who posts does not wait for who looks.
            if not _is_done(first):
                return first
            with self._lock:
                if self._posted and self._posted[0] is first:
                    self._posted.popleft()


def _is_done(posted: _Posted) -> bool:
    """Whether it is known to be done. A device that failed tells nothing, and what waits for it must end all the same."""
    try:
        return posted.work.is_completed()
    except RuntimeError:
        return False


def _told(ask: Callable[[], str | None], patience_s: float) -> str | None:
    """What the store answers, or that it does not: the process that holds it may be the one that died, or its whole host."""
    told: list[str | None] = ["which ranks wait cannot be told: the store does not answer"]

    def listen() -> None:
        try:
            told.append(ask())
        except RuntimeError as error:
            told.append(f"which ranks wait cannot be told: {error}")

    listener = threading.Thread(target=listen, name="ring_attn roll", daemon=True)
    listener.start()
    listener.join(patience_s)
    return told[-1]


@lru_cache
def watch(timeout_s: float) -> Watch:
    """The one watch of this process for a timeout."""
    return Watch(timeout_s)
