"""Wide convolutions of the U-Net are matrix products in training, with the convolution's numbers."""

import pytest
import torch

from policy.model.denoisers.unet import WIDE, Convolution


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(5, 1, 2), (3, 2, 1), (1, 1, 0)])
def test_a_wide_convolution_in_training_equals_a_convolution(kernel_size, stride, padding):
    torch.manual_seed(0)
    layer = Convolution(WIDE, WIDE, kernel_size, stride=stride, padding=padding)
    found = []
    for training in (True, False):
        x = torch.linspace(-1, 1, 2 * WIDE * 5).sin().reshape(2, WIDE, 5).requires_grad_(True)
        y = layer.train(training)(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for product, convolved in zip(*found, strict=True):
        torch.testing.assert_close(product, convolved, rtol=1e-4, atol=1e-5)


def test_a_wide_convolution_in_training_makes_no_convolution():
    layer = Convolution(WIDE, WIDE, 3, padding=1).train()
    with torch.profiler.profile() as profile:
        layer(torch.zeros(2, WIDE, 4))
    names = {event.name for event in profile.events()}
    assert "aten::linear" in names
    assert "aten::conv1d" not in names
