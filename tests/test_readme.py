"""The README's example and commands are what a newcomer meets first: they must work as printed."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_printed_and_learns(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    loss, first, second = map(float, re.findall(r"\d+\.\d+", done.stdout))
    assert loss < 1.09  # log 3 is what a guess costs
    assert abs((first + second) / 2 - loss) < 2e-3  # two even shards


def test_the_commands_named_are_targets_of_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert {"train", "test"} <= named <= targets


def test_every_option_of_the_program_that_the_readme_names_exists():
    help_text = subprocess.run(
        [sys.executable, "-m", "torchtower", "train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    named = set(re.findall(r"`(--[a-z-]+)", README))
    assert named
    assert [option for option in sorted(named) if option not in help_text] == []


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
