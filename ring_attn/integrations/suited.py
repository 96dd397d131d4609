"""Which models of transformers compute over a ring what they compute alone.

Each layer must mix rows by attention and by nothing else, attention must go through transformers' `AttentionInterface`,
positions must be told to the model, and what it makes of rows at the end must be of single ones. What a model says of itself,
in its configuration, its names and its source, is looked at once; what only a call shows is refused in the call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

from transformers import PreTrainedModel

_HEADS = "ForCausalLM", "LMHeadModel", "ForTokenClassification", "Model"
_LAYERS = "full_attention", "sliding_attention"
_ROTARY_BY_LENGTH = "dynamic", "longrope"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def check_model(model: PreTrainedModel, implementation: str) -> None:
    """Raises ValueError, with the reason, for a model that would not compute over a ring what it computes alone.

    `implementation`: the name of a ring's attention.
    """
    for reason in _reasons(model, implementation):
        raise ValueError(f"{type(model).__name__} {reason}")


def _reasons(model: PreTrainedModel, implementation: str) -> Iterator[str]:
    config, names = model.config, inspect.signature(model.forward).parameters
    if config._attn_implementation == implementation:
        yield "shares its config with a model on a ring, and one could not leave it alone; make it with copy.deepcopy(config)"
    if config.get_text_config() is not config:
        yield "is made of several models; give its language model alone"
    if getattr(config, "is_encoder_decoder", False):
        yield "has an encoder and a decoder; on a ring there is one causal sequence"
    if not _kind(model).endswith(_HEADS):
        yield f"makes something else of its rows than one output each; on a ring a model ends in {', '.join(_HEADS)}"
    for field, known in (("layer_types", _LAYERS), ("layers_block_type", (*_LAYERS, "attention"))):
        others = sorted(set(getattr(config, field, None) or known) - set(known))
        if others:
            yield f"has layers of {', '.join(others)}; over a ring there are {' and '.join(_LAYERS)} alone"
    attention = {type(module) for module in model.modules() if "Attention" in type(module).__name__}
    own = sorted({kind.__name__ for kind in attention if _INTERFACE not in _source(kind)})
    if own or not attention:
        yield f"has attention of its own ({', '.join(own) or 'none by name'}) that goes through no AttentionInterface"
    counted = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    if "position_ids" not in names or counted:
        yield "makes its positions itself, of the rows that it is given, and cannot be told where in the sequence these are"
    rotary = repr(getattr(config, "rope_parameters", None))
    for kind in _ROTARY_BY_LENGTH:
        if repr(kind) in rotary:
            yield (
                f"has {kind} rotary embeddings: they go by the last position of a rank's rows, not of the sequence; set "
                f"another rope_type"
            )
    if getattr(config, "use_bidirectional_attention", None) is True:
        yield "attends both ways by config.use_bidirectional_attention, with windows that mean something else there"


def _kind(model: PreTrainedModel) -> str:
    """The name of the class of transformers that the model is, or of its own where that comes from elsewhere."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.") and not kind.__name__.endswith("PreTrainedModel"):
            return kind.__name__
    return type(model).__name__


def _source(kind: type) -> str:
    """That of the file in which a class is written, empty where there is none."""
    try:
        return inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        return ""
