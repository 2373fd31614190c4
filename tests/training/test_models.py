import pytest
import torch
from torch import nn

from torchtower.training.models import MODELS, build_model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 24)])
def test_every_model_takes_every_data_sets_images(name, channels, size):
    net = build_model(name, channels, size, 10)
    assert net(torch.randn(2, channels, size, size)).shape == (2, 10)


def test_the_cifar10_model_is_the_tutorials():
    net = build_model("cifar10", 3, 24, 10)
    shapes = {name: tuple(param.shape) for name, param in net.named_parameters() if "weight" in name}
    assert shapes == {
        "conv1.weight": (64, 3, 5, 5),
        "conv2.weight": (64, 64, 5, 5),
        "dense3.weight": (384, 6 * 6 * 64),
        "dense4.weight": (192, 384),
        "logits.weight": (10, 192),
    }
    kinds = [type(layer).__name__ for layer in net if not isinstance(layer, nn.Dropout)]
    conv = ["Conv2d", "ReLU", "MaxPool2d", "LocalResponseNorm"]
    swapped = ["Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d"]
    assert kinds == [*conv, *swapped, "Flatten", *["Linear", "ReLU"] * 2, "Linear"]


def test_weights_begin_as_in_the_tutorial():
    torch.manual_seed(0)
    net = build_model("cifar10", 3, 24, 10)
    # A normal distribution cut at two deviations has 0.88 of its deviation left.
    for layer, stddev in [("conv2", 5e-2), ("dense3", 0.04), ("logits", 1 / 192)]:
        weight = net.get_submodule(layer).weight
        assert weight.abs().max() <= 2 * stddev
        torch.testing.assert_close(weight.std().item(), 0.88 * stddev, rtol=0.05, atol=0)
    biases = [float(net.get_submodule(name).bias[0].detach()) for name in ("conv1", "conv2", "dense3")]
    assert biases == pytest.approx([0.0, 0.1, 0.1])


def test_pooling_pads_only_below_and_to_the_right_as_tensorflow_does():
    images = torch.zeros(1, 64, 24, 24)
    images[..., [2, 23]] = 1.0
    pooled = build_model("cifar10", 3, 24, 10).pool1(images)
    assert pooled.shape == (1, 64, 12, 12)
    assert pooled[0, 0, 0].tolist() == [1.0, 1.0, *[0.0] * 9, 1.0]


def test_only_the_dense_layers_weights_decay():
    net = build_model("cifar10", 3, 24, 10)
    names = {param: name for name, param in net.named_parameters()}
    decayed, others = net.parameter_groups(0.004)
    assert [names[param] for param in decayed["params"]] == ["dense3.weight", "dense4.weight"]
    assert decayed["weight_decay"] == 0.004 and "weight_decay" not in others
    assert len(decayed["params"]) + len(others["params"]) == len(names)
