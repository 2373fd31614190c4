import pytest

from torchtower.training.errors import BadInput, import_extra
from torchtower.training.metrics import MetricsLog, draw_curves, read_metrics


def _write(path, steps, done=0):
    log = MetricsLog(path, done)
    for step in steps:
        log.append(step=step, loss=1 / 3 / step)
        if step % 2 == 0:
            log.append(step=step, test_loss=0.5, test_accuracy=0.25)
    log.close()


def test_what_is_logged_is_read_to_the_last_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2])
    assert read_metrics(path) == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 1 / 6},
        {"step": 2, "test_loss": 0.5, "test_accuracy": 0.25},
    ]


def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    _write(whole, range(1, 9))
    _write(resumed, range(1, 7))
    with resumed.open("a") as file:
        file.write('{"step": 7, "lo')
    _write(resumed, range(5, 9), done=4)
    assert resumed.read_text() == whole.read_text()


def test_flushed_lines_are_in_the_file(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.append(step=1, loss=2.0)
    log.flush()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    log.close()


@pytest.mark.parametrize("steps", [range(0), range(1, 2), range(1, 9)])
def test_curves_are_drawn_however_short_the_run_was(tmp_path, steps):
    _write(tmp_path / "metrics.jsonl", steps)
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_extra_is_told_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match=r"pip install 'torchtower\[train\]'"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert import_extra("json").loads("1") == 1
