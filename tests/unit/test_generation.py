import json
import shutil

import numpy as np
import pytest
from runs import make_run

from lbr_dist.evaluation.generation import answers, generation_scores, text_scores
from lbr_dist.evaluation.held_out import HeldOut
from lbr_dist.inference.loading import load_run


def test_text_scores_of_known_pairs():
    same = text_scores(["the heart pumps blood through the body"], ["the heart pumps blood through the body"])
    assert same == {"bleu4": pytest.approx(100), "rouge_l": pytest.approx(100)}
    nothing = text_scores(["w x y z v"], ["the heart pumps blood now"])
    assert nothing["rouge_l"] == 0
    assert nothing["bleu4"] < 5
    # longest common subsequence "a c e": precision 3/4, recall 3/5
    half = text_scores(["a x c e"], ["a b c d e"])
    assert half["rouge_l"] == pytest.approx(100 * 2 * 0.75 * 0.6 / 1.35)
    assert text_scores(["糖尿病"], ["糖尿病です"])["rouge_l"] == pytest.approx(100 * 2 * 1 * 0.6 / 1.6)


@pytest.mark.parametrize("text", ["糖尿病是一种以高血糖为特征的代谢性疾病。", "โรคเบาหวานเป็นโรคเรื้อรัง"])
def test_scripts_without_spaces_go_by_character(text):
    assert text_scores([text], [text]) == {"bleu4": pytest.approx(100), "rouge_l": pytest.approx(100)}
    assert 30 < text_scores([text.replace(text[5], "x")], [text])["bleu4"] < 95


def test_bleu_is_the_geometric_mean_of_ngram_precisions():
    # 1- to 4-gram precisions 6/7, 5/6, 4/5, 3/4; equal lengths, no brevity penalty
    got = text_scores(["a b c d e f x"], ["a b c d e f g"])["bleu4"]
    assert got == pytest.approx(100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)


@pytest.fixture
def data():
    queries = ["what is aspirin", "what is measles", "water?"]
    return HeldOut("d", "f", queries, ["a drug", "a disease"], [[0], [1], [0]], ["a drug", "a disease", "a drug"], 2)


def test_answers_through_the_bottleneck_and_with_the_question_in_sight(tmp_path, tiny_model_dir, data):
    encoder = load_run(make_run(tmp_path / "r", tiny_model_dir("qwen3"))).encoder()
    hidden = answers(encoder, data.queries, data.references, hide_x=True)
    full = answers(encoder, data.queries, data.references, hide_x=False)
    assert hidden != full
    longest = max(len(ids) for ids in encoder.tokenization.encode(data.references)) + 1
    assert all(len(encoder.tokenization.encode([text])[0]) <= 3 * longest for text in hidden)
    scores = generation_scores(encoder, data, questions=2)
    assert set(scores) == {"bottleneck", "full"}
    assert all(np.isfinite(value) for mode in scores.values() for value in mode.values())


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings", "positions"),
    [("llama", {}, 512), ("mistral", {"sliding_window": 100}, 100), ("llama", {"rope_parameters": LONGROPE}, 128)],
)
def test_questions_leave_the_answers_positions(
    tmp_path, tiny_model_dir, data, monkeypatch, family, settings, positions
):
    """A contrastive run's longest text may take all of the model's; decoding knows no window, nor longrope's length."""
    model = shutil.copytree(tiny_model_dir(family), tmp_path / "model")
    saved = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**saved, **settings}))
    lengths = {"max_x_tokens": positions - 2, "max_y_tokens": 40}
    encoder = load_run(make_run(tmp_path / "r", model, data=lengths)).encoder()
    asked = []
    monkeypatch.setattr(
        "lbr_dist.model.decoding.generate_answers",
        lambda _, samples, **options: asked.append((samples, options["max_new_tokens"])) or [],
    )
    answers(encoder, [*data.queries, "blood " * 600], ["a drug " * 30], hide_x=True)
    ((*short, long), most) = asked[0]
    assert most == 40  # the reference has more tokens; the run has learned none as long
    assert len(long.x) + long.z + most == positions
    assert short == encoder.samples(data.queries, None)


def test_a_run_without_bottleneck_answers_with_full_attention_only(tmp_path, tiny_model_dir, data):
    settings = {"bottleneck": {"enabled": False}, "contrastive": {"pooling": "last"}}
    encoder = load_run(make_run(tmp_path / "r", tiny_model_dir("llama"), **settings)).encoder()
    assert set(generation_scores(encoder, data, questions=3)) == {"full"}
