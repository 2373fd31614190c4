import numpy as np
import pytest
import torch

from torchtower.training import new_run, train
from torchtower.training.models import build_model
from torchtower.training.summaries import Summaries
from torchtower.training.trainer import StepLosses


def _events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return events


def _scalars(events, tag):
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_run_records_every_towers_loss_and_their_mean(tmp_path):
    said = {"devices": ("cpu",), "towers": 3, "batch_size": 90, "steps": 30, "run_dir": tmp_path}
    train(new_run(said))
    events = _events(tmp_path / "tensorboard")
    towers = [_scalars(events, f"loss/tower_{tower}") for tower in range(3)]
    mean = _scalars(events, "loss/mean")
    assert list(mean) == [10, 20, 30]
    for step, value in mean.items():
        losses = [tower[step] for tower in towers]
        assert len(set(losses)) == 3
        np.testing.assert_allclose(np.mean(losses), value, rtol=1e-5)
    for tag in ("learning_rate", "images_per_s"):
        assert list(_scalars(events, tag)) == [10, 20, 30]
    assert list(_scalars(events, "test/accuracy")) == [15, 30]


def test_a_snapshot_shows_weights_gradients_activations_sparsity_and_images(tmp_path):
    net = build_model("cifar10", 3, 24, 10, dropout=0.5)
    images = torch.randn(20, 3, 24, 24)
    net(images).sum().backward()
    chance = torch.get_rng_state()
    summaries = Summaries(tmp_path, 0)
    summaries.add_snapshot(99, net, images)
    summaries.add_snapshot(100, net, images)
    summaries.close()
    assert net.training and torch.equal(torch.get_rng_state(), chance)
    events = _events(tmp_path)
    tags = events.Tags()
    for name, _ in net.named_parameters():
        assert {f"weights/{name}", f"gradients/{name}"} <= set(tags["histograms"])
    active = ["relu1", "relu2", "relu3", "relu4", "logits"]
    assert {f"activations/{name}" for name in active} <= set(tags["histograms"])
    for name in active:
        assert list(_scalars(events, f"sparsity/{name}")) == [100]
    sparsity = _scalars(events, "sparsity/relu1")[100]
    expected = (net.conv1(images[:16]) <= 0).float().mean()
    np.testing.assert_allclose(sparsity, expected.item(), rtol=1e-5)
    assert {tag.split("/")[0] for tag in tags["images"]} == {"images"}


def test_what_a_killed_run_recorded_after_its_checkpoint_is_hidden(tmp_path):
    for done, loss in ((0, 1.0), (20, 2.0)):
        summaries = Summaries(tmp_path, done)
        for step in range(done + 10, 51, 10):
            summaries.add_step(step, StepLosses(loss, [loss]), 0.1, 100.0)
        summaries.close()
    shown = [(event.step, event.value) for event in _events(tmp_path).Scalars("loss/mean")]
    assert shown == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]
