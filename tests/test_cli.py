import random
import signal
import subprocess
import sys
import time

import pytest

import torchtower
from torchtower.checkpoint import load_checkpoint
from torchtower.cli import main
from torchtower.training.metrics import read_metrics
from torchtower.training.trainer import Trainer

# Three steps an epoch: a checkpoint is being written for much of the time.
SHORT = ["train", "--devices", "cpu", "--towers", "2", "--batch-size", "400", "--steps"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "command"),
        (["trian"], "'trian'"),
        (["train", "--foo", "3"], "--foo"),
        (["train", "--lr", "fast"], "'fast'"),
        (["train", "--tow", "2"], "--tow"),
        (["train", "--towers", "0"], "at least 1, but got 0"),
        (["train", "--dataset", "mnist"], "expected one of cifar10, digits, but got mnist"),
        (["train", "--devices", "cuda:99"], "cuda:99"),
        (["train", "--towers", "9", "--batch-size", "8"], "9 towers, but got 8"),
        (["train", "--dataset", "cifar10", "--data", "/no/where"], "expected a folder"),
        (["train", "--resume"], "expected --run-dir"),
        (["train", "--resume", "--run-dir", "nowhere"], "expected a file at nowhere/checkpoint.pt"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(capsys, monkeypatch, tmp_path, words, expected):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("torchtower: ")
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_says_what_it_does_and_leaves_its_files(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main([*SHORT, "7"]) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("digits-")
    names = sorted(path.name for path in run_dir.iterdir())
    assert names == ["checkpoint.pt", "curves.png", "metrics.jsonl", "tensorboard"]
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split()[:4] for line in lines] == [
        ["epoch", "1", "step", "3/7"],
        ["epoch", "2", "step", "6/7"],
        ["epoch", "3", "step", "7/7"],
    ]
    assert all("test accuracy" in line and "images/s" in line and "left" in line for line in lines)
    assert "Results" in out and "2 on cpu" in out and run_dir.name in out.replace("\n", "")


def test_a_finished_run_is_refused_without_resume_and_shown_again_with_it(capsys, tmp_path):
    words = [*SHORT, "3", "--run-dir", str(tmp_path / "run")]
    assert main(words) == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--run-dir", str(tmp_path / "run")]) == 0
    assert "Results" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_ctrl_c_says_how_to_go_on_and_exits_with_130(capsys, monkeypatch, tmp_path):
    run_dir = tmp_path / "run"
    original = Trainer.train_step

    def train_step(self, *args):
        losses = original(self, *args)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return losses

    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert main([*SHORT, "6", "--run-dir", str(run_dir)]) == 130
    err = capsys.readouterr().err
    command = f"torchtower train --resume --run-dir {run_dir}"
    assert err == f"torchtower: stopped at step 2 of 6; go on with: {command}\n"
    assert main(command.split()[1:]) == 0


def _start(*words):
    command = [sys.executable, "-m", "torchtower", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _kill_after_another_checkpoint(process, path, delay_s):
    def stamp():
        return path.stat().st_mtime_ns if path.exists() else None

    before = stamp()
    while stamp() == before and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_run_killed_at_any_moments_goes_on_to_the_same_end(tmp_path):
    steps = 150
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*SHORT, str(steps), "--run-dir", str(whole)]) == 0
    moments, words = random.Random(), [*SHORT, str(steps)]
    reached = []
    for _ in range(2):
        process = _start(*words, "--run-dir", str(killed))
        _kill_after_another_checkpoint(process, killed / "checkpoint.pt", moments.random() * 0.3)
        reached.append(load_checkpoint(killed / "checkpoint.pt")["step"])
        words = ["train", "--resume"]
    assert reached == sorted(reached) and reached[0] < steps
    assert main([*words, "--run-dir", str(killed)]) == 0
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (whole, killed)]
    for record in [*logs[0], *logs[1]]:
        record.pop("images_per_s", None)
    assert logs[0] == logs[1] and len(logs[0]) == steps + (steps + 2) // 3


def test_the_package_does_without_the_training_programs_dependencies():
    heavy = ["torchtower.training", "matplotlib", "sklearn", "tensorboard", "rich"]
    code = f"import sys, torchtower; sys.exit(str([name for name in {heavy} if name in sys.modules]))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stderr.strip() == "[]"


@pytest.mark.parametrize("extra", ["rich", "matplotlib", "tensorboard", "sklearn.datasets"])
def test_a_missing_extra_is_told_before_anything_is_written(capsys, monkeypatch, tmp_path, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    assert main([*SHORT, "3", "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'torchtower[train]'" in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_dir_that_cannot_be_written_to_is_told(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert main([*SHORT, "3", "--run-dir", str(tmp_path / "file" / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--run-dir: expected a folder that can be written to" in err


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    names = "dataset data model towers devices batch-size epochs steps lr seed dropout run-dir no-augment resume"
    for name in names.split():
        assert f"--{name} " in out or f"--{name}\n" in out or f"--{name}]" in out


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"torchtower {torchtower.__version__}\n"
