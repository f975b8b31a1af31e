"""The committed notebooks and the table of contents; the checks themselves are in book_checks.py."""

import copy
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from book_checks import CHAPTER_CHECKS, CHECKS, problems, sentences

import localgpt_core

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob("book/*.ipynb")) + sorted(ROOT.glob("book/chapters/*.ipynb"))


# --------------------------------------------------------------------------------------------- the book


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_no_problems(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook, chapter=path.parent.name == "chapters") == []


KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_as_jupyterlab_would_save_it(path):
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n"
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec == KERNEL
    cells = notebook.cells
    assert len({cell.id for cell in cells}) == len(cells)
    # Times of execution, scroll positions and trust change without a change of the page.
    assert {key for cell in cells for key in cell.metadata} <= {"mystnb", "tags", "jupyter"}
    assert all(cell.metadata.get("jupyter", {}).keys() <= {"source_hidden"} for cell in cells)


def test_the_notebooks_ask_for_one_kernel():
    read = [nbformat.read(path, nbformat.NO_CONVERT).metadata for path in NOTEBOOKS]
    assert all(metadata == read[0] for metadata in read)


def test_make_lab_opens_a_page_that_exists_with_settings_that_exist():
    recipe = (ROOT / "Makefile").read_text()
    (page,) = re.findall(r"--LabApp\.default_url=/lab/tree/(\S+)", recipe)
    (settings,) = re.findall(r"--LabApp\.app_settings_dir=(\S+)", recipe)
    assert (ROOT / page).is_file()
    viewers = json.loads((ROOT / settings / "overrides.json").read_text())
    assert (
        viewers["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"]["markdown"] == "Markdown Preview"
    )


def test_there_are_chapters():
    assert [path for path in NOTEBOOKS if path.parent.name == "chapters"]


def toc_pages() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])]


def test_every_page_of_the_toc_exists_once():
    pages = toc_pages()
    assert len(set(pages)) == len(pages)
    for page in pages:
        sources = [ROOT / f"{page}{suffix}" for suffix in (".md", ".ipynb")]
        assert sum(source.exists() for source in sources) == 1, page


def test_every_source_is_in_the_toc():
    sources = [*NOTEBOOKS, *ROOT.glob("book/*.md"), *ROOT.glob("book/chapters/*.md")]
    names = {path.relative_to(ROOT).with_suffix("").as_posix() for path in sources}
    assert names - set(toc_pages()) == set()


@pytest.mark.parametrize("page", [*NOTEBOOKS, *sorted(ROOT.glob("book/*.md"))], ids=lambda page: page.stem)
def test_every_suite_that_a_page_names_exists(page):
    for name in re.findall(r"book/suites/[\w-]+\.toml", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_every_public_name_is_on_the_api_page():
    page = (ROOT / "book/api.md").read_text()
    documented = {name.split(".")[-1] for name in re.findall(r"\.\. (?:auto\w+|py:data):: ([\w.]+)", page)}
    assert set(getattr(localgpt_core, "__all__", [])) - documented == set()


# ---------------------------------------------------------------------------- the checks see what they should


def good_chapter() -> nbformat.NotebookNode:
    v4 = nbformat.v4
    figure = v4.new_code_cell(
        "plot(results, result)",
        execution_count=2,
        outputs=[
            v4.new_output(
                "display_data", data={"image/svg+xml": "<svg/>", "text/plain": "<Figure size 600x300>"}
            )
        ],
        metadata={
            "mystnb": {
                "figure": {
                    "name": "fig-loss",
                    "caption": "Loss over steps, three seeds. Suite `rules`; dashed: live.",
                },
                "image": {"alt": "Two loss curves; the lower one belongs to backpropagation"},
            }
        },
    )
    table = "<table><caption>Final loss</caption><tr><th>rule</th></tr><tr><td>fa</td></tr></table>"
    return v4.new_notebook(
        cells=[
            v4.new_markdown_cell(
                "# Chapter\n\n**The question.** Which? A step of `0.02`, $\\sigma = 0.5$, a 95 % band, "
                "{cite:t}`launay2020direct` report 29.8.\n\n```{math}\n:label: eq\nx = 0.25\n```\n\n"
                "```python\nlr = 0.003\n```"
            ),
            v4.new_code_cell(
                "result, results = train(config), load_results('rules')\nax.step(x, y)\n"
                'say(f"A loss of {loss:.2f}, in 95 % of {share:.1%} at `0.02`.")',
                execution_count=1,
                outputs=[v4.new_output("stream", name="stdout", text="loss 2.31\n")],
            ),
            figure,
            v4.new_code_cell(
                "assert fa < frozen\nleaderboard",
                execution_count=3,
                outputs=[v4.new_output("execute_result", data={"text/html": table}, execution_count=3)],
            ),
            v4.new_markdown_cell(
                "## Exercises\n\n```{exercise}\n:label: ex-seed\nChange it.\n```\n\n"
                "```{solution} ex-seed\n:class: dropdown\nSo.\n```\n\n## What this does not show\n\nMuch."
            ),
            v4.new_markdown_cell("## Next\n\nOn with [](other.ipynb)."),
        ]
    )


def source(cell: int, text: str):
    return lambda nb: nb.cells[cell].update(source=nb.cells[cell].source + "\n" + text)


def replaced(cell: int, old: str, new: str):
    def fault(nb):
        assert old in nb.cells[cell].source
        nb.cells[cell].source = nb.cells[cell].source.replace(old, new)

    return fault


def recaptioned(old: str, new: str):
    def fault(nb):
        figure = nb.cells[2].metadata.mystnb.figure
        assert old in figure.caption
        figure.caption = figure.caption.replace(old, new)

    return fault


def output(**data):
    return lambda nb: nb.cells[1].outputs.append(nbformat.v4.new_output(**data))


def shown(**data: str):
    return output(
        output_type="display_data", data={key.replace("__", "/"): text for key, text in data.items()}
    )


LONG_DEF = "def f(x):\n" + "    x += 1\n" * 6 + "    return x"
FAULTS = {
    "never executed": ("executed_in_order", lambda nb: nb.cells[1].update(execution_count=None)),
    "executed out of order": ("executed_in_order", lambda nb: nb.cells[1].update(execution_count=3)),
    "executed twice": ("executed_in_order", lambda nb: nb.cells[3].update(execution_count=4)),
    "an error": ("clean_outputs", output(output_type="error", ename="E", evalue="no", traceback=[])),
    "a warning": ("clean_outputs", output(output_type="stream", name="stderr", text="UserWarning")),
    "a bar that is over": ("clean_outputs", shown(text__plain="", text__html="")),
    "a widget": (
        "clean_outputs",
        output(
            output_type="display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "a"}}
        ),
    ),
    "widget state": ("clean_outputs", lambda nb: nb.metadata.update(widgets={"state": {}})),
    "a PNG": ("clean_outputs", output(output_type="display_data", data={"image/png": ""})),
    "an SVG with a date": (
        "clean_outputs",
        output(output_type="display_data", data={"image/svg+xml": "<svg><dc:date>now</dc:date></svg>"}),
    ),
    "a nan in a table": (
        "shows_numbers",
        shown(text__html="<table><caption>What is known of it</caption><td>nan</td></table>"),
    ),
    "an infinity in a line": (
        "shows_numbers",
        output(output_type="stream", name="stdout", text="loss  -inf  3.1"),
    ),
    "too large": ("small", output(output_type="stream", name="stdout", text="x" * 1_200_000)),
    "no alt": ("figures_are_described", lambda nb: nb.cells[2].metadata.mystnb.pop("image")),
    "short alt": (
        "figures_are_described",
        lambda nb: nb.cells[2].metadata.mystnb.image.update(alt="a figure"),
    ),
    "file name as alt": (
        "figures_are_described",
        lambda nb: nb.cells[2].metadata.mystnb.image.update(alt="../_images/a loss curve of both rules.png"),
    ),
    "no metadata": ("figures_are_described", lambda nb: nb.cells[2].metadata.clear()),
    "no caption": ("figures_are_described", lambda nb: nb.cells[2].metadata.mystnb.figure.pop("caption")),
    "no figure name": ("figures_are_described", lambda nb: nb.cells[2].metadata.mystnb.figure.pop("name")),
    "two images, one caption": (
        "figures_are_described",
        lambda nb: nb.cells[2].outputs.append(copy.deepcopy(nb.cells[2].outputs[0])),
    ),
    "records without a suite": ("figures_name_their_source", recaptioned("Suite `rules`", "Recorded")),
    "another suite": ("figures_name_their_source", recaptioned("`rules`", "`depth`")),
    "a suite in words alone": ("figures_name_their_source", recaptioned("`rules`", "rules")),
    "a suite that is not spelled out": (
        "figures_name_their_source",
        replaced(1, "load_results('rules')", "load_results(name)"),
    ),
    "live runs that do not say so": ("figures_name_their_source", recaptioned("live", "more")),
    "a drawing without alt": ("figures_are_described", source(0, "![](model.png)")),
    "a table without caption": (
        "tables_are_described",
        shown(text__html="<table><tr><th>a</th></tr></table>"),
    ),
    "an empty header": (
        "tables_are_described",
        shown(text__html="<table><caption>c</caption><tr><th></th><th>a</th></tr></table>"),
    ),
    "a line that the page would scroll": ("code_fits_the_page", source(1, f"x = '{'a' * 80}'")),
    "a table that is not shown": ("shows_what_it_makes", source(1, "show_table(f, 'c', 'n')\nx = 1")),
    "a bar with nothing behind it": (
        "shows_what_it_makes",
        lambda nb: nb.cells[2].update(outputs=[], metadata={"tags": ["hide-input"]}),
    ),
    "a long function": ("calls_the_package", source(1, LONG_DEF)),
    "a long class": ("calls_the_package", source(1, LONG_DEF.replace("def f(x)", "class F"))),
    "a backward pass": ("calls_the_package", source(1, "loss.backward()")),
    "an optimiser step": ("calls_the_package", source(1, "optimizer.step()")),
    "a syntax error": ("calls_the_package", source(1, "def")),
    "an absolute path": ("stands_alone", source(1, "open('/home/ada/data.txt')")),
    "a Windows path": ("stands_alone", source(1, "open('C:\\\\data.txt')")),
    "a path in prose": ("stands_alone", source(0, "It lies in /tmp/runs/a.")),
    "a path in an output": ("stands_alone", output(output_type="stream", name="stdout", text="/root/x/y\n")),
    "a path in a result": ("stands_alone", shown(text__plain="PosixPath('/Users/ada/x')")),
    "a download": ("stands_alone", source(1, "urllib.request.urlopen(x)")),
    "an address": ("stands_alone", source(1, "read('https://example.org/x.csv')")),
    "an installation": ("stands_alone", source(1, "%pip install x")),
    "a typed loss": ("no_typed_results", source(0, "FA ends at 2.35 nats.")),
    "a typed percentage": ("no_typed_results", source(0, "It recovers 37 % of the gap.")),
    "a typed exponent": ("no_typed_results", source(0, "The gradient falls to 1e-9.")),
    "a result in dollars": ("no_typed_results", source(0, "FA ends at $2.35$.")),
    "a result beside a citation": (
        "no_typed_results",
        source(0, "{cite:t}`nokland2016direct` tried it. We reach 2.35."),
    ),
    "a result in a table": ("no_typed_results", source(0, "| rule | loss |\n|---|---|\n| fa | 2.35 |")),
    "a result in a list": ("no_typed_results", source(0, "- see {cite}`nokland2016direct`\n- fa: 2.35")),
    "a result in an admonition": ("no_typed_results", source(0, "```{note}\nFA ends at 2.35.\n```")),
    "a result typed in what is said": (
        "no_typed_results",
        source(1, 'say(f"FA ends at {loss:.2f} and BP at 1.93 nats.")'),
    ),
    "a result said without a field": ("no_typed_results", source(1, "say('BP ends at 1.93 nats.')")),
    "imports before the question": (
        "imports_after_its_question",
        lambda nb: nb.cells.insert(0, nb.cells.pop(1)),
    ),
    "no question": ("imports_after_its_question", replaced(0, "**The question.**", "A question.")),
    "imports below a section": ("imports_after_its_question", source(0, "## The idea")),
    "no assertion": ("asserts_its_result", replaced(3, "assert fa < frozen", "fa < frozen")),
    "no exercise": ("has_exercises", replaced(4, "```{exercise}", "```{note}")),
    "an open solution": ("has_exercises", replaced(4, ":class: dropdown\n", "")),
    "no solution": ("has_exercises", replaced(4, "{solution} ex-seed", "{solution} ex-other")),
    "no way on": ("leads_on", replaced(5, "[](other.ipynb)", "the next chapter")),
    "no limits": ("says_its_limits", replaced(4, "## What this does not show", "## Outlook")),
}


def test_a_good_chapter_has_no_problems():
    assert problems(good_chapter()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, tmp_path):
    check, plant = FAULTS[fault]
    notebook = good_chapter()
    plant(notebook)
    nbformat.write(notebook, tmp_path / "chapter.ipynb")
    found = problems(nbformat.read(tmp_path / "chapter.ipynb", as_version=4))
    assert [problem for problem in found if problem.startswith(f"{check}: ")], found


def test_every_check_has_a_planted_fault():
    assert {check for check, _ in FAULTS.values()} == set(CHECKS | CHAPTER_CHECKS)


def test_chapter_rules_do_not_bind_other_notebooks():
    notebook = good_chapter()
    notebook.cells.pop()
    notebook.cells[-1].source = "leaderboard"
    assert problems(notebook, chapter=False) == []
    assert len(problems(notebook)) == 3


def test_sentences_keep_prose_and_drop_code():
    text = (
        "One `a`. Two $x$ more.\n\n- three\n- four {cite}`k`\n\n```python\nfive\n```\n\n:::{note}\nsix\n:::"
    )
    assert [s.strip() for s in sentences(text) if s.strip()] == [
        "One .",
        "Two more.",
        "- three",
        "- four \N{REFERENCE MARK}",
        "six",
    ]
