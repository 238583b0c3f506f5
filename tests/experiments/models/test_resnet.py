import pytest
import torch
from torch import nn

from auxfast.experiments.models import ResNet8, ResNet18, load_resnet18

from .networks import parameters, randomise, torchvision_models, unfilled


@pytest.fixture(scope="module")
def imagenet():
    """A state_dict for a ResNet-18 with 1000 classes, each tensor of one value, so that its file is small, and without
    the counters of BatchNorm, as in older files."""
    shapes = {name: value.shape for name, value in unfilled(ResNet18, 1000).state_dict().items()}
    names = [name for name in shapes if not name.endswith("num_batches_tracked")]
    return {name: torch.tensor(number / 100).expand(shapes[name]) for number, name in enumerate(names)}


def test_resnet18_has_the_parameters_and_names_of_the_published_one():
    model = unfilled(ResNet18, 1000)
    assert parameters(model) == 11_689_512
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(shapes) == 122
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer2.0.downsample.0.weight"] == (128, 64, 1, 1)
    assert shapes["layer2.0.downsample.1.running_var"] == (128,)
    assert shapes["layer4.1.bn2.bias"] == (512,)
    assert shapes["fc.weight"] == (1000, 512)


@pytest.mark.slow
def test_resnet18_loads_the_weights_of_torchvision_and_gives_the_same():
    theirs = unfilled(torchvision_models().resnet18).to_empty(device="cpu").eval()
    randomise(theirs)
    ours = ResNet18(1000).eval()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, 70, 64)
    torch.testing.assert_close(ours(images), theirs(images))


def test_resnet8_has_the_parameters_of_the_paper_and_no_shortcuts_with_parameters():
    assert parameters(ResNet8(10)) == 75_290
    assert not any("downsample" in name for name, _ in ResNet8(10).named_parameters())


@pytest.mark.parametrize(
    ("model", "size", "features"),
    [
        (ResNet18(width=8), (40, 33), 64),
        (ResNet8(in_channels=1, width=4), (28, 28), 16),
        (ResNet8(width=4), (1, 2), 16),
    ],
)
def test_features_are_of_one_size_whatever_that_of_the_images(model, size, features):
    channels = model.conv1.in_channels
    assert model.num_features == features
    assert model.eval()(torch.randn(2, channels, *size)).shape == (2, features)


def test_a_classifier_is_a_linear_layer_on_the_features():
    model = ResNet8(5, width=4).eval()
    images = torch.randn(3, 3, 8, 8)
    logits = model(images)
    head, model.fc = model.fc, nn.Identity()
    assert isinstance(head, nn.Linear)
    torch.testing.assert_close(logits, head(model(images)))


def test_a_shortcut_without_parameters_pads_with_channels_of_zeros():
    model = ResNet8(width=2).eval()
    with torch.no_grad():
        model.layer2.bn2.weight.zero_()  # the convolutions' part of the block is 0
    x = torch.rand(1, 2, 5, 5)
    out = model.layer2(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


def test_pretrained_weights_load_with_and_without_the_classifier(imagenet, tmp_path):
    torch.save(imagenet, tmp_path / "resnet18.pth")
    for classes in (None, 1000):
        model = load_resnet18(tmp_path / "resnet18.pth", classes)
        state = model.state_dict()
        assert ("fc.weight" in state) == (classes is not None)
        assert all(torch.equal(value, imagenet[name]) for name, value in state.items() if name in imagenet)
        assert all(p.requires_grad and p.is_contiguous() and not p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conv1.weight": torch.zeros(64, 1, 7, 7)},
            r"conv1.weight has shape \(64, 1, 7, 7\).*expected shape \(64, 3,",
        ),
        ({"bn1.bias": None}, r"bn1.bias is missing, expected shape \(64,\)"),
        ({"bn1.bias": torch.full((64,), torch.nan)}, "bn1.bias has entries that are not finite"),
        ({"bn1.bias": torch.zeros(64, dtype=torch.int8)}, "torch.int8, expected .*torch.float32"),
        ({"bn1.bias": 3}, "bn1.bias is a int, expected a tensor"),
        ({"layer5.0.conv1.weight": torch.zeros(1)}, "layer5.0.conv1.weight is no part of a ResNet-18"),
    ],
)
def test_weights_that_do_not_fit_are_named(imagenet, tmp_path, change, message):
    path = tmp_path / "wrong.pth"
    state = {**imagenet, **change}
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    with pytest.raises(ValueError, match=rf"wrong\.pth: .*{message}"):
        load_resnet18(path)


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "other.pth"
    for content in (b"", b"<html>not found</html>", b"PK\x03\x04 cut off", b"\x80\x02h\x07."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.pth: not a file of tensors"):
            load_resnet18(path)
    torch.save(nn.Linear(1, 1), path)  # a pickled module runs code when it is loaded
    with pytest.raises(ValueError, match=r"other\.pth: not a file of tensors"):
        load_resnet18(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match=r"other\.pth: holds a list, expected the state_dict"):
        load_resnet18(path)
    with pytest.raises(FileNotFoundError):
        load_resnet18(tmp_path / "none.pth")
