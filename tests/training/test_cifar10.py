import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from torchtower.training.cifar10 import RECORD_BYTES
from torchtower.training.data import RECIPES
from torchtower.training.errors import BadInput
from torchtower.training.unpickle import load_plain

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar-10-batches-bin"


def _records(rows, seed):
    records = np.random.default_rng(seed).integers(0, 256, (rows, RECORD_BYTES), np.uint8)
    records[:, 0] %= 10
    return records


def _write_binary(folder, **batches):
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in batches.items():
        records.tofile(folder / f"{name}.bin")


def _write_python(folder, protocol=2, **batches):
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in batches.items():
        content = {
            b"batch_label": name.encode(),
            b"labels": [int(label) for label in records[:, 0]],
            b"data": records[:, 1:].copy(),
            b"filenames": [b"cat.png"] * len(records),
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol))


def _load(folder):
    return RECIPES["cifar10"].load(folder)


def test_a_pixel_of_the_binary_layout_lands_where_the_format_says(tmp_path):
    records = _records(3, 0)
    _write_binary(tmp_path, data_batch_1=records, test_batch=_records(2, 1))
    data = _load(tmp_path)
    assert data.train_labels.tolist() == records[:, 0].tolist()
    assert data.train_images.shape == (3, 32, 32, 3) and data.test_images.shape[0] == 2
    row, column, colour = 7, 30, 2
    assert data.train_images[1, row, column, colour] == records[1, 1 + colour * 1024 + row * 32 + column]


def test_all_training_batches_are_read_in_order(tmp_path):
    first, second = _records(3, 0), _records(4, 1)
    _write_binary(tmp_path, data_batch_1=first, data_batch_2=second, test_batch=first)
    labels = [*first[:, 0].tolist(), *second[:, 0].tolist()]
    assert _load(tmp_path).train_labels.tolist() == labels


@pytest.mark.parametrize("protocol", [2, 4])
def test_both_layouts_and_their_parent_folder_give_the_same_images(tmp_path, protocol):
    train, test = _records(5, 0), _records(2, 1)
    binary, python = tmp_path / "a/cifar-10-batches-bin", tmp_path / "b/cifar-10-batches-py"
    _write_binary(binary, data_batch_1=train, test_batch=test)
    _write_python(python, protocol, data_batch_1=train, test_batch=test)
    loaded = [_load(folder) for folder in (binary, binary.parent, python, python.parent)]
    for data in loaded[1:]:
        for name, tensor in vars(data).items():
            assert torch.equal(tensor, getattr(loaded[0], name))


def test_a_batch_that_python_2_pickled_is_read(tmp_path):
    # As the official files: protocol 2, numpy's old module name, raw bytes as str.
    data = bytes(range(256)) * 12
    pickled = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01"
        b"\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
        + data
        + b"tbU\x06labelsq\x08]q\x09K\x03au."
    )
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickled)
    loaded = _load(tmp_path)
    assert loaded.train_labels.tolist() == [3]
    assert loaded.train_images[0, 0, 5].tolist() == [5, 5, 5]


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_bomb_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "bomb").write_bytes(pickle.dumps({b"data": _Bomb(mark)}, 2))
    with pytest.raises(BadInput, match="unsafe"):
        load_plain(tmp_path / "bomb")
    assert not mark.exists()


@pytest.mark.parametrize("name", [b"posix\nsystem", b"builtins\neval", b"numpy\nload"])
def test_a_pickle_gets_no_other_name(tmp_path, name):
    (tmp_path / "bomb").write_bytes(b"c" + name + b"\n.")
    with pytest.raises(BadInput, match=r"it asks for"):
        load_plain(tmp_path / "bomb")


def _cut(path, content):
    path.write_bytes(content[:-5])


def _wrong_label(path, content):
    path.write_bytes(content[:RECORD_BYTES] + b"\xc8" + content[RECORD_BYTES + 1 :])


def _empty(path, content):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_cut, "whole number of 3073-byte records in .*batch.*, but got 30725 bytes"),
        (_wrong_label, "labels 0 to 9 in .*batch.*, but record 1 has 200"),
        (_empty, "whole number of 3073-byte records in .*batch.*, but got 0 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["data_batch_1.bin", "test_batch.bin"])
def test_a_damaged_binary_file_is_named_with_what_is_wrong(tmp_path, name, damage, expected):
    _write_binary(tmp_path, data_batch_1=_records(10, 0), test_batch=_records(10, 1))
    path = tmp_path / name
    damage(path, path.read_bytes())
    with pytest.raises(BadInput, match=expected) as caught:
        _load(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def _other_content(content):
    def damage(path, _):
        path.write_bytes(pickle.dumps(content, 2))

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_cut, "cut short"),
        (_empty, "cut short"),
        (_other_content([1, 2]), "expected a dict"),
        (
            _other_content({b"data": np.zeros((2, 9), np.uint8), b"labels": [1, 2]}),
            "expected a dict",
        ),
        (_other_content({b"data": np.uint8(3), b"labels": [1]}), "cut short|expected a dict"),
        (_other_content({b"data": np.array(3, np.uint8), b"labels": [1]}), "expected a dict"),
        (
            _other_content({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
            "expected a dict",
        ),
        (
            _other_content({b"data": np.zeros((1, 3072), np.uint8), b"labels": [11]}),
            "record 0 has 11",
        ),
    ],
)
def test_a_damaged_pickle_is_named_with_what_is_wrong(tmp_path, damage, expected):
    _write_python(tmp_path, data_batch_1=_records(3, 0), test_batch=_records(3, 1))
    path = tmp_path / "data_batch_1"
    damage(path, path.read_bytes())
    with pytest.raises(BadInput, match=expected) as caught:
        _load(tmp_path)
    assert "data_batch_1" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_test_batch_is_named(tmp_path):
    _write_binary(tmp_path, data_batch_1=_records(3, 0))
    with pytest.raises(BadInput, match=r"expected a file at .*test_batch\.bin"):
        _load(tmp_path)


def test_a_named_folder_without_the_files_is_not_taken_for_a_wish_to_download(tmp_path):
    with pytest.raises(BadInput, match="it holds none"):
        _load(tmp_path)
    with pytest.raises(BadInput, match="expected a folder"):
        _load(tmp_path / "missing")


def test_the_checksum_changes_with_any_pixel_or_label(tmp_path):
    records = _records(4, 0)
    sums = set()
    for position in (None, 0, RECORD_BYTES - 1):
        changed = records.copy()
        if position is not None:
            changed[2, position] = (changed[2, position] + 1) % 10
        _write_binary(tmp_path, data_batch_1=changed, test_batch=records)
        sums.add(_load(tmp_path).checksum())
    assert len(sums) == 3


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no CIFAR-10 images at {REAL}")
def test_real_images_are_read():
    data = _load(REAL)
    assert data.train_images.shape == (10_000, 32, 32, 3)
    # Neighbouring pixels of a photograph are alike; read in another order they would not be.
    images = data.train_images.float()
    across, down = images.diff(dim=2).abs().mean(), images.diff(dim=1).abs().mean()
    assert float(across) < 20 and float(down) < 20 and float(images.diff(dim=3).abs().mean()) < 20
    assert data.train_labels.bincount().tolist() == [1000] * 10
