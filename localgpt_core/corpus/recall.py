r"""Recall in several hops: a task that needs depth, ``recall-1``, ``recall-2`` and ``recall-3``.

A sequence is a table of N keys and Q queries of it, drawn anew:

    "\n" v_0 v_1 ... v_(N-1)  q_1 a_1  q_2 a_2 ... q_Q a_Q

The keys are the first N letters. The place in the table stands for the key, v_i = f(i) is its value, another
key, and f is one cycle through all keys, uniform among those. The queries are different keys in random order,
and the answer of ``recall-k`` takes k look-ups, one after the other: a_j = f(f(...f(q_j))), f k times. The
answers alone count.

N = 7 is prime to 2 and 3, so f^k is one uniform cycle through all keys for each k: without the table, queries
and answers look alike whatever k is. Who does not read the table knows before the answer a_j that it is none
of the j - 1 earlier ones and closes no cycle too early. That leaves N - j keys, all equally likely, so the
best guess is right with probability 1 / (N - j) and has the loss ln(N - j), on average over j = 1 ... Q.

There are 720 tables, of which a run sees all. A block can do more than one hop: its attention looks up one
value and brings the whole table besides, in which its MLP finds the next. So trained by backpropagation, one
block learns two hops for some seeds, in 1500 steps at width 32, in 9000 at width 16, and with 11 keys too.
What is left as a test of depth is ``recall-3`` at width 16, where one block ends near 30 %, after 9000 steps
as after 3000, and two blocks get all answers.

Rejected: the N pairs of key and value in random order. A block then has to bring each key to the place of its
value, where nothing is predicted. That is another task than depth: the error that direct feedback brings to
that place is zero, and backpropagation stays at the guess for more than a thousand steps. Rejected, too: more
keys. With 11 of them and sigmoid attention, three hops stay at the guess for two thousand steps.

Sources of the task: pointer jumping in communication complexity (Papadimitriou and Sipser 1982), and its
use for transformers' depth (Sanford, Hsu and Telgarsky 2024, "Transformers, parallel computation, and
logarithmic depth").
"""

import math
import string
from statistics import fmean

import numpy as np

from localgpt_core.corpus.sequences import Sequences

__all__ = ["HOPS", "RECALL", "RECALL_VOCABULARY", "recall_text"]

KEYS, QUERIES = 7, 3
SEQUENCES = 80_000
SEED = 1

HOPS = {"recall-1": 1, "recall-2": 2, "recall-3": 3}
"""Look-ups that an answer takes, by the name of the corpus."""

RECALL_VOCABULARY = "\n" + string.ascii_lowercase[:KEYS]

LEFT = [
    KEYS - j for j in range(1, QUERIES + 1)
]  # keys that an answer may be, for who does not read the table
RECALL = Sequences(
    period=1 + KEYS + 2 * QUERIES,
    answers=tuple(KEYS + 2 * j for j in range(1, QUERIES + 1)),
    chance=fmean(1 / left for left in LEFT),
    guess=fmean(math.log(left) for left in LEFT),
)
"""The sequences of these corpora."""


def recall_text(hops: int) -> str:
    """Return the text of ``recall-<hops>``, `SEQUENCES` sequences, all independent.

    Permutations are the order of the 64-bit outputs of Philox4x64-10 with key (SEED, hops): a stream that is
    the same in every version of numpy.
    """
    source = np.random.Philox(key=np.array([SEED, hops], dtype=np.uint64))
    drawn = source.random_raw(SEQUENCES * 2 * KEYS).reshape(2, SEQUENCES, KEYS)
    cycles, queries = np.argsort(drawn, axis=-1, kind="stable")
    table = np.empty_like(cycles)
    np.put_along_axis(table, cycles, np.roll(cycles, -1, axis=-1), axis=-1)
    asked = answers = queries[:, :QUERIES]
    for _ in range(hops):
        answers = np.take_along_axis(table, answers, axis=-1)
    pairs = np.stack([asked, answers], axis=-1).reshape(SEQUENCES, -1)
    letters = np.frombuffer(RECALL_VOCABULARY.encode(), dtype=np.uint8)
    lines = np.zeros((SEQUENCES, RECALL.period), dtype=np.int64)
    lines[:, 1:] = 1 + np.concatenate([table, pairs], axis=-1)
    return letters[lines].tobytes().decode()
