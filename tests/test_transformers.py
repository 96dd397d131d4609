"""Causal language models of transformers over a ring, against the same models with a dense softmax in float64."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial
from unittest.mock import patch

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface

import ring_attn as ra
from ring_attn.integrations import transformers as integration
from ring_attn.integrations.transformers import use_ring
from tests.dist.harness import run_processes
from tests.support import FLOAT64_LIMIT, rel_error

SIZES = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "Llama": SIZES,
    "Mistral": SIZES | {"sliding_window": 7},
    "Qwen3": SIZES,
    "Gemma2": SIZES | {"sliding_window": 7, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 0.5},
    "GptOss": SIZES | {"sliding_window": 7, "num_local_experts": 2, "num_experts_per_tok": 1},
}
ALLOWED = {
    "causal": (None, lambda q, k: k <= q),
    "documents": (ra.Documents([20, 1, 27]), lambda q, k: (k <= q) & ((q < 20) == (k < 20)) & ((q < 21) == (k < 21))),
    "padding": (ra.KeyPadding(starts=[0, 9]), lambda q, k: (k <= q) & (k >= torch.tensor([0, 9])[:, None, None, None])),
}


def dense(module, query, key, value, attention_mask, *, allowed, scaling, sliding_window=None, softcap=None, s_aux=None, **_):
    """transformers' attention function by one softmax; rows that see nothing have output 0."""
    group, t = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    q, k = torch.arange(t)[:, None], torch.arange(t)
    seen = allowed(q, k) & (k > q - (sliding_window or t))
    scores = scores.masked_fill(~seen, -torch.inf)
    sinks = query.new_full((query.shape[1],), -torch.inf) if s_aux is None else s_aux
    scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    p = scores.softmax(-1).nan_to_num()[..., :-1]
    return torch.einsum("bhij,bhjd->bihd", p, value), None


def model_of(kind, **options):
    """A small one in float64 whose logits are of about unit size, with the dense softmax."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{kind}Config")(**(CONFIGS[kind] | options))
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for name, x in model.named_parameters():
        if x.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(x, std=x.shape[-1] ** -0.5)
    for module in model.modules():
        if type(module).__name__ == "Gemma2RMSNorm":
            # Its own sums up the gradient of its weight in fp32.
            module.forward = lambda x, norm=module: norm._norm(x) * (1 + norm.weight)
    return model.double().train()


def tokens(t=48):
    return torch.randint(3, 37, (2, t), generator=torch.Generator().manual_seed(0))


def alone(model, allowed=ALLOWED["causal"][1]):
    """(logits, gradients of a mean cross-entropy) of the model on one device, where it stays, with the dense softmax."""
    use_ring(model, None)
    AttentionInterface.register("dense", partial(dense, allowed=allowed))
    model.set_attn_implementation("dense")
    logits = model(input_ids=tokens(), use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    return logits.detach(), gradients(model)


def gradients(model):
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


def on(of_batch, model, **options):
    """The same, of the rows that this process hosts, over a ring."""
    logits = model(input_ids=of_batch.shard(tokens()), **options).logits
    ra.global_token_loss(logits, of_batch.shard(ra.shift_labels(tokens())), ring=of_batch).backward()
    return logits.detach(), gradients(model)


def assert_alike(found, wanted, ring):
    (logits, grads), (want, wanted_grads) = found, wanted
    assert rel_error(ring.unshard(logits), want) < FLOAT64_LIMIT
    assert grads.keys() == wanted_grads.keys() and len(grads) > 20
    for name, x in grads.items():
        assert rel_error(x, wanted_grads[name]) < FLOAT64_LIMIT, name


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_gives_what_it_gives_on_one_device(kind, layout):
    model, ring = model_of(kind), ra.Ring.simulated(3, layout, kernel="reference", hostile=True)
    for mask, allowed in ALLOWED.values():
        wanted = alone(model, allowed)
        use_ring(model, ring)
        assert_alike(on(ring, model, **({} if mask is None else {"ring_mask": mask})), wanted, ring)


def test_a_layout_for_a_batch():
    model, ring = model_of("Gemma2"), ra.Ring.simulated(3, kernel="reference")
    mask, allowed = ALLOWED["documents"]
    wanted, packed = alone(model, allowed), ring.with_layout(ra.ByDocument([20, 1, 27]))
    use_ring(model, ra.Ring.simulated(4))
    use_ring(model, ring)
    assert_alike(on(packed, model, ring=packed, ring_mask=mask), wanted, packed)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GptOss"])
def test_compilation_checkpoints_and_the_way_back(kind):
    model, ring = model_of(kind), ra.Ring.simulated(3, kernel="reference")
    wanted = alone(model)
    use_ring(model, ring)
    model.gradient_checkpointing_enable()
    assert_alike(on(ring, model), wanted, ring)
    model.gradient_checkpointing_disable()
    torch._dynamo.reset()
    # Experts of GPT-OSS break a graph themselves.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind != "GptOss")
    assert rel_error(ring.unshard(compiled(input_ids=ring.shard(tokens())).logits), wanted[0]) < FLOAT64_LIMIT
    use_ring(model, None)
    assert model.config._attn_implementation == "dense" and not model._forward_pre_hooks
    assert torch.equal(model(tokens(), use_cache=False).logits, wanted[0])


def _over_processes(rank):
    model, ring = model_of("Llama"), ra.Ring.from_group(None, "zigzag", kernel="reference")
    wanted = alone(model)
    use_ring(model, ring)
    logits, grads = on(ring, model)
    for x in grads.values():
        torch.distributed.all_reduce(x)
    assert_alike((logits, grads), wanted, ring)


def test_over_processes():
    run_processes(_over_processes, 2)


def test_a_model_that_attends_both_ways_does_so_over_a_ring():
    model, ring = model_of("Mistral", sliding_window=None), ra.Ring.simulated(2, kernel="reference")
    wanted = alone(model, lambda q, k: (q - k).abs() <= 7)
    model.config.sliding_window = 7
    use_ring(model, ring)
    assert_alike(on(ring, model, is_causal=False), wanted, ring)


def test_under_autocast_attention_takes_one_dtype():
    """Rotary embeddings make q and k fp32, and values are 16 bits."""
    model, ring = model_of("Llama").float(), ra.Ring.simulated(3, kernel="reference")
    model.set_attn_implementation("sdpa")
    use_ring(model, ring)
    with torch.autocast("cpu", torch.bfloat16):
        found = ring.unshard(model(input_ids=ring.shard(tokens())).logits)
        use_ring(model, None)
        plain = model(input_ids=tokens(), use_cache=False).logits
    exact = alone(model.double())[0]
    assert 0 < rel_error(found, exact) < 2 * rel_error(plain, exact)


def test_autocast_takes_its_dtype_where_they_differ_alone():
    """By attention itself."""
    seen, ring = [], ra.Ring.simulated(1, kernel="reference")
    with patch.object(integration, "ring_attention", lambda q, k, v, **_: seen.append({q.dtype, k.dtype, v.dtype})):
        for dtype, of_v in ((torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
            with torch.autocast("cpu", dtype):
                q, k, v = (torch.ones(1, 2, 4, 8, dtype=x) for x in (torch.float32, torch.float32, of_v))
                integration.attend(torch.nn.Identity(), q, k, v, None, ring=ring)
    assert seen == [{torch.float16}, {torch.bfloat16}, {torch.float32}]


@pytest.mark.parametrize("kind", ["Gemma2", "GptOss"])
def test_attention_is_compiled_once_a_kind_of_layer(kind):
    """Full ones and those with windows, which a number or sinks of each layer would tell apart."""
    model, ring = model_of(kind, num_hidden_layers=6), ra.Ring.simulated(2, kernel="reference")
    wanted = alone(model.eval())
    for one in [key for key in integration._kept if len(key) > 1]:
        del integration._kept[one]
    use_ring(model, ring)
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.self_attn.compile(backend=count, fullgraph=True)
    assert_alike(on(ring, model), wanted, ring)
    assert count.frame_count == 2


def test_positions_beside_a_mask_are_taken():
    model, ring = model_of("Llama"), ra.Ring.simulated(3, kernel="reference")
    alone(model)
    positions = 3 * torch.arange(48).expand(2, -1)
    wanted = model(input_ids=tokens(), position_ids=positions, use_cache=False).logits
    use_ring(model, ring)
    logits = model(input_ids=ring.shard(tokens()), position_ids=ring.shard(positions), ring_mask=ra.Causal()).logits
    assert rel_error(ring.unshard(logits), wanted) < FLOAT64_LIMIT


def _copies(rank):
    model, ring = model_of("Llama"), ra.Ring.from_group(None, "zigzag", kernel="reference")
    wanted, _ = alone(model)
    use_ring(model, ring)
    copied = copy.deepcopy(model)
    assert copy.copy(ring) is ring
    for one in (model, copied):
        logits = one(input_ids=ring.shard(tokens()), ring=ring.with_layout("zigzag")).logits
        assert rel_error(ring.unshard(logits), wanted) < FLOAT64_LIMIT
    with pytest.raises(TypeError, match=r"is of a process group and cannot be pickled; .* use_ring\(model, None\), and save"):
        pickle.dumps(model)
    use_ring(copied, None)
    assert len(pickle.dumps(copied)) > 1000


def test_a_copy_is_on_the_same_ring():
    run_processes(_copies, 2)
