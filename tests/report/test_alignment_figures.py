"""Comparisons of arms, and the figures of what a rule did over training."""

import dataclasses

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from toys import toy_corpus, toy_curves, toy_record

from localgpt_core.evidence import Noise
from localgpt_core.experiments.suites import read_suite
from localgpt_core.report import alignment_figures, results
from localgpt_core.report import losses as figures
from localgpt_core.report.results import load_results
from localgpt_core.report.style import LINE, legend, name_points

matplotlib.use("Agg")

SUITE = """
question = "which?"
preset = "tiny"
seeds = [1, 2, 3]
diagnose_every = 10
train = { steps = 20 }
[arms.bp]
[arms."frozen body"]
train = { freeze_body = true }
[arms.fa]
model = { method = "fa" }
[arms.close]
model = { method = "kp" }
[arms.wild]
model = { method = "dfa" }
[arms.few]
model = { method = "wm" }
[arms.lost]
model = { method = "sign_sym" }
seeds = [1, 2, 3, 4]
"""
LOSSES = {
    "bp": (2.0, 2.1, 2.2),
    "frozen body": (3.0, 3.1, 3.2),
    "fa": (2.4, 2.61, 2.62),
    "close": (2.008, 2.11, 2.209),
    "wild": (2.0, None, 2.0),
    "few": (2.5, 2.6),
    "lost": (2.0, 2.1, 2.2, None),
}


def diagnostics(seed: int) -> dict:
    return {
        "step": [0, 10, 20],
        "total_cosine": [None, 0.5, 0.7],
        "descends": [0.0, 1.0, 1.0],
        "residual_rms": [[1.0, 2.0], [1.0, 4.0], [1.0, 8.0 * seed]],
        "rule_rms": [[1.0, 1.0]] * 3,
        "exact_rms": [[1.0, 1.0]] * 3,
        "cosine": {
            "blocks.1.mlp.fc.weight": [None, 0.2, 0.2 * seed],
            "blocks.0.attn.q_proj.weight": [0.0, 0.1, 0.3],
            "head.weight": [1.0, 1.0, 1.0],
            "pos_emb.weight": [0.0, 0.0, -0.5],
            "tok_emb.weight": [0.0, 0.0, -0.4],
        },
        "norm_ratio": {},
        "feedback": {},
    }


@pytest.fixture
def found(tmp_path, monkeypatch):
    """A suite with records: `wild` diverged once, `few` has two runs, `bp` has no diagnostics."""
    corpus = toy_corpus()
    monkeypatch.setattr(results, "load_corpus", lambda name: corpus)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book" / "suites").mkdir(parents=True)
    path = tmp_path / "book" / "suites" / "toys.toml"
    path.write_text(SUITE)
    for run in read_suite(path).plan(corpus):
        losses = LOSSES[run.arm.name]
        if run.spec.seed > len(losses):
            continue
        loss = losses[run.spec.seed - 1]
        curves = {**toy_curves(run.spec), "val_step": [0, 20], "val_loss": [4.0, loss]}
        extra = {"diagnostics": diagnostics(run.spec.seed)} if run.arm.name in ("fa", "close") else {}
        status = "finished" if loss else "diverged"
        ends = {"final_val_loss": loss, "best_val_loss": loss or 4.0, "status": status}
        record = toy_record(run.spec, **ends, curves=curves, wall_time_s=60.0, **extra)
        record.write(tmp_path / "book" / "records" / "toys")
    return load_results("toys")


def test_a_verdict_needs_three_pairs_and_an_interval_on_one_side_of_zero(found):
    assert found.verdict("fa", "bp") == "above"
    assert found.verdict("bp", "fa") == "below"
    assert found.verdict("close", "bp") == "above"  # by little, and surely
    assert found.verdict("fa", "fa") == "not clearly apart"
    assert found.verdict("few", "bp") == "not enough runs"
    assert found.verdict("wild", "bp") == "diverged (1 of its runs)"


def test_a_divergence_is_named_however_many_runs_are_left(found):
    # wild has two pairs left, lost three: neither number makes the run that diverged go away.
    for arm, n in (("wild", 2), ("lost", 3)):
        assert found.difference(arm, "bp")[2] == found.difference("bp", arm)[2] == n
        assert found.verdict(arm, "bp") == found.within(arm, "bp", 9.0) == "diverged (1 of its runs)"
        assert found.compare(arm, "bp") == f"{arm} against bp: diverged (1 of its runs) (n = {n})"
        assert found.verdict("bp", arm) == found.within("bp", arm, 9.0)
        assert found.verdict("bp", arm) == "reference diverged (1 of its runs)"
        assert found.compare("bp", arm) == f"bp against {arm}: reference diverged (1 of its runs) (n = {n})"


def test_a_comparison_in_words(found):
    assert found.compare("close", "bp") == "close ends 0.009 ± 0.002 nats per character above bp (n = 3)"
    assert found.compare("bp", "close") == "bp ends 0.009 ± 0.002 nats per character below close (n = 3)"
    assert found.compare("few", "bp") == "few against bp: not enough runs (n = 2)"
    same = "fa and fa are not clearly apart: +0.000 ± 0.000 nats per character (n = 3)"
    assert found.compare("fa", "fa") == same
    with pytest.raises(ValueError, match="arm='nobody': allowed are bp, frozen body, fa"):
        found.compare("nobody", "bp")


def test_a_difference_that_rounding_may_make_is_open_and_says_so(found):
    """Of three pairs rounding makes up to 3.182 spread / sqrt(3): 0.0092 for 0.005, 0.0073 for 0.004."""
    assert found.noise is None and found.floor(3) == 0.0
    noisy, quieter = (dataclasses.replace(found, noise=Noise(spread, 3)) for spread in (0.005, 0.004))
    assert noisy.floor(3) == pytest.approx(3.18245 * 0.005 / 3**0.5, rel=1e-5)
    assert (noisy.verdict("close", "bp"), quieter.verdict("close", "bp")) == ("open", "above")
    words = "close and bp end too near to each other to tell: +0.009 ± 0.002 nats per character"
    assert noisy.compare("close", "bp") == f"{words} (n = 3; rounding: 0.009)"
    assert quieter.compare("close", "bp").endswith("character above bp (n = 3; rounding: 0.007)")
    assert noisy.verdict("few", "bp") == "not enough runs"


def test_close_means_the_whole_interval(found):
    assert found.within("close", "bp", 0.02) == "yes"
    assert found.within("close", "bp", 0.005) == "no"
    assert found.within("close", "bp", 0.009) == "open"
    assert found.within("few", "bp", 9.0) == "not enough runs"


def test_an_interval_that_contains_the_limit_decides_nothing(found):
    runs = found.runs.copy()
    runs.loc[runs["arm"] == "fa", "final_val_loss"] = [2.0, 2.3, 2.2]
    changed = dataclasses.replace(found, runs=runs)
    # Differences 0, 0.2 and 0: mean 0.067, half-width 4.30265 * 0.11547 / sqrt(3) = 0.287.
    assert changed.difference("fa", "bp") == pytest.approx((0.2 / 3, 0.28684, 3), rel=1e-4)
    assert changed.verdict("fa", "bp") == changed.verdict("bp", "fa") == "not clearly apart"
    assert changed.within("fa", "bp", 0.0) == changed.within("fa", "bp", 0.1) == "open"
    assert (changed.within("fa", "bp", -0.23), changed.within("fa", "bp", 0.36)) == ("no", "yes")


def test_a_divergence_of_either_side_is_named_before_the_pairs_are_counted(found):
    assert found.verdict("bp", "wild") == "reference diverged (1 of its runs)"  # two pairs are left
    runs = found.runs.copy()
    runs.loc[runs["status"] == "diverged", "status"] = "failed"
    assert dataclasses.replace(found, runs=runs).verdict("wild", "bp") == "not enough runs"


def test_the_share_of_the_gap_is_paired(found):
    mean, half, n = found.gap_closed("fa")
    assert mean == pytest.approx(np.mean([60.0, 49.0, 58.0])) and half > 0 and n == 3
    assert found.gap_closed("bp") == (100.0, 0.0, 3)
    assert found.gap_closed("frozen body") == (0.0, 0.0, 3)
    assert found.gap_closed("few")[2] == 2


def test_work_goes_with_the_steps(found):
    curves = found.curves().query("arm == 'fa' and seed == 1")
    record = next(found.of_arm("fa"))
    tokens = 20 * record.run_spec.train.batch_size * record.run_spec.model.block_size
    assert curves["tflops"].tolist() == pytest.approx([0.0, tokens * record.flops_per_token / 1e12])


def test_diagnostics_are_tidy_and_none_is_nan(found):
    total = found.diagnostics("total_cosine")
    assert set(total["arm"]) == {"fa", "close"} and len(total) == 18
    assert total.query("arm == 'fa' and seed == 1")["value"].tolist() == pytest.approx(
        [np.nan, 0.5, 0.7], nan_ok=True
    )
    stream = found.diagnostics("residual_rms").query("arm == 'fa' and seed == 3 and step == 20")
    assert stream[["name", "value"]].to_numpy().tolist() == [["blocks.0", 1.0], ["blocks.1", 24.0]]
    assert found.diagnostics("feedback").empty


def test_a_line_is_the_mean_of_the_seeds_over_the_named_places(found):
    figure = alignment_figures.over_training(
        found, ["bp", "fa"], "residual_rms", "RMS", names="blocks.1", log=True
    )
    (ax,) = figure.axes
    (mean,) = [line for line in ax.lines if line.get_label() == "fa (n = 3)"]
    assert mean.get_xdata().tolist() == [0, 10, 20]
    assert mean.get_ydata().tolist() == pytest.approx([2.0, 4.0, 16.0])
    assert ax.get_yscale() == "log" and len(ax.lines) == 4


def test_a_map_runs_from_the_head_down_to_the_embeddings(found):
    figure = alignment_figures.layer_maps(found, ["fa", "bp"], "cosine", "cosine")
    ax, empty = figure.axes[:2]
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["head", "1.fc", "0.q", "pos_emb", "tok_emb"]
    values = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert values[:, 2].tolist() == pytest.approx([1.0, 0.4, 0.3, -0.5, -0.4])
    assert np.isnan(values[1, 0]) and not empty.images


def test_short_names_stay_different():
    names = ["blocks.0.mlp.proj.weight", "blocks.0.attn.o_proj.weight", "blocks.0.feedback", "head"]
    assert alignment_figures.short_names(names) == ["0.out", "0.o", "0.feedback", "head"]


def test_loss_against_seconds_uses_the_step_times_that_are_given(found):
    figure = figures.loss_curves(found, ["fa"], {}, x="seconds", step_seconds={"fa": 0.5})
    (ax,) = figure.axes
    (mean,) = [line for line in ax.lines if not line.get_label().startswith("_")]
    assert mean.get_xdata().tolist() == [0.0, 10.0]
    assert ax.get_xlabel() == "time of the training steps (s)"


def test_several_axes_have_a_panel_each_and_one_legend(found):
    figure = figures.loss_curves(
        found, ["bp", "fa"], {"3-gram": 2.2}, x=("step", "tflops", "seconds"), step_seconds={"fa": 0.5}
    )
    assert len(figure.axes) == 3 and len(figure.legends[0].texts) == 2
    assert [len(ax.texts) for ax in figure.axes] == [0, 0, 1]  # the floor is named once
    assert "\n" in figure.axes[1].get_xlabel()  # wrapped, where panels are narrow
    ends = [ax.lines[-2].get_xdata()[-1] for ax in figure.axes]
    assert ends[0] == 20 and 0 < ends[1] < 1 and ends[2] == 10


def test_a_legend_of_many_lines_stands_below_the_axes(found):
    few = alignment_figures.over_training(found, ["fa", "close"], "total_cosine", "cosine")
    assert few.axes[0].get_legend() is not None and not few.legends
    figure, ax = plt.subplots(figsize=(6, 4))
    for i in range(5):
        ax.plot([0, 1], [i, i], label=str(i))
    legend(figure, ax)
    assert ax.get_legend() is None and [text.get_text() for text in figure.legends[0].texts] == list("01234")
    assert figure.get_size_inches().tolist() == pytest.approx([6, 4.6])
    ax.plot([0, 1], label="a label that is so long that no other one can stand beside it")
    figure.legends.clear()
    legend(figure, ax)
    assert figure.get_size_inches().tolist() == pytest.approx([6, 5.8])  # six lines, one below the other


def test_more_lines_than_six_have_their_names_at_their_ends(found):
    figure, ax = plt.subplots()
    for i in range(7):
        ax.plot([0, 1], [0, 0.1 if i == 3 else i], label=f"line {i}", color=f"C{i}")
    assert legend(figure, ax) and ax.get_legend() is None and not figure.legends
    names = {text.get_text(): text for text in ax.texts}
    assert [*names] == [f"line {i}" for i in (0, 3, 1, 2, 4, 5, 6)]  # from bottom to top
    assert names["line 6"].xy[1] == 6 and names["line 6"].arrow_patch.get_edgecolor()[:3] == to_rgb("C6")
    figure, ax = plt.subplots()
    ax.plot([0, 1], [0, 6], label="one")
    assert not legend(figure, ax) and not ax.texts
    curves = {str(i): {"val_step": [0, 1, 2], "val_loss": [3, 2, 1 + i]} for i in range(7)}
    (ax,) = figures.live_curves(curves, {"3-gram": 2.0}).axes
    floor = next(text for text in ax.texts if "3-gram" in text.get_text())
    assert floor.get_position() == (0.0, 2.0)  # on the left, where no name stands
    (ax,) = figures.live_curves({"0": curves["0"]}, {"3-gram": 2.0}).axes
    assert ax.texts[0].get_position() == (1.0, 2.0)


def test_names_stand_as_near_to_their_points_as_the_others_let_them(found):
    def heights(values: list[float], size: float = 4, name: str = "{}") -> list[float]:
        figure, ax = plt.subplots(figsize=(6, size), layout=None)
        ax.set_position((0.2, 0.1, 0.4, 0.8))
        ax.set(xlim=(0, 1), ylim=(0, 1))
        names = [name.format(i) for i in range(len(values))]
        name_points(ax, names, [(0.5, v) for v in values], ["k"] * len(values))
        assert ax.get_xlim() == ax.get_ylim() == (0, 1)
        placed = {text.get_text().replace("\n", " "): text.get_position()[1] for text in ax.texts}
        return [placed[name] for name in names]

    line = LINE / (0.8 * 4)
    assert heights([0.1, 0.9, 0.5]) == pytest.approx([0.1, 0.9, 0.5])
    assert heights([0.5, 0.5]) == pytest.approx([0.5 - line / 2, 0.5 + line / 2])
    assert heights([0.9, 0.5, 0.49, 0.51]) == pytest.approx([0.9, 0.5, 0.5 - line, 0.5 + line])
    assert heights([0.0, 0.0, 0.01]) == pytest.approx([0, line, 2 * line])
    assert heights([1.0, 1.0]) == pytest.approx([1 - line, 1])
    two_lines = "a name that does not fit into one line, {}"
    assert heights([0.5, 0.5], name=two_lines) == pytest.approx([0.5 - line, 0.5 + line])
    assert heights([0.5, 0.5], size=8) == pytest.approx([0.5 - line / 4, 0.5 + line / 4])


def test_accuracies_have_a_panel_each_with_chance_and_what_is_solved(found):
    shares = {1: [0.2, 0.5], 2: [0.1, 1.0], 3: [0.3, 0.9]}
    records = dict(found.records)
    for record in found.of_arm("fa"):
        curves = record.curves | {"val_accuracy": shares[record.seed]}
        records[record.digest] = dataclasses.replace(record, curves=curves)
    answering = dataclasses.replace(found, records=records)
    panels = {"one $hop": {"FA": "fa", "BP": "bp"}, "two": {"FA": "fa"}, "three": {"FA": "fa"}}
    figure = alignment_figures.accuracy_panels(answering, panels, 0.25)
    first, *_, last = figure.axes
    assert first.get_title() == r"one \$hop" and not last.axison
    seeds = [line.get_ydata().tolist() for line in first.lines[:3]]
    assert seeds == [[0.2, 0.5], [0.1, 1.0], [0.3, 0.9]]
    assert first.lines[3].get_ydata() == pytest.approx([0.2, 0.8])  # the mean of the seeds
    levels = {line.get_linestyle(): line.get_ydata()[0] for line in figure.axes[1].lines[-2:]}
    assert levels == {":": 0.25, "--": 0.95}
    assert [text.get_text() for text in figure.legends[0].texts] == ["FA (n = 3)", "BP (n = 3)"]
    with pytest.raises(ValueError, match="arm='nobody'"):
        alignment_figures.accuracy_panels(answering, {"one": {"FA": "nobody"}}, 0.25)
