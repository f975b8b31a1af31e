"""The page "A rule of your own" runs, and its example is what it says: direct random target projection."""

import re
from pathlib import Path

import pytest
import torch
from cases import SIZES, make_batch, normal
from torch.nn import functional

from localgpt_core import RULES, LocalGPT, LocalGPTConfig, TrainConfig, localize
from localgpt_core.training.step import build_model, build_optimizer, training_step

PAGE = Path(__file__).parents[2] / "book" / "a-rule-of-your-own.md"


@pytest.fixture
def page():
    """Run the page; the rule is in the registry for as long as the test takes."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = {}
    try:
        exec(compile("\n".join(blocks), PAGE.name, "exec"), found)
        yield found
    finally:
        RULES.pop("drtp", None)


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
