"""The README's examples run as they stand, and its tree names every module there is."""

import re
from pathlib import Path

import torch

import ring_attn as ra
from tests.dist.harness import run_processes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_simulated_ring():
    names: dict = {}
    exec(examples()[0], names)
    assert all(names[x].grad.isfinite().all() and names[x].grad.abs().sum() > 0 for x in "qkv")


def _torchrun(rank: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9))
    names = {"batch": torch.randint(0, 9, (1, 16)), "model": model}
    exec(re.sub(r"dist\.(init|destroy)_process_group\(\) ", "pass", examples()[1]), names)
    assert names["tokens"].shape == (1, 8) and names["positions"].tolist() == names["ring"].positions(16).tolist()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(names["batch"])[0, :-1], names["batch"][0, 1:]).backward()
    for got, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


def test_the_ring_of_processes():
    run_processes(_torchrun, 2)


def test_the_module():
    names: dict = {"torch": torch}
    exec(examples()[2], names)
    ring = ra.Ring.simulated(2)
    x = torch.randn(1, 16, 64)
    block = names["Block"](64, ring)
    assert block(x).shape == x.shape


def test_generating():
    ring, x = ra.Ring.simulated(2), torch.randn(1, 9, 2, 4)
    names = {"ring": ring, "k_local": ring.shard(x[:, :8]), "v_local": ring.shard(x[:, :8])}
    exec(examples()[3], names | {"q_new": x[:, 8:], "k_new": x[:, 8:], "v_new": x[:, 8:]}, names)
    want = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (x[:, 8:], x, x)))
    torch.testing.assert_close(names["out"], want.transpose(1, 2))


def test_packed_documents():
    ring, plain = ra.Ring.simulated(4), ra.RingSelfAttention(16, 2)
    layer = ra.RingSelfAttention(16, 2, ring=ring)
    layer.load_state_dict(plain.state_dict())
    names = {"ring": ring, "attention": layer, "x": torch.randn(1, 328, 16)}
    exec(examples()[4].replace("[9000, 500, 6884]", "[180, 10, 138]"), names)
    want = plain(names["x"], mask=ra.Causal() & ra.Documents([180, 10, 138]))
    torch.testing.assert_close(names["packed"].unshard(names["out"]), want)


def test_a_model_of_hugging_face():
    from tests.test_transformers import alone, model_of, tokens

    model, ring = model_of("Llama"), ra.Ring.simulated(2)
    wanted, _ = alone(model)
    names = {"model": model, "ring": ring, "tokens": tokens()}
    exec(examples()[5], names)
    torch.testing.assert_close(ring.unshard(names["logits"]), wanted)
    loss = torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    torch.testing.assert_close(names["loss"], loss)


def test_the_tree_names_every_module():
    tree = README[README.index("## The tree") :]
    for path in sorted((ROOT / "ring_attn").rglob("*.py")):
        name = path.stem
        shared = f"{name.split('_')[0]}_*.py" in tree
        assert name == "__init__" or re.search(rf"\b{name}\b", tree) or shared, f"{path.name} is missing from the README's tree"
