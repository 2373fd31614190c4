from pathlib import Path

import pytest
import torch

from torchtower.checkpoint import CheckpointError
from torchtower.training.errors import BadInput
from torchtower.training.options import continued_options, new_options

PATH = Path("runs/old/checkpoint.pt")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"dataset": "mnist"}, "--dataset: expected one of cifar10, digits, but got mnist"),
        ({"model": "vgg"}, "--model: expected one of cifar10, digits, but got vgg"),
        ({"towers": 0}, "--towers: expected a whole number of at least 1, but got 0"),
        ({"batch_size": -3}, "--batch-size: expected a whole number of at least 1, but got -3"),
        ({"epochs": 0}, "--epochs: expected a whole number of at least 1, but got 0"),
        ({"steps": 0}, "--steps: expected a whole number of at least 1, but got 0"),
        ({"lr": 0.0}, "--lr: expected a finite number above 0, but got 0.0"),
        ({"lr": float("nan")}, "--lr: expected a finite number above 0, but got nan"),
        ({"lr": float("inf")}, "--lr: expected a finite number above 0, but got inf"),
        ({"seed": -1}, "--seed: expected a whole number from 0 to 2^63 - 1, but got -1"),
        ({"dropout": 1.0}, "--dropout: expected a probability below 1, but got 1.0"),
        ({"epochs": 1, "steps": 1}, "expected --epochs or --steps, but got both"),
        (
            {"devices": ("cpu", "cpu"), "towers": 3},
            "--devices: expected one device, or one for each of 3 towers, but got 2: cpu,cpu",
        ),
        (
            {"towers": 5, "devices": ("cpu",), "batch_size": 4},
            "--batch-size: expected at least one row for each of 5 towers, but got 4",
        ),
    ],
)
def test_nonsense_is_told_in_one_line(said, expected):
    with pytest.raises(BadInput) as caught:
        new_options(said)
    assert str(caught.value) == expected


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", "cpu;cpu"])
def test_a_device_that_does_not_exist_is_named(device):
    with pytest.raises(BadInput, match="--devices: expected") as caught:
        new_options({"devices": (device,)})
    assert repr(device) in str(caught.value) and "\n" not in str(caught.value)


def test_one_device_serves_all_towers():
    assert new_options({"devices": ("cpu",), "towers": 3}).devices == ("cpu",) * 3
    assert new_options({"devices": ("cpu", "cpu")}).devices == ("cpu",) * 2


@pytest.mark.parametrize(
    ("found", "towers", "expected"),
    [
        (["cpu"], None, ["cpu"]),
        (["cpu"], 3, ["cpu"] * 3),
        (["cuda:0", "cuda:1"], None, ["cuda:0", "cuda:1"]),
        (["cuda:0", "cuda:1"], 3, ["cuda:0", "cuda:1", "cuda:0"]),
        (["cuda:0", "cuda:1"], 1, ["cuda:0"]),
    ],
)
def test_towers_take_turns_on_the_machines_devices(monkeypatch, found, towers, expected):
    devices = [torch.device(name) for name in found]
    monkeypatch.setattr("torchtower.training.options.parse_device_ids", lambda names, *words: devices)
    said = {} if towers is None else {"towers": towers}
    assert list(new_options(said).devices) == expected


def test_steps_take_the_place_of_epochs():
    assert (new_options({"steps": 3}).epochs, new_options({"epochs": 3}).steps) == (None, None)
    assert new_options({}).epochs


@pytest.mark.parametrize("length", [{"steps": 30}, {"epochs": 2}])
def test_a_run_goes_on_with_the_options_it_began_with(length):
    said = {"towers": 2, "devices": ("cpu",), "lr": 0.3, "seed": 5, "augment": False, **length}
    began = new_options({**said, "run_dir": PATH.parent})
    saved = began.to_plain()
    assert continued_options({"run_dir": PATH.parent}, saved, PATH) == began
    assert continued_options({**said, "run_dir": PATH.parent}, saved, PATH) == began


@pytest.mark.parametrize(
    ("name", "option", "other"),
    [
        ("dataset", "--dataset", "cifar10"),
        ("model", "--model", "cifar10"),
        ("towers", "--towers", 1),
        ("batch_size", "--batch-size", 32),
        ("epochs", "--epochs", 3),
        ("steps", "--steps", 31),
        ("lr", "--lr", 0.2),
        ("seed", "--seed", 1),
        ("dropout", "--dropout", 0.5),
        ("augment", "--no-augment", False),
    ],
)
def test_a_run_does_not_go_on_with_other_options(name, option, other):
    saved = new_options({"towers": 2, "devices": ("cpu",), "steps": 30}).to_plain()
    with pytest.raises(CheckpointError, match=f"{option}: expected .*, but got {other}"):
        continued_options({"run_dir": PATH.parent, name: other}, saved, PATH)


def test_data_and_devices_may_have_moved():
    saved = new_options({"devices": ("cpu", "cpu"), "data": Path("/old")}).to_plain()
    said = {"run_dir": PATH.parent, "data": Path("/new"), "devices": ("cpu",)}
    options = continued_options(said, saved, PATH)
    assert (options.data, options.devices) == (Path("/new"), ("cpu", "cpu"))


@pytest.mark.parametrize("saved", [None, {}, {"dataset": "digits"}, [1]])
def test_a_checkpoint_of_something_else_is_no_run(saved):
    with pytest.raises(CheckpointError, match="expected a training run"):
        continued_options({"run_dir": PATH.parent}, saved, PATH)
