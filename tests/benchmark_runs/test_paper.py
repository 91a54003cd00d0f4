"""The paper's experiments: every arm at every scale is a valid recipe, and held-out entities stay out."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from benchmarks import jsonl
from benchmarks.paper import __main__ as paper
from benchmarks.paper import adaptive, backbone, prediction, tables, workplace
from benchmarks.paper.__main__ import curves
from benchmarks.paper.arms import ARMS, SHARES, rate_name
from benchmarks.paper.domains import ENTITY, drawn, entity, hold_out, naming_none, stratified
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.scales import SCALES
from benchmarks.paper.search import LEARN, search
from benchmarks.paper.workplace import Workplace, train_arguments
from lbr_dist.config import Bottleneck
from lbr_dist.data.information import model_fingerprint
from lbr_dist.data.plan.lengths import bottleneck_lengths
from lbr_dist.errors import EXIT_USER_ERROR, UserError
from lbr_dist.inference.loading import load_run
from lbr_dist.recipes import load_recipe


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["base", *ARMS])
def test_every_arm_is_a_recipe(name, scale):
    sizes = SCALES[scale]
    if name == "base" and not sizes.language_model:
        return
    recipe, *overrides = train_arguments(sizes, name, 1, 1e-3, f"runs/{name}")
    loaded = load_recipe(recipe, overrides)
    arm = ARMS.get(name)
    assert loaded.stage == (arm.stage if arm else "generative")
    answer = 0 if loaded.stage == "contrastive" else loaded.data.max_y_tokens
    longest = loaded.data.max_x_tokens + loaded.bottleneck.count + answer
    assert longest <= 512, "the small backbone has 512 positions"
    starts = arm is not None and (arm.start != "base" or sizes.language_model)
    assert (loaded.model.start_from is not None) == bool(starts)


def test_arms_start_from_arms_and_use_searched_rates():
    searched = {*LEARN, *LEARN.values(), "cl", "joint"}
    for name, arm in ARMS.items():
        assert arm.start == "base" or ARMS[arm.start].stage == "generative"
        assert rate_name(name) in searched
    for experiment in EXPERIMENTS.values():
        assert {*experiment.arms} <= {"base", *ARMS}


def test_rates_are_searched_unless_a_scale_leaves_nothing_to_search(tmp_path):
    few = SimpleNamespace(scale=SCALES["few-steps"], domain="code")
    rates, source = paper.rates(tmp_path, few)
    assert set(rates) == {*LEARN, *LEARN.values(), "cl", "joint"}
    assert "not searched" in source
    small = SimpleNamespace(scale=SCALES["small"], domain="code")
    with pytest.raises(UserError, match="no learning rates"):
        paper.rates(tmp_path, small)
    tables.write(tmp_path, "search-medicine", "", {"domain": "medicine", "rates": {"cl": 2e-3}, "trials": []})
    assert paper.rates(tmp_path, small) == ({"cl": 2e-3}, "as searched on medicine")


def test_shares_of_figure_3_add_up():
    for kind in ("gl", "ib"):
        for share in SHARES:
            epochs = [
                float(setting.partition("=")[2])
                for name in (f"share_{kind}_{share}_learn", f"share_{kind}_{share}")
                if name in ARMS
                for setting in ARMS[name].settings
                if setting.startswith("duration.epochs")
            ]
            assert sum(epochs) == pytest.approx(2.0)


def test_held_out_entities_leave_training():
    rows = [{"id": f"m:{i // 3}:{i % 3}", "question": f"q{i}", "answer": f"a{i}"} for i in range(300)]
    dev, test, rest = hold_out(rows, 10, 20)
    assert (len(dev), len(test)) == (10, 20)
    held = {entity(row) for row in (*dev, *test)}
    assert len(held) == 30
    assert not held & {entity(row) for row in rest}
    assert len(rest) == 300 - 3 * 30
    assert hold_out(rows, 10, 20) == (dev, test, rest)
    assert ENTITY.startswith("id~")


def test_text_apart_names_nothing_that_is_held_out():
    apart = naming_none(
        [
            {"question": "What is breast DLBCL?", "answer": "breast large B-cell lymphoma: A lymphoma: rare."},
            {"question": "Which disease is it?", "answer": "rash"},
        ]
    )
    texts = [
        "Breast DLBCL is another name of it.",
        "See breast large-b cell lymphoma.",
        "The breast, DLBCLs and lymphoma: A lymphoma.",
        "A rash. Which disease is it?",
    ]
    assert [apart(text) for text in texts] == [False, False, True, True]
    assert [row["text"] for row in drawn(texts, apart)] == texts[2:]
    assert len(list(drawn(texts, None))) == 4


def test_strata_have_equally_many_of_each_length():
    lengths = [*range(1, 93)] * 4 + [*range(100, 180)] + [*range(200, 300)] + [400] * 10
    chosen = [lengths[number] for number in stratified(lengths)]
    low, middle, high = (sum(a < length <= b for length in chosen) for a, b in ((0, 92), (92, 184), (184, 400)))
    assert low == middle == high == 80, "the few longest are one band with those below"
    assert stratified([7] * 20) == [*range(20)]


def toy(tmp_path, monkeypatch, experiment, arms):
    """Set up an experiment at toy size; returns the command."""
    monkeypatch.setitem(EXPERIMENTS, experiment, replace(EXPERIMENTS[experiment], arms=arms))
    words = ["fever", "rash", "heart", "blood", "measles", "aspirin"]
    rows = [
        {"id": f"m:{i}:0", "question": f"{words[i % 6]} {i}?", "answer": f"{words[i % 5]} is {i} {words[i % 4]}"}
        for i in range(240)
    ]
    jsonl.write(tmp_path / "medicine.jsonl", rows)
    rates = {"domain": "medicine", "rates": {"ib_gl": 1e-3, "lbr": 1e-3}, "trials": []}
    tables.write(tmp_path / "out" / "toy", "search-medicine", "", rates)
    folders = ("--data", str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"))
    monkeypatch.setattr("sys.argv", ["paper", experiment, "--scale", "toy", "--seeds", "1", *folders])
    return paper.main


@pytest.mark.timeout(600)
def test_a_search_and_an_experiment_at_toy_size(tmp_path, monkeypatch):
    """Data, base, search, and a table of the runs that the search chose: nothing is trained a second time."""
    run = toy(tmp_path, monkeypatch, "table4", ("lbr",))
    monkeypatch.setattr("benchmarks.paper.search.LEARN", {"ib_gl": "lbr"})
    monkeypatch.setattr("sys.argv", ["paper", "search", *sys.argv[2:]])
    run()
    runs = tmp_path / "work" / "toy" / "medicine" / "seed-0" / "runs"
    assert (runs / "lbr").resolve() == runs / "search" / "ib_gl-0.001-lbr-0.001"
    finished = {file: file.stat().st_mtime for file in runs.rglob("*.finished.json")}
    assert {file.name.removesuffix(".finished.json") for file in finished} >= {"base", "cl", "ib_gl", "lbr"}
    monkeypatch.setattr("sys.argv", ["paper", "table4", *sys.argv[2:]])
    run()
    assert {file: file.stat().st_mtime for file in runs.rglob("*.finished.json")} == finished
    text = (tmp_path / "out" / "toy" / "search-medicine.md").read_text()
    assert "| lbr | 0.001 | lbr |" in text
    text = (tmp_path / "out" / "toy" / "table4-medicine.md").read_text()
    assert "toy: only shows that everything runs" in text
    assert "| LLM + IB-GL + CL (LBR) |" in text
    assert (tmp_path / "out" / "toy" / "table4-medicine.png").stat().st_size > 1000


@pytest.mark.timeout(600)
def test_a_backbone_that_is_a_language_model_is_evaluated_as_it_is(tmp_path, monkeypatch):
    """As at the scales of SmolLM2-135M: `LLM` is the backbone, and no base is trained."""
    texts = tmp_path / "work" / "toy" / "medicine" / "qa.jsonl"
    monkeypatch.setattr(backbone, "smollm2", lambda out: backbone.random_llama(out, [texts], 0))
    monkeypatch.setitem(SCALES, "toy", replace(SCALES["toy"], language_model=None))
    toy(tmp_path, monkeypatch, "table3", ("base", "cl"))()
    runs = texts.parent / "seed-0" / "runs"
    assert {file.name for file in runs.glob("*.finished.json")} == {"cl.finished.json"}
    text = (tmp_path / "out" / "toy" / "table3-medicine.md").read_text()
    assert "| LLM |" in text
    assert "| LLM + CL |" in text


@pytest.mark.timeout(600)
def test_seeds_are_added_to_those_on_record(tmp_path, monkeypatch, capsys):
    """On a machine that has not the runs of the earlier ones; never to those of other data, models or rates."""
    run = toy(tmp_path, monkeypatch, "table3", ("base",))
    run()
    file = tmp_path / "out" / "toy" / "table3-medicine.json"
    first = json.loads(file.read_text())
    first["made"][0] = {"hardware": "An older machine", "date": "2026-01-01"}
    file.write_text(json.dumps(first))
    seeds = tmp_path / "work" / "toy" / "medicine" / "seed-0"
    shutil.rmtree(seeds)
    monkeypatch.setattr("sys.argv", [*sys.argv, "--seeds", "2", "--from-seed", "1"])
    run()
    both = json.loads(file.read_text())
    assert not seeds.exists()
    assert both["seeds"][0] == first["seeds"][0]
    assert [model["name"] for model in both["seeds"][1]] == ["LLM", "BM25"]
    assert both["made"] == [first["made"][0], paper.here()]
    text = file.with_suffix(".md").read_text()
    assert "over 2 seeds. An older machine, 2026-01-01; " in text

    def refused(match, **changes):
        file.write_text(json.dumps({**both, **changes}))
        assert run() == EXIT_USER_ERROR
        assert match in capsys.readouterr().err

    refused("has 0 of the 1 seeds", seeds=[])
    refused("another scale or other learning rates", notes=["Learning rates as searched on code: {}."])
    refused("another scale or other learning rates", scale="small")
    refused("has not the models LLM, BM25", seeds=[both["seeds"][0][::-1]])
    bm25 = {**both["seeds"][0][1], "retrieval": {"ndcg_at_10": 0.123}}
    refused("made from another --data", questions="others")
    refused("made from another --data", questions=None, seeds=[[both["seeds"][0][0], bm25]])
    file.unlink()
    assert run() == EXIT_USER_ERROR
    assert "no results of the seeds before 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["table3", "table4"])
def test_seeds_of_other_questions_are_not_added(name, tmp_path, monkeypatch, capsys):
    """Whether BM25 is among the models or not; results of earlier versions without it are taken, and it is said."""
    place = fake_place(tmp_path, monkeypatch)
    place.scale = SCALES["few-steps"]
    run = partial(paper.run, place, name, EXPERIMENTS[name], out=tmp_path)
    run(first=0, seeds=1)
    file = tmp_path / f"{name}-medicine.json"
    first = json.loads(file.read_text())
    run(first=1, seeds=2)
    assert json.loads(file.read_text())["questions"] == first["questions"]
    (place.folder / "test.jsonl").write_text("others")
    file.write_text(json.dumps(first))
    with pytest.raises(UserError, match="made from another --data"):
        run(first=1, seeds=2)
    del first["questions"]
    file.write_text(json.dumps(first))
    run(first=1, seeds=2)
    assert ("does not say which questions were asked" in capsys.readouterr().out) == (name == "table4")


def test_results_of_more_seeds_stay(tmp_path, monkeypatch):
    place = fake_place(tmp_path, monkeypatch)
    place.scale = SCALES["few-steps"]
    run = partial(paper.run, place, "table4", EXPERIMENTS["table4"], first=0)
    run(seeds=2, out=tmp_path)
    with pytest.raises(UserError, match="has 2 seeds, and --seeds 1 would replace them"):
        run(seeds=1, out=tmp_path)
    run(seeds=1, out=tmp_path / "other")
    run(seeds=3, out=tmp_path)
    assert len(json.loads((tmp_path / "table4-medicine.json").read_text())["seeds"]) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seeds", "2", "--from-seed", "2"), "--from-seed 2 is none of the 2 --seeds"),
        (("--seeds", "0"), "--seeds 0: at least 1"),
        (("--jobs", "0"), "--jobs 0: at least 1"),
    ],
)
def test_flags_that_do_not_work_are_named(flags, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["paper", "table3", *flags])
    with pytest.raises(SystemExit) as ended:
        paper.main()
    assert ended.value.code == EXIT_USER_ERROR
    assert f"python -m benchmarks.paper: error: {said}" in capsys.readouterr().err


def test_what_is_missing_is_named_before_anything_is_made(tmp_path, monkeypatch, capsys):
    folders = ("--data", str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"))

    def refused(said, *arguments):
        monkeypatch.setattr("sys.argv", ["paper", *arguments, *folders])
        assert paper.main() == EXIT_USER_ERROR
        assert said in capsys.readouterr().err
        assert not {*tmp_path.iterdir()} - {tmp_path / "medicine.jsonl"}

    refused("medicine.jsonl[.gz] is not there", "search")
    refused("table3 of no domain", "separation")
    refused("no table3", "overview")
    jsonl.write(tmp_path / "medicine.jsonl", [])
    refused("no learning rates", "table3")
    refused("no learning rates", "search-joint")
    refused("no results of the seeds before 1", "table3", "--scale", "few-steps", "--from-seed", "1")


class FakeLbr:
    """Writes what later steps read of a run, and counts."""

    trained: ClassVar[list[str]] = []

    def __init__(self, folder, **_):
        self.folder = folder

    def __call__(self, log, command, *arguments):
        if command == "train":
            run = next(self.folder / each.removeprefix("output=") for each in arguments if each.startswith("output="))
            run.mkdir(parents=True)
            self.trained.append(run.name)
            (run / "metrics.jsonl").write_text(2 * (json.dumps({"step_s": 1.5, "tokens": 10}) + "\n"))
        if command == "eval":
            out = self.folder / arguments[arguments.index("--out") + 1]
            out.mkdir(parents=True, exist_ok=True)
            models = [scores(spec, 0.5) for spec in arguments[: arguments.index("--data")]]
            (out / "eval.json").write_text(json.dumps({"models": models}))


def fake_place(tmp_path, monkeypatch):
    """A workplace of medicine at scale small in which nothing is computed."""
    monkeypatch.setattr(workplace, "Lbr", FakeLbr)
    monkeypatch.setattr(FakeLbr, "trained", [])
    monkeypatch.setattr(Workplace, "_backbone", lambda *_: None)

    def make_data(lbr, source, *_):
        (lbr.folder / "data").mkdir(parents=True)
        shutil.copy(source / "medicine.jsonl", lbr.folder / "test.jsonl")

    monkeypatch.setattr(workplace, "make_data", make_data)
    if not (tmp_path / "medicine.jsonl").exists():
        jsonl.write(tmp_path / "medicine.jsonl", [{"id": "m:1:0"}])
    place = Workplace(tmp_path / "work", "small", "medicine", tmp_path, 1)
    place.prepare()
    return place


def test_an_arm_is_trained_again_where_what_it_starts_from_was(tmp_path, monkeypatch):
    place = fake_place(tmp_path, monkeypatch)
    recipes = shutil.copytree(workplace.RECIPES, tmp_path / "recipes")
    monkeypatch.setattr(workplace, "RECIPES", recipes)

    def trained(rate):
        FakeLbr.trained.clear()
        place.train(["cl", "lbr"], 0, {"ib_gl": rate, "cl": 1e-3, "lbr": 1e-3})
        return FakeLbr.trained

    assert trained(1e-3) == ["base", "cl", "ib_gl", "lbr"]
    assert trained(1e-3) == []
    assert trained(5e-4) == ["ib_gl", "lbr"]
    with (recipes / "generative.yaml").open("a") as file:
        file.write("seed: 1\n")
    assert trained(5e-4) == ["base", "cl", "ib_gl", "lbr"]
    with (recipes / "contrastive.yaml").open("a") as file:
        file.write("seed: 1\n")
    assert trained(5e-4) == ["cl", "lbr"]


def test_an_arm_whose_new_training_was_killed_is_not_the_old_one(tmp_path, monkeypatch):
    place = fake_place(tmp_path, monkeypatch)
    place.train(["cl"], 0, {"cl": 1e-3})
    with monkeypatch.context() as killed:
        killed.setattr(FakeLbr, "__call__", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            place.train(["cl"], 0, {"cl": 2e-3})
    FakeLbr.trained.clear()
    place.train(["cl"], 0, {"cl": 1e-3})
    assert FakeLbr.trained == ["cl"]


def test_a_search_gives_its_runs_to_the_arms_anew_where_they_start_from_another(tmp_path, monkeypatch):
    place = fake_place(tmp_path, monkeypatch)
    place.scale = replace(place.scale, contrastive_rates=(1e-3,), judging_rate=1e-3)
    best: dict[str, float] = {}
    monkeypatch.setattr(Workplace, "dev_score", lambda _, run: float(f"ib_gl-{best['ib_gl']:g}-" in run))
    runs = place.folder / "seed-0" / "runs"
    for rate in (1e-3, 4e-3):
        best["ib_gl"] = rate
        rates = search(place)["rates"]
        assert rates["ib_gl"] == rate
        assert (runs / "lbr").resolve() == runs / "search" / f"ib_gl-{rate:g}-lbr-0.001"
        FakeLbr.trained.clear()
        place.train(["cl", "gl_cl", "lbr"], 0, rates)
        assert FakeLbr.trained == []


def test_training_costs_are_of_all_stages_after_the_base(tmp_path, monkeypatch):
    place = fake_place(tmp_path, monkeypatch)
    place.train(["lbr"], 0, {})
    base, lbr = place.evaluate(["base", "lbr"], 0)
    stage = {"steps": 2, "seconds": 3.0, "tokens": 20}
    assert lbr["training"]["stages"] == {"ib_gl": stage, "lbr": stage}
    assert lbr["training"]["all"] == {"steps": 4, "seconds": 6.0, "tokens": 40}
    assert "training" not in base
    text = tables.markdown([[lbr]], costs=True)
    assert "| training, all stages [s] |" in text
    assert text.endswith("| 6 |")


def test_training_times_of_earlier_versions_are_not_averaged_with_those_of_all_stages(tmp_path, monkeypatch):
    place = fake_place(tmp_path, monkeypatch)
    place.scale = SCALES["few-steps"]
    run = partial(paper.run, place, "joint", EXPERIMENTS["joint"], out=tmp_path)
    run(first=0, seeds=1)
    file = tmp_path / "joint-medicine.json"
    first = json.loads(file.read_text())
    for model in first["seeds"][0]:
        model["training"] = {"steps": 2, "seconds": 500.0, "tokens": 20}
    file.write_text(json.dumps(first))
    run(first=1, seeds=2)
    text = file.with_suffix(".md").read_text()
    assert "| LLM + IB-GL + CL (LBR) | 0.500 | 0.500 | 0.00 | 6 |" in text
    assert "Training times are of the seeds from 1 on" in text


def test_data_made_from_other_files_or_sizes_are_refused(tmp_path, monkeypatch):
    place = fake_place(tmp_path, monkeypatch)
    marker = place.folder / "data" / "finished"
    made = marker.read_text()

    def refused(match):
        with pytest.raises(UserError, match=match):
            fake_place(tmp_path, monkeypatch)

    (tmp_path / "medicine.corpus.txt").write_text("fever\n")
    refused(r"make \(medicine.corpus.txt differ\); give the --data of then, or another --work")
    (tmp_path / "medicine.corpus.txt").unlink()
    with monkeypatch.context() as larger:
        larger.setitem(SCALES, "small", replace(SCALES["small"], test=2000))
        refused(r"make \(test differ\)")
    marker.write_text("")
    refused("does not say what its data were made from .* or give another --work")
    marker.write_text(made)
    fake_place(tmp_path, monkeypatch)
    (tmp_path / "medicine.jsonl").write_text("another\n")
    refused(r"make \(medicine.jsonl differ\)")
    (tmp_path / "medicine.jsonl").rename(tmp_path / "other.jsonl")
    with pytest.raises(UserError, match=r"medicine.jsonl\[.gz\] is not there"):
        Workplace(tmp_path / "work", "small", "medicine", tmp_path, 1)


@pytest.mark.timeout(600)
def test_adaptive_bottlenecks_at_toy_size(tmp_path, monkeypatch):
    """The language model is exported and measures the set, both stages train by it, and the evaluation uses it."""
    toy(tmp_path, monkeypatch, "adaptive", ("lbr_surprisal",))()
    runs = tmp_path / "work" / "toy" / "medicine" / "seed-0" / "runs"
    recipes = [load_recipe(runs / name / "recipe.yaml") for name in ("ib_gl_surprisal", "lbr_surprisal")]
    first, second = (recipe.bottleneck.by_surprisal for recipe in recipes)
    assert first == second
    assert first.bits > 1
    text = (tmp_path / "out" / "toy" / "adaptive-medicine.md").read_text()
    assert "| IB-GL + CL, Z by surprisal |" in text
    run = replace(load_run(runs / "lbr_surprisal"), recipe=recipes[1])
    with pytest.raises(UserError, match="language-model: there is no model folder"):
        run.encoder()
    monkeypatch.chdir(runs.parents[1])
    assert run.encoder().samples(["fever"], "query")[0].z >= 1
    weights = next(Path("seed-0/language-model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    model_fingerprint.cache_clear()
    with pytest.raises(UserError, match=r"is not the one that .* was trained by"):
        run.encoder()


@pytest.mark.parametrize("unit", ["ratio", "bits"])
def test_adaptive_bottlenecks_have_the_average_of_the_fixed_one(unit):
    rng = np.random.default_rng(0)
    x_N, bits_N = rng.integers(5, 150, 5000), rng.uniform(20, 900, 5000)
    found = adaptive.calibrate(unit, x_N, bits_N)
    one = {"ratio": found} if unit == "ratio" else {"surprisal": {"model": "any", "bits": found}}
    bottleneck = Bottleneck.model_validate({"max_tokens": adaptive.MOST, **one})
    assert bottleneck_lengths(bottleneck, x_N, bits_N).mean() == pytest.approx(adaptive.AVERAGE, abs=0.1)


def scores(name, ndcg, sr=0.0):
    return {
        "name": name,
        "retrieval": {"ndcg_at_10": ndcg, "recall_at_10": ndcg},
        "separation": {"sr": sr, "auc": 0.5 + sr / 10, "alignment": 1.0, "uniformity": -1.0},
    }


def test_table_has_mean_and_deviation_over_seeds():
    text = tables.markdown([[scores("LBR", 0.4)], [scores("LBR", 0.6)]])
    assert "| LBR | 0.500 ± 0.141 | 0.500 ± 0.141 |" in text


def test_figure_3_reads_kind_and_share_from_the_arm():
    arms = ("share_gl_0", "share_ib_100_learn")
    found = curves([[scores("a", 0.1), scores("b", 0.2)]], arms)
    assert found["GL"][0] == [0.1]
    assert found["IB-GL"][100] == [0.2]


def test_overview_draws_the_domains_that_were_run(tmp_path):
    with pytest.raises(UserError, match="table3 --scale"):
        paper.stage_by_stage(tmp_path)
    for domain, value in (("code", 0.3), ("medicine", 0.5)):
        seeds = [[scores("LLM", value), scores("BM25", 0.4)], [scores("LLM", value + 0.1), scores("BM25", 0.4)]]
        (tmp_path / f"table3-{domain}.json").write_text(json.dumps({"seeds": seeds}))
    found = paper.stage_by_stage(tmp_path)
    assert found == {
        "medicine": {"LLM": [0.5, 0.6], "BM25": [0.4, 0.4]},
        "code": {"LLM": [0.3, 0.4], "BM25": [0.4, 0.4]},
    }
    tables.domains(found, tmp_path / "overview.png")
    assert (tmp_path / "overview.png").stat().st_size > 1000


def test_prediction_ranks_domains(tmp_path):
    files = []
    for domain, sr, gain in (("code", 0.1, 0.3), ("medicine", 0.5, 0.2), ("chemistry", 0.9, 0.1)):
        models = [scores("LLM", 0.1, sr), scores("LLM + IB-GL", 0.2, sr + 1), scores("LLM + CL", 0.3)]
        models.append(scores("LLM + IB-GL + CL (LBR)", 0.3 + gain))
        files.append(tmp_path / f"table3-{domain}.json")
        files[-1].write_text(json.dumps({"seeds": [models]}))
    text, data = prediction.correlate(files)
    assert data["spearman"]["SR"] == pytest.approx(-1.0)
    assert "| SR | -1.00 |\n" in text
    with pytest.raises(UserError, match="table3 of code; run it for two or more"):
        prediction.correlate(files[:1])
