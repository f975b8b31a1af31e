import codecs
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import ALIGNMENT_FIELDS, GRAPE
from hypothesis import given
from hypothesis import strategies as st
from toys import toy_corpus, toy_curves, toy_model, toy_record, toy_spec, toy_train

from localgpt_core.common import files
from localgpt_core.common.environment import code_version, environment
from localgpt_core.config import PRESETS, LocalGPTConfig, TrainConfig, preset
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.experiments import execution as runs
from localgpt_core.experiments.execution import execute, sample_text
from localgpt_core.records import (
    RunRecord,
    export_bundle,
    import_bundle,
    load_records,
    read_record,
)
from localgpt_core.records.specs import RunSpec, resolve_spec
from localgpt_core.training import state as run_state

# The digest


def fixed_spec():
    model = LocalGPTConfig(method="fa", n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.0)
    return RunSpec(model, TrainConfig(seed=7, steps=300, lr=3e-3), "toy", "0" * 64)


def test_the_digest_never_changes():
    """A changed digest would orphan every record: change this number only together with all of them."""
    assert fixed_spec().digest == "8e59dd4d09c6b0ef"


# For every field: what it needs to have an effect, and another value.
CHANGES = {
    "method": ({}, "fa"),
    "fa_init_mode": ({"method": "fa"}, "orthogonal"),
    "fa_sparse_k": ({"method": "fa", "fa_init_mode": "sparse"}, 3),
    "feedback_std": ({"method": "fa"}, 0.03),
    "feedback_seed": ({"method": "fa"}, 0),
    "fa_grape": ({"method": "fa"}, True),
    "fa_grape_n_probe": (GRAPE, 4),
    "fa_grape_lr": (GRAPE, 0.5),
    **ALIGNMENT_FIELDS,
    "block_size": ({}, 8),
    "vocab_size": ({}, 64),
    "n_layer": ({}, 3),
    "n_head": ({}, 4),
    "n_embd": ({}, 16),
    "dropout": ({}, 0.25),
    "bias": ({}, True),
    "attn_mode": ({}, "softmax"),
    "sigmoid_bias_mode": ({}, "zero"),
    "ste_sigmoid": ({}, True),
    "ste_gelu": ({}, True),
    "gelu_surrogate": ({"ste_gelu": True}, "relu"),
    "vq_shared": ({"vq_codes": 5}, False),
    "vq_init": ({"vq_codes": 5}, "kmeans"),
    "vq_start": ({"vq_codes": 5}, 3),
    "vq_groups": ({"vq_codes": 5}, 2),
    "vq_rms": ({"vq_codes": 5}, "fixed"),
    "vq_backward": ({"vq_codes": 5}, "tangent"),
    "subspace_mode": ({"subspace_rank": 3}, "constrain"),
    "subspace_embeddings": ({"subspace_rank": 3, "subspace_mode": "constrain"}, "constrain"),
    "bottleneck_at": ({"resid_topk": 3, "n_layer": 2}, "0"),
    "gate_start": ({"gated_blocks": True}, 0.0),
    "freeze_emb": ({}, True),
    "ln_mode": ({}, "ste"),
    "fuse_attn_local": ({"attn_mode": "softmax"}, True),
    "mlp_topk": ({}, 3),
    "resid_topk": ({}, 3),
    "vq_codes": ({}, 5),
    "resid_bits": ({}, 4),
    "subspace_rank": ({}, 3),
    "gated_blocks": ({}, True),
    "seed": ({}, 2),
    "steps": ({}, 21),
    "batch_size": ({}, 4),
    "lr": ({}, 0.002),
    "min_lr_ratio": ({}, 0.2),
    "warmup": ({}, 5),
    "beta1": ({}, 0.8),
    "beta2": ({}, 0.98),
    "weight_decay": ({}, 0.0),
    "grad_clip": ({}, 0.0),
    "eval_interval": ({}, 6),
    "eval_iters": ({}, 2),
    "eval_between": ({}, 2),
    "freeze_body": ({}, True),
    "freeze_blocks": ({"n_layer": 2}, "0"),
    "anchor_interval": ({"method": "fa"}, 5),
    "anchor_only": ({"anchor_interval": 5, "method": "fa"}, True),
    "noise_start": ({"method": "fa"}, 3),
    "precision": ({}, "float64"),
    "compile": ({}, True),
}
MODEL_FIELDS = {item.name for item in dataclasses.fields(LocalGPTConfig)}
TRAIN_FIELDS = {item.name for item in dataclasses.fields(TrainConfig)}


def spec_with(values):
    model = toy_model(**{name: value for name, value in values.items() if name in MODEL_FIELDS})
    train = toy_train(**{name: value for name, value in values.items() if name in TRAIN_FIELDS})
    return RunSpec(model, train, "toy", "0" * 64)


def test_the_table_of_changes_has_every_field():
    assert CHANGES.keys() == MODEL_FIELDS | TRAIN_FIELDS


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_depends_on_every_field(name):
    needed, value = CHANGES[name]
    before, after = spec_with(needed), spec_with({**needed, name: value})
    assert before != after
    assert before.digest != after.digest
    assert RunSpec.from_dict(json.loads(json.dumps(after.to_dict()))) == after


def test_the_digest_depends_on_the_corpus():
    spec = toy_spec()
    others = [dataclasses.replace(spec, corpus="other"), dataclasses.replace(spec, corpus_sha256="1" * 64)]
    assert len({spec.digest, *(other.digest for other in others)}) == 3


FLOATS = st.floats(min_value=1e-12, max_value=0.9)
SPECS = st.fixed_dictionaries(
    {},
    optional={
        "lr": FLOATS,
        "dropout": FLOATS | st.sampled_from([0, 0.0]),
        "weight_decay": st.sampled_from([0, 0.0, 1, 1.0]) | FLOATS,
        "n_layer": st.integers(1, 3),
        "seed": st.integers(0, 2**64 - 1),
        "bias": st.booleans(),
        "method": st.sampled_from(["bp", "fa", "dfa"]),
        "attn_mode": st.sampled_from(["sigmoid", "softmax"]),
        "precision": st.sampled_from(["float32", "float64"]),
    },
)


@given(SPECS, SPECS)
def test_two_specs_have_one_digest_exactly_if_they_are_equal(first, second):
    one, other = spec_with(first), spec_with(second)
    assert (one == other) == (one.digest == other.digest)


@given(SPECS)
def test_a_spec_survives_its_record(values):
    spec = spec_with(values)
    record = toy_record(spec)
    again = RunRecord.from_json(record.to_json())
    assert again.run_spec == spec
    assert again.digest == again.run_spec.digest == spec.digest


def reordered(config, **extra):
    """Return the configuration as an object of a class with its fields in another order, and more fields."""
    items = [
        (item.name, item.type, dataclasses.field(default=item.default))
        for item in reversed(dataclasses.fields(config))
    ]
    items += [(name, type(value), dataclasses.field(default=value)) for name, value in extra.items()]
    cls = dataclasses.make_dataclass("Later", items, frozen=True, kw_only=True)
    return cls(**dataclasses.asdict(config))


def test_the_order_of_the_fields_and_later_fields_leave_the_digest_alone():
    spec = fixed_spec()
    model, train = reordered(spec.model, new_option=0), reordered(spec.train, other_option="off")
    later = dataclasses.replace(spec, model=model, train=train)
    assert later.digest == spec.digest
    changed = dataclasses.replace(model, new_option=1)
    assert dataclasses.replace(later, model=changed).digest != spec.digest


@pytest.mark.parametrize("name", PRESETS)
def test_a_resolved_spec_takes_the_vocabulary_of_the_corpus(name):
    corpus = toy_corpus()
    spec = resolve_spec(name, {"bias": True}, {"seed": 3}, corpus)
    model, train = preset(name, {"bias": True, "vocab_size": corpus.vocab_size}, {"seed": 3})
    assert spec == RunSpec(model, train, "toy", corpus.sha256)
    assert spec.seed == 3


@pytest.mark.parametrize(
    "values",
    [{}, {"model": {}}, {**toy_spec().to_dict(), "more": 1}, {**toy_spec().to_dict(), "model": {"x": 1}}],
)
def test_a_spec_with_other_keys_is_refused(values):
    with pytest.raises(ValueError, match="spec=|field='x'"):
        RunSpec.from_dict(values)


# One record


def test_a_record_is_the_same_after_writing_and_reading(tmp_path):
    record = toy_record(sample="two\nlines, é, \u2028 and \x85")
    path = record.write(tmp_path / "new folder")
    assert path == tmp_path / "new folder" / f"{record.digest}.json"
    assert read_record(path) == record
    assert os.listdir(path.parent) == [path.name]
    assert path.read_text(encoding="utf-8").count("\n") == 1


def test_floats_have_six_digits_and_what_is_not_finite_is_null():
    curves = {"step": [1, 2000000], "val_loss": [2.123456789, math.nan], "lr": [1.23456789e-7, -math.inf]}
    record = toy_record(curves=curves, final_val_loss=1.99999951, best_val_loss=math.inf)
    values = json.loads(record.to_json())
    assert values["curves"] == {
        "step": [1, 2000000],
        "val_loss": [2.12346, None],
        "lr": [1.23457e-7, None],
    }
    assert (values["final_val_loss"], values["best_val_loss"]) == (2.0, None)
    assert record.as_kept().to_json() == record.to_json() and record.as_kept() != record


def test_a_record_has_the_fields_that_tools_rely_on():
    values = json.loads(toy_record().to_json())
    needed = "digest suite arm spec seed status final_val_loss best_val_loss wall_time_s tokens_per_s"
    assert {*needed.split(), "peak_memory_mib", "curves"} <= values.keys()


def test_a_record_says_what_ran_on_what(monkeypatch):
    secret = str(Path.cwd() / "somewhere")
    argv = [f"{secret}/bin/localgpt", "train", "--out", f"{secret}/runs", f"--corpus={secret}/toy.txt"]
    monkeypatch.setattr(sys, "argv", [*argv, "--lr=0.1", "a b=/"])
    spec = toy_spec()
    record, result = execute(spec, toy_corpus(), suite="toys", arm="a", preset="tiny")
    assert record.digest == spec.digest and record.spec == spec.to_dict()
    assert (record.suite, record.arm, record.preset, record.seed) == ("toys", "a", "tiny", 1)
    assert record.provenance["command"].startswith("localgpt train --out runs --corpus=toy.txt --lr=0.1")
    assert {"git_commit", "git_dirty", "start", "end"} <= record.provenance.keys()
    assert record.provenance["start"] <= record.provenance["end"]
    assert record.provenance["start"].endswith("+00:00")
    expected = {"device", "device_type", "cpu_capability", "threads", "python", "torch", "numpy"}
    expected |= {"cuda", "system"}
    assert record.environment.keys() == expected
    assert record.parameters["total"] == record.parameters["trained"] == result.model.num_params()
    assert (record.status, record.error) == ("finished", "")
    assert record.final_val_loss == record.curves["val_loss"][-1]
    assert record.tokens_per_s > 0 and record.peak_memory_mib > 0 and record.wall_time_s > 0
    assert record.flops_per_token > 2 * 12 * 8**2  # one multiplication and addition per weight at least
    assert len(record.sample) == 301
    text = record.to_json()
    for folder in (str(Path.cwd()), str(Path.home()), sys.prefix, secret):
        assert folder not in text


def test_trained_parameters_are_counted_apart():
    spec = toy_spec()
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, freeze_body=True, steps=1))
    record, _ = execute(spec, toy_corpus())
    vocabulary, width, context = toy_corpus().vocab_size, 8, 7
    assert record.parameters["trained"] == 2 * vocabulary * width + context * width
    assert record.parameters["trained"] < record.parameters["total"]


def test_a_write_that_fails_keeps_the_old_record(tmp_path, monkeypatch):
    old = toy_record()
    path = old.write(tmp_path)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            toy_record(final_val_loss=1.0).write(tmp_path)
    assert os.listdir(tmp_path) == [path.name]
    assert read_record(path) == old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "0" * 16}, "digest='0000000000000000': its spec has"),
        ({"status": "fine"}, "status='fine'"),
        ({"schema": 2}, "schema=2: this version reads 1"),
        ({"suite": "../elsewhere"}, "suite='../elsewhere'"),
        ({"suite": "/elsewhere"}, "suite='/elsewhere'"),
        ({"suite": ".."}, r"suite='\.\.'"),
        ({"suite": 5}, "suite=5"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        toy_record(**change)
    text = json.dumps({**json.loads(toy_record().to_json()), **change})
    with pytest.raises(ValueError, match=message):
        RunRecord.from_json(text)


# Many records


@pytest.fixture
def folder(tmp_path):
    """Three good records in two folders."""
    for seed, suite in ((1, "a"), (2, "a"), (3, "b")):
        toy_record(toy_spec(seed), suite=suite).write(tmp_path / suite)
    return tmp_path


def good_digests():
    return {toy_spec(seed).digest for seed in (1, 2, 3)}


def assert_refused_and_the_rest_loaded(folder, path):
    problems = []
    records = load_records(folder, problems.append)
    assert records.keys() == good_digests()
    assert len(problems) == 1 and str(path) in problems[0]
    with pytest.raises(ValueError, match=r"^record") as caught:
        read_record(path)
    assert str(path) in str(caught.value)


def test_all_records_below_a_folder_are_loaded(folder):
    problems = []
    records = load_records(folder, problems.append)
    assert records.keys() == good_digests() and problems == []
    assert {record.suite for record in records.values()} == {"a", "b"}
    assert load_records(folder / "nothing here", problems.append) == {} and problems == []


@pytest.mark.parametrize("share", [i / 40 for i in range(40)] + [0.999])
def test_a_half_written_record_is_refused(folder, share):
    fourth = toy_record(toy_spec(4))
    path = fourth.write(folder / "b")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert_refused_and_the_rest_loaded(folder, path)


def changed(**changes):
    return json.dumps({**json.loads(toy_record(toy_spec(4)).to_json()), **changes})


def without(name):
    values = json.loads(toy_record(toy_spec(4)).to_json())
    del values[name]
    return json.dumps(values)


def changed_spec(part, **changes):
    values = json.loads(toy_record(toy_spec(4)).to_json())
    values["spec"][part] = {**values["spec"][part], **changes}
    return json.dumps(values)


DAMAGES = {
    "empty": "",
    "null": "null",
    "list": "[1, 2]",
    "number": "5",
    "object": "{}",
    "text": "not a record",
    "binary": b"\xff\xfe\x00\x01",
    "foreign": json.dumps({"name": "somebody else's", "version": 3}),
    "one field more": changed(more=1),
    "one field less": without("curves"),
    "spec no table": changed(spec=[1]),
    "spec a number": changed(spec=5),
    "spec of another run": changed_spec("train", lr=0.5),
    "spec with an unknown field": changed_spec("model", n_heads=2),
    "spec with a wrong type": changed_spec("model", n_layer="2"),
    "spec with a value that is refused": changed_spec("model", n_head=3),
    "wrong digest": changed(digest=toy_spec(5).digest),
    "digest of no text": changed(digest=5),
    "another schema": changed(schema=99),
    "another status": changed(status="running"),
    "two records": changed() + "\n" + changed(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_refused(folder, damage):
    path = folder / "a" / f"{toy_spec(4).digest}.json"
    data = DAMAGES[damage]
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    assert_refused_and_the_rest_loaded(folder, path)


@pytest.mark.parametrize(("damage", "field"), [("one field more", "more"), ("one field less", "curves")])
def test_a_field_too_many_or_too_few_is_named(damage, field):
    with pytest.raises(ValueError, match=rf"fields=\['{field}'\]: missing or unknown in a record"):
        RunRecord.from_json(DAMAGES[damage])


def test_a_renamed_record_is_refused(folder):
    path = toy_record(toy_spec(4)).write(folder).rename(folder / "my best run.json")
    assert_refused_and_the_rest_loaded(folder, path)


def test_a_problem_is_a_warning_unless_somebody_listens(folder):
    (folder / "bad.json").write_text("{")
    with pytest.warns(UserWarning, match=r"bad\.json is refused: is not JSON"):
        assert load_records(folder).keys() == good_digests()


def test_what_a_killed_process_leaves_behind_is_no_record(folder):
    record = toy_record(toy_spec(4))
    (folder / "a" / ".0123.tmp").write_text(record.to_json()[:100])
    (folder / "a" / ".4567.tmp").write_text(record.to_json())
    (folder / "a" / "notes.txt").write_text("mine")
    problems = []
    assert load_records(folder, problems.append).keys() == good_digests()
    assert problems == []


def test_a_record_that_is_being_written_is_not_yet_a_record(folder, monkeypatch):
    seen, problems, replace = [], [], os.replace

    def look_first(source, target):
        seen.append(load_records(folder, problems.append).keys())
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", look_first)
    toy_record(toy_spec(4)).write(folder)
    assert seen == [good_digests()] and problems == []
    assert load_records(folder).keys() == good_digests() | {toy_spec(4).digest}


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("b", "a")])
def test_a_run_that_broke_down_never_hides_one_that_did_not(tmp_path, first, second):
    failed = toy_record(status="failed", final_val_loss=None, curves={})
    failed.write(tmp_path / first)
    toy_record().write(tmp_path / second)
    assert load_records(tmp_path)[toy_spec().digest].status == "finished"


# Bundles


def test_a_bundle_gives_the_records_back(folder, tmp_path):
    bundle, new = tmp_path / "bundle.jsonl", tmp_path / "new"
    toy_record(toy_spec(4), suite="a", sample="é \u2028 \x85 \x0c").write(folder / "a")
    records = load_records(folder)
    export_bundle(records.values(), bundle)
    assert len(bundle.read_text(encoding="utf-8").splitlines()) == len(records) == 4
    written = import_bundle(bundle, new)
    assert {path.relative_to(new) for path in written} == {
        Path(record.suite) / f"{record.digest}.json" for record in records.values()
    }
    assert load_records(new) == records
    assert import_bundle(bundle, new) == []


def test_a_run_that_is_recorded_on_another_kind_of_device_stays_and_that_is_said(tmp_path):
    own, new, said = toy_record(toy_spec(1)), toy_record(toy_spec(2)), []
    own.write(tmp_path / "kept" / "toys")
    on_gpu = [
        dataclasses.replace(r, environment={**r.environment, "device_type": "cuda"}) for r in (own, new)
    ]
    export_bundle(on_gpu, tmp_path / "bundle.jsonl")
    (path,) = import_bundle(tmp_path / "bundle.jsonl", tmp_path / "kept", said.append)
    assert path.stem == new.digest and load_records(tmp_path / "kept") == {
        own.digest: own,
        new.digest: on_gpu[1],
    }
    assert said == ["1 records left out: the run is recorded here, made on another kind of device"]


def test_damaged_lines_of_a_bundle_are_named_and_the_rest_is_taken(folder, tmp_path):
    bundle, new, problems = tmp_path / "bundle.jsonl", tmp_path / "new", []
    export_bundle(load_records(folder).values(), bundle)
    lines = bundle.read_text().splitlines()
    lines.insert(1, changed(digest="0" * 16))
    lines.insert(3, lines[0][:200])
    lines += ["", "[]", changed(suite="../../outside"), changed(suite=7), changed(spec=5)]
    bundle.write_text("\n".join(lines) + "\n")
    written = import_bundle(bundle, new, problems.append)
    assert {path.stem for path in written} == good_digests()
    assert load_records(new).keys() == good_digests()
    expected = [f"bundle {bundle}, line {number} is refused" for number in (2, 4, 6, 7, 8, 9, 10)]
    assert [problem.split(":")[0] for problem in problems] == expected
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "new", "bundle.jsonl"}


def test_an_import_replaces_only_runs_that_broke_down(tmp_path):
    bundle, root = tmp_path / "bundle.jsonl", tmp_path / "records"
    failed = toy_record(status="failed", final_val_loss=None)
    failed.write(root / "toys")
    kept = toy_record(toy_spec(2), final_val_loss=1.5)
    kept.write(root / "toys")
    export_bundle([toy_record(), failed, toy_record(toy_spec(2))], bundle)
    assert [path.stem for path in import_bundle(bundle, root)] == [failed.digest]
    records = load_records(root)
    assert records[failed.digest].status == "finished"
    assert records[kept.digest].final_val_loss == 1.5


@pytest.mark.parametrize(
    "content, words",
    [(None, "bundle .* cannot be read"), (b"\xff\xfe", "bundle=.* has no line that is a record")],
)
def test_a_bundle_that_cannot_be_read_is_refused(tmp_path, content, words):
    path = tmp_path / "bundle.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        import_bundle(path, tmp_path / "records")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "records").exists()


def test_an_export_that_fails_keeps_the_old_bundle(tmp_path):
    path = tmp_path / "bundle.jsonl"
    export_bundle([toy_record()], path)
    before = path.read_text()

    def records():
        yield toy_record(toy_spec(2))
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        export_bundle(records(), path)
    assert path.read_text() == before


# The commit


def git(folder, *words):
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(folder), *named, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit_all(folder):
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "start")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A checkout with a package of two files and a page beside it."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "LOCALGPT_"))]:
        monkeypatch.delenv(name)
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    for file in (package / "runs.py", package / "model.py", package.parent / "README.md"):
        file.write_text("one\n")
    return package


def test_the_commit_is_that_of_the_repository_that_tracks_the_package(package):
    commit = commit_all(package.parent)
    assert code_version(package / "runs.py") == {"git_commit": commit, "git_dirty": False}
    (package.parent / "README.md").write_text("two\n")
    assert code_version(package / "runs.py") == {"git_commit": commit, "git_dirty": False}
    (package / "model.py").write_text("two\n")
    assert code_version(package / "runs.py") == {"git_commit": commit, "git_dirty": True}


def test_a_file_that_is_added_to_the_package_is_a_change(package):
    commit = commit_all(package.parent)
    (package / "new.py").write_text("one\n")
    assert code_version(package / "runs.py") == {"git_commit": commit, "git_dirty": True}


@pytest.mark.parametrize("ignored", [True, False])
def test_a_repository_around_an_installed_package_is_not_named(package, ignored):
    commit_all(package.parent)
    if ignored:
        (package.parent / ".gitignore").write_text(".venv\n")
    installed = package.parent / ".venv" / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "runs.py").write_text("one\n")
    assert code_version(installed / "runs.py") == {"git_commit": None, "git_dirty": None}


def test_a_repository_of_the_environment_is_not_named(package, tmp_path, monkeypatch):
    other = tmp_path / "other"
    (other / "package").mkdir(parents=True)
    (other / "package" / "runs.py").write_text("other\n")
    wrong = commit_all(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert code_version(package / "runs.py") == {"git_commit": None, "git_dirty": None}
    with monkeypatch.context() as patch:
        patch.delenv("GIT_DIR")
        patch.delenv("GIT_WORK_TREE")
        commit = commit_all(package.parent)
    assert commit != wrong
    assert code_version(package / "runs.py") == {"git_commit": commit, "git_dirty": False}


def test_without_a_repository_the_environment_may_name_the_commit(package, monkeypatch):
    monkeypatch.setenv("LOCALGPT_COMMIT", "0123456789abcdef" * 2 + "01234567")
    assert code_version(package / "runs.py") == {
        "git_commit": "0123456789abcdef" * 2 + "01234567",
        "git_dirty": None,
    }
    commit = commit_all(package.parent)
    assert code_version(package / "runs.py") == {"git_commit": commit, "git_dirty": False}


@pytest.mark.parametrize("named", ["", "main", "0" * 39, "0" * 41, "g" * 40, "0" * 40 + "\n"])
def test_another_name_for_the_commit_is_refused_before_anything_is_trained(package, monkeypatch, named):
    monkeypatch.setenv("LOCALGPT_COMMIT", named)
    monkeypatch.setattr(runs, "PACKAGE", package / "runs.py")
    monkeypatch.setattr(runs, "train", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(ValueError, match="LOCALGPT_COMMIT=.*: must be the 40 hexadecimal digits of a commit"):
        execute(toy_spec(), toy_corpus())


def test_a_record_names_the_commit_that_the_environment_names(package, monkeypatch):
    monkeypatch.setenv("LOCALGPT_COMMIT", "a" * 40)
    monkeypatch.setattr(runs, "PACKAGE", package / "runs.py")
    record, _ = execute(toy_spec(), toy_corpus())
    assert (record.provenance["git_commit"], record.provenance["git_dirty"]) == ("a" * 40, None)


# What the fields of a record are taken from


def test_a_record_has_the_numbers_of_its_run(monkeypatch):
    losses = iter([3.5, 2.5, 3.0, 2.0, 2.75])
    monkeypatch.setattr(run_state, "evaluation", lambda *args: (next(losses), 0.0))
    spec = dataclasses.replace(toy_spec(method="dfa"), train=toy_train(anchor_interval=7))
    record, result = execute(spec, toy_corpus())
    assert (record.final_val_loss, record.best_val_loss) == (2.75, 2.0)
    assert record.curves == result.curves and record.curves["val_loss"] == [3.5, 2.5, 3.0, 2.0, 2.75]
    for name in ("wall_time_s", "tokens_per_s", "peak_memory_mib", "flops_per_token", "anchor_steps"):
        assert getattr(record, name) == getattr(result, name), name
    assert record.anchor_steps == 2 and record.wall_time_s != record.tokens_per_s > 0


@pytest.mark.parametrize("end, best", [(2.75, 2.75), (math.nan, None)])
def test_the_best_loss_is_of_what_was_measured_as_the_last_one_is(monkeypatch, end, best):
    losses = iter([3.5, 2.5, 3.0, 2.0, end])
    monkeypatch.setattr(run_state, "evaluation", lambda *args: (next(losses), 0.0))
    spec = dataclasses.replace(toy_spec(), train=toy_train(eval_between=1))
    record, _ = execute(spec, toy_corpus())
    kept = RunRecord.from_json(record.to_json())
    assert kept.best_val_loss == best and kept.curves["val_loss"][:4] == [3.5, 2.5, 3.0, 2.0]
    values = json.loads(record.to_json()) | {"best_val_loss": 2.0}
    with pytest.raises(ValueError, match=r"best_val_loss=2.0: the last of its curve is (2.75|None)"):
        RunRecord.from_json(json.dumps(values))


def test_a_run_that_broke_down_took_time_and_measured_nothing(monkeypatch):
    def fail(*args):
        raise MemoryError("no memory left")

    monkeypatch.setattr(run_state, "training_step", fail)
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=iter([10.0, 14.5]).__next__))
    record, _ = execute(toy_spec(), toy_corpus())
    assert (record.status, record.wall_time_s) == ("failed", 4.5)
    assert record.best_val_loss is record.tokens_per_s is record.flops_per_token is None
    assert record.parameters == record.curves == record.diagnostics == {}


def test_the_sample_is_what_the_trained_model_writes_after_a_line_break():
    record, result = execute(toy_spec(), toy_corpus())
    vocabulary = toy_corpus().vocabulary
    assert record.sample == sample_text(result.model, vocabulary, "\n", 300, seed=0, temperature=0.8)
    assert record.sample[0] == "\n" and len(record.sample) == 301
    assert record.sample != sample_text(result.model, vocabulary, "\n", 300, seed=1, temperature=0.8)


def test_start_and_end_are_before_and_after_the_training(monkeypatch):
    hours = iter(range(24))
    now = lambda zone: datetime(2026, 1, 1, next(hours), tzinfo=zone)  # noqa: E731
    monkeypatch.setattr(runs, "datetime", SimpleNamespace(now=now))
    original = runs.train
    monkeypatch.setattr(runs, "train", lambda *args, **options: now(UTC) and original(*args, **options))
    spec = dataclasses.replace(toy_spec(), train=toy_train(steps=1))
    provenance = execute(spec, toy_corpus())[0].provenance
    assert provenance["start"] == "2026-01-01T00:00:00+00:00"
    assert provenance["end"] == "2026-01-01T02:00:00+00:00"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_environment_is_that_of_the_device(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Toy CPU: 2 GHz\nmodel name\t: other\n")
    monkeypatch.setattr(sys.modules[environment.__module__], "Path", lambda name: tmp_path / Path(name).name)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    found = environment("cpu")
    assert (found["device"], found["device_type"], found["threads"]) == ("Toy CPU: 2 GHz", "cpu", 7)
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert (found["torch"], found["numpy"]) == (torch.__version__, np.__version__)
    assert found["python"].startswith(".".join(map(str, sys.version_info[:3])))
    monkeypatch.setattr(runs, "environment", lambda device: {"device": f"that of {device}"})
    record, _ = execute(
        dataclasses.replace(toy_spec(), train=toy_train(steps=1)), toy_corpus(), device="cpu:0"
    )
    assert record.environment == {"device": "that of cpu:0"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    found = environment("cuda:1")
    assert (found["device"], found["device_type"]) == ("GPU 1", "cuda")


# Nothing that was computed is lost


def text_corpus(text):
    return Corpus("toy", text, "".join(sorted(set(text))))


def test_a_text_without_a_line_break_has_a_sample():
    corpus = text_corpus("ACGTTGCA" * 30)
    spec = RunSpec(toy_model(vocab_size=4), toy_train(steps=2), "toy", corpus.sha256)
    record, result = execute(spec, corpus)
    assert record.status == "finished" and record.sample[0] == "A" and len(record.sample) == 301
    assert record.sample == sample_text(result.model, "ACGT", "A")


@pytest.mark.parametrize("failure", [ValueError("no"), RuntimeError("no"), KeyError("no")], ids=repr)
def test_a_sample_that_fails_costs_no_record(monkeypatch, failure):
    def fail(*args, **options):
        raise failure

    monkeypatch.setattr(runs, "sample_text", fail)
    record, _ = execute(toy_spec(), toy_corpus())
    assert (record.status, record.sample) == ("finished", "")
    assert record.error.startswith(f"no sample: {type(failure).__name__}: ")
    assert record.final_val_loss == record.curves["val_loss"][-1]


def test_a_record_is_there_before_its_sample_is_made(monkeypatch, tmp_path):
    def press(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "sample_text", press)
    with pytest.raises(KeyboardInterrupt):
        execute(toy_spec(), toy_corpus(), out=tmp_path)
    record = read_record(tmp_path / f"{toy_spec().digest}.json")
    assert (record.status, record.sample, record.error) == ("finished", "", "")
    assert {"start", "end", "command"} <= record.provenance.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "a/b"}, "suite='a/b': must be a plain name"),
        ({"suite": "."}, "suite='.': must be a plain name"),
        ({"out": "file"}, "out='file/.*json': cannot be written"),
    ],
)
def test_what_no_record_can_hold_is_refused_before_anything_is_trained(
    monkeypatch, tmp_path, changes, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    monkeypatch.setattr(runs, "train", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        execute(toy_spec(), toy_corpus(), **changes)


def test_a_failure_of_any_kind_is_a_record_and_an_error_of_a_file_is_not(monkeypatch):
    def fail(*args):
        raise failure

    monkeypatch.setattr(run_state, "training_step", fail)
    for failure in (ValueError("of a library"), IndexError("out of range")):
        record, _ = execute(toy_spec(), toy_corpus())
        assert (record.status, record.error) == ("failed", f"{type(failure).__name__}: {failure}")
    failure = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        execute(toy_spec(), toy_corpus())


# Files as they are in the world


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints/abc-checkpoint.json", ".git/x.json", "._abc.json", "a/.b/c/d.json"]
)
def test_what_is_hidden_is_no_record_and_no_problem(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")
    hidden = folder / ".hidden" / f"{toy_spec(9).digest}.json"
    toy_record(toy_spec(9)).write(hidden.parent)
    assert load_records(folder, pytest.fail).keys() == good_digests()
    # The folder that is asked for may be hidden itself.
    assert load_records(hidden.parent, pytest.fail).keys() == {toy_spec(9).digest}


def test_a_folder_named_like_a_record_is_none(folder):
    (folder / "a" / "abc.json").mkdir()
    assert load_records(folder, pytest.fail).keys() == good_digests()


def test_a_byte_order_mark_and_line_ends_of_windows_change_no_record(folder, tmp_path):
    bundle = tmp_path / "bundle.jsonl"
    records = load_records(folder)
    export_bundle(records.values(), bundle)
    bundle.write_bytes(b"\xef\xbb\xbf" + bundle.read_bytes().replace(b"\n", b"\r\n"))
    assert len(import_bundle(bundle, tmp_path / "new", pytest.fail)) == 3
    assert load_records(tmp_path / "new", pytest.fail) == records
    for path in (tmp_path / "new").rglob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_records(tmp_path / "new", pytest.fail) == records


def test_a_line_separator_within_a_record_ends_no_line_of_a_bundle(tmp_path):
    record = toy_record(sample="a\u2028b\x85c")
    text = json.dumps(json.loads(record.to_json()), ensure_ascii=False)
    (tmp_path / "bundle.jsonl").write_text(text + "\n", encoding="utf-8")
    (path,) = import_bundle(tmp_path / "bundle.jsonl", tmp_path / "new", pytest.fail)
    assert read_record(path) == record


@pytest.mark.parametrize(
    "change",
    [
        {"final_val_loss": "2.5"},
        {"curves": []},
        {"curves": {"val_loss": "2.5"}},
        {"curves": {"val_loss": ["2.5"]}},
        {"environment": None},
        {"arm": 5},
        {"seed": 2},
        {"seed": "1"},
        {"diagnostics": [1]},
    ],
    ids=str,
)
def test_a_record_with_a_field_of_another_kind_is_refused(folder, change):
    (name,) = change
    path = folder / "a" / f"{toy_spec(9).digest}.json"
    path.write_text(json.dumps({**json.loads(toy_record(toy_spec(9)).to_json()), **change}))
    assert_refused_and_the_rest_loaded(folder, path)
    with pytest.raises(ValueError, match=f"{name}="):
        read_record(path)


def test_a_record_nested_too_deep_is_refused(folder):
    path = folder / "a" / f"{toy_spec(9).digest}.json"
    path.write_text("[" * 200000)
    assert_refused_and_the_rest_loaded(folder, path)


# ------------------------------------------------------------------- whole, of one rank, from a regular file


def test_a_record_carries_a_checksum_of_all_the_rest(tmp_path):
    record = toy_record()
    values = json.loads(record.to_json())
    kept = values.pop("sha256")
    assert kept == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    assert RunRecord.from_json(json.dumps(values)) == record  # as one of old
    for changed in ({"sample": "a weed"}, {"arm": "b"}, {"environment": {}}):
        with pytest.raises(ValueError, match="sha256=.*: is not that of its content"):
            RunRecord.from_json(json.dumps(values | changed | {"sha256": kept}))


def test_every_flipped_bit_of_a_record_is_noticed(tmp_path):
    path = toy_record().write(tmp_path)
    data = path.read_bytes()
    for place in range(0, len(data) - 1, 7):
        flipped = bytes([data[place] ^ 1 << place % 7])
        path.write_bytes(data[:place] + flipped + data[place + 1 :])
        with pytest.raises(ValueError, match=path.name):
            read_record(path)


@pytest.mark.parametrize("kept", ["failed", "diverged", "finished"])
@pytest.mark.parametrize("later", ["failed", "diverged", "finished"])
def test_a_record_that_says_more_stays(tmp_path, kept, later):
    order = ["failed", "diverged", "finished"]
    path = toy_record(status=kept, **of_status(kept)).write(tmp_path)
    assert toy_record(status=later, **of_status(later), suite="later").write(tmp_path) == path
    stays = order.index(kept) > order.index(later)
    assert read_record(path).suite == ("toys" if stays else "later")


def of_status(status):
    if status != "diverged":
        return {}
    curves = toy_curves(toy_spec(), None, 2.25)
    return {"final_val_loss": None, "best_val_loss": 2.25, "curves": curves}


def test_a_damaged_record_is_replaced_by_any_other(tmp_path):
    path = toy_record().write(tmp_path)
    path.write_text("{")
    toy_record(status="failed").write(tmp_path)
    assert read_record(path).status == "failed"


ODD_NAMES = {
    "suite": ["..", ".", "a/b", "a\0b", "-", " ", "x" * 101, "\u2028", "<b>", "é\n"],
    "arm": ["a\0b", "x" * 201, "\x1b[31m", "a\nb", "\u2028"],
    "preset": ["\t", "x" * 201],
}


@pytest.mark.parametrize("field, name", [(field, name) for field in ODD_NAMES for name in ODD_NAMES[field]])
def test_names_that_no_folder_or_table_can_have_are_refused(field, name):
    with pytest.raises(ValueError, match=f"^{field}="):
        toy_record(**{field: name})


def test_names_of_suites_and_arms_may_be_of_any_script():
    record = toy_record(suite="первый опыт-1.2 (a, b=c)", arm="<bp> ≤ 3e-3 $x_1$")
    assert RunRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    "change", [{"seed": 10**400}, {"wall_time_s": 10**30}, {"arm": "\ud800"}, {"sample": "\udfff"}]
)
def test_what_nothing_could_compute_or_write_is_refused(change):
    text = json.dumps(json.loads(toy_record().to_json()) | change)
    with pytest.raises(ValueError, match="is not JSON .*(integer of|half a character)"):
        RunRecord.from_json(text)


def test_one_bad_line_of_a_bundle_costs_that_line_only(tmp_path):
    good, other = toy_record(), toy_record(toy_spec(2), sample="one\u2028two")
    odd = json.loads(good.to_json())
    lines = [
        good.to_json().encode(),
        b"\xff\xfe",
        json.dumps(odd | {"suite": "a\0b"}).encode(),
        json.dumps(odd | {"suite": "x" * 300}).encode(),
        json.dumps(odd | {"suite": "\ud800"}).encode(),
        json.dumps(odd | {"seed": 10**400}).encode(),
        b"[" * 100_000,
        json.dumps(json.loads(other.to_json()), ensure_ascii=False).encode(),
    ]
    path = tmp_path / "bundle.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b"\n".join(lines) + b"\n")
    problems = []
    written = import_bundle(path, tmp_path / "records", problems.append)
    assert {read_record(p).digest for p in written} == {good.digest, other.digest}
    assert [re.search(r"line (\d)", problem)[1] for problem in problems] == [*"234567"]


def test_a_pipe_a_device_and_a_huge_file_are_no_records(tmp_path, monkeypatch):
    kept = toy_record().write(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    monkeypatch.setattr("localgpt_core.records.record.LARGEST_RECORD", kept.stat().st_size)
    (tmp_path / "huge.json").write_bytes(kept.read_bytes() + b" ")
    problems = []
    assert [*load_records(tmp_path, problems.append)] == [kept.stem]
    assert [re.search(r"no regular file|has \d+ bytes", problem)[0][:2] for problem in problems] == [
        "no",
        "ha",
        "no",
    ]
    with pytest.raises(ValueError, match="is no regular file"):
        import_bundle(tmp_path / "pipe.json", tmp_path / "other")
