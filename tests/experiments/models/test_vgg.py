import pytest
import torch

from auxfast.experiments.models import VGG16

from .networks import parameters, randomise, torchvision_models, unfilled


def test_vgg16_has_the_parameters_of_its_cifar_form_and_torchvisions_names():
    model = unfilled(VGG16, 10)
    assert parameters(model) == 14_728_266
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["features.0.weight"] == (64, 3, 3, 3)
    assert shapes["features.40.weight"] == (512, 512, 3, 3)
    assert shapes["features.41.running_mean"] == (512,)
    assert shapes["classifier.weight"] == (10, 512)


@pytest.mark.slow
def test_vgg16_loads_the_convolutions_of_torchvision_and_gives_the_same():
    theirs = unfilled(torchvision_models().vgg16_bn).features.to_empty(device="cpu").eval()
    randomise(theirs)
    ours = VGG16().eval()
    ours.load_state_dict({f"features.{name}": value for name, value in theirs.state_dict().items()})
    images = torch.randn(2, 3, 70, 64)
    torch.testing.assert_close(ours(images), theirs(images).mean(dim=(2, 3)))


def test_features_are_of_one_size_and_images_below_32_pixels_are_refused():
    model = VGG16(in_channels=1, width=4).eval()
    assert model.num_features == 32
    assert model(torch.randn(2, 1, 32, 45)).shape == (2, 32)
    with pytest.raises(ValueError, match=r"images: got shape \(2, 1, 28, 28\).*32 x 32 pixels or more"):
        model(torch.randn(2, 1, 28, 28))
