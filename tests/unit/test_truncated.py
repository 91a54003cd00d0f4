"""Embeddings cut to their first dimensions: the same in lbr, in a file of vectors, and in the exported model."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from runs import make_run

from lbr_dist.errors import UserError
from lbr_dist.evaluation.evaluate import default_out
from lbr_dist.export.export import export
from lbr_dist.inference.encode import encode_file
from lbr_dist.inference.loading import load_encoder, model_fingerprint, split_dim

TEXTS = ["aspirin is a drug", "fever of unknown origin, rash, cough", "def add(a, b): return a + b"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir):
    """Of a recipe with nested dimensions and a learned temperature, which must not stand in the way of anything."""
    settings = {"contrastive": {"matryoshka": {"dims": [32, 8]}, "learn_temperature": {}}}
    return str(make_run(tmp_path_factory.mktemp("nested"), tiny_model_dir("llama"), **settings))


def cut(vectors_ND, dim):
    rows = vectors_ND[:, :dim]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_encoder_file_and_export_cut_alike(tmp_path, run):
    from sentence_transformers import SentenceTransformer

    wanted = cut(load_encoder(run, "cpu").encode(TEXTS), 8)
    encoder = load_encoder(f"{run}?dim=8", "cpu")
    np.testing.assert_allclose(encoder.encode(TEXTS), wanted, atol=1e-6)
    assert encoder.name.endswith("[8]")
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    assert encode_file(f"{run}?dim=8", source, out, device="cpu").width == 8
    column = pq.read_table(out)["embedding"].combine_chunks()
    np.testing.assert_allclose(column.flatten().to_numpy().reshape(-1, 8), wanted, atol=1e-6)
    folder = export(run, tmp_path / "exported")
    model = SentenceTransformer(str(folder), device="cpu", truncate_dim=8)
    vectors = model.encode_document(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(vectors, wanted, atol=1e-5)
    again = load_encoder(f"{folder}?dim=8", "cpu").encode(TEXTS)
    np.testing.assert_allclose(again, wanted, atol=1e-5)


def test_specifications(run):
    assert split_dim("hf:base?pooling=mean&dim=64") == ("hf:base?pooling=mean", 64)
    assert split_dim("runs/a") == ("runs/a", None)
    assert model_fingerprint(run) != model_fingerprint(f"{run}?dim=8") != model_fingerprint(f"{run}?dim=16")
    assert default_out([f"{run}?dim=8"]) == default_out([run])
    with pytest.raises(UserError, match="dim=0"):
        load_encoder(f"{run}?dim=0")
    with pytest.raises(UserError, match="32 dimensions, fewer than 33"):
        load_encoder(f"{run}?dim=33", "cpu").encode(TEXTS)
