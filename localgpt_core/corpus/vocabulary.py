"""Characters as integers and back: a character's integer is its index in the sorted vocabulary."""

import string

import numpy as np
import torch

from localgpt_core.common.validation import Refusal

__all__ = ["SHAKESPEARE_VOCABULARY", "decode", "encode", "first_prompt", "line_and_column"]

BLOCK = 1 << 16  # characters that are encoded at a time

SHAKESPEARE_VOCABULARY = "".join(sorted("\n !$&',-.3:;?" + string.ascii_letters))
"""The 65 characters of Tiny Shakespeare; the rebuilt corpora never use ``3``, but share its model sizes."""


def first_prompt(vocabulary: str) -> str:
    """Return what a sample continues unless told: a line break, or the first letter if there is none."""
    return "\n" if "\n" in vocabulary else vocabulary[0]


def encode(text: str, vocabulary: str) -> np.ndarray:
    """Return the integers of ``text``, shape (len(text),), in the smallest unsigned type that holds them.

    Beside the result it needs the memory of one block of the text.

    Raises:
        ValueError: A character outside the vocabulary; names it and its position.
    """
    known = np.array([ord(character) for character in vocabulary], dtype=np.uint32)
    out = np.empty(len(text), dtype=np.min_scalar_type(len(vocabulary) - 1))
    for start in range(0, len(text), BLOCK):
        block = text[start : start + BLOCK].encode("utf-32-le", "surrogatepass")
        points = np.frombuffer(block, dtype=np.uint32)
        ids = np.minimum(np.searchsorted(known, points), len(known) - 1)
        foreign = np.flatnonzero(known[ids] != points)
        if len(foreign):
            position = start + int(foreign[0])
            raise Refusal(
                f"character {text[position]!r} at position {position} ({line_and_column(text, position)}) is "
                f"not one of the {len(vocabulary)} allowed: {vocabulary!r}"
            )
        out[start : start + BLOCK] = ids
    return out


def line_and_column(text: str, position: int) -> str:
    """Return ``"line 3, column 5"``, both counted from 1, for a position in a text counted from 0."""
    line, start = text.count("\n", 0, position) + 1, text.rfind("\n", 0, position)
    return f"line {line}, column {position - start}"


def decode(ids: np.ndarray | torch.Tensor | list[int], vocabulary: str) -> str:
    """Return the text of ``ids``, any sequence of integers: the inverse of `encode`.

    Raises:
        ValueError: An integer outside [0, V).
    """
    ids = np.asarray(ids, dtype=np.int64).ravel()
    for outside in ids[(ids < 0) | (ids >= len(vocabulary))][:1].tolist():
        raise Refusal(f"id={outside}: allowed are 0 to {len(vocabulary) - 1}")
    return "".join(vocabulary[i] for i in ids.tolist())
