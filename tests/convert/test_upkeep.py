"""A loop that forgets what moving feedback needs is told so, a right one is not, and attach cannot forget."""

import copy
import re
import textwrap
import warnings

import pytest
import torch
from cases import normal
from modules import CASES
from torch import nn

from localgpt_core import localize, weight_transport

MOVING = {
    "kp": {"method": "kp"},
    "kp-grape": {"method": "kp", "fa_grape": True},
    "fa-grape": {"method": "fa", "fa_grape": True},
    "fa-kaczmarz-start": {
        "method": "fa",
        "fa_grape": True,
        "fa_grape_update": "kaczmarz",
        "fa_grape_start": 2,
    },
    "wm": {"method": "wm"},
    "scale": {"method": "sign_sym", "scale_follows": "weight"},
    "scale-probes": {"method": "fa", "scale_follows": "probes", "scale_n_probe": 3},
    "dfa-grape": {"method": "dfa", "output": "2", "fa_grape": True, "jvp_update": "fdfa"},
}
KP = [name for name in MOVING if name.startswith("kp")]
ALIGNED = [name for name in MOVING if name != "kp"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def train(module, optimizer, before=lambda step: None, after=lambda step: None, steps=4):
    x, y = normal(7, 3), normal(7, 2, seed=9)
    for step in range(steps):
        before(step)
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        after(step)
        optimizer.step()
    return [t.detach().clone() for t in module.state_dict().values()]


def pass_of(localized):
    """Return what alignment to the Jacobian runs; other rules leave it alone."""
    return lambda: localized.module(normal(7, 3))


def aligning(localized):
    return lambda step: localized.align_feedback(step, forward=pass_of(localized))


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


# ------------------------------------------------------------ mistakes


@pytest.mark.parametrize("name", MOVING)
def test_a_loop_that_calls_nothing_is_told_once(name):
    localized = localize(network(), **MOVING[name])
    words = "mirror_gradients" if name in KP else "align_feedback"
    more = ", forward=lambda: module(x)" if name == "dfa-grape" else ""
    kind = "direct feedback alignment" if more else "is feedback alignment"
    kind = "is scale_follows='start'" if "scale" in name else kind
    match = (
        rf"method='{MOVING[name]['method']}'.*{kind}. Call .*{words}.*"
        rf"{re.escape(f'attach(optimizer{more})')} once"
    )
    with pytest.warns(UserWarning, match=match) as caught:
        train(localized.module, adam(localized.parameters()), steps=6)
    assert len(caught) == 1


@pytest.mark.parametrize("name", MOVING)
def test_an_optimiser_made_before_is_told_whatever_is_forgotten(name):
    module = network()
    optimizer = adam(module.parameters())
    localized = localize(module, **MOVING[name])
    calls = {"before": aligning(localized), "after": lambda step: localized.mirror_gradients()}
    if name in ALIGNED and name not in KP:
        train(module, optimizer, **calls)  # nothing of theirs is in an optimiser
        return
    with pytest.warns(UserWarning, match="the weight took a step and its feedback did not") as caught:
        train(module, optimizer, **calls)
    assert len(caught) == 1


def test_one_of_two_calls_is_named_alone():
    localized = localize(network(), **MOVING["kp-grape"])
    with pytest.warns(
        UserWarning, match=r"Call localized.align_feedback\(step\) before every forward pass, or"
    ):
        train(
            localized.module,
            adam(localized.parameters()),
            after=lambda step: localized.mirror_gradients(),
        )


@pytest.mark.parametrize("name", MOVING)
def test_a_right_loop_is_told_nothing(name):
    module = network()
    module[0].weight.requires_grad_(False)
    localized = localize(module, **MOVING[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(normal(2, 3)).sum().backward()  # a look before the training
        weight_transport(module, loss=lambda: module(normal(2, 3)).square().sum())
        train(
            module,
            adam([p for p in localized.parameters() if p.requires_grad or p.grad_fn is None]),
            before=aligning(localized),
            after=lambda step: localized.mirror_gradients(),
        )
    assert not localized.upkeep.owed


@pytest.mark.parametrize("name", MOVING)
def test_weights_that_are_loaded_and_evaluated_are_no_training(name):
    localized = localize(network(), **MOVING[name])
    values = copy.deepcopy(localized.module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        localized.module(normal(2, 3))
        localized.module.load_state_dict({name: 2 * value for name, value in values.items()})
        localized.module(normal(2, 3)).sum().backward()
        localized.module.eval()
        for _ in range(3):
            localized.module(normal(2, 3))
    assert localized.upkeep.owed  # it goes on looking


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", [name for name in CASES if name not in ("ddp", "quantised")])
def test_no_kind_of_module_is_told_anything_in_a_right_loop(kind):
    for options in [options for options in MOVING.values() if "output" not in options]:
        case = CASES[kind]
        module, finish = case.build()
        localized = localize(module, **options)
        model = finish(module)
        optimizer = torch.optim.SGD(localized.parameters(), lr=1e-3)
        for step in range(3):
            localized.align_feedback(step)
            optimizer.zero_grad()
            model(case.inputs()).square().mean().backward()
            localized.mirror_gradients()
            optimizer.step()
        assert not localized.upkeep.owed


def test_the_alignment_is_no_training_step_and_a_refused_one_is_still_owed():
    localized = localize(network(), **MOVING["dfa-grape"])
    with pytest.raises(ValueError, match="forward=None: is needed"):
        localized.align_feedback(0)
    assert localized.upkeep.owed == ["align_feedback"] and localized.upkeep.watched is None
    aligning(localized)(0)
    assert not localized.upkeep.owed and localized.upkeep.watched is None


# ------------------------------------------------------------ the loops that are printed

USUAL = """\
  optimizer = torch.optim.AdamW(module.parameters())
  for x, y in batches:
      optimizer.zero_grad()
      loss_fn(module(x), y).backward()
      optimizer.step()"""


def printed(localized):
    """Return the code of each loop that is printed, by title."""
    lines = str(localized).splitlines()
    titles = [i for i, line in enumerate(lines) if line.startswith("loop")]
    ends = [*titles[1:], len(lines)]
    return {lines[i]: "\n".join(lines[i + 1 : end]) for i, end in zip(titles, ends, strict=True)}


def batches():
    return [(normal(7, 3, seed=i), normal(7, 2, seed=i + 20)) for i in range(4)]


def trained_by(code, options):
    localized = localize(network(), **options)
    given = {"module": localized.module, "localized": localized, "batches": batches(), "torch": torch}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(textwrap.dedent(code), given | {"loss_fn": nn.functional.mse_loss})
    assert not localized.upkeep.owed
    return localized.module.state_dict()


def trained_by_hand(options, attached):
    """Return the state after the same steps, each call in its place; attached, a step prepares the next."""
    localized = localize(network(), **options)
    localized.upkeep.owed = []  # it does what the calls would do
    rule = localized.layers["0"].rule
    parameters = [*localized.module.parameters(), *(b for _, b in localized.mirrored())]
    optimizer = torch.optim.AdamW(parameters)

    def align(step, x):
        if rule.aligns != "no":
            localized.align_feedback(step, forward=lambda: localized.module(x))

    for step, (x, y) in enumerate(batches()):
        if step == 0 or not attached:
            align(step, x)
        optimizer.zero_grad()
        (localized.module(x) - y).square().mean().backward()
        if rule.mirrors_gradient:
            for layer in localized.layers.values():
                layer.buffer.grad = layer.weight.grad.clone()
        optimizer.step()
        if attached:
            align(step + 1, x)
    return localized.module.state_dict()


@pytest.mark.parametrize("name", MOVING)
def test_the_printed_loops_do_all_that_a_loop_by_hand_does(name):
    codes = printed(localize(network(), **MOVING[name]))
    assert list(codes) == ["loop", "loop without attach"]
    assert "attach" in codes["loop"] and "attach" not in codes["loop without attach"]
    for title, code in codes.items():
        want = trained_by_hand(MOVING[name], attached=title == "loop")
        for key, value in trained_by(code, MOVING[name]).items():
            torch.testing.assert_close(value, want[key], rtol=1e-12, atol=1e-14, msg=f"{title}: {key}")


@pytest.mark.parametrize("method", ["bp", "fa", "sign_sym", "dfa"])
def test_a_rule_whose_feedback_stays_asks_for_nothing_more(method):
    options = {"method": method, "output": "2"}
    codes = printed(localize(network(), **options))
    assert codes == {"loop": USUAL}
    want = trained_by_hand(options, attached=False)
    for key, value in trained_by(codes["loop"], options).items():
        torch.testing.assert_close(value, want[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "without"),
    [
        (
            "kp-grape",
            """\
  optimizer = torch.optim.AdamW(localized.parameters())
  for step, (x, y) in enumerate(batches):
      localized.align_feedback(step)
      optimizer.zero_grad()
      loss_fn(module(x), y).backward()
      localized.mirror_gradients()  # after clipping
      optimizer.step()""",
        ),
        (
            "dfa-grape",
            """\
  optimizer = torch.optim.AdamW(module.parameters())
  for step, (x, y) in enumerate(batches):
      localized.align_feedback(step, forward=lambda: module(x))
      optimizer.zero_grad()
      loss_fn(module(x), y).backward()
      optimizer.step()""",
        ),
    ],
)
def test_what_is_printed_reads(name, without):
    codes = printed(localize(network(), **MOVING[name]))
    assert codes["loop without attach"] == without
    call = {
        "kp-grape": ["  localized.attach(optimizer)"],
        "dfa-grape": [
            "  x, y = next(iter(batches))",
            "  localized.attach(optimizer, forward=lambda: module(x))",
        ],
    }[name]
    first, *rest = USUAL.splitlines()
    assert codes["loop"].splitlines() == [first, *call, *rest]


# ------------------------------------------------------------ attach


@pytest.mark.parametrize(
    "make", [adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)], ids=["adam", "sgd"]
)
@pytest.mark.parametrize("name", MOVING)
def test_an_attached_optimiser_does_what_the_loop_would(name, make):
    by_hand, attached = localize(network(), **MOVING[name]), localize(network(), **MOVING[name])
    want = train(
        by_hand.module,
        make(by_hand.parameters()),
        before=aligning(by_hand),
        after=lambda step: by_hand.mirror_gradients(),
    )
    optimizer = make(attached.module.parameters())
    attached.attach(optimizer, forward=pass_of(attached))
    if name in ALIGNED:
        aligning(by_hand)(4)  # attached, the next step is prepared already
        want = list(by_hand.module.state_dict().values())
    for a, b in zip(train(attached.module, optimizer), want, strict=True):
        assert torch.equal(a, b)


def test_feedback_enters_the_group_of_its_weight_and_only_once():
    localized = localize(network(), method="kp")
    first, second = localized.layers["0"], localized.layers["2"]
    optimizer = torch.optim.AdamW(
        [{"params": [first.weight], "weight_decay": 0.3}, {"params": [second.weight, second.bias]}], lr=0.01
    )
    for _ in range(2):
        localized.attach(optimizer)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [
        [id(first.weight), id(first.buffer)],
        [id(second.weight), id(second.bias), id(second.buffer)],
    ]


def test_what_is_attached_can_be_taken_back():
    localized = localize(network(), **MOVING["kp-grape"])
    optimizer = adam(localized.module.parameters())
    detach = localized.attach(optimizer, "key", step=7)
    train(localized.module, optimizer, steps=2)
    detach()
    before = localized.layers["0"].buffer.clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(localized.layers["0"].buffer, before)


def test_a_resumed_loop_goes_on_with_the_draws_of_its_step():
    whole, part = localize(network(), method="wm"), localize(network(), method="wm")
    optimizer = torch.optim.SGD(whole.module.parameters(), lr=0.1)
    whole.attach(optimizer, "run", 3)
    want = train(whole.module, optimizer, steps=4)
    optimizer = torch.optim.SGD(part.module.parameters(), lr=0.1)
    detach = part.attach(optimizer, "run", 3)
    train(part.module, optimizer, steps=1)
    detach()
    stored = copy.deepcopy(part.module.state_dict())
    again = localize(network(), method="wm")
    again.module.load_state_dict(stored)
    optimizer = torch.optim.SGD(again.module.parameters(), lr=0.1)
    again.attach(optimizer, "run", 3, step=1)
    for a, b in zip(train(again.module, optimizer, steps=3), want, strict=True):
        torch.testing.assert_close(a, b)


def test_optimisers_that_cannot_do_it_are_refused():
    localized = localize(network(), method="kp")
    with pytest.raises(ValueError, match="optimizer='LBFGS': evaluates gradients within its step"):
        localized.attach(torch.optim.LBFGS(localized.module.parameters()))
    with pytest.raises(ValueError, match="optimizer='SGD': holds no weight of the layers"):
        localized.attach(torch.optim.SGD(network().parameters(), lr=0.1))


# ------------------------------------------------------------ other people's loops


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"x": normal(3, seed=i).float(), "y": normal(2, seed=i + 50).float()}


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network().float()

    def forward(self, x, y):
        return {"loss": (self.body(x) - y).square().mean()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_a_trainer_of_transformers_with_a_callback(tmp_path):
    """README's example: the optimiser is there when the training begins."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class MovesFeedback(TrainerCallback):
        def __init__(self, localized):
            self.localized = localized

        def on_train_begin(self, args, state, control, optimizer=None, **others):
            self.localized.attach(optimizer)

    model = WithLoss()
    localized = localize(model, **MOVING["kp-grape"])
    start = [(layer.weight - layer.buffer).detach().clone() for layer in localized.layers.values()]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    arguments.weight_decay, arguments.disable_tqdm = 0.0, True
    trainer = Trainer(model, arguments, train_dataset=Data(), callbacks=[MovesFeedback(localized)])
    trainer.train()
    assert not localized.upkeep.owed
    layer = localized.layers["body.0"]
    assert not torch.equal(layer.weight - layer.buffer, start[0])  # GrAPE has moved it
    cosine = torch.cosine_similarity(layer.weight.flatten(), layer.buffer.flatten(), dim=0)
    assert cosine > 0.3


def test_a_loop_in_the_order_of_lightning():
    """configure_optimizers, then per batch: zero_grad, forward and backward inside the step's closure."""
    localized = localize(network(), **MOVING["kp"])
    optimizer = adam(localized.module.parameters())
    localized.attach(optimizer)  # in configure_optimizers
    start = (localized.layers["0"].weight - localized.layers["0"].buffer).detach().clone()
    x, y = normal(7, 3), normal(7, 2, seed=9)
    for _ in range(3):

        def closure():
            loss = (localized.module(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(
        localized.layers["0"].weight - localized.layers["0"].buffer, start * (1 - 1e-4) ** 3
    )
