"""A record and a suite may be anybody's: their texts are shown as they are, and none of them is markup."""

import dataclasses
import json
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.text import Text
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.myst_role import myst_role_plugin
from mdit_py_plugins.substitution import substitution_plugin
from toys import toy_corpus, toy_curves, toy_record

from localgpt_core.common.notebooks import as_html, as_markdown, say
from localgpt_core.common.validation import printable
from localgpt_core.experiments.suites import read_suite
from localgpt_core.report import alignment_figures, losses, mechanism_figures, results, tables
from localgpt_core.report.runs import curves_of, run_frame, run_table
from localgpt_core.report.style import as_text

matplotlib.use("Agg")

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[here](javascript:alert(1))",
    "](javascript:alert(1))",
    "![](https://evil.example/x.png)",
    "<https://evil.example>",
    "https://evil.example www.evil.example me@evil.example",
    "$x$",
    "a $\\frac{1}{0}$ b",
    "\\$x\\$",
    "_hidden_",
    "**bold** *and* __bold__",
    "`code`",
    "{cite}`x`",
    "{{ x }}",
    "a | b | c",
    "two\nlines\n\n# heading",
    "# heading",
    "- item",
    "1. item",
    "12) item",
    "> quote",
    "% comment",
    "(target)=",
    "::: note",
    "&lt;b&gt; &#36;x&#36;",
    "~~gone~~ ^up^",
    "\x1b[31mred\x00",
    "half \u2028 a line",
]
PLAIN = ["FA, ortho_he", "k-WTA, 51 of 512", "Intel(R) Xeon(R) CPU @ 2.20GHz", "1.5 bits", "lr=0.003 (cpu)"]
MARK = "_<b>$x$ [a](javascript:b) `{cite}`x`` | **c**\nd\\"  # a bit of each
NAME = printable(MARK)  # what an arm can be called in a record


def parsed(markdown):
    """Return the names of what is not text in Markdown as the book reads it, and the text."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for plugin in (dollarmath_plugin, myst_role_plugin, substitution_plugin):
        reader.use(plugin)
    blocks = reader.parse(markdown)
    inline = [token for block in blocks if block.type == "inline" for token in block.children]
    kinds = {block.type for block in blocks} | {token.type for token in inline}
    kinds -= {"paragraph_open", "paragraph_close", "inline", "text", "text_special"}
    return kinds, "".join(token.content for token in inline)


@pytest.mark.parametrize("text", [*HOSTILE, *PLAIN, MARK], ids=repr)
def test_a_text_in_a_sentence_is_text(text):
    for before, after in (("", ""), ("From ", "."), ("| ", " |"), ("(", ")")):
        kinds, shown = parsed(before + as_markdown(text) + after)
        assert not kinds, kinds
        assert shown == (before + printable(text) + after).strip()


@pytest.mark.parametrize("text", PLAIN)
def test_a_harmless_text_stays_as_it_is(text):
    assert as_markdown(text) == as_text(text) == as_html(text) == text


def test_the_test_sees_markup():
    seen = [
        parsed(text)[0]
        for text in HOSTILE[:2] + ["[a](b)", "$x$", "{cite}`x`", "{{ x }}", "_a_", "# a", "`a`"]
    ]
    assert all(seen)


def test_the_words_of_a_page_are_markup():
    assert say(" It **ends** at $x$ {cite}`y`. ")._repr_markdown_() == "It **ends** at $x$ {cite}`y`."


class Tags(HTMLParser):
    """The tags and the texts of a piece of HTML."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")], attrs

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Results of a suite and records all of whose texts are hostile."""
    corpus = toy_corpus()
    monkeypatch.setattr(results, "load_corpus", lambda name: corpus)
    (tmp_path / "records").mkdir()
    suite = tmp_path / "_a_ (b).toml"
    text = json.dumps(MARK)
    suite.write_text(
        f'question = {text}\npreset = "tiny"\nseeds = [1, 2]\ntrain = {{ steps = 20 }}\n'
        + "".join(
            f"[arms.{json.dumps(NAME + rule)}]\nlabel = {json.dumps(MARK + rule)}\n"
            f'model = {{ method = "{rule}" }}\n'
            for rule in ("bp", "fa")
        )
    )
    for run in read_suite(suite).plan(corpus):
        loss = 2.0 + 0.1 * run.spec.seed
        curves = {**toy_curves(run.spec), "val_step": [0, 20], "val_loss": [4.0, loss]}
        toy_record(
            run.spec,
            suite="toys",
            arm=run.arm.name,
            preset=NAME,
            final_val_loss=loss,
            best_val_loss=loss,
            curves=curves,
            sample=MARK,
            environment={"device": MARK, "device_type": "cpu", MARK: MARK},
            provenance={"command": MARK, MARK: MARK},
            diagnostics={"step": [0, 20], "weight_cosine": {f"{MARK}.{i}": [0.0, 0.1 * i] for i in (1, 2)}},
        ).write(tmp_path / "records")
    return results.load_results(suite, records=tmp_path / "records")


def test_sentences_about_hostile_records_are_text(found):
    first, second = found.labels
    for sentence in (found.origin(), found.compare(first, second)):
        kinds, shown = parsed(sentence)
        assert not kinds and printable(MARK) in shown
    assert "_a_ (b).toml" in parsed(found.origin())[1]
    nothing = dataclasses.replace(found, runs=found.runs[:0])
    assert not parsed(nothing.origin())[0]


def test_tables_of_hostile_records_have_our_tags_only(found):
    shown = [found.table(), tables.settings_last(found.table()), run_table(run_frame(found.records))]
    shown += [found.runs, tables.all_runs(found.records), found.diagnostics("weight_cosine")]
    shown += [found.table().rename(columns={"arm": MARK})]
    for frame in shown:
        page = Tags(tables.show_table(frame, MARK, "name")._repr_html_())
        assert page.tags <= {"style", "table", "caption", "code", "thead", "tbody", "tr", "th", "td"}
        assert any("](javascript:b)" in text for text in page.texts)
    with pytest.raises(ValueError, match="name='a b': must be letters"):
        tables.show_table(found.table(), "caption", "a b")


def drawn(figure):
    """Return every text of a figure as it is shown; none of ours is mathematics."""
    figure.canvas.draw()
    shown = set()
    for text in figure.findobj(Text):
        clean, is_mathematics = text._preprocess_math(text.get_text())
        assert not is_mathematics or "javascript" not in text.get_text(), text.get_text()
        shown.add("".join(clean.split()))
    return shown


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
def test_figures_of_hostile_records_show_their_labels(found):
    arms = [*found.labels]
    labels = {"".join(printable(label).split()) for label in found.labels.values()}
    places = {"".join(printable(f"{MARK}.{i}").split()) for i in (1, 2)}
    with_n = {f"{label}(n=2)" for label in labels}
    device = "".join(printable(MARK).split())
    assert with_n <= drawn(losses.loss_curves(found, arms, {}))
    assert with_n <= drawn(losses.loss_curves(found, arms, {}, x=("step", "tflops")))
    # Wrapped to a width, where white space goes and a line break is one.
    wrapped = {"".join(label.replace("\n", " ").split()) for label in found.labels.values()}
    assert wrapped <= drawn(losses.final_losses(found, arms, {}))
    assert labels <= drawn(losses.loss_over(found.with_fields("lr"), "lr", "rate", {}))
    assert with_n <= drawn(alignment_figures.over_training(found, arms, "weight_cosine", "cosine"))
    shown = drawn(alignment_figures.layer_maps(found, arms, "weight_cosine", "cosine"))
    assert wrapped | places <= shown
    assert wrapped | places <= drawn(
        mechanism_figures.places_over_training(found, arms, "weight_cosine", "c")
    )
    own = [(record.arm, record) for record in found.records.values()]
    assert any(device in text for text in drawn(losses.run_curves(curves_of(own), {})))
    rows = tables.pd.DataFrame({"start": [0, 1], "end": [1, 2]}, index=[MARK, MARK + "2"])
    assert {device, device + "2"} <= drawn(losses.start_and_end({"panel $x$": rows}))


@pytest.mark.parametrize("text", [*HOSTILE, MARK], ids=repr)
def test_a_label_is_shown_in_the_legend_as_it_is(text):
    figure, ax = losses.plt.subplots()
    ax.plot([0, 1], label=as_text(text))
    losses.legend(figure, ax)
    (label,) = ax.get_legend().get_texts()
    clean, is_mathematics = label._preprocess_math(label.get_text())
    assert clean.removeprefix(" ") == printable(text) and not is_mathematics


def test_the_mathematics_of_a_page_is_mathematics():
    curve = {"val_step": [0, 1, 2], "val_loss": np.ones(3)}
    figure = losses.live_curves({"bias $-\\log n$": curve}, {})
    (label,) = figure.axes[0].get_legend().get_texts()
    assert label._preprocess_math(label.get_text())[1]
