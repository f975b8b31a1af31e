"""The commands that work on records: table, claims, figure, verify, export, import."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from localgpt_core.cli.options import (
    BOOK_RECORDS,
    Device,
    OtherCorpus,
    OtherPreset,
    Overwrite,
    Records,
    Threads,
    require_absent,
    say,
)
from localgpt_core.cli.streams import progress, starting, tell
from localgpt_core.common.files import require_writable
from localgpt_core.common.validation import printable, require

__all__ = ["commands"]

commands = typer.Typer()


@commands.command()
def table(
    suite: Annotated[
        Path | None, typer.Argument(help="TOML file of a suite", show_default="all records, as a list")
    ] = None,
    records: Records = BOOK_RECORDS,
    preset: OtherPreset = None,
    corpus: OtherCorpus = None,
    csv: Annotated[bool, typer.Option("--csv", help="numbers as CSV, for other programs")] = False,
    json: Annotated[bool, typer.Option("--json", help="numbers as JSON, a list of rows")] = False,
) -> None:
    """Print what is recorded: mean, spread and number of runs per arm, or per spec with what differs.

    Below stand the claims of a suite that has some, each with its verdict and the paired difference d that
    it is about.

    Runs that were made on a CPU and on a GPU stand in different rows. Losses are in nats per character,
    beside the n-gram floors of texts that are at hand and small.
    """
    with starting():
        from localgpt_core.corpus.corpus import load_corpus
        from localgpt_core.experiments.suites import read_suite
        from localgpt_core.records import load_records
        from localgpt_core.report.runs import cheap_floors, run_frame, run_table, with_floors
        from localgpt_core.report.tables import arm_frame, arm_table, settings_last, suite_runs
    require(not (csv and json), "csv", csv, "or json, not both")
    found = load_records(records, say)
    if suite is None:
        require(len(found) > 0, "records", str(records), "has no records")
        frame, shown = run_frame(found), found
        people = run_table(frame)
    else:
        plan = read_suite(suite)
        text = load_corpus(corpus or plan.corpus)
        runs = suite_runs(plan, found, text, preset)
        shown = {digest: found[digest] for digest in runs["digest"]}
        mine = {d for d, r in found.items() if (r.suite, r.preset) == (plan.name, preset or plan.preset)}
        if others := len(mine - {*shown}):
            say(f"not shown: {others} records of {plan.name} with a spec or a text that it does not ask for")
        require(len(runs) > 0, "records", str(records), "has no records of this suite")
        shared = [r.suite or "localgpt train" for r in shown.values() if r.suite != plan.name]
        if shared:
            say(f"{len(shared)} of {len(shown)} runs were recorded by {', '.join(sorted({*shared}))}")
        missing = [run for run in plan.plan(text, preset) if run.spec.digest not in found]
        if missing:
            names = ", ".join(f"{run.arm.name} seed {run.spec.seed}" for run in missing)
            say(f"{len(missing)} runs are not recorded: {names}")
        devices = runs.groupby("arm", sort=False)["device"].first()
        texts = [found[digest].corpus_sha256 for digest in runs.groupby("arm", sort=False)["digest"].first()]
        frame = arm_frame(runs).assign(device=[*devices], corpus_sha256=texts)
        people = settings_last(arm_table(runs).assign(device=[*devices]))
    by_text = cheap_floors(shown)
    if csv or json:
        numbers = with_floors(frame, by_text)
        print(numbers.to_csv(index=False) if csv else numbers.to_json(orient="records", indent=1), end="")
        return
    print(people.map(_on_one_line).rename(columns=_on_one_line).to_string(index=False))
    if suite is not None and plan.claims:
        from localgpt_core.ledger import claim_table
        from localgpt_core.report.results import suite_results

        results = suite_results(plan, found, text, preset)
        if results.elsewhere:
            others = f"made on another kind of device than {results.device} do not count"
            say(f"claims: {results.elsewhere} runs {others}")
        claims = claim_table(results).map(_on_one_line)
        last = claims.pop("claim")
        widths = [claims[name].str.len().max() for name in claims]
        for own, says in zip(claims.itertuples(index=False), last, strict=True):
            print(*(f"{word:{width}}" for word, width in zip(own, widths, strict=True)), says, sep="  ")
    for name, orders in by_text.values():
        say(f"floors of {name}: " + ", ".join(f"{order} {loss:.3f}" for order, loss in orders.items()))


def _on_one_line(value: object) -> object:
    return printable(value) if isinstance(value, str) else value


@commands.command()
def claims(
    book: Annotated[
        Path, typer.Argument(help="folder with suites, records and the pages that state claims")
    ] = Path("book"),
    records: Annotated[
        Path | None, typer.Option(help="folder with all records", show_default="BOOK/records")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="as JSON, a list of rows")] = False,
) -> None:
    """Print every claim of a book with its verdict, and hold the pages to it.

    Exit status 1 where a page states a claim otherwise than the records decide it; each such place is named.
    """
    with starting():
        import json as as_json

        from localgpt_core.ledger import book_claims, misstated
    require((book / "suites").is_dir(), "book", str(book), "has no folder suites")
    found = book_claims(book, records)
    if json:
        print(as_json.dumps([claim.row() for claim in found], indent=1))
    else:
        for claim in found:
            print(printable(f"{claim.id}: {claim.decision.stated.replace('**', '')}"))
    wrong = misstated(book, found)
    for line in wrong:
        say(line)
    if wrong:
        raise typer.Exit(1)


@commands.command()
def figure(
    name: Annotated[str | None, typer.Argument(help="name of a figure", show_default="list all")] = None,
    out: Annotated[
        Path | None, typer.Option(help="file to write: .png, .pdf or .svg", show_default="NAME.png")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw a figure of the book again from the records; without a name, list them.

    Works inside the checkout. Figures of runs that a page makes itself are drawn by running the page.
    """
    with starting():
        from localgpt_core.cli.figures import book_figures
        from localgpt_core.report.results import book_folder
    found = book_figures(book_folder(), say)
    recorded = {each.name: each for each in found.values() if each.suites and not each.live}
    if name is None:
        width = max(map(len, recorded), default=0)
        for each in recorded.values():
            print(f"{each.name:{width}}  {each.page.stem}, suite {', '.join(each.suites)}")
        return
    own = found.get(name)
    require(own is not None, "name", name, "is no figure of the book; localgpt figure lists them")
    require(name in recorded, "name", name, f"is not drawn from records; run book/{own.page}")
    out = out or Path(f"{name}.png")
    require(out.suffix in (".png", ".pdf", ".svg"), "out", str(out), "must end in .png, .pdf or .svg")
    require_writable("out", out)
    require_absent("out", out, overwrite)
    own.draw(out)
    tell(f"{name}, suite {', '.join(own.suites)}: {out}")


@commands.command()
def verify(
    digest: Annotated[str, typer.Argument(help="digest of a record, or its beginning")],
    records: Records = BOOK_RECORDS,
    device: Device = "cpu",
    threads: Threads = 1,
    corpus: OtherCorpus = None,
    tolerance: Annotated[
        float, typer.Option(help="nats per character that losses may differ by on another machine")
    ] = 0.02,
) -> None:
    """Make a recorded run again and compare all that a page can show of it."""
    with starting():
        from localgpt_core.corpus.corpus import load_corpus
        from localgpt_core.corpus.known import find_corpus
        from localgpt_core.experiments.execution import execute
        from localgpt_core.experiments.verification import check_tolerance, diagnose_every, judge
        from localgpt_core.records import load_records, matching
        from localgpt_core.training.settings import RunSettings

    check_tolerance(tolerance)
    RunSettings(device=device, threads=threads)  # refused before anything is looked for
    found = load_records(records, say)
    recorded = found[matching(digest, found)]
    require(recorded.status != "failed", "digest", digest, "is the record of a run that broke down")
    spec = recorded.run_spec
    text = load_corpus(corpus) if corpus else find_corpus(spec.corpus, spec.corpus_sha256)
    spec.require_corpus(text)
    settings = RunSettings(device=device, threads=threads, diagnose_every=diagnose_every(recorded))
    with progress(spec.train.steps, f"verify {recorded.digest}") as report:
        again, _ = execute(spec, text, replace(settings, report=report))
    if again is None:
        raise typer.Exit(130)
    verdict = judge(recorded, again, tolerance)
    print(verdict.text)
    if not verdict.agrees:
        raise typer.Exit(1)


@commands.command("export")
def export_records(
    bundle: Annotated[Path, typer.Argument(help="jsonl file to write")],
    records: Records = BOOK_RECORDS,
    overwrite: Overwrite = False,
) -> None:
    """Put all records into one jsonl file."""
    with starting():
        from localgpt_core.records import export_bundle, load_records

    require_writable("bundle", bundle)
    require_absent("bundle", bundle, overwrite)
    found = load_records(records, say)
    export_bundle(found.values(), bundle)
    tell(f"{len(found)} records: {bundle}")


@commands.command("import")
def import_records(
    bundle: Annotated[Path, typer.Argument(help="jsonl file of localgpt export")],
    records: Records = BOOK_RECORDS,
) -> None:
    """Take the records of a jsonl file into the folder of records; a damaged line is named and left out."""
    with starting():
        from localgpt_core.records import import_bundle

    require_writable("records", records / "record.json")
    written = import_bundle(bundle, records, say)
    tell(f"{len(written)} new records below {records}")
