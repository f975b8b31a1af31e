"""The index of a large folder: what is loaded with it is what is loaded without it."""

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import toy_curves, toy_record, toy_spec

from localgpt_core.records import RunRecord, load_records, read_record
from localgpt_core.records import folder as folders
from localgpt_core.records import index as indices
from localgpt_core.report.runs import cheap_floors, run_frame
from localgpt_core.report.tables import all_runs

RECORDS = Path(__file__).parents[2] / "book" / "records"
DIAGNOSTICS = {"step": [0, 20], "descends": [1, 1], "total_cosine": [0.5, 0.25]}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and an index for every folder of however few and fresh files."""
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "MANY", 1)
    monkeypatch.setattr(indices, "TICK", -(10**18))
    return tmp_path / "cache" / "records"


@pytest.fixture
def reads(monkeypatch):
    """The files that the index reads, one after the other."""
    found, original = [], indices.read_hashed

    def counted(path):
        found.append(str(path))
        return original(path)

    monkeypatch.setattr(indices, "read_hashed", counted)
    return found


@pytest.fixture
def folder(tmp_path):
    """Four records in two folders: one broke down, one diverged, one has diagnostics."""
    folder = tmp_path / "kept"
    toy_record(toy_spec(1), environment={"device_type": "cuda", "threads": 2}).write(folder / "a")
    toy_record(toy_spec(2), diagnostics=DIAGNOSTICS).write(folder / "a")
    toy_record(toy_spec(3), status="failed").write(folder / "b")
    spec = toy_spec(4, method="fa")
    lost = {"final_val_loss": None, "best_val_loss": 2.25, "curves": toy_curves(spec, None)}
    toy_record(spec, status="diverged", **lost).write(folder / "b")
    return folder


def without_index(folder):
    """Return what a folder gives, and its problems, when every file is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "MANY", 10**9)
        problems = []
        return load_records(folder, problems.append), problems


def assert_same(folder):
    """Check that the index changes nothing of what a folder gives; return how it was read."""
    problems = []
    found = load_records(folder, problems.append)
    whole, expected = without_index(folder)
    assert problems == expected
    assert [*found] == [*whole] and all(type(record) is indices.LightRecord for record in found.values())
    if whole:
        assert run_frame(found).equals(run_frame(whole)) and all_runs(found).equals(all_runs(whole))
    for digest, record in found.items():
        for name in (*indices.OWN, *indices.SHARED):
            assert getattr(record, name) == getattr(whole[digest], name), name
        assert type(record) is indices.LightRecord
        assert json.dumps(record.settings) == json.dumps(whole[digest].settings)  # 1 is no 1.0, nor True
    assert found == whole


def test_the_records_of_the_book_are_the_same_and_tables_open_no_file(cache, reads):
    whole, problems = without_index(RECORDS)
    assert problems == [] and len(whole) > 300
    load_records(RECORDS, pytest.fail)
    assert len(reads) == sum(1 for _ in RECORDS.rglob("*.json"))
    reads.clear()
    found = load_records(RECORDS, pytest.fail)
    assert run_frame(found).to_csv() == run_frame(whole).to_csv()
    assert cheap_floors(found) == cheap_floors(whole)
    assert reads == []
    assert [*found] == [*whole]
    assert [dataclasses.asdict(record) for record in found.values()] == [
        dataclasses.asdict(record) for record in whole.values()
    ]
    assert len(reads) == len(whole)


def test_a_small_folder_has_no_index(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "Index", lambda root: pytest.fail("was consulted"))
    found = load_records(folder, pytest.fail)
    assert len(found) == 4 and {type(record) for record in found.values()} == {RunRecord}
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(folders, "MANY", 5)
    assert load_records(folder, pytest.fail) == found
    monkeypatch.setattr(folders, "MANY", 4)
    with pytest.raises(pytest.fail.Exception, match="was consulted"):
        load_records(folder)


# One record


@pytest.mark.parametrize("name", indices.LARGE)
def test_a_large_field_is_read_when_it_is_asked_for(cache, reads, folder, name):
    whole, _ = without_index(folder)
    for digest, record in load_records(folder).items():
        reads.clear()
        assert getattr(record, name) == getattr(whole[digest], name)
        assert reads == [os.path.realpath(record._path)] and type(record) is RunRecord
        assert record == whole[digest] and record.run_spec == whole[digest].run_spec
        assert len(reads) == 1


USES = {
    "equal": lambda record: record == read_record(record._path),
    "equal from the other side": lambda record: read_record(record._path) == record,
    "equal to its like": lambda record: record == copy.copy(record),
    "printed": repr,
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
    "pickled": lambda record: pickle.loads(pickle.dumps(record)),
    "replaced": lambda record: dataclasses.replace(record, arm="another"),
    "replaced where it is large": lambda record: dataclasses.replace(
        record, **{name: getattr(read_record(record._path), name) for name in indices.LARGE}, arm="another"
    ),
    "as a dictionary": dataclasses.asdict,
    "as JSON": RunRecord.to_json,
    "as kept": RunRecord.as_kept,
    "spec": lambda record: record.run_spec,
}


@pytest.mark.parametrize("use", USES)
def test_a_light_record_is_used_like_a_whole_one(cache, folder, use):
    for digest, record in load_records(folder).items():
        whole = read_record(record._path)
        vars(whole)["_path"] = record._path
        expected, found = USES[use](whole), USES[use](record)
        assert found == expected and type(found) is type(expected), digest


def test_a_record_has_no_other_attributes_and_no_hash(cache, folder):
    record = next(iter(load_records(folder).values()))
    with pytest.raises(AttributeError, match="no attribute 'loss'"):
        _ = record.loss
    assert type(record) is indices.LightRecord
    with pytest.raises(TypeError, match="unhashable"):
        hash(record)


def test_two_light_records_are_compared_whole(cache, folder):
    first, second = load_records(folder), load_records(folder)
    assert first == second
    one, other, *_ = load_records(folder).values()
    assert one != other and one != 5


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_text("{"), "is refused"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"a rose", b"a nose")), "sha256="),
        (lambda path: path.write_text(path.read_text() + " "), "was changed after its folder was read"),
        (lambda path: path.write_text(toy_record(sample="b").to_json()), "was changed after its folder"),
    ],
    ids=["gone", "damaged", "flipped", "longer", "another"],
)
def test_a_file_that_is_no_longer_what_it_was_is_refused(cache, folder, harm, message):
    path = folder / "a" / f"{toy_spec(1).digest}.json"
    record = load_records(folder)[path.stem]
    harm(path)
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as caught:
            _ = record.curves
        assert str(path) in str(caught.value)
    assert record.final_val_loss == 2.5


def test_a_record_is_found_from_another_working_directory(cache, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    found = load_records("a", pytest.fail)
    monkeypatch.chdir(tmp_path)
    assert found == load_records(folder / "a", pytest.fail)
    (folder / "b" / "odd.json").write_text("{}")
    problems = []
    load_records("./kept", problems.append)
    assert problems[0].startswith("record kept/b/odd.json is refused")  # named as it was asked for


# A folder that changes


def changed(path, **changes):
    path.write_text(dataclasses.replace(read_record(path), **changes).to_json() + "\n")


def swapped(path):
    """Write another sample of the same length, and put the time of the file back."""
    times = os.stat(path)
    changed(path, sample="a sore")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(path).st_size == times.st_size and os.stat(path).st_mtime_ns == times.st_mtime_ns


CHANGES = {
    "nothing": (lambda path: None, 0),
    "damaged": (lambda path: path.write_bytes(path.read_bytes()[:100]), 1),
    "foreign": (lambda path: path.write_text("{}"), 1),
    "changed": (lambda path: changed(path, wall_time_s=13.0), 1),
    "changed, of one size and time": (swapped, 1),
    "touched": (lambda path: os.utime(path, ns=(0, 0)), 1),
    "replaced by its copy": (lambda path: replaced_by_its_copy(path), 1),
    "removed": (lambda path: path.unlink(), 0),
    "renamed": (lambda path: path.rename(path.with_name("other.json")), 1),
    "hidden": (lambda path: path.rename(path.with_name(".hidden.json")), 0),
    "moved": (lambda path: path.rename(path.parents[1] / "b" / path.name), 1),
    "added": (lambda path: toy_record(toy_spec(5)).write(path.parent), 1),
    "twice, a run that broke down first": (lambda path: twice(path, "0", status="failed"), 1),
    "twice, a run that broke down last": (lambda path: twice(path, "c", status="failed"), 1),
    "twice, with diagnostics": (lambda path: twice(path, "c", diagnostics=DIAGNOSTICS), 1),
    "twice, the same": (lambda path: twice(path, "0"), 1),
    "dangling link": (lambda path: (path.with_name("gone.json")).symlink_to("nowhere"), 1),
}


def replaced_by_its_copy(path):
    path.with_name("x").write_bytes(path.read_bytes())
    os.replace(path.with_name("x"), path)


def twice(path, folder, **changes):
    toy_record(toy_spec(1), suite=folder, **changes).write(path.parents[1] / folder)


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_has_changed_is_read_as_without_an_index(cache, reads, folder, change):
    harm, opened = CHANGES[change]
    assert_same(folder)
    harm(folder / "a" / f"{toy_spec(1).digest}.json")
    reads.clear()
    load_records(folder, lambda problem: None)
    assert len(reads) == opened
    for _ in range(2):
        assert_same(folder)


def test_the_order_is_that_of_the_folders(cache, tmp_path):
    for seed, suite in ((1, "a-b"), (2, "a"), (3, "a b"), (4, "B")):
        toy_record(toy_spec(seed), suite=suite).write(tmp_path / "kept" / suite)
    found = load_records(tmp_path / "kept", pytest.fail)
    assert [record.suite for record in found.values()] == ["B", "a", "a b", "a-b"]
    assert_same(tmp_path / "kept")


def test_a_refused_file_is_named_each_time(cache, folder):
    (folder / "b" / "odd.json").write_text("{}")
    for _ in range(3):
        problems = []
        assert len(load_records(folder, problems.append)) == 4
        assert len(problems) == 1 and f"record {folder}/b/odd.json is refused" in problems[0]


def test_of_two_files_of_one_digest_the_index_tells_which_has_diagnostics(cache, reads, folder):
    twice(folder / "a" / "x", "c", diagnostics=DIAGNOSTICS)
    load_records(folder)
    reads.clear()
    record = load_records(folder)[toy_spec(1).digest]
    assert reads == [] and record.suite == "c" and record.has_diagnostics
    assert record.diagnostics == DIAGNOSTICS


def test_a_file_is_not_trusted_before_its_clock_has_ticked(cache, reads, folder, monkeypatch):
    monkeypatch.setattr(indices, "TICK", 2_000_000_000)
    for path in folder.rglob("*.json"):
        os.utime(path, ns=(0, 0))  # as a copy that keeps the times of the file it was made from
    for _ in range(2):
        reads.clear()
        load_records(folder, pytest.fail)
        assert len(reads) == 4
    real = time.time_ns
    monkeypatch.setattr(indices.time, "time_ns", lambda: real() + 10**10)
    load_records(folder, pytest.fail)
    reads.clear()
    load_records(folder, pytest.fail)
    assert reads == []
    os.utime(folder / "a" / f"{toy_spec(1).digest}.json", ns=(0, 2 * real()))  # a time that is still to come
    for _ in range(2):
        reads.clear()
        load_records(folder, pytest.fail)
        assert len(reads) == 1


def test_a_file_that_changes_while_it_is_read_is_read_again(cache, folder, monkeypatch):
    path, original = folder / "a" / f"{toy_spec(1).digest}.json", indices.read_hashed

    def late(name):
        found = original(name)
        if Path(name) == path:
            changed(path, sample="a sore")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(indices, "read_hashed", late)
        load_records(folder, pytest.fail)
    assert_same(folder)


# The file of the index


def index_of(cache):
    (path,) = cache.iterdir()
    return path


def test_the_index_is_beside_the_texts_and_written_when_something_is_new(cache, reads, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    load_records(folder)
    path = index_of(cache)
    with monkeypatch.context() as patch:
        patch.setattr(indices, "atomic_write", lambda *args: pytest.fail("was written again"))
        load_records(folder)
    (folder.parent / "link").symlink_to(folder)
    load_records(folder.parent / "link")
    assert index_of(cache) == path and len(reads) == 4
    load_records(folder / "a")
    assert len([*cache.iterdir()]) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "flipped": flip,
    "without its head": lambda path: path.write_bytes(path.read_bytes().partition(b"\n")[2]),
    "foreign": lambda path: path.write_text("[1, 2]\n[]"),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_none(cache, reads, folder, damage):
    load_records(folder)
    path = index_of(cache)
    whole = path.read_bytes()
    DAMAGES[damage](path)
    reads.clear()
    assert_same(folder)
    assert len(reads) == 8
    if damage not in ("a folder", "a pipe", "a device"):
        assert path.read_bytes() == whole
        reads.clear()
        load_records(folder)
        assert reads == []


def test_the_index_of_another_folder_or_of_other_code_is_none(cache, reads, folder, monkeypatch):
    load_records(folder)
    path = index_of(cache)
    with monkeypatch.context() as patch:
        patch.setattr(indices, "_code", lambda: "0" * 64)
        for expected in (4, 0):
            reads.clear()
            load_records(folder)
            assert len(reads) == expected
    load_records(folder)
    moved = folder.parent / "moved"
    folder.rename(moved)
    data = path.read_bytes()
    path.unlink()
    reads.clear()
    load_records(moved)
    index_of(cache).write_bytes(data)
    load_records(moved)
    assert len(reads) == 8


def test_other_code_has_another_name(tmp_path, monkeypatch):
    for name in ("localgpt_core/records/index.py", "localgpt_core/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(indices, "__file__", str(tmp_path / "localgpt_core/records/index.py"))
    before = indices._code.__wrapped__()
    assert before == indices._code.__wrapped__() != indices._code()
    (tmp_path / "localgpt_core/a.py").write_text("2")
    assert indices._code.__wrapped__() != before


def refuse(*args):
    raise PermissionError(13, "Permission denied")


def homeless():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("name, fault", [("atomic_write", refuse), ("cache_folder", homeless)])
def test_without_a_cache_folder_all_is_read(cache, reads, folder, monkeypatch, name, fault):
    monkeypatch.setattr(indices, name, fault)
    for _ in range(2):
        reads.clear()
        assert_same(folder)
        assert len(reads) == 8
    assert not cache.exists()


def test_a_cache_folder_that_is_a_file_stays_one(cache, folder):
    cache.parent.write_text("mine")
    assert_same(folder)
    assert cache.parent.read_text() == "mine"


def test_several_processes_index_one_folder_at_once(cache, reads, folder):
    code = """if True:
        import sys
        from localgpt_core.records import folder, index
        folder.MANY, index.TICK = 1, -10**18
        for _ in range(20):
            for path in index.cache_folder().glob("records/*.index"):
                path.unlink(missing_ok=True)
            found = folder.load_records(sys.argv[1], sys.exit)
            assert len(found) == 4 and all(record.curves is not None for record in found.values())"""
    started = [subprocess.Popen([sys.executable, "-c", code, str(folder)]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    load_records(folder, pytest.fail)
    reads.clear()
    assert_same(folder)
    assert len(reads) == 4
    assert [path.suffix for path in cache.iterdir()] == [".index"]


def test_some_records_alone_are_read_without_the_others_and_without_an_index(folder, cache, reads):
    one, two = toy_spec(1).digest, toy_spec(2).digest
    (folder / "a" / f"{one}.json").write_text("{}")
    problems = []
    assert load_records(folder, problems.append, {two, "0" * 16}) == {two: without_index(folder)[0][two]}
    assert problems == [] and reads == [] and not cache.exists()
    assert load_records(folder, problems.append, {one}) == {} and len(problems) == 1
