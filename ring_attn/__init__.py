"""Exact attention over sequences too long for one device. The public names; everything else is behind them."""

from ring_attn.attention import ring_attention
from ring_attn.by_document import ByDocument
from ring_attn.cache import KVCache
from ring_attn.capabilities import capabilities
from ring_attn.decode import tree_decode
from ring_attn.kernels import KernelUnavailable
from ring_attn.mask import Causal, Documents, Full, KeyPadding, MaskMod, Window
from ring_attn.module import RingSelfAttention
from ring_attn.ring import Ring
from ring_attn.score import Alibi, Bias, CosineSim, Dropout, RelativeBias, Sinks, SoftCap
from ring_attn.score_mod import ScoreMod
from ring_attn.sharding import global_token_loss, pad_to, shift_labels

__all__ = [
    "Alibi",
    "Bias",
    "ByDocument",
    "Causal",
    "CosineSim",
    "Documents",
    "Dropout",
    "Full",
    "KVCache",
    "KernelUnavailable",
    "KeyPadding",
    "MaskMod",
    "RelativeBias",
    "Ring",
    "RingSelfAttention",
    "ScoreMod",
    "Sinks",
    "SoftCap",
    "Window",
    "capabilities",
    "global_token_loss",
    "pad_to",
    "ring_attention",
    "shift_labels",
    "tree_decode",
]
