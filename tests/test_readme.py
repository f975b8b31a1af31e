import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_python_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    loss = float(capsys.readouterr().out.split()[0])
    assert 2.4 < loss < 4.0


def test_the_map_has_one_line_for_every_room():
    text = README.read_text(encoding="utf-8")
    table = text[text.index("## Where things are") :]
    named = re.findall(r"(?m)^\| `localgpt_core/([a-z]+)/` \|", table)
    rooms = {path.parent.name for path in (README.parent / "localgpt_core").glob("*/__init__.py")}
    assert sorted(named) == sorted(rooms)
