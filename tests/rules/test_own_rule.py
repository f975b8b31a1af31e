"""Rules from outside of the package: the page "A rule of your own", and what the contract says of others."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import test_rule_contract as contract
import torch
from cases import SIZES, make_batch, normal
from torch.nn import functional

from localgpt_core import RULES, LocalGPT, LocalGPTConfig, RuleOptions, TrainConfig, localize
from localgpt_core.bench.measuring import measure
from localgpt_core.bench.variants import variants
from localgpt_core.layers.feedback_points import FeedbackPoint
from localgpt_core.rules import LearningRule
from localgpt_core.rules.backprop import Backprop
from localgpt_core.rules.feedback_alignment import FeedbackAlignment
from localgpt_core.training.step import build_model, build_optimizer, training_step

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "book" / "a-rule-of-your-own.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def page(monkeypatch):
    """Run the page; its rule is in the registry for as long as the test takes."""
    monkeypatch.setattr(RULES, "data", RULES.data.copy())
    found = {"__name__": "__main__"}  # as in a notebook
    exec(compile("\n".join(BLOCKS), PAGE.name, "exec"), found)
    return found


def test_the_page_runs_and_shows_what_it_has_done(page, capsys):
    assert RULES["drtp"] is page["TargetProjection"]
    assert str(page["localized"]).startswith("method='drtp': 2 layers changed")
    assert -1 < page["measured"].total_cosine < 1


def test_target_projection_by_hand(page):
    """Two layers: the lower one hears -y B / N, whatever the output says."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 6)
    ).double()
    localized = localize(network, method="drtp", output="4")
    x, y = normal(7, 3), torch.arange(7) % 6
    functional.cross_entropy(network(x), y).backward()
    h = [layer.detach() for layer in (network[:2](x), network[:4](x))]
    onehot = functional.one_hot(y, 6).double()
    # A layer's weight hears of what the layer above hands down.
    for at, inputs, above in ((0, x, "2"), (2, h[0], "4")):
        down = -onehot / 7 @ localized.layers[above].buffer
        slope = 1 - h[at // 2] ** 2
        torch.testing.assert_close(network[at].weight.grad, (down * slope).T @ inputs)


def test_a_model_trains_by_it(page):
    config = TrainConfig(seed=4, steps=60, batch_size=16, warmup=5, lr=1e-2, precision="float64")
    model = build_model(LocalGPTConfig(**SIZES, method="drtp"), config)
    optimizer = build_optimizer(model, config)
    losses = []
    for at in range(config.steps):
        idx, _ = make_batch(rows=16, seed=at)
        losses.append(training_step(model, optimizer, config, idx, idx, at).item())
    assert losses[-1] < 0.6 * losses[0]


def test_options_of_other_rules_are_refused_for_it(page):
    with pytest.raises(ValueError, match="mirror_rate=0.5: has no effect with method='drtp'"):
        LocalGPT(LocalGPTConfig(**SIZES, method="drtp", mirror_rate=0.5))


# ------------------------------------------------------------ files of their own


def python(folder: Path, *arguments: str) -> str:
    """Return what Python prints, with the page's rule and a redrawn one as files on its path."""
    title = '"""Direct random target projection: the targets reach every layer in place of the error."""'
    (folder / "target_projection.py").write_text(f"{title}\n\n{BLOCKS[0]}")
    path = [str(folder), str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "COLUMNS": "200"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_in_files_of_their_own_pass_the_contract_as_they_are(tmp_path):
    plugins = "-p", "target_projection", "-p", "redrawn", "-p", "no:cacheprovider"
    file = "tests/rules/test_rule_contract.py"
    out = python(tmp_path, "-m", "pytest", "-v", *plugins, file, "-k", "drtp or redrawn")
    passed = set(re.findall(r"::(\w+)\[(drtp|redrawn)(?:-\S+)?\] PASSED", out))
    every = re.findall(r"@every_rule\ndef (\w+)", (ROOT / file).read_text(encoding="utf-8"))
    assert len(every) == 14
    assert passed >= {(test, name) for test in every for name in ("drtp", "redrawn")}
    assert "drtp-block] PASSED" in out and "skipped" not in out


def test_the_command_line_knows_a_rule_that_was_imported_before_it(tmp_path):
    start = "import target_projection, redrawn; from localgpt_core.cli import main; main()"
    out = python(tmp_path, "-c", start, "train", "--help")
    assert "drtp: Direct random target projection: the targets reach every layer" in out
    assert "redrawn: Feedback drawn anew before every step" in out


def test_a_rule_without_a_file_is_summed_up_by_its_class(page):
    assert RULES.summary("drtp") == "``grad_input = -1/N y @ B`` with the one-hot targets y"


def test_the_benchmark_has_a_row_for_a_rule_that_was_just_registered(page, monkeypatch):
    rows = [variant for variant in variants(32) if "drtp" in variant.name]
    assert [row.name for row in rows] == ["drtp", "drtp block", "drtp block norm"]
    assert rows[2].model == {"method": "drtp", "dfa_granularity": "block", "dfa_norm": True}
    monkeypatch.setattr("localgpt_core.bench.measuring.WARM_UP_STEPS", 1)
    monkeypatch.setattr("localgpt_core.bench.measuring.variants", lambda width: rows[:1])
    (row,) = measure("tiny", torch.device("cpu"), 1, lambda text: None)
    # As under dfa: an output error of 65 numbers is wider than a stream of 32.
    assert row.name == "drtp" and row.flops == pytest.approx(1.139, abs=0.001)


# ------------------------------------------------------------ what is declared and not so


def once_more(matrix: torch.Tensor) -> torch.Tensor:
    """Return ``matrix``, by a product more than is needed."""
    return torch.eye(len(matrix), dtype=matrix.dtype) @ matrix


class Product(FeedbackAlignment):
    """Multiplies for its feedback, and does not say so."""

    def feedback(self, weight, buffer):
        return once_more(buffer)


class DeclaredProduct(Product):
    """Says so."""

    def backward_flops(self, tokens, error_features, in_features):
        usual = super().backward_flops(tokens, error_features, in_features)
        return usual + 2 * error_features**2 * in_features


class Follower(FeedbackAlignment):
    """Multiplies to align its feedback, always by the same amount, and does not say so."""

    aligns = "layer"

    def align(self, weight, buffer, is_output, generator):
        buffer.lerp_(once_more(weight), 0.1)

    def align_flops(self, out_features, in_features, is_output):
        return 0


class DeclaredFollower(Follower):
    """Says so."""

    def align_flops(self, out_features, in_features, is_output):
        return 2 * out_features**2 * in_features


class StandsStill(FeedbackAlignment):
    """Says that it moves its feedback, and does not."""

    aligns = "layer"

    def align(self, weight, buffer, is_output, generator):
        pass


class Different(FeedbackAlignment):
    """Says that it hands down the true derivative."""

    is_derivative = True


class Reader(FeedbackAlignment):
    """Reads signs, and says that it reads the weight."""

    transports = "weight"

    def feedback(self, weight, buffer):
        return buffer * weight.sign()


class Modest(FeedbackAlignment):
    """Learns, and says that it does not."""

    no_better_than_frozen = "nobody has ever seen it learn anything at all"


class Dumb(FeedbackAlignment):
    """Hands nothing down, and does not say so."""

    def signal(self, error):
        return 0 * error


class Curt(Dumb):
    """Says so, but not why."""

    no_better_than_frozen = "no"


class Honest(Dumb):
    """Says why."""

    no_better_than_frozen = "what is multiplied by zero tells nobody anything"


MULTIPLIES = contract.test_a_step_multiplies_what_the_rule_declares
ALIGNS = contract.test_alignment_depends_on_its_key_only_and_moves_nothing_but_feedback
ALIGNS_AT_A_COST = contract.test_moving_the_feedback_multiplies_what_the_rule_declares
ACTIVE = contract.test_the_rule_is_active_in_every_layer_below_the_head
READS = contract.test_the_backward_pass_reads_of_the_weight_what_is_declared
LEARNS = contract.test_the_loss_falls_on_a_toy_problem

# What the contract makes of each of them: the test, and whether it passes.
VERDICTS = {
    Product: (MULTIPLIES, False),
    DeclaredProduct: (MULTIPLIES, True),
    Follower: (ALIGNS_AT_A_COST, False),
    DeclaredFollower: (ALIGNS_AT_A_COST, True),
    StandsStill: (ALIGNS, False),
    Different: (ACTIVE, False),
    Reader: (READS, False),
    Modest: (LEARNS, False),
    Dumb: (LEARNS, False),
    Curt: (LEARNS, False),
    Honest: (LEARNS, True),
}


@pytest.fixture(scope="module")
def loss_of_a_frozen_body():
    return contract.losses_on_a_toy_problem({}, freeze_body=True)[-1]


@pytest.mark.parametrize("rule", VERDICTS)
def test_the_contract_sees_what_is_not_so(rule, monkeypatch, request):
    monkeypatch.setitem(RULES, "own", rule)
    test, passes = VERDICTS[rule]
    given = [request.getfixturevalue("loss_of_a_frozen_body")] if test is LEARNS else []
    with nullcontext() if passes else pytest.raises(AssertionError):
        test({"method": "own"}, *given)


def test_an_alignment_may_draw_nothing(monkeypatch):
    monkeypatch.setitem(RULES, "own", DeclaredFollower)
    ALIGNS({"method": "own"})


def test_a_model_is_exact_if_its_rule_says_so(monkeypatch):
    for rule in (Backprop, FeedbackAlignment):
        monkeypatch.setitem(RULES, "own", rule)
        assert LocalGPTConfig(method="own").is_exact == rule.is_derivative


# ------------------------------------------------------------ between the blocks


class ReadsAtTheOutput(LearningRule):
    """Uses the output's error, and the weight."""

    error = "output"
    transports = "sign"


class AlignsAtTheOutput(LearningRule):
    """Uses the output's error, and aligns to its layer."""

    error = "output"
    aligns = "layer"


@pytest.mark.parametrize("rule", [ReadsAtTheOutput, AlignsAtTheOutput])
def test_a_rule_that_needs_a_weight_is_refused_where_there_is_none(rule, monkeypatch):
    monkeypatch.setitem(RULES, "own", rule)
    message = "dfa_granularity='block': must be 'layer' with method='own', which needs the weight of a layer"
    with pytest.raises(ValueError, match=message):
        LocalGPTConfig(method="own", dfa_granularity="block")
    with pytest.raises(ValueError, match="method='own': must be a rule that uses the output's error, and"):
        FeedbackPoint(3, 2, RuleOptions(method="own"))
