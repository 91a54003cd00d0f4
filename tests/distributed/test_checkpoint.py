"""Checkpoints of real DeepSpeed engines on 1, 2 and 4 gloo ranks: exact at any stage and world size.

One chain of starts does the work (1 -> 2 -> 4 -> 1 ranks) and the tests below read what it left.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_worker import perform_all
from ranks import run_ranks

from lbr_dist.training.checkpoint.format import read_manifest, verify
from lbr_dist.training.checkpoint.listing import find_resumable, resolve
from lbr_dist.training.checkpoint.weights import consolidate, iterate_weights

pytestmark = pytest.mark.timeout(900)
CASES = [("fp32", stage) for stage in (0, 1, 2, 3)] + [("bf16", stage) for stage in (1, 2, 3)]
CPU = {"device": "cpu", "pin_memory": False}
OFFLOAD = {2: {"offload_optimizer": CPU}, 3: {"offload_optimizer": CPU, "offload_param": CPU}}
TO_FOUR = [("fp32", 0, 3), ("fp32", 1, 0), ("fp32", 2, 1), ("fp32", 3, 2), ("bf16", 2, 3), ("bf16", 3, 2)]
SGD = {"optimizer": "sgd", "momentum": 0.9}


def start(folder: Path, world: int, jobs: list[dict]) -> list[list[dict]]:
    """Run the jobs on `world` ranks; returns each rank's results."""
    place = folder / f"start-{len(list(folder.glob('start-*')))}"
    place.mkdir()
    return run_ranks(perform_all, world, place, jobs, timeout=400)


def checkpoint(run: Path, step: int) -> str:
    return str(run / "checkpoints" / f"step-{step:06d}")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[list[dict]]]]:
    folder = tmp_path_factory.mktemp("chain")
    results = {}

    # One rank: the sources, written by ZeRO-3.
    results[1] = start(
        folder,
        1,
        [
            {
                **{"stage": 3, "dtype": dtype, "until": [0, 3], "save": [0, 3], "run": str(folder / f"one-{dtype}")},
                "dump": str(folder / f"one-{dtype}.pt"),
            }
            for dtype in ("fp32", "bf16")
        ]
        + [
            {"stage": 2, "until": [3], "save": [3], "run": str(folder / "one-sgd"), "dump": str(folder / "one-sgd.pt")}
            | SGD
        ],
    )

    # Two ranks: load those at every stage; then the same world again, uninterrupted and resumed.
    jobs: list[dict] = []
    for dtype, stage in CASES:
        run = folder / f"two-{dtype}-{stage}"
        common = {"stage": stage, "dtype": dtype, "run": str(run)}
        source = checkpoint(folder / f"one-{dtype}", 3)
        jobs.append(
            {**common, "load": source, "dump_loaded": f"{run}.loaded.pt", "until": [5, 7], "save": [5]}
            | {"dump": f"{run}.through.pt", "seed": 1}
        )
        jobs.append({**common, "load": checkpoint(run, 5), "until": [7], "dump": f"{run}.resumed.pt", "seed": 2})
    for stage, zero in OFFLOAD.items():
        run = folder / f"two-offload-{stage}"
        common = {"stage": stage, "dtype": "bf16", "run": str(run), "zero": zero}
        jobs.append(
            {**common, "load": checkpoint(folder / "one-bf16", 3), "dump_loaded": f"{run}.loaded.pt", "until": [4, 6]}
            | {"save": [4], "dump": f"{run}.through.pt", "seed": 1}
        )
        jobs.append({**common, "load": checkpoint(run, 4), "until": [6], "dump": f"{run}.resumed.pt", "seed": 2})
    sgd = folder / "two-sgd"
    jobs.append(
        {"stage": 3, "load": checkpoint(folder / "one-sgd", 3), "until": [], "run": str(sgd), "seed": 1}
        | {"dump_loaded": f"{sgd}.loaded.pt"}
        | SGD
    )
    jobs.append({"stage": 2, "load": checkpoint(folder / "one-fp32", 0), "until": [3], "run": str(sgd), "seed": 1})
    for dtype in ("fp32", "bf16"):
        llama = folder / f"two-llama-{dtype}"
        jobs.append(
            {"stage": 3, "model": "llama", "dtype": dtype, "until": [1, 2, 3], "save": [1, 2, 3], "run": str(llama)}
            | {"dump": f"{llama}.pt"}
        )
    jobs.append({"stage": 2, "load": checkpoint(folder / "one-fp32", 3), "until": [], "run": str(sgd)} | SGD)
    jobs.append({"stage": 3, "load": checkpoint(folder / "two-llama-fp32", 2), "until": [], "run": str(sgd)})
    results[2] = start(folder, 2, jobs)

    # Four ranks: load what two ranks wrote, each at another stage, and write it again untouched.
    results[4] = start(
        folder,
        4,
        [
            {
                "stage": to,
                "dtype": dtype,
                "load": checkpoint(folder / f"two-{dtype}-{stage}", 5),
                "until": [5],
                "seed": 3,
            }
            | {"save": [5], "run": str(folder / f"four-{dtype}-{to}"), "dump": str(folder / f"four-{dtype}-{to}.pt")}
            for dtype, stage, to in TO_FOUR
        ],
    )

    # One rank again, continued to where the two ranks got.
    jobs = [
        {"stage": to, "dtype": dtype, "load": checkpoint(folder / f"four-{dtype}-{stage}", 5), "until": [7], "seed": 4}
        | {"run": str(folder / "back"), "dump_loaded": str(folder / f"back-{dtype}-{to}.pt")}
        for dtype, stage, to in [("fp32", 3, 0), ("fp32", 2, 3), ("bf16", 3, 2), ("bf16", 2, 3)]
    ]
    for dtype in ("fp32", "bf16"):
        llama = folder / f"two-llama-{dtype}"
        jobs.append(
            {"stage": 2, "model": "llama", "dtype": dtype, "load": checkpoint(llama, 3), "until": [], "seed": 5}
            | {"run": str(folder / "back"), "dump_loaded": f"{llama}.back.pt"}
        )
    jobs.append(
        {"stage": 3, "start_from": str(folder / "two-fp32-2"), "until": [], "run": str(folder / "new"), "seed": 6}
        | {"dump": str(folder / "new.pt")}
    )
    results["back"] = start(folder, 1, jobs)
    return folder, results


def same(left: Path, right: Path, moments: bool = True) -> None:
    a, b = torch.load(left), torch.load(right)
    keys = {key for key in a | b if moments or key.startswith(("weight:", "model:"))}
    assert keys
    assert [key for key in sorted(keys) if key not in a or key not in b or not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize(("dtype", "stage"), CASES)
def test_one_rank_to_two_at_every_stage_is_exact(chain, dtype, stage):
    folder, results = chain
    same(folder / f"one-{dtype}.pt", folder / f"two-{dtype}-{stage}.loaded.pt")
    job = 2 * CASES.index((dtype, stage))
    assert results[2][0][job]["global_steps"] == 3
    assert results[2][0][job]["rank_state"] is None  # the world size changed


@pytest.mark.parametrize(("dtype", "stage"), CASES)
def test_same_world_resumes_bit_for_bit(chain, dtype, stage):
    folder, results = chain
    same(folder / f"two-{dtype}-{stage}.through.pt", folder / f"two-{dtype}-{stage}.resumed.pt")
    job = 2 * CASES.index((dtype, stage))
    for rank in (0, 1):
        through, resumed = results[2][rank][job], results[2][rank][job + 1]
        assert resumed["losses"] == through["losses"][-2:]
        assert resumed["optimizer_steps"] == through["optimizer_steps"] == [7.0]
        assert resumed["rank_state"]["rank"] == rank


@pytest.mark.parametrize("stage", OFFLOAD)
def test_offloaded_state_is_restored_exactly(chain, stage):
    folder, _ = chain
    same(folder / "one-bf16.pt", folder / f"two-offload-{stage}.loaded.pt")
    same(folder / f"two-offload-{stage}.through.pt", folder / f"two-offload-{stage}.resumed.pt")


def test_reshards_to_four_and_back_to_one_exactly(chain):
    folder, results = chain
    for dtype, stage, to in TO_FOUR:
        source = dict(iterate_weights(checkpoint(folder / f"two-{dtype}-{stage}", 5)))
        dumped = torch.load(folder / f"four-{dtype}-{to}.pt")
        for name, tensor in source.items():
            assert torch.equal(dumped.get(f"weight:{name}", dumped[f"model:{name}"]).float(), tensor), name
    same(folder / "four-fp32-3.pt", folder / "back-fp32-0.pt")
    same(folder / "four-fp32-2.pt", folder / "back-fp32-3.pt")
    same(folder / "four-bf16-3.pt", folder / "back-bf16-2.pt")
    same(folder / "four-bf16-2.pt", folder / "back-bf16-3.pt")
    assert all(job["optimizer_steps"] == [5.0] for job in results[4][0])


def test_the_run_goes_on_as_it_would_have_at_another_world_size(chain):
    _, results = chain
    # four-fp32-3 came from two-fp32-0, four-fp32-2 from two-fp32-3: compare steps 5 and 6 with theirs.
    for back, two in ((0, CASES.index(("fp32", 0))), (1, CASES.index(("fp32", 3)))):
        assert results["back"][0][back]["losses"] == pytest.approx(results[2][0][2 * two]["losses"][-2:], rel=1e-5)


def test_momentum_of_sgd_is_resharded(chain):
    folder, _ = chain
    same(folder / "one-sgd.pt", folder / "two-sgd.loaded.pt")
    assert any(key.startswith("momentum_buffer:") for key in torch.load(folder / "one-sgd.pt"))


def test_a_checkpoint_before_the_first_step_has_no_moments_and_resumes(chain):
    folder, results = chain
    first = Path(checkpoint(folder / "one-fp32", 0))
    assert verify(first) == []
    resumed = results[2][0][2 * len(CASES) + 2 * len(OFFLOAD) + 1]
    assert resumed["losses"] == pytest.approx(results[1][0][0]["losses"], rel=1e-5)
    assert resumed["optimizer_steps"] == [3.0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_frozen_weights_come_back_and_are_written_twice(chain, dtype):
    folder, _ = chain
    run = folder / f"two-llama-{dtype}"
    same(folder / f"two-llama-{dtype}.pt", folder / f"two-llama-{dtype}.back.pt")
    for rank in (0, 1):
        name = f"frozen-{rank:05d}-of-00002.safetensors"
        first, second, third = (Path(checkpoint(run, step)) / name for step in (1, 2, 3))
        assert not second.samefile(first)
        assert third.samefile(first)


def test_another_model_or_optimizer_is_refused_by_name(chain):
    _, results = chain
    optimizer, model = results[2][0][-2], results[2][0][-1]
    assert "holds the state of adam" in optimizer["error"]
    assert "optim.name asks for sgd" in optimizer["error"]
    assert "of another model" in model["error"]
    assert "embed.weight" in model["error"]


def test_start_from_takes_weights_and_nothing_else(chain):
    folder, results = chain
    last = results["back"][0][-1]
    assert last["differences"] == ([], [])
    assert last["optimizer_steps"] == []
    dumped = torch.load(folder / "new.pt")
    for name, tensor in iterate_weights(folder / "two-fp32-2"):
        assert torch.equal(dumped[f"model:{name}"], tensor)


@pytest.mark.parametrize("source", ["one-fp32", "one-bf16", "four-fp32-2", "four-bf16-3", "two-llama-bf16"])
def test_weights_are_read_without_a_process_group(chain, source):
    folder, _ = chain
    found, reasons = find_resumable(folder / source)
    assert reasons == []
    weights = dict(iterate_weights(folder / source))
    assert found is not None
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    dumped = torch.load(folder / f"{source}.pt")
    assert weights.keys() == {key.removeprefix("model:") for key in dumped if key.startswith("model:")}
    for name, tensor in weights.items():
        assert torch.equal(dumped.get(f"weight:{name}", dumped[f"model:{name}"]).float(), tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_consolidate_writes_plain_shards_with_tied_weights_once(chain, tmp_path, dtype):
    from safetensors.torch import load_file

    folder, _ = chain
    shards = consolidate(folder / "four-fp32-2", tmp_path / "out", dtype, max_shard_gib=2000 / 2**30)
    assert len(shards) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    merged = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    expected = dict(iterate_weights(folder / "four-fp32-2"))
    assert merged.keys() == expected.keys() == index["weight_map"].keys()
    assert read_manifest(resolve(folder / "four-fp32-2")).tied == {"head.weight": "embed.weight"}
    assert "head.weight" not in merged
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor.to(getattr(torch, dtype)))
