"""Every row of the page "What localize can do" is tried again, and says what is true."""

import pytest
from modules import CASES, PAGE, rows

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
