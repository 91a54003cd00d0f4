import pickle
import random

import pytest
import torch
from oracles import positions, random_samples, visible

from lbr_dist.model.layout import Sample, Segments, pack


def seen(segments: Segments, total: int) -> torch.Tensor:
    """[T, T] of the definition of Segments, spelled out."""
    mask = torch.zeros(total, total, dtype=torch.bool)
    rows = torch.arange(total) if segments.kv_index_K is None else segments.kv_index_K
    for i in range(len(segments.cu_q) - 1):
        queries = torch.arange(int(segments.cu_q[i]), int(segments.cu_q[i + 1]))
        keys = rows[int(segments.cu_k[i]) : int(segments.cu_k[i + 1])]
        n, m = len(queries), len(keys)
        assert n <= segments.max_q
        assert m <= segments.max_k
        for j in range(n):
            last = j + m - n if segments.causal else m - 1
            mask[queries[j], keys[: last + 1]] = True
    return mask


@pytest.mark.parametrize("hide_x", [True, False])
def test_segments_are_the_papers_mask_on_random_shapes(hide_x):
    rng = random.Random(1)
    for _ in range(150):
        samples = random_samples(rng, rng.randint(1, 4), longest=8)
        batch = pack(samples, bottleneck_vectors=3, hide_x=hide_x)
        assert torch.equal(seen(batch.segments, len(batch.tokens_T)), visible(samples, hide_x=hide_x))
        assert torch.equal(batch.positions_T[None], positions(samples))


def test_bidirectional_segments_see_their_whole_sample():
    samples = random_samples(random.Random(2), 5, y=False)
    batch = pack(samples, bottleneck_vectors=3, hide_x=True, causal=False)
    assert torch.equal(seen(batch.segments, len(batch.tokens_T)), visible(samples, hide_x=True, causal=False))


def test_layout_of_a_known_batch():
    batch = pack([Sample([5, 6], 2, [7, 8]), Sample([], 1, [9]), Sample([4], 3)], bottleneck_vectors=3, hide_x=True)
    assert batch.tokens_T.tolist() == [5, 6, 0, 0, 7, 8, 0, 9, 4, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2, 3]
    assert batch.z_index_T.tolist() == [-1, -1, 1, 2, -1, -1, 2, -1, -1, 0, 1, 2]
    assert batch.z_positions_N.tolist() == [2, 3, 6, 9, 10, 11]
    assert batch.loss_positions_L.tolist() == [3, 4, 6]
    assert batch.targets_L.tolist() == [7, 8, 9]
    assert batch.pool_S.tolist() == [3, 6, 11]
    assert batch.starts_S.tolist() == [0, 6, 8]


def test_without_bottleneck_the_last_x_predicts_the_first_y():
    batch = pack([Sample([5, 6], 0, [7]), Sample([1], 0, [2, 3])], bottleneck_vectors=0, hide_x=False)
    assert batch.loss_positions_L.tolist() == [1, 3, 4]
    assert batch.targets_L.tolist() == [7, 2, 3]
    assert batch.pool_S.tolist() == [1, 3]
    assert batch.segments.kv_index_K is None


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "at least one sample"),
        ([Sample([], 0, [1])], {"hide_x": False}, "neither X nor Z"),
        ([Sample([1], 3, [1])], {}, "asks for 3 bottleneck tokens"),
        ([Sample([1], 0, [1])], {}, "hide_x needs"),
        ([Sample([1], 1, [1])], {"causal": False}, "causal attention"),
    ],
)
def test_impossible_samples_are_refused(samples, options, message):
    with pytest.raises(ValueError, match=message):
        pack(samples, **{"bottleneck_vectors": 2, "hide_x": True, **options})


def test_a_batch_travels_and_forgets_what_a_backend_derived():
    batch = pack([Sample([1, 2], 1, [3])], bottleneck_vectors=1, hide_x=True)
    batch.segments.padded = "derived on another device"
    moved = batch.to("meta")
    assert moved.tokens_T.is_meta
    assert moved.segments.cu_q.is_meta
    assert moved.segments.padded is None
    assert torch.equal(pickle.loads(pickle.dumps(batch)).tokens_T, batch.tokens_T)


def test_attention_cells_of_the_guide():
    """The numbers of docs/model.md: |X| = |Y| = 1024, |Z| = 2."""

    def cells(hide_x):
        segments = pack([Sample([3] * 1024, 2, [3] * 1024)], bottleneck_vectors=2, hide_x=hide_x).segments
        n, m = segments.cu_q.diff().long(), segments.cu_k.diff().long()
        return int((n * (m - n) + n * (n + 1) // 2).sum())

    assert cells(hide_x=False) == 2_102_275
    assert cells(hide_x=True) == 1_053_699
