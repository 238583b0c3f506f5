import pytest
import torch

from auxfast.experiments.models import ConvNet

from .networks import parameters


def test_the_convnet_has_four_layers_and_their_parameters():
    model = ConvNet(10)
    assert parameters(model) == 113_482 == (27 + 3 * 576) * 64 + 4 * 2 * 64 + 650
    assert [value.dim() for value in model.parameters()].count(4) == 4


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (8, 8), (1, 3)])
def test_features_are_of_one_size_whatever_that_of_the_images(size):
    model = ConvNet(in_channels=1, width=8).eval()
    assert model.num_features == 8
    assert model(torch.randn(2, 1, *size)).shape == (2, 8)


def test_the_last_row_of_an_odd_image_counts():
    model = ConvNet(width=8).eval()
    images = torch.zeros(1, 3, 17, 17)
    before = model(images)
    images[..., 16, 16] = 10.0
    assert not torch.equal(model(images), before)
