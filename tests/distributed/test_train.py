"""The training loop end to end: both stages, restarts at the same and at other world sizes, stop signals, the audit."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from training_runs import CUT, copied, cut_off, losses, make_set, recipe, train_all

from lbr_dist.errors import EXIT_RUN_AGAIN
from lbr_dist.logs import read_rows
from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.recipes import load_recipe, parse_recipe
from lbr_dist.training import steps
from lbr_dist.training.audit import audit
from lbr_dist.training.checkpoint.weights import iterate_weights
from lbr_dist.training.run_folder import claim
from lbr_dist.training.run_lock import RunLock
from lbr_dist.training.signals import request_stop

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> tuple[Path, Path, Path]:
    """(folder, model, prepared set)."""
    folder, model = tmp_path_factory.mktemp("train"), tiny_model_dir("llama")
    return folder, model, make_set(folder / "data", model)


def run(folder: Path, world: int, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    here = folder / f"ranks-{len(list(folder.glob('ranks-*')))}"
    here.mkdir()
    results = run_ranks(train_all, world, here, recipes, timeout=900)
    assert all(result == results[0] for result in results), "the ranks disagree"
    return results[0]


@pytest.fixture(scope="module")
def both(place: tuple[Path, Path, Path], tiny_model_dir: Callable[..., Path]) -> dict[str, dict[str, Any]]:
    """Each case's recipe, after an uninterrupted run on two ranks, with checkpoints at `CUT` and at the end."""
    folder, *inputs = place
    keep = {"every_steps": CUT, "keep_last": 9}
    lora = {"lora": {"r": 4, "dropout": 0.1}}
    untied = {"path": str(tiny_model_dir("llama", tied=False))}
    modules = untied | {"lora": {"r": 4, "train_modules": ["embed_tokens"]}}
    cases = {
        "one": recipe(folder / "one", *inputs, checkpoint=keep, duration={"epochs": 3}),
        "lora": recipe(folder / "lora", *inputs, checkpoint=keep, model=lora, deepspeed="zero2"),
        "modules": recipe(folder / "modules", *inputs, checkpoint=keep, model=modules),
        "lora_bf16": recipe(folder / "lora_bf16", *inputs, checkpoint=keep, model=lora | {"dtype": "bfloat16"}),
        "bf16": recipe(folder / "bf16", *inputs, checkpoint=keep, model={"dtype": "bfloat16"}),
        "head": recipe(
            folder / "head", *inputs, stage="contrastive", checkpoint=keep, duration={"epochs": 4}, model=untied
        ),
        "two": recipe(
            folder / "two",
            *inputs,
            stage="contrastive",
            checkpoint=keep,
            duration={"epochs": 4},
            model={"start_from": str(folder / "one")},
            optim={"lr": 1e-3, "z_lr": 1e-3},
        ),
    }
    for result in run(folder, 2, list(cases.values())):
        assert result.get("code") == 0, result
    return cases


def train_each(rank: int, world: int, recipes: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return train_all(rank, world, [by_rank[rank] for by_rank in recipes])


def test_ranks_that_are_set_up_differently(place: tuple[Path, Path, Path]) -> None:
    """A machine with a recipe or a copy of the data of its own; loader settings may be its own."""
    folder, model, data = place
    make_set(folder / "other", model, gl=91)
    turned = shutil.copytree(model, folder / "turned")
    settings = json.loads((turned / "config.json").read_text())
    settings["rope_parameters"] = {"rope_theta": 77.0, "rope_type": "default"}
    (turned / "config.json").write_text(json.dumps(settings))
    here = folder / "ranks-different"
    here.mkdir()
    one = recipe(folder / "agree", model, data, duration={"epochs": 1})
    all_at_once = recipe(folder / "big", model, data, duration={"epochs": 1}, batch={"global_batch": 500})
    cases = [
        [all_at_once, all_at_once],
        [one, recipe(folder / "agree", model, data, duration={"epochs": 1}, batch={"global_batch": 6})],
        [one, recipe(folder / "agree", model, folder / "other", duration={"epochs": 1})],
        [one, recipe(folder / "agree", turned, data, duration={"epochs": 1})],
        [one, recipe(folder / "agree", model, data, duration={"epochs": 1}, tracking={"every_steps": 2})],
    ]
    results = run_ranks(train_each, 2, here, cases, timeout=300)
    assert results[0] == results[1]
    whole, batch, content, rope, fine = results[0]
    assert whole == {"step": 1, "code": 0}
    said = "an epoch is a single step: batch.global_batch=500 takes all its 90 samples at once"
    assert said in (folder / "big" / "log.txt").read_text()
    assert "rank 1 on " in batch["error"]
    assert "(batch.global_batch is 6 and not 5): give all ranks the same recipe" in batch["error"]
    assert "(config.json: rope_parameters.rope_theta is 77.0 and not 10000.0)" in rope["error"]
    assert "(data.sets is " in content["error"]
    assert fine["code"] == 0


def dies_while_it_loads(rank: int, world: int, raw: dict[str, Any]) -> list[dict[str, Any]]:
    if rank == 1:
        LbrModel.build = lambda *_, **options: os._exit(1)  # type: ignore[method-assign]
    return train_all(rank, world, [raw])


def test_a_rank_that_dies_while_the_model_loads_is_no_fault_of_the_model(place: tuple[Path, Path, Path]) -> None:
    """Under ZeRO-3 ranks talk there; exit code 2 would keep Slurm from requeuing the job."""
    folder, *inputs = place
    (here := folder / "ranks-dies").mkdir()
    with pytest.raises(
        RuntimeError, match=r"error-0: (.|\n)*\n\S*ContactLostError: rank 0 lost contact with the other"
    ):
        run_ranks(dies_while_it_loads, 2, here, recipe(folder / "dies", *inputs, deepspeed="cpu"), timeout=300)


def short_of_memory(rank: int, world: int, step: int, raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The last rank has none left in a step."""
    real = steps.Generative.__call__

    def spent(self: Any, plan: Any, batches: Any) -> Any:
        if rank == world - 1 and plan.step + 1 == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, plan, batches)

    with mock.patch.object(steps.Generative, "__call__", spent):
        return train_all(rank, world, [raw])


def test_memory_that_does_not_suffice_is_one_line(place: tuple[Path, Path, Path]) -> None:
    """In the first step it is the recipe's; later, what a restart may get over."""
    folder, *inputs = place
    for number in (1, 2):
        (folder / f"ranks-spent-{number}").mkdir()
    first, later = recipe(folder / "spent-1", *inputs), recipe(folder / "spent-2", *inputs)
    (results,) = run_ranks(short_of_memory, 1, folder / "ranks-spent-1", 1, first)
    assert results[0]["error"].startswith("rank 0: out of memory in step 1, with micro-batches of up to 160 tokens (CU")
    with pytest.raises(RuntimeError, match=r"\n\S*FaultError: rank 1: out of memory after step 1, with micro-batches"):
        run_ranks(short_of_memory, 2, folder / "ranks-spent-2", 2, later)


def test_weights_that_are_not_finite_are_told_from_bad_samples(place: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, model, data = place
    damaged = shutil.copytree(model, tmp_path / "model")
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    stop = recipe(tmp_path / "stop", damaged, data)
    skip = recipe(tmp_path / "skip", damaged, data, on_nan="skip", max_skips=1, deepspeed="zero2")
    said = rf": loss nan, .* \(before any update: model.path {damaged} has a weight that is not finite, \S+up_proj"
    for result in run_ranks(train_all, 2, tmp_path, [stop, skip])[1]:
        assert re.search(said, result["error"])
        assert "optim.lr" not in result["error"]


def without_a_key(rank: int, world: int, raw: dict[str, Any]) -> list[dict[str, Any]]:
    from wandb.errors import UsageError

    with mock.patch("wandb.login", side_effect=UsageError("No API key configured.")):
        return train_all(rank, world, [raw])


def test_every_rank_hears_that_wandb_has_no_key(place: tuple[Path, Path, Path]) -> None:
    """Rank 0 alone asks, and the others would wait for it; nothing is written yet."""
    folder, *inputs = place
    (here := folder / "ranks-no-key").mkdir()
    online = {"wandb_project": "lbr", "wandb_mode": "online"}
    raw = recipe(folder / "no-key", *inputs, tracking=online)
    for (result,) in run_ranks(without_a_key, 2, here, raw, timeout=60):
        assert "wandb_project lbr: wandb does not start (No API key" in result["error"]
    assert not (folder / "no-key" / "recipe.yaml").exists()


def stopped_in_time(rank: int, world: int, raw: dict[str, Any]) -> list[dict[str, Any]]:
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return train_all(rank, world, [raw])


def test_a_start_that_waits_for_the_folder_stops_on_request(place: tuple[Path, Path, Path]) -> None:
    folder, *inputs = place
    (here := folder / "ranks-waits").mkdir()
    with RunLock(folder / "waits") as lock:
        lock.take()
        results = run_ranks(stopped_in_time, 2, here, recipe(folder / "waits", *inputs), timeout=60)
    assert results == [[{"step": 0, "code": EXIT_RUN_AGAIN}]] * 2
    assert "stopped by SIGTERM before the run had begun; run again to go on" in (folder / "waits/log.txt").read_text()


def after_step(step: int, change: Callable[[], object], row: dict[str, Any]) -> None:
    if row["step"] == step:
        change()


def test_a_folder_that_is_taken_over_or_moved_under_a_run(place: tuple[Path, Path, Path]) -> None:
    """No checkpoint of a run whose folder is another's; of one whose folder is gone, the weights at least."""
    folder, *inputs = place
    taken, moved = folder / "taken", folder / "moved"
    take = functools.partial((taken / "lock").write_text, "process 7 on elsewhere\n")
    move = functools.partial(moved.rename, folder / "moved-away")
    cases = [
        recipe(run, *inputs, checkpoint={"every_steps": 2}) | {"train.on_row": functools.partial(after_step, 3, change)}
        for run, change in ((taken, take), (moved, move))
    ]
    here = folder / "ranks-taken"
    here.mkdir()
    results = run_ranks(train_all, 2, here, cases, timeout=300)
    assert results[0] == results[1]
    assert "process 7 on elsewhere took the folder over while this run" in results[0][0]["error"]
    assert [path.name for path in (taken / "checkpoints").glob("step-*")] == ["step-000002"]
    assert "was moved or removed while the run was at work there; the weights of step 4 are" in results[0][1]["error"]
    assert (moved / "checkpoints/step-000004/recipe.yaml").is_file()
    assert len(losses(str(folder / "moved-away"))) == 4


def test_checkpoints_that_cannot_be_written_are_named_before_the_first_step(place: tuple[Path, Path, Path]) -> None:
    """They may be elsewhere, through a link; else the work up to the first save would be lost."""
    folder, *inputs = place
    raw = recipe(folder / "unwritable", *inputs)
    claim(parse_recipe(raw, "test"))
    (folder / "unwritable/checkpoints").symlink_to("/proc")  # where nobody makes a file, not even root
    result = run(folder, 1, [raw])[0]
    assert "unwritable/checkpoints: cannot be written (" in result["error"]
    assert not (folder / "unwritable/audit").exists()


def test_a_stop_after_the_last_step_asks_for_nothing_more(place: tuple[Path, Path, Path]) -> None:
    folder, *inputs = place
    raw = recipe(folder / "late", *inputs, duration={"epochs": None, "steps": 2})
    stop = functools.partial(request_stop, folder / "late", "maintenance")
    (result,) = run(folder, 1, [raw | {"train.on_row": functools.partial(after_step, 1, stop)}])
    assert result == {"step": 2, "code": 0}
    log = (folder / "late/log.txt").read_text()
    assert "stopped by maintenance after step 2\n" in log
    assert "run again" not in log


def test_loss_goes_down(both: dict[str, dict[str, Any]]) -> None:
    for case in ("one", "two", "bf16"):
        found = losses(both[case]["output"])
        assert sum(found[-3:]) < 0.93 * sum(found[:3]), (case, found)


def test_metrics_are_complete(both: dict[str, dict[str, Any]]) -> None:
    rows = read_rows(Path(both["one"]["output"]) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        assert row["tokens"] > 0
        assert 0 < row["packing"] <= 1
        assert min(row["lr"], row["grad_norm"], row["tokens_per_s"], row["samples_per_s"], row["memory_gib"]) > 0
        assert min(row["data_wait_s"], row["checkpoint_stall_s"]) >= 0
    assert rows[-1]["epoch"] == 3
    assert rows[-1]["samples"] == 3 * 90
    assert any(row["checkpoint_stall_s"] > 0 for row in rows)
    contrastive = read_rows(Path(both["two"]["output"]) / "metrics.jsonl")[-1]
    assert {"accuracy", "positive_score", "effective_negatives"} <= contrastive.keys()


def test_stage_two_starts_from_stage_one(both: dict[str, dict[str, Any]]) -> None:
    log = (Path(both["two"]["output"]) / "log.txt").read_text()
    assert f"weights from {both['one']['output']}" in log


def test_that_stage_one_went_on_since_is_told(both: dict[str, dict[str, Any]], place: tuple[Path, Path, Path]) -> None:
    """Stage 2 goes on with what it began with."""
    folder = place[0]
    first = {**both["one"], "output": copied(both["one"]["output"], folder / "went-on"), "duration": {"epochs": 4}}
    raw = {**both["two"], "output": str(folder / "began"), "duration": {"steps": 1}}
    raw["model"] = {**raw["model"], "start_from": first["output"]}
    assert [result["code"] for result in run(folder, 1, [raw, raw, first, raw])] == [0, 0, 0, 0]
    assert (folder / "began" / "log.txt").read_text().count("trained on or anew since") == 1


@pytest.mark.parametrize("case", ["one", "lora", "lora_bf16", "modules", "bf16", "head", "two"])
def test_audit_proves_the_plan(both: dict[str, dict[str, Any]], case: str) -> None:
    found = audit(both[case]["output"])
    assert found.problems == []
    assert found.steps == len(losses(both[case]["output"]))


def test_resumed_equals_uninterrupted(both: dict[str, dict[str, Any]], place: tuple[Path, Path, Path]) -> None:
    """At the same world size: the same losses and weights, bit for bit, dropout included; stage 2 without stage 1's."""
    folder = place[0]
    resumed = {
        case: {**raw, "output": cut_off(raw["output"], folder / f"{case}-resumed")} for case, raw in both.items()
    }
    request_stop(Path(resumed["one"]["output"]), "yesterday")  # what an earlier start was asked is forgotten
    (folder / "one").rename(folder / "gone")
    try:
        results = run(folder, 2, list(resumed.values()))
    finally:
        (folder / "gone").rename(folder / "one")
    for result in results:
        assert result.get("code") == 0, result
    for case, raw in both.items():
        again = resumed[case]["output"]
        assert losses(again) == losses(raw["output"]), case
        expected = dict(iterate_weights(raw["output"]))
        for name, weight in iterate_weights(again):
            assert torch.equal(weight, expected[name]), (case, name)
        found = audit(again)
        assert found.problems == []
        assert (found.attempts, found.redone) == (2, len(losses(raw["output"])) - CUT)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_going_back_is_not_forgotten_by_a_start_that_saved_nothing(
    both: dict[str, dict[str, Any]], place: tuple[Path, Path, Path], elsewhere: bool
) -> None:
    """Sent back, with another rate, and ended before a save: the next start goes on from there."""
    folder = place[0]
    raw = {**both["one"], "output": copied(both["one"]["output"], folder / f"back-{elsewhere}")}
    older = Path(raw["output"]) / "checkpoints" / f"step-{CUT:06d}"
    if elsewhere:
        older = shutil.copytree(older, folder / "backup" / older.name)
    allowed = {**raw, "train.allow_change": ["optim"]}
    wild = {**allowed, "train.resume": str(older), "optim": {**raw["optim"], "lr": 1e30, "clip": 0}}
    ended, result = run(folder, 1, [wild, allowed])
    assert f"step {CUT + 2}: loss" in ended["error"]
    assert result.get("code") == 0, result
    assert losses(raw["output"]) == pytest.approx(losses(both["one"]["output"]), rel=1e-4)
    found = audit(raw["output"])
    assert found.problems == []
    assert found.steps == len(losses(raw["output"]))


def test_a_checkpoint_that_was_being_replaced_is_gone_on_from(
    both: dict[str, dict[str, Any]], place: tuple[Path, Path, Path]
) -> None:
    """The run ended between the two renames of a save, and has no other one."""
    raw = {**both["one"], "output": cut_off(both["one"]["output"], place[0] / "replaced")}
    last = Path(raw["output"]) / "checkpoints" / f"step-{CUT:06d}"
    last.rename(last.with_name(f".replaced-{last.name}"))
    assert run(place[0], 1, [raw])[0].get("code") == 0
    assert f"resuming from {last}" in (place[0] / "replaced/log.txt").read_text()
    assert losses(raw["output"]) == pytest.approx(losses(both["one"]["output"]), rel=1e-4)


def test_a_start_that_is_refused_does_not_take_the_folder(
    both: dict[str, dict[str, Any]], place: tuple[Path, Path, Path]
) -> None:
    """What is allowed may still not fit the checkpoint; the run's own recipe must then go on as before."""
    folder = place[0]
    raw = {**both["one"], "output": copied(both["one"]["output"], folder / "refused"), "duration": {"epochs": 4}}
    before = (folder / "refused" / "recipe.yaml").read_bytes()
    other = {**raw, "optim": {**raw["optim"], "name": "sgd"}, "train.allow_change": ["optim"]}
    refused, longer = run(folder, 1, [other, {**raw, "train.resume": "auto"}])
    assert "holds the state of adam" in refused["error"]
    assert longer.get("code") == 0, longer
    assert before != (folder / "refused" / "recipe.yaml").read_bytes()  # of the longer run, now


def test_bfloat16_keeps_float32_masters(both: dict[str, dict[str, Any]]) -> None:
    """What a run saves, and goes on from, has more digits than the weights that the model computes with."""
    for name, weight in iterate_weights(both["bf16"]["output"]):
        assert not torch.equal(weight, weight.bfloat16().float()), name


def test_stage_two_leaves_a_head_of_its_own_alone(both: dict[str, dict[str, Any]]) -> None:
    """It is neither used nor tied to what is, so it has no gradients, no optimizer state and no weight decay."""
    raw = both["head"]
    before = dict(LbrModel.build(parse_recipe(raw, "test")).named_parameters())
    after = dict(iterate_weights(raw["output"]))
    assert torch.equal(after["backbone.lm_head.weight"], before["backbone.lm_head.weight"])
    assert not torch.equal(after["backbone.model.embed_tokens.weight"], before["backbone.model.embed_tokens.weight"])
    checkpoint = next((Path(raw["output"]) / "checkpoints").glob("step-*"))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["parameters"] if not entry["trained"]] == ["backbone.lm_head.weight"]


def test_frozen_weights_are_kept_and_unfrozen_modules_saved(both: dict[str, dict[str, Any]]) -> None:
    """LoRA under ZeRO-3: adapters, Z and the unfrozen module moved; every other weight is there, bit for bit."""
    raw = both["modules"]
    before = dict(LbrModel.build(parse_recipe(raw, "test")).named_parameters())
    after = dict(iterate_weights(raw["output"]))
    assert after.keys() == before.keys()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in after if name == "z" or "lora_" in name or "modules_to_save" in name}
    assert any("modules_to_save" in name for name in moved)


def test_loader_processes_and_remote_shards_change_nothing(
    both: dict[str, dict[str, Any]], place: tuple[Path, Path, Path]
) -> None:
    """Two loader processes a rank instead of none, on a resumed run and on one that fetches its shards over http."""
    folder, _, data = place
    handler = functools.partial(QuietHandler, directory=str(data))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        sections = {**both["one"]["data"], "workers": 2, "cache_dir": str(folder / "cache")}
        resumed = {**both["one"], "output": cut_off(both["one"]["output"], folder / "workers"), "data": sections}
        remote = {**both["one"], "output": str(folder / "remote"), "data": {**sections, "sets": [{"path": address}]}}
        results = run(folder, 2, [resumed, remote])
        server.shutdown()
    assert [result.get("code") for result in results] == [0, 0], results
    for raw in (resumed, remote):
        assert losses(raw["output"]) == losses(both["one"]["output"])
    assert audit(resumed["output"]).problems == []


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("world", [1, 3])
def test_other_world_sizes_continue_the_curve(
    both: dict[str, dict[str, Any]], place: tuple[Path, Path, Path], world: int
) -> None:
    folder = place[0]
    resumed = {
        case: {**both[case], "output": cut_off(both[case]["output"], folder / f"{case}-on-{world}")}
        for case in ("one", "two")
    }
    for result in run(folder, world, list(resumed.values())):
        assert result.get("code") == 0, result
    for case, raw in resumed.items():
        expected, found = losses(both[case]["output"]), losses(raw["output"])
        assert found == pytest.approx(expected, rel=1e-4), case
        assert audit(raw["output"]).problems == []


def test_refusals(both: dict[str, dict[str, Any]], place: tuple[Path, Path, Path]) -> None:
    """Each ends before a step is made, and says what is wrong and what to do."""
    folder, model, data = place
    done, inputs = both["one"], (model, data)
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("mine")
    shutil.copytree(model, folder / "edited")
    settings = json.loads((model / "config.json").read_text())
    (folder / "edited" / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.5}))
    clip = folder / "clip.json"
    clip.write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimization": {"stage": 2}}))
    gone = parse_recipe(recipe(folder / "next", model, folder / "gone", "contrastive"), "test")
    cases = [
        ({**done, "optim": {**done["optim"], "lr": 1e-5}}, ["optim.lr", "0.003", "1e-05", "--allow-change optim.lr"]),
        ({**done, "batch": {"global_batch": 7}}, ["batch.global_batch"]),
        ({**done, "train.resume": "never"}, ["holds a run already"]),
        (recipe(folder / "full", *inputs), ["full", "not empty"]),
        (recipe(folder / "x", *inputs, deepspeed=str(clip)), ["clip.json", "gradient_clipping is 0.5", "optim.clip"]),
        (recipe(folder / "x", *inputs, deepspeed="zero9"), ["zero9", "zero3"]),
        (recipe(folder / "x", *inputs, "contrastive", batch={"global_batch": 1}), ["no negatives", "hard_negatives"]),
        (
            recipe(
                folder / "x", *inputs, "contrastive", model={"start_from": done["output"]}, bottleneck={"tokens": 3}
            ),
            ["bottleneck.tokens is 3 here and 2 there"],
        ),
        (
            recipe(folder / "x", *inputs, model={"start_from": both["lora"]["output"], "lora": {"r": 4, "alpha": 8}}),
            ["model.lora.alpha is 8 with r 4", "32 with r 4", "0.25 times"],
        ),
        (
            recipe(folder / "x", *inputs, model={"start_from": both["lora"]["output"]}),
            ["model.lora is not set, and it is in", "lora"],
        ),
        (
            recipe(folder / "x", *inputs, model={"start_from": done["output"], "lora": {"r": 4}}),
            ["model.lora is set, and it is not in", "one"],
        ),
        (
            recipe(folder / "x", *inputs, model={"start_from": both["lora"]["output"], "lora": {"r": 8, "alpha": 64}}),
            ["model.lora has r 8, and r 4 in"],
        ),
        (
            recipe(folder / "x", folder / "edited", data, model={"start_from": done["output"]}),
            ["rms_norm_eps was", "and is 0.5", "set model.path as there", "--allow-change model.path"],
        ),
        (recipe(folder / "x", *inputs, data={"max_x_tokens": 500, "bin_tokens": 700}), ["512 positions"]),
        (recipe(folder / "x", folder / "full", data), ["full", "not a model folder"]),
        (recipe(folder / "x", *inputs, model={"start_from": str(folder / "full")}), ["neither a checkpoint"]),
        (
            recipe(folder / "y", *inputs) | {"train.then": gone},
            ["after this one", "next, could not", "gone: not a prep"],
        ),
    ]
    results = run(folder, 1, [raw for raw, _ in cases])
    for result, (_, expected) in zip(results, cases, strict=True):
        for part in expected:
            assert part in result.get("error", f"no error: {result}"), (part, result)
    assert not (folder / "x").exists()
    clip.write_text(json.dumps({"zero_optimization": {"stge": 2}}))  # DeepSpeed itself refuses it
    wrong = recipe(folder / "z", *inputs, deepspeed=str(clip))
    mended = recipe(folder / "z", *inputs, optim={"lr": 1e-5}, duration={"epochs": None, "steps": 1})
    refused, done_now = run(folder, 1, [wrong, mended])  # the folder is that of the recipe that makes a step
    assert "stge" in refused["error"]
    assert done_now == {"step": 1, "code": 0}


def test_a_stall_between_two_rows_is_in_the_second(place: tuple[Path, Path, Path]) -> None:
    folder, *inputs = place
    every = {"tracking": {"every_steps": 3}, "checkpoint": {"every_steps": 4}, "duration": {"epochs": None, "steps": 6}}
    run(folder, 1, [recipe(folder / "stall", *inputs, **every)])
    first, second = read_rows(folder / "stall" / "metrics.jsonl")
    assert (first["step"], first["checkpoint_stall_s"]) == (3, 0)  # saved after step 4, whose next row is that of 6
    assert second["checkpoint_stall_s"] > 0


@pytest.mark.parametrize(
    ("zero", "words"), [({"stge": 3}, "stge"), ({"stage": 3, "offload_param": {"device": "gpu"}}, "'cpu' or 'nvme'")]
)
def test_what_deepspeed_refuses_in_its_file_is_no_fault_of_the_model(
    place: tuple[Path, Path, Path], tmp_path: Path, zero: dict[str, Any], words: str
) -> None:
    _, *inputs = place
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    (result,) = run(tmp_path, 1, [recipe(tmp_path / "run", *inputs, deepspeed=str(tmp_path / "mine.json"))])
    assert "mine.json" in result["error"]
    assert words in result["error"]
    assert "download" not in result["error"]


def test_an_attention_that_the_device_lacks_is_refused_before_the_load(place: tuple[Path, Path, Path]) -> None:
    folder, *inputs = place
    (result,) = run(folder, 1, [recipe(folder / "flex", *inputs, model={"attention": "flex"})])
    assert "model.attention=flex needs a CUDA device" in result["error"]
    assert "parameters" not in (folder / "flex" / "log.txt").read_text()


def test_a_model_or_set_that_changed_under_a_run_is_refused(place: tuple[Path, Path, Path]) -> None:
    """At the same path: another configuration of the model, another set. What differs is named, and can be allowed."""
    folder, model, data = place
    copies = shutil.copytree(model, folder / "base"), shutil.copytree(data, folder / "set")
    raw = recipe(folder / "under", *copies, duration={"epochs": None, "steps": 2})
    longer = {**raw, "duration": {"steps": 3}}
    assert run(folder, 1, [raw]) == [{"step": 2, "code": 0}]

    settings = json.loads((copies[0] / "config.json").read_text())
    (copies[0] / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.5}))
    (refused,) = run(folder, 1, [longer])
    for part in ("rms_norm_eps was", "and is 0.5", "step-000002", "--allow-change model.path"):
        assert part in refused["error"]
    (copies[0] / "config.json").write_text(json.dumps(settings))

    shutil.rmtree(copies[1])
    make_set(copies[1], model, gl=80)
    finished = {**longer, "batch": {"global_batch": 1}, "train.allow_change": ["data.sets", "batch"]}
    refused, accepted, again = run(folder, 1, [longer, {**longer, "train.allow_change": ["data.sets"]}, finished])
    for part in ("the order of the data changed since (", "samples would be repeated", "--allow-change data.sets"):
        assert part in refused["error"]
    assert accepted == again == {"step": 3, "code": 0}
    assert load_recipe(Path(raw["output"]) / "recipe.yaml").batch == parse_recipe(longer, "longer").batch
    found = audit(raw["output"])
    assert (found.steps, found.unplanned, found.problems) == (3, 2, [])


def edit_and_move(model: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.5}))
    model.rename(f"{model}-moved")


def test_checkpoints_carry_the_model_as_it_was_when_the_run_began(place: tuple[Path, Path, Path]) -> None:
    folder, model, data = place
    base = shutil.copytree(model, folder / "leaving")
    raw = recipe(folder / "left", base, data, duration={"epochs": None, "steps": 3}, checkpoint={"every_steps": 2})
    raw["train.on_row"] = functools.partial(after_step, 1, functools.partial(edit_and_move, base))
    assert run(folder, 1, [raw]) == [{"step": 3, "code": 0}]
    for step in (2, 3):
        copy = folder / "left" / "checkpoints" / f"step-{step:06d}" / "model" / "config.json"
        assert copy.read_bytes() == (model / "config.json").read_bytes()


def test_changes_that_are_allowed(both: dict[str, dict[str, Any]], place: tuple[Path, Path, Path]) -> None:
    """A longer run, other logging, a moved set and another ZeRO stage go on without asking; another rate does not."""
    folder = place[0]
    output = cut_off(both["one"]["output"], folder / "changed")
    changed = {**both["one"], "output": output, "duration": {"epochs": 3.5}, "deepspeed": "zero1"}
    changed |= {"tracking": {"every_steps": 2}, "optim": {**both["one"]["optim"], "lr": 1e-4}}
    changed["data"] = {**both["one"]["data"], "sets": [{"path": str(shutil.copytree(place[2], folder / "moved-set"))}]}
    (refused, accepted) = run(folder, 1, [changed, {**changed, "train.allow_change": ["optim.lr"]}])
    assert "optim.lr" in refused["error"]
    assert "tracking" not in refused["error"]
    assert "data.sets" not in refused["error"]
    assert accepted["code"] == 0
    assert accepted["step"] > len(losses(both["one"]["output"]))
    assert "optim.lr was 0.003 and is now 0.0001" in (Path(output) / "log.txt").read_text()
