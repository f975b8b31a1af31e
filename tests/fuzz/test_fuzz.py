"""Damaged and foreign files, and commands that nobody means: one line, the documented status, nothing harmed.

Every case is drawn from its number, so that what fails can be played again: `case` is in the message.
LOCALGPT_FUZZ=10 plays ten times as many, as `make fuzz` does.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from toys import TOY_SIZES, TOY_SUITE, toy_record, toy_spec, toy_text

from localgpt_core.bench import rows
from localgpt_core.cli import commands
from localgpt_core.common.validation import Refusal
from localgpt_core.corpus import corpus
from localgpt_core.records import RunRecord

TIMES = int(os.environ.get("LOCALGPT_FUZZ", "1"))
PATIENCE_S = 10
STATUSES = (0, 1, 2, 3)
TRAIN = ["train", "--corpus", "toy.txt", *TOY_SIZES, "--steps", "2", "--eval-interval", "1", "--out", "runs"]
ODD = [None, True, 0, -1, 1.5, 1e308, float("nan"), "", "x", "\ud800", "<script>", [], [1], {}, {"a": 1}]
ODD += [10**9, 10**19, 10**400, "a\0b", "../x", "x" * 300, [[1]], "\u2028", -0.0, 2**63]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a text, a suite, two records, a run with its checkpoint, and a bundle of all records."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "toy.txt").write_text(toy_text())
    (folder / "suite.toml").write_text(TOY_SUITE)
    for seed in (1, 2):
        toy_record(toy_spec(seed), suite="").write(folder / "records")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LOCALGPT_CACHE", str(folder / "cache"))
        assert play(patch, TRAIN)[0] == 0
        assert play(patch, ["export", "bundle.jsonl", "--records", "records"])[0] == 0
        assert play(patch, ["run", "suite.toml", "--records", "suites", "--out", "suites/toys"])[0] == 0
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "here" / "cache"))
    return tmp_path / "here"


def play(patch, arguments):
    """Run a command in this process; return its status and how long it took."""
    patch.setattr(sys, "argv", ["localgpt", *map(str, arguments)])
    start = time.monotonic()
    with pytest.raises(SystemExit) as end:
        commands.main()
    return end.value.code or 0, time.monotonic() - start


def damaged(data: bytes, source: random.Random) -> bytes:
    """Return ``data`` with a bit, a piece or its end changed."""
    place, length = source.randrange(len(data) + 1), source.choice((1, 2, 8, 100))
    kind = source.choice(("bit", "cut", "end", "twice", "noise", "zeros", "nothing", "byte"))
    piece = data[place : place + length]
    middle = {
        "bit": bytes([piece[0] ^ 1 << source.randrange(8)]) + piece[1:] if piece else b"\x01",
        "cut": b"",
        "twice": piece * 2,
        "noise": source.randbytes(len(piece)),
        "zeros": bytes(len(piece)),
        "byte": bytes([source.randrange(256)]) + piece,
    }
    if kind in ("end", "nothing"):
        return data[:place] if kind == "end" else b""
    return data[:place] + middle[kind] + data[place + length :]


def changed(text: str, source: random.Random) -> str:
    """Return a JSON text with an odd value at one place, at any depth, or one key more or less."""
    value = json.loads(text)
    place = value
    while True:
        keys = [*place] if isinstance(place, dict) else [*range(len(place))]
        key = source.choice(keys)
        if not (isinstance(place[key], dict | list) and place[key] and source.random() < 0.7):
            break
        place = place[key]
    what = source.random()
    if what < 0.1 and isinstance(place, dict):
        del place[key]
    elif what < 0.2 and isinstance(place, dict):
        place["unknown"] = source.choice(ODD)
    else:
        place[key] = source.choice(ODD)
    return json.dumps(value)


def hashes(folder: Path) -> dict[Path, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check(case, patch, capsys, arguments, statuses=STATUSES):
    """Play a command and hold it to what its help says; return its status and what it printed."""
    status, seconds = play(patch, arguments)
    out, err = capsys.readouterr()
    where = f"{case}: localgpt {arguments}\n{out[-500:]}\n{err[-1500:]}"
    assert status in statuses, where
    assert "Traceback" not in out + err, where
    assert seconds < PATIENCE_S, where
    if status == 2:
        assert re.fullmatch(r"error: .+", err.splitlines()[-1]), where
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, where
    return status, out, err


@pytest.mark.needs("pandas")
@pytest.mark.parametrize("part", range(4))
def test_a_damaged_record_harms_no_other(folder, monkeypatch, capsys, part):
    ours, other = sorted((folder / "records").glob("*.json"))
    whole = ours.read_text()
    of_old = json.loads(whole)
    del of_old["sha256"]
    for number in range(part, 260 * TIMES, 4):
        source = random.Random(f"record {number}")
        by_hand = source.random() < 0.5
        ours.write_bytes(changed(whole, source).encode() if by_hand else damaged(whole.encode(), source))
        same = ours.read_bytes() == whole.encode()
        before = hashes(folder)
        status, out, err = check(
            f"record {number}", monkeypatch, capsys, ["table", "--records", "records", "--csv"]
        )
        assert status == 0 and len(out.splitlines()) == 2, (number, out, err)
        seeds = out.splitlines()[1]
        assert hashes(folder) == before
        if not same and json_of(ours) not in (json.loads(whole), of_old):
            assert f"record records/{ours.name} is refused: " in err, (number, err)
            assert "1 2" not in seeds


def json_of(path):
    """Return what a file says as JSON, None if it does not."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def test_a_damaged_line_of_a_bundle_costs_that_line(folder, monkeypatch, capsys):
    lines = (folder / "bundle.jsonl").read_bytes().splitlines()
    for number in range(160 * TIMES):
        source = random.Random(f"bundle {number}")
        if source.random() < 0.5:
            bad = changed(lines[0].decode(), source).encode()
        else:
            bad = damaged(lines[0], source).replace(b"\n", b" ")
        (folder / "bad.jsonl").write_bytes(bad + b"\n" + lines[1] + b"\n")
        status, out, err = check(
            f"bundle {number}", monkeypatch, capsys, ["import", "bad.jsonl", "--records", "taken"]
        )
        assert status == 0, (number, err)
        written = [*(folder / "taken").rglob("*.json")]
        digests = {RunRecord.from_json(path.read_text()).digest for path in written}
        assert RunRecord.from_json(lines[1].decode()).digest in digests
        assert len(written) == 2 or "line 1 is refused" in err, (number, err)
        shutil.rmtree(folder / "taken")
        assert not [*folder.parent.glob("x*")]  # nothing beside the folder of records


def test_a_damaged_suite_is_refused_or_is_one(folder, monkeypatch, capsys):
    whole = (folder / "suite.toml").read_text()
    tokens = re.split(r"(\W+)", whole)
    values = [
        "-1",
        "1e9",
        "10000000000",
        "true",
        '"x"',
        "[]",
        "{}",
        "nan",
        "inf",
        "[[1]]",
        "''",
        "\ud800",
        "seeds",
    ]
    values += ["[" * 5000, "9" * 400, "n_layer", "[arms.x]", '"""', "\0"]
    before = hashes(folder / "suites")
    for number in range(220 * TIMES):
        source = random.Random(f"suite {number}")
        if source.random() < 0.6:
            own = list(tokens)
            own[source.randrange(len(own))] = source.choice(values)
            data = "".join(own).encode("utf-8", "surrogatepass")
        else:
            data = damaged(whole.encode(), source)
        (folder / "bad.toml").write_bytes(data)
        check(f"suite {number}", monkeypatch, capsys, ["table", "bad.toml", "--records", "suites"])
        assert hashes(folder / "suites") == before, number


def test_a_damaged_configuration_is_refused_or_is_one(folder, monkeypatch, capsys):
    whole = 'model = { method = "fa", n_layer = 1 }\n[train]\nlr = 0.01\nsteps = 2\n'
    tokens = re.split(r"(\W+)", whole)
    values = [
        "10000000000",
        "9" * 400,
        "1e999",
        "nan",
        "[" * 5000,
        "a" + ".a" * 1000,
        '"""',
        "true",
        "-1",
        "{}",
    ]
    for number in range(40 * TIMES):
        source = random.Random(f"config {number}")
        own = list(tokens)
        own[source.randrange(len(own))] = source.choice(values)
        data = "".join(own).encode() if source.random() < 0.6 else damaged(whole.encode(), source)
        (folder / "bad.toml").write_bytes(data)
        one_step = ["train", "--corpus", "toy.txt", *TOY_SIZES, "--steps", "1", "--out", "bad"]
        check(f"config {number}", monkeypatch, capsys, [*one_step, "--config", "bad.toml"])
        shutil.rmtree(folder / "bad", ignore_errors=True)


def test_a_damaged_benchmark_is_refused_or_has_numbers(tmp_path):
    path = tmp_path / "rows.json"
    numbers = [*map(float, range(1, 11))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "environment", lambda device: {"device": device})
        rows.write_rows([rows.Row(name, *numbers) for name in ("fa", "dfa")], path, "cpu", "cpu", {"x": 1.0})
    whole = path.read_text()
    refused = 0
    for number in range(300 * TIMES):
        source = random.Random(f"benchmark {number}")
        by_hand = source.random() < 0.7
        path.write_bytes(changed(whole, source).encode() if by_hand else damaged(whole.encode(), source))
        try:
            found, measured_on = rows.read_rows(path)
        except Refusal as error:
            refused += 1
            assert str(error).startswith("benchmark rows.json cannot be read: ") and len(str(error)) < 2000
        else:
            assert isinstance(measured_on, dict) and rows.render([*found.values(), rows.Row("x", *numbers)])
    assert 100 * TIMES < refused < 300 * TIMES


def test_a_damaged_cache_is_made_again(folder, monkeypatch):
    text = toy_text()
    monkeypatch.setitem(corpus.SHA256, "complete", hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setattr(corpus, "read_plays", lambda names=None: [text])
    monkeypatch.setattr(corpus, "SHAKESPEARE_VOCABULARY", "".join(sorted({*text})))
    place = folder / "cache" / "complete.txt"
    for number in range(100 * TIMES):
        source = random.Random(f"cache {number}")
        place.write_bytes(damaged(text.encode(), source))
        assert corpus.load_corpus("complete").text == text, number
        assert place.read_text() == text, number


@pytest.mark.parametrize("part", range(2))
def test_a_damaged_checkpoint_is_refused_and_left_alone(folder, monkeypatch, capsys, part):
    (checkpoint,) = (folder / "runs").glob("*.safetensors")
    (record,) = (folder / "runs").glob("*.json")
    whole = checkpoint.read_bytes()
    for number in range(part, 160 * TIMES, 2):
        source = random.Random(f"checkpoint {number}")
        checkpoint.write_bytes(damaged(whole, source))
        before = hashes(folder)
        harmless = checkpoint.read_bytes() == whole
        commands_ = (["sample", checkpoint, "--characters", "3"], [*TRAIN, "--resume"])
        for arguments in commands_:
            status, out, err = check(f"checkpoint {number}", monkeypatch, capsys, arguments)
            if not harmless:
                assert status == 2 or whole_but_for_spaces(whole, checkpoint), (number, out, err)
        assert hashes(folder) == before or harmless
        assert record.exists()


def whole_but_for_spaces(whole, path):
    """Whether a file differs from ``whole`` by spaces that fill the header of a safetensors file."""
    squeezed = path.read_bytes().replace(b" ", b"")
    return squeezed == whole.replace(b" ", b"")


def test_any_file_is_a_text_or_refused(folder, monkeypatch, capsys):
    whole = toy_text().encode()
    for number in range(60 * TIMES):
        source = random.Random(f"text {number}")
        data = damaged(whole, source)
        if source.random() < 0.3:
            data = source.randbytes(source.choice((0, 1, 19, 500))) + data[: source.choice((0, 20, 300))]
        (folder / "bad.txt").write_bytes(data)
        check(f"text {number}", monkeypatch, capsys, ["corpus", "bad.txt"])
        one_step = ["train", "--corpus", "bad.txt", *TOY_SIZES, "--steps", "1", "--out", "bad"]
        check(f"text {number}", monkeypatch, capsys, one_step)
        shutil.rmtree(folder / "bad", ignore_errors=True)


def test_commands_that_nobody_means(folder, monkeypatch, capsys):
    words = ["train", "run", "table", "plot", "figure", "verify", "export", "import", "sample", "corpus"]
    options = [
        "--records",
        "--out",
        "--seed",
        "--lr",
        "--steps",
        "--preset",
        "--corpus",
        "--method",
        "--seeds",
    ]
    options += [
        "--temperature",
        "--characters",
        "--jobs",
        "--tolerance",
        "--config",
        "--device",
        "--only",
        "--csv",
    ]
    values = [
        "suite.toml",
        "toy.txt",
        "bundle.jsonl",
        "records",
        "runs",
        ".",
        "/dev/null",
        "none",
        "",
        "-1",
        "0",
    ]
    values += [
        "1e-320",
        "nan",
        "inf",
        "1" * 400,
        "\udcff",
        "a\nb",
        "x" * 5000,
        "tiny",
        "fa",
        "1,2",
        "auto",
        "1.5",
    ]
    for number in range(150 * TIMES):
        source = random.Random(f"command {number}")
        word = source.choice(words)
        arguments = [word, *TRAIN[1:-2], "--out", "new"] if word == "train" else [word]
        for _ in range(source.randrange(4)):
            arguments += [source.choice(options), source.choice(values)]
            arguments += [source.choice(values)] * (source.random() < 0.3)
        before = hashes(folder / "records") | hashes(folder / "runs")
        check(f"command {number}", monkeypatch, capsys, arguments)
        after = hashes(folder / "records") | hashes(folder / "runs")
        assert before.items() <= after.items(), (number, arguments)
        shutil.rmtree(folder / "new", ignore_errors=True)
