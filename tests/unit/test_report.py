import json
import resource
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError
from lbr_dist.evaluation.evaluate import write_results
from lbr_dist.evaluation.report import figure, read_all, report, smooth
from lbr_dist.evaluation.table import cells, columns, markdown_table, plot, print_table, rich_table, titles
from lbr_dist.recipes import save_recipe


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


def test_what_reads_the_same_is_marked_the_same():
    models = [model("run", 0.41999), model("its export", 0.42001), model("other", 0.418)]
    (column,) = (metric for metric in columns(models) if metric.title == "nDCG@10")
    assert cells(models, [column]) == [[("0.420", True)], [("0.420", True)], [("0.418", False)]]


def test_what_was_measured_by_other_settings_has_a_column_of_its_own(tmp_path, results):
    """SR against the hardest one of a corpus is lower than against ten, and 20 questions are not 1,000."""
    easy, hard = {"hardest": 10, "generate": 1000}, {"hardest": 1, "generate": 20}
    models = [
        {**model("easy", 0.4, 1.6, 7.3), "settings": easy},
        {**model("alike", 0.3, 1.4, 7.1), "settings": easy},
        {**model("hard", 0.5, 0.7, 9.9), "settings": hard},
    ]
    for number, found in enumerate((models[:2], models[2:], [model("old", 0.2, 2.5)])):
        (tmp_path / f"{number}.json").write_text(json.dumps({**results, "models": found}))
    text = report([tmp_path / f"{number}.json" for number in range(3)], tmp_path / "out")
    heads, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if "|" in row)
    assert [head for head in heads if "SR" in head] == ["SR, 1 hardest", "SR, 10 hardest", "SR"]
    shown = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    assert [shown[name]["SR, 10 hardest"] for name in ("easy", "alike", "hard")] == ["**1.60**", "1.40", "–"]
    assert [shown[name]["SR"] for name in ("easy", "hard", "old")] == ["–", "–", "2.50"]
    assert shown["hard"]["BLEU-4 (Z), 20 questions"] == "9.9"
    assert shown["easy"]["BLEU-4 (Z), 1,000 questions"] == "**7.3**"
    assert shown["hard"]["nDCG@10"] == "**0.500**"
    assert columns(models[:2]) == columns([model("old", 0.2, 2.5, 7.1)])


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


@pytest.mark.parametrize("every", [1, 100, 250])
def test_hours_are_those_of_all_steps_however_many_have_a_row(tmp_path, every):
    log = make_log(tmp_path / "run", "run", "generative", 250, 4.0)
    rows = (log / "metrics.jsonl").read_text().splitlines()[:250]
    kept = [row for step, row in enumerate(rows, 1) if step % every == 0 or step == 250]
    (log / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    (line,) = (line for line in report([log], tmp_path / "out").splitlines() if line.startswith("| run | gen"))
    assert float(line.split("|")[7]) == pytest.approx(250 * 3.6 / 3600)


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


def test_runs_of_one_name_are_told_apart(tmp_path, results, monkeypatch):
    """As stage2 of two experiments is: their names came from the folders, and their curves had one colour."""
    monkeypatch.chdir(tmp_path)
    for place, level in (("a", 1.0), ("b", 2.0)):
        make_log(tmp_path / place / "stage2", "", "contrastive", 20, level)
        found = {**model("stage2", level / 10, sr=level), "model": f"{place}/stage2"}
        write_results({**results, "models": [found]}, tmp_path / place / "stage2" / "eval")
    text = report(["a/stage2", "b/stage2"], "out")
    assert "| stage2 (a/stage2) | contrastive | 20 |" in text
    assert "| stage2 (b/stage2) | **0.200** |" in text
    logs, evaluations = read_all(["a/stage2", "b/stage2"])
    assert [log.name for log in logs] == titles(evaluations[0]["models"]) == ["stage2 (a/stage2)", "stage2 (b/stage2)"]
    assert titles([model("one", 0.1), model("two", 0.1)]) == ["one", "two"]


def test_checkpoints_of_one_run_are_told_apart():
    def at(step, digest, typed="runs/a"):
        return {**model("a", 0.1), "model": typed, "checkpoint": {"name": f"step-{step}", "digest": digest}}

    assert titles([at(10, "x"), at(10, "x")]) == ["a", "a"]
    assert titles([at(10, "x"), at(20, "y")]) == ["a (step-10)", "a (step-20)"]
    assert titles([at(10, "x"), at(20, "y"), at(10, "z", "b")]) == [
        "a (runs/a, step-10)",
        "a (runs/a, step-20)",
        "a (b)",
    ]
    assert titles([at(10, "0" * 9), at(10, "1" * 9)]) == ["a (step-10 00000000)", "a (step-10 11111111)"]


def test_panels_say_what_they_show(tmp_path, results, monkeypatch):
    """One set with and without distractors are two panels; and there is no step 2.5."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    logs, evaluations = read_all([make_log(tmp_path / "a", "a", "contrastive", 20, 1.0)])
    fewer = {**results, "data": {**results["data"], "passages": 900}}
    figure(logs, [*evaluations, results, fewer], tmp_path / "report.png")
    above, _, *below = drawn[0].subfigs
    assert [panel.get_suptitle() for panel in below] == [
        "medicine: 1,000 held-out questions over 900 answers and 6,100 distractors.",
        "medicine: 1,000 held-out questions over 900 answers.",
    ]
    assert all(tick == int(tick) for tick in above.axes[0].get_xticks())


def test_a_run_has_one_colour_whatever_its_title(tmp_path, results, monkeypatch):
    """In one panel another model has its name, in another there are two of its checkpoints."""
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    runs = [make_log(tmp_path / "runs" / name, name, "contrastive", 4, 1.0) for name in ("s1", "s2", "s3")]
    one, two = ({**model(name, 0.3), "checkpoint": {"name": "step-4", "digest": name}} for name in ("s1", "s2"))
    namesake = {**two, "model": "models/s2"}
    newer = {**two, "checkpoint": {"name": "step-8", "digest": "newer"}}
    panels = [[two, model("BM25", 0.1), one], [namesake, one, two], [newer, two, model("BM25", 0.2)]]
    panels.append([{**model("s3", 0.3), "model": "../elsewhere/s3"}])  # alone of that name
    figure(read_all(runs)[0], [{**results, "models": models} for models in panels], tmp_path / "report.png")
    losses, _, *below = drawn[0].subfigs
    s1, s2, s3 = (line.get_color() for line in losses.axes[0].lines[1::2])
    bars = [[to_hex(bar.get_facecolor()) for bar in panel.axes[0].patches] for panel in below]
    bm25, other = bars[0][1], bars[1][0]
    assert bars == [[s2, bm25, s1], [other, s1, s2], [s2, s2, bm25], [s3]]
    assert len({s1, s2, s3, bm25, other}) == 5


def test_what_the_metrics_list_is_drawn_where_a_run_has_it(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    make_log(tmp_path / "a", "a", "contrastive", 4, 1.0)
    rows = [
        {
            "step": step,
            "loss": 1.0,
            "lr": 0.1 * step,
            "grad_norm": 2.0,
            "tokens_per_s": 9.0,
            "mfu": None,
            "packing": 0.9,
        }
        for step in (1, 2)
    ]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure(*read_all([tmp_path / "a"]), tmp_path / "report.png")
    axes = drawn[0].subfigs[1].axes
    assert [axis.get_title() for axis in axes] == ["learning rate", "gradient norm", "tokens/s", "packing, share"]
    assert axes[0].lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.2])


def test_a_run_of_one_row_is_seen(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    figure(*read_all([make_log(tmp_path / "a", "a", "generative", 1, 1.0)]), tmp_path / "report.png")
    assert [line.get_marker() for line in drawn[0].subfigs[0].axes[0].lines if line.get_label() == "a"] == ["o"]


def test_report_of_runs_alone_and_of_an_evaluation_alone(tmp_path, results):
    assert "## Training" in report([make_log(tmp_path / "a", "a", "generative", 3, 1.0)], tmp_path / "o1")
    write_results(results, tmp_path / "e")
    assert "## Training" not in report([tmp_path / "e"], tmp_path / "o2")
    assert is_png(tmp_path / "o2" / "report.png")


def test_table_and_picture_are_of_one_call(tmp_path, results, monkeypatch):
    """Two of them write into one folder."""

    def draw(_, evaluations, file):
        name = evaluations[0]["data"]["name"]
        time.sleep(0.5 * (name == "slow"))
        file.write_text(name)

    monkeypatch.setattr("lbr_dist.evaluation.report.figure", draw)
    with ThreadPoolExecutor() as pool:
        for name in ("slow", "quick"):
            (tmp_path / name).write_text(json.dumps({**results, "data": {**results["data"], "name": name}}))
            pool.submit(report, [tmp_path / name], tmp_path / "out")
            time.sleep(0.2)
    assert f"## {(tmp_path / 'out' / 'report.png').read_text()}\n" in (tmp_path / "out" / "report.md").read_text()


def test_a_run_that_has_not_logged_yet(tmp_path):
    folder = make_log(tmp_path / "a", "a", "generative", 3, 1.0)
    (folder / "metrics.jsonl").unlink()
    assert "| a | generative | 0 | – |" in report([folder], tmp_path / "out")


def test_a_bar_in_a_name_makes_no_column(tmp_path):
    text = report([make_log(tmp_path / name, f"{name}|b", "generative", 3, 1.0) for name in "ac"], tmp_path / "out")
    assert r"| a\|b | generative | 3 | 24 |" in text


def test_steps_are_those_of_all_rows_and_the_loss_of_those_that_have_one(tmp_path):
    folder = make_log(tmp_path / "a", "a", "generative", 3, 1.0)
    (folder / "metrics.jsonl").write_text('{"step": 7, "loss": 2.0}\n{"step": 9, "loss": null}\n')
    assert "| a | generative | 9 | – | 2.0000 |" in report([folder], tmp_path / "out")
    (folder / "metrics.jsonl").write_text('{"step": 9, "loss": null}\n')
    assert "| a | generative | 9 | – | – |" in report([folder], tmp_path / "out")


def test_what_is_neither_is_named(tmp_path):
    with pytest.raises(UserError, match="neither a run"):
        report([tmp_path / "nothing"], tmp_path / "out")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match="not an evaluation"):
        report([tmp_path / "x.json"], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["data"].pop("queries"), "data.queries: field required"),
        (lambda e: e["data"].update(answers="many"), "data.answers: input should be a valid integer"),
        (lambda e: e["models"][1].pop("name"), "models.1.name: field required"),
        (lambda e: e.update(models=[]), "models: list should have at least 1 item"),
        (lambda e: e["models"][0].update(tasks=[1]), "models.0.tasks: input should be a valid dictionary"),
    ],
)
def test_what_an_evaluation_lacks_is_named(tmp_path, results, change, message):
    change(results)
    (tmp_path / "b.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=rf"report .*b.json: not an evaluation .*\({message}"):
        report([tmp_path / "b.json"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [None, "0.4", True, float("nan"), float("inf"), {}])
def test_a_score_that_is_no_number_is_a_gap(tmp_path, results, value):
    results["models"][0]["retrieval"]["ndcg_at_10"] = value
    (tmp_path / "b.json").write_text(json.dumps(results))
    assert "| BM25 | – |" in report([tmp_path / "b.json"], tmp_path / "out")


def test_an_output_that_is_a_file_is_named(tmp_path, results):
    (tmp_path / "b.json").write_text(json.dumps(results))
    for out in (tmp_path / "b.json", tmp_path / "b.json" / "out"):
        with pytest.raises(UserError, match=r"--out .*b.json.*: (it is a file|cannot be written)"):
            report([tmp_path / "b.json"], out)


def test_two_models_of_one_name_are_not_one(tmp_path, results):
    for number, score in enumerate((0.141, 0.522)):
        results["models"] = [{**model("run", score), "seconds": {"load": number}}]
        (tmp_path / f"{number}.json").write_text(json.dumps(results))
    again = {**results["models"][0], "seconds": {"load": 9.0}}
    (tmp_path / "2.json").write_text(json.dumps({**results, "models": [again]}))
    text = report([tmp_path / f"{number}.json" for number in range(3)], tmp_path / "out")
    assert text.count("| run | 0.141 |") == text.count("| run | **0.522** |") == 1


AWKWARD = "we$ird $x [/] [50%] | _^{"


def test_names_are_shown_as_they_are(tmp_path, results, capsys, monkeypatch):
    """`$` begins a formula in matplotlib, and `[` a style in rich."""
    results["data"]["name"] = results["models"][0]["name"] = AWKWARD
    results["notes"] = [f"a note [/] on {AWKWARD}"]
    write_results(results, tmp_path / "e")
    assert is_png(tmp_path / "e" / "eval.png")
    run = make_log(tmp_path / "run", AWKWARD, "generative", 3, 1.0)
    assert results["notes"][0] in report([run, tmp_path / "e"], tmp_path / "out")
    assert is_png(tmp_path / "out" / "report.png")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "300")
    print_table(results)
    shown = capsys.readouterr().out
    assert AWKWARD in shown.splitlines()[0]
    assert results["notes"][0] in shown


def test_another_font_draws_what_the_first_lacks(tmp_path, results, monkeypatch):
    """Of the fonts that matplotlib ships, STIX has the bold italic letters of mathematics that DejaVu lacks."""
    results["models"][0]["name"] = "\U0001d468\U0001d469"
    monkeypatch.setattr("lbr_dist.evaluation.table.EAST_ASIAN", ("no such font",))
    with pytest.warns(UserWarning, match="missing from font"):
        plot(results, tmp_path / "boxes.png")
    monkeypatch.setattr("lbr_dist.evaluation.table.EAST_ASIAN", ("no such font", "STIXGeneral"))
    with warnings.catch_warnings(action="error"):
        plot(results, tmp_path / "letters.png")
    assert (tmp_path / "letters.png").read_bytes() != (tmp_path / "boxes.png").read_bytes()


def test_the_numbers_outlive_a_picture_that_fails(tmp_path, results, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("lbr_dist.evaluation.table.plot", fail)
    with pytest.raises(MemoryError):
        write_results(results, tmp_path / "e")
    assert json.loads((tmp_path / "e" / "eval.json").read_text()) == results


@pytest.mark.parametrize("size", [100, 3_000])
def test_a_full_disk_leaves_the_earlier_tables_and_pictures(tmp_path, results, size):
    """A file that may not grow is as good; with 3,000 bytes only the pictures fail."""
    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_results(results, out)
    report([out], out)
    there = {file: file.read_bytes() for file in out.iterdir()}
    results["models"] = results["models"][:1]
    (tmp_path / "b.json").write_text(json.dumps(results))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(UserError, match=f"--out {out}: File too large; free space"):
            report([tmp_path / "b.json"], out)
        with pytest.raises(OSError, match="File too large"):
            write_results(results, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert set(out.iterdir()) == set(there)
    assert {file.name for file in there if file.read_bytes() == there[file]} >= {"eval.png", "report.png"}
    assert size > 100 or all(file.read_bytes() == content for file, content in there.items())


def test_a_line_of_a_log_without_a_step_is_passed_over(tmp_path):
    folder = make_log(tmp_path / "a", "a", "generative", 3, 1.0)
    (folder / "metrics.jsonl").write_text('{"loss": 3.0}\n{"step": 7, "loss": 2.0}\n')
    assert "| a | generative | 7 |" in report([folder], tmp_path / "out")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("none", ""),
        ("lines", "metrics.jsonl: 2 of its lines cannot be read, the first is line 2: the report lacks these steps"),
        ("zeros", "metrics.jsonl: no line of it can be read"),
        ("link", "metrics.jsonl: is a link to nothing"),
    ],
)
def test_steps_that_a_report_lacks_are_told(tmp_path, caplog, harm, told):
    """A last line that a kill has cut is none of them."""
    file = make_log(tmp_path / "a", "a", "generative", 6, 1.0) / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.unlink()
    if harm == "link":
        file.symlink_to("/nowhere/metrics.jsonl")
    else:
        harmed = {2: b"x" + lines[1][1:], 4: b"5\n"} if harm == "lines" else {}
        content = b"".join(harmed.get(number, line) for number, line in enumerate(lines, 1))
        file.write_bytes(bytes(len(content)) if harm == "zeros" else content)
    report([tmp_path / "a"], tmp_path / "out")
    assert len(caplog.records) == bool(told)
    assert told in caplog.text


def test_smoothing_keeps_level_and_length():
    values = np.arange(500, dtype=float)
    smoothed = smooth(values)
    assert smoothed[10:-10] == pytest.approx(values[10:-10])
    assert smooth(np.array([3.0])).tolist() == [3.0]
