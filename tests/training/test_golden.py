"""Twenty steps of every rule, in float64, against committed loss curves: a refactoring changes nothing.

The curves are in golden/<case>.json. A change that is meant to alter them, and only such a change, writes
them anew, to be committed together with it and with the reason. A new case is written alone, with -k:

    pytest tests/training/test_golden.py --regenerate-golden

The text is an integer recurrence and all parameters are drawn in float64, so that nothing depends on how a
processor rounds float32; what is left are the last digits of float64, far below the tolerance.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import RULE_CASES

from localgpt_core import LocalGPT, LocalGPTConfig, TrainConfig
from localgpt_core.common.seeds import seed_from
from localgpt_core.corpus.batches import batch
from localgpt_core.training.step import build_optimizer, training_step

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-9  # relative

MODEL = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 12, "dropout": 0.0}
TRAIN = TrainConfig(seed=3, steps=20, batch_size=4, lr=1e-2, warmup=4, precision="float64")

CASES: dict[str, dict] = RULE_CASES | {
    "fa-grape-probes": {"method": "fa", "fa_grape": True, "fa_grape_n_probe": 3, "fa_grape_head": False},
    "bp-softmax-bias-gates": {"attn_mode": "softmax", "bias": True, "gated_blocks": True},
    "bp-learned-bias": {"sigmoid_bias_mode": "learned"},
    "bp-bottlenecks": {"mlp_topk": 9, "resid_topk": 7, "vq_codes": 16, "subspace_rank": 8},
    "bp-codes-tangent": {"vq_codes": 8, "vq_groups": 3, "vq_rms": "fixed", "vq_backward": "tangent"},
    "bp-codes-rotation": {"vq_codes": 8, "vq_groups": 4, "vq_backward": "rotation"},
    "bp-rounded": {"resid_bits": 4},
    "local": {"method": "fa", "ln_mode": "center_scale", "ste_sigmoid": True, "ste_gelu": True},
    "local-softmax": {"method": "dfa", "attn_mode": "softmax", "fuse_attn_local": True, "ln_mode": "ste"},
    "dfa-head": {"method": "dfa", "dfa_granularity": "sublayer", "dfa_norm": True, "dfa_source": "head"},
    "projected-frozen-emb": {"method": "sign_sym", "ln_mode": "projected", "freeze_emb": True},
}


def text(length: int = 400) -> np.ndarray:
    """Return integers below 11 with some order in them, from a linear congruential generator."""
    state, ids = 12345, []
    for _ in range(length):
        state = (1103515245 * state + 12345) % 2**31
        step = 1 if (state >> 16) % 4 else (state >> 20) % 11
        ids.append(((ids[-1] if ids else 0) + step) % 11)
    return np.array(ids, dtype=np.uint8)


def losses(options: dict, disturb: float = 0.0) -> list[float]:
    """Return the training loss of every step, with all weights changed by the factor 1 + disturb first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(TRAIN.seed, "model"))
        # As build_model does, which would draw in float32.
        model = LocalGPT(LocalGPTConfig(**MODEL, **options), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + disturb)
    optimizer = build_optimizer(model, TRAIN)
    ids = text()

    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = {"batch_size": TRAIN.batch_size, "block_size": MODEL["block_size"]}
        return batch(ids, **sizes, seed=TRAIN.seed, step=step)

    for i in range(model.config.fa_grape_start):
        model.align_feedback(TRAIN.seed, "start", i, idx=draw(i)[0])
    curve = []
    for step in range(TRAIN.steps):
        curve.append(training_step(model, optimizer, TRAIN, *draw(step), step).item())
    return curve


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_give_the_committed_losses(case, request):
    curve = losses(CASES[case])
    path = GOLDEN / f"{case}.json"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(json.dumps({"options": CASES[case], "losses": curve}, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert golden["options"] == CASES[case]
    assert curve == pytest.approx(golden["losses"], rel=TOLERANCE)


def test_no_curve_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CASES)


def test_no_two_curves_are_the_same():
    curves = [tuple(json.loads(path.read_text())["losses"]) for path in GOLDEN.glob("*.json")]
    assert len(set(curves)) == len(curves)


@pytest.mark.parametrize("case", CASES)
def test_the_curves_stand_rounding(case):
    # Weights that differ in the sixteenth digit, as another processor's may, stay far within the tolerance.
    golden = json.loads((GOLDEN / f"{case}.json").read_text())["losses"]
    assert losses(CASES[case], disturb=1e-15) == pytest.approx(golden, rel=TOLERANCE / 10)


def test_the_tolerance_sees_a_small_change():
    golden = json.loads((GOLDEN / "bp.json").read_text())["losses"]
    assert losses(CASES["bp"], disturb=1e-6) != pytest.approx(golden, rel=TOLERANCE)
