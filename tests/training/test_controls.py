"""What a referee asks a rule to be held against: blocks that stay as they were drawn."""

import json

import pytest
import torch
from cases import SIZES, make_batch, make_model, model_gradients
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from toys import toy_corpus, toy_model, toy_train

from localgpt_core import RULES, LocalGPTConfig, TrainConfig, describe, train
from localgpt_core.experiments.execution import execute
from localgpt_core.records.specs import RunSpec
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.state import RunState
from localgpt_core.training.step import build_model, build_optimizer, trained_names

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
