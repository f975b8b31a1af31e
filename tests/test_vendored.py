"""What is vendored from npm has the bytes that tools/vendor.json names, and nothing lies beside it."""

import hashlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCK = json.loads((ROOT / "tools/vendor.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LOCK)
def test_vendored_files_are_those_of_the_lock_file(name):
    package = LOCK[name]
    folder = ROOT / package["folder"]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert found == {Path(file).name: sha256 for file, sha256 in package["files"].items()}


@pytest.mark.parametrize("name", LOCK)
def test_a_vendored_package_has_its_licence_and_names_its_version(name):
    package = LOCK[name]
    folder = ROOT / package["folder"]
    assert (folder / "LICENSE").is_file() and package["licence"]
    (script,) = folder.glob("*.js")
    assert f"v{package['version']}" in script.read_text(encoding="utf-8")[:100]
