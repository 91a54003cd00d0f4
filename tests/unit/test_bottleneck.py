"""The method's claims (paper section 3.2), on tiny random models of the real classes, against plain transformers."""

import random

import oracles
import pytest
import torch
from oracles import random_samples
from transformers import AutoModel, AutoModelForCausalLM

from lbr_dist.model import attention
from lbr_dist.model.layout import Sample, pack

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
every_model = pytest.mark.parametrize(("family", "tied"), [(f, t) for f in FAMILIES for t in (True, False)])


def packed(samples, **options):
    return pack(samples, **{"bottleneck_vectors": 3, "hide_x": True, **options})


def reference(model, path, samples, *, hide_x, causal=True):
    """Logits and last hidden states of plain transformers, with its own eager attention and a 4-D additive mask."""
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    z = None if model.z is None else model.z.detach().clone().requires_grad_()
    embeds = oracles.embed(samples, plain.get_input_embeddings().weight, z)
    mask = oracles.additive(oracles.visible(samples, hide_x=hide_x, causal=causal))
    out = plain.model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=oracles.positions(samples), use_cache=False
    )
    return plain, z, out.last_hidden_state[0]


def assert_same_gradients(model, plain, z):
    own = dict(model.causal_lm.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=2e-5, msg=name)
    if z is not None:
        torch.testing.assert_close(model.z.grad, z.grad, rtol=1e-4, atol=2e-5)


@every_model
@pytest.mark.parametrize("hide_x", [True, False])
def test_loss_and_gradients_equal_transformers_with_a_dense_mask(tiny_lbr, tiny_model_dir, family, tied, hide_x):
    model = tiny_lbr(family, tied, tokens=3)
    samples = random_samples(random.Random(11), 7)
    loss = model(packed(samples, hide_x=hide_x), "generate")
    loss.backward()
    plain, z, hidden = reference(model, tiny_model_dir(family, tied), samples, hide_x=hide_x)
    expected = torch.cat(oracles.token_losses(samples, plain.lm_head(hidden))).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(packed(samples, hide_x=hide_x), "hidden"), hidden, rtol=1e-4, atol=1e-4)
    assert_same_gradients(model, plain, z)


@every_model
def test_packed_equals_unpacked_sample_by_sample(tiny_lbr, family, tied):
    model = tiny_lbr(family, tied, tokens=3)
    samples = random_samples(random.Random(12), 9)
    alone = [model(packed([s]), "generate") for s in samples]
    torch.stack(alone).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    hidden = torch.cat([model(packed([s]), "hidden") for s in samples])
    torch.testing.assert_close(model(packed(samples), "hidden"), hidden, rtol=1e-4, atol=1e-4)
    model.zero_grad()
    model(packed(samples), "generate").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_sample_is_transformers_ordinary_causal_forward(tiny_lbr, tiny_model_dir, family):
    """The paper's GL baseline: no Z, Y sees X."""
    model = tiny_lbr(family, tokens=0)
    assert model.z is None
    samples = [Sample([5, 6, 7, 8], 0, [9, 10, 11]), Sample([4], 0, [12])]
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family))
    expected = torch.zeros(())
    for s in samples:
        labels = [-100] * len(s.x) + list(s.y)
        ids = torch.tensor([[*s.x, *s.y]])
        expected = expected + plain(input_ids=ids, labels=torch.tensor([labels])).loss * len(s.y)
    loss = model(packed(samples, bottleneck_vectors=0, hide_x=False), "generate")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


class HoldKeys:
    """The CPU backend, with the keys and values of some rows replaced by those of an earlier pass."""

    def __init__(self, rows):
        self.rows, self.held, self.layer, self.replay = rows, [], 0, False

    def __call__(self, q, k, v, segments, scaling):
        if self.replay:
            held_k, held_v = self.held[self.layer % len(self.held)]
            k, v = k.index_copy(0, self.rows, held_k), v.index_copy(0, self.rows, held_v)
        else:
            self.held.append((k[self.rows], v[self.rows]))
        self.layer += 1
        return attention.padded_sdpa(q, k, v, segments, scaling)


@pytest.mark.parametrize("hide_x", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_x_reaches_y_through_z_alone(tiny_lbr, monkeypatch, family, hide_x):
    model = tiny_lbr(family, tokens=2)
    before = packed(
        [Sample([5, 6, 7, 8], 2, [9, 10, 11]), Sample([4, 4], 1, [3, 9])], hide_x=hide_x, bottleneck_vectors=2
    )
    after = packed(
        [Sample([5, 99, 7, 8], 2, [9, 10, 11]), Sample([4, 4], 1, [3, 9])], hide_x=hide_x, bottleneck_vectors=2
    )
    y_rows = before.loss_positions_L + 1
    keys = HoldKeys(before.z_positions_N)
    monkeypatch.setitem(attention._BACKENDS, "sdpa", keys)
    hidden = model(before, "hidden")[y_rows]
    keys.replay = True
    with_z_held = model(after, "hidden")[y_rows]
    monkeypatch.undo()
    through_z = model(after, "hidden")[y_rows]
    assert (hidden[:3] - through_z[:3]).abs().max() > 1e-3
    assert torch.equal(hidden[3:], through_z[3:])  # the other sample
    if hide_x:
        assert torch.equal(hidden, with_z_held)
    else:
        assert (hidden[:3] - with_z_held[:3]).abs().max() > 1e-3  # the probe can fail


@pytest.mark.parametrize("family", FAMILIES)
def test_x_and_z_do_not_see_y(tiny_lbr, family):
    model = tiny_lbr(family, tokens=2)
    one = packed([Sample([5, 6, 7], 2, [9, 10])], bottleneck_vectors=2)
    other = packed([Sample([5, 6, 7], 2, [33, 44, 55, 66])], bottleneck_vectors=2)
    rows = slice(0, 5)
    # float32 rounding, which the shapes of matrix products change; a leak would be seen in the second decimal
    torch.testing.assert_close(model(one, "hidden")[rows], model(other, "hidden")[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bidirectional_equals_transformers_without_causality(tiny_lbr, tiny_model_dir, family):
    model = tiny_lbr(family, tokens=3)
    samples = random_samples(random.Random(13), 8, y=False)
    batch = packed(samples, causal=False)
    _, _, hidden = reference(model, tiny_model_dir(family), samples, hide_x=True, causal=False)
    torch.testing.assert_close(model(batch, "embed"), hidden[batch.pool_S], rtol=1e-4, atol=1e-4)
    assert (model(batch, "embed") - model(packed(samples), "embed")).abs().max() > 1e-2


@pytest.mark.parametrize("pooling", ["bottleneck", "last", "mean"])
@pytest.mark.parametrize("tokens", [0, 2])
def test_pooling(tiny_lbr, pooling, tokens):
    model = tiny_lbr("qwen3", tokens=tokens)
    samples = [Sample([5, 6, 7], tokens, [8]), Sample([9], tokens), Sample([4] * 6, tokens, [1, 2])]
    batch = packed(samples, bottleneck_vectors=tokens, hide_x=tokens > 0)
    hidden, pooled = model(batch, "hidden"), model(batch, "embed", pooling)
    for i, s in enumerate(samples):
        start = int(batch.starts_S[i])
        x = hidden[start : start + len(s.x)]
        expected = x.mean(0) if pooling == "mean" else hidden[start + len(s.x) + s.z - 1]
        torch.testing.assert_close(pooled[i], expected)


def test_mean_of_no_x_is_zero_and_has_no_nan_gradient(tiny_lbr):
    model = tiny_lbr("llama", tokens=1)
    pooled = model(packed([Sample([], 1), Sample([3, 4], 1)], bottleneck_vectors=1), "embed", "mean")
    pooled.sum().backward()
    assert pooled[0].abs().max() == 0
    assert torch.isfinite(model.z.grad).all()


@every_model
def test_embedding_equals_a_plain_model_with_z_as_added_tokens(tiny_lbr, tiny_model_dir, family, tied):
    """What an export relies on: [X ; Z] with Z as ordinary tokens, causal attention, last-token pooling."""
    model = tiny_lbr(family, tied, tokens=2)
    plain = AutoModel.from_pretrained(tiny_model_dir(family, tied))
    old = plain.get_input_embeddings().weight.detach()
    plain.resize_token_embeddings(len(old) + 2, mean_resizing=False)
    plain.get_input_embeddings().weight.data = torch.cat([old, model.z.detach()])
    texts = [[5, 6, 7], [], [9] * 40]
    ours = model(packed([Sample(x, 2) for x in texts], bottleneck_vectors=2), "embed")
    for x, vector in zip(texts, ours, strict=True):
        ids = torch.tensor([[*x, len(old), len(old) + 1]])
        torch.testing.assert_close(vector, plain(input_ids=ids).last_hidden_state[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(tiny_lbr, family):
    batch = packed(random_samples(random.Random(14), 5))
    gradients = []
    for on in (False, True):
        model = tiny_lbr(family, tokens=3, model={"activation_checkpointing": on}).train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == on
        model(batch, "generate").backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_every_parameter_gets_a_gradient_even_from_a_dummy(tiny_lbr):
    """Under ZeRO-3 a parameter without gradient would leave the other ranks waiting."""
    for tied in (True, False):
        model = tiny_lbr("llama", tied, tokens=1)
        model(packed([Sample([3], 1)], bottleneck_vectors=1), "generate").backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
