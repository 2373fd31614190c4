"""The examples run as they stand and do what they say."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_example_of_the_tower_dimension_rejects_the_broken_tower(capsys):
    runpy.run_path(str(EXAMPLES / "average_gradients.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.findall(r"agree: (\[.*\])", printed) == ["[0, 1, 2]"] * 3
    assert float(re.search(r"labels: ([\d.]+)%", printed)[1]) > 95


def test_no_example_is_left_untested():
    assert [path.name for path in sorted(EXAMPLES.glob("*.py"))] == ["average_gradients.py"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_opens_with_the_command_that_runs_it(path):
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]
