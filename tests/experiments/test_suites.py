import dataclasses
import os
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from toys import toy_corpus, toy_record, toy_spec

from localgpt_core.common.validation import Refusal
from localgpt_core.config import PRESETS
from localgpt_core.corpus import load_corpus
from localgpt_core.corpus.corpus import SHA256
from localgpt_core.corpus.recall import HOPS
from localgpt_core.experiments.scheduler import missing_runs
from localgpt_core.experiments.suites import as_toml, read_config, read_suite, write_suite
from localgpt_core.records import load_records, read_record
from localgpt_core.records.specs import resolve_spec

BOOK = Path(__file__).parents[2] / "book"

SUITE = """
question = "Which?"
preset = "tiny"
seeds = [3, 1]
corpus = "toy"
model = { n_layer = 1, bias = true }
train = { steps = 5, lr = 2e-3 }

[arms.plain]

[arms.fa]
label = "feedback alignment"
model = { method = "fa", bias = false }
train = { lr = 1 }

[arms.control]
train = { freeze_body = true }
seeds = [2, 3]
"""


def write(tmp_path, text):
    path = tmp_path / "my-suite.toml"
    path.write_text(text)
    return path


def replaced(old, new):
    assert SUITE.count(old) == 1
    return SUITE.replace(old, new)


# Reading


def test_an_arm_may_have_a_corpus_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "cache"))
    arm = 'corpus = "recall-2"\nmodel = { block_size = 13 }\n[arms.control]'
    suite = read_suite(write(tmp_path, replaced("[arms.control]", f"[arms.two]\n{arm}")))
    assert [each.corpus for each in suite.arms] == ["", "", "recall-2", ""]
    for run in suite.plan(toy_corpus()):
        own = run.arm.name == "two"
        assert run.corpus is toy_corpus() or own and run.corpus.name == "recall-2"
        assert (run.spec.corpus, run.spec.corpus_sha256) == (run.corpus.name, run.corpus.sha256)
        assert run.spec.model.vocab_size == (8 if own else toy_corpus().vocab_size)


def test_a_suite_says_what_the_file_says(tmp_path):
    path = write(tmp_path, SUITE)
    suite = read_suite(path)
    assert (suite.name, suite.path, suite.question) == ("my-suite", path, "Which?")
    assert (suite.preset, suite.corpus) == ("tiny", "toy")
    plain, fa, control = suite.arms
    assert [arm.name for arm in suite.arms] == ["plain", "fa", "control"]
    assert [arm.label for arm in suite.arms] == ["plain", "feedback alignment", "control"]
    assert [arm.seeds for arm in suite.arms] == [(3, 1), (3, 1), (2, 3)]
    assert plain.model == control.model == {"n_layer": 1, "bias": True}
    assert fa.model == {"n_layer": 1, "bias": False, "method": "fa"}
    assert plain.train == {"steps": 5, "lr": 2e-3}
    assert fa.train == {"steps": 5, "lr": 1}
    assert control.train == {"steps": 5, "lr": 2e-3, "freeze_body": True}


def test_a_short_suite_has_the_default_corpus(tmp_path):
    suite = read_suite(write(tmp_path, 'question = "?"\npreset = "cpu"\nseeds = [0]\n[arms.a]\n'))
    assert suite.corpus == "shakespeare"
    assert suite.arms[0].label == "a" and suite.arms[0].model == suite.arms[0].train == {}


# What is replaced, by what, and what the message says.
REFUSED = {
    "no TOML": ("[arms.plain]", "[arms.plain", "is not TOML"),
    "unknown key": (
        'corpus = "toy"',
        'corpora = "toy"',
        "key='corpora': allowed are arms, claims, corpus, diag",
    ),
    "unknown key of an arm": ("seeds = [2, 3]", "seed = 2", "arm 'control': key='seed': allowed are corp"),
    "corpus of an arm": (
        "seeds = [2, 3]",
        'corpus = "own.txt"',
        "arm 'control': corpus='own.txt': allowed are",
    ),
    "no question": ('question = "Which?"', "", "key='question': is missing"),
    "no preset": ('preset = "tiny"', "", "key='preset': is missing"),
    "no seeds": ("seeds = [3, 1]", "", "key='seeds': is missing"),
    "question no text": ('question = "Which?"', "question = 5", "question=5: must be a string"),
    "unknown preset": ('preset = "tiny"', 'preset = "huge"', "preset='huge': allowed are 'tiny', 'cpu'"),
    "preset no text": ('preset = "tiny"', "preset = [1]", r"preset=\[1\]: allowed are"),
    "corpus no text": ('corpus = "toy"', "corpus = 5", "corpus=5: must be a string"),
    "model no table": ("model = { n_layer = 1, bias = true }", "model = 5", "model=5: must be a table"),
    "train no table": ("train = { steps = 5, lr = 2e-3 }", "train = 'x'", "train='x': must be a table"),
    "model of an arm no table": (
        'model = { method = "fa", bias = false }',
        "model = [1]",
        r"arm 'fa': model=\[1\]: must be a table",
    ),
    "train of an arm no table": ("train = { lr = 1 }", "train = 1", "arm 'fa': train=1: must be a table"),
    "label no text": ('label = "feedback alignment"', "label = 1", "arm 'fa': label=1: must be a string"),
    "arm no table": ("[arms.plain]", "[arms]\nplain = 5", "arm 'plain': key=5: must be a table"),
    "seed for every arm": ("steps = 5,", "seed = 5,", "key='seed': belongs into seeds"),
    "seed of an arm": ("lr = 1 }", "seed = 1 }", "arm 'fa': key='seed': belongs into seeds"),
    "seeds no list": ("seeds = [3, 1]", "seeds = 3", "seeds=3: must be a list of integers"),
    "seeds empty": ("seeds = [3, 1]", "seeds = []", r"seeds=\[\]: must be a list of integers"),
    "seeds no integers": ("seeds = [3, 1]", "seeds = [1.0]", r"seeds=\[1\.0\]: must be a list of integers"),
    "seeds logical": ("seeds = [3, 1]", "seeds = [true]", r"seeds=\[True\]: must be a list of integers"),
    "seeds negative": ("seeds = [3, 1]", "seeds = [-1]", r"seeds=\[-1\]: must be a list of integers"),
    "seeds twice": ("seeds = [2, 3]", "seeds = [2, 2]", r"seeds=\[2, 2\]: must not repeat"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_suite_is_refused_with_its_name_and_the_value(tmp_path, name):
    old, new, message = REFUSED[name]
    path = write(tmp_path, replaced(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_suite(path)
    assert str(caught.value).startswith(f"suite {path}")


@pytest.mark.parametrize("arms", ["", "arms = {}", "arms = 5", "arms = []"])
def test_a_suite_without_arms_is_refused(tmp_path, arms):
    path = write(tmp_path, f'question = "?"\npreset = "cpu"\nseeds = [0]\n{arms}\n')
    with pytest.raises(ValueError, match="key='arms': (is missing|must be a table of arms)"):
        read_suite(path)


def test_a_suite_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="suite .*missing.toml cannot be read: No such file"):
        read_suite(tmp_path / "missing.toml")
    with pytest.raises(ValueError, match="suite .* cannot be read"):
        read_suite(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="suite .*binary.toml is not TOML"):
        read_suite(tmp_path / "binary.toml")


DEEP = ".".join("a" * 5000)
HUGE = "9" * 400
UNREADABLE = {
    "a nested list": ("seeds = [3, 1]", "seeds = " + "[" * 5000, "is not TOML"),
    "a nested table": ("lr = 2e-3", f"{DEEP} = 1", "tables and lists.*at most 16 in each other"),
    "400 digits": ("lr = 2e-3", f"lr = {HUGE}", "an integer has at most 20 digits"),
    "5,000 digits": ("lr = 2e-3", "lr = " + "9" * 5000, "is not TOML"),
    "a seed of 21 digits": ("seeds = [3, 1]", f"seeds = [-1{'0' * 20}]", "an integer has at most 20 digits"),
    "a seed too large": (
        "seeds = [3, 1]",
        f"seeds = [{2**64}]",
        "at least 0 and at most 18446744073709551615",
    ),
    "10,001 runs": ("seeds = [3, 1]", f"seeds = {[*range(9_999)]}", "arms=3: at most 10000 runs"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_no_suite_is_is_refused_at_once(tmp_path, name):
    old, new, message = UNREADABLE[name]
    path = write(tmp_path, replaced(old, new))
    with pytest.raises(Refusal, match=message) as caught:
        read_suite(path)
    assert str(caught.value).startswith(f"suite {path}")


@pytest.mark.parametrize("read", [read_suite, read_config])
def test_a_suite_is_a_regular_file_of_a_size_that_one_can_have(tmp_path, read):
    path = tmp_path / "suite.toml"
    os.mkfifo(path)
    with pytest.raises(Refusal, match=f"{path} cannot be read: is no regular file"):
        read(path)
    with pytest.raises(Refusal, match="/dev/zero cannot be read: is no regular file"):
        read("/dev/zero")
    path.unlink()
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(Refusal, match="cannot be read: has 1048577 bytes, more than 1048576"):
        read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_layer", 10**10), ("n_embd", 10**12), ("block_size", 10**9), ("vq_codes", 10**9), ("lr", 10**19)]
    + [("batch_size", 10**10), ("steps", 10**13), ("vocab_size", 2**21), ("eval_iters", 10**13)],
)
def test_a_size_that_no_machine_holds_is_refused_by_its_field(tmp_path, field, value):
    table = "train" if field in ("lr", "batch_size", "steps", "eval_iters") else "model"
    arm = f"[arms.a]\n{table} = {{ {field} = {value} }}\n"
    path = write(tmp_path, f'question = "?"\npreset = "cpu"\nseeds = [0]\n{arm}')
    if field == "lr":  # a large rate diverges, and is one
        assert read_suite(path).plan(toy_corpus())[0].spec.train.lr == 1e19
        return
    with pytest.raises(Refusal, match=f"arm 'a': {field}={value}: .* and at most "):
        read_suite(path).plan(toy_corpus())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bias = false", "biases = false", "arm 'fa': field='biases': allowed are attn_mode, bias"),
        ("freeze_body = true", "freeze = true", "arm 'control': field='freeze': allowed are anchor_interval"),
        ("bias = false", "bias = 0", "arm 'fa': bias=0: must be true or false"),
        ("lr = 1 }", 'lr = "1" }', "arm 'fa': lr='1': must be a number"),
        ("lr = 1 }", "lr = -1 }", "arm 'fa': lr=-1.0: must be positive"),
        ('method = "fa"', 'method = "fb"', "arm 'fa': method='fb': allowed are"),
        ('method = "fa"', "n_embd = 31", "arm 'fa': n_embd=31: must be divisible by n_head=2"),
    ],
)
def test_a_plan_names_the_arm_with_a_wrong_field(tmp_path, old, new, message):
    path = write(tmp_path, replaced(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_suite(path).plan(toy_corpus())
    assert str(caught.value).startswith(f"suite {path}")


# Planning


def test_the_plan_goes_seed_by_seed(tmp_path):
    corpus = toy_corpus()
    plan = read_suite(write(tmp_path, SUITE)).plan(corpus)
    assert [(run.spec.seed, run.arm.name) for run in plan] == [
        (3, "plain"),
        (3, "fa"),
        (3, "control"),
        (1, "plain"),
        (1, "fa"),
        (2, "control"),
    ]
    model, train = {"n_layer": 1, "bias": False, "method": "fa"}, {"steps": 5, "lr": 1.0, "seed": 3}
    assert plan[1].spec == resolve_spec("tiny", model, train, corpus)
    assert len({run.spec.digest for run in plan}) == 6


def test_another_preset_makes_other_runs(tmp_path):
    suite = read_suite(write(tmp_path, SUITE))
    for name, (model, train) in PRESETS.items():
        spec = suite.plan(toy_corpus(), name)[0].spec
        assert (spec.model.n_embd, spec.model.n_layer) == (model["n_embd"], 1)
        assert (spec.train.batch_size, spec.train.steps) == (train["batch_size"], 5)
    with pytest.raises(ValueError, match="preset='huge': allowed are 'tiny', 'cpu', 'gpu'"):
        suite.plan(toy_corpus(), "huge")


def test_only_runs_without_a_record_are_missing_and_broken_ones_are_tried_again(tmp_path):
    plan = read_suite(write(tmp_path, SUITE)).plan(toy_corpus())
    broken = {"final_val_loss": None, "best_val_loss": None, "curves": {}}
    states = {0: {}, 1: {"status": "diverged", "final_val_loss": None}, 2: {"status": "failed", **broken}}
    for index, changes in states.items():
        toy_record(plan[index].spec, suite="another suite", **changes).write(tmp_path / "another suite")
    toy_record(toy_spec(9)).write(tmp_path)
    assert missing_runs(plan, load_records(tmp_path)) == plan[2:]
    assert missing_runs(plan, {}) == plan


# The book's suites and records

SUITES = sorted((BOOK / "suites").glob("*.toml"))
PLAYS = {name: SimpleNamespace(name=name, vocab_size=65, sha256=SHA256[name]) for name in SHA256}
CORPORA = PLAYS | {name: load_corpus(name) for name in HOPS}


def plans(path, preset=None):
    suite = read_suite(path)
    return suite.plan(CORPORA[suite.corpus], preset)


def test_the_book_has_suites():
    assert SUITES


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_of_the_book_can_be_planned(path):
    plan = plans(path)
    assert len({run.spec.digest for run in plan}) == len(plan) > 0
    assert "?" in read_suite(path).question


def test_every_record_of_the_book_is_valid_and_a_run_of_a_suite():
    planned = {}
    for preset in (None, *PRESETS):
        for path in SUITES:
            try:
                planned.update({run.spec.digest: run for run in plans(path, preset)})
            except ValueError:
                assert preset is not None, path  # an arm need not fit every preset
    problems = []
    for path in sorted((BOOK / "records").rglob("*.json")):
        record = read_record(path)
        if record.suite != path.parent.name:
            problems.append(f"{path.name} is in {path.parent.name}, made for suite {record.suite}")
        elif record.digest not in planned:
            problems.append(f"{path.name} ({record.suite}, {record.arm}): no suite has this run any more")
        elif planned[record.digest].spec != record.run_spec:
            problems.append(f"{path.name}: its spec is not the planned one")
    assert problems == []


def test_the_book_has_nothing_but_records_among_its_records():
    strange = [
        path.name
        for path in (BOOK / "records").rglob("*")
        if path.is_file() and path.suffix != ".json" and not path.name.endswith(".tmp")
    ]
    assert strange == []


def test_a_byte_order_mark_and_line_ends_of_windows_change_no_suite(tmp_path):
    text = 'question = "Which?"\npreset = "tiny"\nseeds = [1]\n[arms.bp]\nlabel = "é"\n'
    (tmp_path / "s.toml").write_bytes(text.encode())
    plain = read_suite(tmp_path / "s.toml")
    (tmp_path / "s.toml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_suite(tmp_path / "s.toml") == plain


@pytest.mark.parametrize(
    ("arm", "name"), [("a\\nb", "suite"), ("x" * 201, "suite"), ("fa", "what?"), ("fa", "s" * 101)]
)
def test_a_name_that_no_record_may_have_is_refused_before_a_run(tmp_path, arm, name):
    path = tmp_path / f"{name}.toml"
    path.write_text(f'question = "?"\npreset = "tiny"\nseeds = [1]\n[arms."{arm}"]\n')
    with pytest.raises(ValueError, match="must be (printable|a plain name)"):
        read_suite(path)


# Writing


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_that_is_written_is_the_same_suite(tmp_path, path):
    suite = read_suite(path)
    written = write_suite(suite, tmp_path / "new" / path.name)
    assert dataclasses.replace(written, path=path, claims=suite.claims) == suite
    assert write_suite(written, tmp_path / path.name).arms == suite.arms


@pytest.mark.parametrize(
    "value",
    [
        'a "quoted" \\ text, \t, \x00, \x7f, é and \N{CHERRIES}',
        True,
        [1, -2, 3e-4, 1e300, float("inf")],
        {"plain": 1, "two words": {"a.b": [False]}, "": "x"},
    ],
)
def test_what_is_written_as_toml_is_read_as_it_was(value):
    assert tomllib.loads(f"x = {as_toml(value)}") == {"x": value}
