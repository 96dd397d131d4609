"""Hugging Face transformers: `use_ring(model, ring)`, and a causal language model's own forward runs on sharded rows.

Note [hook]: attention is an entry of transformers' `AttentionInterface`. Ring and mask reach it among the keyword arguments
that its models hand down, where a hook on the model's forward puts them, and positions beside them. The hook refuses what would
be taken for a whole sequence, such as a padding mask of local rows, and says what takes its place.

Note [no mask]: transformers makes masks, of local rows, for implementations that it knows masks of. It knows none of ours.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from ring_attn.attention import ring_attention
from ring_attn.mask import Causal, Full, Mask, Window, check_mask
from ring_attn.module import row_positions
from ring_attn.ring import Ring
from ring_attn.score import Sinks, SoftCap

NAME = "ring_attn"
_LAYERS = "full_attention", "sliding_attention"
_ROTARY_BY_LENGTH = "dynamic", "longrope"
_UNKNOWN = "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_bias", "head_mask"
_INSTEAD = {
    "past_key_values": "generate with the model as it was, use_ring(model, None), or with ra.KVCache and ra.tree_decode",
    "labels": "take the logits, and ra.global_token_loss(logits, ring.shard(ra.shift_labels(labels)), ring=ring)",
    "attention_mask": "hide padding by ring_mask=ra.KeyPadding(...); on the right no token that counts sees it",
}
_FLAGS = {
    "use_cache": _INSTEAD["past_key_values"],
    "output_attentions": "a ring makes no matrix of them",
    "logits_to_keep": "it would keep the last of each rank's rows; take them of ring.unshard(logits)",
}


def use_ring(model: PreTrainedModel, ring: Ring | None) -> None:
    """From now on a causal language model of transformers takes the rows of this process and attends over the ring; None: it is
    as it was before.

        use_ring(model, ring)
        logits = model(input_ids=ring.shard(tokens)).logits         # [b, rows this process hosts, vocabulary]
        loss = ra.global_token_loss(logits, ring.shard(ra.shift_labels(tokens)), ring=ring)

    Position ids are the ring's where none are given. A forward takes two more keyword arguments: `ring_mask`, a mask of global
    positions that holds beside what the model hides itself, and `ring`, this one in another layout for a batch
    (`ring.with_layout`). Windows, caps, sinks and scales of the model hold; where it trains its attention_dropout must be 0.

    Layers must mix rows by attention alone. Raises ValueError for a model that says it has others, or whose rotary embeddings
    go by the length of what a rank holds, and in a forward for what would be taken for a whole sequence. A model with sinks,
    such as GPT-OSS, raises under torch.compile, where each layer would make its score inside.
    """
    if not isinstance(model, PreTrainedModel):
        got = type(model).__name__
        raise TypeError(f"model must be a transformers PreTrainedModel, of a wrapped one the model inside, got {got}")
    before = model.__dict__.pop("_before_ring_attn", None)
    if before is not None:
        implementation, hook = before
        hook.remove()
        model.set_attn_implementation(implementation)
    if ring is None:
        return
    _check(model)
    AttentionInterface.register(NAME, attend)
    implementation = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    hook = model.register_forward_pre_hook(_Given(model, ring), with_kwargs=True)
    model.__dict__["_before_ring_attn"] = implementation, hook


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ring: Ring | None = None,
    ring_mask: Mask | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [b, h, s, d], key and value [b, g, s, d], the output [b, s, h, d].

    Raises ValueError for what cannot be honoured.
    """
    if ring is None:
        name = type(module).__name__
        raise ValueError(f"{name} was handed no ring: call the model itself, which must hand its keyword arguments down")
    if dropout:
        raise ValueError(f"dropout {dropout} of probabilities is not taken over; set config.attention_dropout = 0.0")
    given = {"attention_mask": attention_mask} | {name: others.get(name) for name in _UNKNOWN}
    asked = [name for name, x in given.items() if x is not None]
    if asked:
        raise ValueError(f"attention over a ring takes no {', '.join(asked)}; masks of global positions go by ring_mask")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries meet {key.shape[2]} keys, but a model on a ring has no cache")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = kept(Causal) if causal else kept(Full)
    if sliding_window is not None:
        # The token itself counts as one.
        mask = mask & (kept(Window, sliding_window - 1, None) if causal else kept(Window, sliding_window, sliding_window))
    if ring_mask is not None:
        mask = mask & ring_mask
    score = [*([] if softcap is None else [kept(SoftCap, softcap)]), *([] if s_aux is None else [Sinks(s_aux)])]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return ring_attention(q, k, v, ring=ring, mask=mask, score=score, softmax_scale=scaling), None


def kept(kind: type, *options: float | None) -> Any:
    """The mask or score of these options, always the same one, as a compiler wants it."""
    found = _kept.get((kind, *options))
    if found is None:
        found = _kept[kind, *options] = kind(*options)
    return found


_kept: dict[tuple, Any] = {(Causal,): Causal(), (Full,): Full()}


class _Given:
    """The hook on a model's forward; see Note [hook]."""

    def __init__(self, model: PreTrainedModel, ring: Ring) -> None:
        self.ring, self.names = ring, list(inspect.signature(model.forward).parameters)

    def __call__(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        for name, instead in _INSTEAD.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"a model on a ring takes no {name}: {instead}")
        for name, instead in _FLAGS.items():
            asked = kwargs.get(name)
            if isinstance(asked, Tensor) or asked or (name == "output_attentions" and model.config.output_attentions):
                raise ValueError(f"a model on a ring takes no {name}: {instead}")
        ring = kwargs.get("ring") or self.ring
        if ring.transport is not self.ring.transport:
            raise ValueError(f"ring must be the model's, {self.ring}, in another layout by its with_layout, got {ring}")
        if kwargs.get("ring_mask") is not None:
            check_mask(kwargs["ring_mask"])
        rows = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if kwargs.get("position_ids") is None and rows is not None:
            kwargs["position_ids"] = row_positions(rows, ring).unsqueeze(0)
        return (), kwargs | {"ring": ring, "use_cache": False}


def _check(model: PreTrainedModel) -> None:
    """Raises ValueError for a model that would not compute over a ring what it computes alone."""
    config, name = model.config, type(model).__name__
    if config.get_text_config() is not config:
        raise ValueError(f"{name} is made of several models; give its language model alone")
    others = sorted(set(getattr(config, "layer_types", None) or _LAYERS) - set(_LAYERS))
    if others:
        raise ValueError(f"{name} has layers of {', '.join(others)}; over a ring there are {' and '.join(_LAYERS)} alone")
    rotary = repr(getattr(config, "rope_parameters", None))
    by_length = [kind for kind in _ROTARY_BY_LENGTH if repr(kind) in rotary]
    if by_length:
        raise ValueError(
            f"rotary embeddings of {name} are {by_length[0]}: they go by the last position of a rank's rows, not of the "
            f"sequence; set another rope_type"
        )
    # What a compiled model asks for is there before.
    for kind, x in (
        (Window, getattr(config, "sliding_window", None)),
        (SoftCap, getattr(config, "attn_logit_softcapping", None)),
    ):
        if x is not None:
            kept(kind, *((x - 1, None) if kind is Window else (x,)))
