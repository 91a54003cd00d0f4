"""What is checked before a model is loaded; with real ranks: tests/distributed/test_train.py."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import make_run, write_manifest
from training_runs import make_set, recipe

from lbr_dist.data.plan.base import FOLLOWS
from lbr_dist.data.shards import check_file
from lbr_dist.environment import Environment
from lbr_dist.errors import UserError
from lbr_dist.recipes import load_recipe, parse_recipe, save_recipe
from lbr_dist.training import preflight
from lbr_dist.training.checkpoint.format import encode_manifest, read_manifest
from lbr_dist.training.ds_config import Regime
from lbr_dist.training.origin import check_resumed_model, other_attention
from lbr_dist.training.position import _check_plan, choose, loop_state
from lbr_dist.training.preflight import Job, check, deep_check, disagreement, same_everywhere
from lbr_dist.training.run_folder import check_same, claim
from lbr_dist.training.run_recipe import covered, flat

ENVIRONMENT = Environment(0, 2, 0, 2, None, "test")


@pytest.fixture
def raw(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    return recipe(tmp_path / "run", tiny_model_dir(), make_set(tmp_path / "set", tiny_model_dir()))


def test_ranks_must_agree_on_what_deepspeed_is_given(raw: dict[str, Any]) -> None:
    """A file of the same name with another content; the disk of an offload may be each machine's own."""
    job = check(parse_recipe(raw, "test"), ENVIRONMENT)

    def with_zero(**zero: Any) -> dict[str, str]:
        config = {**job.regime.config, "zero_optimization": {"stage": 3, **zero}}
        return same_everywhere(dataclasses.replace(job, regime=Regime("mine.json", config)))

    one, two = ({"device": "nvme", "nvme_path": path} for path in ("/disk1", "/disk2"))
    assert disagreement([with_zero(offload_param=one), with_zero(offload_param=two)]) == ""
    problem = disagreement([with_zero(overlap_comm=False), with_zero(overlap_comm=True)])
    assert "(DeepSpeed file: zero_optimization.overlap_comm is True and not False)" in problem


def test_the_accelerator_is_named_before_deepspeed_is_imported(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = check(parse_recipe(raw, "test"), ENVIRONMENT)
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError):
        same_everywhere(job)
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_ranks_must_agree_on_the_tokens_around_a_text(raw: dict[str, Any]) -> None:
    job = check(parse_recipe(raw, "test"), ENVIRONMENT)
    other = dataclasses.replace(job, tokenization=dataclasses.replace(job.tokenization, eos_id=1))
    problem = disagreement([same_everywhere(job), same_everywhere(other)])
    assert "(tokenizer: eos_id is 1 and not 0)" in problem


def test_a_model_that_moved_is_the_same_and_one_with_another_end_of_text_is_not(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    run, moved = make_run(tmp_path / "run", tiny_model_dir()), shutil.copytree(tiny_model_dir(), tmp_path / "moved")
    settings = load_recipe(run / "recipe.yaml").model_dump(mode="json")
    there = parse_recipe({**settings, "model": {**settings["model"], "path": str(moved)}}, "test")
    assert check_same(run, there) == [f"model.path was '{tiny_model_dir()}' and is now '{moved}'"]
    assert check_resumed_model(there, "auto", ()) == ""
    file = moved / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<|pad|>"}))
    with pytest.raises(UserError, match=r"holds another run \(model\.path was"):
        check_same(run, there)
    with pytest.raises(
        UserError, match=r"step-000010 \(tokenizer: eos_id was 0 and is 1\): .* --allow-change model.path"
    ):
        check_resumed_model(there, "auto", ())
    assert "eos_id was 0 and is 1" in check_resumed_model(there, "auto", ["model.path"])
    (run / "checkpoints/step-000010/model/tokenizer.json").write_text("{}")  # passed over when all of it is read
    assert check_resumed_model(there, "auto", ()) == ""


@pytest.mark.parametrize(
    ("stage", "changes", "fields"),
    [
        ("contrastive", {"contrastive": {"query_instruction": "find:\n"}}, ["contrastive.query_instruction"]),
        ("generative", {"generative": {"target": "reconstruct"}}, ["generative.target"]),
        ("generative", {"generative": {"prefix_min": 0.1}}, ["generative.prefix_min"]),
        ("generative", {"bottleneck": {"tokens": None, "ratio": 4}}, ["bottleneck.ratio", "bottleneck.tokens"]),
        ("joint", {"batch": {"global_batch": 7}}, ["batch.global_batch"]),
        ("joint", {"joint": {"bins": 2}}, ["joint.bins"]),
        ("generative", {"sets": [{"weight": 2}]}, ["data.sets.0.weight"]),
        ("joint", {"sets": [{"split": "gl"}, {"split": "cl", "weight": 2}]}, ["data.sets.1.weight"]),
        ("joint", {"sets": [{"split": "gl"}, {"split": "cl", "path": "other"}]}, ["data.sets.1.path"]),
        ("generative", {"sets": [{}, {"path": "other"}]}, ["data.sets.1.path", "data.sets.1.weight"]),
    ],
)
def test_what_the_first_refusal_of_a_change_names_is_enough(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], stage: str, changes: dict[str, Any], fields: list[str]
) -> None:
    """The recipe is compared first, and then the plan: by the same names, and by nothing wider."""
    model, joint = tiny_model_dir(), {"joint": {"bins": 3}} if stage == "joint" else {}
    changes = {**joint, **changes}
    sets = changes.pop("sets", [{}])
    before = [{"split": data_set["split"]} for data_set in sets if "split" in data_set] or [{}]
    for name, count in (("set", 90), ("other", 80)):
        make_set(tmp_path / name, model, gl=count, cl=count)

    def job_of(data_sets: list[dict[str, Any]], **sections: Any) -> Job:
        made = [{**data_set, "path": str(tmp_path / data_set.get("path", "set"))} for data_set in data_sets]
        raw = recipe(tmp_path / "run", model, tmp_path / "set", stage, data={"sets": made}, **sections)
        return check(parse_recipe(raw, "test"), ENVIRONMENT)

    old, new = job_of(before, **joint), job_of(sets, **changes)
    settings = flat(new.recipe.model_dump(mode="json"))
    for key in new.plan.identity:
        name = key.split(".", 2)[2] if stage == "joint" else key
        assert name in {"plan.version", *FOLLOWS} or any(covered(field, [name]) for field in settings)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    save_recipe(old.recipe, checkpoint / "recipe.yaml")
    write_manifest(checkpoint, [], {})
    state = {"state": loop_state(old, step=1, samples=1, skipped=0, wandb_id=None)}
    (checkpoint / "manifest.json").write_bytes(encode_manifest(read_manifest(checkpoint).model_copy(update=state)))
    if fields != ["data.sets.1.path"]:  # of a set that was there, which is compared by its content
        with pytest.raises(UserError) as first:
            check_same(checkpoint, new.recipe)
        assert all(f"{field} was" in str(first.value) for field in fields)
    with pytest.raises(UserError, match="the order of the data changed") as second:
        _check_plan(new, checkpoint)
    assert sorted(re.findall(r"--allow-change (\S+)", str(second.value))) == fields
    for field in fields:
        others = tuple(name for name in fields if name != field)
        with pytest.raises(UserError, match="the order of the data changed"):
            _check_plan(dataclasses.replace(new, allow_change=(*others, "joint.weight", "specials")), checkpoint)
    _check_plan(dataclasses.replace(new, allow_change=tuple(fields)), checkpoint)


@pytest.mark.parametrize("stage", ["generative", "joint"])
def test_that_the_evaluation_side_is_learned_is_told(raw: dict[str, Any], stage: str) -> None:
    path = raw["data"]["sets"][0]["path"]
    assert check(parse_recipe(raw, "test"), ENVIRONMENT).plan.notes == []
    sets = [{"path": path}, {"path": path, "split": "eval"}]
    batch = {"global_batch": 4, "micro_tokens": 160}
    learns = {**raw, "stage": stage, "data": {**raw["data"], "sets": sets}, "batch": batch}
    notes = check(parse_recipe(learns, "test"), ENVIRONMENT).plan.notes
    assert notes == [f"{path} (eval): is the side that `lbr eval` asks about, and this run learns it"]


def test_a_folder_that_another_start_took_since_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    """Two starts look into the same new folder; the second one gets the lock when the first one is done."""
    late = check(parse_recipe(raw, "test"), ENVIRONMENT)
    claim(parse_recipe({**raw, "optim": {"lr": 1.0}}, "test"))
    assert check(parse_recipe(raw, "test"), ENVIRONMENT)  # a start that made no step leaves nothing to lose
    (tmp_path / "run" / "audit").mkdir()
    (tmp_path / "run" / "audit" / "rank-1.jsonl").write_text('{"start":0}\n{"step":0,"epoch":0,"ids":[]}\n')
    with pytest.raises(UserError, match=r"holds another run \(optim\.lr was 1\.0 and is 0\.003"):
        choose(late, "auto")


def test_weights_that_learned_with_another_attention_are_told(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], raw: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(tiny_model_dir(), tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "is_causal": False}))
    causal, both_ways = ({"contrastive": {"attention": name}} for name in ("causal", "bidirectional"))
    before = make_run(tmp_path / "before", model, **both_ways)

    def told(model: dict[str, str], stage: str = "contrastive", **settings: Any) -> str:
        made = recipe(tmp_path / "new", tiny_model_dir(), tmp_path / "set", stage, model=model, **settings)
        return other_attention(parse_recipe(made, "test"))

    assert told({}) == told({}, **both_ways) == told({"path": str(model)}, **both_ways) == ""
    base = told({"path": str(model)}, **causal)
    assert base.startswith(f"model {model}: its attention is bidirectional (is_causal: false in its config.json), and")
    assert base.endswith(
        "is causal in this run: set contrastive.attention=bidirectional, or name the model that it was trained from, "
        "unless that is meant"
    )
    assert told({"start_from": str(before)}, **both_ways) == ""
    assert "and is causal in this run: set contrastive.attention=bidir" in told({"start_from": str(before)}, **causal)
    with caplog.at_level(logging.WARNING, logger="lbr"):
        choose(check(parse_recipe({**raw, "model": {"path": str(model)}}, "test"), ENVIRONMENT), "auto")
    assert "and is causal in this run: name the model that it was trained from, unless" in caplog.text


@pytest.mark.parametrize(("stage", "takes"), [("generative", "90 samples"), ("joint", "40 pairs")])
def test_an_epoch_of_one_step_is_told(
    raw: dict[str, Any], stage: str, takes: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a joint run in pairs, which its epochs are of, without the samples in bins."""
    job = check(parse_recipe({**raw, "stage": stage, "batch": {"global_batch": 99}}, "test"), ENVIRONMENT)
    with caplog.at_level(logging.WARNING, logger="lbr"):
        choose(job, "auto")
    assert f"an epoch is a single step: batch.global_batch=99 takes all its {takes} at once" in caplog.text


def test_a_tokenizer_without_an_end_of_sequence_is_told(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], raw: dict[str, Any]
) -> None:
    """As where a folder was copied without its tokenizer_config.json."""
    model = shutil.copytree(tiny_model_dir(), tmp_path / "model")
    (model / "tokenizer_config.json").unlink()
    of_stage_2 = recipe(tmp_path / "two", model, tmp_path / "set", "contrastive")
    assert check(parse_recipe(of_stage_2, "test"), ENVIRONMENT).plan.notes == []
    learns = parse_recipe({**raw, "model": {"path": str(model)}}, "test")
    with pytest.raises(
        UserError, match=r"model .*: its config\.json has eos_token_id 0, .* tokenizer_config\.json is missing"
    ):
        check(learns, ENVIRONMENT)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "eos_token_id": None}))
    (note,) = check(learns, ENVIRONMENT).plan.notes
    assert "its tokenizer names no end-of-sequence token, so answers end without one" in note


@pytest.mark.parametrize("gaps", [False, True])
def test_a_tokenizer_whose_ids_go_beyond_the_model(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], raw: dict[str, Any], gaps: bool
) -> None:
    """In a vocabulary with more entries than the model has rows, or with gaps."""
    model = shutil.copytree(tiny_model_dir(), tmp_path / "model")
    saved = json.loads((model / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    count = len(vocabulary)
    if gaps:
        saved["model"]["vocab"] = {name: i + 20 * (i > 300) for name, i in vocabulary.items()}
    else:
        vocabulary |= {f"<extra_{i}>": count + i for i in range(20)}
    (model / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=rf"tokenizer has {count + 20} tokens and the model 416: the folder mixes two"):
        check(parse_recipe({**raw, "model": {"path": str(model)}}, "test"), ENVIRONMENT)


def test_ranks_share_out_the_bytes_that_are_compared(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read = make_set(tmp_path / "set", tiny_model_dir(), gl=4 * 32), list[Path]()
    monkeypatch.setattr(preflight, "check_file", lambda path, xxh128: read.append(path) or check_file(path, xxh128))
    job, sizes = check(parse_recipe(recipe(tmp_path / "run", tiny_model_dir(), data), "test"), ENVIRONMENT), []
    for rank in range(2):
        deep_check(dataclasses.replace(job, environment=Environment(rank, 2, rank, 2, None, "test")))
        sizes.append(sum(path.stat().st_size for path in read) - sum(sizes))
    assert len(set(read)) == len(read) == 2 * 4
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_a_model_folder_that_lies_about_is_not_resumed_from(
    raw: dict[str, Any], tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new run, started beside a folder model/ of another model."""
    shutil.copytree(tiny_model_dir("qwen2"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    check(parse_recipe(raw, "test"), ENVIRONMENT)
