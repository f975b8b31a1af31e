"""torch.jit and torch.export record values, and would drop every backward pass of ours: in eval() only."""

import pytest
import torch
from cases import MODEL_CASES, RULE_CASES, SIZES

from localgpt_core import LocalGPT, LocalGPTConfig

CASES = RULE_CASES | MODEL_CASES


def model(case):
    torch.manual_seed(0)
    return LocalGPT(LocalGPTConfig(**SIZES | CASES[case]))


IDX = torch.arange(10).view(2, 5) % 7


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_trace_has_the_values_of_the_model_and_no_other_backward_pass(case):
    plain = model(case).eval()
    # One output: a trace cannot return the None in the place of the loss.
    plain.forward = plain.logits
    traced = torch.jit.trace(plain, IDX)
    torch.testing.assert_close(traced(IDX.flip(0)), plain.logits(IDX.flip(0)))
    assert "PythonOp" not in str(traced.inlined_graph)
    with pytest.raises(ValueError, match="cannot be traced or exported in training mode: call eval"):
        torch.jit.trace(plain.train(), IDX)


@pytest.mark.parametrize("case", ["fa", "dfa-block-norm", "ste_gelu", "softmax", "ln-scale", "ln-ste"])
def test_an_export_too(case):
    plain = model(case).eval()
    exported = torch.export.export(plain, (IDX,)).module()
    torch.testing.assert_close(exported(IDX.flip(0))[0], plain(IDX.flip(0))[0])
    with pytest.raises(Exception, match="cannot be traced or exported in training mode: call eval"):
        torch.export.export(plain.train(), (IDX,))
