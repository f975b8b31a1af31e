import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_python_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    loss = float(capsys.readouterr().out.split()[0])
    assert 2.4 < loss < 4.0


def test_every_file_in_the_map_exists_and_every_module_is_in_it():
    text = README.read_text(encoding="utf-8")
    table = text[text.index("## Where things are") :]
    named = set(re.findall(r"`(?:localgpt_core/)?([a-z_]+\.py)`", table))
    present = {path.name for path in (README.parent / "localgpt_core").glob("*.py")}
    assert named == present - {"__init__.py", "__main__.py", "files.py", "seeds.py", "validation.py"}
