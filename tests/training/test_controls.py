"""What a rule is held against: blocks that stay as they were drawn, the anchors alone, and noise first."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from cases import SIZES, make_batch, make_model, model_gradients
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from toys import interrupt_after, toy_corpus, toy_model, toy_train

from localgpt_core import RULES, LocalGPTConfig, RunRecord, TrainConfig, describe, train
from localgpt_core.common.seeds import generator, seed_from
from localgpt_core.experiments.execution import execute
from localgpt_core.records.specs import RunSpec
from localgpt_core.training import before
from localgpt_core.training.before import train_on_noise
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.state import RunState
from localgpt_core.training.step import (
    build_model,
    build_optimizer,
    learning_rate,
    trained_names,
    training_step,
)

CPU = torch.device("cpu")


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# ------------------------------------------------------------ only some blocks are trained


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize(("blocks", "left"), [("0", "1"), ("1", "0"), ("0,1", "")])
def test_what_is_not_in_a_frozen_block_is_trained_and_nothing_else(method, blocks, left):
    model, config = toy_model(method=method, n_layer=2, gated_blocks=True), toy_train(freeze_blocks=blocks)
    start = dict(build_model(model, config).named_parameters())
    end = dict(train(model, config, toy_corpus()).model.named_parameters())
    expected = {n for n in start if not n.startswith("blocks.") or (left and n.startswith(f"blocks.{left}."))}
    assert moved(start, end) == expected
    assert {"ln_f.weight", "head.weight", "tok_emb.weight"} <= expected


def test_a_block_that_is_trained_alone_gets_the_gradients_that_it_has_among_others():
    config = TrainConfig(freeze_blocks="0", precision="float64")
    model, whole = build_model(LocalGPTConfig(**SIZES), config), make_model()
    model.load_state_dict(whole.state_dict())
    found, expected = (model_gradients(m, *make_batch()) for m in (model, whole))
    for name, gradient in expected.items():
        if name.startswith("blocks.0."):
            assert found[name] is None
        else:
            assert torch.equal(found[name], gradient)


def test_an_optimiser_holds_neither_frozen_weights_nor_the_feedback_that_takes_their_steps():
    config = toy_train(freeze_blocks="0")
    model = build_model(toy_model(method="kp", n_layer=2), config)
    names = trained_names(model)
    assert len(list(model.mirrored())) == 7
    assert "blocks.1.mlp.fc.feedback_weight" in names
    assert not [name for name in names if name.startswith("blocks.0.")]
    assert sum(len(group["params"]) for group in build_optimizer(model, config).param_groups) == len(names)


def test_the_feedback_of_a_frozen_block_is_aligned_as_that_of_a_frozen_body():
    model = toy_model(method="fa", fa_grape=True)
    states = []
    for freeze in ({"freeze_blocks": "0"}, {"freeze_body": True}):
        run = RunState(model, toy_train(**freeze), toy_corpus(), CPU)
        start = run.model.blocks[0].attn.q_proj.feedback_weight.clone()
        run.advance()
        states.append(run.model.blocks[0].attn.q_proj.feedback_weight)
        assert not torch.equal(states[-1], start)
    assert torch.equal(*states)


def test_what_is_frozen_is_said_to_be():
    model = build_model(toy_model(n_layer=2), toy_train(freeze_blocks="1"))
    frozen = {name for name, _ in model.named_parameters() if name.startswith("blocks.1.")}
    assert set(model.untrained_parameters()) == frozen
    rows = [line.split() for line in describe(model).splitlines()[1:]]
    assert {name for name, error, *_ in rows if error == "none"} == frozen


def test_a_record_counts_what_is_trained():
    corpus = toy_corpus()
    spec = RunSpec(toy_model(n_layer=2), toy_train(freeze_blocks="0"), corpus.name, corpus.sha256)
    record, _ = execute(spec, corpus)
    vocabulary, width, context = corpus.vocab_size, 8, 7
    outside, block = (2 * vocabulary + context) * width + 2 * width, 12 * width**2 + 4 * width
    assert record.parameters == {"total": outside + 2 * block, "trained": outside + block}


@pytest.mark.parametrize("freeze_emb", [False, True])
@pytest.mark.parametrize("blocks", ["0", "1", "0,1"])
def test_the_flops_of_frozen_blocks_by_hand(blocks, freeze_emb):
    """Forward costs one product of each pair; back, the error's is needed down to the lowest that learns."""
    model, config = toy_model(n_layer=2, freeze_emb=freeze_emb), toy_train(freeze_blocks=blocks)
    run = RunState(model, config, toy_corpus(), CPU)
    width, context, vocabulary = 8, 7, toy_corpus().vocab_size
    body, mixing, head = 12 * width**2, 2 * context * width, vocabulary * width
    products = 2 * (body + mixing) + 3 * head
    # The lowest block that learns has a norm at its start, which needs the error of queries, keys and values.
    lowest = min([i for i in (0, 1) if str(i) not in blocks], default=2) if freeze_emb else 0
    for i in (0, 1):
        products += 0 if str(i) in blocks else body
        products += body + 2 * mixing if i >= lowest else 0
    assert run.flops_per_token == 2 * products
    with FlopCounterMode(display=False) as counter:
        run.advance()
    assert counter.get_total_flops() == 2 * products * 3 * 7


def test_a_checkpoint_with_a_frozen_block_that_it_does_not_have_is_refused(tmp_path):
    path = tmp_path / "c"
    config = toy_train(steps=5, freeze_blocks="0")
    train(toy_model(n_layer=2), config, toy_corpus(), checkpoint=path)
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert load_checkpoint(path).train_config == config
    del header["sha256"]
    header["train"] = json.dumps(json.loads(header["train"]) | {"freeze_blocks": "7"})
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match="damaged: freeze_blocks='7': must be ascending block numbers below"):
        load_checkpoint(path)


# ------------------------------------------------------------ the anchors alone


def everything(run: RunState) -> dict:
    """Return copies of all that a run could change: its model's state and its optimiser's."""
    held = {f"model.{name}": tensor.clone() for name, tensor in run.model.state_dict().items()}
    for index, moments in run.optimizer.state_dict()["state"].items():
        held |= {f"{index}.{key}": tensor.clone() for key, tensor in moments.items()}
    return held


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "kp", "fa_grape": True},
        {"method": "wm"},
        {"method": "dfa", "fa_grape": True, "dropout": 0.2},
        {"vq_codes": 6},
    ],
    ids=str,
)
def test_a_step_that_is_no_anchor_changes_nothing_and_an_anchor_does(options):
    config = toy_train(anchor_interval=3, anchor_only=True, weight_decay=0.5)
    run = RunState(toy_model(**options), config, toy_corpus(), CPU)
    for step in range(7):
        before = everything(run)
        run.advance()
        after = everything(run)
        if step in (2, 5):
            assert {name for name, _ in run.model.named_parameters()} <= {
                name.removeprefix("model.") for name in moved(before, after)
            }
        else:
            assert before.keys() == after.keys() and not moved(before, after)
    assert run.optimizer.state_dict()["state"][0]["step"] == 2


def test_the_weights_are_those_of_backpropagation_on_these_batches_at_these_rates():
    config = toy_train(anchor_interval=4, anchor_only=True, lr=1e-2, steps=14)
    result = train(toy_model(), config, toy_corpus())
    assert (result.status, result.steps_done, result.anchor_steps) == ("finished", 14, 3)
    run = RunState(toy_model(), config, toy_corpus(), CPU)
    model, plain = build_model(toy_model(), config), toy_train(lr=1e-2, steps=14)
    optimizer = build_optimizer(model, config)
    for step in (3, 7, 11):
        training_step(model, optimizer, plain, *run.batch(step), step)
        assert optimizer.param_groups[0]["lr"] == learning_rate(step, plain)
    for name, tensor in model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], tensor), name


def test_it_is_the_same_control_for_every_rule_and_surrogate():
    config = toy_train(anchor_interval=3, anchor_only=True, precision="float64")
    expected = dict(train(toy_model(), config, toy_corpus()).model.named_parameters())
    for options in ({"method": "fa"}, {"method": "kp"}, {"method": "dfa"}, {"ste_gelu": True}):
        found = dict(train(toy_model(**options), config, toy_corpus()).model.named_parameters())
        for name, parameter in expected.items():
            torch.testing.assert_close(found[name], parameter, rtol=1e-11, atol=1e-13)


def test_the_curve_has_the_loss_of_every_batch():
    config = toy_train(anchor_interval=3, anchor_only=True, steps=7)
    result = train(toy_model(), config, toy_corpus())
    run, losses = RunState(toy_model(), config, toy_corpus(), CPU), []
    for step in range(7):
        with torch.no_grad():
            losses.append(run.model(*run.batch(step))[1].item())
        run.advance()
    assert result.curves["step"] == [*range(1, 8)]
    np.testing.assert_allclose(result.curves["train_loss"], losses, rtol=1e-6)
    assert result.curves["val_step"] == [0, 5, 7]


@pytest.mark.parametrize("model", [{}, {"method": "wm"}, {"vq_codes": 6}], ids=str)
def test_the_flops_of_the_anchors_alone_by_hand(model):
    """An anchor costs what it costs among others, and a step that is skipped a forward pass."""
    sizes = {"anchor_interval": 4, "steps": 10, **({"vq_start": 6} if "vq_codes" in model else {})}
    run = RunState(toy_model(**model), toy_train(**sizes, anchor_only=True), toy_corpus(), CPU)
    with FlopCounterMode(display=False) as counter:
        for _ in range(10):
            run.advance()
    tokens = 3 * 7
    assert run.flops_per_token * 10 * tokens == pytest.approx(counter.get_total_flops(), rel=1e-12)
    if not model:
        body, mixing, head = 12 * 8**2, 2 * 7 * 8, toy_corpus().vocab_size * 8
        forward = 2 * (body + mixing + head)
        assert run.flops_per_token * 10 == pytest.approx(8 * forward + 2 * 3 * forward, rel=1e-12)


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_the_anchors_alone_are_resumed_bit_for_bit(stop, tmp_path, monkeypatch):
    model, config = toy_model(method="kp", dropout=0.1), toy_train(anchor_interval=4, anchor_only=True)
    whole, path = train(model, config, toy_corpus()), tmp_path / "c"
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        assert train(model, config, toy_corpus(), checkpoint=path, resume=True).status == "interrupted"
    # AdamW has moments from the first anchor on.
    held = {name for name in load_checkpoint(path).tensors if name.startswith("optimizer.")}
    assert bool(held) == (stop >= 4)
    found = train(model, config, toy_corpus(), checkpoint=path, resume=True)
    assert found.curves == whole.curves and found.anchor_steps == whole.anchor_steps == 5
    assert not moved(whole.model.state_dict(), found.model.state_dict())


def test_a_record_of_the_anchors_alone_is_read_again(tmp_path):
    corpus, config = toy_corpus(), toy_train(anchor_interval=7, anchor_only=True)
    spec = RunSpec(toy_model(), config, corpus.name, corpus.sha256)
    record, _ = execute(spec, corpus, out=tmp_path)
    assert RunRecord.from_json(record.to_json()).anchor_steps == 2


# ------------------------------------------------------------ noise first


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "kp", "fa_grape": True, "dropout": 0.2},
        {"method": "dkp"},
        {"method": "fa", "fa_grape": True, "fa_grape_start": 2},
    ],
    ids=str,
)
def test_noise_comes_before_everything_and_is_a_run_of_its_own(options):
    config = toy_train(noise_start=9, warmup=4, lr=1e-2, anchor_interval=2 if options else 0)
    model, noise = build_model(toy_model(**options), config), toy_train(steps=9, warmup=4, lr=1e-2)
    noise = dataclasses.replace(noise, seed=seed_from(config.seed, "noise"))
    optimizer = build_optimizer(model, noise)
    for step in range(9):
        source = generator(noise.seed, step)
        drawn = torch.randint(toy_corpus().vocab_size, (2, config.batch_size, 7), generator=source)
        training_step(model, optimizer, noise, *drawn, step)
    run = RunState(toy_model(**options), config, toy_corpus(), CPU)
    for i in range(options.get("fa_grape_start", 0)):
        model.align_feedback(config.seed, "start", i, idx=run.batch(i)[0])
    assert not moved(run.model.state_dict(), model.state_dict())
    assert moved(run.model.state_dict(), build_model(toy_model(**options), config).state_dict())
    assert run.step == 0 and not run.optimizer.state_dict()["state"]


def test_noise_is_uniform_and_its_targets_are_not_its_inputs(monkeypatch):
    seen, step = [], before.training_step
    monkeypatch.setattr(before, "training_step", lambda *args: (seen.append(args[3:5]), step(*args))[1])
    RunState(toy_model(), toy_train(noise_start=400), toy_corpus(), CPU)
    symbols = toy_corpus().vocab_size
    inputs, targets = (torch.stack(part).flatten() for part in zip(*seen, strict=True))
    for drawn in (inputs, targets):
        expected = len(drawn) / symbols
        assert (drawn.bincount(minlength=symbols) - expected).abs().max() < 5 * expected**0.5
    together = (inputs * symbols + targets).bincount(minlength=symbols**2)
    expected = len(inputs) / symbols**2
    assert (together - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize(("size", "sign"), [(1.0, -1), (20.0, 1)])
def test_noise_turns_the_head_towards_its_feedback_only_where_there_is_much_to_unlearn(size, sign):
    """To unlearn large first logits is an error that lasts; noise is one against what the last noise left."""
    config = toy_train(steps=300, noise_start=300, lr=3e-3, batch_size=8)
    model = build_model(toy_model(method="fa", n_embd=32, block_size=32), config)
    head = model.head

    def cosine():
        return torch.cosine_similarity(head.weight.flatten(), head.feedback_weight.flatten(), 0).item()

    with torch.no_grad():
        head.weight.mul_(size)
    start = cosine()
    train_on_noise(model, model, config, CPU)
    assert abs(start) < 0.1 and sign * (cosine() - start) > 0.02


def test_noise_is_work_of_the_run_and_not_repeated_when_it_is_resumed(tmp_path, monkeypatch):
    without, config = toy_train(), toy_train(noise_start=10)
    model = toy_model(method="fa", dropout=0.1)
    plain, run = (RunState(model, c, toy_corpus(), CPU).flops_per_token for c in (without, config))
    assert run == pytest.approx(1.5 * plain, rel=1e-12)  # 20 steps, and 10
    whole, path = train(model, config, toy_corpus()), tmp_path / "c"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        train(model, config, toy_corpus(), checkpoint=path, resume=True)
    monkeypatch.setattr(before, "training_step", None)
    found = train(model, config, toy_corpus(), checkpoint=path, resume=True)
    assert found.curves == whole.curves and not moved(whole.model.state_dict(), found.model.state_dict())


def test_noise_and_codes_do_not_go_together():
    with pytest.raises(ValueError, match="noise_start=3: must be 0 with vq_codes"):
        RunState(toy_model(vq_codes=4), toy_train(noise_start=3), toy_corpus(), CPU)
