"""Texts, as integers.

Where they come from, their alphabet, the split, the batches as a pure function of corpus, seed and step,
tasks whose answers alone count, and the n-gram floors that counting achieves. No model is known here.
"""

from localgpt_core.corpus.batches import batch, windows
from localgpt_core.corpus.corpus import SHA256, Corpus, cache_folder, load_corpus
from localgpt_core.corpus.known import cheap_corpus, find_corpus, known_text
from localgpt_core.corpus.ngrams import floors, witten_bell
from localgpt_core.corpus.plays import SHAKESPEARE_PLAYS, line_agreement, parse_play, read_plays
from localgpt_core.corpus.recall import recall_text
from localgpt_core.corpus.sequences import IGNORED, Sequences
from localgpt_core.corpus.vocabulary import SHAKESPEARE_VOCABULARY, decode, encode, first_prompt

__all__ = [
    "Corpus",
    "IGNORED",
    "SHA256",
    "SHAKESPEARE_PLAYS",
    "SHAKESPEARE_VOCABULARY",
    "Sequences",
    "batch",
    "cache_folder",
    "cheap_corpus",
    "decode",
    "encode",
    "find_corpus",
    "first_prompt",
    "floors",
    "known_text",
    "line_agreement",
    "load_corpus",
    "parse_play",
    "read_plays",
    "recall_text",
    "windows",
    "witten_bell",
]
