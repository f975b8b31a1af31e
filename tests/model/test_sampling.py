"""Texts that a model writes: each prompt has draws of its own, whatever stands beside it."""

import pytest
import torch
from cases import SIZES, make_model

from localgpt_core.common.seeds import generator
from localgpt_core.model.sampling import sample_text, sample_texts

VOCABULARY = "\nabcdef"
BLOCK = SIZES["block_size"]
PROMPTS = ["abc", "f", "bad", "abcdefabc", "abc", "feedabedc", "\n"]


@pytest.mark.parametrize("window", ["exact", "halves"])
def test_a_text_depends_on_its_prompt_and_its_place_and_on_no_other_prompt(window):
    model, options = make_model(), {"seed": 3, "temperature": 1.5, "top_k": 5, "window": window}
    texts = sample_texts(model, VOCABULARY, PROMPTS, 4 * BLOCK, **options)
    assert [text[: len(prompt)] for text, prompt in zip(texts, PROMPTS, strict=True)] == PROMPTS
    assert {len(text) - len(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)} == {4 * BLOCK}
    assert texts[0] == sample_text(model, VOCABULARY, PROMPTS[0], 4 * BLOCK, **options)
    for place, prompt in enumerate(PROMPTS):
        others = ["feed" if place % 2 else "a"] * len(PROMPTS)  # of its length or of another
        others[place] = prompt
        assert sample_texts(model, VOCABULARY, others, 4 * BLOCK, **options)[place] == texts[place]


def test_the_same_prompt_again_has_another_text():
    texts = sample_texts(make_model(), VOCABULARY, ["abc"] * 4, 30, seed=5)
    assert len({*texts}) == 4
    other_seed = sample_texts(make_model(), VOCABULARY, ["abc"] * 4, 30, seed=6)
    assert not {*texts} & {*other_seed}


def test_a_text_is_what_generate_writes_with_the_generator_of_its_seed_and_place():
    model = make_model()
    idx = torch.tensor([[1, 2, 3]])
    texts = sample_texts(model, VOCABULARY, ["abc", "f", "abc"], 30, seed=5)
    for place, key in ((0, (5, "sample")), (2, (5, "sample", 2))):
        out = model.generate(idx, 30, 0.8, generator=generator(*key))
        assert texts[place] == "".join(VOCABULARY[i] for i in out[0])
    assert sample_text(model, VOCABULARY, "abc", 30, seed=5) == texts[0]


def test_prompts_of_one_length_are_one_batch(monkeypatch):
    model, shapes = make_model(), []
    inner = model.logits
    monkeypatch.setattr(
        model, "logits", lambda idx, caches: shapes.append((*idx.shape,)) or inner(idx, caches)
    )
    sample_texts(model, VOCABULARY, PROMPTS, 1)
    assert sorted(shapes) == [(2, 1), (2, BLOCK), (3, 3)]
    assert sample_texts(model, VOCABULARY, [], 1) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", ""], {}, "prompt='': must have at least one character"),
        (["a", "ax"], {}, "character 'x' at position 1"),
        (["a"], {"window": "whole"}, "window='whole': allowed are 'exact', 'halves'"),
        (["a"], {"temperature": 0.0}, "temperature=0.0: must be positive"),
    ],
)
def test_what_cannot_be_continued_is_refused_before_anything_is_computed(
    prompts, options, message, monkeypatch
):
    model = make_model()
    monkeypatch.setattr(model, "logits", lambda *args: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        sample_texts(model, VOCABULARY, prompts, 1, **options)
