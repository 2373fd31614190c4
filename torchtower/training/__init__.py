"""The training program: known data sets and networks, trained by towers, resumable to the bit.

Example:
    >>> from pathlib import Path
    >>> import tempfile
    >>> said = {"steps": 2, "run_dir": Path(tempfile.mkdtemp())}
    >>> run = new_run(said)
    >>> run.finished
    False
"""

from torchtower.training.errors import BadInput
from torchtower.training.loop import train
from torchtower.training.run import Run, new_run, resumed_run

__all__ = ["BadInput", "Run", "new_run", "resumed_run", "train"]
