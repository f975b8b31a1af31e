"""A suite, a text and records of one's own, outside of the book: results, tables and every figure of them."""

import dataclasses
from pathlib import Path

import matplotlib
import pytest
from toys import toy_record, toy_text

from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.corpus.ngrams import floors
from localgpt_core.experiments.scheduler import SuiteRun
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import load_records
from localgpt_core.report import (
    final_losses,
    layer_maps,
    load_results,
    loss_curves,
    loss_over,
    over_training,
    places_over_training,
    use_style,
)

matplotlib.use("Agg")

SUITE = """
question = "Which?"
preset = "tiny"
seeds = [1, 2]
corpus = "own.txt"
diagnose_every = 2
model = { n_layer = 1, n_head = 1, n_embd = 8, block_size = 8 }
train = { steps = 4, batch_size = 2, eval_interval = 2 }
[arms.plain]
label = "backprop"
[arms.mine]
model = { method = "fa", gated_blocks = true }
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a suite, its text and its runs, made as `localgpt run --records` makes them."""
    folder = tmp_path_factory.mktemp("somewhere")
    (folder / "mine.toml").write_text(SUITE)
    (folder / "own.txt").write_text(toy_text())
    suite = read_suite(folder / "mine.toml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALGPT_CACHE", str(folder / "cache"))
        corpus = load_corpus(str(folder / "own.txt"))
        SuiteRun(suite, corpus, folder / "kept", folder / "kept" / "mine").all(1, lambda text: None)
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.setenv("LOCALGPT_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    return place


def test_results_come_from_any_suite_text_and_folder(here, tmp_path, monkeypatch):
    found = load_results("mine.toml", records="kept")
    assert (len(found.runs), found.planned) == (4, 4)
    assert found.floors() == floors(load_corpus("own.txt"))
    assert found.origin().endswith("; localgpt run mine.toml")
    monkeypatch.chdir(tmp_path)
    elsewhere = load_results(here / "mine.toml", records=here / "kept", corpus=str(here / "own.txt"))
    assert elsewhere.runs.equals(found.runs)
    assert str(here) not in elsewhere.origin()
    given = load_results(
        str(here / "mine.toml"), records=str(here / "kept"), corpus=load_corpus(here / "own.txt")
    )
    assert given.frame().equals(found.frame())


def test_the_frame_has_the_numbers_of_the_table(here):
    found = load_results("mine.toml", records="kept")
    frame, table = found.frame(), found.table()
    assert frame["arm"].tolist() == table["arm"].tolist() == ["plain", "mine"]
    assert [f"{loss:.3f}" for loss in frame["final_val_loss"]] == table["final loss"].tolist()
    mean, half, n = found.final_loss("mine")
    assert frame.set_index("arm").loc["mine", ["final_val_loss", "half_width", "n"]].tolist() == [
        mean,
        half,
        n,
    ]


def test_every_figure_of_results_is_drawn_from_them(here, tmp_path):
    use_style()
    found = load_results("mine.toml", records="kept")
    arms, lines = list(found.labels), found.floors()
    figures = {
        "curves": loss_curves(found, arms, lines, x=["step", "tflops"]),
        "final": final_losses(found, arms, lines),
        "over": loss_over(found.with_fields("n_embd"), "n_embd", "width", lines),
        "training": over_training(found, arms, "total_cosine", "cosine"),
        "maps": layer_maps(found, arms, "cosine", "cosine"),
        "places": places_over_training(found, ["mine"], "gates", "gate"),
    }
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert [label.get_text() for label in figures["final"].axes[0].get_yticklabels()] == ["backprop", "mine"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda found: loss_curves(found, ["bp"], {}),
        lambda found: final_losses(found, ["bp"], {}),
        lambda found: over_training(found, ["bp"], "total_cosine", "cosine"),
        lambda found: layer_maps(found, ["bp"], "cosine", "cosine"),
        lambda found: places_over_training(found, ["bp"], "gates", "gate"),
        lambda found: found.compare("bp", "mine"),
        lambda found: found.gap_closed("mine", worst="plain"),
        lambda found: found.within("mine", "bp", 0.1),
        lambda found: found.label("bp"),
    ],
)
def test_an_arm_that_the_suite_does_not_have_is_named_with_those_it_has(here, ask):
    with pytest.raises(ValueError, match="arm='bp': allowed are plain, mine"):
        ask(load_results("mine.toml", records="kept"))


def test_what_is_not_there_is_named(here):
    with pytest.raises(ValueError, match="records='book/records': no such folder; records= says where"):
        load_results("mine.toml")
    with pytest.raises(ValueError, match="suite yours.toml cannot be read"):
        load_results("yours.toml", records="kept")
    with pytest.raises(ValueError, match="must be inside the checkout.*or give the path of a .toml file"):
        load_results("mine", records="kept")
    with pytest.raises(ValueError, match="corpus='nothing.txt'"):
        load_results(Path("mine.toml"), records="kept", corpus="nothing.txt")


def test_a_figure_that_cannot_be_drawn_says_what_it_needs(here):
    found = load_results("mine.toml", records="kept")
    with pytest.raises(ValueError, match="x='time': allowed are 'step', 'tflops', 'seconds'"):
        loss_curves(found, ["plain"], {}, x="time")
    with pytest.raises(ValueError, match="step_seconds=.*: has no seconds of a step of plain, mine"):
        loss_curves(found, ["plain", "mine"], {}, x=["step", "seconds"], step_seconds={"other": 0.1})


def test_a_run_that_broke_down_and_one_of_no_known_machine_are_results_too(here, tmp_path):
    for record in load_records("kept").values():
        dataclasses.replace(record, environment={}).write(tmp_path)
    (tmp_path / f"{record.digest}.json").unlink()
    toy_record(record.run_spec, status="failed").write(tmp_path)
    found = load_results("mine.toml", records=tmp_path)
    assert len(found.runs) == 4 and found.curves()["seed"].nunique() == 2
    assert found.frame()["not_finished"].sum() == 1
    assert " on toy and unknown; " in found.origin()
    assert final_losses(found, list(found.labels), {}).axes
    assert loss_curves(found, list(found.labels), {}).axes
