"""`lbr plan`: counts against real models, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from torch.utils.flop_counter import FlopCounterMode

from lbr_dist.data.plan.base import PlannedSample, SampleRef
from lbr_dist.data.record import Record
from lbr_dist.data.shard_writer import write_set
from lbr_dist.environment import Environment
from lbr_dist.errors import UserError
from lbr_dist.model.backbone import load_config
from lbr_dist.model.layout import Sample, pack
from lbr_dist.model.tokenizer import Tokenization
from lbr_dist.recipes import load_recipe, parse_recipe
from lbr_dist.training.cost.estimate import communication, estimate
from lbr_dist.training.cost.flops import FlopCounter
from lbr_dist.training.cost.machines import MACHINES, peak_flops
from lbr_dist.training.cost.memory_model import Shape, copied_elements, memory, trained_elements
from lbr_dist.training.preflight import check
from lbr_dist.training.run_folder import claim

ZERO3 = {"stage": 3}
SEVEN = Shape(layers=28, width=3584, query=3584, key=512, inner=18944, vocabulary=152064, tied=False)  # Qwen2.5-7B


def make(**sections: Any) -> Any:
    raw: dict[str, Any] = {
        "stage": "generative",
        "output": "run-that-is-not-there",
        "model": {"path": "model", "dtype": "bfloat16"},
        "data": {"sets": [{"path": "set"}], "bin_tokens": 512, "max_x_tokens": 100, "max_y_tokens": 100},
        "bottleneck": {"tokens": 2},
        "batch": {"global_batch": 2},
        "duration": {"epochs": 2},
    }
    for name, value in sections.items():
        raw[name] = {**raw[name], **value} if isinstance(raw.get(name), dict) else value
    return parse_recipe(raw, "test")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "lora",
    [
        None,
        {"r": 4},
        {"r": 4, "target_modules": ["q_proj", "1.mlp.down_proj"]},
        {"r": 4, "train_modules": ["embed_tokens", "layers.1.mlp"]},
    ],
)
def test_counts_are_those_of_the_model(tiny_lbr: Callable[..., Any], family: str, lora: dict[str, Any] | None) -> None:
    model = tiny_lbr(family, tied=False, model={"lora": lora})
    shape = Shape.of(model.causal_lm.config)
    recipe = make(model={"path": "model", "lora": lora})
    matrices = [
        p for name, p in model.named_parameters() if p.dim() > 1 and not re.search("lora_|modules_to_save|^z$", name)
    ]
    assert shape.total == sum(p.numel() for p in matrices)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim() > 1)
    assert trained_elements(shape, recipe) == trained
    copies = (p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "modules_to_save" in name)
    assert copied_elements(shape, recipe) == sum(copies)
    held = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and name != "z")
    assert memory(shape, recipe, MACHINES["h100"], world=1, zero={"stage": 0}, micro=8).weights == 2 * held


def test_seven_billion() -> None:
    assert SEVEN.total == pytest.approx(7.61e9, rel=0.005)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 836e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_is_that_of_the_gpu_s_own_form(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_flops_are_those_that_torch_counts(tiny_lbr: Callable[..., Any]) -> None:
    """Without attention, whose kernels count whole squares."""
    model, lengths = tiny_lbr("llama", tokens=2), [(9, 2, 7), (3, 2, 1), (12, 2, 4)]
    batch = pack([Sample([5] * x, z, [6] * y) for x, z, y in lengths], bottleneck_vectors=2, hide_x=True)
    with FlopCounterMode(display=False) as counter:
        model(batch, "generate").backward()
    counts = counter.get_flop_counts()["Global"]
    settings, targets = model.causal_lm.config, sum(y for _, _, y in lengths)
    unseen = 2 * 2 * settings.vocab_size * settings.hidden_size * targets  # the head's `addmm_`
    products = unseen + sum(n for op, n in counts.items() if "attention" not in str(op))
    flops = FlopCounter.of(settings, make())
    planned = [PlannedSample(SampleRef(0, i), *sizes) for i, sizes in enumerate(lengths)]
    cells = sum((x + z) * (x + z + 1) / 2 + y * z + y * (y + 1) / 2 for x, z, y in lengths)
    assert flops.of_samples(planned) - flops.per_cell * cells == pytest.approx(products)


def test_more_ranks_need_less_and_send_no_more_than_the_whole() -> None:
    recipe, machine = make(), MACHINES["h100"]
    needs = [memory(SEVEN, recipe, machine, world=n, zero=ZERO3, micro=4096).total for n in (1, 2, 8, 64, 1024)]
    assert needs == sorted(needs, reverse=True)
    assert communication(SEVEN, recipe, stage=3, world=1, micros=1) == 0
    sent = communication(SEVEN, recipe, stage=3, world=1024, micros=1)
    assert sent == pytest.approx(3 * 2 * SEVEN.total, rel=0.01)


def test_recomputation_and_offload_save_memory() -> None:
    machine = MACHINES["h100"]
    plain = memory(SEVEN, make(), machine, world=8, zero=ZERO3, micro=16384)
    recomputed = make(model={"path": "model", "dtype": "bfloat16", "activation_checkpointing": True})
    assert memory(SEVEN, recomputed, machine, world=8, zero=ZERO3, micro=16384).activations < plain.activations / 4
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert memory(SEVEN, make(), machine, world=8, zero=offload, micro=16384).optimizer == 0
    none = {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": {"pin_memory": True}}
    assert memory(SEVEN, make(), machine, world=8, zero=none, micro=16384) == plain


def test_without_zero_every_rank_holds_all_moments() -> None:
    recipe, ask = make(model={"path": "m", "dtype": "float32"}), {"zero": {"stage": 0}, "micro": 4096}
    one, four = (memory(SEVEN, recipe, MACHINES["h100"], world=world, **ask) for world in (1, 4))
    assert four.optimizer == one.optimizer == 8 * trained_elements(SEVEN, recipe)


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    tokenization = Tokenization.load(str(tiny_model_dir()))
    records = [Record(id=f"r{i}", question=f"what is {i}", answer=f"it is {i * i}") for i in range(50)]
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", {"gl": records}, tokenization, name="plan")
    return {
        "model": {"path": str(tiny_model_dir())},
        "data": {"sets": [{"path": str(tmp_path / "set")}]},
        "output": str(tmp_path / "run"),
    }


def test_plan_of_a_recipe(prepared: dict[str, Any], tmp_path: Path) -> None:
    found = estimate(make(**prepared), world=4, gpu="a100")
    text = "\n".join(found.lines)
    assert "50 samples" in text
    assert "4 x A100" in text
    assert found.step_s > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["generative", "contrastive", "joint"])
def test_a_step_lasts_as_long_as_its_largest_share(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], stage: str
) -> None:
    records = [Record(id=f"r{i}", question=f"what is {i}", answer=f"it is {i * i}") for i in range(98)]
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", {"gl": records, "cl": records}, Tokenization.load(str(tiny_model_dir())), name="plan")
    recipe = make(
        stage=stage,
        model={"path": str(tiny_model_dir())},
        data={"sets": [{"path": str(tmp_path / "set")}], "bin_tokens": 128, "max_x_tokens": 60, "max_y_tokens": 60},
        batch={"global_batch": 7},
        output=str(tmp_path / "run"),
        **({"joint": {"bins": 7}} if stage == "joint" else {}),
    )
    few, as_many, more = (estimate(recipe, world=world, gpu="cpu") for world in (4, 7, 64))
    job, machine = check(recipe, Environment(0, 7, 0, 7, None, "plan")), MACHINES["cpu"]
    counter, steps = FlopCounter.of(load_config(str(tiny_model_dir()), 0), recipe), job.plan.steps_per_epoch(0)
    largest = [
        max(sum(counter.of_samples(m.samples) for m in job.plan.step(n).micro_batches(r, 7)) for r in range(7))
        for n in range(steps)
    ]
    compute = f"compute {sum(largest) / steps / machine.peak_flops / machine.share:.3g} s"
    assert [compute in found.lines[4] for found in (few, as_many, more)] == [False, True, True]
    assert [line for line in more.lines if "57 of 64 ranks have nothing to do in a step: take 7, or raise" in line]
    assert not any("nothing to do" in line for found in (few, as_many) for line in found.lines)


def test_a_folder_that_holds_another_run_is_a_note(prepared: dict[str, Any], tmp_path: Path) -> None:
    """The answer is what was asked for; the run may go on beside it."""
    claim(make(**prepared))
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    (said,) = [line for line in estimate(make(**prepared, seed=5)).lines if "would be refused" in line]
    assert said.startswith(
        f"note       a start in this folder would be refused: {tmp_path}/run: holds another run (seed"
    )
    assert not any("would be refused" in line for line in estimate(make(**prepared)).lines)


def test_a_step_of_batches_of_one_domain_is_their_average(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    records = [
        Record(
            id=f"r{i}", question=f"what is {i}", answer=" ".join(["it is"] * (30 if i % 4 else 1) + [str(i)]), domain=d
        )
        for i in range(40)
        for d in (["short", "long"][i % 4 > 0],)
    ]
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", {"cl": records}, Tokenization.load(str(tiny_model_dir())), name="plan")
    recipe = make(
        stage="contrastive",
        model={"path": str(tiny_model_dir()), "dtype": "float32"},
        data={"sets": [{"path": str(tmp_path / "set")}]},
        contrastive={"homogeneous": "domain"},
        batch={"global_batch": 10, "micro_tokens": 300},
        output=str(tmp_path / "run"),
    )
    plan, machine = check(recipe, Environment(0, 1, 0, 1, None, "plan")).plan, MACHINES["cpu"]
    counter = FlopCounter.of(load_config(str(tiny_model_dir()), 0), recipe)
    batches = [plan.step(number).micro_batches(0, 1) for number in range(4)]
    counts = [len(of_step) for of_step in batches]
    assert plan.steps_per_epoch(0) == 4
    assert min(counts) == 1 < max(counts)
    flops = sum(counter.of_samples(micro.samples) for of_step in batches for micro in of_step) / 4
    found = estimate(recipe, gpu="cpu")
    assert found.step_s == pytest.approx(4 / 3 * flops / (machine.peak_flops * machine.share))
    assert f"1 to {max(counts)} micro-batches per rank" in "\n".join(found.lines)


def test_what_cannot_work_is_refused(prepared: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--gpu b9: expected one of h100"):
        estimate(make(**prepared), gpu="b9")
    with pytest.raises(UserError, match="no such file"):
        estimate(make(**{**prepared, "deepspeed": "zero9"}))
    removed = tmp_path / "removed.json"
    removed.write_text('{"zero_optimization": {"stage": 2}, "sparse_gradients": true}')
    with pytest.raises(UserError, match=r"deepspeed .*removed\.json: .*correct the file"):
        estimate(make(**prepared, deepspeed=str(removed)), gpu="cpu")
    huge = {**prepared, "batch": {"global_batch": 2, "micro_tokens": 10**9}}
    with pytest.raises(UserError, match=r"does not fit 80 GiB: try .*batch\.micro_tokens"):
        estimate(make(**huge))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": {"target_modules": ["nope"]}}, "target_modules: no module is called nope"),
        ({"lora": {"target_modules": []}}, r"model\.lora: does not fit .* or to all-linear"),
        ({"lora": {"target_modules": ["mlp"]}}, r"model\.lora: does not fit .* or to all-linear"),
        ({"lora": {"train_modules": ["nope"]}}, "train_modules: no module is called nope"),
        ({"lora": {"train_modules": ["embed_tokens"]}}, "embed_tokens is tied"),
        ({"lora": {"train_modules": ["norm", "layers.1.mlp"]}}, None),
        ({"attention": "varlen"}, r"model\.attention=varlen needs a CUDA device"),
        ({"attention": "flex"}, r"model\.attention=flex needs a CUDA device"),
    ],
)
def test_of_the_model_is_refused_what_train_refuses(
    prepared: dict[str, Any], changes: dict[str, Any], said: str | None
) -> None:
    recipe = make(**{**prepared, "model": {**prepared["model"], **changes}})
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        estimate(recipe, gpu="cpu")
    if "attention" in changes:
        assert estimate(recipe, gpu="h100").lines


def test_an_output_that_no_run_could_have_is_refused(prepared: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, said in (("file", "is a file"), ("set", "is not empty and holds no run of lbr")):
        with pytest.raises(UserError, match=f"output {tmp_path}/{output}: {said}; choose another output"):
            estimate(make(**{**prepared, "output": str(tmp_path / output)}))


def test_the_readme_s_own_data_suits_the_shipped_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `lbr prepare`, in small: stage 1 refused the corpus that once stood there beside the questions."""
    from lbr_dist.cli import app

    base = make_model(tmp_path / "base", "qwen2", positions=4096)
    rows = [{"question": f"what is {i * 7919}", "answer": f"it is {i * i * 104729}"} for i in range(60)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.txt").write_text("".join(f"a text of the field, number {i * i}\n" for i in range(40)))
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    command = next(line.split()[1:] for line in readme.splitlines() if line.startswith("lbr prepare "))
    command[command.index("--tokenizer") + 1], command[command.index("--eval") + 1] = str(base), "10"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^0$"):
        app(command)
    for name in ("stage1", "stage2"):
        recipe = load_recipe(name, [f"model.path={base}", "model.start_from=null"])
        assert estimate(recipe, gpu="h100").lines


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("stage", ["contrastive", "joint"])
def test_an_instruction_that_an_export_cannot_have_is_told_before_training(
    tmp_path: Path, stage: str, marks: bool
) -> None:
    """A tokenizer that marks the first word (with a space here) gives it other tokens behind an instruction."""
    base = make_model(tmp_path / "base", "llama")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = marks
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    records = [Record(id=f"r{i}", question=f"what is {i}", answer=f"it is {i * i}") for i in range(9)]
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", {"gl": records, "cl": records}, Tokenization.load(str(base)), name="plan")
    recipe = make(
        stage=stage,
        model={"path": str(base)},
        data={"sets": [{"path": str(tmp_path / "set")}]},
        contrastive={"query_instruction": "Find the answer:\n"},
        **({"joint": {"bins": 1}} if stage == "joint" else {}),
    )
    said = [line for line in estimate(recipe, gpu="cpu").lines if "contrastive.query_instruction: behind it" in line]
    assert len(said) == marks


def test_on_a_cpu_the_copy_counts_while_it_is_written_and_adapters_leave_gaps() -> None:
    cpu, ask = MACHINES["cpu"], {"world": 1, "zero": {"stage": 0}, "micro": 4096}
    early, late = (memory(SEVEN, make(), cpu, forward_s=seconds, **ask) for seconds in (0.0, 1e6))
    assert early.host_copy == 12 * trained_elements(SEVEN, make())
    assert late.host_copy == max(0, early.host_copy - early.activations - early.loss)
    assert early.allocator == 0
    adapters = [make(model={"path": "m", "lora": {"r": 8}, "activation_checkpointing": on}) for on in (False, True)]
    gaps = [memory(SEVEN, recipe, cpu, **ask).allocator for recipe in adapters]
    assert gaps[0] == gaps[1] > 0  # what is computed again leaves gaps as well
    assert memory(SEVEN, adapters[0], MACHINES["h100"], **ask).allocator == 0


def test_the_tiny_model_needs_what_torch_says(tiny_lbr: Callable[..., Any]) -> None:
    model = tiny_lbr("llama", tied=True)
    shape = Shape.of(model.causal_lm.config)
    found = memory(shape, make(model={"path": "m"}), MACHINES["cpu"], world=1, zero={"stage": 0}, micro=10)
    weights = sum(p.numel() * torch.finfo(torch.bfloat16).bits // 8 for p in model.causal_lm.parameters())
    assert found.weights == pytest.approx(weights, rel=0.03)
