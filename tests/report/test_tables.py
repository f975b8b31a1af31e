import dataclasses
import math
import re

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from scipy import stats
from toys import toy_corpus, toy_record, toy_spec

from localgpt_core.experiments.suites import read_suite
from localgpt_core.report import tables
from localgpt_core.report.losses import loss_over
from localgpt_core.report.results import SuiteResults
from localgpt_core.report.tables import all_runs, arm_table, interval, paired_difference, suite_runs

# The 95 % interval


def test_the_interval_of_three_values_by_hand():
    # mean 2, standard deviation 1; the 97.5 % quantile of t with 2 degrees of freedom is 4.30265.
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_is_that_of_scipy(n):
    values = np.random.default_rng(n).normal(2.0, 0.1, n)
    mean, half = interval(values.tolist())
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)


def test_one_value_has_no_interval_and_none_no_mean():
    mean, half = interval([2.5])
    assert mean == 2.5 and math.isnan(half)
    assert all(math.isnan(number) for number in interval([]))


def test_equal_values_have_an_interval_of_zero():
    assert interval([2.5, 2.5, 2.5]) == (2.5, 0.0)


# Tables of runs

SUITE = """
question = "Which?"
preset = "tiny"
seeds = [2, 1, 3]
[arms.fa]
label = "feedback alignment"
model = { method = "fa" }
[arms.bp]
[arms.alone]
seeds = [1]
model = { attn_mode = "softmax" }
[arms.broken]
seeds = [1, 2]
train = { lr = 1e6 }
[arms.nothing]
train = { lr = 3e-3 }
"""

LOSSES = {
    ("fa", 1): 2.5,
    ("fa", 2): None,
    ("fa", 3): 2.7,
    ("bp", 1): 2.0,
    ("bp", 2): 2.1,
    ("bp", 3): 1.9,
    ("alone", 1): 2.25,
    ("broken", 1): None,
    ("broken", 2): None,
}


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "s.toml").write_text(SUITE)
    return read_suite(tmp_path / "s.toml")


@pytest.fixture
def records(suite):
    found = {}
    for run in suite.plan(toy_corpus()):
        key = (run.arm.name, run.spec.seed)
        if key in LOSSES:
            loss = LOSSES[key]
            status = "finished" if loss is not None else "failed" if key[0] == "fa" else "diverged"
            best = None if loss is None else loss - 0.5
            found[run.spec.digest] = toy_record(
                run.spec, arm=key[0], status=status, final_val_loss=loss, best_val_loss=best, wall_time_s=90.0
            )
    return found


@pytest.fixture
def runs(suite, records):
    return suite_runs(suite, records, toy_corpus())


def test_there_is_one_row_per_recorded_run_by_arm_and_seed(runs, records):
    expected = [("fa", 1), ("fa", 2), ("fa", 3), ("bp", 1), ("bp", 2), ("bp", 3)]
    expected += [("alone", 1), ("broken", 1), ("broken", 2)]
    assert [*zip(runs["arm"], runs["seed"], strict=True)] == expected
    assert set(runs["digest"]) == set(records)
    assert runs["label"][0] == "feedback alignment" and runs["label"][3] == "bp"
    assert runs["final_val_loss"].tolist()[3:6] == [2.0, 2.1, 1.9]
    assert runs["status"].tolist() == ["finished", "failed"] + ["finished"] * 5 + ["diverged"] * 2


def test_runs_of_other_suites_and_presets_are_not_in_the_table(suite, records, runs):
    other = toy_record()
    assert len(suite_runs(suite, records | {other.digest: other}, toy_corpus())) == len(runs)
    assert len(suite_runs(suite, records, toy_corpus(), "cpu")) == 0
    assert len(all_runs(records | {other.digest: other})) == len(runs) + 1


def test_an_arm_has_its_mean_interval_and_the_runs_that_failed(runs):
    table = arm_table(runs).set_index("arm")
    assert list(table.index) == ["fa", "bp", "alone", "broken"]
    assert table["n"].tolist() == [2, 3, 1, 0]
    assert table["not finished"].tolist() == [1, 0, 0, 2]
    assert table["final loss"].tolist() == ["2.600", "2.000", "2.250", "-"]
    # fa: 12.7062 * 0.141421 / sqrt(2); bp: 4.30265 * 0.1 / sqrt(3).
    assert table["95 % ±"].tolist() == ["1.271", "0.248", "-", "-"]
    assert table["best"].tolist() == ["2.000", "1.400", "1.750", "-"]


def test_a_failed_run_changes_what_the_table_shows(runs):
    before = arm_table(runs).to_string()
    runs.loc[0, ["status", "final_val_loss", "best_val_loss"]] = ["diverged", None, None]
    assert arm_table(runs).to_string() != before


def test_a_table_of_all_records_tells_suites_apart(records):
    moved = {
        digest: dataclasses.replace(record, suite="other" if record.seed == 1 else "toys")
        for digest, record in records.items()
    }
    arms = set(all_runs(moved)["arm"])
    assert arms == {
        *("toys/fa (tiny)", "other/fa (tiny)", "toys/bp (tiny)", "other/bp (tiny)"),
        *("other/alone (tiny)", "toys/broken (tiny)", "other/broken (tiny)"),
    }


def test_a_table_of_all_records_tells_presets_apart(suite, records):
    for run in suite.plan(toy_corpus(), "cpu"):
        if run.arm.name == "bp":
            record = toy_record(run.spec, arm="bp", preset="cpu", final_val_loss=1.0)
            records[record.digest] = record
    table = arm_table(all_runs(records)).set_index("arm")
    assert table.loc["toys/bp (tiny)", ["n", "final loss"]].tolist() == [3, "2.000"]
    assert table.loc["toys/bp (cpu)", ["n", "final loss"]].tolist() == [3, "1.000"]


def test_a_table_of_all_records_tells_options_and_texts_apart():
    # As localgpt train records them: the arm is the method, whatever the other options are.
    specs = [toy_spec(seed, n_embd=width) for width in (8, 16) for seed in (1, 2)]
    specs.append(dataclasses.replace(toy_spec(1), corpus_sha256="0" * 64))
    found = {spec.digest: toy_record(spec, suite="", arm="bp", preset="cpu") for spec in specs}
    text = toy_corpus().sha256[:8]
    assert arm_table(all_runs(found)).set_index("arm")["n"].to_dict() == {
        f"/bp (cpu, n_embd=8, corpus=toy {text})": 2,
        f"/bp (cpu, n_embd=16, corpus=toy {text})": 2,
        "/bp (cpu, n_embd=8, corpus=toy 00000000)": 1,
    }


def test_differences_are_paired_by_seed(runs):
    # Seeds 1 and 3 have both arms: 2.5 - 2.0 and 2.7 - 1.9; t with 1 degree of freedom is 12.7062.
    mean, half, n = paired_difference(runs, "fa", "bp")
    assert n == 2
    assert mean == pytest.approx(0.65, rel=1e-9)
    assert half == pytest.approx(12.706204736 * 0.3 / math.sqrt(2) / math.sqrt(2), rel=1e-6)
    mirrored = paired_difference(runs, "bp", "fa")
    assert mirrored == pytest.approx((-mean, half, 2), rel=1e-9)


def test_the_order_of_the_runs_does_not_change_the_pairs(runs):
    shuffled = runs.sample(frac=1.0, random_state=1)
    expected = paired_difference(runs, "fa", "bp")
    assert paired_difference(shuffled, "fa", "bp") == pytest.approx(expected, rel=1e-12)


def test_one_pair_has_no_interval_and_no_pair_no_mean(runs):
    mean, half, n = paired_difference(runs, "alone", "bp")
    assert (mean, n) == (0.25, 1) and math.isnan(half)
    mean, half, n = paired_difference(runs, "broken", "bp")
    assert n == 0 and math.isnan(mean) and math.isnan(half)


def test_an_arm_without_runs_has_no_difference(runs):
    mean, half, n = paired_difference(runs, "dfa", "bp")
    assert n == 0 and math.isnan(mean) and math.isnan(half)


def test_an_estimate_in_words():
    assert tables.estimate(1.8688, 0.0371, 3) == "1.869 ± 0.037 (n = 3)"
    assert tables.estimate(0.5, float("nan"), 1, "+") == "+0.500 (n = 1)"


def test_words_for_an_arm_whose_label_has_a_comma_and_a_difference_below_zero():
    said = tables.in_words("KP, no norm", "KP", "below", -0.048, 0.031)
    assert said == "KP, no norm, ends 0.048 ± 0.031 nats per character below KP"
    said = tables.in_words("KP", "bp", "not clearly apart", -0.004, 0.031)
    assert said == "KP and bp are not clearly apart: \u22120.004 ± 0.031 nats per character"


def test_numbers_in_a_table_stand_to_the_right_with_real_minus_signs():
    columns = {
        "arm": ["bp", "fa-2"],
        "gap": ["-0.003 ± 0.024 (n = 3)", "not enough runs"],
        "share": ["45 ± 3 %", "-"],
        "count": [1, 2],
        "ends": ["below", "not enough runs"],
    }
    page = BeautifulSoup(tables.show_table(pd.DataFrame(columns), "Gaps.", "t2")._repr_html_(), "html.parser")
    rows = [[cell.text for cell in row.find_all("td")] for row in page.find_all("tr")[1:]]
    assert rows == [
        ["bp", "\u22120.003 ± 0.024 (n = 3)", "45 ± 3 %", "1", "below"],
        ["fa-2", "\u2013", "\u2013", "2", "\u2013"],
    ]
    assert page.caption.text == "Gaps. A dash: fewer than three seeds."
    assert re.findall(r"#T_t2 \.(col\d)", page.style.text) == ["col1", "col2", "col3"]
    assert page.style.text.count("text-align: right") == 3


def test_what_stands_between_backticks_in_a_caption_is_code():
    frame = pd.DataFrame({"arm": ["`bp`"], "loss": ["1.87\u00a0\u2022"]})
    shown = BeautifulSoup(
        tables.show_table(frame, "Suite `a<b>`, one ` alone.", "t3")._repr_html_(), "html.parser"
    )
    assert str(shown.caption) == "<caption>Suite <code>a&lt;b&gt;</code>, one ` alone.</caption>"
    assert [cell.text for cell in shown.find_all("td")] == ["`bp`", "1.87\u00a0\u2022"]


@pytest.mark.parametrize(
    "text",
    ["1,000", "3e-4", "0.5", "+1.2 ± 0.1", "7 %", "1.865\u00a0\u2022", "1.36 (0.97)", "812\u00a0(14\u00a0%)"],
)
def test_what_is_a_number_in_a_table(text):
    assert tables._is_number(text) and not tables._is_number(f"{text} steps") and not tables._is_number("")


def test_a_table_for_a_notebook_has_a_caption_and_a_scope_for_each_heading():
    shown = tables.show_table(pd.DataFrame({"arm": ["bp"], "loss": ["1.87"]}), "What was measured.", "t1")
    html = shown._repr_html_()
    assert "<caption>What was measured.</caption>" in html and html.count('scope="col"') == 2
    assert "bp" in html and repr(shown) == "table"


# What the columns are taken from


def worked(records, **changes):
    """Return ``records`` with 10^9 FLOPs per token and 2000 tokens times the seed; some have no tokens."""
    found = {}
    for digest, record in records.items():
        own = {"flops_per_token": 1e9, "curves": {"tokens": [1000, 2000 * record.seed]}}
        if record.status == "failed":
            own = {"flops_per_token": None, "curves": {}}
        elif record.arm == "alone":
            own = {"flops_per_token": 1e9, "curves": {}}
        unfinished = {} if record.status == "finished" else changes
        found[digest] = dataclasses.replace(record, **own, **unfinished)
    return found


def test_work_is_that_of_the_last_step_and_averaged_over_every_run_that_has_any(suite, records):
    runs = suite_runs(suite, worked(records), toy_corpus())
    assert runs["tflops"].tolist() == pytest.approx([2, np.nan, 6, 2, 4, 6, np.nan, 2, 4], nan_ok=True)
    # fa: seeds 1 and 3; broken: two runs that diverged did their work all the same.
    assert arm_table(runs)["TFLOPs"].tolist() == ["4.00", "4.00", "-", "3.00"]


def test_losses_of_runs_that_did_not_finish_count_nowhere(suite, records):
    planted = worked(records, final_val_loss=0.5, best_val_loss=0.25)
    runs = suite_runs(suite, planted, toy_corpus())
    table = arm_table(runs).set_index("arm")
    assert table["final loss"].tolist() == ["2.600", "2.000", "2.250", "-"]
    assert table["best"].tolist() == ["2.000", "1.400", "1.750", "-"]
    assert paired_difference(runs, "fa", "bp")[2] == 2 and paired_difference(runs, "broken", "bp")[2] == 0


def test_a_table_of_all_records_has_every_column_and_an_order():
    specs = [toy_spec(2, method="fa"), toy_spec(1, method="fa"), toy_spec(1)]
    records = {spec.digest: toy_record(spec, best_val_loss=2.25 + spec.seed) for spec in specs}
    runs = all_runs(records)
    assert runs.to_dict("list") == {
        "arm": ["toys/bp (tiny)", "toys/fa (tiny)", "toys/fa (tiny)"],
        "label": ["bp", "fa", "fa"],
        "seed": [1, 1, 2],
        "status": ["finished"] * 3,
        "final_val_loss": [2.5] * 3,
        "best_val_loss": [3.25, 3.25, 4.25],
        "tflops": [pytest.approx(420 * 5000 / 1e12)] * 3,
        "digest": [toy_spec(1).digest, toy_spec(1, method="fa").digest, toy_spec(2, method="fa").digest],
        "device": ["cpu"] * 3,
    }


def test_the_interval_of_two_values_by_hand():
    # The 97.5 % quantile of t with 1 degree of freedom is 12.7062; the standard deviation is 0.2 / sqrt(2).
    assert interval([1.4, 1.6]) == pytest.approx((1.5, 12.706204736 * 0.1), rel=1e-9)


# What has no mean


def on(record, device):
    return dataclasses.replace(record, environment={**record.environment, "device_type": device})


def on_two_devices(records):
    """Return ``records`` with the arm bp on a GPU for seed 3, and on the CPU else."""
    return {
        digest: on(record, "cuda" if (record.arm, record.seed) == ("bp", 3) else "cpu")
        for digest, record in records.items()
    }


def test_runs_on_two_kinds_of_device_are_two_rows(suite, records):
    table = arm_table(suite_runs(suite, on_two_devices(records), toy_corpus())).set_index("arm")
    assert table["n"].to_dict() == {"fa": 2, "bp (cpu)": 2, "bp (cuda)": 1, "alone": 1, "broken": 0}
    assert table.loc["bp (cpu)", "final loss"] == "2.050" and table.loc["bp (cuda)", "final loss"] == "1.900"
    table = arm_table(all_runs(on_two_devices(records))).set_index("arm")
    assert table["n"].to_dict() == {
        "toys/alone (tiny)": 1,
        "toys/bp (tiny, device=cpu)": 2,
        "toys/bp (tiny, device=cuda)": 1,
        "toys/broken (tiny)": 0,
        "toys/fa (tiny)": 2,
    }


def test_results_of_runs_on_two_kinds_of_device_are_refused(suite, records):
    records = on_two_devices(records)
    runs = suite_runs(suite, records, toy_corpus())
    with pytest.raises(ValueError, match=r"arm='bp \(cpu\)': runs on several kinds of device have no mean"):
        SuiteResults(suite, "tiny", runs, records, 15)


@pytest.mark.parametrize("change", ["lr", "steps", "corpus", "device"])
def test_results_of_an_arm_with_two_specs_are_refused(suite, records, runs, change):
    digest = runs.query("arm == 'fa' and seed == 3")["digest"].item()
    spec = records[digest].run_spec
    if change == "device":
        changed = on(records[digest], "cuda")
    elif change == "corpus":
        changed = toy_record(dataclasses.replace(spec, corpus_sha256="0" * 64))
    else:
        train = dataclasses.replace(spec.train, **{change: getattr(spec.train, change) * 2})
        changed = toy_record(dataclasses.replace(spec, train=train))
    with pytest.raises(ValueError, match=f"arm='fa': its runs differ in {change} and have no mean"):
        SuiteResults(suite, "tiny", runs, records | {digest: changed}, 15)


def test_two_runs_of_one_seed_have_no_mean_and_no_pairs(runs):
    twice = pd.concat([runs, runs.query("arm == 'bp' and seed == 2")])
    with pytest.raises(ValueError, match="arm='bp': has several runs of seed 2, which have no mean"):
        arm_table(twice)
    for arm, reference in (("fa", "bp"), ("bp", "fa")):
        with pytest.raises(ValueError, match="arm='bp': has several runs of seed 2"):
            paired_difference(twice, arm, reference)


def test_a_point_of_a_figure_is_one_arm(runs):
    table = runs.assign(lr=1e-3)
    loss_over(table, "lr", "learning rate", {})
    with pytest.raises(ValueError, match="label='bp, lr=0.001': has several runs of seed 1"):
        loss_over(table.replace({"label": {"feedback alignment": "bp"}}), "lr", "learning rate", {})
    apart = table.query("(arm == 'fa' and seed == 1) or (arm == 'bp' and seed == 3)").assign(label="one")
    with pytest.raises(ValueError, match="label='one, lr=0.001': is of the arms fa, bp, which have no mean"):
        loss_over(apart, "lr", "learning rate", {})
    loss_over(apart.assign(lr=[1e-3, 1e-2]), "lr", "learning rate", {})


def test_what_an_arm_was_made_with_may_stand_last():
    table = pd.DataFrame({"arm": ["s/frozen body (tiny, lr=0.1)", "s/fa (tiny)"], "n": [1, 2]})
    assert tables.settings_last(table).to_dict("list") == {
        "arm": ["s/frozen body", "s/fa"],
        "n": [1, 2],
        "settings": ["tiny, lr=0.1", "tiny"],
    }
    plain = pd.DataFrame({"arm": ["bp"], "n": [3]})
    assert tables.settings_last(plain) is plain


def test_what_is_said_is_markdown_in_a_notebook_and_a_text_elsewhere():
    text = tables.say(f"""
It ends at **{2 / 3:.2f}**.

- so
""")
    assert text == text._repr_markdown_() == repr(text) == "It ends at **0.67**.\n\n- so"
    assert {type(text._repr_markdown_()), type(repr(text))} == {str}


def test_markup_in_a_table_is_text():
    odd = "<script>alert(1)</script> & 'x' < \"y\""
    html = tables.show_table(pd.DataFrame({odd: [odd, "plain"], "n": [1, 2]}), odd, "odd")._repr_html_()
    page = BeautifulSoup(html, "html.parser")
    assert page.find("script") is None
    assert page.caption.text == page.find_all("th")[0].text == page.find_all("td")[0].text == odd
    assert [cell.text for cell in page.find_all("td")][1:] == ["1", "plain", "2"]
