"""`localgpt plot`: recorded curves in letters and as a PNG."""

import dataclasses
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from toys import toy_record, toy_spec

from localgpt_core.cli.plots import drawing_library, drawn, floors_passed
from localgpt_core.records import read_record
from localgpt_core.report.results import load_results
from localgpt_core.report.runs import asked_for, curves_of


@pytest.fixture
def runs(folder):
    """Write three runs of two rules: bp ends at 2.0 and 2.5 with two seeds, fa at 3.0."""
    made = [(1, "bp", 2.0), (2, "bp", 2.5), (1, "fa", 3.0)]
    records = [toy_record(toy_spec(seed, method=m), suite="", final_val_loss=loss) for seed, m, loss in made]
    for record in records:
        record.write("runs")
    return {record.digest: record for record in records}


def rows(drawing):
    """Return the rows of the field of a drawing, without its frame."""
    framed = [line.replace("┤", "│").split("│") for line in drawing.splitlines()]
    return [parts[1] for parts in framed if len(parts) == 3]


def test_a_drawing_goes_from_the_first_loss_to_the_last():
    drawing = drawn({"a run": ([0, 10, 20, 30], [9.0, 4.0, 3.0, 1.0])}, "nats")
    field = rows(drawing)
    assert max(map(len, drawing.splitlines())) <= 80 and "\x1b" not in drawing
    assert "a run" in field[0] and drawing.splitlines()[1].startswith(
        "4.0"
    )  # the untrained model is left out
    last = [line for line in drawing.splitlines() if line.startswith("1.0")]
    assert len(last) == 1 and rows(last[0])[0].rstrip()[-1] != " " and len(rows(last[0])[0].rstrip()) > 70
    assert "30" in drawing.splitlines()[-2] and drawing.splitlines()[-1].split() == ["nats", "step"]


def test_several_curves_have_letters():
    field = rows(drawn({"high": ([5, 10], [4.0, 4.0]), "low": ([5, 10], [1.0, 1.0])}, "nats"))
    assert "a high" in field[0] and "b low" in "".join(field)
    assert set(field[-1].strip()) == {"b"} and field[0].endswith("aaaa")


def test_a_narrow_terminal_has_narrow_curves(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, drawn({"a": ([1, 2], [2.0, 1.0])}, "nats").splitlines())) <= 40


def test_an_encoding_without_frames_gets_plain_ones(monkeypatch):
    class Ascii:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Ascii)
    drawing = drawn({"a": ([1, 2], [2.0, 1.0])}, "nats")
    assert drawing.isascii() and "*" in drawing and "|" in drawing


@pytest.mark.parametrize("pairs", [{}, {"a": ([], [])}])
def test_without_points_nothing_is_drawn(pairs):
    assert drawn(pairs, "nats") == ""


def test_floors_are_passed_or_not():
    orders = {"uniform": 3.0, "unigram": 2.0, "bigram": 1.0}
    assert (
        floors_passed(2.0, orders)
        == "below the n-gram floors uniform 3.000; not below unigram 2.000, bigram 1.000"
    )
    assert floors_passed(0.5, orders) == "below the n-gram floors uniform 3.000, unigram 2.000, bigram 1.000"
    assert floors_passed(4.0, {"uniform": 3.0}) == "below no n-gram floor; not below uniform 3.000"


def test_runs_are_asked_for_by_digest_file_or_suite(cli, runs):
    first, second, third = runs
    asked = [first[:8], f"runs/{third}.json"]
    assert asked_for(asked, runs) == ([("bp", runs[first]), ("fa", runs[third])], "cpu", 0)
    table = curves_of([("bp", runs[first]), ("bp", runs[second]), ("fa", runs[third])])
    assert table["label"].unique().tolist() == ["bp", "fa"]
    ends = table[table["step"] == 20].set_index(["label", "seed"])["val_loss"].to_dict()
    assert ends == {("bp", 1): 2.0, ("bp", 2): 2.5, ("fa", 1): 3.0}
    other = toy_record(toy_spec(1, n_embd=16), suite="")
    named = curves_of([("bp", runs[first]), ("bp", other)])["label"].unique().tolist()
    assert named == ["bp (n_embd=8)", "bp (n_embd=16)"]
    assert cli("run", "suite.toml", "--records", "records")[0] == 0
    status, out, _ = cli("plot", "suite.toml", "--records", "records")
    assert status == 0 and "a bp" in out and "b frozen" in out


def on(record, device):
    return dataclasses.replace(record, environment={**record.environment, "device_type": device})


def test_a_suite_is_drawn_by_the_runs_that_its_tables_show_and_the_others_are_said(cli):
    assert cli("run", "suite.toml")[0] == 0
    paths = {read_record(path).arm: path for path in Path("book/records").rglob("*.json")}
    on(read_record(paths["bp"]), "cuda").write(paths["bp"].parent)
    others = "1 made on another kind of device than {} and not shown"
    for words, device, arm in (([], "cpu", "frozen"), (["--device", "cuda"], "cuda", "bp")):
        table = load_results("suite.toml", device=device if words else None)
        assert [*table.runs["arm"]] == [arm] and others.format(device) in table.origin()
        other = {"cpu": "cuda", "cuda": "cpu"}[device]
        status, out, err = cli("plot", "suite.toml", *words)
        assert status == 0 and ({"bp", "frozen"} & {*out.split()}) == {arm}
        assert err == f"{others.format(device)}; --device {other} draws them\n"
    on(read_record(paths["frozen"]), "cuda").write(paths["bp"].parent)
    status, out, err = cli("plot", "suite.toml")
    assert (status, out) == (2, "") and load_results("suite.toml").runs.empty
    assert err.startswith("2 made on another kind") and "has no such record" in err.splitlines()[1]
    status, out, err = cli("plot", "suite.toml", "--device", "cuda")
    assert status == 0 and "a bp" in out and "b frozen" in out and err == ""


def test_records_are_drawn_with_those_of_the_kind_of_the_first(cli, runs):
    first, second, third = runs
    on(runs[second], "cuda").write("runs")
    mixed = runs | {second: on(runs[second], "cuda")}
    assert asked_for([first, second, third], mixed) == ([("bp", runs[first]), ("fa", runs[third])], "cpu", 1)
    assert asked_for([second, first, third], mixed) == ([("bp", mixed[second])], "cuda", 2)
    assert asked_for([second], mixed, device="cpu") == ([], "cpu", 1)
    status, out, err = cli("plot", second, f"runs/{third}.json", "--records", "runs")
    assert status == 0 and "bp" in out and "fa" not in out
    assert err == "1 made on another kind of device than cuda and not shown; --device cpu draws them\n"
    assert cli("plot", first, third, "--records", "runs")[::2] == (0, "")


def test_the_mean_over_seeds_is_drawn_in_letters(cli, runs):
    status, out, _ = cli("plot", "--records", "runs")
    assert status == 0 and "a bp" in out and "b fa" in out
    levels = {line.split("┤")[0].strip(): line for line in out.splitlines() if "┤" in line}
    assert min(map(float, levels)) == 2.12  # the lowest means are those of 2.0 and 2.25, in the middle
    assert max(map(float, levels)) == 3.0


def test_a_png_shows_every_seed_and_the_floors(cli, runs, monkeypatch):
    seen = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: seen.append((figure, path)))
    status, out, err = cli("plot", "--records", "runs", "--out", "curves.png")
    assert status == 0, err
    ((figure, path),) = seen
    assert path == Path("curves.png") and out == "3 runs: curves.png\n"
    (ax,) = figure.axes
    by_label = {line.get_label(): line for line in ax.lines}
    assert {"bp (n = 2)", "fa (n = 1)"} <= by_label.keys()
    assert by_label["bp (n = 2)"].get_ydata()[-1] == 2.25 and by_label["bp (n = 2)"].get_xdata()[0] == 5
    thin = [line for line in ax.lines if line.get_linewidth() == 0.6]
    assert sorted(line.get_ydata()[-1] for line in thin) == [2.0, 2.5, 3.0]
    plt.close("all")


def test_a_png_is_written_and_not_overwritten(cli, runs):
    assert cli("plot", "--records", "runs", "--out", "a.png")[0] == 0
    written = Path("a.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    status, _, err = cli("plot", "--records", "runs", "--out", "a.png")
    assert status == 2 and "--overwrite" in err and Path("a.png").read_bytes() == written
    assert cli("plot", "--records", "runs", "--out", "a.png", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (["zz"], "digest='zz': 0 of 3 records match"),
        ([""], "digest='': 3 of 3 records match"),
        (["none.json"], "none.json"),
        (["none.toml"], "none.toml"),
        (["--out", "a.pdf"], "out='a.pdf': must end in .png"),
        (["--records", "none"], "records='none'"),
        (["--device", "gpu"], "device='gpu': allowed are 'cpu', 'cuda'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(cli, runs, options, words):
    status, out, err = cli("plot", "--records", "runs", *options)
    assert (status, out) == (2, "") and words in err and err.count("\n") == 1


def test_without_plotext_a_png_can_still_be_drawn(cli, runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotext", None)
    assert drawing_library() is None and drawn({"a": ([1, 2], [2.0, 1.0])}, "nats") == ""
    status, _, err = cli("plot", "--records", "runs")
    assert status == 2 and "needs plotext" in err
    assert cli("plot", "--records", "runs", "--out", "a.png")[0] == 0
