"""|Z| by information: bits are those of plain transformers, the table is whole, and plan, loader and encoder agree."""

import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_model, make_tokenizer
from runs import make_run
from transformers import AutoModelForCausalLM

from lbr_dist.config import Bottleneck, Recipe
from lbr_dist.data.information import (
    SCHEMA,
    known_bits,
    model_fingerprint,
    part_path,
    read_information,
    read_part,
    write_part,
)
from lbr_dist.data.loader import Loader
from lbr_dist.data.plan import open_data
from lbr_dist.data.record import Record
from lbr_dist.data.shard_writer import write_set
from lbr_dist.data.shards import open_set
from lbr_dist.errors import UserError
from lbr_dist.export.export import export
from lbr_dist.export.tokens import fixed_tokens
from lbr_dist.inference.loading import load_run
from lbr_dist.inference.surprisal import measure
from lbr_dist.model import surprisal as module
from lbr_dist.model.surprisal import Scorer
from lbr_dist.model.tokenizer import Tokenization

ROWS = 40
BITS = 60.0


def record(i):
    negatives = tuple(f"wrong {j} of {i}" * (1 + j) for j in range(i % 3))
    positives = tuple(f"also right {j} for {i}" for j in range(i % 2))
    return Record(
        f"q{i}", question=f"What is item {i}" + "?" * (i % 7), answer="fever of unknown origin " * (1 + i % 4) + str(i),
        negatives=negatives, positives=positives,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model_dir):
    """A folder with a measured question set and a measured text set, and the model that measured."""
    root, model = tmp_path_factory.mktemp("data"), tiny_model_dir("llama")
    tokens = Tokenization.load(str(model))
    records = [record(i) for i in range(ROWS)]
    write_set(root / "qa", {"gl": records, "cl": records}, tokens, name="qa", shard_records=13)
    texts = [Record(f"t{i}", text=record(i).answer) for i in range(ROWS)]
    write_set(root / "text", {"gl": texts}, tokens, name="text", shard_records=13)
    for name in ("qa", "text"):
        measure(str(root / name), str(model))
    return root, model, tokens


def recipe_of(made, stage, name="qa", max_x_tokens=50, **other):
    root, model, _ = made
    raw = {
        "stage": stage,
        "output": "out",
        "model": {"path": str(model)},
        "bottleneck": {"surprisal": {"model": str(model), "bits": BITS}, "max_tokens": 6},
        "data": {
            "sets": [{"path": str(root / name)}], "bin_tokens": 150, "max_x_tokens": max_x_tokens, "max_y_tokens": 70,
            "workers": 0,
        },
        "batch": {"global_batch": 4},
        "duration": {"epochs": 1},
    }  # fmt: skip
    return Recipe.model_validate(raw | other)


def bits_by_hand(model, text, tokens, start):
    """Surprisal of one text, by itself and unpadded, in float64."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    ids = tokens.encode([text])[0]
    with torch.no_grad():
        logits = plain(torch.tensor([start + ids])).logits[0].log_softmax(-1)
    places = range(len(start) - 1, len(start) + len(ids) - 1) if start else range(len(ids) - 1)
    nats = -sum(float(logits[place, token]) for place, token in zip(places, ids if start else ids[1:], strict=True))
    return nats / math.log(2) + (0 if start else math.log2(plain.config.vocab_size))


@pytest.mark.parametrize("start", ["bos", "eos", "nothing"])
def test_bits_are_those_of_plain_transformers(tmp_path, start):
    folder = make_model(tmp_path / "m", "llama")
    make_tokenizer(folder, bos=start == "bos")
    tokens = Tokenization.load(str(folder))
    if start == "nothing":
        tokens = Tokenization(tokens.path, tokens.fingerprint, [], None, tokens._text)
    texts = ["", "aspirin", "fever of unknown origin", "the heart pumps blood " * 9, "x"]
    found = Scorer(str(folder), tokens, "cpu").bits(tokens.encode(texts))
    assert found.dtype == np.float32
    assert found[0] == 0
    first = {"bos": [2], "eos": [0], "nothing": []}[start]
    for text, bits in zip(texts[1:], found[1:], strict=True):
        assert bits == pytest.approx(bits_by_hand(folder, text, tokens, first), rel=1e-4)


@pytest.mark.parametrize("limit", [{}, {"max_position_embeddings": -1}])
def test_a_model_without_a_limit_of_positions_measures_too(tmp_path, limit):
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 416, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    settings = BloomConfig(**sizes, eos_token_id=0, initializer_range=0.2, **limit)
    BloomForCausalLM(settings).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    tokens = Tokenization.load(str(tmp_path))
    found = Scorer(str(tmp_path), tokens, "cpu").bits(tokens.encode(["aspirin"]))
    assert found[0] == pytest.approx(bits_by_hand(tmp_path, "aspirin", tokens, [0]), rel=1e-4)


def test_a_model_that_sees_what_it_is_to_predict_is_refused(made, tmp_path, tiny_model_dir):
    run = make_run(tmp_path / "run", tiny_model_dir("llama"), contrastive={"attention": "bidirectional"})
    out = export(run, tmp_path / "out")
    with pytest.raises(UserError, match=r"out: its attention is bidirectional .* name the model that it was"):
        measure(str(made[0] / "qa"), str(out))


@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLNet"])
def test_a_bidirectional_family_is_refused(made, tmp_path, family):
    """Their configurations say nothing of it, and transformers loads them as language models all the same."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if family == "XLNet":
        sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}
    head = "LMHeadModel" if family == "XLNet" else "ForMaskedLM"
    settings = getattr(transformers, f"{family}Config")(vocab_size=416, pad_token_id=1, **sizes)
    getattr(transformers, f"{family}{head}")(settings).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    with pytest.raises(UserError, match=rf"its attention is bidirectional \(family {family.lower()}\).*name a causal"):
        measure(str(made[0] / "qa"), str(tmp_path))


def test_bits_do_not_depend_on_company_and_a_long_text_goes_on_as_it_began(made, monkeypatch):
    _, model, tokens = made
    texts = tokens.encode([record(i).answer for i in range(20)])
    scorer = Scorer(str(model), tokens, "cpu")
    together = scorer.bits(texts)
    assert np.concatenate([scorer.bits([ids]) for ids in texts]) == pytest.approx(together, rel=1e-4)
    monkeypatch.setattr(module, "WINDOW", 8)
    short = Scorer(str(model), tokens, "cpu").bits(texts)
    eight = scorer.bits([ids[:8] for ids in texts])
    assert short == pytest.approx([b * max(1, len(i) / 8) for b, i in zip(eight, texts, strict=True)], rel=1e-4)


def test_a_model_with_another_tokenizer_is_refused(made, tmp_path):
    root, _, _ = made
    other = make_model(tmp_path / "m", "llama")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    with pytest.raises(UserError, match="prepare the set again with the model's tokenizer"):
        measure(str(root / "qa"), str(other))
    with pytest.raises(UserError, match="name a model with the same tokenizer"):
        Scorer(str(other), made[2], "cpu")
    with pytest.raises(UserError, match=r"nothing: there is no model folder"):
        measure(str(root / "qa"), str(tmp_path / "nothing"))


def test_only_what_is_missing_or_damaged_is_measured_again(made, tmp_path, monkeypatch):
    root, model, _ = made
    shutil.copytree(root / "qa", tmp_path / "qa")
    opened = open_set(tmp_path / "qa")
    before = read_information(opened, "gl", str(model))
    paths = [part_path(opened, "gl", shard, model_fingerprint(str(model))) for shard in opened.splits["gl"].shards]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    shutil.copy(paths[3], paths[2])
    kept = paths[3].stat().st_mtime_ns
    with pytest.raises(UserError, match=r"3 of the gl split's 4 shards .* run lbr surprisal .*qa --model"):
        read_information(opened, "gl", str(model))
    calls = []
    original = Scorer.bits
    monkeypatch.setattr(Scorer, "bits", lambda self, texts: calls.append(len(texts)) or original(self, texts))
    found = measure(str(tmp_path / "qa"), str(model))
    assert len(calls) == 3
    assert paths[3].stat().st_mtime_ns == kept
    after = read_information(opened, "gl", str(model))
    for name in ("question", "answer"):
        assert np.array_equal(getattr(before, name), getattr(after, name))
    assert np.array_equal(before.negatives.values, after.negatives.values)
    assert [(part.split, part.kind, part.texts) for part in found] == [
        (split, kind, ROWS) for split in ("gl", "cl") for kind in ("question", "answer")
    ]
    assert found[0].bits == pytest.approx(before.question.sum(), rel=1e-6)
    assert not list(Path(tmp_path / "qa").rglob(".tmp-*"))


def test_a_set_that_cannot_be_written_is_found_before_anything_is_measured(made, tmp_path, monkeypatch):
    root, model, _ = made
    shutil.copytree(root / "qa", tmp_path / "qa")
    shutil.rmtree(tmp_path / "qa/surprisal")
    (tmp_path / "qa/surprisal").touch()
    monkeypatch.setattr(Scorer, "__init__", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"qa/surprisal/.*/(gl|cl): cannot be written .* has to be writable"):
        measure(str(tmp_path / "qa"), str(model))


def test_what_a_killed_measurement_left_is_removed_by_the_next(made, tmp_path):
    root, model, _ = made
    shutil.copytree(root / "qa", tmp_path / "qa")
    opened = open_set(tmp_path / "qa")
    path = part_path(opened, "gl", opened.splits["gl"].shards[1], model_fingerprint(str(model)))
    path.unlink()
    left, others = (path.with_name(f".tmp-{number}-{path.name}") for number in (7223, 7224))
    left.write_bytes(b"half")
    others.write_bytes(b"being written")
    os.utime(others, (time.time() + 60, time.time() + 60))
    measure(str(tmp_path / "qa"), str(model))
    assert path.exists()
    assert others.exists()
    assert not left.exists()


def test_the_table_has_every_text_in_its_place(made):
    root, model, tokens = made
    known = read_information(open_set(root / "qa"), "cl", str(model))
    scorer = Scorer(str(model), tokens, "cpu")
    for i in range(ROWS):
        r = record(i)
        bits = scorer.bits(tokens.encode([r.question, r.answer, *r.negatives, *r.positives])).tolist()
        found = [known.question[i], known.answer[i], *known.negatives[i], *known.positives[i]]
        assert found == pytest.approx(bits, rel=1e-4)
    assert not known.text.any()


@pytest.mark.parametrize("target", ["sft", "reconstruct", "prefix"])
def test_stage_1_plans_and_loads_by_information(made, target):
    root, model, tokens = made
    name = "qa" if target == "sft" else "text"
    recipe = recipe_of(made, "generative", name, generative={"target": target})
    plan, readers = open_data(recipe, tokens)
    known = read_information(open_set(root / name), "gl", str(model))
    whole_N = known.question if target == "sft" else known.text
    index = readers[0].index
    tokens_N = index.question_tokens if target == "sft" else index.text_tokens
    loader = Loader(plan, readers, tokens, recipe, 0, 1, 0)
    counts = set()
    for step, batches in loader:
        planned = [s for micro in plan.step(step.step).micro_batches(0, 1) for s in micro.samples]
        loaded = [z for batch in batches for z in batch.packed.z_len_S.tolist()]
        assert [s.z_len for s in planned] == loaded
        for sample in planned:
            row = sample.ref.row
            bits = whole_N[row] * min(1, sample.x_len / tokens_N[row])
            assert sample.z_len == max(1, min(6, math.ceil(bits / BITS)))
            counts.add(sample.z_len)
    assert len(counts) > 1


def test_stage_2_plans_as_the_encoder_encodes(made, tmp_path):
    """Instructions, cut passages, drawn positives and hard negatives: as many Z as when the same text is embedded."""
    _, model, tokens = made
    contrastive = {"query_instruction": "Find:\n", "positives": "draw", "hard_negatives": 2}
    recipe = recipe_of(made, "contrastive", max_x_tokens=12, contrastive=contrastive)
    plan, _ = open_data(recipe, tokens)
    run = make_run(
        tmp_path / "run", model, data={"max_x_tokens": 12}, contrastive={"query_instruction": "Find:\n"},
        bottleneck={"surprisal": {"model": str(model), "bits": BITS}, "max_tokens": 6},
    )  # fmt: skip
    encoder = load_run(run).encoder()
    sides = set()
    for step in range(plan.steps_per_epoch(0)):
        for micro in plan.step(step).micro_batches(0, 1):
            for sample in micro.samples:
                r = record(sample.ref.row)
                texts = {"query": [r.question], "negative": r.negatives, "passage": [*r.positives, r.answer]}
                text = texts[sample.side][sample.choice if sample.side != "query" else 0]
                same = encoder.samples([text], "query" if sample.side == "query" else "passage")[0]
                assert (sample.x_len, sample.z_len) == (len(same.x), same.z)
                sides.add((sample.side, sample.choice >= 0))
    assert sides == {("query", False), ("passage", False), ("passage", True), ("negative", True)}
    assert plan.identity["bottleneck.surprisal"][:2] == (BITS, model_fingerprint(str(model)))
    assert encoder.cut > 0


def test_vectors_use_the_number_of_z_by_information(made, tmp_path):
    _, model, _ = made
    run = make_run(
        tmp_path / "run", model, bottleneck={"surprisal": {"model": str(model), "bits": BITS}, "max_tokens": 6}
    )
    encoder = load_run(run).encoder()
    texts = ["aspirin", "fever of unknown origin, " * 3]
    counts = [sample.z for sample in encoder.samples(texts, "passage")]
    assert counts[0] < counts[1]
    free = encoder.encode(texts)
    for row, count in enumerate(counts):
        encoder.fixed_z = count
        assert encoder.encode(texts)[row] == pytest.approx(free[row], abs=1e-5)
        encoder.fixed_z = count + 1
        assert np.abs(encoder.encode(texts)[row] - free[row]).max() > 1e-3
    with pytest.raises(UserError, match=r"bottleneck.surprisal texts get 1 to 6 bottleneck tokens"):
        fixed_tokens(load_run(run).recipe)
    assert fixed_tokens(load_run(run).recipe, 4) == 4


def test_settings_exclude_each_other():
    both = {"surprisal": {"model": "m", "bits": 5}, "ratio": 3}
    with pytest.raises(ValueError, match=r"bottleneck.ratio and bottleneck.surprisal exclude each other"):
        Bottleneck.model_validate(both)
    bottleneck = Bottleneck.model_validate({"surprisal": {"model": "m", "bits": 5}, "max_tokens": 4})
    assert [bottleneck.length(99, bits) for bits in (0, 0.1, 5, 5.1, 14.9, 1e9)] == [1, 1, 1, 2, 3, 4]
    assert bottleneck.count == 4
    assert bottleneck.effective_ratio is None


def test_known_bits_are_shared_evenly():
    found = known_bits(np.array([10.0, 10.0, 0.0]), np.array([5, 5, 0]), np.array([5, 2, -1]))
    assert found.tolist() == [10.0, 4.0, 0.0]


def test_a_damaged_model_is_named(made):
    _, model, tokens = made
    scorer = Scorer(str(model), tokens, "cpu")
    with torch.no_grad():
        scorer._model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=f"{model}: gives probabilities that are not finite"):
        scorer.bits(tokens.encode(["aspirin"]))


def test_a_remote_set_is_refused(made):
    root, model, _ = made
    opened = open_set(f"pipe:cat {root}/qa/{{}}")
    with pytest.raises(UserError, match="copy the set to one"):
        read_information(opened, "gl", str(model))


def test_other_bits_in_a_table_are_told_or_another_plan(made, tmp_path):
    """A part says what its bits are; a whole one that was measured otherwise is another order of the data."""
    root, model, tokens = made
    recipe, other = (recipe_of((place, model, tokens), "generative") for place in (root, tmp_path))
    shutil.copytree(root / "qa", tmp_path / "qa")
    plan, same = (open_data(each, tokens)[0] for each in (recipe, other))
    assert plan.fingerprint == same.fingerprint
    opened = open_set(tmp_path / "qa")
    shard = opened.splits["gl"].shards[1]
    path = part_path(opened, "gl", shard, model_fingerprint(str(model)))
    table = read_part(path, shard)
    rows = table.to_pydict()
    rows["question"][3] *= 1.0001
    for metadata in (table.schema.metadata, {b"tar_xxh128": shard.xxh128.encode()}):
        pq.write_table(pa.table(rows, schema=SCHEMA).replace_schema_metadata(metadata), path)
        assert read_part(path, shard) is None
    write_part(path, shard, rows)
    changed, _ = open_data(other, tokens)
    differing = [key for key, value in changed.identity.items() if value != plan.identity[key]]
    assert differing == ["bottleneck.surprisal"]
