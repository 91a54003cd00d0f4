"""`lbr eval` end to end: a prepared set, a run, its export, a plain model and BM25 in one table."""

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from runs import make_run

from lbr_dist.cli import main
from lbr_dist.data.preparation.prepare import prepare
from lbr_dist.errors import UserError
from lbr_dist.evaluation import evaluate as module
from lbr_dist.evaluation.evaluate import default_out, evaluate
from lbr_dist.evaluation.held_out import HeldOut, load_held_out
from lbr_dist.evaluation.report import report
from lbr_dist.evaluation.separation import separation
from lbr_dist.export.export import export
from lbr_dist.inference.loading import load_encoder


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    made = ["".join(rng.choice(letters, 6)) for _ in range(400)]
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(200):
            name, other = made[2 * number], made[2 * number + 1]
            words = " ".join("".join(rng.choice(letters, 5)) for _ in range(8))
            row = {"id": f"r{number}", "question": f"{name} {other}?", "answer": f"{name} {words}"}
            file.write(json.dumps(row) + "\n")
    prepare(
        [str(folder / "rows.jsonl")],
        folder / "set",
        tokenizer=str(tiny_model_dir("llama")),
        sizes={"eval": "50", "cl": "50", "gl": "rest"},
        name="toy",
    )
    return folder / "set"


def test_everything_in_one_table(tmp_path, tiny_model_dir, data, caplog):
    base = tiny_model_dir("llama")
    run = make_run(tmp_path / "run", base)
    exported = export(run, tmp_path / "exported")
    specs = ["bm25", str(run), str(exported), f"hf:{base}?pooling=mean"]
    results = evaluate(
        specs, data, tmp_path / "out", distractors=30, generate=3, hardest=5, device="cpu", progress=False
    )
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == results
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"eval.json", "eval.md", "eval.png"}
    assert results["data"]["queries"] == 50
    assert results["data"]["passages"] == results["data"]["answers"] + 30
    bm25, ours, plain, hf = results["models"]
    assert bm25["retrieval"]["ndcg_at_10"] > 0.95  # every question names its answer's first word
    assert ours["retrieval"] == pytest.approx(plain["retrieval"], abs=1e-3)
    assert "separation" not in bm25
    assert set(ours["generation"]) == {"bottleneck", "full"}
    assert "generation" not in plain
    assert caplog.text.count(f"{exported}: no answers are generated: only a run") == 1
    assert caplog.text.count("no answers are generated") == 2  # the other is hf:
    assert hf["name"].endswith("(mean)")
    assert ours["checkpoint"] == load_encoder(str(run), "cpu").checkpoint
    assert ours["checkpoint"]["name"] == "step-000010"
    assert ours["settings"] == {"hardest": 5, "generate": 3}
    assert plain["settings"] == {"hardest": 5}
    assert "settings" not in bm25
    assert "checkpoint" not in plain

    held_out, encoder = load_held_out(data, distractors=30), load_encoder(str(run), "cpu")
    expected = separation(
        encoder.encode(held_out.queries, "query"), encoder.encode(held_out.passages), held_out.positives, hardest=5
    )
    assert ours["separation"] == pytest.approx(expected, rel=1e-3)
    card = (export(run, tmp_path / "again", scores=tmp_path / "out" / "eval.json") / "README.md").read_text()
    assert "| BM25 |" in card


def test_one_checkpoint_of_a_run_in_training_is_used_throughout(tmp_path, tiny_model_dir, data, monkeypatch, caplog):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))

    def load(spec, *arguments):
        encoder = load_encoder(spec, *arguments)
        if not (run / "checkpoints" / "step-000020").exists():
            make_run(run, tiny_model_dir("llama"), step=20)
        return encoder

    monkeypatch.setattr("lbr_dist.inference.loading.load_encoder", load)
    damaged = make_run(run, tiny_model_dir("llama"), step=15) / "checkpoints" / "step-000015"
    next(damaged.glob("*.safetensors")).write_bytes(b"")
    specs = [str(run), f"{run}?dim=8"]
    results = evaluate(specs, data, tmp_path / "out", generate=0, device="cpu", progress=False)
    assert [model["checkpoint"]["name"] for model in results["models"]] == ["step-000010"] * 2
    assert [model["name"] for model in results["models"]] == ["run", "run [8]"]
    assert [model["model"] for model in results["models"]] == specs
    assert caplog.text.count("step-000010 is used; passed over") == 1


def test_names_are_checked_before_any_model_runs(tmp_path, data, monkeypatch):
    with pytest.raises(UserError, match="NoSuchTask"):
        evaluate(["never-loaded"], data, tmp_path / "out", tasks=["NoSuchTask"], progress=False)
    with pytest.raises(UserError, match="not a prepared set"):
        evaluate(["never-loaded"], tmp_path, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="mteb task NFCorpus: cannot be run"):
        evaluate(["never-loaded"], data, tmp_path / "out", tasks=["NFCorpus"], progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="it is a file"):
        evaluate(["never-loaded"], data, tmp_path / "file", progress=False)
    for options, message in (
        ({"hardest": 0}, "--hardest 0: expected at least 1"),
        ({"generate": -1}, "--generate -1"),
        ({"distractors": -3}, "--distractors -3"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(["never-loaded"], data, tmp_path / "out", progress=False, **options)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    for spec, message in (
        (str(data), "a folder without modules.json or config.json"),
        (f"hf:{data}?pooling=last", "a folder without modules.json or config.json"),
        (str(tmp_path / "begun"), "a run without a checkpoint"),
        ("file", "is a file"),
        (str(tmp_path / "typo"), "no such folder"),
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path / "plain"), "has no pooling of its own"),
        (f"hf:{tmp_path}?pooling=max", "expected hf:PATH"),
        (f"{tmp_path}?dim=²", "dim=² is not a number"),
        (f"hf:{tmp_path}?max_tokens=²", "expected hf:PATH"),
        ("bm25?dim=3", "has no embeddings"),
    ):
        with pytest.raises(UserError, match=message.replace("?", "[?]")):
            evaluate(["bm25", spec], data, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="cannot be written"):
        evaluate(["bm25"], data, tmp_path / "file" / "out", progress=False)


def test_results_of_other_data_are_set_aside(tmp_path, data):
    """Another set, or another corpus; also what is left of an evaluation that failed."""
    out = tmp_path / "out"
    evaluate(["bm25"], data, out, progress=False)
    before = {name: (out / name).read_bytes() for name in ("eval.json", "eval.md", "eval.png")}
    other = json.loads(before["eval.json"])
    other["data"] |= {"name": "a/b", "fingerprint": "0123456789"}
    (out / "eval.unfinished.json").write_text(json.dumps(other))
    evaluate(["bm25"], data, out, distractors=20, progress=False)
    assert json.loads((out / "eval.json").read_text())["data"]["passages"] == 70
    fingerprint = load_held_out(data).fingerprint
    aside = out / f"toy-{fingerprint[:8]}-50"
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == before
    assert json.loads((out / "a_b-01234567-50" / "eval.unfinished.json").read_text()) == other
    evaluate(["bm25"], data, out, distractors=20, progress=False)
    assert {file.name for file in out.iterdir()} == {*before, aside.name, "a_b-01234567-50"}
    assert "| BM25 |" in report([out, aside], tmp_path / "report")


def test_a_file_that_cannot_be_read_is_not_written_over(tmp_path, data, caplog):
    """Another tool's, or one that this version does not know."""
    (out := tmp_path / "out").mkdir()
    (out / "eval.json").write_text('{"mine": 1}')
    evaluate(["bm25"], data, out, progress=False)
    [aside] = out.glob("eval.json.before-*")
    assert aside.read_text() == '{"mine": 1}'
    assert f"it is {aside.name} now" in caplog.text
    assert json.loads((out / "eval.json").read_text())["models"]


def test_of_evaluations_that_end_together_none_is_lost(tmp_path, monkeypatch):
    """On several sets, into the folder of one run: each finds there what the others wrote."""
    out, real = tmp_path / "out", module.read_evaluation

    def slowly(*arguments):
        try:
            return real(*arguments)
        finally:
            time.sleep(0.2)

    def held_out(name):
        return HeldOut(name, name * 8, ["a"], ["a b", "c"], [[0]])

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(module, "load_held_out", lambda name, **_: held_out(name))
    monkeypatch.setattr(module, "_evaluate_one", lambda spec, *_: fail() if spec == "hf:x" else {"name": spec})
    monkeypatch.setattr(module, "read_evaluation", slowly)
    with ThreadPoolExecutor() as pool:
        done = [pool.submit(evaluate, ["bm25", "hf:x"][: 1 + i % 2], str(i), out, device="cpu") for i in range(6)]
    assert [type(future.exception()) for future in done] == [type(None), MemoryError] * 3
    for name, expected in (("eval.json", "024"), ("eval.unfinished.json", "135")):
        found = {file: json.loads(file.read_text())["data"]["name"] for file in out.rglob(name)}
        assert sorted(found.values()) == list(expected)
        assert all(file.parent in (out, out / f"{data}-{data * 8}-2") for file, data in found.items())


def test_what_was_measured_before_a_model_failed_is_kept(tmp_path, data, monkeypatch):
    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("lbr_dist.inference.loading.load_encoder", fail)
        with pytest.raises(MemoryError):
            evaluate(["bm25", "large"], data, tmp_path / "out", progress=False)
    kept = tmp_path / "out" / "eval.unfinished.json"
    assert list((tmp_path / "out").iterdir()) == [kept]
    assert "| BM25 |" in report([kept], tmp_path / "report")
    evaluate(["bm25"], data, tmp_path / "out", progress=False)
    assert not kept.exists()
    evaluate(["bm25"], data, tmp_path / "out", progress=False)  # of the same data, takes their place


def test_a_full_disk_does_not_cost_the_results(tmp_path, data, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("lbr_dist.evaluation.evaluate.write_results", full)
    with pytest.raises(UserError, match=r"No space left on device; the results lie in .*elsewhere.*eval.json"):
        evaluate(["bm25"], data, tmp_path / "out", progress=False)
    (kept,) = (tmp_path / "elsewhere").glob("*/eval.json")
    assert "| BM25 |" in report([kept], tmp_path / "report")


@pytest.mark.parametrize("room", ["elsewhere", "nowhere"])
def test_a_full_disk_hides_no_failure_and_costs_no_model_before_it(tmp_path, data, monkeypatch, caplog, room):
    def fail(*_):
        raise UserError("model large: is damaged")

    real = Path.write_text

    def write(self, *arguments, **options):
        if room == "nowhere" or (tmp_path / "out") in self.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *arguments, **options)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("lbr_dist.inference.loading.load_encoder", fail)
    monkeypatch.setattr("lbr_dist.inference.loading.check_spec", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write)
        with pytest.raises(UserError, match="model large: is damaged"):
            evaluate(["bm25", "large"], data, tmp_path / "out", progress=False)
    assert "No space left on device; results of the models before large " in caplog.text
    if room == "elsewhere":
        (kept,) = (tmp_path / "elsewhere").glob("*/eval.unfinished.json")
        assert f"large lie in {kept}" in caplog.text
        assert "| BM25 |" in report([kept], tmp_path / "report")
    else:
        assert '"name": "BM25"' in caplog.text


def test_a_path_need_not_be_utf_8(tmp_path, data, monkeypatch):
    class Named:
        name, cut = "model \udcff", 0

        def encode(self, texts, side="passage", progress=False):
            return np.random.default_rng(len(texts)).normal(size=(len(texts), 4)).astype(np.float32)

    monkeypatch.setattr("lbr_dist.inference.loading.load_encoder", lambda *_: Named())
    evaluate(["\udcff"], data, tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["models"][0]["name"] == r"model \udcff"


def test_a_set_whose_every_passage_is_right_has_no_ratio(tmp_path, tiny_model_dir):
    base = tiny_model_dir("llama")
    rows = [{"id": f"q{n}", "question": f"is {word} so?", "answer": "yes"} for n, word in enumerate("abcdefgh")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(tmp_path / "rows.jsonl")], tmp_path / "set", tokenizer=str(base), sizes={"eval": "rest", "cl": "0"})
    spec = f"hf:{base}?pooling=mean"
    results = evaluate([spec], tmp_path / "set", tmp_path / "out", device="cpu", progress=False)
    assert sorted(results["models"][0]["separation"]) == ["alignment", "uniformity"]
    assert "no wrong one" in results["notes"][0]
    assert results["notes"][0] in (tmp_path / "out" / "eval.md").read_text()


def test_a_model_that_gives_no_numbers_is_not_measured(tmp_path, data, monkeypatch):
    class Broken:
        name, cut = "broken", 0

        def encode(self, texts, side="passage", progress=False):
            return np.full((len(texts), 4), np.nan, np.float32)

    monkeypatch.setattr("lbr_dist.inference.loading.load_encoder", lambda *_: Broken())
    with pytest.raises(UserError, match=r"model broken: its embedding of .* is not finite"):
        evaluate(["broken"], data, tmp_path / "out", progress=False)


def test_what_is_in_brackets_is_in_the_help_too(monkeypatch, capsys):
    """rich would take it for a style."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("sys.argv", ["lbr", "eval", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.count("FOLDER[@SPLIT] as BEIR has it") == 2


def test_results_lie_in_the_first_run(tmp_path, tiny_model_dir):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))
    assert default_out(["bm25", str(run)]) == run / "eval"
    checkpoint = next((run / "checkpoints").glob("step-*"))
    assert default_out([str(checkpoint)]) == run / "eval" / checkpoint.name
    assert str(default_out(["bm25", "hf:x"])) == "eval"
