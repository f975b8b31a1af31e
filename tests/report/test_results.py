import dataclasses
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from toys import toy_corpus, toy_curves, toy_model, toy_record

from localgpt_core.experiments.suites import read_suite
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.report import drawings, results
from localgpt_core.report import losses as figures
from localgpt_core.report.results import book_folder, load_results
from localgpt_core.report.runs import arms_reached, rates_table, rates_tried
from localgpt_core.report.tables import interval

matplotlib.use("Agg")

FLOORS = {"uniform": 4.0, "bigram": 2.45, "3-gram": 1.0}
SUITE = """
question = "which?"
preset = "tiny"
seeds = [1, 2]
train = { steps = 20 }
[arms.bp]
label = "backprop"
[arms.fa]
model = { method = "fa" }
[arms.late]
model = { method = "fa", feedback_std = 0.1 }
"""
LOSSES = {("bp", 1): 2.0, ("bp", 2): 2.2, ("fa", 1): 2.5, ("fa", 2): 2.6}


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A checkout whose suite has four finished runs, one that diverged and one that is missing."""
    corpus = toy_corpus()
    monkeypatch.setattr(results, "load_corpus", lambda name: corpus)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "book"
    (folder / "suites").mkdir(parents=True)
    (folder / "suites" / "toys.toml").write_text(SUITE)
    for run in read_suite(folder / "suites" / "toys.toml").plan(corpus):
        key = (run.arm.name, run.spec.seed)
        curves = {**toy_curves(run.spec), "val_step": [0, 20], "val_loss": [4.0, LOSSES.get(key)]}
        best = LOSSES.get(key, 4.0)
        if key in LOSSES:
            record = toy_record(run.spec, final_val_loss=best, best_val_loss=best, curves=curves)
        elif key == ("late", 1):
            record = toy_record(run.spec, status="diverged", best_val_loss=best, curves=curves)
        else:
            continue
        record.write(folder / "records" / "toys")
    return folder


def test_results_hold_what_is_recorded_and_say_where_it_is_from(book):
    found = load_results("toys")
    assert found.planned == 6 and len(found.runs) == 5
    assert found.labels == {"bp": "backprop", "fa": "fa", "late": "late"}
    assert found.final_loss("bp") == (*interval([2.0, 2.2]), 2)
    mean, _, n = found.final_loss("late")
    assert np.isnan(mean) and n == 0
    assert found.difference("fa", "bp")[0] == pytest.approx(0.45)
    assert [record.seed for record in found.of_arm("fa")] == [1, 2]
    assert "5 of 6 runs recorded, preset tiny, seeds 1, 2, on toy" in found.origin()
    assert "localgpt run book/suites/toys.toml" in found.origin()
    assert len(found.curves()) == 10 and found.curves()["val_accuracy"].isna().all()
    assert found.with_fields("feedback_std", "lr")["feedback_std"].tolist() == [0.02] * 4 + [0.1]
    with pytest.raises(ValueError, match="arm='xx': allowed are bp, fa, late"):
        found.final_loss("xx")
    with pytest.raises(ValueError, match="field='nonsense'"):
        found.with_fields("nonsense")


def test_the_noise_is_measured_on_runs_of_the_same_kind_of_device(book):
    assert load_results("toys").noise is None
    for plain, off in zip(load_results("toys").of_arm("bp"), (0.03, -0.01), strict=True):
        model = dataclasses.replace(plain.run_spec.model, subspace_rank=plain.run_spec.model.n_embd)
        spec, loss = dataclasses.replace(plain.run_spec, model=model), plain.final_val_loss + off
        curves = {**toy_curves(spec), "val_step": [0, 20], "val_loss": [4.0, loss]}
        record = toy_record(spec, final_val_loss=loss, best_val_loss=loss, curves=curves)
        record.write(book / "records" / "toys")
    noise = load_results("toys").noise
    assert (noise.pairs, noise.spread) == (2, pytest.approx((5e-4) ** 0.5))
    on(record, "cuda").write(book / "records" / "toys")
    assert load_results("toys").noise is None  # a single pair is left


def test_the_rates_of_an_arm_are_those_of_every_suite(book):
    found = load_results("toys")
    for arm, seed, losses in (("bp", 1, {3e-4: 2.1, 3e-3: 2.3}), ("fa", 2, {3e-3: 2.4, 1e-2: None})):
        plain = next(r for r in found.of_arm(arm) if r.seed == seed).run_spec
        for lr, loss in losses.items():
            spec = dataclasses.replace(plain, train=dataclasses.replace(plain.train, lr=lr))
            curves = {**toy_curves(spec), "val_step": [0, 20], "val_loss": [4.0, loss]}
            changes = {"final_val_loss": loss, "best_val_loss": loss or 4.0, "curves": curves}
            record = toy_record(spec, status="finished" if loss else "diverged", suite="rates", **changes)
            record.write(book / "records" / "rates")
    tried = rates_tried(load_results("toys"), ["bp", "fa"])
    assert tried.query("best")[["arm", "seed", "lr", "inside"]].values.tolist() == [
        ["bp", 1, 1e-3, True],
        ["bp", 2, 1e-3, False],
        ["fa", 1, 1e-3, False],
        ["fa", 2, 3e-3, True],
    ]
    shown = rates_table(tried)
    assert [*shown.columns] == ["rule", "seed", "0.0003", "0.001", "0.003", "0.01"]
    assert shown.values.tolist() == [
        ["backprop", 1, "2.100", "2.000\u00a0\u2022", "2.300", "-"],
        ["fa", 2, "-", "2.600", "2.400\u00a0\u2022", "diverged"],
    ]
    with pytest.raises(ValueError, match="arm='xx'"):
        rates_tried(found, ["xx"])
    with pytest.raises(ValueError, match="corpus=None"):
        rates_tried(dataclasses.replace(found, corpus=None))


def test_arms_of_one_label_are_rows_of_their_own():
    rates = (0.1, 0.2, 0.3)
    runs = [(arm, off + lr, lr) for arm, off in (("a", 2.0), ("b", 3.0)) for lr in rates]
    rows = [(arm, "GPT", 1, lr, loss, lr == 0.1, False) for arm, loss, lr in runs]
    columns = ["arm", "label", "seed", "lr", "final_val_loss", "best", "inside"]
    assert rates_table(pd.DataFrame(rows, columns=columns))["0.3"].tolist() == ["2.300", "3.300"]


def test_only_finished_runs_have_a_final_loss(book):
    found = load_results("toys")
    late = next(found.of_arm("late"))
    planted = {late.digest: dataclasses.replace(late, final_val_loss=9.0)}
    mean, _, n = dataclasses.replace(found, records=found.records | planted).final_loss("late")
    assert np.isnan(mean) and n == 0


def test_every_device_and_the_recorded_seeds_are_named(book):
    found = load_results("toys")
    digest = found.runs["digest"][1]
    elsewhere = {"device": "a GPU", "threads": 1, "torch": "2", "python": "3"}
    records = found.records | {digest: dataclasses.replace(found.records[digest], environment=elsewhere)}
    assert " on a GPU and toy; " in dataclasses.replace(found, records=records).origin()
    late = dataclasses.replace(found, runs=found.runs.query("arm == 'late'"))
    assert "1 of 6 runs recorded, preset tiny, seeds 1, on toy" in late.origin()


def on(record, device):
    return dataclasses.replace(record, environment={**record.environment, "device_type": device})


def test_a_run_made_on_a_gpu_is_in_no_table_of_the_cpu(book):
    before = load_results("toys")
    digest = before.runs.query("arm == 'bp' and seed == 2")["digest"].item()
    on(before.records[digest], "cuda").write(book / "records" / "toys")
    found = load_results("toys")
    assert (found.device, found.elsewhere, len(found.runs)) == ("cpu", 1, len(before.runs) - 1)
    assert found.final_loss("bp")[::2] == (2.0, 1) and digest not in found.records
    assert "4 of 6 runs recorded, preset tiny, seeds 1, 2, on toy (1 made on another kind" in found.origin()
    large = load_results("toys", device="cuda")
    assert (large.device, large.elsewhere, large.final_loss("bp")[::2]) == ("cuda", 4, (2.2, 1))
    with pytest.raises(ValueError, match="device='gpu': allowed are 'cpu', 'cuda'"):
        load_results("toys", device="gpu")


def test_preset_gpu_is_of_runs_on_a_gpu_and_shows_them_the_moment_they_are_recorded(book):
    nothing = load_results("toys", preset="gpu")
    assert nothing.device == "cuda"
    assert nothing.origin() == "No run of suite toys is recorded with preset gpu."
    table = arms_reached(nothing)
    assert table["arm"].tolist() == ["bp", "fa", "late"] and table["missing"].tolist() == [2, 2, 2]
    assert table["n"].tolist() == [0, 0, 0] and table["best_val_loss"].isna().all()
    runs = {(run.arm.name, run.spec.seed): run.spec for run in nothing.suite.plan(toy_corpus(), "gpu")}
    losses = {("fa", 1): [4.0, 2.0], ("fa", 2): [4.0, 3.0], ("bp", 1): [4.0, 9.0], ("late", 1): [4.0, 1.0]}
    for key, curve in losses.items():
        curves = {**toy_curves(runs[key]), "val_step": [0, 20], "val_loss": curve}
        record = toy_record(
            runs[key],
            preset="gpu",
            tokens_per_s=1e6,
            final_val_loss=curve[1],
            best_val_loss=min(curve),
            curves=curves,
        )
        on(record, "cpu" if key[0] == "late" else "cuda").write(book / "records" / "toys")
    curves = {**curves, "val_loss": [4.0, None]}
    lost = toy_record(runs["bp", 2], status="diverged", tokens_per_s=1e6, best_val_loss=4.0, curves=curves)
    on(lost, "cuda").write(book / "records" / "toys")
    found = load_results("toys", preset="gpu")
    assert (found.planned, len(found.runs), found.elsewhere) == (6, 4, 1)
    table = arms_reached(found)
    assert table[["arm", "n", "missing", "lr"]].to_dict("list") == {
        "arm": ["fa", "bp", "late"],
        "n": [2, 1, 0],
        "missing": [0, 0, 2],
        "lr": pytest.approx([1e-3, 1e-3, math.nan], nan_ok=True),
    }
    numbers = {"best_val_loss": [2.5, 4.0], "best_step": [20, 0], "final_val_loss": [2.5, 9.0]}
    assert {name: table[name].tolist()[:2] for name in numbers} == numbers
    assert table["train_loss"].tolist()[:2] == [2.5, 2.5]
    assert load_results("toys").elsewhere == 0 and len(load_results("toys").runs) == 5


def test_fields_stand_in_the_row_of_their_run(book):
    runs = load_results("toys").with_fields("seed", "method", "steps")
    assert runs["seed"].tolist() == [1, 2, 1, 2, 1]
    assert runs["method"].tolist() == ["bp", "bp", "fa", "fa", "fa"]
    assert runs["steps"].tolist() == [20] * 5


def test_curves_hold_every_point_of_every_run(book):
    curves = load_results("toys").curves()
    assert list(curves.columns) == ["arm", "label", "seed", "step", "tflops", "val_loss", "val_accuracy"]
    (point,) = curves.query("arm == 'bp' and seed == 2 and step == 20").to_dict("records")
    # The record's 5000 FLOPs for each of 20 steps of 8 sequences of 32 characters.
    assert point["tflops"] == pytest.approx(20 * 8 * 32 * 5000 / 1e12)
    assert (point["label"], point["val_loss"]) == ("backprop", 2.2)


def test_results_that_nobody_made_say_so(book):
    found = load_results("toys", preset="cpu")
    assert found.runs.empty and found.planned == 6
    assert found.origin() == "No run of suite toys is recorded with preset cpu."


def test_the_book_is_found_from_anywhere_inside_the_checkout(book, monkeypatch, tmp_path_factory):
    assert book_folder() == book
    monkeypatch.chdir(book / "suites")
    assert book_folder() == book
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(ValueError, match="must be inside the checkout"):
        book_folder()


def test_curves_show_every_seed_the_mean_and_the_floors_in_view(book):
    figures.use_style()
    figure = figures.loss_curves(load_results("toys"), ["bp", "fa"], FLOORS, top=3.0)
    (ax,) = figure.axes
    means = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(means) == ["backprop (n = 2)", "fa (n = 2)"]
    assert means["fa (n = 2)"].get_ydata().tolist() == pytest.approx([4.0, 2.55])
    assert [text.get_text().strip() for text in ax.texts] == ["bigram"]
    styles = {(line.get_marker(), line.get_linestyle()) for line in means.values()}
    assert len(styles) == 2  # not by colour alone


def test_panels_side_by_side_share_the_axis_of_the_loss(book):
    figure = figures.loss_curves(load_results("toys"), ["bp", "fa"], {}, x=["step", "tflops"])
    assert [ax.get_ylabel() for ax in figure.axes] == [figures.LOSS, ""]


def test_a_floor_is_a_line_at_its_loss_with_its_name_at_the_end(book):
    def end_of_name(text):
        return text.get_transform().transform(text.get_position()).tolist()

    found = load_results("toys")
    (ax,) = figures.loss_curves(found, ["bp"], {"bigram": 2.45}, top=3.0).axes
    assert [2.45, 2.45] in [list(line.get_ydata()) for line in ax.lines]
    right = ax.transData.transform((ax.get_xlim()[1], 2.45))
    assert end_of_name(ax.texts[0]) == pytest.approx(right.tolist())
    (ax,) = figures.final_losses(found, ["bp", "fa"], {"bigram": 2.45}).axes
    assert [2.45, 2.45] in [list(line.get_xdata()) for line in ax.lines]
    top = ax.transData.transform((2.45, ax.get_ylim()[1]))
    assert end_of_name(ax.texts[0]) == pytest.approx(top.tolist())


def test_final_losses_show_each_run_the_interval_and_what_failed(book):
    figure = figures.final_losses(load_results("toys"), ["bp", "fa", "late"], FLOORS)
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["backprop", "fa", "late (1 not finished)"]
    ticks = [line.get_xdata().tolist() for line in ax.lines if line.get_markersize() == 11]
    assert ticks[:2] == [[2.0, 2.2], [2.5, 2.6]]
    low, high = ax.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((2.1 - interval([2.0, 2.2])[1], 2.1 + interval([2.0, 2.2])[1]))


def test_loss_over_a_field_marks_the_runs_without_a_loss(book):
    table = load_results("toys").with_fields("feedback_std")
    table["label"] = table["arm"].replace({"late": "fa"})
    figure = figures.loss_over(table, "feedback_std", "feedback std", FLOORS)
    (ax,) = figure.axes
    crosses = [line for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in crosses] == [[0.1]]
    assert ax.get_xscale() == "log"


def test_attention_maps_have_the_characters_as_ticks():
    figure = figures.attention_maps({"a": torch.eye(3), "b": torch.ones(3, 3)}, "x \n")
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["x", "·", "⏎"]
    assert np.array_equal(figure.axes[0].images[0].get_array(), np.eye(3))


@pytest.mark.parametrize(("maps", "places"), [(1, 2), (2, 2), (3, 4)])
def test_attention_maps_stand_two_to_a_row(maps, places):
    figure = figures.attention_maps({str(i): torch.eye(3) for i in range(maps)}, "abc")
    assert len(figure.axes) == places + maps  # a colour bar beside each map


@pytest.mark.parametrize("mode", ["sigmoid", "softmax"])
def test_attention_weights_are_those_that_the_model_mixes_with(mode):
    torch.manual_seed(0)
    model = LocalGPT(toy_model(attn_mode=mode, n_layer=2)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    idx = torch.arange(5)
    weights = figures.attention_weights(model, idx)
    assert weights.shape == (model.config.n_layer, model.config.n_head, 5, 5)
    assert (weights.triu(1) == 0).all()
    mixed = []
    model.blocks[-1].attn.o_proj.register_forward_pre_hook(lambda layer, inputs: mixed.append(inputs[0][0]))
    values = []
    model.blocks[-1].attn.v_proj.register_forward_hook(lambda layer, inputs, y: values.append(y[0]))
    model(idx[None])
    v = values[0].view(5, model.config.n_head, -1).transpose(0, 1)
    assert torch.allclose((weights[-1] @ v).transpose(0, 1).flatten(1), mixed[0], atol=1e-6)


def test_the_drawing_of_the_model_fills_the_boxes_of_its_local_linears():
    left, right = drawings.model_drawing().axes
    filled = {text.get_text() for text in left.texts if text.get_color() == "white"}
    assert filled == {"q, k, v", "o", "fc", "proj", "head"}
    assert "feedback" in [text.get_text() for text in right.texts]


def test_live_curves_leave_the_untrained_model_out():
    figure = figures.live_curves({"fa": {"val_step": [0, 5, 10], "val_loss": [4.2, 3.0, 2.5]}}, FLOORS)
    assert figure.axes[0].lines[0].get_xdata().tolist() == [5, 10]


def test_the_drawing_copies_weights_under_backprop_only():
    texts = [[text.get_text() for text in ax.texts] for ax in drawings.feedback_paths().axes]
    assert [ax.count("copy") for ax in texts] == [2, 0]
    assert "$B_2$" in texts[1] and "$B_2$" not in texts[0]


def test_the_drawing_of_recall_follows_the_table_from_the_first_query_to_its_answer():
    (ax,) = drawings.recall_drawing("\ngedacbfdgcaaf", 2).axes  # the value of d is a, that of a is g
    texts = [text.get_text() for text in ax.texts]
    assert texts[:14] == [*"⏎gedacbfdgcaaf"] and texts[14:21] == [*"abcdefg"]
    ends = [arrow.get_path().get_extents().intervalx for arrow in ax.patches[14:]]
    assert np.allclose(ends, [[4, 8], [1, 4], [1, 9]], atol=0.3)  # the head of an arrow has a width
    assert {text.get_text(): text.get_position()[0] for text in ax.texts[21:23]} == {"1": 6.0, "2": 2.5}
    filled = [x for x, box in enumerate(ax.patches[:14]) if box.get_facecolor() != (1, 1, 1, 1)]
    assert filled == [9, 11, 13]


@pytest.mark.parametrize(
    ("sequence", "hops", "message"),
    [
        ("\ngedacbfdgcaaf", 1, "its first answer is not 1 hops from its query"),
        ("\ngedacbfdgcaa", 2, "must be 14 characters"),
        ("\nxedacbfdgcaaf", 2, "must be 14 characters"),
    ],
)
def test_what_is_no_sequence_of_recall_is_not_drawn(sequence, hops, message):
    with pytest.raises(ValueError, match=message):
        drawings.recall_drawing(sequence, hops)


def test_singular_values_are_those_of_the_matrix():
    figure = figures.singular_values({"a": torch.diag(torch.tensor([1.0, 3.0, 2.0]))})
    assert np.allclose(figure.axes[0].lines[0].get_ydata(), [3.0, 2.0, 1.0])


def test_start_and_end_share_their_rows():
    table = pd.DataFrame({"start": [0.0, 0.1], "end": [0.5, -0.2]}, index=["q", "k"])
    left, right = figures.start_and_end({"cos": table, "angle": table}).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["q", "k"]
    assert right.lines[-1].get_xdata().tolist() == [0.5, -0.2]
