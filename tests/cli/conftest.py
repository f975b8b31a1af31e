"""`localgpt` as at a shell, in a folder with a text and a suite."""

import sys
from pathlib import Path

import pytest
from toys import TOY_SUITE, toy_text

from localgpt_core.cli import commands


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Go into a folder with toy.txt and suite.toml, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    Path("toy.txt").write_text(toy_text())
    Path("suite.toml").write_text(TOY_SUITE)
    return tmp_path


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    """Return a function that runs `localgpt` and returns its exit status, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["/usr/bin/localgpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            commands.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run
