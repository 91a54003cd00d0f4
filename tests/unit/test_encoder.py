import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from runs import make_run

from lbr_dist.errors import UserError
from lbr_dist.inference import encoder as module
from lbr_dist.inference.loading import check_output, is_run, load_encoder, load_run, model_fingerprint, pinned
from lbr_dist.inference.model_folder import EXPORT_FILES
from lbr_dist.model.batching import batches

WORDS = [
    "aspirin",
    "is",
    "a",
    "drug",
    "that",
    "relieves",
    "pain",
    "fever",
    "heart",
    "blood",
    "vessel",
    "def",
    "add",
    "return",
    "measles",
    "water",
    "糖尿病",
    "Ü",
]


def texts(count, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir):
    return make_run(
        tmp_path_factory.mktemp("run"),
        tiny_model_dir("qwen3", tied=False),
        contrastive={"query_instruction": "Find the answer:\n", "passage_instruction": ""},
    )


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    from lbr_dist.export.export import export

    return export(run, tmp_path_factory.mktemp("exports") / "export")


def one_by_one(loaded, text, side):
    """The definition: [bos] instruction text, cut, then Z; hidden state of the last Z; through plain transformers."""
    instruction = loaded.recipe.contrastive.query_instruction if side == "query" else ""
    ids = loaded.tokenization.bos + loaded.tokenization.encode([instruction])[0] + loaded.tokenization.encode([text])[0]
    ids = ids[: loaded.recipe.data.max_x_tokens]
    from transformers import AutoConfig, AutoModel

    plain = AutoModel.from_config(AutoConfig.from_pretrained(loaded.model_dir)).eval()
    state = {k.removeprefix("model."): v for k, v in loaded.model.causal_lm.state_dict().items() if "lm_head" not in k}
    plain.load_state_dict(state)
    embeds = torch.cat([plain.get_input_embeddings()(torch.tensor(ids, dtype=torch.long)), loaded.model.z])
    with torch.no_grad():
        last = plain(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0, -1]
    return (last / last.norm()).numpy()


@pytest.mark.parametrize("side", ["query", "passage"])
def test_vectors_are_those_of_plain_transformers(run, side):
    loaded = load_run(run)
    several = ["", "aspirin", "blood " * 100, *texts(5)]
    vectors = loaded.encoder().encode(several, side)
    assert vectors.dtype == np.float32
    for text, vector in zip(several, vectors, strict=True):
        assert vector == pytest.approx(one_by_one(loaded, text, side), abs=1e-5)


def test_vectors_do_not_depend_on_company_or_order(run, monkeypatch):
    encoder = load_run(run).encoder()
    many = texts(64)
    together = encoder.encode(many)
    order = np.random.default_rng(1).permutation(len(many))
    assert encoder.encode([many[i] for i in order]) == pytest.approx(together[order], abs=1e-5)
    monkeypatch.setattr(module, "CPU_MICRO_TOKENS", 100)
    assert encoder.encode(many) == pytest.approx(together, abs=1e-5)
    assert np.concatenate([encoder.encode([text]) for text in many]) == pytest.approx(together, abs=1e-5)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)


def test_sides_differ_by_their_instruction_and_cut_texts_are_counted(run):
    encoder = load_run(run).encoder()
    query, passage = encoder.encode(["aspirin"], "query"), encoder.encode(["aspirin"], "passage")
    assert np.abs(query - passage).max() > 1e-3
    assert np.array_equal(encoder.encode(["Find the answer:\naspirin"], "passage"), query)
    assert encoder.cut == 0
    encoder.encode(["blood " * 100, "blood"])
    assert encoder.cut == 1


def test_ratio_mode_gives_longer_texts_more_bottleneck_tokens(tmp_path, tiny_model_dir):
    run = make_run(tmp_path / "r", tiny_model_dir("llama"), bottleneck={"ratio": 10, "max_tokens": 4})
    encoder = load_run(run).encoder()
    long = "blood pain " * 20
    assert len(encoder.samples([long], "passage")[0].x) > 40 - 1
    free = encoder.encode([long, "a"])
    encoder.fixed_z = 1
    assert encoder.encode(["a"]) == pytest.approx(free[1:], abs=1e-5)
    assert np.abs(encoder.encode([long]) - free[:1]).max() > 1e-3
    encoder.fixed_z = 4
    assert encoder.encode([long]) == pytest.approx(free[:1], abs=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_baselines_without_bottleneck(tmp_path, tiny_model_dir, pooling, attention):
    run = make_run(
        tmp_path / "r",
        tiny_model_dir("qwen2"),
        bottleneck={"enabled": False},
        contrastive={"pooling": pooling, "attention": attention},
    )
    encoder = load_run(run).encoder()
    vectors = encoder.encode(["", "aspirin is", "pain is"])
    assert np.array_equal(vectors[0], np.zeros_like(vectors[0]))
    assert np.linalg.norm(vectors[1:], axis=1) == pytest.approx(1, abs=1e-5)
    if attention == "causal":
        reference = load_encoder(f"hf:{tiny_model_dir('qwen2')}?pooling={pooling}", "cpu")
        assert vectors[1:] == pytest.approx(reference.encode(["aspirin is", "pain is"]), abs=1e-5)


def test_hf_models_are_padded_right(tiny_model_dir):
    path = tiny_model_dir("llama")
    for pooling in ("mean", "last"):
        encoder = load_encoder(f"hf:{path}?pooling={pooling}&max_tokens=20", "cpu")
        many = texts(12)
        together = encoder.encode(many)
        assert encoder.cut > 0
        alone = np.concatenate([encoder.encode([text]) for text in many])
        assert together == pytest.approx(alone, abs=1e-5)
    assert np.array_equal(encoder.encode([""]), np.zeros((1, 32), dtype=np.float32))


def test_hf_models_cut_to_their_positions_and_no_others(tmp_path, tiny_model_dir):
    import transformers as hf

    small, behind, named, both, other = (tmp_path / name for name in ("gpt2", "roberta", "mpt", "t5", "t5-encoder"))
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model_dir("llama"))
    hf.GPT2Model(
        hf.GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=8, n_layer=1, n_head=1)
    ).save_pretrained(small)
    settings = hf.T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    hf.T5Model(settings).save_pretrained(both)
    hf.T5EncoderModel(settings).save_pretrained(other)
    settings = hf.MptConfig(vocab_size=len(tokenizer), max_seq_len=16, d_model=8, n_layers=1, n_heads=2)
    hf.MptModel(settings).save_pretrained(named)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    settings = hf.RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=18, pad_token_id=1, **sizes)
    hf.RobertaModel(settings).save_pretrained(behind)
    long = " ".join(texts(12))
    for folder in (small, behind, named, both, other):
        tokenizer.save_pretrained(folder)
    for folder in (small, behind, named):
        encoder = load_encoder(f"hf:{folder}?pooling=mean", "cpu")
        assert np.linalg.norm(encoder.encode([long])) == pytest.approx(1)
        assert (encoder.max_tokens, encoder.cut) == (16, 1)
    for folder in (both, other):
        with pytest.raises(UserError, match=r"is a t5, and not a causal language model of text alone"):
            load_encoder(f"hf:{folder}", "cpu")


def test_hf_models_that_say_they_have_no_limit_cut_to_none(tmp_path, tiny_model_dir):
    """XLNet has -1 positions."""
    from transformers import AutoTokenizer, XLNetConfig, XLNetModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir("llama"))
    tokenizer.save_pretrained(tmp_path)
    XLNetModel(XLNetConfig(vocab_size=416, d_model=8, n_layer=1, n_head=2, d_inner=8)).save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}?max_tokens=20", "cpu")
    assert np.linalg.norm(encoder.encode(texts(3)), axis=1) == pytest.approx(1)
    assert encoder.max_tokens == 20


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("ConvBert", {"embedding_size": 16}, "is a convbert, whose vector of a text depends on the texts beside it"),
        ("FNet", {}, "is a fnet, whose vector of a text depends on the texts beside it: name another model"),
        ("Nystromformer", {"num_landmarks": 8}, r"cannot read a text of \d+ tokens \(shape .*with &max_tokens=N"),
    ],
)
def test_hf_models_that_no_mask_keeps_to_one_text_are_refused(tmp_path, tiny_model_dir, family, sizes, message):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir("llama"))
    tokenizer.save_pretrained(tmp_path)
    settings = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **SIZES, **sizes)
    getattr(transformers, f"{family}Model")(settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model hf:{tmp_path}: {message}"):
        load_encoder(f"hf:{tmp_path}?pooling=mean", "cpu")


def test_an_hf_model_s_own_code_is_never_asked_for(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("was asked"))
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    own = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.X"}
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "internlm9", "auto_map": own}))
    with pytest.raises(UserError, match=r"hf:.*m: cannot be loaded .*contains custom code"):
        load_encoder(f"hf:{folder}", "cpu")


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_hf_models_have_the_template_of_their_tokenizer(tmp_path, tiny_model_dir, family, pooling):
    """`[CLS] text [SEP]`, and a long text loses its own end."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import processors

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir("llama"), model_max_length=24)
    special = [("<|bos|>", 2), ("<|endoftext|>", 0)]
    template = processors.TemplateProcessing(single="<|bos|> $A <|endoftext|>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    settings = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), max_position_embeddings=26, pad_token_id=1, initializer_range=0.5, **sizes
    )
    getattr(transformers, f"{family}Model")(settings).save_pretrained(tmp_path)
    words = Transformer(str(tmp_path))
    mode = {"mean": "mean", "last": "lasttoken"}[pooling]
    theirs = SentenceTransformer(modules=[words, Pooling(16, pooling_mode=mode)], device="cpu")
    encoder = load_encoder(f"hf:{tmp_path}?pooling={pooling}&max_tokens=24", "cpu")
    given = ["", *texts(12)]
    expected = theirs.encode(given, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(encoder.encode(given), expected, atol=1e-5)
    assert encoder.cut == sum(len(ids) > 22 for ids in encoder.tokenization.encode(given)) > 0


def test_batches_hold_every_row_once_and_keep_the_budget():
    lengths = np.random.default_rng(0).integers(0, 90, 1000)
    for padded in (False, True):
        made = list(batches(lengths, 64, padded))
        assert sorted(np.concatenate(made)) == list(range(1000))
        for rows in made:
            used = len(rows) * lengths[rows].max() if padded else lengths[rows].sum()
            assert used <= 64 or len(rows) == 1


def test_specifications(run, tiny_model_dir, tmp_path):
    checkpoint = run / "checkpoints" / "step-000010"
    assert is_run(run)
    assert is_run(checkpoint)
    assert not is_run(tiny_model_dir("llama"))
    assert load_encoder(str(run), "cpu").name == run.name
    assert load_encoder(str(checkpoint), "cpu").name == f"{run.name}@step-000010"
    assert model_fingerprint(str(run)) == model_fingerprint(str(checkpoint))
    with pytest.raises(UserError, match="say hf:"):
        load_encoder(str(tiny_model_dir("llama")), "cpu")
    with pytest.raises(UserError, match="expected hf:PATH"):
        load_encoder("hf:somewhere?pooling=max", "cpu")
    with pytest.raises(UserError, match="not a run, an export or a sentence-transformers model"):
        load_encoder(str(tmp_path / "nothing"), "cpu")
    with pytest.raises(UserError, match="nothing"):
        load_encoder(f"hf:{tmp_path / 'nothing'}", "cpu")
    with pytest.raises(UserError, match="no embeddings"):
        load_encoder("bm25")
    for device in ("gpu", "meta", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {device}: cannot be used"):
            load_encoder(str(run), device)


def test_a_pinned_run_stays_the_same_model(tmp_path, tiny_model_dir):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))
    assert pinned(f"{run}?dim=4") == f"{run}/checkpoints/step-000010?dim=4"
    before = pinned(str(run))
    make_run(run, tiny_model_dir("llama"), step=20)
    assert pinned(str(run)).endswith("step-000020")
    assert model_fingerprint(pinned(str(run))) == model_fingerprint(str(run)) != model_fingerprint(before)
    assert pinned("hf:x?pooling=mean") == "hf:x?pooling=mean"


def test_a_plain_model_is_loaded_whole_or_not_at_all(tmp_path, tiny_model_dir):
    """transformers makes missing weights up at random, and says so in a warning at most."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if "mlp" in name)
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"model hf:.*: 1 weights are missing, the first is .*{name[-20:]}"):
        load_encoder(f"hf:{tmp_path / 'model'}", "cpu")
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"model hf:.*: cannot be loaded"):
        load_encoder(f"hf:{tmp_path / 'model'}", "cpu")


def test_so_is_one_of_sentence_transformers(tmp_path, tiny_model_dir):
    from safetensors.torch import load_file, save_file
    from transformers import PreTrainedModel

    from lbr_dist.export.export import export

    folder = export(make_run(tmp_path / "run", tiny_model_dir("llama")), tmp_path / "export")
    load = PreTrainedModel.from_pretrained.__func__
    load_encoder(str(folder), "cpu")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if "mlp" in name)
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"model {folder}: 1 weights are missing, the first is .*{name[-20:]}"):
        load_encoder(str(folder), "cpu")
    assert PreTrainedModel.from_pretrained.__func__ is load


@pytest.mark.parametrize("name", EXPORT_FILES)
@pytest.mark.parametrize("harm", ["gone", "cut", "folder"])
def test_a_damaged_export_is_named_by_its_file_and_never_read_as_another_model(tmp_path, exported, name, harm):
    """Without its modules it would be a plain model, whose mean is another vector."""
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "folder":
        file.mkdir()
    reason = {"gone": "No such file", "cut": "not valid JSON", "folder": "Is a directory"}[harm]
    for spec in (str(folder), f"hf:{folder}?pooling=mean"):
        with pytest.raises(
            UserError, match=rf"damaged or incomplete export \({name}: {reason}.*\): copy it again"
        ) as told:
            load_encoder(spec, "cpu")
        assert "say hf:" not in str(told.value)


def test_what_a_library_says_of_a_model_of_modules_has_no_advice_on_plain_ones(tmp_path, exported):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"damaged or incomplete export \(.*\): copy it again or export again$"):
        load_encoder(str(folder), "cpu")
    (folder / "lbr_recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"model: cannot be loaded \(.*\)$"):
        load_encoder(str(folder), "cpu")
    (folder / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model: 1_Pooling/config.json: not valid JSON: .*: copy or download it"):
        load_encoder(str(folder), "cpu")


def test_a_tokenizer_that_cannot_pad_is_named(tmp_path, exported):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"incomplete export \(its tokenizer has no padding token\): copy it"):
        load_encoder(str(folder), "cpu")
    (folder / "lbr_recipe.yaml").unlink()
    remedy = re.escape('name one in its tokenizer_config.json: "pad_token": "<|endoftext|>"')
    with pytest.raises(UserError, match=f"its tokenizer has no padding token; {remedy}"):
        load_encoder(str(folder), "cpu")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|endoftext|>"}))
    assert load_encoder(str(folder), "cpu").encode(["a", "a longer text"]).shape == (2, 32)


@pytest.mark.parametrize("count", [0, 1, 32])
def test_an_export_s_text_without_a_token_is_zero_whatever_its_batch(tmp_path, tiny_model_dir, count):
    """sentence-transformers takes 32 texts at a time, and the shortest last."""
    from lbr_dist.export.export import export

    settings = {"bottleneck": {"enabled": False}, "contrastive": {"pooling": "mean", "query_instruction": "Q:\n"}}
    run = make_run(tmp_path / "run", tiny_model_dir("llama"), **settings)
    given = [*texts(count), ""]
    model = load_encoder(str(export(run, tmp_path / "export")), "cpu")
    for side in ("query", "passage"):
        vectors = model.encode(given, side)
        assert (vectors[-1] != 0).any() == (side == "query")
        np.testing.assert_allclose(vectors, load_encoder(str(run), "cpu").encode(given, side), atol=1e-5)


def write_at(file, content, seconds=10**9):
    """As what unpacks an archive whose files all have one time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    os.utime(file, (seconds, seconds))


@pytest.mark.parametrize("size", [3, 5 << 20, 130 << 20])
def test_a_model_is_another_by_what_its_files_hold(tmp_path, size):
    """Two exports of one run have the same sizes; of a large file 64 pieces are read."""
    file, seen = tmp_path / "m" / "model.safetensors", []
    for place in (None, 0, size // 2, size - 1):
        content = bytearray(size)
        if place is not None:
            content[place : place + size // 50 + 1] = b"1" * len(content[place : place + size // 50 + 1])
        write_at(file, content)
        seen += [model_fingerprint(f"hf:{tmp_path / 'm'}"), model_fingerprint(f"hf:{tmp_path / 'm'}")]
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) == 4


def test_a_model_is_another_by_what_links_lead_to(tmp_path):
    """As sentence-transformers reads its modules; a link that leads back is no endless way."""
    write_at(tmp_path / "words" / "model.safetensors", b"1")
    (tmp_path / "m" / "a").mkdir(parents=True)
    for link, place in (("0_Transformer", "words"), ("up", "."), ("b", "m/a"), ("a/b", "m/b"), ("a/none", "none")):
        (tmp_path / "m" / link).symlink_to(tmp_path / place)
    before = model_fingerprint(str(tmp_path / "m"))
    write_at(tmp_path / "words" / "model.safetensors", b"2")
    assert model_fingerprint(str(tmp_path / "m")) != before
    with pytest.raises(UserError, match=r"out: lies in the folder of model .*m, which every file"):
        check_output(str(tmp_path / "m"), tmp_path / "words" / "out")
    check_output(str(tmp_path / "m"), tmp_path / "out")


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_an_adapter_is_another_by_its_base(tmp_path, monkeypatch, place):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commits = tmp_path / "hub" / "models--clinic--tiny"
    seen = []
    for base in (str(tmp_path / "base"), "clinic/tiny"):
        settings = json.dumps({"base_model_name_or_path": base})
        write_at(tmp_path / "m" / place / "adapter_config.json", settings.encode())
        for content in ("1", "2"):
            write_at(tmp_path / "base" / "model.safetensors", content.encode())
            write_at(commits / "snapshots" / content / "config.json", b"{}")
            write_at(commits / "refs" / "main", content.encode())
            seen.append(model_fingerprint(f"hf:{tmp_path / 'm'}"))
    assert len(set(seen)) == 4
    shutil.copytree(tmp_path / "m", tmp_path / "hub" / "models--clinic--adapter" / "snapshots" / "1")
    write_at(tmp_path / "hub" / "models--clinic--adapter" / "refs" / "main", b"1")
    fetched = model_fingerprint("hf:clinic/adapter")
    write_at(commits / "refs" / "main", b"1")
    assert model_fingerprint("hf:clinic/adapter") != fetched


def test_a_hub_model_is_known_by_its_commit(tmp_path, monkeypatch):
    """As the hub's client keeps it: a folder for each commit, and the name of the newest."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    models = {"clinic/tiny": "config.json", "tiny": "modules.json"}
    seen = []
    for commit in ("a" * 40, "b" * 40):
        for place, file in zip(("clinic--tiny", "sentence-transformers--tiny"), models.values(), strict=True):
            snapshot, refs = (tmp_path / f"models--{place}" / name for name in (f"snapshots/{commit}", "refs"))
            snapshot.mkdir(parents=True)
            (snapshot / file).write_text("{}")
            refs.mkdir(exist_ok=True)
            (refs / "main").write_text(commit)
        seen += [model_fingerprint(spec) for spec in ("hf:clinic/tiny?pooling=last", "clinic/tiny", "tiny")]
    assert len(set(seen)) == 6
    assert model_fingerprint("clinic/tiny") == seen[4]


@pytest.mark.parametrize("spec", ["{}", "hf:{}?pooling=last"])
def test_models_of_others_are_loaded_and_run_without_a_word(run, tmp_path, capsys, spec):
    """An untied head is no part of an embedder, which transformers reports; bars do not belong into a log file."""
    import logging

    from transformers.utils import logging as theirs

    from lbr_dist.export.export import export

    folder = export(run, tmp_path / "export")
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    theirs.add_handler(handler)
    try:
        load_encoder(spec.format(folder), "cpu").encode(texts(3), "query", progress=True)
    finally:
        theirs.remove_handler(handler)
    assert not said
    assert "Batches" not in capsys.readouterr().err
