"""What AuxiLearn computes, transcribed from the paper and from its description into plain torch: what the drop-in is
compared with, here and in benchmarks/test_bench_compat.py. Nothing of auxfast is in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and what there was
        return torch.nn.utils.weight_norm(layer)


class Linear(nn.Module):
    """mean(w . l), and the main loss's mean if `skip`."""

    def __init__(
        self, num_losses: int, main: int = 0, *, skip: bool = False, init: float = 1.0, normalize: bool = True
    ):
        super().__init__()
        self.main = main if skip else None
        self.linear = nn.Linear(num_losses, 1, bias=False)
        nn.init.constant_(self.linear.weight, init)
        if normalize:
            self.linear = weight_norm(self.linear)

    def forward(self, losses: Tensor) -> Tensor:
        value = self.linear(losses).mean()
        return value if self.main is None else value + losses[:, self.main].mean()


class Nonlinear(nn.Module):
    """mean(net(l)) + mean(l_main): linear layers with an activation and dropout after each but the last."""

    def __init__(
        self,
        num_losses: int,
        hidden: Sequence[int],
        main: int = 0,
        *,
        activation: Callable[[], nn.Module] = nn.Softplus,
        bias: bool = True,
        dropout: float = 0.0,
        init: tuple[float, float] = (0.0, 1.0),
        normalize: bool = True,
    ):
        super().__init__()
        self.main = main
        modules: list[nn.Module] = []
        for inputs, outputs in pairwise([num_losses, *hidden]):
            modules += [_started(nn.Linear(inputs, outputs, bias), init, normalize), activation(), nn.Dropout(dropout)]
        last = _started(nn.Linear([num_losses, *hidden][-1], 1, bias=False), init, normalize)
        self.net = nn.Sequential(*modules, last)

    def forward(self, losses: Tensor) -> Tensor:
        return self.net(losses).mean() + losses[:, self.main].mean()


class Conv(nn.Module):
    """The mean of a convolutional network on an image of losses (batch, num_losses, H, W), plus the main loss's pixels.

    The last convolution is 1x1, and padded by 1 like all others: the mean counts a border of zeros.
    """

    def __init__(
        self,
        num_losses: int,
        channels: Sequence[int],
        main: int | None = 0,
        *,
        reduction: str = "mean",
        init: tuple[float, float] = (0.0, 0.1),
        output_init: tuple[float, float] = (0.0, 0.1),
        normalize: bool = False,
    ):
        super().__init__()
        self.main, self.reduction = main, reduction
        modules: list[nn.Module] = []
        for inputs, outputs in pairwise([num_losses, *channels]):
            layer = _started(nn.Conv2d(inputs, outputs, 3, padding=1), init, normalize)
            modules += [layer, nn.Softplus(), nn.AvgPool2d(2)]
        last = _started(nn.Conv2d(channels[-1], 1, 1, padding=1, bias=False), output_init, normalize)
        self.conv = nn.Sequential(*modules, last)

    def forward(self, losses: Tensor) -> Tensor:
        value = self.conv(losses).mean()
        if self.main is None:
            return value
        main = losses[:, self.main]
        return value + (main.mean() if self.reduction == "mean" else main.sum((1, 2)).mean())


def _started(layer: nn.Linear | nn.Conv2d, init: tuple[float, float], normalize: bool) -> nn.Module:
    nn.init.uniform_(layer.weight, *init)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return weight_norm(layer) if normalize else layer


@torch.no_grad()
def clamp(net: nn.Module) -> None:
    """Weights to >= 0, directions and lengths of normalised ones; biases are free."""
    for name, parameter in net.named_parameters():
        if not name.endswith("bias"):
            parameter.clamp_(min=0)


def hypergradient(
    outer_loss: Tensor, inner_loss: Tensor, w: Sequence[Tensor], phi: Sequence[Tensor], alpha: float, steps: int
) -> list[Tensor]:
    """Algorithm 2: v = p = dL_A/dW; `steps` times v -= alpha v d2L_T/dW2, p += v; then -p d2L_T/dW dphi."""
    v = p = torch.autograd.grad(outer_loss, w, retain_graph=True)
    inner_gradient = torch.autograd.grad(inner_loss, w, create_graph=True)
    for _ in range(steps):
        product = torch.autograd.grad(inner_gradient, w, v, retain_graph=True)
        v = [a - alpha * b for a, b in zip(v, product, strict=True)]
        p = [a + b for a, b in zip(p, v, strict=True)]
    return [-g for g in torch.autograd.grad(inner_gradient, phi, p)]


def outer_step(
    optimizer: torch.optim.Optimizer,
    inner_loss: Tensor,
    outer_loss: Tensor,
    w: Sequence[Tensor],
    phi: Sequence[Tensor],
    *,
    alpha: float,
    steps: int = 3,
    max_norm: float | None = 10.0,
) -> None:
    """The hypergradient as the gradient of a torch optimizer, after clipping."""
    optimizer.zero_grad()
    for parameter, gradient in zip(phi, hypergradient(outer_loss, inner_loss, w, phi, alpha, steps), strict=True):
        parameter.grad = gradient
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(phi, max_norm)
    optimizer.step()
