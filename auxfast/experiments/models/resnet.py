"""Residual networks: ResNet-18, as its ImageNet weights want it, and ResNet-8 for small images."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxfast.experiments.models.layers import (
    Activation,
    Norm,
    convolution,
    make_activation,
    make_classifier,
    normalised,
)

_COUNTER = "num_batches_tracked"  # files from before BatchNorm had it load too


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2016, figure 2). (batch, inputs, H, W) to (batch, outputs,
    ceil(H / stride), ceil(W / stride))."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, shortcut: nn.Module | None, norm: Norm, activation: Activation
    ) -> None:
        super().__init__()
        bias = norm != "batch"
        self.conv1, self.bn1 = normalised(convolution(inputs, outputs, stride=stride, bias=bias), norm)
        self.conv2, self.bn2 = normalised(convolution(outputs, outputs, bias=bias), norm)
        self.act = make_activation(activation)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        skipped = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + skipped)
        return out


class _PaddedShortcut(nn.Module):
    """Every second pixel, and channels of zeros around those that there are: He et al.'s option A, without parameters.

    Args:
        added: the number of channels that are added, half of them before the others.
    """

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016, table 1): (batch, 3, H, W) to (batch, num_features), or to (batch, classes).

    With `classes=1000` it has 11,689,512 parameters, and by default the names and shapes in its state_dict are those of
    torchvision's resnet18. H and W are 224 on ImageNet and may be anything from 1.

    Args:
        classes: outputs of a linear classifier; None for the features themselves, of which there are 512.
        in_channels: channels of the images.
        width: channels of the first of the four stages, each of which has twice as many as the one before.
        norm, activation: see `Norm` and `Activation`.

    Raises:
        ValueError: an unknown `norm` or `activation`.
    """

    def __init__(
        self,
        classes: int | None = None,
        *,
        in_channels: int = 3,
        width: int = 64,
        norm: Norm = "batch",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        bias = norm != "batch"
        self.num_features = 8 * width
        self.conv1, self.bn1 = normalised(convolution(in_channels, width, 7, 2, bias=bias), norm)
        self.act = make_activation(activation)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        def stage(inputs: int, outputs: int) -> nn.Sequential:
            shortcut, stride = None, 1
            if inputs != outputs:
                shortcut, stride = nn.Sequential(*normalised(convolution(inputs, outputs, 1, 2, bias=bias), norm)), 2
            return nn.Sequential(
                _BasicBlock(inputs, outputs, stride, shortcut, norm, activation),
                _BasicBlock(outputs, outputs, 1, None, norm, activation),
            )

        self.layer1 = stage(width, width)
        self.layer2 = stage(width, 2 * width)
        self.layer3 = stage(2 * width, 4 * width)
        self.layer4 = stage(4 * width, 8 * width)
        self.fc = make_classifier(self.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.act(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))
        out: Tensor = self.fc(x)
        return out


class ResNet8(nn.Module):
    """ResNet-8 for small images (He et al., 2016, section 4.2, with n = 1): three stages of one block, whose shortcuts
    have no parameters. (batch, in_channels, H, W) to (batch, num_features), or to (batch, classes).

    With 3 channels and 10 classes it has 75,290 parameters. H and W are 32 on CIFAR and may be anything from 1.

    Args:
        classes: outputs of a linear classifier; None for the features themselves, of which there are 4 width.
        in_channels: channels of the images.
        width: channels of the first stage; the others have two and four times as many.
        norm, activation: see `Norm` and `Activation`.

    Raises:
        ValueError: an unknown `norm` or `activation`.
    """

    def __init__(
        self,
        classes: int | None = None,
        *,
        in_channels: int = 3,
        width: int = 16,
        norm: Norm = "batch",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.num_features = 4 * width
        self.conv1, self.bn1 = normalised(convolution(in_channels, width, bias=norm != "batch"), norm)
        self.act = make_activation(activation)
        self.layer1 = _BasicBlock(width, width, 1, None, norm, activation)
        self.layer2 = _BasicBlock(width, 2 * width, 2, _PaddedShortcut(width), norm, activation)
        self.layer3 = _BasicBlock(2 * width, 4 * width, 2, _PaddedShortcut(2 * width), norm, activation)
        self.fc = make_classifier(self.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))
        out: Tensor = self.fc(x)
        return out


def load_resnet18(path: str | Path, classes: int | None = None) -> ResNet18:
    """A ResNet-18 with the weights in a file, on the CPU: the state_dict of torchvision's resnet18, as
    `torch.save` writes it, such as its ImageNet weights `resnet18-f37072fd.pth`. No other objects are unpickled.

    Args:
        path: the file.
        classes: as in the file; None for the features, without the file's classifier.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: the file is damaged or holds something else than a state_dict; or the first tensor that is missing,
            unknown, of another shape, or not finite.
    """
    content = Path(path).read_bytes()
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on the byte that is wrong
        raise ValueError(f"{path}: not a file of tensors as torch.save writes it, or damaged: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected the state_dict of a ResNet-18")
    with torch.device("meta"):  # no initial weights are drawn, since the file has others
        model = ResNet18(classes)
    expected = model.state_dict()
    for name in state:
        if name not in expected and not (classes is None and name in ("fc.weight", "fc.bias")):
            raise ValueError(f"{path}: {name} is no part of a ResNet-18, which starts with {next(iter(expected))}")
    given = {name: torch.tensor(0) for name in expected if name.endswith(_COUNTER)} | dict(state)
    weights = {name: _fitting(f"{path}: {name}", given.get(name), own) for name, own in expected.items()}
    model.load_state_dict(weights, assign=True)
    return model


def _fitting(name: str, given: object, own: Tensor) -> Tensor:
    """A copy of `given`, in the dtype of `own`."""
    if given is None:
        raise ValueError(f"{name} is missing, expected shape {tuple(own.shape)}")
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} is a {type(given).__name__}, expected a tensor")
    if given.shape != own.shape or given.is_floating_point() != own.is_floating_point():
        found, wanted = (f"shape {tuple(t.shape)}, {t.dtype}" for t in (given, own))
        raise ValueError(f"{name} has {found}, expected {wanted}")
    values = given.to(own.dtype, copy=True, memory_format=torch.contiguous_format)
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} has entries that are not finite")
    return values
