"""What the Triton kernels are launched with: block sizes from a table, and the tiles of a visit as an int32 table per block.

Note [block table]: a visit is one launch, so every program must find its work alone. Program p reads the four ints
(block, batch row, first, last) at `4 * p`; its entries are the eight ints at each of `range(first, last, 8)`: own rows
[start, stop), rows to walk over [start, stop), the band `lo <= walked - own <= hi` in shard rows, and the [start, stop) that
holds the own rows of all the program's entries. In a placed table an entry has four more, the global position of row 0 and the
step to the next one's, of own and of walked rows; tiles are cut so that one line each holds for all of an entry.
Own rows are query rows for the forward and dq kernels and KV rows for the dk, dv kernel, which reads the transposed tiles.
Programs are sorted by work, the heaviest first, so that the light ones fill the last wave; those without entries come last and
can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ring_attn.tables import captured_elsewhere, kept_tables
from ring_attn.tiles import Tile

ENTRY, PLACED_ENTRY = 8, 12
_ANY = -1
PROGRAM = 4


@dataclass(frozen=True)
class Config:
    """One launch: `own` rows stay with a program, `walk` rows are met at a time.

    `tma`: the backward's copies, see Note [whole blocks] of `triton_rows`; the forward has none. `early`: the backward has
    dout v^T before the softmax. `mixed`: see Note [powers of two] of triton_scores, for the dq kernel. `narrow`: the launch in
    its place where blocks walk over few rows, see `chosen`; the dk, dv kernel has none.
    """

    own: int
    walk: int
    warps: int
    stages: int
    tma: bool = False
    early: bool = False
    mixed: bool = False
    narrow: Config | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launcher takes."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Configs:
    """The launches of one problem. `forward` and `dq` own query rows, `dkdv` owns KV rows.

    Under TMA `short` takes dkdv's tiles of few query rows, see Note [whole blocks].
    """

    forward: Config
    dkdv: Config
    dq: Config
    short: Config = Config(32, 32, 8, 1)


# Keyed by the larger head dim, padded. "large" needs compute capability 9.0 and 227 KiB of shared memory, "small" fits 99 KiB;
# tests/kernels/test_triton_compile.py holds every line to that and to its spills.
_TABLE = {
    ("16-bit", "large"): {
        64: Configs(
            forward=Config(128, 64, 4, 3),
            dkdv=Config(64, 64, 4, 2, tma=True, early=True),
            dq=Config(64, 64, 4, 3, tma=True, early=True),
        ),
        128: Configs(
            forward=Config(128, 64, 8, 3, narrow=Config(64, 64, 4, 3)),
            dkdv=Config(64, 64, 4, 2, tma=True, early=True),
            dq=Config(128, 64, 8, 3, tma=True, early=True, narrow=Config(64, 64, 4, 2, tma=True, early=True)),
        ),
        256: Configs(Config(128, 64, 8, 2), Config(64, 32, 8, 2), Config(64, 64, 8, 2)),
    },
    ("16-bit", "small"): {
        64: Configs(Config(128, 64, 8, 2), Config(64, 32, 4, 1), Config(64, 64, 4, 2)),
        128: Configs(Config(128, 64, 8, 2), Config(64, 64, 8, 1), Config(64, 64, 8, 2)),
        256: Configs(Config(64, 32, 8, 2), Config(32, 32, 8, 1), Config(32, 32, 4, 1)),
    },
    ("32-bit", "small"): {
        64: Configs(Config(64, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
        128: Configs(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
        256: Configs(Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    },
}
_TABLE["32-bit", "large"] = _TABLE["32-bit", "small"]

# When a narrow launch is the faster one, see `chosen`.
_SHORT_WALK = 1536  # rows
_MANY_PROGRAMS = 1024

# By what happens to scores, see `configs`: the launches that are faster then, in place of those of the table.
_BY_SCORES = {
    "modified": {
        ("16-bit", "large", 64): {"dq": Config(64, 64, 4, 3, tma=True)},
        ("16-bit", "large", 128): {"dq": Config(128, 64, 8, 3, tma=True, early=True)},
        ("16-bit", "small", 64): {"dq": Config(64, 32, 4, 2)},
    },
    "softcap": {
        ("16-bit", "large", 64): {"forward": Config(64, 64, 4, 3)},
        ("16-bit", "large", 128): {"dq": Config(128, 64, 8, 3, tma=True, early=True, mixed=True)},
    },
    "alibi": {},
    "several": {("16-bit", "large", 128): {"dkdv": Config(64, 64, 4, 2, tma=True)}},
    "functions": {("16-bit", "large", 128): {"dkdv": Config(64, 32, 4, 2, tma=True)}},
}


def configs(dtype: torch.dtype, head_dim: int, v_head_dim: int, size: str, scores: str = "plain") -> Configs:
    """The launch configurations for a problem; `size`: "large" or "small", see `device_size`.

    `scores`: "plain", or what modifies them: one step, "softcap" or "alibi", "several", or a user's "functions" among others.
    """
    width = max(padded(head_dim), padded(v_head_dim))
    kind = "32-bit" if dtype == torch.float32 else "16-bit"
    bucket = min(bucket for bucket in _TABLE[kind, size] if bucket >= width)
    found = _TABLE[kind, size][bucket]
    for name in () if scores == "plain" else dict.fromkeys(("modified", scores)):
        found = replace(found, **_BY_SCORES[name].get((kind, size, bucket), {}))
    return found


def padded(head_dim: int) -> int:
    """The power of two, at least 16, that a block of this head dim is padded to."""
    return max(16, 1 << (head_dim - 1).bit_length())


@lru_cache
def device_size(device: torch.device) -> str:
    """Which configurations fit: "large" for compute capability 9.0 with 227 KiB of shared memory a block, else "small"."""
    if device.type != "cuda":
        return "small"
    properties = torch.cuda.get_device_properties(device)
    return "large" if properties.major >= 9 and properties.shared_memory_per_block_optin >= 227 * 1024 else "small"


@dataclass(frozen=True)
class Table:
    """`ints`: int32, see Note [block table]. `programs`: how many blocks x batch rows it lists, `busy`: those with entries.

    `walked`: the rows that all of them walk over.
    """

    ints: Tensor
    programs: int
    busy: int
    walked: int


class Edge(NamedTuple):
    """One tile in shard rows: own row i meets walked row j iff both are in range and `lo <= j - i <= hi`.

    `own_line`, `walk_line`: where it is placed, (at, step) of global positions `at + step * row`.
    """

    start: int
    stop: int
    walk_start: int
    walk_stop: int
    lo: int
    hi: int
    batch: int | None
    own_line: tuple[int, int] | tuple[()] = ()
    walk_line: tuple[int, int] | tuple[()] = ()

    @staticmethod
    def of(tile: Tile) -> Edge:
        q, kv = tile.q_rows, tile.kv_rows
        shift = kv.start - q.start
        lo = kv.start - q.stop + 1 if tile.band.lo is None else tile.band.lo + shift
        hi = kv.stop - 1 - q.start if tile.band.hi is None else tile.band.hi + shift
        return Edge(q.start, q.stop, kv.start, kv.stop, lo, hi, tile.batch)

    @staticmethod
    def placed(tile: Tile) -> Iterator[Edge]:
        """The same cells, cut where positions leave a line."""
        whole = Edge.of(tile)
        for own, own_line in _lines(tile.q_rows, tile.positions[0]):
            for walk, walk_line in _lines(tile.kv_rows, tile.positions[1]):
                part = Edge(own.start, own.stop, walk.start, walk.stop, whole.lo, whole.hi, tile.batch, own_line, walk_line)
                if part.walked(own.start, own.stop):
                    yield part

    @property
    def transposed(self) -> Edge:
        own, walk = self[:2], self[2:4]
        return Edge(*walk, *own, -self.hi, -self.lo, self.batch, self.walk_line, self.own_line)

    def walked(self, start: int, stop: int) -> int:
        """The number of rows that own rows [start, stop) walk over."""
        first, last = max(start, self.start), min(stop, self.stop) - 1
        return max(0, min(self.walk_stop, last + self.hi + 1) - max(self.walk_start, first + self.lo))


def _lines(rows: range, positions: tuple[range, ...]) -> Iterator[tuple[range, tuple[int, int]]]:
    """The rows of each range of positions, and the line they lie on."""
    assert sum(map(len, positions)) == len(rows), "a tile whose rows have no positions cannot be placed"
    start = rows.start
    for part in positions:
        yield range(start, start + len(part)), (part.start - part.step * start, part.step)
        start += len(part)


@dataclass(frozen=True)
class TableKey:
    """What a table is made from. Tiles count as the same only if they are the same tuple: to hash thousands costs milliseconds.

    `least`, `most`: only of edges that walk over so many rows. `placed`: with positions. `stream`: the table is copied to the
    device on that stream and only ever read there, so nothing waits; or _ANY: it is there before any stream reads it.
    """

    tiles: Sequence[Tile] = field(compare=False)
    transposed: bool
    rows: int
    block: int
    batch: int
    device: torch.device
    least: int
    most: int
    placed: bool
    stream: int
    number: int = field(init=False)

    def __post_init__(self) -> None:
        # The key keeps the tiles, so the number stays theirs.
        object.__setattr__(self, "number", id(self.tiles))


def query_table(tiles: Sequence[Tile], q: Tensor, block: int, *, placed: bool = False) -> Table:
    """The table of every block of `block` query rows of q [b, s, h, d]."""
    return _make(TableKey(tuple(tiles), False, q.shape[1], block, q.shape[0], q.device, 0, 1 << 31, placed, _stream_of(q)))


def chosen(config: Config, heads: int, table_of: Callable[[int], Table]) -> tuple[Config, Table]:
    """(config or its narrow one, its table); `table_of` makes the table of blocks of so many own rows.

    Under a window of 1,024 less of a smaller block is masked, and two programs on a multiprocessor cover each other's beginning
    and end: plain scores are 6 to 7 % faster at 1,024, 16 to 20 % at 256, on an H200. With few programs, or over longer
    walks, larger blocks are faster.
    """
    table = table_of(config.own)
    if config.narrow is None or table.walked > _SHORT_WALK * table.busy or table.busy * heads < _MANY_PROGRAMS:
        return config, table
    return config.narrow, table_of(config.narrow.own)


def kv_table(
    tiles: Sequence[Tile], k: Tensor, block: int, *, least: int = 0, most: int = 1 << 31, placed: bool = False
) -> Table:
    """The table of every block of `block` KV rows of k [b, skv, g, d], of entries with `least` to `most` query rows."""
    return _make(TableKey(tuple(tiles), True, k.shape[1], block, k.shape[0], k.device, least, most, placed, _stream_of(k)))


def _stream_of(x: Tensor) -> int:
    if not x.is_cuda:
        return 0
    return _ANY if captured_elsewhere() else torch.cuda.current_stream(x.get_device()).cuda_stream


@kept_tables(512)
def _make(key: TableKey) -> Table:
    edges = [edge for tile in key.tiles for edge in (Edge.placed(tile) if key.placed else (Edge.of(tile),))]
    if key.transposed:
        edges = [edge.transposed for edge in edges]
    edges = [edge for edge in edges if key.least <= edge.walk_stop - edge.walk_start <= key.most]
    shared: dict[tuple[int, int | None], _Slot] = {}
    for edge in edges:
        for block in range(edge.start // key.block, -(-edge.stop // key.block)):
            slot = shared.setdefault((block, edge.batch), _Slot([], 0))
            slot.edges.append(edge)
            slot.work += edge.walked(block * key.block, (block + 1) * key.block)
    programs = sorted(_programs(key, shared), key=lambda program: -program.work)
    ints = _flat(programs, PLACED_ENTRY if key.placed else ENTRY)
    work = [program.work for program in programs]
    waited_for = key.device.type != "cuda" or key.stream == _ANY
    return Table(_to_device(ints, key.device, waited_for), len(programs), sum(map(bool, work)), sum(work))


@dataclass
class _Slot:
    edges: list[Edge]
    work: int


class _Program(NamedTuple):
    block: int
    batch: int
    edges: list[Edge]
    work: int


def _programs(key: TableKey, shared: dict[tuple[int, int | None], _Slot]) -> Iterator[_Program]:
    """Every block of every batch row; what follows the diagonal is heaviest at the end, hence the reverse order."""
    none = _Slot([], 0)
    for block in reversed(range(-(-key.rows // key.block))):
        everywhere = shared.get((block, None), none)
        for batch in range(key.batch):
            here = shared.get((block, batch), none)
            yield _Program(block, batch, everywhere.edges + here.edges, everywhere.work + here.work)


def _flat(programs: list[_Program], entry: int) -> list[int]:
    """The ints of Note [block table], with so many an entry."""
    head: list[int] = []
    entries: list[int] = []
    at = PROGRAM * len(programs)
    for program in programs:
        head += (program.block, program.batch, at, at + entry * len(program.edges))
        at += entry * len(program.edges)
        own = min((e.start for e in program.edges), default=0), max((e.stop for e in program.edges), default=0)
        for edge in program.edges:
            entries += (*edge[:6], *own, *edge.own_line, *edge.walk_line)
    return head + entries


def _to_device(ints: list[int], device: torch.device, waited_for: bool) -> Tensor:
    table = torch.tensor(ints, dtype=torch.int32, device="cpu")
    return table.to(device) if waited_for else table.pin_memory().to(device, non_blocking=True)
