"""Best-fit packing: bulk moves give what the textbook algorithm gives, and text lengths fill bins to over 98.5%."""

import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.data.plan.packing import assign_bins, best_fit

MEDICINE = Path(__file__).parents[3] / "shared" / "data" / "medicine.jsonl.gz"


def textbook(lengths: list[int], capacity: int) -> list[int]:
    """Loads of the bins of best-fit-decreasing, one sample at a time."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, load in enumerate(loads) if load + length <= capacity]
        if fitting:
            loads[max(fitting, key=lambda i: loads[i])] += length
        else:
            loads.append(length)
    return sorted(loads)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
def test_equals_textbook_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in items) for items in bins) == textbook(lengths, capacity)


def test_is_deterministic_and_whole() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 3000)
    first, bins = assign_bins(lengths, 1024)
    again, _ = assign_bins(lengths.copy(), 1024)
    assert (first == again).all()
    assert np.bincount(first, weights=lengths, minlength=bins).max() <= 1024
    assert set(first) == set(range(bins))


def test_a_bin_may_be_larger_than_memory() -> None:
    assert [items.tolist() for items in best_fit(np.array([3, 1, 2]), 2**53 - 1)] == [[0, 1, 2]]


@pytest.mark.parametrize("lengths", [[0], [11], [-1, 3]])
def test_refuses_lengths_that_no_bin_holds(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"1\.\.10"):
        best_fit(np.array(lengths), 10)


@pytest.mark.parametrize("capacity", [1024, 4096])
def test_text_like_lengths_fill_the_bins(capacity: int) -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(4.6, 0.8, 20_000).astype(int), 2, 1024)
    _, bins = assign_bins(lengths, capacity)
    assert lengths.sum() / (bins * capacity) >= 0.985


def test_a_window_packs_fast() -> None:
    lengths = np.random.default_rng(2).integers(1, 4097, 65_536)
    start = time.perf_counter()
    assign_bins(lengths, 4096)
    assert time.perf_counter() - start < 5  # 0.03 s on an idle core; one search per sample takes a minute


@pytest.mark.skipif(not MEDICINE.is_file(), reason="the medicine rows are not beside this checkout")
def test_medicine_rows_fill_98_5_percent_of_1024_token_bins() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    with gzip.open(MEDICINE, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=4000, show_progress=False)
    tokenizer.train_from_iterator((row["question"] + " " + row["answer"] for row in rows[:3000]), trainer)
    questions = tokenizer.encode_batch_fast([row["question"] for row in rows])
    answers = tokenizer.encode_batch_fast([row["answer"] for row in rows])
    lengths = np.array([len(q.ids) + len(a.ids) + 2 for q, a in zip(questions, answers, strict=True)])
    lengths = lengths[lengths <= 1024]
    _, bins = assign_bins(lengths, 1024)
    assert lengths.sum() / (bins * 1024) >= 0.985


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import packing

    rows = [{"id": str(i), "question": f"What is item {i}?", "answer": "fever " * (1 + i % 60)} for i in range(200)]
    (tmp_path / "clinic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["packing", "--data", str(tmp_path), "--out", str(out), "--toy"])
    threads = torch.get_num_threads()
    packing.main()
    torch.set_num_threads(threads)
    found = json.loads((out / "packing.json").read_text())["domains"]["clinic"]
    assert found["budgets"]["1024"]["packed"] > found["budgets"]["1024"]["padded"] > 0
    assert found["training"]["bottleneck"]["packed_tokens_per_s"] > 0
    assert "| clinic | 200 |" in (out / "packing.md").read_text()
