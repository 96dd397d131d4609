"""Names a transfer that does not finish and ends the process, on backends whose `wait()` does not block the host.

NCCL waits on the device, so the host learns of a dead peer from nobody but the group's watchdog. That knows no step and no
exchange, and when the timeout has passed it writes a report for a minute or more before it ends the process. This thread looks
only at transfers that are overdue: it names one at half of the group's timeout, and ends the process at the whole.
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

logger = logging.getLogger("ring_attn")


class _Posted(NamedTuple):
    work: object
    what: str
    at: float


class Watch:
    """Logs an error naming the oldest transfer that is not done after half of `timeout_s`, and calls `end` at the whole.

    `end` must not return to the work that waits: what it waits for never comes.
    """

    def __init__(self, timeout_s: float, end: Callable[[], None] = os.abort) -> None:
        self.timeout_s, self._end = timeout_s, end
        self._posted: deque[_Posted] = deque()
        self._named: object = None
        threading.Thread(target=self._look, name="ring_attn watch", daemon=True).start()

    def add(self, works: Sequence[object], what: str) -> None:
        """Watches `works`, which all belong to the transfer `what`. Not under CUDA graph capture, where nothing runs yet."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._posted.clear()
            return
        while self._posted and self._posted[0].work.is_completed():
            self._posted.popleft()
        self._posted.extend(_Posted(work, what, time.monotonic()) for work in works)

    def _look(self) -> None:
        while True:
            time.sleep(self.timeout_s / 20)
            oldest = next(iter(tuple(self._posted)), None)
            waited = 0.0 if oldest is None else time.monotonic() - oldest.at
            if waited < self.timeout_s / 2:
                continue
            if oldest.work.is_completed():
                self._posted.remove(oldest)
                continue
            if oldest is not self._named:
                self._named = oldest
                logger.error("%s is not done after %.0f s: a peer died, stalls or makes other calls", oldest.what, waited)
            if waited >= self.timeout_s:
                logger.error("%s: the group's timeout of %.0f s has passed, ending this process", oldest.what, self.timeout_s)
                self._end()
                return


@lru_cache
def watch(timeout_s: float) -> Watch:
    """The one watch of this process for a timeout."""
    return Watch(timeout_s)
