"""The bar of a run in a notebook: there for a person, empty afterwards, absent for a program; code shown."""

import sys
from types import SimpleNamespace

import jupyter_client
import pytest
from toys import toy_corpus, toy_model, toy_train

from localgpt_core.common.notebooks import say, sentence, source_of
from localgpt_core.training import loop
from localgpt_core.training.loop import train


@pytest.fixture
def notebook(monkeypatch):
    """Put a fake notebook in IPython's place; return what it displays and whether somebody can be asked."""
    seen, kernel = [], SimpleNamespace(_allow_stdin=True)

    def display(data, raw, display_id):
        assert raw and display_id is True
        seen.append(data)
        return SimpleNamespace(update=lambda data, raw: seen.append(data))

    package = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=kernel))
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    return SimpleNamespace(seen=seen, kernel=kernel)


EMPTY = {"text/plain": "", "text/html": ""}


def run(**settings):
    return train(toy_model(method="fa"), toy_train(seed=3, steps=20), toy_corpus(), **settings)


def test_a_person_sees_a_bar_that_grows_and_goes(notebook):
    curves = run().curves
    first, *between, last = notebook.seen
    assert first["text/plain"] == "fa seed 3: step 0/20"
    assert first["text/html"] == '<progress value="0" max="20"></progress> fa seed 3: step 0/20'
    steps = [int(data["text/plain"].split("step ")[1].partition("/")[0]) for data in between]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 20
    losses = f"train {curves['train_loss'][-1]:.3f}, val {curves['val_loss'][-1]:.3f}"
    assert between[-1]["text/plain"] == f"fa seed 3: step 20/20, {losses}"
    assert '<progress value="20" max="20">' in between[-1]["text/html"]
    assert last == EMPTY


def test_a_program_that_runs_the_notebook_sees_nothing(notebook):
    notebook.kernel._allow_stdin = False
    run()
    assert notebook.seen == []


def test_who_asked_for_reports_gets_them_in_place_of_the_bar(notebook):
    reported = []
    run(report=reported.append)
    assert notebook.seen == [] and reported[-1]["step"] == 20


def test_the_bar_goes_when_the_run_breaks_down(notebook, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(loop.RunState, "advance", broken)
    with pytest.raises(ZeroDivisionError):
        run()
    assert notebook.seen[-1] == EMPTY


@pytest.mark.parametrize("shell", [None, SimpleNamespace(), SimpleNamespace(kernel=SimpleNamespace())])
def test_without_a_notebook_there_is_no_bar(notebook, monkeypatch, shell):
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell)
    run()
    assert notebook.seen == []


CELL = """
from localgpt_core import LocalGPTConfig, TrainConfig, train
from localgpt_core.corpus.corpus import Corpus
text = "to be or not to be " * 20
sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "dropout": 0.0}
corpus = Corpus("toy", text, "".join(sorted(set(text))))
config = LocalGPTConfig(vocab_size=corpus.vocab_size, **sizes)
train(config, TrainConfig(steps=4, batch_size=2, eval_interval=4), corpus);
"""


def test_a_real_kernel_tells_a_person_from_a_program():
    manager, client = jupyter_client.manager.start_new_kernel(kernel_name="python3")
    try:
        shown = {}
        for person in (False, True):
            messages = []
            client.execute_interactive(CELL, allow_stdin=person, output_hook=messages.append, timeout=120)
            told = [message for message in messages if message["msg_type"] not in ("status", "execute_input")]
            shown[person] = [(message["msg_type"], message["content"].get("data")) for message in told]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert shown[False] == []
    assert [kind for kind, _ in shown[True]][:2] == ["display_data", "update_display_data"]
    assert shown[True][-1] == ("update_display_data", EMPTY)


# ------------------------------------------------------------------------------------- code that a page shows


class Shown:
    def method(self, x):
        """Return one more.

        Not a less.
        """
        text = """a string"""
        return x + len(text)


def bare(x):
    return x


def test_source_is_shown_as_python_from_its_name_to_its_code():
    code = 'def method(self, x):\n    text = """a string"""\n    return x + len(text)'
    assert source_of(Shown.method)._repr_markdown_() == f"```python\n{code}\n```"
    both = source_of(Shown.method, bare)
    assert str(both) == f"```python\n{code}\n\n\ndef bare(x):\n    return x\n```"


def test_source_is_shown_with_its_docstring_where_that_is_asked_for():
    shown = str(source_of(Shown.method, docstrings=True))
    assert shown.startswith('```python\ndef method(self, x):\n    """Return one more.\n\n    Not a less.\n')


@pytest.mark.parametrize(
    ("text", "shown"), {"backprop ends": "Backprop ends", "FA ends": "FA ends", "é": "É", "": ""}.items()
)
def test_a_sentence_begins_with_a_capital_letter(text, shown):
    assert sentence(text) == shown


def test_a_hyphen_before_a_number_that_is_said_is_a_minus():
    kept = "KP-2, 3-gram, `3e-3`, `-1`, $-1$, 10^{-3}, and - 4"
    assert say(f"ends -0.005 ± 0.1 (-3) below; {kept}") == f"ends \u22120.005 ± 0.1 (\u22123) below; {kept}"
