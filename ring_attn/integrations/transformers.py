"""Hugging Face transformers: `use_ring(model, ring)`, and a causal language model's own forward runs on sharded rows.

Note [hook]: attention is an entry of transformers' `AttentionInterface`. Ring and mask reach it among the keyword arguments
that its models hand down, where a hook on the model's forward puts them, and positions beside them. The hook refuses what would
be taken for a whole sequence, such as a padding mask of local rows, and says what takes its place.

Note [no mask]: transformers makes masks, of local rows, for implementations that it knows masks of. It knows none of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from ring_attn.attention import ring_attention
from ring_attn.integrations.suited import attention_modules, check_model, parameters_of, windowed
from ring_attn.mask import Causal, Full, Mask, Window, check_mask
from ring_attn.module import row_positions
from ring_attn.ring import Ring
from ring_attn.score import Sinks, SoftCap

NAME = "ring_attn"
_WINDOW = "_window_before_ring_attn"
_UNKNOWN = "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_bias", "head_mask"
_INSTEAD = {
    "past_key_values": "generate with the model as it was, use_ring(model, None), or with ra.KVCache and ra.tree_decode",
    "labels": "take the logits, and ra.global_token_loss(logits, ring.shard(ra.shift_labels(labels)), ring=ring)",
    "attention_mask": "hide padding by ring_mask=ra.KeyPadding(...); on the right no token that counts sees it",
    "encoder_hidden_states": "it attends to one sequence; across two there is ra.ring_attention(..., kv_layout=...)",
}
_FLAGS = {
    "use_cache": _INSTEAD["past_key_values"],
    "output_attentions": "a ring makes no matrix of them",
    "output_router_logits": "their loss would be that of each rank's rows, not of all; pass output_router_logits=False",
    "logits_to_keep": "it would keep the last of each rank's rows; take them of ring.unshard(logits)",
}
_FLAGS_OF_CONFIG = "output_attentions", "output_router_logits"


def use_ring(model: PreTrainedModel, ring: Ring | None) -> None:
    """From now on a causal language model of transformers takes the rows of this process and attends over the ring; None: it is
    as it was before.

        use_ring(model, ring)
        logits = model(input_ids=ring.shard(tokens)).logits         # [b, rows this process hosts, vocabulary]
        loss = ra.global_token_loss(logits, ring.shard(ra.shift_labels(tokens)), ring=ring)

    A forward takes two more keyword arguments: `ring_mask`, a mask of global positions that holds beside what the model hides
    itself, and `ring`, this one in another layout for a batch (`ring.with_layout`). Position ids are the ring's where none are
    given, and come with a ring_mask where they are. Windows, caps, sinks and scales of the model hold; where it trains its
    attention dropout must be 0. Under autocast attention is computed in its dtype where q, k and v differ in theirs.

    Raises ValueError for a model that would compute something else over a ring than alone, see `ring_attn.integrations.suited`,
    and in a forward for what would be taken for a whole sequence, or for packed documents that no mask is given of.
    """
    if not isinstance(ring, Ring | None):
        raise TypeError(f"ring must be a Ring, or None for none, got {type(ring).__name__}")
    if not isinstance(model, PreTrainedModel):
        got = type(model).__name__
        raise TypeError(f"model must be a transformers PreTrainedModel, of a wrapped one the model inside, got {got}")
    before = model.__dict__.pop("_before_ring_attn", None)
    if before is not None:
        implementation, hook = before
        hook.remove()
        for module in model.modules():
            module.__dict__.pop(_WINDOW, None)
        model.set_attn_implementation(implementation)
    if ring is None:
        return
    check_model(model, NAME)
    _prepare(model)
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
        raise ValueError(
            f"{name} was handed no ring: it was called by itself, its model does not hand keyword arguments down to it, or it "
            f"has the config object of a model on a ring; give each model a copy.deepcopy of the config"
        )
    if dropout:
        raise ValueError(
            f"dropout {dropout} of attention's probabilities is not taken over; make the model with 0 for it in its config "
            f"(attention_dropout, attn_pdrop), or set its attention modules' own to 0, for they keep a copy"
        )
    given = {"attention_mask": attention_mask} | {name: others.get(name) for name in _UNKNOWN}
    asked = [name for name, x in given.items() if x is not None]
    if asked:
        raise ValueError(
            f"attention over a ring takes no {', '.join(asked)}, given to the model or made by it; masks of global positions "
            f"go by ring_mask"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries meet {key.shape[2]} keys, but a model on a ring has no cache")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = kept(Causal) if causal else kept(Full)
    window = getattr(module, _WINDOW, None)
    if window and not sliding_window:
        raise ValueError(
            f"{type(module).__name__} has a window of {window} by its config and hands none to its attention; where all layers "
            f"have it set config.sliding_window = None and hand over ring_mask=ra.Window({window - 1})"
        )
    if sliding_window:
        # The token itself counts as one.
        mask = mask & (kept(Window, sliding_window - 1, None) if causal else kept(Window, sliding_window, sliding_window))
    if ring_mask is not None:
        mask = mask & ring_mask
    score = [*([] if softcap is None else [kept(SoftCap, softcap)]), *([] if s_aux is None else [Sinks(s_aux)])]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if len({q.dtype, k.dtype, v.dtype}) > 1 and torch.is_autocast_enabled(q.device.type):
        # As PyTorch's own attention would: rotary embeddings are fp32 there, and values are not.
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return ring_attention(q, k, v, ring=ring, mask=mask, score=score, softmax_scale=scaling), None


def _prepare(model: PreTrainedModel) -> None:
    """Makes what layers will ask for, which may not be made inside of what is compiled, and notes windows with them."""
    if window := getattr(model.config, "sliding_window", None):
        kept(Window, window - 1, None)
    if cap := getattr(model.config, "attn_logit_softcapping", None):
        kept(SoftCap, cap)
    for module in attention_modules(model):
        module.__dict__[_WINDOW] = windowed(module)


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
        self.ring, self.names = ring, parameters_of(model)
        # Modules keep it beside the config.
        self.dropping = [module for module in model.modules() if hasattr(module, "layerdrop")]

    def __call__(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        found = model.config._attn_implementation
        if found != NAME:
            raise ValueError(f"the attention of a model on a ring was set to {found!r}; call use_ring again, or with None")
        for name, instead in _INSTEAD.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"a model on a ring takes no {name}: {instead}")
        for name, instead in _FLAGS.items():
            asked = kwargs.get(name)
            if asked is None and name in _FLAGS_OF_CONFIG:
                asked = getattr(model.config, name, None)
            if isinstance(asked, Tensor) or asked:
                raise ValueError(f"a model on a ring takes no {name}: {instead}")
        if model.training and any(module.layerdrop for module in self.dropping):
            raise ValueError(
                "a model on a ring takes no layerdrop: each rank would leave out other layers; set that of its modules to 0.0, "
                "which keep their own beside the config's"
            )
        if getattr(model.config, "prefix_lm", False) and kwargs.get("token_type_ids") is not None:
            raise ValueError("a model on a ring takes no token_type_ids that tell of a prefix: attention is causal")
        ring = self.ring if kwargs.get("ring") is None else kwargs["ring"]
        if not isinstance(ring, Ring):
            raise TypeError(f"ring must be a Ring, got {type(ring).__name__}")
        if ring.transport is not self.ring.transport:
            raise ValueError(f"ring must be the model's, {self.ring}, in another layout by its with_layout, got {ring}")
        if kwargs.get("ring_mask") is not None:
            check_mask(kwargs["ring_mask"])
        rows = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        positions = kwargs.get("position_ids")
        if positions is None:
            if rows is not None:
                kwargs["position_ids"] = row_positions(rows, ring).unsqueeze(0)
        elif kwargs.get("ring_mask") is None:
            raise ValueError(
                "position_ids may begin anew with each of several packed documents, which only a mask keeps apart on a ring: "
                "give ring_mask=ra.Documents(lengths) beside them, or ra.Full() where there is one"
            )
        elif rows is not None and positions.shape[-1] != rows.shape[1]:
            raise ValueError(f"{positions.shape[-1]} position_ids for {rows.shape[1]} rows here; give ring.shard(position_ids)")
        return (), kwargs | {"ring": ring, "use_cache": False}
