"""The launches of the Triton backward: one for dq, one or two for dk and dv; what runs in them is in `triton_gradients.py`.

One launch for all three takes five products in place of seven, but was slower on an H200.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ring_attn.kernels import Upstream
from ring_attn.kernels.sums import Grads, Totals
from ring_attn.kernels.triton_blocks import Config, Configs, Table, chosen, kv_table, padded, query_table
from ring_attn.kernels.triton_gradients import dkdv_kernel, dq_kernel
from ring_attn.kernels.triton_prepare import prepared
from ring_attn.kernels.triton_rows import Call, Rows, blocks_of, number_blocks_of, numbers_of, rows_of
from ring_attn.kernels.triton_scores import Chain
from ring_attn.tiles import Tile


@dataclass(frozen=True)
class Visited:
    """The tensors of a visit's backward, and what makes scores of their products."""

    up: Upstream
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    chain: Chain


def backward_calls(x: Visited, into: Grads, tiles: Sequence[Tile], configs: Configs, *, once: bool) -> Iterator[Call]:
    """The launches of one visit; `once`: no others add to its gradients."""
    own_kv, placed = configs.dkdv, x.chain.placed
    by_tma = None not in _walked_queries(x, own_kv).values()
    passes = [(own_kv, kv_table(tiles, x.k, own_kv.own, least=own_kv.walk if by_tma else 0, placed=placed))]
    if by_tma:
        passes.append((configs.short, kv_table(tiles, x.k, configs.short.own, most=own_kv.walk - 1, placed=placed)))
    passes = [one for one in passes if one[1].busy] or passes[:1]
    to = into.totals(once_q=once, once_kv=once and len(passes) == 1)
    for config, table in passes:
        if table.busy or to.unwritten_kv:
            yield dkdv_call(x, to, table, config)
        to = to._replace(unwritten_kv=False)
    own_q, table = chosen(configs.dq, x.q.shape[2], lambda own: query_table(tiles, x.q, own, placed=placed))
    yield dq_call(x, to, table, own_q)


def dkdv_call(x: Visited, to: Totals, table: Table, config: Config) -> Call:
    """The launch that adds into dk and dv, or writes all of their rows; `table` lists blocks of KV rows."""
    blocks = _walked_queries(x, config)
    arguments = _shared(x, table, config, to.unwritten_kv) | blocks | {"dk": rows_of(to.dk), "dv": rows_of(to.dv)}
    arguments |= {"num_kv": x.k.shape[1], "batches": x.q.shape[0], "BLOCK_N": config.own, "BLOCK_M": config.walk}
    arguments |= {"TMA": None not in blocks.values(), "EARLY": config.early}
    return Call(dkdv_kernel, arguments["programs"] * x.k.shape[2], arguments)


def dq_call(x: Visited, to: Totals, table: Table, config: Config) -> Call:
    """The launch that adds into dq, or writes all of its rows; `table` lists blocks of query rows."""
    blocks = (blocks_of(x.k, config.walk), blocks_of(x.v, config.walk)) if config.tma else (None, None)
    slopes, add_slopes = _slopes(x, to)
    arguments = _shared(x, table, config, to.unwritten_q) | {"dq": rows_of(to.dq), "num_q": x.q.shape[1]}
    arguments |= {"k_blocks": blocks[0], "v_blocks": blocks[1], "TMA": None not in blocks}
    arguments |= {"BLOCK_M": config.own, "BLOCK_N": config.walk, "EARLY": config.early, "MIXED": config.mixed}
    arguments |= {"slopes": slopes, "ALIBI": None if slopes is None else x.chain.alibi}
    return Call(dq_kernel, arguments["programs"] * x.q.shape[2], arguments, add_slopes)


def _slopes(x: Visited, to: Totals) -> tuple[Rows | None, Callable[[], None] | None]:
    """Where the dq kernel writes what each row adds to -d slopes, and what then adds that up; None where nobody wants it."""
    total = None if x.chain.alibi is None else to.score[x.chain.slopes]
    if total is None:
        return None, None
    # Where dq is unwritten, programs write all of their rows.
    make = torch.empty if to.unwritten_q else torch.zeros
    parts = make(x.q.shape[0], x.q.shape[2], x.q.shape[1], dtype=torch.float32, device=x.q.device)
    return numbers_of(parts), lambda: total.sub_(parts.sum((0, 2)))


def _shared(x: Visited, table: Table, config: Config, unwritten: bool) -> dict[str, Any]:
    dout, lse2, delta = prepared(x.up)
    return {
        "q": rows_of(x.q),
        "k": rows_of(x.k),
        "v": rows_of(x.v),
        "dout": rows_of(dout),
        "lse": numbers_of(lse2),
        "delta": numbers_of(delta),
        "table": table.ints,
        "scale": float(x.scale),
        "programs": table.programs if unwritten else table.busy,
        "UNWRITTEN": unwritten,
        "group": x.q.shape[2] // x.k.shape[2],
        "DIM": x.q.shape[3],
        "V_DIM": x.v.shape[3],
        "WIDTH": padded(x.q.shape[3]),
        "V_WIDTH": padded(x.v.shape[3]),
        **x.chain.arguments(x.scale),
        **config.options,
    }


_WALKED = "q_blocks", "dout_blocks", "lse_blocks", "delta_blocks"


def _walked_queries(x: Visited, config: Config) -> dict[str, Any]:
    """What the dk, dv kernel walks over by TMA; all None where that is not wanted, or cannot copy one of them."""
    dout, *numbers = prepared(x.up)
    blocks = *(blocks_of(rows, config.walk) for rows in (x.q, dout)), *(number_blocks_of(n, config.walk) for n in numbers)
    return dict(zip(_WALKED, blocks, strict=True)) if config.tma and None not in blocks else dict.fromkeys(_WALKED)
