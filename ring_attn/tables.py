"""Tables on devices that calls read beside their tensors: kept for the calls that come, and by the CUDA graphs that read them.

Note [tables]: a table goes to its device once for many calls, and caches let go of it one day. A CUDA graph reads it at every
replay: so graphs of ours hold what they met while they were captured, and what a user's met stays for good, for nobody tells
when it goes. Nor may a graph write a table, whose copy on the host is gone by then: what is not yet there while something is
captured goes to the device on a stream beside, which is waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

from ring_attn.driver import beside_captures

P, T = ParamSpec("P"), TypeVar("T")
_here = threading.local()
_for_good: dict[int, object] = {}


def capturing() -> bool:
    """Whether the current stream is captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def captured_elsewhere() -> bool:
    """Whether it is, for another graph than one of ours."""
    return capturing() and getattr(_here, "met", None) is None


@contextmanager
def held() -> Iterator[list[object]]:
    """What is captured inside reads tables, which are put into the list: they live as long as that."""
    _here.met = met = []
    try:
        yield met
    finally:
        _here.met = None


def hold(table: T) -> T:
    """The table, of which a graph that is captured here is told."""
    if capturing():
        met = getattr(_here, "met", None)
        if met is None:
            _for_good[id(table)] = table
        else:
            met.append(table)
    return table


@contextmanager
def made_beside() -> Iterator[None]:
    """Inside, what is put onto a device is there at the end, also amid a capture, which knows nothing of it."""
    if not capturing():
        yield
        return
    stream = _stream_beside()
    with beside_captures(), torch.cuda.stream(stream):
        yield
        stream.synchronize()


def _stream_beside() -> torch.cuda.Stream:
    """One of PyTorch's streams, of which it hands out a few in turn, that is not captured."""
    while True:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            if not capturing():
                return stream


def kept_tables(most: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Keeps what a function makes on devices for its arguments, the latest `most`; see Note [tables]."""

    def of(make: Callable[P, T]) -> Callable[P, T]:
        @lru_cache(maxsize=most)
        def made(*args: P.args, **kwargs: P.kwargs) -> T:
            with made_beside():
                return make(*args, **kwargs)

        @wraps(make)
        def found(*args: P.args, **kwargs: P.kwargs) -> T:
            return hold(made(*args, **kwargs))

        found.cache_clear = made.cache_clear
        return found

    return of
