"""Records as tables: one row per run, one row per arm."""

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from localgpt_core.common.notebooks import HTMLTable, as_html, as_markdown, say
from localgpt_core.common.validation import Refusal, require
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.evidence.intervals import (
    MINUS,
    estimate,
    interval,
    paired_difference,
    require_seeds_once,
    signed,
)
from localgpt_core.experiments.suites import Suite
from localgpt_core.measure.diagnostics import measured_values
from localgpt_core.records import RunRecord

__all__ = [
    "all_runs",
    "arm_frame",
    "arm_numbers",
    "arm_table",
    "as_markdown",
    "as_typed",
    "book_folder",
    "differing",
    "estimate",
    "for_people",
    "in_words",
    "interval",
    "measured_values",
    "not_shown",
    "paired_difference",
    "require_alike",
    "require_seeds_once",
    "run_row",
    "say",
    "settings_last",
    "settings_of",
    "show_table",
    "suite_runs",
    "where_measured",
]

SOLVED = 0.95  # of the answers, above which a run has solved its task
OF_RUN = ("seed", "status", "final_val_loss", "best_val_loss", "digest", "final_val_accuracy")
TOO_FEW, DASH = "not enough runs", "\u2013"
# A number as pages write it: 0.5, -1.2 ± 0.3 (n = 3), 45 %, 1.36 (0.97), 3e-4, 1,000, 1.865 •,
# or that there is none.
PART = r"\d[\d.,]*(\s%)?"
NUMBER = re.compile(
    rf"[+\u2212-]?\d[\d.,]*(e[+-]?\d+)?(\s%)?(\s±\s{PART})?(\s\((n\s=\s)?{PART}\))?(\s\u2022)?|\u2013"
)
CODE = re.compile(r"`([^`]+)`")
NEAR = {"open": "end too near to each other to tell", "not clearly apart": "are not clearly apart"}
COLUMNS = ["arm", "label", *OF_RUN[:4], "tflops", "digest", "device", "final_val_accuracy"]


def suite_runs(
    suite: Suite, records: dict[str, RunRecord], corpus: Corpus, preset: str | None = None
) -> pd.DataFrame:
    """Return one row per recorded run of ``suite``, by arm and seed; losses in nats per character.

    An arm whose runs were made on several kinds of device is several arms, which have the device's name.
    """
    planned = suite.plan(corpus, preset)
    found = [(run.arm.name, records[run.spec.digest]) for run in planned if run.spec.digest in records]
    rows = []
    for arm in suite.arms:
        own = sorted((record for name, record in found if name == arm.name), key=lambda record: record.seed)
        devices = dict.fromkeys(record.device_type for record in own)
        for device in devices:
            name = arm.name if len(devices) == 1 else f"{arm.name} ({device})"
            rows += [run_row(name, arm.label, record) for record in own if record.device_type == device]
    return where_measured(pd.DataFrame(rows, columns=COLUMNS))


def all_runs(records: dict[str, RunRecord]) -> pd.DataFrame:
    """Return one row per record; an arm has its suite, its preset and what tells it from a namesake.

    Runs of one name that differ in more than their seed, such as those that ``localgpt train`` made with
    other options, are different arms.
    """
    namesakes: dict[tuple[str, str, str], list[RunRecord]] = {}
    for record in records.values():
        namesakes.setdefault((record.suite, record.arm, record.preset), []).append(record)
    rows = []
    for (suite, arm, preset), group in namesakes.items():
        settings = [settings_of(record) for record in group]
        names = differing(settings)
        for record, own in zip(group, settings, strict=True):
            words = ", ".join([preset, *(f"{name}={own[name]}" for name in names)])
            rows.append(run_row(f"{suite}/{arm} ({words})", arm, record))
    rows.sort(key=lambda row: (row["arm"], row["seed"]))
    return where_measured(pd.DataFrame(rows, columns=COLUMNS))


def settings_of(record: RunRecord) -> dict[str, object]:
    """Return all that can change the result of a run but its seed."""
    return record.settings


def differing(settings: list[dict[str, object]]) -> list[str]:
    """Return the names of the settings that are not the same in all of ``settings``."""
    distinct = {id(own): own for own in settings}.values()  # the records of an index share theirs
    return [name for name in settings[0] if len({own[name] for own in distinct}) > 1]


def require_alike(arm: str, records: list[RunRecord]) -> None:
    """Raise ``ValueError`` unless the runs of ``arm`` differ in nothing but their seed."""
    names = differing([settings_of(record) for record in records]) if records else []
    require(not names, "arm", arm, f"its runs differ in {', '.join(names)} and have no mean")


def run_row(arm: str, label: str, record: RunRecord) -> dict[str, object]:
    """Return the row of one run, see `suite_runs`."""
    row = {"arm": arm, "label": label, "device": record.device_type}
    for name in OF_RUN:
        row[name] = getattr(record, name)
    tokens, flops = record.tokens, record.flops_per_token
    row["tflops"] = tokens * flops / 1e12 if tokens and flops else math.nan
    return row


def book_folder() -> Path:
    """Return the nearest folder ``book`` with suites, from the working directory upwards.

    Raises:
        ValueError: If there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        for candidate in (folder, folder / "book"):
            if (candidate / "suites").is_dir():
                return candidate
    allowed = "must be inside the checkout, for book/suites; or give the path of a .toml file"
    raise Refusal(f"working directory {here.name!r}: {allowed}")


def as_typed(path: Path) -> str:
    """Return a suite's path as a page shows it: the book's below the checkout, and no folder of a person."""
    if path.parts[-3:-1] == ("book", "suites"):
        return "/".join(path.parts[-3:])
    return path.name if path.is_absolute() else path.as_posix()


def not_shown(runs: int, device: str) -> str:
    """Return in words that so many ``runs`` are left out, as they were not made on ``device``."""
    return f"{runs} made on another kind of device than {device} and not shown"


def arm_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per arm as numbers, for code; `arm_table` is the same for people.

    Columns: ``arm``; ``n``, the runs that finished; ``final_val_loss``, their mean, with ``half_width``, that
    of its 95 % interval; ``best_val_loss``, the lowest; ``not_finished``, how many did not; ``tflops``, the
    mean matmul work of a training run in 10^12 operations. Losses are in nats per character; what is not
    there is NaN. Of a corpus with answers also ``final_val_accuracy``, the mean share that the finished runs
    get right, and ``solved``, how many get more than 0.95 right.

    Raises:
        ValueError: If an arm has two runs of one seed.
    """
    groups = runs.groupby("arm", sort=False)
    rows = [{"arm": arm, **arm_numbers(arm, own.to_dict("records"))} for arm, own in groups]
    kinds = {name: float for name, (_, digits) in HEADINGS.items() if digits}
    return where_measured(pd.DataFrame(rows, columns=["arm", "n", *HEADINGS]).astype(kinds))


def where_measured(frame: pd.DataFrame) -> pd.DataFrame:
    """Return ``frame`` without its columns on answers if no row has any."""
    none = frame["final_val_accuracy"].isna().all()
    return frame.drop(columns=["final_val_accuracy", "solved"], errors="ignore") if none else frame


def arm_numbers(arm: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what `arm_frame` says of ``arm``, from the rows of its runs."""
    require_seeds_once({"seed": [row["seed"] for row in rows]}, arm)
    finished = [row for row in rows if row["status"] == "finished"]
    mean, half = interval([row["final_val_loss"] for row in finished])
    best = min((row["best_val_loss"] for row in finished), default=math.nan)
    cost, _ = interval([row["tflops"] for row in rows if not math.isnan(row["tflops"])])
    shares = [share for row in finished if not pd.isna(share := row.get("final_val_accuracy"))]
    solved = sum(share > SOLVED for share in shares)
    numbers = (mean, half, best, len(rows) - len(finished), cost, interval(shares)[0], solved)
    return {"n": len(finished), **dict(zip(HEADINGS, numbers, strict=True))}


HEADINGS = {
    "final_val_loss": ("final loss", 3),
    "half_width": ("95 % ±", 3),
    "best_val_loss": ("best", 3),
    "not_finished": ("not finished", 0),
    "tflops": ("TFLOPs", 2),
    "final_val_accuracy": ("accuracy", 3),
    "solved": ("solved", 0),
}


def for_people(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame of `arm_frame`'s columns with headings for people and rounded numbers as text."""
    shown = frame.rename(columns={name: heading for name, (heading, _) in HEADINGS.items()})
    for heading, digits in HEADINGS.values():
        if digits and heading in shown:
            shown[heading] = ["-" if math.isnan(x) else f"{x:.{digits}f}" for x in shown[heading]]
    return shown


def arm_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per arm: n finished, mean final loss with its 95 % interval, best, runs that failed.

    ``TFLOPs`` is the mean matmul work of a training run in 10^12 operations. Time is not in the table: how
    long a run took says how busy its machine was; `localgpt_core.bench` measures time.

    Raises:
        ValueError: If an arm has two runs of one seed.
    """
    return for_people(arm_frame(runs))


def settings_last(table: pd.DataFrame) -> pd.DataFrame:
    """Return an `arm_table` in which what stands in brackets behind an arm's name is the last column."""
    parts = [arm.rpartition(" (") if arm.endswith(")") else (arm, "", "") for arm in table["arm"]]
    settings = [words.removesuffix(")") for _, _, words in parts]
    named = table.assign(arm=[name for name, _, _ in parts])
    return named.assign(settings=settings) if any(settings) else table


def in_words(own: str, other: str, ends: str, mean: float, half: float) -> str:
    """Return where an arm ends against another, with the paired difference, as half a sentence."""
    if ends in NEAR:
        return f"{own} and {other} {NEAR[ends]}: {signed(mean)} ± {half:.3f} nats per character"
    own += "," * ("," in own)
    return f"{own} ends {abs(mean):.3f} ± {half:.3f} nats per character {ends} {other}"


def show_table(frame: pd.DataFrame, caption: str, name: str) -> HTMLTable:
    """Return ``frame`` without its index for display in a notebook; ``name`` is unique on the page.

    Texts are shown as they are: what looks like markup, in the name of an arm say, stays text. Only what
    stands between backticks in ``caption`` is code. A column of numbers is set to the right, each on one
    line, with real minus signs. "not enough runs" is a dash, which the caption explains.

    Raises:
        ValueError: If ``name`` has anything but letters, digits, ``-`` and ``_``.
    """
    allowed = "must be letters, digits, - and _"
    require(re.fullmatch(r"[\w-]+", name) is not None, "name", name, allowed)
    if (frame == TOO_FEW).any(axis=None):
        caption += " A dash: fewer than three seeds."
    texts = frame.map(_as_text).rename(columns=_as_text)
    right = {"selector": "", "props": [("text-align", "right"), ("white-space", "nowrap")]}
    numbers = {column: [right] for column, values in texts.items() if values.map(_is_number).all()}
    words = CODE.sub(r"<code>\1</code>", as_html(caption))
    style = texts.style.hide(axis="index").set_caption(words).set_uuid(name)
    html = style.set_table_styles(numbers).to_html(table_attributes='class="dataframe"')
    return HTMLTable(html.replace("<th ", '<th scope="col" '))


def _as_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = DASH if value in (TOO_FEW, "-") else value
    return as_html(text.replace("-", MINUS) if _is_number(text) else text)


def _is_number(value: object) -> bool:
    """Return whether a cell shows a number, with what may stand beside it, or that there is none."""
    return not isinstance(value, str) or NUMBER.fullmatch(value) is not None
