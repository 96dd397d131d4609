"""Generation over sharded caches: the layer, the decoder and the tokens of the same weights on one device without a cache."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import ring_attn as ra
from ring_attn.models.decoder import Decoder, DecoderConfig
from ring_attn.models.generate import generate, prefill
from tests.support import FLOAT64_LIMIT, rel_error
from tests.test_module import layers

CONFIG = DecoderConfig(dim=24, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=11)


def decoders(ring, **options):
    torch.manual_seed(0)
    config = replace(CONFIG, **options)
    plain, ringed = Decoder(config).double(), Decoder(config, ring).double()
    ringed.load_state_dict(plain.state_dict())
    # Logits of about unit size: the likeliest token is not the last one again.
    plain.head.weight = torch.nn.Parameter(torch.randn_like(plain.head.weight))
    ringed.head.weight = plain.head.weight
    return plain, ringed


@torch.no_grad()
def dense_generate(model, prompt, num_tokens, temperature=0.0, generator=None):
    tokens = prompt
    for _ in range(num_tokens):
        logits = model(tokens)[:, -1]
        p = (logits / (temperature or 1)).softmax(-1)
        new = torch.multinomial(p, 1, generator=generator) if temperature else logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, new], 1)
    return tokens


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("options", [{}, {"head_dim": 10, "bias": True}, {"rope_theta": None}])
@torch.no_grad()
def test_a_layer_goes_on_from_its_prefill(layout, options):
    ring = ra.Ring.simulated(3, layout, hostile=True)
    plain, ringed = layers(ring, **options)
    x, mask = torch.randn(2, 20, 24, dtype=torch.float64), ra.Causal() & ra.Window(7)
    want, cache = plain(x, mask=mask), ra.KVCache(ring)
    assert rel_error(ring.unshard(ringed(ring.shard(x[:, :12]), mask=mask, cache=cache)), want[:, :12]) < FLOAT64_LIMIT
    for start, stop in ((12, 13), (13, 16), (16, 18), (18, 20)):
        assert rel_error(ringed.decode(x[:, start:stop], cache, mask=mask), want[:, start:stop]) < FLOAT64_LIMIT
    with pytest.raises(ValueError, match="already holds 20 positions, which these 12 rows would not see; go on with decode"):
        ringed(x[:, :12], cache=cache)


@torch.no_grad()
def test_a_padded_prompt_and_scores():
    ring = ra.Ring.simulated(3, "zigzag", hostile=True)
    plain, ringed = layers(ring)
    x, score = torch.randn(2, 15, 24, dtype=torch.float64), [ra.Alibi(torch.linspace(0.1, 0.9, 4).double()), ra.SoftCap(2.0)]
    want, cache = plain(x, score=score), ra.KVCache(ring)
    padded = ring.shard(ra.pad_to(x[:, :11], ring.shard_multiple, value=9.0))
    found = ring.unshard(ringed(padded, score=score, cache=cache, seq_len=11))[:, :11]
    assert rel_error(found, want[:, :11]) < FLOAT64_LIMIT and len(cache) == 11
    for start, stop in ((11, 12), (12, 15)):
        assert rel_error(ringed.decode(x[:, start:stop], cache, score=score), want[:, start:stop]) < FLOAT64_LIMIT
    with pytest.raises(ValueError, match="seq_len=11 says how much goes into a cache, and there is none"):
        ringed(padded, seq_len=11)
    with pytest.raises(ValueError, match="the cache was made for another Ring object than this"):
        ringed(padded, cache=ra.KVCache(ra.Ring.simulated(3, "zigzag")))


@pytest.mark.parametrize("filled", [0, 8])
@torch.no_grad()
def test_tokens_that_are_refused_are_not_in_the_cache(filled):
    ring = ra.Ring.simulated(2, "zigzag")
    plain, ringed = layers(ring)
    x, cache = torch.randn(1, 10, 24, dtype=torch.float64), ra.KVCache(ring)
    if filled:
        ringed(ring.shard(x[:, :filled]), cache=cache)
    refused = x[:, filled : filled + 2]
    for tokens in (refused, refused, *([] if filled else [refused.expand(3, -1, -1)])):
        with pytest.raises(ValueError, match="the documents add up to 99 positions"):
            ringed.decode(tokens, cache, mask=ra.Causal() & ra.Documents([99]))
        assert len(cache) == filled
    no_memory = patch.object(ringed.o_proj, "forward", side_effect=RuntimeError("out of memory"))
    with no_memory, pytest.raises(RuntimeError, match="out of memory"):
        ringed.decode(refused, cache)
    assert len(cache) == filled
    found = torch.cat([ringed.decode(x[:, n : n + 1], cache) for n in range(filled, 10)], 1)
    assert rel_error(found, plain(x)[:, filled:]) < FLOAT64_LIMIT


@pytest.mark.parametrize(("ring_size", "layout"), [(1, "zigzag"), (2, "striped"), (3, "zigzag"), (4, "contiguous")])
@pytest.mark.parametrize("options", [{}, {"window": 3, "full_every": 2}])
@torch.no_grad()
def test_logits_of_every_prompt_length_and_of_the_tokens_behind(ring_size, layout, options):
    plain, ringed = decoders(ra.Ring.simulated(ring_size, layout, hostile=True), **options)
    tokens = torch.randint(0, 11, (2, 4 * ring_size + 4))
    want = plain(tokens)
    for length in range(1, 4 * ring_size + 2):
        caches = ringed.new_caches()
        assert rel_error(prefill(ringed, tokens[:, :length], caches, mask=ra.Causal()), want[:, length - 1]) < FLOAT64_LIMIT
        for start, stop in ((length, length + 1), (length + 1, length + 3)):
            assert rel_error(ringed.decode(tokens[:, start:stop], caches), want[:, start:stop]) < FLOAT64_LIMIT
        assert [len(cache) for cache in caches] == [length + 3] * 2


@pytest.mark.parametrize(("full_every", "reach"), [(None, 12), (3, 20), (2, 20)])
def test_blocks_see_their_window_and_every_so_many_all(full_every, reach):
    """Over 3 blocks with windows of 4 a token comes 12 positions far; where one of them sees all, to the last of 20."""
    _, ringed = decoders(ra.Ring.simulated(2, "zigzag"), num_layers=3, window=4, full_every=full_every)
    tokens = torch.arange(20).unsqueeze(0) % 11
    other = tokens.clone()
    other[:, 0] = 5
    ring = ringed.blocks[0].attention.ring
    logits = [ring.unshard(ringed(ring.shard(x))) for x in (tokens, other)]
    differ = (logits[0] - logits[1]).abs().amax(-1)[0] > 1e-9
    assert differ.nonzero().max() == min(reach, 19)


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_blocks_with_windows_compile(checkpoint_blocks):
    _, ringed = decoders(ra.Ring.simulated(2, "zigzag"), window=3, full_every=2, checkpoint_blocks=checkpoint_blocks)
    tokens = torch.randint(0, 11, (1, 16))
    for mask in (ra.Causal(), ra.Causal() & ra.Window(5)):
        found = torch.compile(ringed, fullgraph=not checkpoint_blocks, backend="aot_eager")(tokens, mask=mask)
        assert rel_error(found, ringed(tokens, mask=mask)) < FLOAT64_LIMIT


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("ring_size", "layout"), [(1, "contiguous"), (3, "zigzag"), (4, "striped")])
def test_the_tokens_are_those_of_one_device_without_a_cache(temperature, ring_size, layout):
    plain, ringed = decoders(ra.Ring.simulated(ring_size, layout, hostile=True))
    prompt = torch.randint(0, 11, (3, 9))
    found = generate(ringed, prompt, 20, temperature=temperature, generator=torch.Generator().manual_seed(1))
    want = dense_generate(plain, prompt, 20, temperature, torch.Generator().manual_seed(1))
    assert torch.equal(found, want) and torch.equal(generate(ringed, prompt, 1), dense_generate(plain, prompt, 1))
    assert len(found[:, 9:].unique()) > 2


def test_prompts_of_two_lengths_with_padding_on_the_left():
    plain, ringed = decoders(ra.Ring.simulated(2, "zigzag", hostile=True))
    prompt = torch.randint(0, 11, (2, 9))
    found = generate(ringed, prompt, 12, mask=ra.KeyPadding(starts=[0, 3]))
    assert torch.equal(found[:1], dense_generate(plain, prompt[:1], 12))
    assert torch.equal(found[1:, 3:], dense_generate(plain, prompt[1:, 3:], 12))


def test_a_prefill_is_sharded_and_reads_no_logits():
    _, ringed = decoders(ra.Ring.simulated(2, "zigzag"))
    heads = []
    ringed.head.register_forward_hook(lambda module, inputs, output: heads.append(output.shape[1]))
    with patch.object(ringed, "hidden", wraps=ringed.hidden) as hidden:
        generate(ringed, torch.randint(0, 11, (1, 103)), 3)
    assert [call.args[0].shape for call in hidden.call_args_list] == [(1, 100)]
    assert heads == [3, 1, 1]


@pytest.mark.parametrize("wrong", ["position", "prefill"])
def test_sabotage_is_noticed(wrong):
    """Rotary positions one off, and a prefill that leaves its cache empty."""
    plain, ringed = decoders(ra.Ring.simulated(2, "zigzag"))
    prompt = torch.randint(0, 11, (1, 9))
    project, extend = ra.RingSelfAttention._project, ra.KVCache.extend

    def late(self, x, positions):
        return project(self, x, positions + (x.shape[1] == 1))

    broken = {
        "position": patch.object(ra.RingSelfAttention, "_project", late),
        "prefill": patch.object(ra.KVCache, "extend", lambda self, k, v, **options: extend(self, k * 0, v, **options)),
    }
    with broken[wrong], torch.no_grad():
        found = prefill(ringed, prompt, ringed.new_caches(), mask=ra.Causal())
    assert rel_error(found, plain(prompt)[:, -1]) > 1e-6


@pytest.mark.parametrize(
    ("prompt", "num_tokens", "options", "message"),
    [
        (torch.zeros(1, 0), 1, {}, r"the prompt must be \[batch, tokens\] with at least one token, got \(1, 0\)"),
        (torch.zeros(4), 1, {}, r"the prompt must be \[batch, tokens\]"),
        (torch.zeros(1, 4), 0, {}, r"num_tokens must be at least 1, got 0"),
        (torch.zeros(1, 4), 1, {"temperature": -1.0}, r"temperature must be at least 0 and finite, got -1.0"),
        (torch.zeros(1, 4), 1, {"temperature": float("nan")}, r"temperature must be at least 0 and finite, got nan"),
    ],
)
def test_what_cannot_be_generated_is_named(prompt, num_tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate(Decoder(CONFIG), prompt.long(), num_tokens, **options)


def test_a_cache_is_filled_without_gradient():
    layer = ra.RingSelfAttention(8, 2)
    with pytest.raises(NotImplementedError, match="a KVCache passes no gradient on"):
        layer(torch.randn(1, 4, 8), cache=ra.KVCache(layer.ring))
    with pytest.raises(NotImplementedError, match="a KVCache passes no gradient on"):
        layer.decode(torch.randn(1, 1, 8), ra.KVCache(layer.ring))


@torch.no_grad()
def test_what_is_compiled_leaves_caches_to_python():
    """More blocks and tokens than there may be graphs, if one were made for each."""
    ring = ra.Ring.simulated(2)
    _, model = decoders(ring, num_layers=9, window=5)
    tokens, found = torch.randint(0, 11, (3, 17)), []
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for compiled in (False, True):
            run, decode = (torch.compile(f, backend="eager") if compiled else f for f in (model.hidden, model.decode))
            for rows, stop in ((tokens[:2], 17), (tokens[2:], 9)):
                caches = model.new_caches()
                run(ring.shard(rows[:, :8]), caches=caches)
                found.append(torch.cat([decode(rows[:, n : n + 1], caches) for n in range(8, stop)], 1))
    assert all(map(torch.equal, found[:2], found[2:]))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Message: caches, and what decodes over them, stay out of graphs"):
        torch.compile(lambda q: ra.tree_decode(q, caches[0], ring=ring), backend="eager", fullgraph=True)(
            torch.randn(1, 1, 4, 6, dtype=torch.float64)
        )
