"""Every row of the page "What localize can do" is tried again, and says what is true."""

import pytest
from modules import CASES, PAGE, rows

from localgpt_core import alignment, describe, localize, weight_transport

# What torch.compile uses of PyTorch is partly deprecated, and it looks at .grad of what is no leaf. The
# quantised tensors of torch are to be removed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.mark.parametrize("name", CASES)
def test_the_page_says_what_a_module_and_every_rule_do(name):
    row, lines = rows(name)
    written = PAGE.read_text().splitlines()
    assert row in written
    title = CASES[name].title
    assert [line for line in written if line.startswith((f"- {title}:", f"- {title}, under"))] == lines


def test_the_page_has_a_row_for_every_module_and_nothing_else():
    written = PAGE.read_text()
    assert [line for line in written.splitlines() if line.startswith("| ")][1:] == [
        next(line for line in written.splitlines() if line.startswith(f"| {case.title} |"))
        for case in CASES.values()
    ]


SHOWN = [
    name
    for name in CASES
    if name not in ("ddp", "quantised", "reentrant", "lora-after") and not name.startswith("compile")
]


@pytest.mark.parametrize("name", SHOWN)
def test_what_measures_a_rule_measures_it_in_every_kind_of_module(name):
    case = CASES[name]
    for method, reads in {"bp": "weight", "fa": "nothing", "sign_sym": "sign", "kp": "nothing"}.items():
        module, _ = case.build()
        localized = localize(module, method=method)

        def loss(module=module):
            return module(case.inputs()).square().mean()

        found = weight_transport(module, loss=loss)
        assert found.keys() == set(localized.layers)
        assert set(found.values()) <= {reads, "silent"} and reads in found.values()
        measured = alignment(module, loss=loss)
        assert (measured.total_cosine > 1 - 1e-9) == (method == "bp")
        lines = describe(module, loss=loss).splitlines()
        names = [n for n, _ in module.named_parameters()]
        assert [line.split()[0] for line in lines[1:]] == names
        assert {"bp": "W of", "fa": "B of", "sign_sym": "sign W of", "kp": "B of"}[method] in "\n".join(lines)


def test_a_module_of_another_kind_is_described_by_its_loss_only():
    with pytest.raises(ValueError, match="loss=None: is needed for a MLP"):
        describe(CASES["mlp"].build()[0])
    with pytest.raises(ValueError, match="given=.*: allowed are idx and targets, or loss alone"):
        weight_transport(CASES["mlp"].build()[0])
