import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from torchtower.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from torchtower.training import BadInput, new_run, resumed_run, train
from torchtower.training.cifar10 import RECORD_BYTES
from torchtower.training.metrics import read_metrics
from torchtower.training.trainer import Trainer

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar-10-batches-bin"

# Three steps an epoch, so that a short run has several epochs and ends in the middle of one.
SHORT = {"dataset": "digits", "devices": ("cpu",), "batch_size": 400, "steps": 8, "lr": 0.2}


def _train(said, resume=False):
    # What chance came before in this process must not matter.
    torch.manual_seed(1234)
    run = resumed_run(said) if resume else new_run(said)
    train(run)
    return run


def _losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]


def _assert_same(left, right, name=""):
    assert type(left) is type(right), name
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.stride() == right.stride(), name
        assert torch.equal(left, right), name
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key in left:
            _assert_same(left[key], right[key], f"{name}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), name
        for index, pair in enumerate(zip(left, right, strict=True)):
            _assert_same(*pair, f"{name}.{index}")
    else:
        assert left == right, name


def _assert_same_run(left, right):
    """Compare two run folders in all that does not depend on the clock, bit for bit."""
    contents = [load_checkpoint(path / "checkpoint.pt") for path in (left, right)]
    for content in contents:
        del content["elapsed_s"]
    _assert_same(*contents)
    logs = [read_metrics(path / "metrics.jsonl") for path in (left, right)]
    for record in [*logs[0], *logs[1]]:
        record.pop("images_per_s", None)
    assert logs[0] == logs[1]


def _press_ctrl_c(monkeypatch, at_step, times=1):
    original = Trainer.train_step

    def train_step(self, *args):
        losses = original(self, *args)
        for _ in range(times if self.step == at_step else 0):
            signal.raise_signal(signal.SIGINT)
        return losses

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("stop_at", [2, 3, 7])
def test_a_run_stopped_by_ctrl_c_goes_on_to_the_very_same_bits(tmp_path, monkeypatch, stop_at, towers, dropout):
    said = {**SHORT, "towers": towers, "dropout": dropout}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _train({**said, "run_dir": whole})
    with monkeypatch.context() as patch:
        _press_ctrl_c(patch, stop_at)
        run = _train({**said, "run_dir": stopped})
    assert not run.finished and run.trainer.step == stop_at
    assert _train({"run_dir": stopped}, resume=True).finished
    assert len(_losses(stopped)) == 8
    _assert_same_run(whole, stopped)


def test_a_run_goes_on_from_the_checkpoint_before_its_first_step(tmp_path):
    new_run({**SHORT, "run_dir": tmp_path / "killed"})
    _train({"run_dir": tmp_path / "killed"}, resume=True)
    _train({**SHORT, "run_dir": tmp_path / "whole"})
    _assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_serves(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _press_ctrl_c(patch, 5, times=2)
        _train({**SHORT, "run_dir": tmp_path / "stopped"})
    assert load_checkpoint(tmp_path / "stopped" / "checkpoint.pt")["step"] == 3
    _train({"run_dir": tmp_path / "stopped"}, resume=True)
    _train({**SHORT, "run_dir": tmp_path / "whole"})
    _assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_ctrl_c_is_pythons_own_again_after_a_run(tmp_path):
    _train({**SHORT, "run_dir": tmp_path / "run"})
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_seed_decides_and_another_seed_decides_otherwise(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        _train({**SHORT, "seed": seed, "run_dir": tmp_path / name})
    _assert_same_run(tmp_path / "a", tmp_path / "b")
    assert _losses(tmp_path / "a") != _losses(tmp_path / "c")


def _assert_towers_agree(tmp_path, said):
    losses = []
    for towers in (1, 2, 4):
        run_dir = tmp_path / str(towers)
        _train({**said, "towers": towers, "run_dir": run_dir, "steps": 20, "augment": False})
        losses.append(_losses(run_dir))
    assert len(losses[0]) == 20 and losses[0][-1] != losses[0][0]
    for others in losses[1:]:
        np.testing.assert_allclose(others, losses[0], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [64, 50])
def test_digits_losses_do_not_depend_on_the_number_of_towers(tmp_path, batch_size):
    _assert_towers_agree(tmp_path, {"devices": ("cpu",), "batch_size": batch_size})


def _make_cifar10(folder):
    for name, rows, seed in (("data_batch_1", 100, 0), ("test_batch", 20, 1)):
        records = np.random.default_rng(seed).integers(0, 256, (rows, RECORD_BYTES), np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / f"{name}.bin")
    return folder


def test_cifar10_losses_do_not_depend_on_the_number_of_towers(tmp_path):
    data = REAL if REAL.is_dir() else _make_cifar10(tmp_path)
    said = {"dataset": "cifar10", "data": data, "devices": ("cpu",), "batch_size": 16}
    _assert_towers_agree(tmp_path, said)


def test_an_augmented_step_does_not_depend_on_the_number_of_towers(tmp_path):
    for towers in (1, 2):
        said = {**SHORT, "towers": towers, "run_dir": tmp_path / str(towers)}
        _train(said)
    np.testing.assert_allclose(_losses(tmp_path / "1"), _losses(tmp_path / "2"), rtol=1e-5)


def test_the_digits_are_learnt(tmp_path):
    run = _train({"devices": ("cpu",), "towers": 2, "epochs": 10, "run_dir": tmp_path / "run"})
    assert run.test_accuracy is not None and run.test_accuracy > 0.95
    losses = _losses(tmp_path / "run")
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) / 4


def test_the_rate_falls_by_one_factor_from_the_first_step_to_the_last(tmp_path):
    _train({**SHORT, "run_dir": tmp_path / "run"})
    rates = [r["lr"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in r]
    assert rates[0] == 0.2
    np.testing.assert_allclose(np.diff(np.log(rates)), np.log(0.05) / 8)


def test_a_run_that_is_there_is_not_written_over(tmp_path):
    said = {**SHORT, "run_dir": tmp_path / "run"}
    _train(said)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for name in ("checkpoint.pt", "metrics.jsonl", "curves.png", "tensorboard"):
        with pytest.raises(BadInput, match="expected a folder without a run"):
            new_run(said)
        path = tmp_path / "run" / name
        path.rename(tmp_path / name)
    for name in ("checkpoint.pt", "metrics.jsonl", "curves.png", "tensorboard"):
        (tmp_path / name).rename(tmp_path / "run" / name)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 5000},
        {"data": Path("somewhere")},
        {"dataset": "cifar10", "data": Path("nowhere")},
        {"devices": ("cuda:99",)},
        {"towers": 500},
    ],
)
def test_nothing_is_written_before_all_is_checked(tmp_path, wrong):
    with pytest.raises(BadInput):
        new_run({**SHORT, "run_dir": tmp_path / "runs" / "run", **wrong})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="--run-dir: expected a folder that can be written to"):
        new_run({**SHORT, "run_dir": tmp_path / "file" / "run"})


def test_a_loss_beyond_all_numbers_ends_the_run_and_spares_the_checkpoint(tmp_path):
    with pytest.raises(BadInput, match="--lr: expected one at which the loss stays finite"):
        _train({**SHORT, "steps": 60, "lr": 1e6, "run_dir": tmp_path / "run"})
    net = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["net"]
    assert all(bool(tensor.isfinite().all()) for tensor in net.values())


def _drop(content, key):
    del content[key]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["options"].update(model="cifar10"), "net tensor 'conv1.weight'"),
        (lambda c: c["net"].pop("logits.bias"), "net tensor 'logits.bias' .* absent"),
        (lambda c: c["averaged"].pop("n_averaged"), "averaged tensor 'n_averaged' .* absent"),
        (lambda c: c["optimizer"]["param_groups"].pop(), "expected a run of this network"),
        (lambda c: _drop(c, "chance"), "expected a run of this network .*chance"),
        (lambda c: _drop(c, "options"), "expected a training run"),
        (lambda c: c.update(data_checksum=5), "expected the images that the run"),
        (lambda c: c.update(chance={"cpu": torch.zeros(3)}), "expected a run of this network"),
        (lambda c: c.update(step=-1), "expected a step from 0 to 8"),
        (lambda c: c.update(step=9), "expected a step from 0 to 8"),
        (
            lambda c: c["options"].update(lr="fast"),
            "--lr: expected a finite number above 0, but got fast",
        ),
        (lambda c: c["options"].update(devices=3), "expected a training run"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_untouched(tmp_path, change, expected):
    new_run({**SHORT, "run_dir": tmp_path})
    path = tmp_path / "checkpoint.pt"
    content = load_checkpoint(path)
    change(content)
    save_checkpoint(path, content)
    before = path.read_bytes()
    with pytest.raises((CheckpointError, BadInput), match=expected) as caught:
        resumed_run({"run_dir": tmp_path})
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
