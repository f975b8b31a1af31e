import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localgpt_core.corpus.corpus import Corpus
from localgpt_core.corpus.ngrams import _distinct, floors, witten_bell


def reference(train, context, character, vocab_size, order):
    """Witten and Bell's recursion as it is written, one probability at a time."""
    if order == 0:
        return 1 / vocab_size
    lower = reference(train, context, character, vocab_size, order - 1)
    context_of_order = tuple(context[len(context) - order + 1 :])
    followers = Counter(
        train[i + order - 1]
        for i in range(len(train) - order + 1)
        if tuple(train[i : i + order - 1]) == context_of_order
    )
    total, distinct = followers.total(), len(followers)
    if total == 0:
        return lower
    return (followers[character] + distinct * lower) / (total + distinct)


# train "abaab", then "a": N(a) = 3, N(b) = 2, T = 2; after b: one a; after ab: one a; after aab: nothing.
def test_a_text_worked_out_by_hand():
    ids = np.array([0, 1, 0, 0, 1, 0])
    uniform, unigram, bigram, trigram, fourgram = witten_bell(ids, 5, vocab_size=3, max_order=4)[:, 0]
    assert uniform == pytest.approx(1 / 3)
    assert unigram == pytest.approx((3 + 2 / 3) / 7)
    assert bigram == pytest.approx((1 + 11 / 21) / 2)
    assert trigram == pytest.approx((1 + 16 / 21) / 2)
    assert fourgram == trigram


def test_a_character_never_seen_in_training_is_possible():
    ids = np.array([0, 1, 0, 0, 1, 2])
    assert witten_bell(ids, 5, vocab_size=3, max_order=2)[:, 0] == pytest.approx(
        [1 / 3, (2 / 3) / 7, (2 / 21) / 2]
    )


def test_a_deterministic_text_costs_less_with_every_order():
    corpus = Corpus("cycle", "abcb" * 500, "abc")
    nats = list(floors(corpus, 4).values())
    assert nats == sorted(nats, reverse=True)
    assert nats[-1] < 0.01 < 0.5 < nats[1]


@given(st.lists(st.integers(0, 9) | st.integers(0, 400), max_size=30))
def test_keys_are_numbered_as_by_sorting(keys):
    """With a key above eight times their number they are sorted, else marked."""
    keys = np.array(keys, dtype=np.int64)
    for found, expected in zip(_distinct(keys), np.unique(keys, return_inverse=True), strict=True):
        assert found.tolist() == expected.tolist() and found.dtype == expected.dtype


small_texts = st.integers(2, 4).flatmap(
    lambda v: st.tuples(st.just(v), st.lists(st.integers(0, v - 1), min_size=6, max_size=40))
)


@settings(deadline=None, max_examples=60)
@given(small_texts, st.integers(1, 5), st.data())
def test_the_vectorised_counts_follow_the_recursion(text, max_order, data):
    vocab_size, ids = text
    n_train = data.draw(st.integers(max_order, len(ids)))
    got = witten_bell(np.array(ids, dtype=np.uint8), n_train, vocab_size, max_order)
    assert got.shape == (max_order + 1, len(ids) - n_train)
    for order, t in itertools.product(range(max_order + 1), range(n_train, len(ids))):
        expected = reference(ids[:n_train], ids[:t], ids[t], vocab_size, order)
        assert got[order, t - n_train] == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(small_texts, st.data())
def test_probabilities_over_the_vocabulary_sum_to_one(text, data):
    vocab_size, ids = text
    context = data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=5))
    total = sum(
        witten_bell(np.array(ids + context + [character]), len(ids), vocab_size, 5)[:, -1]
        for character in range(vocab_size)
    )
    assert total == pytest.approx(np.ones(6), rel=1e-12)


def test_floors_are_the_mean_nats_on_the_validation_split():
    text = "the cat sat on the mat. that cat sat. " * 3 + "a"
    corpus = Corpus("cats", text, "".join(sorted(set(text))))
    ids, n_train, v = corpus.ids.tolist(), len(corpus.train), corpus.vocab_size
    expected = defaultdict(float)
    for order, name in enumerate(["uniform", "unigram", "bigram", "3-gram", "4-gram", "5-gram"]):
        for t in range(n_train, len(ids)):
            expected[name] -= math.log(reference(ids[:n_train], ids[:t], ids[t], v, order))
        expected[name] /= len(ids) - n_train
    got = floors(corpus)
    assert list(got) == list(expected)
    assert got == pytest.approx(dict(expected), rel=1e-12)
    assert got["uniform"] == pytest.approx(math.log(v))


@pytest.mark.parametrize(
    ("max_order", "keys"), [(1, ["uniform", "unigram"]), (2, ["uniform", "unigram", "bigram"])]
)
def test_fewer_orders(max_order, keys):
    assert list(floors(Corpus("ab", "ab" * 20, "ab"), max_order)) == keys


def test_a_large_alphabet_does_not_overflow():
    ids = np.random.default_rng(0).integers(0, 60_000, size=300)
    p = witten_bell(ids, 270, vocab_size=60_000, max_order=5)
    assert np.all((p > 0) & (p <= 1))


@pytest.mark.parametrize(
    ("n_train", "max_order", "message"),
    [
        (5, 0, "max_order=0: must be an integer of at least 1"),
        (3, 4, "n_train=3: .* at least 4"),
        (9, 2, "n_train=9: .* at most 6"),
    ],
)
def test_bad_arguments_are_named(n_train, max_order, message):
    with pytest.raises(ValueError, match=message):
        witten_bell(np.zeros(6, dtype=int), n_train, 2, max_order)
