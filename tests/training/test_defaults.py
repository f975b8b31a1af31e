"""A run is what its configuration says, whatever default dtype and device torch has."""

import pytest
import torch
from toys import interrupt_after, toy_corpus, toy_model, toy_train

from localgpt_core import train
from localgpt_core.experiments.execution import sample_text

NARROW = {"vq_codes": 11, "vq_init": "kmeans", "subspace_rank": 4, "mlp_topk": 9, "gated_blocks": True}
RUNS = {
    "bp": ({}, {}),
    "orthogonal": ({"method": "fa", "fa_init_mode": "orthogonal"}, {}),
    "jacobian": ({"method": "dfa", "fa_grape": True, "fa_init_mode": "sparse"}, {}),
    "probes": ({"method": "kp", "fa_grape": True, "fa_grape_update": "kaczmarz", "fa_grape_start": 2}, {}),
    "signs": ({"method": "sign_sym", "sign_magnitude": "random"}, {}),
    "points": ({"method": "dfa", "dfa_granularity": "sublayer", "dfa_norm": True, "dfa_inside": "kp"}, {}),
    "narrow": ({**NARROW, "sigmoid_bias_mode": "learned", "ln_mode": "center_scale"}, {"vq_start": 3}),
    "bfloat16": (
        {"attn_mode": "softmax", "fuse_attn_local": True, "dropout": 0.1},
        {"precision": "bfloat16"},
    ),
    "codes": (
        {"vq_codes": 5, "vq_groups": 2, "vq_init": "kmeans", "vq_rms": "fixed", "vq_backward": "tangent"},
        {"vq_start": 3},
    ),
    "float64": ({"ln_mode": "none", "vq_codes": 5}, {"precision": "float64"}),
}


def outcome(name, path, monkeypatch):
    """Return losses, diagnostics, tensors and a sample of a run that is broken off and goes on."""
    model, config = toy_model(**RUNS[name][0]), toy_train(**RUNS[name][1], steps=8, eval_interval=2)
    settings = {"checkpoint": path, "resume": True, "diagnose_every": 4}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert train(model, config, toy_corpus(), **settings).status == "interrupted"
    result = train(model, config, toy_corpus(), **settings)
    assert result.status == "finished"
    sample = sample_text(result.model, toy_corpus().vocabulary, "a", 30)
    return result.curves, str(result.diagnostics), result.model.state_dict(), sample


@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_to_the_last_bit_under_every_default(name, default, tmp_path, monkeypatch):
    expected = outcome(name, tmp_path / "expected", monkeypatch)
    if default == "meta":
        with torch.device("meta"):
            found = outcome(name, tmp_path / "found", monkeypatch)
    else:
        torch.set_default_dtype(getattr(torch, default))
        try:
            found = outcome(name, tmp_path / "found", monkeypatch)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[:2] == expected[:2] and found[3] == expected[3]
    for key, tensor in expected[2].items():
        assert found[2][key].dtype == tensor.dtype and torch.equal(found[2][key], tensor), key
