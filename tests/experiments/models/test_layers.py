"""The variants of all networks: normalisation and activation."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from auxfast.experiments.models import DGCNN, VGG16, ConvNet, PointNet, ResNet8, ResNet18, SegNet

NETWORKS = {
    "ResNet18": lambda **options: ResNet18(2, width=2, **options),
    "ResNet8": lambda **options: ResNet8(2, width=2, **options),
    "VGG16": lambda **options: VGG16(2, width=2, **options),
    "ConvNet": lambda **options: ConvNet(2, width=2, **options),
    "SegNet": lambda **options: SegNet([2], widths=(2,) * 5, **options),
    "PointNet": lambda **options: PointNet(2, width=2, **options),
    "DGCNN": lambda **options: DGCNN(2, neighbours=2, width=2, embedding=4, **options),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_without_batch_norm_there_are_biases_in_its_place(make):
    def kinds(model, *wanted):
        return [module for module in model.modules() if isinstance(module, wanted)]

    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    assert kinds(make(), *norms)
    for norm in ("weight", "none"):
        model = make(norm=norm)
        assert not kinds(model, *norms)
        assert all(layer.bias is not None for layer in kinds(model, nn.Conv1d, nn.Conv2d, nn.Linear))
        assert (".parametrizations." in ".".join(model.state_dict())) == (norm == "weight")


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_softplus_takes_the_place_of_every_relu(make):
    model = make(activation="softplus")
    assert not [module for module in model.modules() if isinstance(module, nn.ReLU | nn.LeakyReLU)]
    assert [module for module in model.modules() if isinstance(module, nn.Softplus)]


def test_a_new_networks_outputs_do_not_depend_on_weight_normalisation():
    images, outputs = torch.randn(2, 3, 16, 16), []
    for norm in ("weight", "none"):
        torch.manual_seed(0)
        outputs.append(ResNet8(2, norm=norm)(images))
    torch.testing.assert_close(*outputs)


def test_weight_normalised_layers_have_torchs_names_and_values():
    model = ConvNet(width=4, norm="weight")
    theirs = weight_norm(nn.Conv2d(3, 4, 3, padding=1))
    theirs.load_state_dict(model.blocks[0].state_dict())
    with torch.no_grad():
        for layer in (theirs, model.blocks[0]):
            layer.parametrizations.weight.original0 *= 2
    torch.testing.assert_close(model.blocks[0].weight, theirs.weight)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_unknown_variants_are_refused(make):
    with pytest.raises(ValueError, match="norm must be one of batch, weight, none, got 'layer'"):
        make(norm="layer")
    with pytest.raises(ValueError, match="activation must be one of relu, leaky_relu, softplus, got 'tanh'"):
        make(activation="tanh")
