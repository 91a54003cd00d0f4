import json

import numpy as np
import pytest

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError
from lbr_dist.evaluate import write_results
from lbr_dist.evaluation.report import cells, columns, markdown_table, plot, print_table, rich_table
from lbr_dist.recipes import save_recipe
from lbr_dist.report import report, smooth


def model(name, ndcg, sr=None, bleu=None, **tasks):
    made = {"name": name, "model": f"runs/{name}", "retrieval": {"ndcg_at_10": ndcg, "recall_at_10": 1.4 * ndcg}}
    if sr is not None:
        made["separation"] = {"sr": sr, "auc": 0.8, "alignment": 1.2 - ndcg, "uniformity": -2.5}
    if bleu is not None:
        made["generation"] = {"bottleneck": {"bleu4": bleu, "rouge_l": 3 * bleu}, "full": {"bleu4": 9, "rouge_l": 30}}
    made["tasks"] = {name: {"main_score": score} for name, score in tasks.items()}
    return made


@pytest.fixture
def results():
    return {
        "format": 1,
        "data": {"name": "medicine", "fingerprint": "f", "queries": 1000, "answers": 900, "passages": 7000},
        "models": [model("BM25", 0.141), model("CL only", 0.30, 0.9, NFCorpus=0.2), model("LBR", 0.42, 1.6, 7.3)],
    }


def test_the_table_marks_the_best_and_leaves_gaps(results):
    table = markdown_table(results).splitlines()
    assert table[0] == "medicine: 1,000 held-out questions over 900 answers and 6,100 distractors."
    heads = [head.strip() for head in table[2].strip("|").split("|")]
    rows = {
        row[0]: dict(zip(heads[1:], row[1:], strict=True))
        for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in table[4:])
    }
    assert heads[-1] == "NFCorpus"
    assert rows["LBR"]["nDCG@10"] == "**0.420**"
    assert rows["BM25"]["nDCG@10"] == "0.141"
    assert rows["BM25"]["SR"] == "–"
    assert rows["LBR"]["alignment"] == "**0.780**"  # lower is better
    assert rows["CL only"]["alignment"] == "0.900"
    assert rows["LBR"]["BLEU-4 (Z)"] == "7.3"  # alone: nothing to be better than
    assert "MRR@10" not in heads


def test_terminal_and_markdown_show_the_same_numbers(results, capsys):
    models = results["models"]
    shown = cells(models, columns(models))
    assert rich_table(results).row_count == len(models)
    print_table(results)
    assert capsys.readouterr().out.strip() == markdown_table(results)
    assert [text for text, best in shown[2] if best]


def is_png(file, least_pixels=300):
    data = file.read_bytes()
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    return data[:8] == b"\x89PNG\r\n\x1a\n" and width >= least_pixels and height >= least_pixels / 3


def test_results_are_written_in_three_forms(tmp_path, results):
    write_results(results, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["eval.json", "eval.md", "eval.png"]
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == results
    assert is_png(tmp_path / "out" / "eval.png")


def test_a_picture_of_one_model_and_of_negative_scores(tmp_path, results):
    results["models"] = [model("one", 0.1, sr=-0.5)]
    plot(results, tmp_path / "one.png")
    assert is_png(tmp_path / "one.png")


def make_log(folder, name, stage, steps, level):
    folder.mkdir(parents=True)
    recipe = Recipe.model_validate(
        {
            "stage": stage,
            "output": str(folder),
            "model": {"path": "m"},
            "data": {"sets": [{"path": "d"}]},
            "batch": {"global_batch": 8},
            "duration": {"steps": steps},
            "tracking": {"name": name},
        }
    )
    save_recipe(recipe, folder / "recipe.yaml")
    rng = np.random.default_rng(len(name))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = level * (0.3 + np.exp(-step / 60)) + 0.05 * rng.normal()
            row = {
                "step": step,
                "loss": loss if step != 5 else None,
                "tokens_per_s": 1000.0,
                "step_s": 3.6,
                "samples": 8 * step,
            }
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 9999, "lo')
    return folder


def test_report_of_runs_and_their_evaluations(tmp_path, results):
    one = make_log(tmp_path / "gl", "IB-GL", "generative", 200, 4.0)
    two = make_log(tmp_path / "lbr", "LBR", "contrastive", 150, 2.0)
    three = make_log(tmp_path / "cl", "CL only", "contrastive", 100, 2.5)
    write_results(results, two / "eval")
    other = {**results, "models": [model("MiniLM", 0.35, 1.1), results["models"][0]]}
    write_results(other, tmp_path / "more")
    text = report([one, two, three, tmp_path / "more" / "eval.json"], tmp_path / "out")
    assert (tmp_path / "out" / "report.md").read_text() == text
    assert is_png(tmp_path / "out" / "report.png", 1000)
    assert "| IB-GL | generative | 200 | 1,600 |" in text
    assert "| LBR | contrastive | 150 | 1,200 |" in text
    assert text.count("| BM25 |") == 1
    assert "| MiniLM | 0.350 |" in text
    final = next(line for line in text.splitlines() if line.startswith("| CL only | con")).split("|")
    assert float(final[5]) == pytest.approx(2.5 * (0.3 + np.exp(-98 / 60)), abs=0.1)
    assert float(final[7]) == pytest.approx(0.1, abs=0.01)


def test_report_of_runs_alone_and_of_an_evaluation_alone(tmp_path, results):
    assert "## Training" in report([make_log(tmp_path / "a", "a", "generative", 3, 1.0)], tmp_path / "o1")
    write_results(results, tmp_path / "e")
    assert "## Training" not in report([tmp_path / "e"], tmp_path / "o2")
    assert is_png(tmp_path / "o2" / "report.png")


def test_a_run_that_has_not_logged_yet(tmp_path):
    folder = make_log(tmp_path / "a", "a", "generative", 3, 1.0)
    (folder / "metrics.jsonl").unlink()
    assert "| a | generative | 0 | – |" in report([folder], tmp_path / "out")


def test_what_is_neither_is_named(tmp_path):
    with pytest.raises(UserError, match="neither a run"):
        report([tmp_path / "nothing"], tmp_path / "out")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match="not an evaluation"):
        report([tmp_path / "x.json"], tmp_path / "out")


def test_smoothing_keeps_level_and_length():
    values = np.arange(500, dtype=float)
    smoothed = smooth(values)
    assert smoothed[10:-10] == pytest.approx(values[10:-10])
    assert smooth(np.array([3.0])).tolist() == [3.0]
