import pytest
import torch

from torchtower.training.augment import Distortions
from torchtower.training.batches import Batches
from torchtower.training.data import Dataset
from torchtower.training.errors import BadInput


def _batches(rows=11, batch_size=4, seed=0, augment=False):
    # Rows are told apart by their labels.
    images = torch.randint(0, 256, (rows, 6, 6, 1), generator=torch.Generator().manual_seed(0))
    data = Dataset(images.byte(), torch.arange(rows), images.byte(), torch.arange(rows))
    return Batches(data, Distortions(4), batch_size, seed, augment)


def _epoch(batches, epoch):
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return [label for step in steps for label in batches.training(step)[1].tolist()]


def test_an_epoch_shows_no_row_twice_and_another_order_every_time():
    batches = _batches()
    epochs = [_epoch(batches, epoch) for epoch in range(4)]
    assert all(len(epoch) == len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert set().union(*epochs) == set(range(11))


def test_another_seed_gives_another_order():
    assert _epoch(_batches(seed=0), 0) != _epoch(_batches(seed=1), 0)


@pytest.mark.parametrize("augment", [False, True])
def test_a_batch_depends_on_its_step_and_not_on_what_came_before(augment):
    batches = _batches(augment=augment)
    in_turn = [batches.training(step) for step in range(5)]
    torch.rand(3)
    images, labels = _batches(augment=augment).training(4)
    assert torch.equal(images, in_turn[4][0]) and torch.equal(labels, in_turn[4][1])


def test_augmented_epochs_show_an_image_in_several_ways():
    batches = _batches(rows=4, augment=True)
    views = {batches.training(step)[0].abs().sum().item() for step in range(6)}
    assert len(views) > 1


def test_the_test_set_is_whole_and_in_its_own_order():
    parts = list(_batches().test(batch_size=4))
    assert [len(images) for images, _ in parts] == [4, 4, 3]
    assert torch.cat([labels for _, labels in parts]).tolist() == list(range(11))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(BadInput, match="expected at most the 11 training rows, but got 12"):
        _batches(batch_size=12)
