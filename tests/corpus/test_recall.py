"""The task of several hops: what its sequences are, what may be known without look-ups, and what counts."""

import hashlib
import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch

from localgpt_core.corpus.batches import AHEAD, Batches, batch, resident, windows
from localgpt_core.corpus.corpus import SHA256, Corpus, load_corpus
from localgpt_core.corpus.ngrams import floors
from localgpt_core.corpus.recall import HOPS, KEYS, QUERIES, RECALL, RECALL_VOCABULARY, recall_text
from localgpt_core.corpus.sequences import IGNORED, Sequences

# Sequences of 4 characters with answers at 2 and 3.
FOURS = Sequences(period=4, answers=(2, 3), chance=0.5, guess=0.7)


@pytest.fixture(scope="module", params=HOPS)
def corpus(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_corpus(request.param)


# The text


def test_every_answer_follows_from_the_table_in_as_many_look_ups_as_the_name_says(corpus):
    lines = corpus.text.split("\n")[1:]
    assert lines[-1] and len(lines) == 80_000
    for line in lines[:500] + lines[-500:]:
        table = dict(zip("abcdefg", line[:7], strict=True))
        for question, answer in zip(line[7::2], line[8::2], strict=True):
            for _ in range(int(corpus.name[-1])):
                question = table[question]
            assert question == answer


def test_a_table_is_one_cycle_and_the_queries_are_different(corpus):
    ids = corpus.ids.reshape(-1, 14)
    assert (ids[:, 0] == 0).all() and (ids[:, 1:] > 0).all()
    table, queries = ids[:, 1:8].astype(int) - 1, np.sort(ids[:, 8::2], axis=1)
    place = np.zeros(len(ids), dtype=int)
    for step in range(1, 8):
        place = table[np.arange(len(ids)), place]
        assert (place == 0).all() == (step == 7) and (step == 7 or (place != 0).all())
    assert (np.diff(queries, axis=1) > 0).all()


def test_all_tables_occur_about_equally_often(corpus):
    counts = np.unique(corpus.ids.reshape(-1, 14)[:, 1:8], axis=0, return_counts=True)[1]
    assert len(counts) == math.factorial(6)
    # Chi-square with 719 degrees of freedom: mean 719, standard deviation 38.
    assert abs(((counts - 80_000 / 720) ** 2 / (80_000 / 720)).sum() - 719) < 5 * 38


@pytest.mark.parametrize("hops", HOPS.values())
def test_chance_is_what_the_best_guess_without_the_table_gets(hops):
    """Counts all tables by the answers so far; that the queries are 0, 1, 2 changes nothing, by symmetry."""
    cycles = [dict(zip((0, *rest), (*rest, 0), strict=True)) for rest in permutations(range(1, KEYS))]

    def answer(table, key):
        for _ in range(hops):
            key = table[key]
        return key

    answers = [[answer(table, key) for key in range(QUERIES)] for table in cycles]
    right, nats = Fraction(), 0.0
    for j in range(QUERIES):
        seen = {}
        for own in answers:
            of = seen.setdefault(tuple(own[:j]), {})
            of[own[j]] = of.get(own[j], 0) + 1
        right += Fraction(sum(max(of.values()) for of in seen.values()), len(cycles)) / QUERIES
        for of in seen.values():
            nats -= sum(n * math.log(n / sum(of.values())) for n in of.values()) / len(cycles) / QUERIES
    assert RECALL.chance == pytest.approx(float(right), rel=1e-12)
    assert RECALL.guess == pytest.approx(nats, rel=1e-12)
    assert right == Fraction(37, 180)


def test_a_guess_from_what_stands_in_the_sequence_is_right_at_chance(corpus):
    """The likeliest value by the query, its place and the answer before it is counted, and is no shortcut."""
    ids = corpus.ids.reshape(-1, 14)
    half = len(ids) // 2
    for place in RECALL.answers:
        for features in ([place - 1], [place - 1, place - 2], [place - 1, 1], [place - 1, 7]):
            keys = (ids[:, features].astype(int) * 8 ** np.arange(len(features))).sum(axis=1)
            counts = np.zeros((64, 8), dtype=int)
            np.add.at(counts, (keys[:half], ids[:half, place]), 1)
            right = (counts.argmax(axis=1)[keys[half:]] == ids[half:, place]).mean()
            # One entry of the table may be the one that is asked for: then a look-up was made.
            assert right < 0.3 + (0.2 if features[-1] in (1, 7) else 0)


def test_the_texts_are_pinned_and_their_parts_are_whole_sequences(corpus):
    assert corpus.sha256 == SHA256[corpus.name]
    assert hashlib.sha256(recall_text(HOPS[corpus.name]).encode()).hexdigest() == corpus.sha256
    assert (len(corpus.train), len(corpus.val)) == (72_000 * 14, 8_000 * 14)
    assert corpus.vocabulary == RECALL_VOCABULARY == "\nabcdefg"
    assert corpus.sequences is RECALL and RECALL.answers == (9, 11, 13)


def test_its_only_floor_is_the_guess(corpus):
    assert floors(corpus) == {"guess": pytest.approx(math.log(6 * 5 * 4) / 3)}


def test_an_exported_text_is_the_corpus(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.txt").write_bytes(corpus.text.encode())
    again = load_corpus(str(tmp_path / "t.txt"))
    assert (again.name, again.vocabulary, again.sequences) == (corpus.name, corpus.vocabulary, RECALL)


# Sequences


@pytest.mark.parametrize("answers", [(), (0,), (4,), (3, 2), (2, 2)])
def test_answers_are_places_in_order(answers):
    with pytest.raises(ValueError, match="answers=.*: must be ascending places from 1 to 3"):
        Sequences(period=4, answers=answers, chance=0.5, guess=0.7)


def test_a_corpus_is_whole_sequences_on_both_sides_of_the_split():
    assert Corpus("fours", "abcd" * 10, "abcd", FOURS).sequences is FOURS
    with pytest.raises(ValueError, match="characters=5: must be whole sequences of 4"):
        Corpus("fours", "abcd" * 10 + "a", "abcd", FOURS)
    with pytest.raises(ValueError, match="characters=54: must be whole"):
        Corpus("fours", "abcd" * 15, "abcd", FOURS)


IDS = (np.arange(40) * 7 % 41).astype(np.uint8)
SIZES = {"batch_size": 5, "block_size": 3, "seed": 2}


def test_a_batch_is_whole_sequences_whose_answers_count():
    x, y = batch(IDS, **SIZES, step=3, sequences=FOURS)
    drawn = np.random.Philox(key=np.array([2, 3], dtype=np.uint64)).random_raw(5) % 10
    for row, own, number in zip(x, y, drawn.tolist(), strict=True):
        sequence = IDS[4 * number : 4 * number + 4].tolist()
        assert row.tolist() == sequence[:3]
        assert own.tolist() == [IGNORED, *sequence[2:]]


def test_gathered_batches_are_those_of_the_pure_function():
    gathered = Batches(IDS, **SIZES, sequences=FOURS)
    for step in (0, 1, AHEAD, AHEAD - 1):
        for found, wanted in zip(
            gathered(step), batch(IDS, **SIZES, step=step, sequences=FOURS), strict=True
        ):
            assert found.dtype == torch.int64 and torch.equal(found, wanted)
    assert Batches(IDS, **SIZES, sequences=FOURS, device="meta")(0)[1].is_meta


def test_windows_are_the_sequences_in_order():
    for ids in (IDS, resident(IDS, "cpu")):
        x, y, x_rest, y_rest = windows(ids, 3, FOURS)
        assert x.tolist() == IDS.reshape(10, 4)[:, :3].tolist()
        assert y.tolist() == [[IGNORED, *row[2:]] for row in IDS.reshape(10, 4).tolist()]
        assert x_rest.shape == y_rest.shape == (1, 0)


@pytest.mark.parametrize("block_size", [2, 4])
@pytest.mark.parametrize("cut", [windows, batch, Batches])
def test_a_window_that_is_no_sequence_is_refused(block_size, cut):
    options = {**SIZES, "block_size": block_size, "step": 0, "sequences": FOURS}
    wanted = {windows: ("block_size", "sequences"), batch: options, Batches: options.keys() - {"step"}}[cut]
    with pytest.raises(ValueError, match=f"block_size={block_size}: must be 3: .* of 4 characters"):
        cut(IDS, **{name: options[name] for name in wanted})
