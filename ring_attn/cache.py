"""The keys and values of a layer, sharded over a ring, that grow while tokens are generated.

Note [owner]: position p of a token that is appended belongs to rank p % ring_size, as in the striped layout: every rank knows
it without talking, all take turns, and what is appended to a rank's positions is one range.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ring_attn.by_document import LayoutChoice
from ring_attn.layout import Shard, continued
from ring_attn.ring import Ring
from ring_attn.typed import typed
from ring_attn.watched import between_graphs


class KVCache:
    """What one attention layer has seen: keys [b, t, g, d] and values [b, t, g, dv], t growing, each row on one rank.

    Fill it with the sharded rows of a prefill (`extend`), go on with new tokens (`append`), in any order. `capacity`: positions
    to make room for at the start; buffers that are full double. `shards` are those of the ranks this process hosts.
    """

    @typed
    def __init__(self, ring: Ring, *, capacity: int = 0) -> None:
        if capacity < 0:
            raise ValueError(f"capacity must be at least 0 positions, got {capacity}")
        self.ring = ring
        self.seq_len = 0
        self.shards = [CacheShard(-(-capacity // ring.size)) for _ in ring.hosted]
        self.agreed: set[tuple] = set()  # what tree_decode has found alike on every rank

    def check_ring(self, ring: Ring) -> None:
        """Raises ValueError unless it was made for this ring."""
        if self.ring is not ring:
            raise ValueError(
                f"the cache was made for another Ring object than this {ring}, for {self.ring}; make it of the ring that "
                f"decodes: of a layer its `ring` (a `with_layout` of it is another one)"
            )

    def __len__(self) -> int:
        return self.seq_len

    def __repr__(self) -> str:
        return f"KVCache(seq_len={self.seq_len}, rows={[shard.rows for shard in self.shards]})"

    @between_graphs
    @typed
    def extend(self, k: Tensor, v: Tensor, *, seq_len: int | None = None, layout: LayoutChoice | None = None) -> None:
        """Adds the next positions: k [b, s, g, d], v [b, s, g, dv], the rows this process hosts, as `ring.shard` makes them.

        `seq_len`: how many positions there are where the last ones are padding (`ra.pad_to`), which is then left out. `layout`:
        the one that they are sharded by where it is not the ring's.
        """
        self._check(k, v)
        layout = self.ring.layout(self.ring.seq_len(k.shape[1]), layout)
        seq_len = layout.seq_len if seq_len is None else seq_len
        if not 0 <= seq_len <= layout.seq_len:
            raise ValueError(
                f"seq_len {seq_len} must be between 0 and the {layout.seq_len} positions of k and v over all ranks"
            )
        start = 0
        for rank, shard in zip(self.ring.hosted, self.shards, strict=True):
            for positions in layout.shard(rank):
                kept = positions[: bisect_left(positions, seq_len)]
                rows = slice(start, start + len(kept))
                shard.add(_later(kept, self.seq_len), k[:, rows], v[:, rows])
                start += len(positions)
        self.seq_len += seq_len

    @between_graphs
    @typed
    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds new tokens k [b, n, g, d], v [b, n, g, dv], the same on every process; each is stored by one, Note [owner]."""
        self._check(k, v)
        end = self.seq_len + k.shape[1]
        for rank, shard in zip(self.ring.hosted, self.shards, strict=True):
            first = (rank - self.seq_len) % self.ring.size
            rows = slice(first, None, self.ring.size)
            shard.add(range(self.seq_len + first, end, self.ring.size), k[:, rows], v[:, rows])
        self.seq_len = end

    @contextmanager
    def kept_where_refused(self) -> Iterator[None]:
        """Where what is inside raises, the cache holds afterwards what it held before."""
        before = self.seq_len, [vars(shard).copy() for shard in self.shards]
        try:
            yield
        except BaseException:
            self.seq_len, of_shards = before
            for shard, held in zip(self.shards, of_shards, strict=True):
                vars(shard).update(held)
            raise

    def whole(self) -> tuple[Tensor, Tensor]:
        """Stand-ins of the keys and values of all ranks: their shape, dtype and device, and no memory."""
        if not self.seq_len:
            raise ValueError("the cache is empty; add the keys of the queries first, with extend or append")
        shard = self.shards[0]
        k, v = (x.new_empty(1).expand(x.shape[0], self.seq_len, *x.shape[2:]) for x in (shard.k, shard.v))
        return k, v

    def _check(self, k: Tensor, v: Tensor) -> None:
        refuse_gradients("a KVCache", k, v)
        shapes = f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or not k.numel() or not v.numel():
            raise ValueError(f"k and v must be [batch, rows, heads, head_dim], alike but for head_dim, not empty, got {shapes}")
        if not k.is_floating_point():
            raise ValueError(f"k and v must be of floating dtype, got {k.dtype}")
        if (k.dtype, k.device) != (v.dtype, v.device):
            raise ValueError(f"k and v must share dtype and device, got {k.dtype} on {k.device}, {v.dtype} on {v.device}")
        held = self.shards[0]
        if held.filled and any(_kind(new) != _kind(old) for new, old in ((k, held.k), (v, held.v))):
            raise ValueError(
                f"the cache holds (batch, heads, head_dim, dtype, device) {_kind(held.k)} of k and {_kind(held.v)} of v, got "
                f"{_kind(k)} and {_kind(v)}; make a new cache for another model or batch"
            )


class CacheShard:
    """One rank's rows k [b, rows, g, d] and v [b, rows, g, dv], and their global `positions` in row order."""

    def __init__(self, capacity: int) -> None:
        self.rows = 0
        self.positions: Shard = ()
        self._capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def filled(self) -> bool:
        """Whether `add` was called, if only with no rows."""
        return self._buffers is not None

    @property
    def k(self) -> Tensor:
        """[b, rows, g, d], a view."""
        return self._buffers[0][:, : self.rows]

    @property
    def v(self) -> Tensor:
        """[b, rows, g, dv], a view."""
        return self._buffers[1][:, : self.rows]

    def add(self, positions: range, k: Tensor, v: Tensor) -> None:
        """Puts rows behind those that are there; copies all of them where the buffers are full."""
        if self._buffers is None:
            self._buffers = tuple(_buffer(x, self._capacity) for x in (k, v))
        stop = self.rows + len(positions)
        self._buffers = tuple(_with_room(buffer, self.rows, stop) for buffer in self._buffers)
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, self.rows : stop] = new
        self.rows = stop
        joined = continued(self.positions[-1], positions) if self.positions else None
        self.positions = (*self.positions, positions) if joined is None else (*self.positions[:-1], joined)


def refuse_gradients(who: str, *tensors: Tensor) -> None:
    """Raises NotImplementedError where a gradient is asked for."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise NotImplementedError(f"{who} passes no gradient on; call it under torch.no_grad(), and train with ring_attention")


def _kind(x: Tensor) -> tuple:
    return x.shape[0], *x.shape[2:], x.dtype, x.device


def _later(positions: range, shift: int) -> range:
    return range(positions.start + shift, positions.stop + shift, positions.step)


@torch.inference_mode(False)
def _buffer(like: Tensor, rows: int) -> Tensor:
    """Unwritten [b, rows, g, d]; what inference mode makes could not be written to outside of it."""
    return like.new_empty(like.shape[0], rows, *like.shape[2:])


def _with_room(buffer: Tensor, rows: int, needed: int) -> Tensor:
    """The buffer [b, capacity, g, d], or where it has no room for `needed` rows one of twice its size with its first `rows`."""
    if needed <= buffer.shape[1]:
        return buffer
    larger = _buffer(buffer, max(needed, 2 * buffer.shape[1]))
    larger[:, :rows] = buffer[:, :rows]
    return larger
