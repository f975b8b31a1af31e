"""A user's own text: its memory, its odd characters, and how a record finds it again."""

import os
import subprocess
import sys

import pytest

from localgpt_core.corpus import corpus as corpus_module
from localgpt_core.corpus import known
from localgpt_core.corpus.corpus import Corpus, load_corpus
from localgpt_core.corpus.known import cheap_corpus, find_corpus, known_text
from localgpt_core.corpus.vocabulary import SHAKESPEARE_VOCABULARY, encode
from localgpt_core.records.specs import resolve_spec

TEXT = "a rose by any other name\nwould smell as sweet\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def poem(tmp_path):
    (tmp_path / "poem.txt").write_text(TEXT)
    return tmp_path / "poem.txt"


# Memory

MEASURE = """
import resource, sys
from localgpt_core.corpus import load_corpus
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
corpus = load_corpus(sys.argv[1])
corpus.sha256
assert corpus.ids.dtype == "uint8" and len(corpus.ids) == len(corpus.text)
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in KiB on Linux")
def test_a_large_text_takes_little_more_memory_than_its_characters_and_their_integers(tmp_path):
    text = TEXT * (20_000_000 // len(TEXT))
    (tmp_path / "large.txt").write_text(text)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large.txt")]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 2.5 * len(text) / 2**20 + 10  # MiB; it was 20 times the text


@pytest.mark.parametrize("around", [0, 1, 2])
def test_a_text_is_encoded_in_blocks(monkeypatch, around):
    from localgpt_core.corpus import vocabulary

    monkeypatch.setattr(vocabulary, "BLOCK", 5)
    text = "abcde" * 4 + "ab"[:around]
    assert encode(text, "abcde").tolist() == ["abcde".index(c) for c in text]
    with pytest.raises(ValueError, match=r"character 'x' at position 12 \(line 2, column 7\) is not one of"):
        encode("abcde\na" + "bcdeaxcde", "\nabcde")
    monkeypatch.setattr(corpus_module, "BLOCK", 7)
    assert Corpus("a", TEXT, "".join(sorted(set(TEXT)))).sha256 == known_digest(TEXT)


def known_digest(text):
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


# Odd characters


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"good text\nup to \xc3\xa9 here: \xff", r"byte 25 is 0xff \(line 2, column 15\)"),
        (b"half a character: \xed\xa0\x80 is none", r"byte 18 is 0xed \(line 1, column 19\)"),
        (b"good text\nup to here: \x00 and on", r"character 22 is NUL \(line 2, column 13\)"),
        (b"\xff\xfea\x00 \x00", "is UTF-16 by its first two bytes; save it as UTF-8"),
        (b"\xfe\xff\x00a\x00 ", "is UTF-16 by its first two bytes; save it as UTF-8"),
    ],
    ids=["byte", "half", "NUL", "UTF-16", "UTF-16 BE"],
)
def test_what_is_no_text_is_named_with_its_place(tmp_path, data, message):
    (tmp_path / "own.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(str(tmp_path / "own.txt"))
    assert "\n" not in str(caught.value)


def test_control_characters_are_symbols_like_others(tmp_path):
    (tmp_path / "own.txt").write_bytes(b"page one\x0cpage two\x1b[0m\x7f\r\n")
    assert {"\x0c", "\x1b", "\x7f"} <= {*load_corpus(str(tmp_path / "own.txt")).vocabulary}


def test_half_a_character_is_refused_in_python_too():
    text = "a good text\nwith a \ud800 in it"
    with pytest.raises(ValueError, match=r"corpus 'x' has half a character, '\\ud800': line 2, column 8"):
        Corpus("x", text, "".join(sorted(set(text))))
    with pytest.raises(ValueError, match=r"half a character, '\\ud800': in the vocabulary"):
        Corpus("x", "ab" * 20, "ab\ud800")


# Found again


def test_a_text_that_was_loaded_is_found_by_its_digest(poem, monkeypatch, cache):
    monkeypatch.chdir(poem.parent)
    sha256 = load_corpus("poem.txt").sha256
    assert known_text(sha256) == poem  # the whole path, wherever one is by then
    assert find_corpus("poem", sha256).text == TEXT
    poem.rename(poem.with_name("moved.txt"))
    assert known_text(sha256) is None
    load_corpus("moved.txt")
    assert find_corpus("poem", sha256).name == "moved"
    assert [path.name for path in (cache / "texts").iterdir()] == [sha256]


def test_a_note_that_is_none_is_no_note(poem, cache):
    sha256 = load_corpus(str(poem)).sha256
    note = cache / "texts" / sha256
    for content in (b"\0", b"/" * 70_000, b"\xff", b""):
        note.write_bytes(content)
        assert known_text(sha256) is None
    note.unlink()
    os.mkfifo(note)
    assert known_text(sha256) is None
    assert load_corpus(str(poem)).sha256 == sha256


def test_a_text_that_is_not_known_is_asked_for_by_its_digest(poem):
    with pytest.raises(
        ValueError, match=f"corpus='poem': the text of this run was not .* SHA-256 {'0' * 64}"
    ):
        find_corpus("poem", "0" * 64)
    sha256 = load_corpus(str(poem)).sha256
    poem.write_text(TEXT + "and so on")
    with pytest.raises(ValueError, match="corpus='poem': .*poem.txt has another text by now; give the file"):
        find_corpus("poem", sha256)
    assert cheap_corpus("poem", sha256) is None


def test_nothing_needs_the_notes(poem, cache):
    cache.write_text("a file in the place of the folder")
    sha256 = load_corpus(str(poem)).sha256
    assert known_text(sha256) is None
    cache.unlink()
    (cache / "texts").mkdir(parents=True)
    (cache / "texts" / sha256).write_bytes(b"\xff\x00")
    assert known_text(sha256) is None
    assert find_corpus("poem", load_corpus(str(poem)).sha256).text == TEXT


def test_a_users_text_with_the_name_of_ours_is_the_users(tmp_path):
    (tmp_path / "shakespeare.txt").write_text(TEXT)
    corpus = load_corpus(str(tmp_path / "shakespeare.txt"))
    assert find_corpus("shakespeare", corpus.sha256).text == TEXT


@pytest.fixture
def ours(monkeypatch):
    """Let a small text be the corpus `complete`, which this machine can build as little as the others."""
    text = "First Citizen:\nSpeak, speak.\n\n" * 30
    monkeypatch.setitem(corpus_module.SHA256, "complete", known_digest(text))
    monkeypatch.setattr(corpus_module, "read_plays", lambda *names: pytest.fail("built"))
    return text


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_file_with_the_text_of_ours_is_ours_whatever_it_is_called(ours, mark, tmp_path, cache):
    file = tmp_path / "a poem.txt"
    file.write_text(mark + ours, encoding="utf-8")
    corpus = load_corpus(str(file))
    assert (corpus.name, corpus.text, corpus.sha256) == ("complete", ours, known_digest(ours))
    assert corpus.vocabulary == SHAKESPEARE_VOCABULARY != "".join(sorted(set(ours)))
    # A machine that cannot build it then knows it by its name, and by its digest, with the file gone too.
    assert known_text(corpus.sha256) == file
    file.unlink()
    assert (cache / "complete.txt").read_text() == ours
    assert load_corpus("complete").ids.tolist() == corpus.ids.tolist()
    assert find_corpus("complete", corpus.sha256).text == ours
    assert cheap_corpus("complete", corpus.sha256).text == ours


def test_the_digest_of_a_run_is_that_of_the_corpus_whether_it_is_named_or_a_file(ours, tmp_path, cache):
    (tmp_path / "mine.txt").write_text(ours)
    from_file = resolve_spec("tiny", {}, {"seed": 3}, load_corpus(str(tmp_path / "mine.txt")))
    assert from_file == resolve_spec("tiny", {}, {"seed": 3}, load_corpus("complete"))
    by_hand = Corpus("complete", ours, SHAKESPEARE_VOCABULARY)
    assert from_file.digest == resolve_spec("tiny", {}, {"seed": 3}, by_hand).digest
    assert from_file.model.vocab_size == 65
    (tmp_path / "complete.txt").write_text(ours + "\n")
    other = load_corpus(str(tmp_path / "complete.txt"))  # another text stays a user's own, of its own symbols
    assert (other.name, other.vocab_size) == ("complete", len(set(ours)))
    assert find_corpus("complete", other.sha256).text == ours + "\n"


def test_a_file_of_ours_is_ours_also_where_no_cache_can_be_written(ours, tmp_path, cache):
    cache.write_text("a file in the place of the folder")
    (tmp_path / "mine.txt").write_text(ours)
    assert load_corpus(str(tmp_path / "mine.txt")).name == "complete"


def test_a_large_text_and_one_that_would_be_built_are_not_cheap(poem, monkeypatch):
    sha256 = load_corpus(str(poem)).sha256
    assert cheap_corpus("poem", sha256).text == TEXT
    monkeypatch.setattr(known, "CHEAP", len(TEXT) - 1)
    assert cheap_corpus("poem", sha256) is None
    assert cheap_corpus("shakespeare", corpus_module.SHA256["shakespeare"]) is None  # not in this cache
    assert cheap_corpus("poem", "0" * 64) is None
