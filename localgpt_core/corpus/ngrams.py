"""Floors behind a loss curve: what counting characters achieves on the same split.

Interpolated n-grams with Witten and Bell's weights. With N(h) the number of times the context h is followed
by a character in the training split, T(h) the number of distinct characters that follow it, and h' the
context h without its oldest character,

    p(c | h) = (N(h c) + T(h) p(c | h')) / (N(h) + T(h)),

down to the uniform distribution 1 / V below the unigram. A context that was never seen hands over to h'.
Every character of the vocabulary keeps a positive probability, whether or not it occurs in training.

Source: Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37 (1991),
method C; interpolated as in Chen and Goodman, "An empirical study of smoothing techniques for language
modeling" (1998).

Rejected: Kneser-Ney. It is better for words, but has discounts to estimate, and its lower orders are no
longer the n-gram models that a reader expects under these names.
"""

import numpy as np

from localgpt_core.common.validation import require_integer
from localgpt_core.corpus.corpus import Corpus

__all__ = ["FLOORS", "floors", "witten_bell"]

FLOORS = ("uniform", "unigram", "bigram", "3-gram", "4-gram", "5-gram")  # by order, from 0 on

SPARSE = 8  # times as many numbers as keys: to sort the keys then takes less room than to mark them


def witten_bell(ids: np.ndarray, n_train: int, vocab_size: int, max_order: int) -> np.ndarray:
    """Return the probability that each order gives to each integer after the first ``n_train``.

    Counts come from ``ids[:n_train]`` alone; a context may reach back into them.

    Args:
        ids: integers in [0, V), shape (n,).
        n_train: how many of them are training data.
        vocab_size: V.
        max_order: K, the longest n-gram.

    Returns:
        float64, shape (K + 1, n - n_train). Row k is p(ids[t] | the k - 1 integers before t), row 0 is 1 / V.

    Raises:
        ValueError: max_order < 1, or n_train outside [max_order, n].

    """
    require_integer("max_order", max_order, 1)
    require_integer("n_train", n_train, max_order, len(ids))
    ids = np.asarray(ids, dtype=np.int64)
    rows = [np.full(len(ids) - n_train, 1 / vocab_size)]
    # gram[i] numbers the k-gram that starts at i, densely, so that the key below stays small for every order.
    gram = np.zeros(len(ids) + 1, dtype=np.int64)
    for order in range(1, max_order + 1):
        context = gram[:-1]
        keys, gram = _distinct(context * vocab_size + ids[order - 1 :])
        first_test = n_train - order + 1  # the first k-gram that ends after the training data
        count = np.bincount(gram[:first_test], minlength=len(keys))  # N(h c), per k-gram
        contexts = keys // vocab_size  # h, per k-gram
        total = np.bincount(contexts, weights=count)  # N(h), per context
        distinct = np.bincount(contexts, weights=count > 0)  # T(h), per context

        h = context[first_test:]
        weight = total[h] + distinct[h]
        mixed = (count[gram[first_test:]] + distinct[h] * rows[-1]) / np.maximum(weight, 1)
        rows.append(np.where(weight > 0, mixed, rows[-1]))
    return np.stack(rows)


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different ones of ``keys``, sorted, and for each key its number among them."""
    bound = int(keys.max(initial=0)) + 1
    if bound > SPARSE * len(keys):
        return np.unique(keys, return_inverse=True)
    present = np.zeros(bound, dtype=bool)
    present[keys] = True
    return np.flatnonzero(present), (np.cumsum(present) - 1)[keys]


def floors(corpus: Corpus, max_order: int = len(FLOORS) - 1) -> dict[str, float]:
    """Return the mean of -ln p over the validation split, in nats per character, for each order.

    Of a corpus with answers, whose loss counts these alone, n-grams say nothing: its only floor is "guess",
    in nats per answer, see `localgpt_core.corpus.sequences`.

    The keys are "uniform" (ln V), "unigram", "bigram", "3-gram", "4-gram", ...; contexts of the first
    validation characters reach back into the training split, which precedes them in the text.

    Raises:
        ValueError: max_order < 1, or above the number of training characters.

    """
    if corpus.sequences:
        return {"guess": corpus.sequences.guess}
    probabilities = witten_bell(corpus.ids, len(corpus.train), corpus.vocab_size, max_order)
    names = [*FLOORS, *(f"{order}-gram" for order in range(len(FLOORS), max_order + 1))]
    return {name: float(nats) for name, nats in zip(names, -np.log(probabilities).mean(axis=1), strict=False)}
