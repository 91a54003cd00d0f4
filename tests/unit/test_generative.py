import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from lbr_dist.model.head import LossHead, linear_cross_entropy_sum
from lbr_dist.model.layout import Sample, pack
from lbr_dist.objectives.generative import generative_loss


def problem(rows, dtype=torch.float32, vocabulary=50, width=16):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 33])
def test_chunked_loss_and_gradients_equal_the_whole(rows):
    hidden, weight, targets = problem(rows)
    whole = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    chunked = linear_cross_entropy_sum(hidden, weight, targets, chunk_elements=8 * 50)
    torch.testing.assert_close(chunked, whole)
    for got, want in zip(
        torch.autograd.grad(chunked * 3, [hidden, weight]),
        torch.autograd.grad(whole * 3, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_it_equals_torchs_own_linear_cross_entropy():
    own = pytest.importorskip("torch.nn.functional")
    if "linear_cross_entropy" not in vars(own):
        pytest.skip("this torch has no linear_cross_entropy")
    hidden, weight, targets = problem(33)
    options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
    theirs = own.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
    torch.testing.assert_close(linear_cross_entropy_sum(hidden, weight, targets, chunk_elements=400), theirs)


def test_bfloat16_inputs_are_summed_in_float32():
    hidden, weight, targets = problem(4096, torch.bfloat16)
    loss = linear_cross_entropy_sum(hidden, weight, targets, chunk_elements=8 * 50)
    grad_hidden, grad_weight = torch.autograd.grad(loss, [hidden, weight])
    wide_hidden, wide_weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    wide = cross_entropy(wide_hidden @ wide_weight.T, targets, reduction="sum")
    exact_hidden, exact_weight = torch.autograd.grad(wide, [wide_hidden, wide_weight])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide, rtol=2e-4, atol=0)
    for got, want in [(grad_hidden, exact_hidden), (grad_weight, exact_weight)]:
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() < 0.005 * want.norm()  # 3% where the 512 chunks are added in bfloat16


@pytest.mark.parametrize("factor", [1 / 1023, 1 / 2056, 2 / 771])
def test_a_factor_of_the_loss_is_not_rounded_with_the_gradient(factor):
    """Numbers that are bfloat16 stay as they are under a factor near 1: the whole gradient was off by it."""
    hidden, weight, targets = problem(1024, torch.bfloat16, vocabulary=500, width=64)
    losses = (linear_cross_entropy_sum(hidden, weight, targets, chunk_elements=256 * 500) for _ in range(2))
    plain, scaled = (
        torch.autograd.grad(loss * by, [hidden, weight]) for loss, by in zip(losses, (1, factor), strict=True)
    )
    for one, other in zip(plain, scaled, strict=True):
        wanted = one.double() * factor
        assert abs((other * wanted).sum() / wanted.square().sum() - 1) < 1e-4


def test_logits_are_never_whole():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    hidden, weight, targets = problem(2000, vocabulary=3000, width=8)
    with Largest() as largest:
        linear_cross_entropy_sum(hidden, weight, targets, chunk_elements=100 * 3000).backward()
    assert largest.numel <= 100 * 3000
    with Largest() as largest:
        cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert largest.numel == 2000 * 3000


def test_frozen_weight_gets_no_gradient_and_a_second_backward_is_refused():
    hidden, weight, targets = problem(9)
    loss = linear_cross_entropy_sum(hidden, weight.detach(), targets)
    loss.backward(retain_graph=True)
    assert hidden.grad is not None
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_the_head_is_still_a_linear_layer():
    linear = torch.nn.Linear(16, 50, bias=False)
    head = LossHead(linear)
    hidden = torch.randn(3, 16)
    assert head.weight is linear.weight
    assert torch.equal(head(hidden), linear(hidden))
    assert list(head.state_dict()) == ["weight"]
    expected = cross_entropy(linear(hidden), torch.tensor([1, 2, 3]), reduction="sum")
    torch.testing.assert_close(head(hidden, torch.tensor([1, 2, 3])), expected)


SAMPLES = [
    Sample([5, 6, 7], 1, [8, 9, 10, 11, 12]),
    Sample([4], 2, [3]),
    Sample([9] * 7, 1, [5, 4]),
    Sample([30], 1, [31] * 9),
]


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 1], [2, 0], []], [[1], [0, 2, 3]]])
def test_the_mean_over_targets_does_not_depend_on_the_micro_batches(tiny_lbr, split):
    model = tiny_lbr("llama")
    target_tokens = sum(len(s.y) for s in SAMPLES)
    per_sample = [model(pack([s], bottleneck_vectors=2, hide_x=True), "generate") for s in SAMPLES]
    expected = torch.stack(per_sample).sum() / target_tokens
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for members in split:
        samples = [SAMPLES[i] for i in members] or [Sample([3], 1)]
        loss = generative_loss(
            model, pack(samples, bottleneck_vectors=2, hide_x=True), target_tokens=target_tokens, world_size=1
        )
        loss.backward.backward()
        total += loss.total
    torch.testing.assert_close(total / target_tokens, expected.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_world_size_undoes_the_engines_average(tiny_lbr):
    model = tiny_lbr("llama")
    batch = pack(SAMPLES, bottleneck_vectors=2, hide_x=True)
    one = generative_loss(model, batch, target_tokens=100, world_size=1)
    four = generative_loss(model, batch, target_tokens=100, world_size=4)
    torch.testing.assert_close(four.backward, 4 * one.backward)
    assert torch.equal(four.total, one.total)
    assert not one.total.requires_grad
