import json
import os
from pathlib import Path

import numpy as np
import pytest
from runs import make_run

from lbr_dist.cli import main
from lbr_dist.data import remote
from lbr_dist.data.record import Record
from lbr_dist.data.shard_writer import write_set
from lbr_dist.data.sources.beir import find_beir
from lbr_dist.errors import UserError
from lbr_dist.inference import encoder as encoders
from lbr_dist.inference import search as module
from lbr_dist.inference.loading import load_encoder
from lbr_dist.inference.search import Hit, print_hits, search, top_k
from lbr_dist.launch.ray_stage import absolute
from lbr_dist.model.tokenizer import Tokenization
from lbr_dist.recipes import load_recipe


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    rows = [
        {"id": f"r{i}", "answer": text} for i, text in enumerate(["pain relief", "heart failure", "pain relief", "x"])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir):
    return str(make_run(tmp_path_factory.mktemp("run"), tiny_model_dir("llama")))


def test_equal_texts_find_themselves_once(tmp_path, run, corpus):
    results = search(run, corpus, ["heart failure", "x"], k=9, device="cpu", cache_dir=tmp_path / "c", progress=False)
    assert [len(hits) for hits in results] == [3, 3]
    assert results[0][0] == Hit(pytest.approx(1, abs=1e-5), "r1", "heart failure")
    assert results[1][0].id == "r3"
    assert all(hits[i].score >= hits[i + 1].score for hits in results for i in range(2))


def noted(monkeypatch, note):
    """Have `note(texts, side)` called for all that is embedded."""
    real = encoders.PackedEncoder.encode
    monkeypatch.setattr(
        encoders.PackedEncoder,
        "encode",
        lambda self, texts, side="passage", progress=False: note(texts, side) or real(self, texts, side, progress),
    )


def test_the_corpus_is_embedded_once(tmp_path, run, corpus, monkeypatch):
    seen = []
    noted(monkeypatch, lambda texts, side: seen.append(side))
    options = {"device": "cpu", "cache_dir": tmp_path / "c", "progress": False}
    first = search(run, corpus, ["pain"], **options)
    assert search(run, corpus, ["pain"], **options) == first
    assert seen == ["passage", "query", "query"]
    corpus.write_text(corpus.read_text() + '{"answer": "new"}\n')
    assert len(search(run, corpus, ["pain"], k=9, **options)[0]) == 4
    assert seen[3:] == ["passage", "query"]


def test_a_corpus_is_embedded_in_blocks(tmp_path, run, corpus, monkeypatch):
    sizes = []
    noted(monkeypatch, lambda texts, side: sizes.append(len(texts)))
    corpus.write_text("".join(json.dumps({"answer": "heart " * n}) + "\n" for n in range(1, 8)))
    options = {"k": 9, "device": "cpu", "progress": False}
    whole = search(run, corpus, ["heart"], cache_dir=tmp_path / "a", **options)[0]
    monkeypatch.setattr(module, "BLOCK_TEXTS", 3)
    monkeypatch.setattr("lbr_dist.inference.text_blocks.BLOCK_CHARACTERS", 60)
    found = search(run, corpus, ["heart"], cache_dir=tmp_path / "b", **options)[0]
    assert sizes == [7, 1, 3, 2, 1, 1, 1]
    assert [hit.text for hit in found] == [hit.text for hit in whole]
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in whole], abs=1e-5)


def test_a_width_that_the_model_lacks_is_named_before_the_corpus_is_embedded(tmp_path, run, corpus):
    with pytest.raises(UserError, match=r"its embeddings have 32 dimensions, fewer than 64; lower dim=64"):
        search(f"{run}?dim=64", corpus, ["pain"], device="cpu", cache_dir=tmp_path / "c", progress=False)
    assert load_encoder(f"{run}?dim=32", "cpu").encode(["pain"]).shape == (1, 32)
    with pytest.raises(UserError, match="fewer than 33"):
        load_encoder(f"{run}?dim=33", "cpu")


def test_a_cache_that_is_damaged_or_cannot_be_written_costs_no_answer(tmp_path, run, corpus, caplog):
    options = {"device": "cpu", "progress": False}
    expected = search(run, corpus, ["pain"], cache_dir=tmp_path / "c", **options)
    (file,) = (tmp_path / "c").iterdir()
    whole = file.read_bytes()
    zeros, flipped = whole[:200] + bytes(len(whole) - 200), whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
    for damaged in (b"", whole[:50], whole[:-4], zeros, flipped):
        file.write_bytes(damaged)
        assert search(run, corpus, ["pain"], cache_dir=tmp_path / "c", **options) == expected
        assert file.read_bytes() == whole
    assert search(run, corpus, ["pain"], cache_dir=corpus / "c", **options) == expected
    assert "are not kept (Not a directory)" in caplog.text


def test_a_cache_s_file_in_the_place_of_another_is_not_read(tmp_path, run, corpus):
    """Whole, and of as many texts."""
    options = {"k": 1, "device": "cpu", "cache_dir": tmp_path / "c", "progress": False}
    search(run, corpus, ["pain"], **options)
    (first,) = (tmp_path / "c").iterdir()
    corpus.write_text("".join(json.dumps({"answer": text}) + "\n" for text in ("x", "heart", "pain")))
    assert search(run, corpus, ["x"], **options)[0][0].text == "x"
    (second,) = set((tmp_path / "c").iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    assert search(run, corpus, ["x"], **options)[0][0].text == "x"


def test_what_a_killed_search_left_in_the_cache_is_removed_a_day_later(tmp_path, run, corpus):
    old, young, other = (tmp_path / name for name in (".tmp-0123abcd-a.npy", ".tmp-4567abcd-b.npy", "c.npy"))
    for file in (old, young, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (1, 1))
    before = set(tmp_path.iterdir())
    search(run, corpus, ["pain"], cache_dir=tmp_path, device="cpu", progress=False)
    assert before - set(tmp_path.iterdir()) == {old}


def test_the_cache_is_on_disk_before_it_has_its_name(tmp_path, run, corpus, monkeypatch):
    calls, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(Path, "replace", lambda self, to: calls.append(to.parent.name) or replace(self, to))
    search(run, corpus, ["pain"], cache_dir=tmp_path / "c", device="cpu", progress=False)
    (file,) = (tmp_path / "c").iterdir()
    assert file.stat().st_ino in calls[: calls.index("c")]
    assert len(np.load(file)) == 3  # numpy reads it


@pytest.mark.parametrize("query", ["", "  ", "\udcff"])
def test_a_query_that_is_none_is_named(corpus, query):
    with pytest.raises(UserError, match=r"query .*: (a field is empty|the text is not valid UTF-8)"):
        search("never-loaded", corpus, ["pain", query], progress=False)


def test_a_model_that_gives_no_numbers_is_named(tmp_path, corpus, monkeypatch):
    class Broken:
        name, cut = "broken", 0

        def __init__(self, side):
            self.side = side

        def encode(self, texts, side="passage", progress=False):
            rows = np.eye(len(texts), 4, dtype=np.float32)
            rows[-1] = np.nan if side == self.side else rows[-1]
            return rows

    for side in ("query", "passage"):
        monkeypatch.setattr("lbr_dist.inference.loading.load_encoder", lambda *_, side=side: Broken(side))
        with pytest.raises(UserError, match=r"embedding of .* is not finite: the model is damaged"):
            search("broken", corpus, ["pain"], cache_dir=tmp_path / side, progress=False)
        assert not list(tmp_path.glob("passage/*"))


def test_the_right_option_of_a_file_is_found(tmp_path):
    row = {"question": "which pumps", "options": ["vein", "heart"], "answer": "B"}
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    assert search("bm25", tmp_path / "c.jsonl", ["heart"])[0][0].text == "heart"


def test_bm25_searches_too(corpus):
    assert search("bm25", corpus, ["failure of the heart"], k=1)[0][0].id == "r1"


def test_bm25_finds_only_what_shares_a_word(corpus, capsys):
    results = search("bm25", corpus, ["heart", "liver"], k=3)
    assert [[hit.id for hit in hits] for hits in results] == [["r1"], []]
    print_hits(["heart", "liver"], results)
    shown = capsys.readouterr().out
    assert "heart failure" in shown
    assert shown.count("nothing found") == 1


def test_top_k_over_tiles(monkeypatch):
    rng = np.random.default_rng(0)
    queries, passages = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(101, 5)).astype(np.float32)
    scores = queries @ passages.T
    monkeypatch.setattr(module, "TILE_BYTES", 4 * 5 * 13)
    rows, best = top_k(queries, passages, 20)
    assert np.array_equal(rows, np.argsort(-scores, axis=1, kind="stable")[:, :20])
    assert best == pytest.approx(-np.sort(-scores, axis=1)[:, :20], abs=1e-5)
    assert top_k(queries, passages[:3], 20)[0].shape == (7, 3)


def test_markup_in_texts_is_shown_as_it_is(capsys):
    print_hits(["[bold]q[/bold]"], [[Hit(0.5, "a[1]", "x [red]y[/red]\nz")]])
    shown = capsys.readouterr().out
    for part in ("[bold]q[/bold]", "0.500", "a[1]", "x [red]y[/red] z"):
        assert part in shown


def test_what_is_no_corpus_is_named(tmp_path):
    with pytest.raises(UserError, match="not a prepared set"):
        search("bm25", tmp_path, ["q"])
    with pytest.raises(UserError, match=r"corpus .*none: no such file or prepared set"):
        search("bm25", tmp_path / "none", ["q"])


def test_a_prepared_set_has_no_field_to_name(tmp_path, tiny_model_dir):
    records = [Record(id="r", question="what pumps blood", answer="the heart")]
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", {"eval": records}, Tokenization.load(str(tiny_model_dir())), name="set")
    assert search("bm25", tmp_path / "set", ["heart"])[0][0].id == "r"
    with pytest.raises(UserError, match=r"--field answer: .*set is a prepared set, .*; leave it out"):
        search("bm25", tmp_path / "set", ["heart"], field="answer")


def test_the_address_of_a_remote_set_stays_whole_on_the_command_line(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "load_corpus", lambda corpus, field: asked.append(corpus) or (["r"], ["fever"]))
    monkeypatch.setattr("sys.argv", ["lbr", "search", "bm25", "http://127.0.0.1:9/set", "fever"])
    with pytest.raises(SystemExit):
        main()
    assert asked == ["http://127.0.0.1:9/set"]


def test_an_address_may_be_longer_than_a_file_name(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)
    address = f"pipe:cat {'n' * 300}/{{}}"
    with pytest.raises(UserError, match="could not be read"):
        search("bm25", address, ["q"])
    assert find_beir(address) is None
    recipe = load_recipe("stage2", ["model.path=m", f"data.sets.0.path={address}"])
    assert absolute(recipe, tmp_path).data.sets[0].path == address
