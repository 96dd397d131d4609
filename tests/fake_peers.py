"""Stand-ins for the libraries that `ring-attn bench ring` knows: their modules, signatures and layouts, on our own attention.

One of them is wrong on purpose: `stripe_flash_attn_func` attends to its own shard alone.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

import ring_attn as ra


def install() -> None:
    """Makes the packages importable in this process."""
    for name, members in {
        "ring_flash_attn": {},
        "ring_flash_attn.ring_flash_attn": {"ring_flash_attn_func": _on_ring("contiguous")},
        "ring_flash_attn.zigzag_ring_flash_attn": {"zigzag_ring_flash_attn_func": _on_ring("zigzag")},
        "ring_flash_attn.stripe_flash_attn": {"stripe_flash_attn_func": _own_shard_only},
        "ring_flash_attn.ring_flash_attn_varlen": {"ring_flash_attn_varlen_func": _packed("contiguous")},
        "ring_flash_attn.zigzag_ring_flash_attn_varlen": {"zigzag_ring_flash_attn_varlen_func": _packed("zigzag")},
        "ring_flash_attn.llama3_flash_attn_varlen": {
            "llama3_flash_attn_prepare_cu_seqlens": _prepare,
            "llama3_flash_attn_varlen_func": _llama3,
        },
        "yunchang": {"set_seq_parallel_pg": lambda *degrees: None, "LongContextAttention": _LongContextAttention},
        "yunchang.kernels": {"AttnType": ModuleType("AttnType")},
        "ring_attention_pytorch": {},
        "ring_attention_pytorch.triton_flash_attn": {},
        "ring_attention_pytorch.ring_flash_attention_cuda": {"ring_flash_attn_cuda": _other_head_order},
    }.items():
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(members)
        package, _, stem = name.rpartition(".")
        if package:
            setattr(sys.modules[package], stem, module)
    sys.modules["yunchang.kernels"].AttnType.FA = "fa"


def _ring(layout: str) -> ra.Ring:
    return ra.Ring.from_group(None, layout)


def _on_ring(layout: str):
    def attend(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), group=None):
        return ra.ring_attention(q, k, v, ring=_ring(layout), mask=ra.Causal() if causal else ra.Full())

    return attend


def _own_shard_only(q, k, v, causal=False):
    return ra.ring_attention(q, k, v, ring=ra.Ring.simulated(1, "contiguous"))


def _packed(layout: str):
    def attend(q, k, v, cu_seqlens, max_seqlen, causal=False):
        lengths = cu_seqlens.diff().tolist()
        assert max_seqlen == max(lengths) and cu_seqlens.dtype == torch.int32
        parts = zip(*(x.unsqueeze(0).split(lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([_on_ring(layout)(*part, causal=causal) for part in parts], 1).squeeze(0)

    return attend


def _prepare(cu_seqlens, causal, rank, world_size):
    return cu_seqlens, cu_seqlens, 0, 0, slice(None)


def _llama3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice, causal, window_size
):
    mask = ra.Causal() & ra.Documents(lengths=cu_seqlens_q.diff().tolist())
    if window_size[0] >= 0:
        mask &= ra.Window(*window_size)
    parts = (x.unsqueeze(0) for x in (q, k, v))
    return ra.ring_attention(*parts, ring=_ring("contiguous"), mask=mask).squeeze(0)


class _LongContextAttention:
    def __init__(self, ring_impl_type, attn_type):
        assert (ring_impl_type, attn_type) == ("zigzag", "fa")

    def __call__(self, q, k, v, causal=False):
        return _on_ring("contiguous")(q, k, v, causal=causal)


def _other_head_order(q, k, v, causal, ring_reduce_col, striped_ring_attn, ring_size):
    """Query head i reads KV head i % g."""
    assert ring_reduce_col and striped_ring_attn and ring_size == 2
    k, v = (x.repeat(1, 1, q.shape[2] // k.shape[2], 1) for x in (k, v))
    return _on_ring("striped")(q, k, v, causal=causal)
