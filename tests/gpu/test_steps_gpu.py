"""What a step, an encoder and a scorer compute on CUDA, against the same on the CPU.

float32 products on a GPU may use TensorFloat-32 where it is allowed; it is not here. bfloat16 has 8 bits of mantissa.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from oracles import random_samples
from runs import make_run
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity

from lbr_dist.environment import Environment
from lbr_dist.inference.loading import load_run
from lbr_dist.model.layout import pack
from lbr_dist.model.surprisal import Scorer
from lbr_dist.model.tokenizer import Tokenization
from lbr_dist.objectives.infonce import info_nce
from lbr_dist.training.checkpoint.random_state import random_state, restore_random_state
from lbr_dist.training.checkpoint.weights import pack_rank_state, read_rank_state
from lbr_dist.training.checkpoint.writer import SLOWEST_WRITE
from lbr_dist.training.collective import GlooTeam, on_all_ranks, on_rank_zero
from lbr_dist.training.engine import start_distributed
from lbr_dist.training.gradcache import prepare

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this torch sees none"),
]
TEXTS = ["aspirin", "the heart pumps blood " * 8, "fever of unknown origin, rash", "", "x"]


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def info_nce_gradients(device: str, dtype: torch.dtype, tile: int) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of 300 pairs with 90 hard negatives, some of them masked."""
    given = [rows(count, 48, seed).to(device, dtype).requires_grad_() for seed, count in enumerate((300, 300, 90))]
    answer_Q = (torch.arange(300) % 260).to(device)
    loss, _ = info_nce(
        given[0], given[1], negatives_ND=given[2], answer_Q=answer_Q, negative_answer_N=answer_Q[:90] + 1000,
        two_way=True, tile=tile,
    )  # fmt: skip
    return float(loss.detach()), [g.double().cpu() for g in torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("tile", [64, 4096])
def test_info_nce_is_that_of_the_cpu_in_float64(tile: int) -> None:
    wanted, exact = info_nce_gradients("cpu", torch.float64, 4096)
    loss, gradients = info_nce_gradients(DEVICE, torch.float32, tile)
    assert loss == pytest.approx(wanted, rel=1e-5)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_info_nce_holds_tiles_and_not_the_matrix() -> None:
    query, positive = (rows(16384, 64, seed).to(DEVICE).requires_grad_() for seed in (1, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(query, positive, tile=2048)[0].backward()
    whole = 16384 * 16384 * 4
    assert torch.cuda.max_memory_allocated() - before < whole / 4


def gradients_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().cpu().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("dtype", "agreement"), [(torch.float32, 1 - 1e-6), (torch.bfloat16, 0.99)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_stage_1_step(tiny_lbr, family: str, dtype: torch.dtype, agreement: float) -> None:
    """SDPA in float32, variable-length flash in bfloat16: loss, and direction and length of the gradient."""
    samples = random_samples(random.Random(4), 12, longest=60, vectors=2)
    losses, gradients = [], []
    for device, kind in (("cpu", torch.float32), (DEVICE, dtype)):
        model = tiny_lbr(family).to(device, kind)
        loss = model(pack(samples, bottleneck_vectors=2, hide_x=True).to(device), "generate")
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(gradients_of(model))
    exact = dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if exact else 0.02)
    assert cosine_similarity(*gradients, dim=0) > agreement
    assert float(gradients[1].norm()) == pytest.approx(float(gradients[0].norm()), rel=1e-4 if exact else 0.05)


def test_cached_embeddings_repeat_dropout() -> None:
    """GradCache on the GPU's generator: with dropout the gradient is that of one backward over everything."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(32, 8)
    ).to(DEVICE)
    micros = [rows(count, 16, count).to(DEVICE) for count in (9, 5, 12)]

    def loss_of(parts):
        return info_nce(torch.cat(parts)[:13], torch.cat(parts)[13:])

    found = []
    for cache in (False, True):
        torch.manual_seed(7)
        network.zero_grad()
        closures, _ = prepare(micros, network, loss_of, cache=cache)
        for closure in closures:
            closure().backward()
        found.append((gradients_of(network), torch.rand(3, device=DEVICE).cpu()))
    (direct, after), (cached, after_cached) = found
    assert (cached - direct).norm() <= 1e-5 * direct.norm()
    assert torch.equal(after, after_cached)


def test_random_numbers_go_on_where_a_checkpoint_left_them(tmp_path) -> None:
    torch.rand(5, device=DEVICE)
    tensors, metadata = pack_rank_state(random_state())
    save_file(tensors, file := tmp_path / "rank.safetensors", metadata)
    wanted = torch.rand(3, device=DEVICE)
    restore_random_state(read_rank_state(file))
    assert torch.equal(torch.rand(3, device=DEVICE), wanted)


def test_one_rank_meets_itself_over_nccl(monkeypatch) -> None:
    """Objects travel over NCCL, those of the checkpoint's writer over gloo beside it."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    device = start_distributed(Environment(0, 1, 0, 1, None, "test"), 60)
    try:
        assert (device, dist.get_backend()) == (torch.device("cuda", 0), "nccl")
        assert on_rank_zero(lambda: {"step": 7}) == {"step": 7}
        on_all_ranks(lambda: None)
        assert GlooTeam(SLOWEST_WRITE).gather("x") == ["x"]
        dist.all_reduce(ones := torch.ones(5, dtype=torch.float64, device=device))
        assert ones.tolist() == [1.0] * 5
        loss, exact = (info_nce_gradients(where, torch.float32, 64)[0] for where in (DEVICE, "cpu"))
        assert loss == pytest.approx(exact, rel=1e-5)
    finally:
        dist.destroy_process_group()


def test_an_encoder(tmp_path, tiny_model_dir) -> None:
    """The same vectors as on the CPU, in float32 and in the bfloat16 of a run trained so."""
    for name, dtype, agreement in (("exact", "float32", 1 - 1e-5), ("low", "bfloat16", 0.99)):
        run = make_run(tmp_path / name, tiny_model_dir("qwen3"), model={"dtype": dtype})
        wanted = load_run(run, "cpu").encoder().encode(TEXTS)
        found = load_run(run, DEVICE).encoder().encode(TEXTS)
        assert (wanted * found).sum(1).min() > agreement


def test_surprisal(tiny_model_dir) -> None:
    folder = str(tiny_model_dir("llama"))
    tokens = Tokenization.load(folder)
    wanted, found = (Scorer(folder, tokens, device).bits(tokens.encode(TEXTS)) for device in ("cpu", DEVICE))
    assert found == pytest.approx(wanted, rel=1e-3)
    assert np.isfinite(found).all()
