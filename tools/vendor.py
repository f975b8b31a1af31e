"""Vendor what the pages and their tests need of npm: `vendor.json` lists it, with the SHA-256 of every file.

    python tools/vendor.py          # what is listed, from the registry: writes the files and their sums
    python tools/vendor.py --check  # compares instead, and ends with status 1 if a byte differs

A new version is a changed number in `vendor.json`. Needs `npm`; nothing else in this project does.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = Path(__file__).with_name("vendor.json")


def packed(name: str, version: str, files: list[str]) -> dict[str, bytes]:
    """Return the bytes of ``files`` in an npm package, as the registry has it."""
    with tempfile.TemporaryDirectory() as folder:
        order = ["npm", "pack", f"{name}@{version}", "--silent", "--pack-destination", folder]
        subprocess.run(order, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).iterdir()
        with tarfile.open(archive) as tar:
            return {file: tar.extractfile(f"package/{file}").read() for file in files}


def vendored(package: dict) -> dict[str, Path]:
    """Return where the files of a package of `vendor.json` are kept here, by their names in it."""
    return {file: ROOT / package["folder"] / Path(file).name for file in package["files"]}


def main() -> int:
    """Write or compare, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the registry, and write nothing")
    check = parser.parse_args().check
    lock = json.loads(LOCK.read_text(encoding="utf-8"))
    differing = []
    for name, package in lock.items():
        content = packed(name, package["version"], list(package["files"]))
        for file, path in vendored(package).items():
            sha256 = hashlib.sha256(content[file]).hexdigest()
            if check:
                same = path.exists() and path.read_bytes() == content[file]
                if not same or package["files"][file] != sha256:
                    differing.append(str(path.relative_to(ROOT)))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content[file])
            package["files"][file] = sha256
    if not check:
        LOCK.write_text(json.dumps(lock, indent=2) + "\n", encoding="utf-8")
    for path in differing:
        print(f"{path} is not what the registry has", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
