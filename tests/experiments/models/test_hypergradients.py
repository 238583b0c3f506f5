"""Hypergradients through every network, against differences of gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import auxfast
from auxfast.experiments.models import DGCNN, VGG16, ConvNet, PointNet, ResNet8, ResNet18, SegNet, TwoHeads

CLASSES = 3


class _FirstTask(nn.Module):
    """A SegNet whose second task stays out of the loss."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.network = SegNet([CLASSES, 1], widths=(2, 2, 2, 2, 2), **options)

    def forward(self, images):
        return self.network(images)[0]


NETWORKS = {
    "ResNet18": (lambda **options: ResNet18(CLASSES, width=2, **options), (3, 3, 12, 12)),
    "ResNet8": (lambda **options: ResNet8(CLASSES, in_channels=1, width=2, **options), (3, 1, 7, 6)),
    "VGG16": (lambda **options: VGG16(CLASSES, width=2, **options), (3, 3, 32, 32)),
    "ConvNet": (lambda **options: ConvNet(CLASSES, in_channels=1, width=3, **options), (3, 1, 9, 8)),
    "SegNet": (_FirstTask, (2, 3, 33, 35)),
    "PointNet": (lambda **options: PointNet(CLASSES, width=2, **options), (3, 3, 8)),
    "DGCNN": (
        lambda **options: DGCNN(CLASSES - 1, 1, neighbours=3, width=2, embedding=4, dropout=0.0, **options),
        (3, 3, 8),
    ),
    "TwoHeads": (lambda **options: TwoHeads(ConvNet(width=3, **options), 3, 2, 1, 4, "softplus"), (3, 3, 8, 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "weight", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_hypergradients_are_those_of_differences_of_gradients(name, norm):
    make, shape = NETWORKS[name]
    torch.manual_seed(2)
    model = make(norm=norm, activation="softplus").double()
    training, auxiliary = torch.randn(2, *shape, dtype=torch.float64)
    weights = torch.rand(shape[0], dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, model(training)[:, 0].shape)

    def inner():
        losses = F.cross_entropy(model(training), labels, reduction="none").reshape(len(training), -1).mean(dim=1)
        return weights.softmax(dim=0) @ losses

    def outer():
        return F.cross_entropy(model(auxiliary), labels)

    exact, differences = (
        auxfast.hypergradient(
            outer,
            inner,
            model.parameters(),
            [weights],
            solver=auxfast.solvers.MINRES(steps=3, damping=0.1),
            curvature=curvature,
            warn=False,
        ).grads[0]
        for curvature in ("hessian", "finite-difference")
    )
    assert exact.abs().max() > 1e-4
    torch.testing.assert_close(exact, differences, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
