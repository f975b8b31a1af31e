"""Texts that a model writes: prompts of characters, continued."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from localgpt_core.common.seeds import generator
from localgpt_core.common.validation import require
from localgpt_core.corpus.vocabulary import decode, encode, first_prompt
from localgpt_core.model.gpt import LocalGPT

__all__ = ["sample_text", "sample_texts"]

SAMPLE_CHARACTERS = 300


def sample_text(
    model: LocalGPT,
    vocabulary: str,
    prompt: str | None = None,
    characters: int = SAMPLE_CHARACTERS,
    **options: Any,
) -> str:
    """Return ``prompt`` (`first_prompt` of the vocabulary if None) continued by the model.

    ``options`` are those of `sample_texts`.

    Raises:
        ValueError: As `sample_texts`.
    """
    prompt = first_prompt(vocabulary) if prompt is None else prompt
    return sample_texts(model, vocabulary, [prompt], characters, **options)[0]


def sample_texts(
    model: LocalGPT,
    vocabulary: str,
    prompts: Sequence[str],
    characters: int = SAMPLE_CHARACTERS,
    *,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int | None = None,
    window: str = "exact",
) -> list[str]:
    """Return every prompt continued by the model, each by draws of its own.

    Prompt i draws from a generator of the key ``(seed, "sample", i)``, the first from that of ``(seed,
    "sample")``, which a single prompt has: the first text is the one that its prompt gets alone, and the
    same prompt again gets another. No text depends on what the other prompts are.

    Prompts of one length are one batch. What the batch rounds in another way than a single text is in float32
    the seventh digit of a probability: a draw that was that close may become another.

    Args:
        model: The model.
        vocabulary: The characters that it was trained on, sorted.
        prompts: Texts of at least one character.
        characters: How many to write after each.
        seed: Of the draws of all prompts.
        temperature: As in `LocalGPT.generate`, like the two that follow.
        top_k: How many of the likeliest characters to draw among; None for all.
        window: What is seen of a text that is longer than the context, ``"exact"`` or ``"halves"``.

    Raises:
        ValueError: For an empty prompt or a character outside the vocabulary, and for what
            `LocalGPT.generate` refuses.
    """
    device = next(model.parameters()).device
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        require(len(prompt) > 0, "prompt", prompt, "must have at least one character")
        by_length.setdefault(len(prompt), []).append(place)
    ids = [torch.from_numpy(encode(prompt, vocabulary).astype(np.int64)) for prompt in prompts]
    texts = [""] * len(ids)
    for places in by_length.values():
        idx = torch.stack([ids[place] for place in places]).to(device)
        # Of one seed, prompts that are nearly the same would get texts that are.
        sources = [generator(seed, "sample", *([place] if place else []), device=device) for place in places]
        out = model.generate(idx, characters, temperature, top_k, sources, window).cpu()
        for place, row in zip(places, out, strict=True):
            texts[place] = decode(row, vocabulary)
    return texts
