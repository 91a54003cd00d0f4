import pytest
import torch
from transformers import AutoModelForCausalLM

from lbr_dist.model.decoding import generate_answers
from lbr_dist.model.layout import Sample, pack

PROMPTS = [Sample([5, 6, 7], 2), Sample([], 1), Sample([9] * 30, 2), Sample([44], 1), Sample([8, 9], 2)]


def teacher_forced(model, prompt, answer, *, hide_x):
    """Most likely next token at every target position, from one packed forward pass."""
    batch = pack([Sample(prompt.x, prompt.z, answer)], bottleneck_vectors=2, hide_x=hide_x)
    with torch.no_grad():
        hidden = model(batch, "hidden")[batch.loss_positions_L]
        return model.causal_lm.lm_head(hidden).argmax(-1).tolist()


@pytest.mark.parametrize("hide_x", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_answers_are_the_argmax_of_the_training_forward(tiny_lbr, family, hide_x, monkeypatch):
    monkeypatch.setattr("lbr_dist.model.decoding.TOGETHER", 3)
    model = tiny_lbr(family, tokens=2)
    answers = generate_answers(model, PROMPTS, eos_id=None, max_new_tokens=8, hide_x=hide_x)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == 8
        assert answer == teacher_forced(model, prompt, answer, hide_x=hide_x)


def test_the_bottleneck_changes_the_answers(tiny_lbr):
    model = tiny_lbr("llama", tokens=2)
    through = generate_answers(model, PROMPTS, eos_id=None, max_new_tokens=8)
    seeing = generate_answers(model, PROMPTS, eos_id=None, max_new_tokens=8, hide_x=False)
    assert through != seeing
    assert through[1] == seeing[1]  # it has no X to hide


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_without_z_it_is_transformers_own_generate(tiny_lbr, tiny_model_dir, family):
    model = tiny_lbr(family, tokens=0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family))
    prompts = [Sample([5, 6, 7], 0), Sample([9] * 20, 0)]
    answers = generate_answers(model, prompts, eos_id=None, max_new_tokens=6, hide_x=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([list(prompt.x)])
        expected = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
        )
        assert answer == expected[0, len(prompt.x) :].tolist()


def test_an_answer_ends_before_end_of_sequence(tiny_lbr):
    model = tiny_lbr("qwen2", tokens=2)
    free = generate_answers(model, PROMPTS, eos_id=None, max_new_tokens=8)
    stop = free[2][3]
    for answer, long in zip(generate_answers(model, PROMPTS, eos_id=stop, max_new_tokens=8), free, strict=True):
        assert answer == (long[: long.index(stop)] if stop in long else long)


def test_hide_x_needs_z(tiny_lbr):
    with pytest.raises(ValueError, match="bottleneck tokens"):
        generate_answers(tiny_lbr("llama"), [Sample([5], 0)], eos_id=0, max_new_tokens=1)
