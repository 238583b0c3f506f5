from itertools import pairwise

import torch

from auxfast.experiments.models import PointNet

from .networks import parameters, unfilled


def _pointwise(*widths):
    """Parameters of layers without biases, each with BatchNorm."""
    return sum(i * o + 2 * o for i, o in pairwise(widths))


def test_pointnet_has_the_layers_of_the_paper_without_transforms():
    published = _pointwise(3, 64, 64) + _pointwise(64, 64, 128, 1024) + _pointwise(1088, 512, 256, 128) + 129 * 50
    assert parameters(unfilled(PointNet, 50, width=64)) == published
    assert parameters(PointNet(50)) == 222_674


def test_a_prediction_is_of_its_point_and_of_the_shape_whatever_the_order():
    model = PointNet(5, width=4, activation="softplus").eval().double()
    points, order = torch.randn(2, 3, 7, dtype=torch.float64), torch.randperm(7)
    out = model(points)
    assert out.shape == (2, 5, 7)
    torch.testing.assert_close(model(points[:, :, order]), out[:, :, order])
    points[0, :, 0] = 100.0
    changed = model(points)
    assert not torch.equal(changed[0, :, 1:], out[0, :, 1:])
    assert torch.equal(changed[1], out[1])
