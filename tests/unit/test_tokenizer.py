import dataclasses
import json
import pickle

import pytest
from conftest import make_tokenizer
from transformers import AutoTokenizer

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


def test_a_folder_without_tokenizer_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=f"tokenizer {tmp_path}"):
        Tokenization.load(str(tmp_path))
