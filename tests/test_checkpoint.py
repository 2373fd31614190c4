import os
import pickle
from pathlib import Path

import pytest
import torch

from torchtower.checkpoint import (
    CheckpointError,
    check_same_tensors,
    load_checkpoint,
    replace_atomically,
    save_checkpoint,
)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 7, "net": {"weight": torch.arange(2000.0)}, "names": ["a"]})
    return path


def test_what_is_saved_is_loaded(saved):
    content = load_checkpoint(saved)
    assert content["step"] == 7 and content["names"] == ["a"]
    assert torch.equal(content["net"]["weight"], torch.arange(2000.0))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved):
    old = saved.read_bytes()
    with pytest.raises(KeyboardInterrupt), replace_atomically(saved) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def test_the_new_file_is_on_disk_before_it_takes_the_name(saved, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def record(*args, name=name, original=original):
            size = os.fstat(args[0]).st_size if name == "fsync" else None
            calls.append((name, size))
            return original(*args)

        monkeypatch.setattr(os, name, record)
    with replace_atomically(saved) as file:
        file.write(b"x" * 100)
    assert [name for name, _ in calls] == ["fsync", "replace", "fsync"]
    assert calls[0] == ("fsync", 100)


def test_what_a_killed_writer_left_behind_is_overwritten(saved):
    saved.with_name(f".{saved.name}.part").write_bytes(b"x" * 10**6)
    save_checkpoint(saved, {"step": 8})
    assert load_checkpoint(saved)["step"] == 8
    assert list(saved.parent.iterdir()) == [saved]


def _one_line(path):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and "expected" in line
    return line


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    assert "cut short" in _one_line(saved)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"PK\x03\x04", bytes(5000), b"\x80\x02."])
def test_a_file_of_something_else_is_refused(saved, content):
    saved.write_bytes(content)
    _one_line(saved)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "there is none" in _one_line(tmp_path / "missing.pt")
    assert "there is none" in _one_line(tmp_path)


@pytest.mark.parametrize(
    "content", [{"step": 1}, {"format": "torchtower checkpoint", "version": 99}, [1], torch.ones(2)]
)
def test_another_format_or_version_is_refused_with_what_was_found(saved, content):
    torch.save(content, saved)
    assert "('torchtower checkpoint', 1)" in _one_line(saved)


class _Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("save", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_a_pickle_bomb_does_not_run(saved, save):
    mark = saved.parent / "ran"
    save({"format": "torchtower checkpoint", "version": 1, "net": _Bomb(mark)}, saved)
    assert "unsafe" in _one_line(saved)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"a": torch.ones(3)}, r"'a' .* to be \(2,\) torch.float32, but it is \(3,\)"),
        ({"a": torch.ones(2).double()}, "but it is .*float64"),
        ({}, "'a' .* but it is absent"),
        ("text", "'a' .* but it is absent"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, "'b' .* to be absent"),
    ],
)
def test_the_first_tensor_that_differs_is_named(found, named):
    with pytest.raises(CheckpointError, match=named):
        check_same_tensors(Path("c.pt"), "net", {"a": torch.zeros(2)}, found)
    check_same_tensors(Path("c.pt"), "net", {"a": torch.zeros(2)}, {"a": torch.ones(2)})
