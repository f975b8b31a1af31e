"""Characters as integers and back: a character's integer is its index in the sorted vocabulary."""

import string

import numpy as np
import torch

from localgpt_core.common.validation import Refusal

__all__ = ["SHAKESPEARE_VOCABULARY", "decode", "encode", "first_prompt"]

SHAKESPEARE_VOCABULARY = "".join(sorted("\n !$&',-.3:;?" + string.ascii_letters))
"""The 65 characters of Tiny Shakespeare; the rebuilt corpora never use ``3``, but share its model sizes."""


def first_prompt(vocabulary: str) -> str:
    """Return what a sample continues unless told: a line break, or the first letter if there is none."""
    return "\n" if "\n" in vocabulary else vocabulary[0]


def encode(text: str, vocabulary: str) -> np.ndarray:
    """Return the integers of ``text``, shape (len(text),), in the smallest unsigned type that holds them.

    Raises:
        ValueError: A character outside the vocabulary; names it and its position.
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    known = np.array([ord(character) for character in vocabulary], dtype=np.uint32)
    ids = np.minimum(np.searchsorted(known, points), len(known) - 1)
    foreign = np.flatnonzero(known[ids] != points)
    if len(foreign):
        position = int(foreign[0])
        raise Refusal(
            f"character {text[position]!r} at position {position} is not one of the {len(vocabulary)} "
            f"allowed: {vocabulary!r}"
        )
    return ids.astype(np.min_scalar_type(len(vocabulary) - 1))


def decode(ids: np.ndarray | torch.Tensor | list[int], vocabulary: str) -> str:
    """Return the text of ``ids``, any sequence of integers: the inverse of `encode`.

    Raises:
        ValueError: An integer outside [0, V).
    """
    ids = np.asarray(ids, dtype=np.int64).ravel()
    for outside in ids[(ids < 0) | (ids >= len(vocabulary))][:1].tolist():
        raise Refusal(f"id={outside}: allowed are 0 to {len(vocabulary) - 1}")
    return "".join(vocabulary[i] for i in ids.tolist())
