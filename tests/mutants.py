"""Change the package in one place, run the tests that should notice, and list the changes that none notices.

    make mutants                               160 changes drawn from all modules, on two copies side by side
    make mutants ARGS="--number 40 --seed 2"   another sample
    make mutants ARGS="--only layers/linear"   of one module or room

cosmic-ray finds the places (an operator, a number, a condition, an exception, a decorator, a loop); they are
drawn with equal chances, and then one of the changes that a place has. Only clones of the commit at HEAD are
changed: what is not committed is not seen. mutants.toml says what is left out and which tests look where.

A change that makes a test fail, or run out of time, is killed. One that survives is printed with its diff:
either it changes nothing that can be observed (it is equivalent, and counts against nobody), or a test is
missing: write it, see it red under the change and green without. "Unclear" is a run of tests that something
else stopped: try again.
"""

import argparse
import ast
import difflib
import os
import random
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "localgpt_core"
CONFIG = tomllib.loads((ROOT / "tests/mutants.toml").read_text())


def places(module: str) -> list[list[tuple[str, str, int, int]]]:
    """Return for each place of ``module`` its changes: module, operator, occurrence, line."""
    source, found = (PACKAGE / module).read_text(), {}
    tree, nodes = list(ast.walk(ast.parse(source))), list(ast_nodes(get_ast(source)))
    parts = [(getattr(node, name, None), "") for node in tree for name in ("annotation", "returns")]
    if module in CONFIG["figures"]:
        parts += [(node.value, "Number") for node in tree if isinstance(node, ast.keyword)]
    left_out = [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset), kind) for p, kind in parts if p]
    for name in operator_names():
        if get_operator(name).arguments() or name.endswith(tuple(CONFIG["operators"])):
            continue
        spots = [spot for node in nodes for spot in get_operator(name)().mutation_positions(node)]
        for i, (start, end) in enumerate(spots):
            if not any(a <= start and end <= b and kind in name for a, b, kind in left_out):
                found.setdefault((start, end), []).append((module, name, i, start[0]))
    return list(found.values())


def tests_of(module: str) -> list[str]:
    """Return the test files for ``module``: its namesake first, then those that import it, then the rest."""
    name, table = module.removesuffix(".py"), CONFIG["tests"]
    room, stem = name.split("/")
    listed = [ROOT / path for path in table.get(name, table.get(room, [f"tests/{room}"]))]
    files = [f for path in listed for f in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]
    imports = (f"localgpt_core.{room}.{stem} ", f"localgpt_core.{room} import {stem}")
    files.sort(key=lambda f: (f.stem != f"test_{stem}", not any(i in f.read_text() for i in imports)))
    return [str(file.relative_to(ROOT)) for file in files] + CONFIG["always"]


def outcome(copy: Path, files: list[str], timeout: float) -> str:
    """Return what these tests say about ``copy``, each file in a process of its own."""
    # Bytecode is told by a file's size and second, and a change may keep both.
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    for file in files:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", file]
        with subprocess.Popen(command, cwd=copy, env=env, **quiet) as process:
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return "timed out"
        if code:  # 1: a test failed, 2: a test file could not be imported; else it was not the tests
            return "killed" if code in (1, 2) else "unclear"
    return "survived"


def main() -> None:
    """Draw the changes, try each of them, print what became of them."""
    parser = argparse.ArgumentParser()
    # How many, drawn by which seed, of which room or module, and the seconds for one test file.
    for name, default in {"number": 160, "seed": 0, "only": "", "timeout": 300}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    chosen = parser.parse_args()
    modules = [str(p.relative_to(PACKAGE)) for p in sorted(PACKAGE.glob("*/*.py")) if p.stem != "__init__"]
    modules = [m for m in modules if m not in CONFIG["without"] and m.startswith(chosen.only)]
    found, rng = [place for module in modules for place in places(module)], random.Random(chosen.seed)
    drawn = [rng.choice(place) for place in rng.sample(found, min(chosen.number, len(found)))]
    print(f"{len(drawn)} changes drawn from {len(found)} places", flush=True)
    copies, counts = Queue(), Counter()

    def without_change(file: str) -> None:
        copy = copies.get()
        fate = outcome(copy, [file], chosen.timeout)
        copies.put(copy)
        if fate != "survived":
            raise SystemExit(f"without any change, {file} fails or takes too long")

    def try_change(change: tuple[str, str, int, int]) -> None:
        copy, (module, name, i, line) = copies.get(), change
        path = copy / "localgpt_core" / module
        before = path.read_text()
        after = mutate_code(before, get_operator(name)(), i)
        path.write_text(after)
        fate = outcome(copy, tests_of(module), chosen.timeout)
        path.write_text(before)
        copies.put(copy)
        counts[fate, module.split("/")[0]] += 1
        diff = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))[3:]
        report = [
            f"{fate}  localgpt_core/{module}:{line}",
            *(diff if fate in ("survived", "unclear") else []),
        ]
        print("\n    ".join(report), flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for number in range(2):
            copies.put(Path(folder) / str(number))
            subprocess.run(["git", "clone", "-q", "--shared", ROOT, f"{folder}/{number}"], check=True)
        files = sorted({file for change in drawn for file in tests_of(change[0])})
        list(pool.map(without_change, files))
        list(pool.map(try_change, drawn))
    for fate in ("killed", "timed out", "survived", "unclear"):
        rooms = {room: number for (kind, room), number in sorted(counts.items()) if kind == fate}
        print(f"{fate}: {sum(rooms.values())}", rooms)


if __name__ == "__main__":
    main()
