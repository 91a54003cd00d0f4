"""Recipes: what is refused, with which words, and what overrides do."""

import json
import re
from pathlib import Path

import pytest
import yaml

from lbr_dist.config import Bottleneck, Recipe
from lbr_dist.errors import UserError
from lbr_dist.recipes import FOLDER, load_recipe, parse_recipe, save_recipe
from lbr_dist.recipes.settings import markdown, settings

MINIMAL = {
    "stage": "generative",
    "output": "runs/a",
    "model": {"path": "base"},
    "data": {"sets": [{"path": "set"}]},
    "batch": {"global_batch": 4},
    "duration": {"epochs": 1},
}


def write(tmp_path: Path, raw: dict) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_round_trip_of_the_resolved_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["optim.lr=1e-3", "data.sets.0.weight=2", "bottleneck.tokens=2"])
    assert (recipe.optim.lr, recipe.data.sets[0].weight, recipe.bottleneck.count) == (1e-3, 2.0, 2)
    save_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": {"lrr": 1}}, ["optim.lrr", "did you mean optim.lr?"]),
        ({"model": {"path": "b", "lora": {"rr": 1}}}, ["model.lora.rr", "did you mean model.lora.r?"]),
        ({"dat": {}}, ["unknown key dat", "did you mean data?"]),
        ({"optim": {"learning_rate": 1}}, ["unknown key optim.learning_rate; did you mean optim.lr?"]),
        ({"learning-rate": 1}, ["unknown key learning-rate; did you mean optim.lr?"]),
        ({"batch": {"size": 1, "global_batch": 1}}, ["unknown key batch.size; did you mean batch.global_batch?"]),
        ({"weight_decay": 1}, ["did you mean optim.weight_decay?"]),
        ({"duration": {"epochs": 1, "x": 1}}, ["unknown key duration.x; valid keys: epochs, steps"]),
        ({"model": {"path": "b", "lora": {"target_modules": "q"}}}, ["all-linear, or a list of names: write [q] ("]),
        ({"model": {"path": "b", "lora": {"train_modules": "q"}}}, ["should be a valid list: write [q] ("]),
        ({"contrastive": {"query_instruction": {"Q": None}}}, ["query_instruction", "put a text in quotes"]),
        ({"output": ""}, ["output", "is empty: name a path"]),
        ({"output": "$SCRATCH/r1"}, ["output: $SCRATCH is not expanded here: write the path itself"]),
        ({"output": "/a/${USER}/r1"}, ["output: ${USER} is not expanded"]),
        ({"output": "a/" + "é" * 128}, ["output", "name of more than 255 bytes"]),
        ({"output": "a\0b"}, ["output", "zero byte"]),
        ({"bottleneck": {"tokens": 1, "ratio": 500}}, ["bottleneck.tokens", "bottleneck.ratio"]),
        ({"duration": {"epochs": 1, "steps": 1}}, ["duration.epochs", "duration.steps"]),
        ({"duration": {}}, ["duration.epochs", "duration.steps"]),
        ({"batch": {}}, ["batch.global_batch is missing"]),
        ({"optim": {"lr": -1}}, ["optim.lr", "greater than 0", "-1"]),
        ({"optim": {"lr": float("inf")}}, ["optim.lr", "finite", "inf"]),
        ({"seed": 1 << 63}, ["seed", "less than"]),
        ({"data": {"sets": [{"path": "a"}], "bin_tokens": 10**20}}, ["data.bin_tokens", "less than"]),
        ({"contrastive": {"temperature": 0}}, ["contrastive.temperature", "greater than 0"]),
        ({"contrastive": {"final_temperature": 0.1}}, ["temperature_schedule", "final_temperature"]),
        ({"contrastive": {"temperature": 0.5, "learn_temperature": {"highest": 0.1}}}, ["0.5", "highest (0.1)"]),
        ({"contrastive": {"matryoshka": {"dims": [8, 8]}}}, ["matryoshka.dims", "twice"]),
        ({"contrastive": {"matryoshka": {"dims": [8], "weights": [1, 2]}}}, ["2 values", "dims has 1"]),
        ({"joint": {"final_weight": 0.1}}, ["joint.schedule", "joint.final_weight"]),
        (
            {"stage": "contrastive", "data": {"sets": [{"path": "s", "target": "prefix"}]}},
            ["sets.0.target: has no effect"],
        ),
        (
            {"stage": "joint", "data": {"sets": [{"path": "s"}, {"path": "s", "split": "cl", "target": "sft"}]}},
            ["sets.1.target: has no effect"],
        ),
        ({"joint": {"bins": 8, "weight": 0.9}}, ["joint.bins, joint.weight: has no effect", "set stage: joint"]),
        ({"stage": "joint", "data": {"sets": [{"path": "a", "split": "gl"}]}}, ["no set", "contrastive loss"]),
        ({"stage": "contrastive", "bottleneck": {"enabled": False}}, ["contrastive.pooling", "bottleneck.enabled"]),
        ({"stage": "contrastive", "contrastive": {"pooling": "last"}}, ["'last' but", "set bottleneck.enabled=false"]),
        ({"stage": "contrastive", "contrastive": {"query_instruction": "Q: "}}, ["query_instruction", "line break"]),
        ({"generative": {"prefix_min": 0.9, "prefix_max": 0.1}}, ["prefix_min", "prefix_max"]),
        ({"data": {"sets": [{"path": "a"}], "bin_tokens": 100}}, ["data.bin_tokens (100)", "2048"]),
        ({"stage": "joint", "data": {"sets": [{"path": "a"}], "bin_tokens": 100}}, ["data.bin_tokens (100)"]),
        ({"data": {"sets": []}}, ["data.sets"]),
        ({"model": None}, ["model"]),
        ({"model": {"path": "b", "attention": "varlen"}}, ["model.attention=varlen", "model.dtype=bfloat16"]),
        ({"optim": {"betas": [0.9, 1.5]}}, ["optim.betas.1", "less than 1"]),
        ({"optim": {"lr": True}}, ["optim.lr", "no true or false", "True"]),
        ({"contrastive": {"hard_negatives": True}}, ["contrastive.hard_negatives", "no true or false"]),
        ({"model": {"path": "b", "lora": {"dropout": 1}}}, ["model.lora.dropout", "less than 1"]),
    ],
)
def test_refusals_name_the_culprit(change: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe({**MINIMAL, **change}, "r.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("recipe r.yaml")
    for word in words:
        assert word in message


def test_bad_files_and_overrides(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "missing.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(bad)
    bad.write_text("stage: generative\noutput: {{ run }}\n")
    with pytest.raises(UserError, match="not valid YAML: line 2: a name was expected"):
        load_recipe(bad)
    bad.write_text("- 1")
    with pytest.raises(UserError, match="expected a mapping"):
        load_recipe(bad)
    good = write(tmp_path, MINIMAL)
    with pytest.raises(UserError, match="key=value"):
        load_recipe(good, ["optim.lr"])
    with pytest.raises(UserError, match="is a value, not a section"):
        load_recipe(good, ["stage.x.y=1"])
    for index in ("3", "²"):
        with pytest.raises(UserError, match=f"{index} is not an index"):
            load_recipe(good, [f"data.sets.{index}.weight=1"])
    for foreign in ("optim.lr+", "+optim.lr", "data.sets[0].weight"):
        with pytest.raises(UserError, match="is no name of a setting: write key=value, as optim"):
            load_recipe(good, [f"{foreign}=1"])
    with pytest.raises(UserError, match="no such file"):
        load_recipe("a" * 300)


def test_an_override_without_a_value_unsets_nothing(tmp_path: Path) -> None:
    """A script's variable that is not set undid the recipe's own value."""
    file = write(tmp_path, {**MINIMAL, "model": {"path": "base", "start_from": "run"}})
    for blank in ("", " ", "\n"):
        with pytest.raises(
            UserError,
            match=r"^override 'model.start_from=.*': has no value; write '.*=\"\"' .*, or .*=null to unset it$",
        ):
            load_recipe(file, [f"model.start_from={blank}"])
    for nothing in ("#b", "---", "!!null ''"):
        with pytest.raises(UserError, match="YAML reads no value in it; put a text in quotes, or write null"):
            load_recipe(file, [f"tracking.name={nothing}"])
    for null in ("null", "~"):
        assert load_recipe(file, [f"model.start_from={null}"]).model.start_from is None


def test_an_override_changes_one_of_the_places_that_an_alias_names(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL)
    text = yaml.dump({key: value for key, value in MINIMAL.items() if key != "data"})
    file.write_text(text + "data: {sets: [&one {path: a}, *one]}\n")
    assert [s.path for s in load_recipe(file, ["data.sets.1.path=b"]).data.sets] == ["a", "b"]
    file.write_text("data: &all {sets: *all}")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(file)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    raw = {**MINIMAL, "output": "~/a", "model": {"path": "~/m", "start_from": "~/r"}, "deepspeed": "~/ds.json"}
    recipe = load_recipe(write(tmp_path, raw), ["data.sets.0.path=~/set", "data.cache_dir=~/cache"])
    found = [recipe.output, recipe.model.path, recipe.model.start_from, recipe.data.sets[0].path, recipe.data.cache_dir]
    assert found == ["/home/me/a", "/home/me/m", "/home/me/r", "/home/me/set", "/home/me/cache"]
    assert recipe.deepspeed == "/home/me/ds.json"


@pytest.mark.parametrize("path", ["pipe:cat $DATA/{}", "costs$5", "https://host/" + "a" * 300])
def test_what_only_looks_like_a_variable_or_a_long_name_is_taken(path: str) -> None:
    assert parse_recipe({**MINIMAL, "data": {"sets": [{"path": path}]}}, "r.yaml").data.sets[0].path == path


@pytest.mark.parametrize(("x", "z"), [(0, 1), (1, 1), (500, 1), (501, 2), (1000, 2), (10_000, 8)])
def test_ratio_gives_the_number_of_bottleneck_tokens(x: int, z: int) -> None:
    assert Bottleneck().length(x) == z
    assert Bottleneck(tokens=3).length(x) == 3
    assert Bottleneck(enabled=False).length(x) == 0


def test_every_setting_is_documented() -> None:
    def check(section: type) -> int:
        seen = 0
        for name, field in section.model_fields.items():
            seen += 1
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Recipe.__base__):
                seen += check(inner)
            else:
                assert field.description, f"{section.__name__}.{name} has no description"
        return seen

    assert check(Recipe) > 60


def test_shipped_recipes_are_valid() -> None:
    import lbr_dist

    shipped = sorted((Path(lbr_dist.__file__).parent / "recipes").glob("*.yaml"))
    assert shipped
    for path in shipped:
        load_recipe(path.stem)


def test_a_key_given_twice_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("stage: generative\nseed: 1\noptim:\n  lr: 1.0e-4\n  lr: 1.0e-3\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: not valid YAML: lr is given twice \(line 5\): remove one"):
        load_recipe(file)
    with pytest.raises(UserError, match=r"override 'optim=\{lr: 1, lr: 2\}': not valid YAML: lr is given twice"):
        load_recipe("stage1", ["optim={lr: 1, lr: 2}"])
    assert load_recipe("stage1", ["tracking.name=a: {b"]).tracking.name == "a: {b"


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("010", 10),
        ("08", 8),
        ("1_000", 1000),
        ("0x10", 16),
        ("1e1", 10.0),
        ("+2.5e+1", 25.0),
        (".5E1", 5.0),
        ("5.", 5.0),
    ],
)
def test_numbers_are_those_of_yaml_1_2(written, number, tmp_path):
    recipe = load_recipe("stage1", [f"optim.lr={written}"])
    assert recipe.optim.lr == number
    file = tmp_path / "recipe.yaml"
    file.write_text(re.sub("lr: [^,]*", f"lr: {written}", (FOLDER / "stage1.yaml").read_text(), count=1))
    assert load_recipe(file).optim.lr == number


@pytest.mark.parametrize(
    "text", ["1:30", "1e5", "010", ".5", "0x1F", "1_0", "yes", "~", "=", ".NaN", "5.", "-1e-3", "0b11"]
)
def test_a_text_that_looks_like_something_else_stays_one(text, tmp_path):
    recipe = load_recipe("stage1", [f"tracking.name='{text}'"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml").tracking.name == text
    assert load_recipe("stage1", ["tracking.name=1:30"]).tracking.name == "1:30"


@pytest.mark.parametrize("text", ["!!int ten", "!!float ten", "!!timestamp ten"])
def test_a_value_that_is_not_of_its_tag_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"override 'seed=!!.* ten': not valid YAML"):
        load_recipe("stage1", [f"seed={text}"])
    (tmp_path / "recipe.yaml").write_text(f"stage: generative\nseed: {text}\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: not valid YAML"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("day", ["2026-11-29", "2026-99-99", "2026-11-29 10:00:00"])
def test_a_name_that_is_a_date(day, tmp_path):
    assert load_recipe("stage1", [f"tracking.name={day}"]).tracking.name == day
    recipe = load_recipe("stage1", [f"output={day}"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    file = tmp_path / "mine.yaml"
    shipped_text = (FOLDER / "stage1.yaml").read_text()
    file.write_text(re.sub("^output: .*", f"output: {day}", shipped_text, flags=re.MULTILINE))
    assert load_recipe(file).output == day


def test_the_reference_page_lists_every_setting():
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == markdown(), "make docs"
    named = {setting.name for setting in settings()}
    assert {"optim.lr", "data.sets.N.weight", "model.lora.r", "contrastive.temperature"} <= named
    for setting in settings():
        assert setting.meaning, setting.name
        assert setting.default is None or json.loads(setting.default) != {}, "a section is listed by its parts"


def test_what_a_run_has_kept_is_not_judged_again(tmp_path: Path) -> None:
    file = write(tmp_path, {**MINIMAL, "output": "$SCRATCH/r1", "joint": {"weight": 0.9}})
    with pytest.raises(UserError, match="is not expanded here"):
        load_recipe(file)
    with pytest.raises(UserError, match="has no effect with stage 'generative'"):
        load_recipe(file, ["output=r1"])
    kept = load_recipe(file, kept=True)
    assert (kept.output, kept.joint.weight) == ("$SCRATCH/r1", 0.9)
