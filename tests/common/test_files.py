import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys

import pytest

from localgpt_core.common import files
from localgpt_core.common.files import atomic_write, require_writable
from localgpt_core.common.validation import printable, require


@pytest.mark.parametrize(
    ("data", "expected"), [(b"\x00\xff", b"\x00\xff"), ("é\r\n", b"\xc3\xa9\r\n"), ("", b"")]
)
def test_bytes_and_text_arrive_unchanged_in_a_new_folder(tmp_path, data, expected):
    path = tmp_path / "new" / "folder" / "file.bin"
    atomic_write(path, data)
    assert path.read_bytes() == expected
    assert os.listdir(path.parent) == ["file.bin"]


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "file"
    atomic_write(str(path), "a long old text")
    atomic_write(str(path), "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*args):
        raise error("disk full")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(error, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_file_is_whole_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "file"
    seen = []
    replace = os.replace

    def spy(source, target):
        seen.append((source.read_text(), target.exists(), source.parent == target.parent))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", spy)
    atomic_write(path, "data")
    assert seen == [("data", False, True)]


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path):
    atomic_write(tmp_path / "atomic", "x")
    (tmp_path / "plain").write_text("x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("atomic", "plain")}
    assert len(modes) == 1


def write_often(path, letter):
    for _ in range(50):
        atomic_write(path, letter * 100_000)


def test_a_reader_sees_one_writer_or_the_other(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "a" * 100_000)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        text = path.read_text()
        assert len(text) == 100_000 and len(set(text)) == 1
        reads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert reads > 0
    assert os.listdir(tmp_path) == ["file"]


# Whether a file can be written, known before there is anything to write


@pytest.mark.parametrize("place", ["file", "new/folder/file", "old", "x" * 255])
def test_a_path_that_can_be_written_is_left_as_it_is(tmp_path, place):
    (tmp_path / "old").write_text("old")
    require_writable("out", tmp_path / place)
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"
    atomic_write(tmp_path / place, "new")


UNWRITABLE = {
    "below a file": ("file/x", "Not a directory"),
    "far below a file": ("file/a/b/x", "Not a directory"),
    "a folder": ("folder", "is no regular file"),
    "a name too long": ("x" * 256, "File name too long"),
    "a folder's name too long": ("new/" + "x" * 256 + "/x", "File name too long"),
    "a path too long": ("/".join(["x" * 200] * 30), "File name too long"),
    "below a link to nothing": ("lost/x", "cannot be written"),
    "a folder that takes no files": ("/proc/x", "No such file"),
    "a device": ("/dev/null", "is no regular file"),
}


@pytest.mark.skipif(os.name != "posix", reason="paths of POSIX")
@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_path_that_cannot_be_written_is_refused_with_the_cause(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "lost").symlink_to(tmp_path / "nothing")
    path, cause = UNWRITABLE[name]
    with pytest.raises(ValueError, match=f"^out='{path}': .*{cause}"):
        require_writable("out", path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "lost"]
    with pytest.raises(OSError):
        atomic_write(path, "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_disk_is_no_error_of_the_path(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*file'"):
        require_writable("out", tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_what_a_killed_process_left_in_a_folder_is_swept_and_nothing_else(tmp_path):
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    stale = tmp_path / f".{'a' * 32}.{int(gone.stdout)}@{files.HOST}.tmp"
    kept = [
        tmp_path / f".{'b' * 32}.{os.getpid()}@{files.HOST}.tmp",  # of a process that is there
        tmp_path / f".{'c' * 32}.{int(gone.stdout)}@another.tmp",  # of another machine
        tmp_path / f".{'d' * 32}.tmp",
        tmp_path / "notes.tmp",
    ]
    for path in (stale, *kept):
        path.write_text("x")
    require_writable("out", tmp_path / "a.json")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_killed_write_leaves_a_file_that_the_next_command_sweeps(tmp_path):
    code = "import os, signal, sys; from localgpt_core.common import files;"
    code += "files.os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL);"
    code += "files.atomic_write(sys.argv[1], 'x')"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert done.returncode == -signal.SIGKILL and len([*tmp_path.iterdir()]) == 1
    require_writable("out", tmp_path / "a")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 21, '{"a": -' + "9" * 400 + "}", '"\\ud800"'])
def test_json_that_nothing_could_use_is_refused(text):
    with pytest.raises(ValueError, match="^is not JSON"):
        files.parse_json(text)


def test_json_is_what_it_says():
    assert files.parse_json('{"a": [1, -2.5, "\\u00e9 \\ud83d\\ude00", 18446744073709551615]}') == {
        "a": [1, -2.5, "é \U0001f600", 2**64 - 1]
    }


# What a refusal shows


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 998, f"'{'x' * 998}'"),
        ("x" * 999, f"'{'x' * 999}... (1001 characters)"),
        (10**5000, "a int that is too large to be shown"),
        (nested(100_000), "a list that is too large to be shown"),
    ],
    ids=["1000", "1001", "digits", "deep"],
)
def test_a_refusal_shows_the_beginning_of_a_long_value(value, shown):
    with pytest.raises(ValueError) as caught:
        require(False, "field", value, "allowed")
    assert str(caught.value) == f"field={shown}: allowed"


def test_what_is_no_letter_is_written_as_python_writes_it():
    assert printable("a\nb\x1b[0m\u2028\udcff é λ") == r"a\nb\x1b[0m\u2028\udcff é λ"
