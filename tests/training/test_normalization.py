import pytest
import torch
from torch import nn

from torchtower.training.normalization import LocalResponseNorm


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "size"), [(64, 9), (5, 3), (3, 9)])
def test_the_fast_form_has_the_values_and_gradients_of_torchs(channels, size, memory_format):
    torch.manual_seed(0)
    images = 3 * torch.randn(2, channels, 6, 5, dtype=torch.float64)
    images = images.contiguous(memory_format=memory_format)
    weights = torch.randn_like(images)
    # Both keep alpha / size, this one in float32: a power of two is the same number in both.
    alpha = size / 16
    results = []
    for norm in (
        LocalResponseNorm(channels, size, alpha=alpha, bias=1.5).double(),
        nn.LocalResponseNorm(size, alpha=alpha, beta=0.75, k=1.5),
    ):
        leaf = images.clone().requires_grad_()
        out = norm(leaf)
        (out * weights).sum().backward()
        results.append((out, leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_the_constants_are_no_part_of_a_checkpoint():
    assert LocalResponseNorm(8).state_dict() == {}
