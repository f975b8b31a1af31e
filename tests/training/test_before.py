"""What earlier versions wrote is read as before: checkpoints of interrupted runs, every record of the book.

The checkpoints in before/ were written by the version whose modules stood side by side, after 3 of 8 steps in
float64. expected.json holds the validation losses of the uninterrupted runs, and that of the model at the
interruption, as that version measured them.
"""

import json
import shutil
from pathlib import Path

import pytest
from toys import toy_corpus, toy_model, toy_train

from localgpt_core import LocalGPT, load_records, train
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.step import evaluate

BEFORE = Path(__file__).parent / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
RECORDS = Path(__file__).parents[2] / "book" / "records"


def configs(name: str):
    options = EXPECTED[name]
    run = {"steps": 8, "eval_interval": 2, "precision": "float64", "lr": 1e-2}
    return toy_model(**options["model"]), toy_train(**run, **options["train"])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_of_an_earlier_version_goes_on(name, tmp_path):
    path = tmp_path / "checkpoint"
    shutil.copy(BEFORE / f"{name}.safetensors", path)
    resumed = train(*configs(name), toy_corpus(), checkpoint=path, resume=True)
    assert resumed.curves["val_step"] == [0, 2, 4, 6, 8]
    assert resumed.curves["val_loss"] == pytest.approx(EXPECTED[name]["val_loss"], rel=1e-9)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_of_an_earlier_version_is_what_it_was(name):
    saved = load_checkpoint(BEFORE / f"{name}.safetensors")
    model = LocalGPT(saved.model_config).double()
    saved.restore_model(model)
    found = evaluate(model, toy_corpus().val, saved.train_config)
    # The codebook is not in use yet after 3 steps, although the file does not say so.
    assert found == pytest.approx(EXPECTED[name]["interrupted_val_loss"], rel=1e-9)


def test_every_record_of_the_book_is_read_and_is_the_run_it_was():
    problems = []
    records = load_records(RECORDS, problems.append)
    assert problems == []
    files = [path.stem for path in RECORDS.rglob("*.json")]
    assert len(files) >= 397 and records.keys() == {*files}
    assert all(record.run_spec.digest == digest for digest, record in records.items())
