"""All recorded runs as a list: those of one spec together, whatever their seed, and what tells them apart."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pandas as pd

from localgpt_core.common.validation import require, require_choice
from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.corpus.known import cheap_corpus
from localgpt_core.corpus.ngrams import floors
from localgpt_core.evidence.rates import RatesTried, rates_by_setting, setting_of
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import RunRecord, matching, read_record
from localgpt_core.report.results import SuiteResults, suite_results
from localgpt_core.report.tables import (
    arm_numbers,
    differing,
    for_people,
    run_row,
    settings_of,
    where_measured,
)
from localgpt_core.training.curves import as_the_last

__all__ = [
    "arms_reached",
    "asked_for",
    "cheap_floors",
    "curves_of",
    "rates_table",
    "rates_tried",
    "run_frame",
    "run_table",
    "with_floors",
]

Floors = dict[str, tuple[str, dict[str, float]]]  # name and floors of a text by its SHA-256


def run_frame(records: dict[str, RunRecord]) -> pd.DataFrame:
    """Return one row per spec as numbers, the runs of all its seeds together.

    Columns: ``suite`` (empty for the runs of ``localgpt train``), ``arm``, ``preset``, ``device``; one for
    each field of the configuration in which runs that are compared differ; ``seeds``, such as ``"1 2 3"``;
    those of `localgpt_core.report.tables.arm_frame`; ``corpus_sha256``; ``settings``, the fields that tell
    the row from those it is compared with. All runs of ``localgpt train`` are compared with each other,
    those of a suite with their namesakes only: there the arm's name says the rest.
    """
    scopes: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records.values():
        own = (record.suite,) if not record.suite else (record.suite, record.arm, record.preset)
        scopes.setdefault(own, []).append(record)
    rows, columns = [], {}
    for scope in scopes.values():
        named = all(record.arm == settings_of(record)["method"] for record in scope)
        names = [name for name in differing([*map(settings_of, scope)]) if name != "method" or not named]
        columns |= dict.fromkeys(names)
        groups: dict[tuple[object, ...], list[RunRecord]] = {}
        for record in scope:
            key = (record.suite, record.arm, record.preset, *(settings_of(record)[name] for name in names))
            groups.setdefault(key, []).append(record)
        for group in groups.values():
            rows.append((group, ", ".join(f"{name}={settings_of(group[0])[name]}" for name in names)))
    found = [_row(group, list(columns), settings) for group, settings in rows]
    found.sort(key=lambda row: (row["suite"], row["arm"], row["preset"], row["settings"]))
    return where_measured(pd.DataFrame(found))


def _row(group: list[RunRecord], names: list[str], settings: str) -> dict[str, object]:
    group = sorted(group, key=lambda record: record.seed)
    first = group[0]
    own = settings_of(first)
    return {
        "suite": first.suite,
        "arm": first.arm,
        "preset": first.preset,
        "device": first.device_type,
        **{name: own[name] for name in names if name != "device"},
        "seeds": " ".join(str(record.seed) for record in group),
        **arm_numbers(first.arm, [run_row(first.arm, "", record) for record in group]),
        "corpus_sha256": first.corpus_sha256,
        "settings": settings,
    }


def run_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a `run_frame` for people: rounded, with the settings that differ in words behind the numbers."""
    shown = for_people(frame)
    pairs = zip(shown["suite"], shown["arm"], strict=True)
    shown.insert(0, "run", [f"{suite}/{arm}" if suite else arm for suite, arm in pairs])
    numbers = ["n", "final loss", "95 % ±", "best", "not finished", "TFLOPs"]
    numbers += [heading for heading in ("accuracy", "solved") if heading in shown]
    kept = ["run", *numbers, "preset", "device", "seeds", "settings"]
    return shown[kept if shown["settings"].any() else kept[:-1]]


def arms_reached(results: SuiteResults) -> pd.DataFrame:
    """Return one row per arm of a suite, the lowest loss first and arms without a record last.

    Columns: ``arm``, ``label``; ``n``, its finished runs; ``missing``, those without a record; ``lr``; then,
    as means over the finished runs: ``best_val_loss``, ``best_step``, where that was measured,
    ``final_val_loss`` and ``train_loss``, the last point of the training curve. What is not there is NaN.
    """
    rows = []
    for arm in results.suite.arms:
        own = [*results.of_arm(arm.name)]
        done = [record for record in own if record.status == "finished"]
        comparable = [as_the_last(record.curves, record.run_spec.train) for record in done]
        means = {
            "lr": [record.run_spec.train.lr for record in own[:1]],
            "best_val_loss": [record.best_val_loss for record in done],
            "best_step": [min(losses, key=losses.get) for losses in comparable],
            "final_val_loss": [record.final_val_loss for record in done],
            "train_loss": [record.curves["train_loss"][-1] for record in done],
        }
        numbers = {name: fmean(values) if values else math.nan for name, values in means.items()}
        counts = {"n": len(done), "missing": len(arm.seeds) - len(own)}
        rows.append({"arm": arm.name, "label": arm.label, **counts, **numbers})
    return pd.DataFrame(rows).sort_values("best_val_loss", kind="stable", ignore_index=True)


def rates_tried(results: SuiteResults, arms: Sequence[str] | None = None) -> pd.DataFrame:
    """Return one row per arm, seed and learning rate that any suite has recorded of the arm's setting.

    Columns: ``arm``, ``label``, ``seed``, ``lr``, ``final_val_loss``, infinite where the run diverged;
    ``best``, whether it is the lowest of its arm and seed; ``inside``, whether that one has a smaller and a
    larger rate beside it.

    Raises:
        ValueError: If the suite has no such arm, or these results have no text.
    """
    require(results.corpus is not None, "corpus", None, "these results were made without a text")
    plan = {run.arm.name: run.spec for run in results.suite.plan(results.corpus, results.preset)}
    found, rows = rates_by_setting(results.records.values()), []
    for arm in results.labels if arms is None else arms:
        label = results.label(arm)
        tried = found.get(setting_of(plan[arm]), RatesTried({}))
        for seed, losses in tried.losses.items():
            best, inside = tried.best(seed), tried.inside(seed)
            rows += [(arm, label, seed, lr, loss, lr == best, inside) for lr, loss in losses.items()]
    columns = ["arm", "label", "seed", "lr", "final_val_loss", "best", "inside"]
    return pd.DataFrame(rows, columns=columns)


def rates_table(tried: pd.DataFrame) -> pd.DataFrame:
    """Return `rates_tried` for people: a row per rule and seed, a column per rate, a dot behind the best.

    Only seeds of which three rates were tried are shown.
    """
    rows = []
    for (_, label, seed), own in tried.groupby(["arm", "label", "seed"], sort=False):
        if len(own) > 2:
            found = own.set_index("lr")
            texts = {lr: _loss_as_text(row.final_val_loss, row.best) for lr, row in found.iterrows()}
            rows.append({"rule": label, "seed": seed} | texts)
    rates = sorted({lr for row in rows for lr in row} - {"rule", "seed"}, key=float)
    shown = pd.DataFrame(rows, columns=["rule", "seed", *rates]).fillna("-")
    return shown.rename(columns={lr: f"{lr:g}" for lr in rates})


def _loss_as_text(loss: float, best: bool) -> str:
    return "diverged" if math.isinf(loss) else f"{loss:.3f}" + "\u00a0\u2022" * best


Shown = list[tuple[str, RunRecord]]  # runs, each with the name of its arm


def asked_for(
    asked: Sequence[str],
    records: dict[str, RunRecord],
    preset: str | None = None,
    corpus: str | None = None,
    device: str | None = None,
) -> tuple[Shown, str | None, int]:
    """Return the runs that are meant by ``asked``: files of suites and of records, digests, their beginnings.

    They are of one kind of device, ``device``. Where that is None, the first of ``asked`` decides: a suite
    shows the kind that its preset is for, as `suite_results` does, and a record its own. Behind the runs
    stand the kind, and how many runs were made on another and are left out.

    Raises:
        ValueError: For a beginning that does not fit one digest, a file that cannot be read, or another kind.
    """
    if device is not None:
        require_choice("device", device, ("cpu", "cuda"))
    shown, elsewhere = [], 0
    for one in asked:
        if one.endswith(".toml"):
            plan = read_suite(one)
            results = suite_results(plan, records, load_corpus(corpus or plan.corpus), preset, device)
            device, elsewhere = results.device, elsewhere + results.elsewhere
            pairs = zip(results.runs["arm"], results.runs["digest"], strict=True)
            shown += [(arm, records[digest]) for arm, digest in pairs]
            continue
        record = read_record(Path(one)) if one.endswith(".json") else records[matching(one, records)]
        device = device or record.device_type
        shown += [(record.arm, record)] if record.device_type == device else []
        elsewhere += record.device_type != device
    return shown, device, elsewhere


def curves_of(shown: Shown) -> pd.DataFrame:
    """Return the validation curves of runs: ``label``, ``seed``, ``step``, ``val_loss``.

    A label is the arm's name, and for namesakes the settings in which they differ.
    """
    rows = []
    for arm in dict.fromkeys(arm for arm, _ in shown):
        own = {record.digest: record for name, record in shown if name == arm}.values()
        names = differing([*map(settings_of, own)])
        for record in own:
            words = ", ".join(f"{name}={settings_of(record)[name]}" for name in names)
            label = f"{arm} ({words})" if words else arm
            points = zip(record.curves.get("val_step", ()), record.curves.get("val_loss", ()), strict=True)
            rows += [(label, record.seed, step, loss) for step, loss in points if loss is not None]
    return pd.DataFrame(rows, columns=["label", "seed", "step", "val_loss"])


def cheap_floors(records: dict[str, RunRecord]) -> Floors:
    """Return name and n-gram floors, by SHA-256, of the records' texts that are here and small."""
    texts = {record.corpus_sha256: record.corpus for record in records.values()}
    found = {sha256: (name, cheap_corpus(name, sha256)) for sha256, name in texts.items()}
    return {sha256: (name, floors(corpus)) for sha256, (name, corpus) in found.items() if corpus is not None}


def with_floors(frame: pd.DataFrame, by_text: Floors) -> pd.DataFrame:
    """Return a frame that has ``corpus_sha256`` with a column ``floor_bigram`` and so on for each order."""
    orders = dict.fromkeys(order for _, values in by_text.values() for order in values)
    own = [by_text.get(sha256, ("", {}))[1] for sha256 in frame["corpus_sha256"]]
    columns = {order: [values.get(order, math.nan) for values in own] for order in orders}
    return frame.assign(**{f"floor_{order}": values for order, values in columns.items()})
