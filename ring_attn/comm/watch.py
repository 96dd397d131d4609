"""Names a transfer that does not finish, on backends whose `wait()` does not block the host.

NCCL waits on the device: a peer that died is noticed by the group's watchdog, which ends the process at the group's timeout
without knowing what the transfer was for. A thread that only looks at transfers overdue by half that timeout says it before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

logger = logging.getLogger("ring_attn")


class _Posted(NamedTuple):
    work: object
    what: str
    at: float


class Watch:
    """Logs an error naming the oldest transfer that is still not done after `patience_s` seconds, once a transfer."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self._posted: deque[_Posted] = deque()
        self._named: object = None
        threading.Thread(target=self._look, name="ring_attn watch", daemon=True).start()

    def add(self, works: Sequence[object], what: str) -> None:
        """Watches `works`, which all belong to the transfer `what`. Not under CUDA graph capture, where nothing runs yet."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._posted.clear()
            return
        while self._posted and self._posted[0].work.is_completed():
            self._posted.popleft()
        self._posted.extend(_Posted(work, what, time.monotonic()) for work in works)

    def _look(self) -> None:
        while True:
            time.sleep(self.patience_s / 10)
            oldest = next(iter(tuple(self._posted)), None)
            if oldest is None or oldest is self._named or time.monotonic() - oldest.at < self.patience_s:
                continue
            if oldest.work.is_completed():
                self._posted.remove(oldest)
                continue
            self._named = oldest
            logger.error("%s is not done after %.0f s: a peer died, stalls or makes other calls", oldest.what, self.patience_s)


@lru_cache
def watch(patience_s: float) -> Watch:
    """The one watch of this process for a patience."""
    return Watch(patience_s)
