"""Attention on CUDA: the kernels that no CPU can run, against the dense oracle in float32.

bfloat16 has 8 bits of mantissa: a result may differ from float32 by about 1% of the size of its terms.
"""

import random

import pytest
import torch
from oracles import random_samples, visible
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from lbr_dist.model.attention import choose_backend, packed_attention
from lbr_dist.model.head import linear_cross_entropy_sum
from lbr_dist.model.layout import Sample, pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this torch sees none"),
]
WIDTH = 64


def dense(q, k, v, mask):
    """Attention by the formula, in float32; q [1, H, T, Dh], k and v [1, Hkv, T, Dh]."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.float(), k.float().repeat_interleave(groups, 1), v.float().repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3) * WIDTH**-0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def tensors(tokens, heads, dtype):
    torch.manual_seed(tokens)
    return [torch.randn(1, h, tokens, WIDTH, device="cuda", dtype=dtype, requires_grad=True) for h in heads]


def compare(samples, backend, dtype, heads=(4, 2, 2), **options):
    batch = pack(samples, **{"bottleneck_vectors": 3, "hide_x": True, **options}).to("cuda")
    mask = visible(samples, hide_x=options.get("hide_x", True), causal=options.get("causal", True)).cuda()
    qkv = tensors(len(mask), heads, dtype)
    weight = torch.randn(1, len(mask), heads[0], WIDTH, device="cuda")
    expected = dense(*qkv, mask)
    wanted = torch.autograd.grad((expected * weight).sum(), qkv)
    out, _ = packed_attention(None, *qkv, None, scaling=WIDTH**-0.5, segments=batch.segments, backend=backend)
    got = torch.autograd.grad((out.float() * weight).sum(), qkv)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-6


MODES = [{}, {"hide_x": False}, {"causal": False}]
BOTH = [("varlen", torch.bfloat16), ("sdpa", torch.float32)]
FLEX = [(torch.bfloat16, mode) for mode in MODES] + [(torch.float32, {})]


@pytest.mark.parametrize(("backend", "dtype"), BOTH)
@pytest.mark.parametrize("mode", MODES)
def test_backend_equals_dense_on_random_shapes(backend, dtype, mode):
    rng = random.Random(8)
    for longest in (5, 40, 300):
        compare(random_samples(rng, 6, longest=longest, y=mode.get("causal", True)), backend, dtype, **mode)


@pytest.mark.parametrize(("dtype", "mode"), FLEX)
def test_flex_equals_dense_on_random_shapes(dtype, mode):
    """Each case is compiled once: streams shorter than a block of 128 rows would be compiled by themselves."""
    rng = random.Random(8)
    for longest in (100, 300):
        samples = random_samples(rng, 20, longest=longest, y=mode.get("causal", True))
        compare(samples, "flex", dtype, **mode)


@pytest.mark.parametrize("mode", MODES[:2])
def test_sdpa_takes_no_unfused_kernel(mode):
    """It would hold all scores, and in float32 be three times as slow; the model has grouped queries."""
    samples = random_samples(random.Random(8), 6, longest=60)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        compare(samples, "sdpa", torch.float32, **mode)


@pytest.mark.parametrize("heads", [(2, 2, 2), (8, 2, 2), (4, 1, 1)])
def test_varlen_with_grouped_queries(heads):
    compare(random_samples(random.Random(9), 4, longest=60), "varlen", torch.bfloat16, heads)


def test_varlen_causality_is_aligned_at_the_bottom_right():
    """One query segment shorter than its keys: Y of 2 sees Z of 3. Top-left alignment would hide Z from Y_1."""
    samples = [Sample([5], 3, [6, 7])]
    batch = pack(samples, bottleneck_vectors=3, hide_x=True).to("cuda")
    q, k, v = tensors(6, (1, 1, 1), torch.bfloat16)
    out, _ = packed_attention(None, q, k, v, None, segments=batch.segments, backend="varlen")
    for row, seen in [(4, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 5])]:
        gradient = torch.autograd.grad(out[0, row].float().sum(), v, retain_graph=True)[0]
        assert gradient[0, 0].abs().sum(-1).nonzero().flatten().tolist() == seen


def test_auto_takes_varlen_for_bfloat16():
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16) == "varlen"


def test_loss_head_sums_chunks_in_float32():
    """The product that adds to the float32 gradient by itself is CUDA's alone; 64 chunks, against float64."""
    torch.manual_seed(0)
    exact = [torch.randn(2048, 128).bfloat16().double(), (torch.randn(1000, 128) / 8).bfloat16().double()]
    targets = torch.randint(1000, (2048,))
    given = [tensor.to("cuda", torch.bfloat16).requires_grad_() for tensor in exact]
    loss = linear_cross_entropy_sum(*given, targets.cuda(), chunk_elements=32 * 1000)
    wanted = cross_entropy(exact[0].requires_grad_() @ exact[1].requires_grad_().t(), targets, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)
    pairs = zip(torch.autograd.grad(loss, given), torch.autograd.grad(wanted, exact), strict=True)
    for ours, theirs in pairs:
        assert (ours.cpu().double() - theirs).norm() <= 1e-2 * theirs.norm()


def test_loss_head_keeps_memory_bounded():
    rows, vocabulary, width = 32768, 50_000, 256
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy_sum(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < rows * vocabulary * 4 / 2
