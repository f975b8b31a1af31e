"""Which text has which SHA-256: a record names its text by it, and not where somebody keeps the file.

Each text file that is loaded leaves its place in ``texts/<sha256>`` of the cache folder. Nothing needs these
files; without them, or once a text has moved, its place has to be given.
"""

import contextlib
import os
from pathlib import Path

from localgpt_core.common.files import read_regular
from localgpt_core.common.validation import Refusal, require
from localgpt_core.corpus.corpus import (
    LONGEST_PLACE,
    SHA256,
    Corpus,
    cache_folder,
    load_corpus,
    place_of_text,
)

__all__ = ["CHEAP", "cheap_corpus", "find_corpus", "known_text"]

CHEAP = 4_000_000  # bytes or characters, for which the n-gram floors take a few seconds


def known_text(sha256: str) -> Path | None:
    """Return where the text of that SHA-256 was when it was last loaded; None if that is not known."""
    try:
        path = Path(os.fsdecode(read_regular(place_of_text(sha256), LONGEST_PLACE)))
    except OSError:
        return None
    return path if path.is_file() else None


def find_corpus(name: str, sha256: str) -> Corpus:
    """Return the corpus that a record names: one of ours, or a user's text that was loaded here before.

    Raises:
        ValueError: If the text is not known here, or its file has another content now.
    """
    if SHA256.get(name) == sha256:
        return load_corpus(name)
    path = known_text(sha256)
    where = f"give the file of the text with SHA-256 {sha256} (--corpus FILE)"
    require(path is not None, "corpus", name, f"the text of this run was not loaded here before; {where}")
    corpus = load_corpus(str(path))
    if corpus.sha256 != sha256:
        raise Refusal(f"corpus={name!r}: {path} has another text by now; {where}")
    return corpus


def cheap_corpus(name: str, sha256: str) -> Corpus | None:
    """Return `find_corpus` if that needs neither a download nor a rebuilt text, and the text is small."""
    path = cache_folder() / f"{name}.txt" if SHA256.get(name) == sha256 else known_text(sha256)
    with contextlib.suppress(OSError, Refusal):
        if path is not None and os.path.getsize(path) <= CHEAP:
            return find_corpus(name, sha256)
    return None
