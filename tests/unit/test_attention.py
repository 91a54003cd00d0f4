import inspect
import itertools
import random

import pytest
import torch
from oracles import random_samples, visible
from torch.utils._python_dispatch import TorchDispatchMode

from lbr_dist.errors import UserError
from lbr_dist.model import attention
from lbr_dist.model.attention import choose_backend, packed_attention
from lbr_dist.model.layout import Sample, pack
from lbr_dist.model.padded import padded_groups


def dense(q, k, v, mask, scaling):
    """Attention by the formula; q [H, T, Dh], k and v [Hkv, T, Dh]."""
    groups = len(q) // len(k)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = (q @ k.transpose(1, 2) * scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("mode", ["hidden", "full", "bidirectional"])
def test_segments_equal_the_dense_mask_with_gradients_on_random_shapes(heads, mode):
    rng = random.Random(3)
    torch.manual_seed(3)
    for _ in range(40):
        causal = mode != "bidirectional"
        samples = random_samples(rng, rng.randint(1, 6), y=causal)
        batch = pack(samples, bottleneck_vectors=3, hide_x=mode == "hidden", causal=causal)
        mask = visible(samples, hide_x=mode == "hidden", causal=causal)
        tokens = len(mask)
        make = [
            torch.randn(h, tokens, 4, dtype=torch.float64, requires_grad=True) for h in (heads[0], heads[1], heads[1])
        ]
        weight = torch.randn(tokens, heads[0], 4, dtype=torch.float64)
        expected = dense(*make, mask, 0.3)
        expected_grads = torch.autograd.grad((expected * weight).sum(), make)
        out, _ = packed_attention(None, *(t[None] for t in make), None, scaling=0.3, segments=batch.segments)
        grads = torch.autograd.grad((out[0] * weight).sum(), make)
        torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-12)
        for got, want in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_no_tensor_grows_with_the_square_of_the_stream():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    rng = random.Random(4)
    samples = [Sample([3] * rng.randint(10, 60), 1, [4] * rng.randint(10, 60)) for _ in range(40)]
    batch = pack(samples, bottleneck_vectors=1, hide_x=True)
    tokens = len(batch.tokens_T)
    q, k, v = (torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        out, _ = packed_attention(None, q, k, v, None, segments=batch.segments)
        out.sum().backward()
    assert largest.numel < 2 * q.numel()
    assert largest.numel < tokens * tokens // 20


def test_padding_is_bounded_and_every_row_is_asked_once():
    rng = random.Random(5)
    samples = [Sample([3] * rng.randint(1, 200), 2, [4] * rng.randint(1, 200)) for _ in range(60)]
    segments = pack(samples, bottleneck_vectors=2, hide_x=True).segments
    groups = padded_groups(segments)
    assert len(groups.rows_P) <= int(segments.cu_k[-1]) * 1.25
    assert groups.rows_P[groups.slot_T].tolist() == list(range(int(segments.cu_q[-1])))
    assert all(mask is None for mask in groups.masks)


def test_padding_cannot_reach_an_output_or_a_gradient():
    """Not even a NaN, which a weight of 0 does not hide: it stays in its own sample, also the stream's first."""
    lengths = [2, 21, 20, 19]
    samples = [Sample([3] * (length - 1), 1) for length in lengths]
    rows = torch.arange(len(samples)).repeat_interleave(torch.tensor(lengths))
    for causal, broken in itertools.product((True, False), range(len(samples))):
        segments = pack(samples, bottleneck_vectors=1, hide_x=True, causal=causal).segments
        torch.manual_seed(0)
        whole, damaged = ([torch.randn(1, 2, 62, 4) for _ in range(3)] for _ in range(2))
        for good, bad in zip(whole, damaged, strict=True):
            bad[:] = good.masked_fill(rows[:, None] == broken, torch.nan)
            bad.requires_grad_()
        expected, _ = packed_attention(None, *whole, None, segments=segments)
        out, _ = packed_attention(None, *damaged, None, segments=segments)
        others = rows != broken
        assert torch.equal(out[:, others], expected[:, others])
        out[:, others].sum().backward()
        assert all(torch.isfinite(bad.grad[:, :, others]).all() for bad in damaged)


def test_it_never_guesses_the_packing():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="needs `segments`"):
        packed_attention(None, q, q, q, None)
    with pytest.raises(RuntimeError, match="no dropout"):
        packed_attention(
            None,
            q,
            q,
            q,
            None,
            dropout=0.1,
            segments=pack([Sample([1], 1)], bottleneck_vectors=1, hide_x=True).segments,
        )


def test_backend_follows_device_and_setting(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu, torch.float32) == "sdpa"
    for capability, backend in (((7, 5), "sdpa"), ((8, 0), "varlen"), ((9, 0), "varlen")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert choose_backend("auto", cuda, torch.bfloat16) == backend
    assert choose_backend("auto", cuda, torch.float32) == "sdpa"
    for setting in ("varlen", "flex"):
        with pytest.raises(UserError, match=f"model.attention={setting} needs a CUDA device"):
            choose_backend(setting, cpu, torch.bfloat16)
    with pytest.raises(UserError, match="no float32 kernel"):
        choose_backend("varlen", cuda, torch.float32)


def reference_varlen(q, k, v, cu_q, cu_k, causal, scale):
    outputs = []
    for i in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        n, m = cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else torch.ones(n, m, dtype=torch.bool)
        outputs.append(dense(*(t.transpose(0, 1) for t in (q[rows], k[keys], v[keys])), mask, scale))
    return torch.cat(outputs)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert query.shape[1] == key.shape[1]
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, window_size == (-1, 0), scale)


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, window_size == (-1, 0), scale)


@pytest.mark.parametrize("version", [torch_2_11, torch_2_13])
def test_varlen_is_called_in_the_installed_versions_own_way(monkeypatch, version):
    grouped = "enable_gqa" in inspect.signature(version).parameters
    monkeypatch.setattr(attention, "_varlen_function", lambda: (version, grouped))
    rng = random.Random(6)
    for causal in (True, False):
        samples = random_samples(rng, 5, y=causal)
        batch = pack(samples, bottleneck_vectors=3, hide_x=True, causal=causal)
        tokens = len(batch.tokens_T)
        q, k, v = (torch.randn(1, h, tokens, 4, dtype=torch.float64) for h in (4, 2, 2))
        out, _ = packed_attention(None, q, k, v, None, scaling=0.3, segments=batch.segments, backend="varlen")
        expected = dense(q[0], k[0], v[0], visible(samples, hide_x=True, causal=causal), 0.3)
        torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-12)


def test_flex_block_mask_means_the_same(monkeypatch):
    """The kernel itself needs CUDA; its eager form shows that the block mask is right."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    rng = random.Random(7)
    for causal in (True, False):
        samples = random_samples(rng, 6, y=causal)
        batch = pack(samples, bottleneck_vectors=3, hide_x=True, causal=causal)
        tokens = len(batch.tokens_T)
        q, k, v = (torch.randn(1, h, tokens, 8) for h in (4, 2, 2))
        out, _ = packed_attention(None, q, k, v, None, scaling=0.3, segments=batch.segments, backend="flex")
        expected = dense(q[0], k[0], v[0], visible(samples, hide_x=True, causal=causal), 0.3)
        torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)
