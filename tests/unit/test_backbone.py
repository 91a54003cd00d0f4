import json
import logging
import random
import shutil

import pytest
import torch
from oracles import random_samples
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lbr_dist.errors import UserError
from lbr_dist.model.bottleneck import LbrModel, initial_vectors
from lbr_dist.model.decoding import generate_answers
from lbr_dist.model.head import LossHead
from lbr_dist.model.layout import Sample, pack
from lbr_dist.recipes import parse_recipe


def recipe(path, tokens=2, x=200, **model):
    return parse_recipe(
        {
            "stage": "generative",
            "output": "unused",
            "model": {"path": str(path), **model},
            "data": {"sets": [{"path": "unused"}], "max_x_tokens": x, "max_y_tokens": 100, "bin_tokens": 8192},
            "bottleneck": {"tokens": tokens},
            "batch": {"global_batch": 1},
            "duration": {"steps": 1},
        },
        "test",
    )


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A copy of a tiny model that a test may spoil."""
    return shutil.copytree(tiny_model_dir("qwen2", False), tmp_path / "model")


def edit(path, **changes):
    saved = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**saved, **changes}))


def rewrite(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def refused(path, match, **options):
    with pytest.raises(UserError, match=match) as error:
        LbrModel.build(recipe(path, **options))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_not_a_model_folder(tmp_path):
    refused(tmp_path, "not a model folder")
    refused(tmp_path / "nowhere", "not a model folder")


def test_unsupported_family(folder):
    edit(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    refused(folder, "family gpt2 is not supported; use a model of llama, mistral, qwen2, qwen3")


def test_a_family_with_code_of_its_own_is_never_asked_for(folder, monkeypatch):
    """transformers asks on a terminal whether to run it, for a family that it does not know."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("was asked"))
    classes = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    edit(folder, auto_map=classes)
    LbrModel.build(recipe(folder))
    edit(folder, model_type="internlm9")
    (folder / "configuration_x.py").write_text("raise RuntimeError('was run')")
    refused(folder, "family internlm9 is not supported; use a model of llama, mistral, qwen2, qwen3")


def test_an_adapter_in_the_folder(folder):
    """transformers would put it on the weights, merged with it or not, and train nothing."""
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "has an adapter .* beside its weights.*a folder of its own, or move adapter_config.json away")
    (folder / "model.safetensors").unlink()
    refused(folder, "is an adapter .* without the weights that it belongs to; merge it")
    (folder / "config.json").unlink()
    refused(folder, "is an adapter .* without the weights that it belongs to; merge it")


def test_too_few_positions(folder):
    LbrModel.build(recipe(folder, x=410))  # 410 + 2 + 100 = 512, the model's
    refused(folder, "512 positions, but a sequence may take 513", x=411)


def test_sliding_window_shorter_than_a_sequence(folder):
    edit(
        folder, use_sliding_window=True, sliding_window=128, max_window_layers=0, layer_types=["sliding_attention"] * 2
    )
    refused(folder, "see 128 tokens back")


def test_mistral_has_a_sliding_window_in_all_layers_or_in_none(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir("mistral", False), tmp_path / "model")
    edit(folder, sliding_window=302)
    LbrModel.build(recipe(folder))
    refused(folder, "see 302 tokens back.*set sliding_window to null", x=201)
    edit(folder, sliding_window=None)
    LbrModel.build(recipe(folder, x=201))


def test_longrope_beyond_its_original_length(folder):
    """There a text's positions would depend on the texts that it is packed with."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 128, **factors}
    edit(folder, rope_parameters={**rope, "rope_theta": 10000.0})
    refused(folder, "a sequence of more than 128 tokens, and one may take 302")
    LbrModel.build(recipe(folder, x=26))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "weights cannot be loaded")


@pytest.mark.parametrize("tied", [True, False])
def test_cut_off_weights(tiny_model_dir, tmp_path, tied):
    folder = shutil.copytree(tiny_model_dir("qwen2", tied), tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(folder, "weights cannot be loaded")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    ],
)
def test_what_the_files_are_not_to_blame_for(folder, monkeypatch, error):
    def fail(*_, **options):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError) as raised:
        LbrModel.build(recipe(folder))
    assert raised.value is error


def test_a_missing_weight(folder):
    rewrite(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "1 weights are missing, the first is model.layers.1.mlp.up_proj.weight")


def test_an_embedder_without_its_head(folder):
    rewrite(folder, lambda weights: weights.pop("lm_head.weight"))
    refused(folder, "the first is lm_head.weight; name the language model that it was made of")


def test_weights_that_the_configuration_has_no_place_for(folder):
    """Another `attention_bias` is another function; layers that were left off on purpose are not missed."""
    rewrite(folder, lambda weights: weights.update({"model.layers.1.self_attn.o_proj.bias": torch.zeros(32)}))
    refused(folder, "no place for 1 of its weights, the first is model.layers.1.self_attn.o_proj.bias")
    edit(folder, num_hidden_layers=1, layer_types=["full_attention"])
    LbrModel.build(recipe(folder))


def test_a_head_that_is_tied_in_the_configuration_alone(tiny_model_dir, tmp_path):
    """transformers then trains two matrices or one, by the ZeRO stage, and a run is read back with one."""
    folder = shutil.copytree(tiny_model_dir("qwen2", True), tmp_path / "model")
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    other = {"lm_head.weight": torch.zeros(2, 2), "model.embed_tokens.weight": torch.ones(2, 2)}
    save_file(other, folder / "adapter_model.safetensors")  # of which nothing is read
    model = LbrModel.build(recipe(folder))  # two copies of one
    rewrite(folder, lambda weights: weights["lm_head.weight"].mul_(2))
    refused(folder, r"ties the head to the embedding \(tie_word_embeddings\), but its files hold another head")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "its files hold another head")
    trained = dict(model.named_parameters())  # as it could be before
    trained["backbone.lm_head.weight"] = 2 * trained["backbone.model.embed_tokens.weight"]
    with pytest.raises(UserError, match=r"weight backbone\.lm_head\.weight was trained apart"):
        model.load_weights(trained.items())


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_quantized_weights(folder, method):
    edit(folder, quantization_config={"quant_method": method, "bits": 4})
    refused(folder, rf"its weights are quantized \({method}\), which cannot be trained; use the model that")


def test_a_base_that_says_it_is_bidirectional_is_trained_causally(folder):
    """As the export of a bidirectional run does."""
    batch = pack(random_samples(random.Random(3), 4, vectors=2), bottleneck_vectors=2, hide_x=True)

    def outcome():
        model = LbrModel.build(recipe(folder))
        answers = generate_answers(model, [Sample([5, 6], 2)], eos_id=None, max_new_tokens=6)
        return model(batch, "generate"), model(batch, "embed"), answers

    plain = outcome()
    edit(folder, is_causal=False)
    for mine, before in zip(outcome(), plain, strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(before))


def test_lora_on_layers_that_do_not_exist(folder):
    refused(folder, "model.lora: does not fit", lora={"r": 2, "target_modules": ["no_such_layer"]})


@pytest.mark.parametrize("setting", ["target_modules", "train_modules"])
def test_a_name_in_lora_that_no_module_has_is_not_left_out_in_silence(folder, setting):
    refused(folder, rf"{setting}: no module is called nrm.*q_proj", lora={"r": 2, setting: ["q_proj", "nrm"]})


@pytest.mark.parametrize("end", ["embed_tokens", "model.embed_tokens", "lm_head"])
def test_lora_adapts_neither_embedding_nor_head(folder, end):
    refused(folder, f"{end} cannot have an adapter", lora={"r": 2, "target_modules": ["q_proj", end]})


@pytest.mark.filterwarnings("error::FutureWarning")
def test_lora_is_put_on_without_a_word(folder):
    """peft asks for a name that transformers 5.23 warns of, on every command with a run of adapters."""
    LbrModel.build(recipe(folder, lora={"r": 2}))


def test_lora_cannot_train_one_of_two_tied_weights(tiny_model_dir):
    path = tiny_model_dir("llama", True)
    refused(path, "embed_tokens is tied", lora={"r": 2, "train_modules": ["embed_tokens"]})


def test_lora_trains_adapters_z_and_named_modules_only(folder):
    model = LbrModel.build(recipe(folder, lora={"r": 2, "train_modules": ["embed_tokens"]}))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert "z" in trained
    others = {name for name in trained if "lora_" not in name and name != "z"}
    assert others == {"backbone.base_model.model.model.embed_tokens.modules_to_save.default.weight"}
    assert sum("lora_B" in name for name in trained) == 2 * 7


def test_lora_says_what_a_name_in_train_modules_matches(folder, caplog):
    caplog.set_level(logging.INFO, "lbr")
    LbrModel.build(recipe(folder, lora={"r": 2, "train_modules": ["norm"]}))
    (said,) = [record.getMessage() for record in caplog.records if "train_modules" in record.getMessage()]
    assert said.endswith("matches input_layernorm (2), post_attention_layernorm (2), norm (1)")


@pytest.mark.parametrize("whole", [["lm_head"], ["norm"], None])
def test_a_head_that_is_frozen_is_not_said_to_be_trained(folder, caplog, whole):
    model = LbrModel.build(recipe(folder, lora=whole and {"r": 2, "train_modules": whole}))
    caplog.clear()
    caplog.set_level(logging.INFO, "lbr")
    model.freeze_head()
    assert not any(weight.requires_grad for weight in model.causal_lm.lm_head.parameters())
    assert ["lm_head is frozen" in message for message in caplog.messages] == [True] * (whole == ["lm_head"])


def test_lora_starts_as_the_base_model_and_merges_to_a_plain_one(folder):
    batch = pack(random_samples(random.Random(1), 4), bottleneck_vectors=3, hide_x=True)
    plain = LbrModel.build(recipe(folder, tokens=3))
    model = LbrModel.build(recipe(folder, tokens=3, lora={"r": 2}))
    torch.testing.assert_close(model(batch, "generate"), plain(batch, "generate"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    trained = model(batch, "generate")
    assert abs(trained - plain(batch, "generate")) > 0.1
    model.backbone = model.backbone.merge_and_unload()
    torch.testing.assert_close(model(batch, "generate"), trained, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}


def test_adapters_are_the_same_on_every_rank(folder):
    states = []
    for draws in (0, 5):
        torch.manual_seed(draws)
        states.append(LbrModel.build(recipe(folder, lora={"r": 2})).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("tied", [True, False])
def test_state_names_and_sharing_survive_the_loss_head(tiny_model_dir, tied, tmp_path):
    path = tiny_model_dir("llama", tied)
    model = LbrModel.build(recipe(path))
    assert isinstance(model.causal_lm.lm_head, LossHead)
    assert (model.causal_lm.lm_head.weight is model.causal_lm.get_input_embeddings().weight) == tied
    assert all(name == "z" or name.startswith("backbone.") for name in model.state_dict())
    model.causal_lm.save_pretrained(tmp_path)
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "config.json").read_text()).get("_attn_implementation") is None


def test_bfloat16(folder):
    model = LbrModel.build(recipe(folder, dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = pack([Sample([5, 6], 2, [7])], bottleneck_vectors=2, hide_x=True)
    assert model(batch, "generate").dtype == torch.float32
    assert model(batch, "embed").dtype == torch.float32


def test_bfloat16_sums_the_gradient_of_z_over_any_number_of_texts(folder):
    """In bfloat16 a sum of equal numbers stands still at 256 of them."""
    model = LbrModel.build(recipe(folder, dtype="bfloat16"))
    lengths = []
    for count in (1, 1024):
        model.zero_grad()
        model(pack([Sample([5, 6], 2)] * count, bottleneck_vectors=2, hide_x=True), "embed").sum().backward()
        lengths.append(model.z.grad.float().norm())
    torch.testing.assert_close(lengths[1], 1024 * lengths[0], rtol=0.02, atol=0)


def test_z_starts_as_an_ordinary_token_from_the_seed():
    torch.manual_seed(0)
    embedding = torch.randn(5000, 64) * 0.3 + 0.5
    one, again, other = (initial_vectors(embedding, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert abs(one.mean() - 0.5) < 0.05
    assert abs(one.std() - 0.3) < 0.05


@pytest.mark.parametrize(("tied", "lora"), [(True, None), (False, None), (True, {"r": 2})])
def test_a_run_is_restored_from_its_weights_and_configuration_alone(tiny_model_dir, tmp_path, tied, lora):
    path = tiny_model_dir("qwen3", tied)
    model = LbrModel.build(recipe(path, lora=lora))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    weights = [(name, p.detach().float()) for name, p in model.named_parameters()]  # a tied weight comes once
    shutil.copy(path / "config.json", tmp_path)
    restored = LbrModel.restore(recipe("gone", lora=lora), str(tmp_path), weights)
    batch = pack(random_samples(random.Random(2), 4, vectors=2), bottleneck_vectors=2, hide_x=True)
    assert torch.equal(restored(batch, "generate"), model(batch, "generate"))
    with pytest.raises(UserError, match="has no weight z"):
        LbrModel.restore(recipe("gone", lora=lora), str(tmp_path), weights[1:])
    with pytest.raises(UserError, match=r"weight z of shape \(2, 32\) does not fit"):
        LbrModel.restore(recipe("gone", tokens=3, lora=lora), str(tmp_path), weights)
