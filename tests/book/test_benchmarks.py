"""What the page of all rules shows of benchmarks: with rows that are made up, and with those there are."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from localgpt_core.bench import Row, read_rows
from localgpt_core.report.tables import show_table

BOOK = Path(__file__).parents[2] / "book"
CELLS = {cell["id"]: cell.source for cell in nbformat.read(BOOK / "rules-compared.ipynb", 4).cells}
ROW = Row("bp", 51.25, 1.0, 0.98, 1.02, 1.0, 1.0, 0.0, 15012.4, 1.5, 0.834)
AGAINST = replace(ROW, name="fa (against a plain GPT)", time=1.125, time_low=1.1, time_high=1.2, memory=0.75)


def shown(cell, **given):
    """Return the rows of the table that a cell of the page shows of ``given``, and what it told."""
    code, call = CELLS[cell].rsplit("\nshow_table(", 1)
    names = {"pd": pd, "show_table": show_table, "told": {}, **given}
    exec(code, names)
    html = eval(f"show_table({call}", names)._repr_html_()
    rows = re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows], names["told"]


ARMS = {name: SimpleNamespace(label=name.upper()) for name in ("bp", "fa")}


def test_rates_that_were_measured_are_on_the_page():
    timed = {"bp": ROW, "another": ROW, "fa": replace(ROW, milliseconds=60.0, peak_share=0.5)}
    machine = {"device": "toy", "gemm_gflops": {"float32": 101.2}}
    table, told = shown("rules-speed-1", timed=timed, machine=machine, arms=ARMS)
    assert table == [
        ["rule", "step (ms)", "tokens/s", "share of GEMM peak"],
        ["BP", "51.2", "15,012", "83\u00a0%"],
        ["FA", "60.0", "15,012", "50\u00a0%"],
    ]
    assert told["peak"] == "101 GFLOP/s in float32"


def test_ratios_to_a_plain_gpt_are_on_the_page():
    plain = replace(ROW, name="plain GPT", time=1.3, tokens_per_second=2e4, peak_share=0.9)
    compared = {row.name: row for row in (ROW, AGAINST, plain)}
    table, told = shown("rules-plain-1", compared=compared, there={"device": "toy"})
    assert table == [
        ["rule", "step time", "step memory", "matmul FLOPs", "tokens/s", "share of GEMM peak"],
        ["fa", "1.12 (1.10 to 1.20)", "0.75", "1.00", "15,012", "83\u00a0%"],
        ["plain GPT", "1", "1", "1", "20,000", "90\u00a0%"],
    ]
    assert told["there"] == "toy"


@pytest.mark.parametrize("cell", ["rules-speed-1", "rules-plain-1"])
def test_what_was_not_measured_is_said_to_be_so(cell):
    earlier = {name: value for name, value in asdict(ROW).items() if value is not None}
    for name in ("tokens_per_second", "step_gflop", "peak_share"):
        del earlier[name]
    rows, machine = {"bp": Row(**earlier)}, {"device": "toy"}
    table, told = shown(cell, timed=rows, compared=rows, machine=machine, there=machine, arms=ARMS)
    assert table[1][0] == "not measured yet" and len(table) == 2
    assert {*told.values()} <= {"not measured yet", "a machine not chosen yet"}


def test_rows_of_an_earlier_version_against_a_plain_gpt_have_no_rates():
    old = replace(AGAINST, tokens_per_second=None, step_gflop=None, peak_share=None)
    table, _ = shown("rules-plain-1", compared={old.name: old}, there={"device": "toy"})
    assert table[1:] == [["fa", "1.12 (1.10 to 1.20)", "0.75", "1.00", "\u2013", "\u2013"]]


def test_the_page_finds_its_files():
    for name in ("rules-cpu", "options-cpu"):
        assert f'"{name}.json"' in CELLS["cell-01"]
        assert read_rows(BOOK / "benchmarks" / f"{name}.json")[0]
