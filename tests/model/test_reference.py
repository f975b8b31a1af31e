"""Whole-model gradients against the independent implementation in reference.py, in float64."""

import pytest
import torch
from cases import MODEL_CASES, RULE_CASES, make_batch, make_model, model_gradients
from reference import FEEDBACK, Reference, relative_error

LIMIT = 1e-12

RULES_TIMES_MODELS = {
    f"{rule}-{model}": RULE_CASES[rule] | MODEL_CASES[model]
    for rule in RULE_CASES
    for model in MODEL_CASES
    if RULE_CASES[rule]["method"] in FEEDBACK
    # Variants of a rule's feedback go through the same code: two configurations each are enough.
    if rule in FEEDBACK
    or model in ("sigmoid", "everything-softmax")
    or ("block" in rule and model == "everything-sigmoid")
}


@pytest.mark.parametrize("options", RULES_TIMES_MODELS.values(), ids=RULES_TIMES_MODELS)
def test_logits_loss_and_gradients_equal_the_reference(options):
    model = make_model(**options)
    idx, targets = make_batch()
    model.align_feedback("probes", 0, idx=idx)
    logits, loss, expected = Reference(model).gradients(idx, targets)
    actual_logits, actual_loss = model(idx, targets)
    torch.testing.assert_close(actual_logits, logits, rtol=LIMIT, atol=LIMIT)
    torch.testing.assert_close(actual_loss, loss, rtol=LIMIT, atol=0)
    errors = relative_error(model_gradients(model, idx, targets), expected)
    assert max(errors.values()) < LIMIT, {name: e for name, e in errors.items() if e >= LIMIT}


@pytest.mark.parametrize("method", [name for name in FEEDBACK if name != "bp"])
def test_the_references_of_the_rules_differ(method):
    # The comparison above could not tell a rule that is never active if its reference were backpropagation's.
    idx, targets = make_batch()
    gradients = Reference(make_model(method=method)).gradients(idx, targets)[2]
    exact = Reference(make_model()).gradients(idx, targets)[2]
    errors = relative_error(gradients, exact)
    assert errors.pop("head.weight") < LIMIT
    assert min(errors.values()) > 1e-2, errors
