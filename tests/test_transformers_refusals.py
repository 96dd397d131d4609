"""What a ring would compute otherwise than a model of transformers alone is refused, with what can be done instead."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention

import ring_attn as ra
from ring_attn.integrations import transformers as integration
from ring_attn.integrations.suited import windowed
from ring_attn.integrations.transformers import use_ring
from tests.test_transformers import model_of, tokens

NUMBERS = torch.arange(48).expand(2, -1)
FORWARDS = {
    "attention_mask": (
        {"attention_mask": torch.ones(2, 48)},
        r"takes no attention_mask: hide padding by ring_mask=ra.KeyPadding",
    ),
    "labels": ({"labels": tokens()}, r"takes no labels: take the logits, and ra.global_token_loss"),
    "cache": ({"use_cache": True}, r"takes no use_cache: generate with the model as it was"),
    "probabilities": ({"output_attentions": True}, r"takes no output_attentions: a ring makes no matrix of them"),
    "routers": ({"output_router_logits": True}, r"takes no output_router_logits: their loss would be that of each rank's rows"),
    "the last": ({"logits_to_keep": 1}, r"takes no logits_to_keep: it would keep the last of each rank's rows"),
    "some": ({"logits_to_keep": torch.tensor([0])}, r"takes no logits_to_keep"),
    "packing": ({"cu_seq_lens_q": torch.tensor([0, 48])}, r"takes no cu_seq_lens_q, given .* go by ring_mask"),
    "cross": ({"encoder_hidden_states": torch.ones(2, 4, 32)}, r"takes no encoder_hidden_states: .* kv_layout"),
    "positions alone": (
        {"position_ids": NUMBERS},
        r"position_ids may begin anew .* give ring_mask=ra.Documents\(lengths\) beside",
    ),
    "all positions": (
        {"position_ids": torch.arange(96)[None], "ring_mask": ra.Causal()},
        r"96 position_ids for 48 rows here; give ring.shard\(position_ids\)",
    ),
    "another ring": ({"ring": ra.Ring.simulated(2)}, r"ring must be the model's, Ring.*, in another layout by its with_layout"),
    "rows": ({"input_ids": tokens(47)}, r"47 rows cannot be the equal shards of 2 hosted ranks"),
}


@pytest.mark.parametrize("what", FORWARDS)
def test_what_a_forward_cannot_take(what):
    model, ring = model_of("Llama"), ra.Ring.simulated(2)
    use_ring(model, ring)
    given, message = FORWARDS[what]
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": tokens()} | given))


def test_what_is_no_model_and_no_ring():
    with pytest.raises(TypeError, match=r"model must be a transformers PreTrainedModel, of a wrapped one .*, got Linear"):
        use_ring(torch.nn.Linear(2, 2), ra.Ring.simulated(2))
    model = model_of("Llama")
    with pytest.raises(TypeError, match="ring must be a Ring, or None for none, got str"):
        use_ring(model, "zigzag")
    use_ring(model, ra.Ring.simulated(2))
    with pytest.raises(TypeError, match="ring must be a Ring, got int"):
        model(input_ids=tokens(), ring=3)


def with_config(kind, **changes):
    """A model whose config is changed once it is made."""
    model = model_of(kind)
    for name, x in changes.items():
        setattr(model.config, name, x)
    return model


def of_class(name, config, **sizes):
    """A small model of a class of transformers, made of the config of that name."""
    return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**sizes))


LLAMA = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
BART = {"vocab_size": 37, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 8, "encoder_ffn_dim": 8}
GIT_VISION = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 48}
LLAMA4 = {
    "num_key_value_heads": 2,
    "layer_types": ["full_attention"],
    "no_rope_layers": [0],
    "head_dim": 8,
    "num_local_experts": 2,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
MODELS = {
    "layers": (
        lambda: with_config("Llama", layer_types=["full_attention", "linear_attention", "full_attention"]),
        r"LlamaForCausalLM has layers of linear_attention; over a ring there are full_attention",
    ),
    "blocks": (
        lambda: of_class("RecurrentGemmaForCausalLM", "RecurrentGemma", **LLAMA, block_types=["recurrent"], lru_width=32),
        r"has layers of recurrent; over",
    ),
    "long rotary": (lambda: with_config("Llama", rope_parameters=DYNAMIC | {"rope_type": "longrope"}), r"has longrope rotary"),
    "rotary": (
        lambda: with_config("Llama", rope_parameters=DYNAMIC),
        r"LlamaForCausalLM has dynamic rotary embeddings: they go by the last position of a rank's rows",
    ),
    "own attention": (
        lambda: of_class("FalconForCausalLM", "Falcon", **LLAMA),
        r"FalconForCausalLM has attention of its own \(FalconAttention.*\) that goes through no AttentionInterface",
    ),
    "own attention beside another's": (
        lambda: of_class("GitForCausalLM", "Git", **LLAMA, vision_config=GIT_VISION),
        r"GitForCausalLM has attention of its own \(GitSelfAttention\) that goes through no AttentionInterface",
    ),
    "scales by place": (
        lambda: of_class("Llama4ForCausalLM", "Llama4Text", **LLAMA, **LLAMA4),
        r"Llama4ForCausalLM scales queries by where they stand in the rows .* with attn_temperature_tuning = False",
    ),
    "no attention": (
        lambda: of_class("xLSTMForCausalLM", "xLSTM", vocab_size=37, hidden_size=64, num_heads=4, num_hidden_layers=1),
        r"xLSTMForCausalLM has attention of its own \(none by name\)",
    ),
    "positions": (
        lambda: of_class("BartForCausalLM", "Bart", **BART, is_decoder=True, is_encoder_decoder=False),
        "makes its pos",
    ),
    "positions of tokens": (
        lambda: of_class("RobertaForCausalLM", "Roberta", **LLAMA, is_decoder=True),
        r"RobertaForCausalLM makes its positions itself",
    ),
    "two sequences": (lambda: of_class("BartForConditionalGeneration", "Bart", **BART), r"has an encoder and a decoder"),
    "one class": (
        lambda: of_class("LlamaForSequenceClassification", "Llama", **LLAMA),
        r"LlamaForSequenceClassification makes something else of its rows than one output each",
    ),
    "both ways": (lambda: with_config("Llama", use_bidirectional_attention=True), r"attends both ways by config.use_bidir"),
    "all ways": (lambda: with_config("Llama", use_bidirectional_attention="all"), r"attends both ways by config.use_bidir"),
    "pools": (lambda: of_class("BertModel", "Bert", **LLAMA), r"pools rows, .* make it with add_pooling_layer=False"),
    "two heads": (
        lambda: of_class("GPT2DoubleHeadsModel", "GPT2", vocab_size=37, n_embd=32, n_layer=1, n_head=4),
        r"GPT2DoubleHeadsModel makes something else of its rows",
    ),
    "a window without a mask": (
        lambda: of_class("OlmoeForCausalLM", "Olmoe", **LLAMA, num_experts=2, num_experts_per_tok=1, sliding_window=9),
        r"has a window of 9 by its config, of which it makes no mask: alone it sees every key .* ring_mask=ra.Window\(8\)",
    ),
    "no language model": (lambda: of_class("CLIPTextModel", "CLIPText", **LLAMA), r"CLIPTextModel makes something else of its"),
}


@pytest.mark.parametrize("what", MODELS)
def test_models_that_would_compute_something_else(what):
    make, message = MODELS[what]
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        use_ring(model, ra.Ring.simulated(2))
    assert model.config._attn_implementation == before and not model._forward_pre_hooks


class Mine(transformers.LlamaForCausalLM):
    """A user's own, with a forward that names little and attention that adds nothing."""

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = MyAttention(config, number)

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class MyAttention(LlamaAttention):
    """A user's own."""


class OfMyOwnForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A model that is written elsewhere, of layers of transformers."""

    config_class = transformers.LlamaConfig
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.model, self.head = transformers.LlamaModel(config), torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return (self.head(self.model(input_ids=input_ids, position_ids=position_ids, **kwargs)[0]),)


def with_attention_from_elsewhere():
    """The model's file makes masks of its window, that of its attention does not."""
    config = config_of("Mistral", sliding_window=9, num_key_value_heads=2)
    config.clip_qkv, config.attention_bias = None, False
    model = transformers.MistralForCausalLM(config)
    model.model.layers[0].self_attn = OlmoeAttention(config, 0)
    return model


OTHERS = {
    "attention from elsewhere": with_attention_from_elsewhere,
    "a subclass": lambda: Mine(config_of("Llama")),
    "written elsewhere": lambda: OfMyOwnForCausalLM(config_of("Llama")),
    "a base model": lambda: transformers.LlamaModel(config_of("Llama")),
    "classes of tokens": lambda: transformers.LlamaForTokenClassification(config_of("Llama")),
    "both ways": lambda: transformers.BertModel(config_of("Bert"), add_pooling_layer=False),
    "dropping layers in training": lambda: with_modules(transformers.LlamaModel(config_of("Llama")), layerdrop=0.1),
}


def config_of(kind, **sizes):
    return getattr(transformers, f"{kind}Config")(**(LLAMA | {"pad_token_id": 0} | sizes))


def with_modules(model, **changes):
    for name, x in changes.items():
        setattr(model, name, x)
    return model


@pytest.mark.parametrize("what", OTHERS)
def test_other_models_that_give_each_row_an_output(what):
    model, ring = OTHERS[what]().double().eval(), ra.Ring.simulated(3, kernel="reference")
    wanted = model(tokens(), use_cache=False)[0]
    use_ring(model, ring)
    assert any(integration._WINDOW in vars(module) for module in model.modules())
    found = ring.unshard(model(ring.shard(tokens()))[0])
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    use_ring(model, None)
    assert not any(integration._WINDOW in vars(module) for module in model.modules())


def test_two_models_of_one_config():
    ring, one = ra.Ring.simulated(2), model_of("Llama")
    other, third = type(one)(one.config), type(one)(copy.deepcopy(one.config))
    use_ring(one, ring)
    with pytest.raises(ValueError, match=r"has a config that says ring_attn already, .* off first, use_ring\(it, None\)"):
        use_ring(other, ring)
    use_ring(third, ring)
    use_ring(one, None)
    assert one.config._attn_implementation == "sdpa"
    use_ring(other, ring)
    with pytest.raises(ValueError, match=r"handed no ring: .* it has the config object of a model on a ring; give each"):
        one(input_ids=tokens())


def test_attention_that_is_set_to_another_later():
    model = model_of("Llama")
    use_ring(model, ra.Ring.simulated(2))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention of a model on a ring was set to 'sdpa'; call use_ring again, or with None"):
        model(input_ids=tokens())


def test_a_window_that_only_a_mask_would_hold():
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    sizes = LLAMA | {"num_hidden_layers": 2, "num_key_value_heads": 4}
    windows = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    for options, ends in ((windows, True), ({"use_sliding_window": False}, False)):
        model = of_class("Qwen2MoeForCausalLM", "Qwen2Moe", **sizes, **experts, **options).eval()
        use_ring(model, ra.Ring.simulated(2))
        if not ends:
            assert model(input_ids=tokens()).logits.isfinite().all()
            continue
        with pytest.raises(ValueError, match=r"Qwen2MoeAttention has a window of 7 by its config .* ring_mask=ra.Window\(6\)"):
            model(input_ids=tokens())


def test_a_layer_that_does_not_say_which_it_is_may_have_the_window():
    kinds = ["full_attention", "sliding_attention"]
    for number, kinds_known, window in ((0, kinds, None), (1, kinds, 7), (None, kinds, 7), (0, None, 7)):
        config = SimpleNamespace(sliding_window=7, layer_types=kinds_known)
        assert windowed(SimpleNamespace(config=config, layer_idx=number)) == window
    assert windowed(torch.nn.Linear(2, 2)) is None


def test_dropout_and_generation():
    model = model_of("Llama", attention_dropout=0.1)
    use_ring(model, ra.Ring.simulated(2))
    with pytest.raises(
        ValueError, match=r"dropout 0.1 of attention's probabilities is not taken over; .* or set its attention"
    ):
        model(input_ids=tokens())
    assert model.eval()(input_ids=tokens()).logits.isfinite().all()
    with pytest.raises(
        ValueError, match=r"takes no past_key_values: generate with the model as it was, use_ring\(model, None\)"
    ):
        model.generate(tokens(), max_new_tokens=2)
    with pytest.raises(ValueError, match="LlamaAttention was handed no ring: it was called by itself, its model does not hand"):
        integration.attend(model.model.layers[0].self_attn, *torch.zeros(3, 1, 4, 8, 8), None)


def test_what_a_config_asks_of_every_forward():
    dropping = with_modules(model_of("Llama"), layerdrop=0.1)
    use_ring(dropping, ra.Ring.simulated(2))
    with pytest.raises(ValueError, match="takes no layerdrop: each rank would leave out other layers; set that of its modules"):
        dropping(input_ids=tokens())
    for change, message in (
        ({"output_router_logits": True}, "takes no output_router_logits"),
        ({"_attn_implementation": "eager", "output_attentions": True}, "takes no output_attentions"),
    ):
        model = with_config("Llama", **change)
        use_ring(model, ra.Ring.simulated(2))
        with pytest.raises(ValueError, match=message):
            model(input_ids=tokens())
        assert model(input_ids=tokens(), output_router_logits=False, output_attentions=False).logits.isfinite().all()
    model = with_config("Llama", prefix_lm=True)
    use_ring(model, ra.Ring.simulated(2))
    assert model(input_ids=tokens()).logits.isfinite().all()
    with pytest.raises(ValueError, match="takes no token_type_ids that tell of a prefix"):
        model(input_ids=tokens(), token_type_ids=tokens())
