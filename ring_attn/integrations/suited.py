"""Which models of transformers compute over a ring what they compute alone.

Each layer must mix rows by attention and by nothing else, attention must go through transformers' `AttentionInterface`,
positions must be told to the model, and what it makes of rows at the end must be of single ones. What a model says of itself,
in its configuration and its names, is looked at once; what only a call shows is refused in the call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

_LAYERS = "full_attention", "sliding_attention"
_FIELDS_OF_LAYERS = {"layer_types": _LAYERS, "layers_block_type": (*_LAYERS, "attention")}
_ATTENTION = "Attention", "MLA"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_MASKS_OF_WINDOWS = "create_sliding_window_causal_mask", "create_bidirectional_sliding_window_mask"
_ROTARY_BY_LENGTH = "dynamic", "longrope"


def check_model(model: PreTrainedModel, implementation: str) -> None:
    """Raises ValueError, with the reason, for a model that would not compute over a ring what it computes alone.

    `implementation`: the name of a ring's attention.
    """
    for reason in _reasons(model, implementation):
        raise ValueError(f"{type(model).__name__} {reason}")


def parameters_of(model: PreTrainedModel) -> list[str]:
    """The names that a model's forward takes, in order; of one that hands all on, those of the forward that it overrides."""
    forwards = [vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind)]
    of_each = (inspect.signature(forward).parameters.values() for forward in forwards)
    # What is named first is what positions in a call mean.
    found = chain.from_iterable([p.name for p in of if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)] for of in of_each)
    return [name for name in dict.fromkeys(found) if name != "self"]


def windowed(module: Any) -> int | None:
    """The window that a layer's attention has by its model's config, None where it has none."""
    config = getattr(module, "config", None)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    number = getattr(module, "layer_idx", None)
    if not window or (kinds and number is not None and kinds[number] != "sliding_attention"):
        return None
    return window


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The modules that are attention by their names."""
    return [module for module in model.modules() if any(word in type(module).__name__ for word in _ATTENTION)]


def _reasons(model: PreTrainedModel, implementation: str) -> Iterator[str]:
    config, attention = model.config, attention_modules(model)
    if config._attn_implementation == implementation:
        yield (
            f"has a config that says {implementation} already, that of a model on a ring or a copy of it: take that model off "
            f"first, use_ring(it, None), or make this one of a copy from before"
        )
    if config.get_text_config() is not config:
        yield "is made of several models; give its language model alone"
    if getattr(config, "is_encoder_decoder", False):
        yield "has an encoder and a decoder; on a ring there is one causal sequence"
    if not _gives_each_row_its_output(model):
        yield "makes something else of its rows than one output each, as models for causal language modelling do"
    if any(getattr(module, "pooler", None) is not None for module in model.modules()):
        yield "pools rows, of which each rank has some; make it with add_pooling_layer=False"
    for field, known in _FIELDS_OF_LAYERS.items():
        others = sorted(set(getattr(config, field, None) or known) - set(known))
        if others:
            yield f"has layers of {', '.join(others)}; over a ring there are {' and '.join(_LAYERS)} alone"
    # A module around attention asks what it holds.
    inner = [module for module in attention if sum(part in attention for part in module.modules()) == 1]
    own = sorted({type(module).__name__ for module in inner if not _names(type(module), _INTERFACE)})
    if own or not attention:
        yield f"has attention of its own ({', '.join(own) or 'none by name'}) that goes through no AttentionInterface"
    counted = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    window = next(filter(None, map(windowed, attention)), None)
    if window and not any(_is_written_with(type(module), *_MASKS_OF_WINDOWS) for module in model.modules()):
        yield (
            f"has a window of {window} by its config, of which it makes no mask: alone it sees every key unless a library such "
            f"as flash-attn hides some by itself; set config.sliding_window = None, and where a window is wanted hand over "
            f"ring_mask=ra.Window({window - 1})"
        )
    if "position_ids" not in parameters_of(model) or counted:
        yield "makes its positions itself, of the rows that it is given, and cannot be told where in the sequence these are"
    rotary = repr(getattr(config, "rope_parameters", None))
    for kind in _ROTARY_BY_LENGTH:
        if repr(kind) in rotary:
            yield (
                f"has {kind} rotary embeddings: they go by the last position of a rank's rows, not of the sequence; set "
                f"another rope_type"
            )
    if any(getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True) for module in attention):
        yield (
            "scales queries by where they stand in the rows that it is given, not in the sequence; make it of a config with "
            "attn_temperature_tuning = False"
        )
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        yield "attends both ways by config.use_bidirectional_attention, which only masks that transformers makes would hold"


def _gives_each_row_its_output(model: PreTrainedModel) -> bool:
    """Whether it does by the name of the class of transformers that it is, or by its own where that comes from elsewhere."""
    kinds = (kind for kind in type(model).__mro__ if not kind.__name__.endswith("PreTrainedModel"))
    of_models = (kind for kind in kinds if kind.__module__.startswith("transformers.models."))
    kind = next(of_models, None)
    if kind is None:
        return type(model).__name__.endswith(("ForCausalLM", "ForTokenClassification", "Model"))
    if kind.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForTokenClassification")):
        return True
    is_base = kind.__name__.endswith("Model") and not kind.__name__.endswith("DoubleHeadsModel")
    return is_base and type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _names(kind: type, name: str) -> bool:
    """Whether a function of a class, or of one that it is made of, has that name of a module's in it."""
    functions = (inspect.unwrap(x) for one in kind.__mro__ for x in vars(one).values() if callable(x))
    return any(name in getattr(getattr(x, "__code__", None), "co_names", ()) for x in functions)


def _is_written_with(kind: type, *names: str) -> bool:
    """Whether a file in which a class, or one that it is made of, is written has one of these names."""
    return any(hasattr(sys.modules.get(one.__module__), name) for one in kind.__mro__ for name in names)
