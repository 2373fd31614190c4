"""The command line: `torchtower train`, also as `python -m torchtower train`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torchtower
from torchtower.checkpoint import CheckpointError

BAD_INPUT = 2
INTERRUPTED = 130


class _UsageError(ValueError):
    """The command line cannot be understood."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} ('torchtower train --help' lists what is expected)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: The words after the program's name; None takes those of the process.

    Returns:
        The exit code: 0 after a finished run, 2 after bad input, with one line on stderr that says
        what was expected and what was found, and 130 after Ctrl-C.

    Example:
        >>> main(["train", "--dataset", "mnist"])
        2
    """
    # Imported late: `--help` and the package itself do without the training program.
    from torchtower.training.errors import BadInput

    try:
        said = vars(_parser().parse_args(argv))
        return _train(said)
    except (BadInput, CheckpointError, _UsageError) as error:
        print(f"torchtower: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("torchtower: interrupted", file=sys.stderr)
        return INTERRUPTED


def _train(said: dict[str, object]) -> int:
    from torchtower.training import new_run, resumed_run, train

    del said["command"]
    run = resumed_run(said) if said.pop("resume", False) else new_run(said)
    train(run)
    if run.finished:
        return 0
    print(
        f"torchtower: stopped at step {run.trainer.step} of {run.total}; go on with: "
        f"torchtower train --resume --run-dir {run.files.path}",
        file=sys.stderr,
    )
    return INTERRUPTED


def _parser() -> _Parser:
    parser = _Parser("torchtower", description="Train one network on every device of a machine.")
    parser.add_argument("--version", action="version", version=f"torchtower {torchtower.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    # Only what is said gets into the namespace: a resumed run takes all else from its checkpoint.
    train = commands.add_parser(
        "train",
        help="train a network on images, in towers",
        description="Train a network on images, in towers. Defaults depend on the data set.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, kind, metavar, text in _OPTIONS:
        train.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    train.add_argument("--no-augment", dest="augment", action="store_false", help="do not distort the images")
    train.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, to the same numbers")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


_OPTIONS: tuple[tuple[str, Callable[[str], object], str, str], ...] = (
    ("dataset", str, "NAME", "digits (default; comes with scikit-learn) or cifar10"),
    ("data", Path, "DIR", "folder of CIFAR-10's files; without it they are downloaded once"),
    ("model", str, "NAME", "cifar10 or digits; default: the data set's own"),
    ("towers", int, "N", "number of replicas; default: one on each device"),
    ("devices", _names, "NAME,...", "one for all, or one a tower; default: accelerators, else cpu"),
    ("batch-size", int, "N", "rows of one step, over all towers"),
    ("epochs", int, "N", "length of the run"),
    ("steps", int, "N", "length of the run, instead of --epochs"),
    ("lr", float, "X", "learning rate of the first step, from which it decays exponentially"),
    ("seed", int, "N", "what all chance comes from; default: 0"),
    ("dropout", float, "P", "probability of the dense layers' dropout; default: 0"),
    ("run-dir", Path, "DIR", "folder for all that the run writes; default: runs/DATASET-TIME"),
)
