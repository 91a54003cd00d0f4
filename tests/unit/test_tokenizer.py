import dataclasses
import json
import pickle
import shutil

import pytest
from conftest import TINY_TEXTS, make_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lbr_dist.errors import UserError
from lbr_dist.model.tokenizer import Tokenization, z_token

TEXTS = ["aspirin relieves pain", "", "日本語 and عربى", " leading space\n", "x" * 3000]


def test_encodes_like_transformers_without_special_tokens(tiny_model_dir):
    path = tiny_model_dir("llama")
    own = Tokenization.load(str(path))
    theirs = AutoTokenizer.from_pretrained(path)
    assert own.encode(TEXTS) == theirs(TEXTS, add_special_tokens=False).input_ids
    assert own.eos_id == theirs.eos_token_id
    assert own.vocabulary == len(theirs)
    assert [own.decode(ids) for ids in own.encode(TEXTS)] == TEXTS


def test_bos_is_what_the_tokenizer_puts_first(tmp_path):
    make_tokenizer(tmp_path / "plain")
    make_tokenizer(tmp_path / "bos", bos=True)
    assert Tokenization.load(str(tmp_path / "plain")).bos == []
    assert Tokenization.load(str(tmp_path / "bos")).bos == [2]


def test_fingerprint_ignores_decoration_and_path_but_not_the_vocabulary(tmp_path):
    make_tokenizer(tmp_path / "a")
    make_tokenizer(tmp_path / "b", bos=True)
    original = Tokenization.load(str(tmp_path / "a"))
    assert Tokenization.load(str(tmp_path / "b")).fingerprint == original.fingerprint

    exported = AutoTokenizer.from_pretrained(tmp_path / "a")
    exported.add_tokens([z_token(0), z_token(1)], special_tokens=True)
    exported.save_pretrained(tmp_path / "exported")
    assert Tokenization.load(str(tmp_path / "exported")).fingerprint == original.fingerprint

    changed = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(changed))
    assert Tokenization.load(str(tmp_path / "a")).fingerprint != original.fingerprint


def spread(folder, at=300, by=40):
    """Give a tokenizer's vocabulary a gap of `by` ids before `at`."""
    file = folder / "tokenizer.json"
    saved = json.loads(file.read_text())
    vocabulary = saved["model"]["vocab"]
    saved["model"]["vocab"] = {name: i if i < at else i + by for name, i in vocabulary.items()}
    file.write_text(json.dumps(saved))


def test_a_vocabulary_with_a_gap_needs_rows_for_its_highest_id(tmp_path):
    make_tokenizer(tmp_path)
    whole = Tokenization.load(str(tmp_path))
    spread(tmp_path)
    assert Tokenization.load(str(tmp_path)).vocabulary == whole.vocabulary + 40


def test_a_tokenizer_that_differs_is_told_by_a_vocabulary_entry(tmp_path):
    make_tokenizer(tmp_path)
    own = Tokenization.load(str(tmp_path))
    assert own.first_difference(own) is None
    assert own.first_difference(dataclasses.replace(own, fingerprint="another", _loaded=[])) is None
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens(["spir"])  # cut out of every text
    other.save_pretrained(tmp_path)
    assert "spir" in own.first_difference(Tokenization.load(str(tmp_path)))


def test_saved_truncation_and_padding_have_no_effect(tmp_path):
    make_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(saved))
    assert len(Tokenization.load(str(tmp_path)).encode(["a b c d e f"])[0]) > 2


def test_pickles_without_its_folder(tmp_path):
    make_tokenizer(tmp_path / "t")
    original = Tokenization.load(str(tmp_path / "t"))
    expected = original.encode(TEXTS)
    packed = pickle.dumps(original)
    for file in (tmp_path / "t").iterdir():
        file.unlink()
    assert pickle.loads(packed).encode(TEXTS) == expected


def make_kind(folder, kind, declared="PreTrainedTokenizerFast"):
    """Put a tokenizer of a kind in the place of a model's, `declared` being its class in tokenizer_config.json."""
    own = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    if kind == "wordpiece":
        own = Tokenizer(models.WordPiece(unk_token="<unk>"))
        own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    elif kind == "unigram":
        own = Tokenizer(models.Unigram())
        own.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    elif kind == "llama 2":
        own = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer.special_tokens = [*trainer.special_tokens, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(TINY_TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": declared}))


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "llama 2", "prefix"])
def test_a_tokenizer_that_transformers_makes_another_of_is_refused(tiny_model_dir, tmp_path, kind):
    """Of the family qwen2 it takes a class of its own, whatever the files say; other families obey them."""
    for family in ("qwen2", "llama", "mistral", "qwen3"):
        folder = shutil.copytree(tiny_model_dir(family), tmp_path / family)
        make_kind(folder, kind)
        if family == "qwen2":
            with pytest.raises(
                UserError, match=r"qwen2: its tokenizer.json is of another kind than the Qwen2Tokenizer"
            ):
                Tokenization.load(str(folder))
        else:
            Tokenization.load(str(folder))


@pytest.mark.parametrize(
    ("family", "kind", "declared"),
    [
        ("llama", "llama 2", "LlamaTokenizerFast"), ("llama", "llama 3", "LlamaTokenizer"),
        ("llama", "llama 3", "GPT2Tokenizer"), ("mistral", "llama 2", "LlamaTokenizer"),
        ("qwen2", "qwen", "Qwen2Tokenizer"), ("qwen2", "qwen", "LlamaTokenizerFast"),
        ("qwen3", "qwen", "Qwen2Tokenizer"),
    ],
)  # fmt: skip
def test_a_class_that_takes_a_tokenizer_for_what_it_is(tiny_model_dir, tmp_path, family, kind, declared):
    """With leading white space and special tokens it may do otherwise."""
    folder = shutil.copytree(tiny_model_dir(family), tmp_path / "m")
    make_kind(folder, kind, declared)
    assert Tokenization.load(str(folder)).vocabulary > 50


def test_a_hub_model_of_which_the_cache_has_no_tokenizer(tiny_model_dir, tmp_path, monkeypatch):
    """Only its configuration was fetched; Qwen2Tokenizer would have a single token, without an error."""
    shutil.copy(tiny_model_dir("qwen2") / "config.json", tmp_path)
    monkeypatch.setattr("lbr_dist.model.hub.snapshot", lambda _: tmp_path)
    with pytest.raises(UserError, match="tokenizer clinic/tiny: cannot be loaded"):
        Tokenization.load("clinic/tiny")


def test_a_folder_without_tokenizer_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=f"tokenizer {tmp_path}"):
        Tokenization.load(str(tmp_path))
