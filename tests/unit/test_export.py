import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from runs import make_run

from lbr_dist.errors import UserError
from lbr_dist.export.card import model_card
from lbr_dist.export.export import CHECK_TEXTS, export
from lbr_dist.export.tokens import fixed_tokens
from lbr_dist.inference.loading import load_encoder, load_run
from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.model.tokenizer import Tokenization

PLAIN = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lbr_dist":
            raise ImportError("lbr_dist is not to be used here")

sys.meta_path.insert(0, Blocker())
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

def look_at(folder, texts, question):
    model = SentenceTransformer(folder, trust_remote_code=False)
    options = {"batch_size": 16, "show_progress_bar": False}
    vectors = {
        "query": model.encode_query(texts, **options),
        "passage": model.encode_document(texts, **options),
        "alone": np.stack([model.encode(text, prompt_name="query", show_progress_bar=False) for text in texts[:20]]),
    }
    np.savez(folder + ".npz", **vectors)
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(question, return_tensors="pt")
    answer = lm.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    tokenizer.padding_side = "left"
    several = tokenizer([question, "x " * 30], return_tensors="pt", padding=True)
    batched = lm.generate(**several, max_new_tokens=8, do_sample=False)[0, several["input_ids"].shape[1] :]
    return {
        "prompt": inputs["input_ids"][0].tolist(),
        "answer": answer.tolist(),
        "batched": batched.tolist(),
        "z": [i for i in range(lm.config.vocab_size) if "lbr_z" in str(tokenizer.convert_ids_to_tokens(i))],
        "max": model.max_seq_length,
    }


given = json.load(open(sys.argv[1]))
seen = {folder: look_at(folder, given["texts"], given["question"]) for folder in given["folders"]}
json.dump(seen, open(sys.argv[1], "w"))
"""

SCRIPTS = [
    "aspirin is a salicylate drug", "糖尿病是一种代谢性疾病", "السكري مرض", "मधुमेह रोग", "糖尿病は疾患です",
    "Überfunktion ciężka ÉTAT", "🧪 H₂O → CO₂", "def add(a, b):\n    return a + b", "лихорадка и боль", "โรคเบาหวาน",
]  # fmt: skip


def two_hundred():
    rng = np.random.default_rng(0)
    made = ["", " ", "\n", "a", "very long " * 4000, "糖" * 5000]
    while len(made) < 200:
        made.append(" ".join(rng.choice(SCRIPTS, rng.integers(1, 12))))
    return made


def in_sentence_transformers(folders, file, texts, question="What is aspirin?"):
    """Vectors and generated tokens of each folder, from a process that cannot import lbr_dist."""
    file.write_text(json.dumps({"folders": list(map(str, folders)), "texts": texts, "question": question}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PLAIN, str(file)], env=environment, capture_output=True, timeout=550)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return [(dict(np.load(f"{folder}.npz")), seen) for folder, seen in json.loads(file.read_text()).items()]


def greedy(loaded, prompt_ids, count, steps):
    """Greedy continuation of [X Z] with full attention, Z given as vectors; computed without an export."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(loaded.model_dir)).eval()
    model.load_state_dict(loaded.model.causal_lm.state_dict())
    embed = model.get_input_embeddings()
    rows, answer = torch.cat([embed(torch.tensor(prompt_ids)), loaded.model.z[-count:].detach()]), []
    for _ in range(steps):
        with torch.no_grad():
            answer.append(int(model(inputs_embeds=rows[None]).logits[0, -1].argmax()))
        if answer[-1] == 0:  # end of sequence
            break
        rows = torch.cat([rows, embed(torch.tensor(answer[-1:])).detach()])
    return answer


INSTRUCTIONS = {"query_instruction": "Find the answer:\n", "passage_instruction": ""}


CASES = [
    ("llama", True, {"contrastive": INSTRUCTIONS}),
    ("mistral", False, {}),
    ("qwen2", False, {"contrastive": {"passage_instruction": "A passage:\n"}}),
    # 20 bottleneck tokens do not fit into the 16 spare rows of the tiny vocabulary: the matrix must grow
    ("qwen3", True, {"bottleneck": {"tokens": 20}, "model": {"lora": {"r": 4}}, "contrastive": INSTRUCTIONS}),
]


@pytest.mark.timeout(600)
def test_exports_agree_with_their_runs_without_lbr_dist(tmp_path, tiny_model_dir):
    texts, runs, folders = two_hundred(), [], []
    for family, tied, settings in CASES:
        runs.append(make_run(tmp_path / family, tiny_model_dir(family, tied=tied), **settings))
        folders.append(export(runs[-1], tmp_path / f"exported-{family}"))
    for run, (vectors, plain) in zip(runs, in_sentence_transformers(folders, tmp_path / "job", texts), strict=True):
        loaded = load_run(run)
        encoder, count = loaded.encoder(), loaded.recipe.bottleneck.count
        for side in ("query", "passage"):
            cosine = (vectors[side] * encoder.encode(texts, side)).sum(1)
            assert cosine.min() >= 0.9999, (run.name, side, texts[cosine.argmin()][:40])
        assert (vectors["alone"] * vectors["query"][:20]).sum(1).min() >= 0.9999
        assert plain["max"] == 48 + count
        assert len(plain["z"]) == count
        assert plain["prompt"][-count:] == plain["z"]
        if loaded.recipe.model.lora is None:
            assert plain["answer"] == greedy(loaded, plain["prompt"][:-count], count, 8)
        assert plain["batched"][: len(plain["answer"])] == plain["answer"]
        assert not set(plain["answer"]) & set(plain["z"])


@pytest.mark.parametrize("scaling", [{}, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}])
def test_rotary_positions_are_told_as_transformers_4_reads_them(tmp_path, scaling):
    """It knows `rope_theta` and `rope_scaling` alone, and takes a base of 10,000 where there is none."""
    from conftest import make_model
    from transformers import AutoConfig

    base = make_model(tmp_path / "base", "llama")
    settings = json.loads((base / "config.json").read_text())
    if scaling:
        scaling = {"rope_type": "llama3", "original_max_position_embeddings": 64, **scaling}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5, **scaling}
    (base / "config.json").write_text(json.dumps(settings))
    out = export(make_run(tmp_path / "run", base), tmp_path / "exported")
    told = json.loads((out / "config.json").read_text())
    assert told["rope_theta"] == 5e5
    assert told.get("rope_scaling", {}) == scaling
    assert AutoConfig.from_pretrained(out).rope_parameters == settings["rope_parameters"]


def test_a_tokenizer_with_bos_keeps_it_in_front(tmp_path):
    from conftest import make_model, make_tokenizer

    base = make_model(tmp_path / "base", "llama")
    make_tokenizer(base, bos=True)
    run = make_run(tmp_path / "run", base)
    out = export(run, tmp_path / "exported")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"]) == ["<|bos|>", "<|lbr_z_0|>", "<|lbr_z_1|>"]
    cut = tokenizer("long " * 500, truncation=True)["input_ids"]
    assert len(cut) == 50
    assert tokenizer.convert_ids_to_tokens(cut[:1] + cut[-2:]) == ["<|bos|>", "<|lbr_z_0|>", "<|lbr_z_1|>"]
    assert tokenizer.decode(tokenizer("pain")["input_ids"], skip_special_tokens=True) == "pain"


def respell(base, change):
    """Rewrite a base's tokenizer without any special token; `change` gives each id another."""
    saved = json.loads((base / "tokenizer.json").read_text())
    saved["added_tokens"] = []
    saved["model"]["vocab"] = {name: change(i) for name, i in saved["model"]["vocab"].items()}
    (base / "tokenizer.json").write_text(json.dumps(saved))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


@pytest.mark.parametrize(("rows", "tied"), [(416, True), (402, False), (400, True)])
@pytest.mark.parametrize("bottleneck", [{"tokens": 2}, {"enabled": False}])
def test_padding_is_no_word_that_texts_have(tmp_path, rows, tied, bottleneck):
    """Of a tokenizer without special tokens; as one, a word would be cut out of the texts."""
    from conftest import make_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_model(tmp_path / "base", "llama", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    model.save_pretrained(base)
    respell(base, lambda i: {0: 3, 3: 0}.get(i, i))  # id 0 is then "!"
    contrastive = {"pooling": "bottleneck" if "tokens" in bottleneck else "last"}
    run = make_run(tmp_path / "run", base, bottleneck=bottleneck, contrastive=contrastive)
    out = export(run, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).pad_token == "<|lbr_pad|>"
    assert Tokenization.load(str(out)).fingerprint == Tokenization.load(str(base)).fingerprint
    texts = ["wow!! great!!!", "no!", "a much longer text than these!"]
    cosine = (load_encoder(str(run), "cpu").encode(texts) * load_encoder(str(out), "cpu").encode(texts)).sum(1)
    assert cosine.min() >= 0.9999


def test_bottleneck_tokens_take_no_word_s_id(tmp_path):
    """Behind a gap in the ids there are words beyond the number of entries."""
    from conftest import make_model

    base = make_model(tmp_path / "base", "llama")
    respell(base, lambda i: i + 14 * (i >= 300))
    run = make_run(tmp_path / "run", base)
    out = export(run, tmp_path / "out")
    own, exported = Tokenization.load(str(base)), Tokenization.load(str(out))
    assert exported.fingerprint == own.fingerprint
    assert exported.vocabulary == own.vocabulary + 3  # two, and padding
    texts = [own.decode([i]) for i in range(395, own.vocabulary)]
    cosine = (load_encoder(str(run), "cpu").encode(texts) * load_encoder(str(out), "cpu").encode(texts)).sum(1)
    assert cosine.min() >= 0.9999


def test_an_exported_tokenizer_that_differs_is_refused_by_the_token(tmp_path, tiny_model_dir, monkeypatch):
    from lbr_dist.export import folder as export_folder

    write = export_folder.write_tokenizer

    def damaged(source, out, **options):
        answer = write(source, out, **options)
        saved = json.loads((out / "tokenizer.json").read_text())
        saved["model"]["merges"] = saved["model"]["merges"][:-1]
        (out / "tokenizer.json").write_text(json.dumps(saved))
        return answer

    monkeypatch.setattr(export_folder, "write_tokenizer", damaged)
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))
    with pytest.raises(UserError, match=r"the exported tokenizer gives '.+' other tokens than that of the run"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_generation_never_says_a_bottleneck_token(tmp_path, tiny_model_dir, tied):
    """Z rows that win every argmax if they may: what tying makes of long vectors."""
    run = make_run(tmp_path / "run", tiny_model_dir("llama", tied=tied))
    loaded = load_run(run)
    out = export(run, tmp_path / "exported")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer.convert_tokens_to_ids(["<|lbr_z_0|>", "<|lbr_z_1|>"])
    inputs = tokenizer("pain", return_tensors="pt")
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state[0, -1]
        model.get_output_embeddings().weight[ids] = hidden * 100
        assert int(model(**inputs).logits[0, -1].argmax()) in ids
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert not set(said.tolist()) & set(ids)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().weight[ids], loaded.model.z.detach()
    )


@pytest.mark.parametrize("other", [[5, 7], None])
def test_generation_ends_where_answers_end(tmp_path, tiny_model_dir, other):
    """At the tokenizer's end of sequence, which training puts behind Y, whatever the files of the base name."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir("qwen3"), base)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**settings, "eos_token_id": other}))
    out = export(make_run(tmp_path / "run", base), tmp_path / "exported")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("pain", return_tensors="pt")
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state[0, -1]
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = hidden * 100
        said = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said.tolist() == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "contrastive", [{"pooling": "last"}, {"pooling": "mean"}, {"pooling": "mean", "attention": "bidirectional"}]
)
def test_baselines_export_too(tmp_path, tiny_model_dir, contrastive):
    run = make_run(tmp_path / "run", tiny_model_dir("qwen3"), bottleneck={"enabled": False}, contrastive=contrastive)
    out = export(run, tmp_path / "exported")
    texts = two_hundred()[1:60]
    mine, plain = load_encoder(str(run), "cpu"), load_encoder(str(out), "cpu")
    assert (mine.encode(texts) * plain.encode(texts)).sum(1).min() >= 0.9999
    assert "lbr_z" not in (out / "tokenizer.json").read_text()


def test_mean_pooling_over_x_needs_no_bottleneck_tokens(tmp_path, tiny_model_dir):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"), contrastive={"pooling": "mean"})
    out = export(run, tmp_path / "exported")
    texts = ["aspirin", "fever of unknown origin"]
    cosine = (load_encoder(str(run), "cpu").encode(texts) * load_encoder(str(out), "cpu").encode(texts)).sum(1)
    assert cosine.min() >= 0.9999


def test_bfloat16_halves_the_weights_and_nearly_agrees(tmp_path, tiny_model_dir):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))
    single, half = export(run, tmp_path / "single"), export(run, tmp_path / "half", dtype="bfloat16")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (single, half)]
    assert sizes[1] < 0.6 * sizes[0]
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "settings", [{"attention": "flex"}, {"attention": "varlen", "dtype": "bfloat16"}], ids=lambda s: s["attention"]
)
def test_a_run_that_a_gpu_trained_is_exported_with_its_own_recipe(tmp_path, tiny_model_dir, settings):
    """On a CPU, which has neither those kernels nor a fast bfloat16."""
    run = make_run(tmp_path / "run", tiny_model_dir("llama"), model=settings)
    out = export(run, tmp_path / "out", tokens=2)
    assert load_encoder(str(run), "cpu").encode(["aspirin"]).shape == (1, 32)
    recipe = yaml.safe_load((out / "lbr_recipe.yaml").read_text())
    assert {name: recipe["model"][name] for name in settings} == settings
    assert all(f"  {name}: {value}" in (out / "README.md").read_text() for name, value in settings.items())


def test_a_damaged_model_is_refused(tmp_path, tiny_model_dir, monkeypatch):
    """Its vectors are no numbers: they agree with nothing."""
    start = LbrModel.build

    def damaged(*args, **options):
        model = start(*args, **options)
        model.z.data[0, 0] = torch.nan
        return model

    monkeypatch.setattr(LbrModel, "build", damaged)
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))
    with pytest.raises(UserError, match=r"its embedding of '' is not finite: the model is damaged"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ratio_mode_says_what_it_needs(tmp_path, tiny_model_dir, monkeypatch):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"), bottleneck={"ratio": 10, "max_tokens": 4})
    with pytest.raises(UserError, match=r"bottleneck.ratio=10 .* 1 to 4 .* --tokens N"):
        export(run, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(LbrModel, "restore", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(UserError, match="--tokens 5"):
            export(run, tmp_path / "out", tokens=5)
    assert not any(tmp_path.glob(".out*"))
    out = export(run, tmp_path / "out", tokens=1)
    short = ["aspirin", "pain"]  # at most 10 tokens: one bottleneck token in the run too
    cosine = (load_encoder(str(run), "cpu").encode(short) * load_encoder(str(out), "cpu").encode(short)).sum(1)
    assert cosine.min() >= 0.9999


def test_a_ratio_that_never_gives_more_than_one_token_is_a_fixed_number(tmp_path, tiny_model_dir):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"), bottleneck={"ratio": 500})
    assert fixed_tokens(load_run(run).recipe) == 1
    out = export(run, tmp_path / "out")
    assert "<|lbr_z_0|>" in (out / "tokenizer.json").read_text()
    assert "<|lbr_z_1|>" not in (out / "tokenizer.json").read_text()


def test_mean_over_x_beside_bidirectional_bottleneck_is_refused(tmp_path, tiny_model_dir):
    run = make_run(
        tmp_path / "run", tiny_model_dir("llama"), contrastive={"pooling": "mean", "attention": "bidirectional"}
    )
    with pytest.raises(UserError, match="lbr encode"):
        export(run, tmp_path / "out")


def test_bidirectional_attention_with_bottleneck_is_exported(tmp_path, tiny_model_dir):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"), contrastive={"attention": "bidirectional"})
    out = export(run, tmp_path / "out")
    texts = two_hundred()[1:40]
    mine, plain = load_encoder(str(run), "cpu"), load_encoder(str(out), "cpu")
    assert (mine.encode(texts) * plain.encode(texts)).sum(1).min() >= 0.9999


def test_attention_is_the_run_s_and_not_the_base_s(tmp_path, tiny_model_dir):
    """A causal run on an export of a bidirectional one, which says so in its configuration."""
    first = make_run(tmp_path / "first", tiny_model_dir("llama"), contrastive={"attention": "bidirectional"})
    base = export(first, tmp_path / "base")
    assert json.loads((base / "config.json").read_text())["is_causal"] is False
    run = make_run(tmp_path / "run", base)
    out = export(run, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["is_causal"] is True
    texts = two_hundred()[6:40]
    cosine = (load_encoder(str(run), "cpu").encode(texts) * load_encoder(str(out), "cpu").encode(texts)).sum(1)
    assert cosine.min() >= 0.9999


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, tiny_model_dir, monkeypatch):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(run, taken)
    for out in (taken / "file", taken / "file" / "out"):
        with pytest.raises(UserError, match=r"export to .*: (it is a file|cannot be made)"):
            export(run, out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"it is the current folder|not empty"):
        export(run, ".")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("lbr_dist.export.export.COSINE", {"float32": 1.1})
    with pytest.raises(UserError, match="another vector"):
        export(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert export(run, empty) == empty
    assert (empty / "modules.json").is_file()


@pytest.mark.parametrize("size", [1_000, 20_000])
def test_a_full_disk_is_told_in_one_line(tmp_path, tiny_model_dir, size):
    """Of tokenizer and weights, whose libraries have errors of their own; a file that may not grow is as good."""
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(UserError, match=r"export to .*out: File too large; nothing was left behind; free space"):
            export(run, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_the_command_says_where_the_export_lies_and_nothing_else(tmp_path, tiny_model_dir):
    """transformers imports DeepSpeed, which tells of a machine without a GPU."""
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))
    command = [sys.executable, "-m", "lbr_dist", "export", str(run), str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == (f"written: {tmp_path}/out\n", "")


def test_the_check_finds_a_tokenizer_that_joins_instruction_and_text(tmp_path):
    """A tokenizer without pre-tokenizer may merge across the seam; the run never does."""
    from conftest import make_model
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    base = make_model(tmp_path / "base", "llama")
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<e>", "<p>"], show_progress=False)
    tokenizer.train_from_iterator(["Q:\nWhat is it? Q:\nWhat is that? " * 9, *CHECK_TEXTS[:-1]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token="<p>").save_pretrained(base)
    run = make_run(tmp_path / "run", base, contrastive={"query_instruction": "Q:\n"})
    with pytest.raises(UserError, match=r"query 'What is it\?'.* at the query instruction"):
        export(run, tmp_path / "out")


def test_white_space_that_an_instruction_s_line_break_takes_is_told_and_not_refused(tmp_path, caplog):
    """`lbr encode` tokenizes the two apart."""
    from conftest import make_model

    base = make_model(tmp_path / "base", "llama")
    saved = json.loads((base / "tokenizer.json").read_text())
    saved["model"]["vocab"]["ĊĊ"] = 400  # a token of two line breaks
    saved["model"]["merges"].append(["Ċ", "Ċ"])
    (base / "tokenizer.json").write_text(json.dumps(saved))
    run = make_run(tmp_path / "run", base, contrastive={"query_instruction": "Find it\n"})
    out = export(run, tmp_path / "out")
    (record,) = caplog.records
    assert "out: behind an instruction, texts that begin with white space get another vector" in record.message
    card = (out / "README.md").read_text()
    assert "texts that begin with white space get another vector (cosine 0." in card
    assert "lowest cosine 1.0" in card or "lowest cosine 0.9999" in card
    mine, plain = load_encoder(str(run), "cpu"), load_encoder(str(out), "cpu")
    texts = ["\n\n  aspirin", "aspirin", "fever"]
    cosine = (mine.encode(texts, "query") * plain.encode(texts, "query")).sum(1)
    assert cosine[0] < 0.9999 <= cosine[1:].min()


def test_the_model_card_tells_data_recipe_and_scores(tmp_path, tiny_model_dir):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"), contrastive={"temperature": 0.07})
    results = {
        "data": {"name": "medicine", "fingerprint": "f", "queries": 10, "answers": 20, "passages": 25},
        "models": [{"name": "mine", "retrieval": {"ndcg_at_10": 0.1234, "recall_at_10": 0.5}}],
    }
    (run / "eval").mkdir()
    (run / "eval" / "eval.json").write_text(json.dumps(results))
    scores = run / "eval" / "eval.json"
    card = (export(run, tmp_path / "out", scores=scores) / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "sentence-transformers"
    for expected in (
        "domain, split cl",
        "temperature: 0.07",
        "| mine | 0.123 | 0.500 |",
        "step-000010",
        "last of 2 learned",
    ):
        assert expected in body, expected
    with pytest.raises(UserError, match="no such file"):
        export(run, tmp_path / "other", scores=tmp_path / "none.json")


def test_the_model_card_s_commands_name_the_folder_and_its_base_is_no_path(tmp_path, tiny_model_dir, monkeypatch):
    """A hub refuses a card with a path for `base_model`; a name for the folder is looked for on a hub."""
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))
    card = (export(run, "models/domain") / "README.md").read_text()
    assert "base_model" not in card.split("---\n", 2)[1]
    assert "# domain\n" in card
    named = [line for line in card.splitlines() if '("models/domain")' in line]
    assert len(named) == 3
    assert str(tmp_path) not in "".join(named)
    absolute = (export(run, tmp_path / "other") / "README.md").read_text()
    assert 'SentenceTransformer("other")' in absolute

    recipe = load_run(run).recipe
    given = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "Qwen/Qwen2.5-1.5B"})})
    facts = {"tokens": 1, "dtype": "float32", "agreement": 1.0, "spaced": None, "evaluation": None, "checkpoint": "c"}
    assert "base_model: Qwen/Qwen2.5-1.5B\n" in model_card(Path("domain"), given, **facts)


def test_scores_of_another_checkpoint_stay_off_the_model_card(tmp_path, tiny_model_dir, caplog):
    base = tiny_model_dir("llama")
    run = make_run(tmp_path / "run", base)
    results = {
        "data": {"name": "medicine", "fingerprint": "f", "queries": 10, "answers": 20, "passages": 25},
        "models": [{"name": "BM25"}, {"name": "mine", "checkpoint": load_encoder(str(run), "cpu").checkpoint}],
    }
    (run / "eval").mkdir()
    (run / "eval" / "eval.json").write_text(json.dumps(results))
    assert "## Scores" in (export(run, tmp_path / "same") / "README.md").read_text()
    assert not caplog.records
    make_run(run, base, step=20)
    assert "## Scores" not in (export(run, tmp_path / "newer") / "README.md").read_text()
    assert "eval/eval.json: not put on the model card: it did not measure step-000020; run `lbr eval`" in caplog.text


@pytest.mark.parametrize(
    ("exported", "measured", "shown"),
    [
        ("run", {"": "newer"}, ""),
        ("run", {"": "older", "step-000020": "newer"}, "step-000020"),
        ("run", {"": "newer", "step-000020": "newer"}, ""),
        ("older", {"": "older"}, ""),
        ("older", {"": "newer", "step-000010": "older", "step-000020": "newer"}, "step-000010"),
        ("older", {"": "older", "step-000010": "older"}, "step-000010"),
        ("older", {"": "newer", "step-000020": "newer"}, None),
    ],
)
def test_the_model_card_has_the_scores_of_its_checkpoint(tmp_path, tiny_model_dir, caplog, exported, measured, shown):
    """`lbr eval` leaves those of a checkpoint that it was given in a folder of their own."""
    run = tmp_path / "run"
    for step in (10, 20):
        make_run(run, tiny_model_dir("llama"), step=step)
    places = {"run": run, "older": run / "checkpoints" / "step-000010", "newer": run / "checkpoints" / "step-000020"}
    for folder, what in measured.items():
        found = {"name": "mine", "checkpoint": load_run(places[what]).encoder().checkpoint}
        data = {"name": f"data of {folder}", "fingerprint": "f", "queries": 10, "answers": 20, "passages": 25}
        (run / "eval" / folder).mkdir(parents=True, exist_ok=True)
        (run / "eval" / folder / "eval.json").write_text(json.dumps({"data": data, "models": [found]}))
    card = (export(places[exported], tmp_path / "out") / "README.md").read_text()
    assert (f"\ndata of {shown}: 10 held-out" in card) == (shown is not None) == ("## Scores" in card)
    assert ("run/eval/eval.json: not put on the model card" in caplog.text) == (shown is None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", r"--scores .*bad.json: not an evaluation that `lbr eval` wrote \(not JSON"),
        ("[]", r"not an evaluation .*the whole"),
        ('{"data": {"name": "x"}, "models": []}', "data.fingerprint: field required"),
    ],
)
def test_bad_scores_are_named_before_the_model_is_loaded(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "never-loaded", tmp_path / "out", scores=file)
    assert list(tmp_path.iterdir()) == [file]
