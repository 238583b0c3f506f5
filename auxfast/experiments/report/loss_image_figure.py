"""The picture of loss images: what went in, each loss, and what each pixel of it weighs (the paper's Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from auxfast.experiments.data.extras import import_extra


def draw_loss_images(
    path: str | Path,
    images: Tensor,
    losses: Tensor,
    weights: Tensor,
    loss_names: Sequence[str],
    mask: Tensor | None = None,
) -> None:
    """Draw to a PNG, one row an image: the image, the channels of its losses, and those of its weights.

    Args:
        images: (batch, 3, H, W), red, green and blue in [0, 1], or (batch, 1, H, W), grey levels of any range.
        losses: (batch, num_losses, H, W).
        weights: (batch, num_losses, H, W), as `auxfast.nn.ConvCombiner.loss_weights` gives them; drawn times the number
            of pixels, so that 1 is the weight in a mean over all pixels.
        loss_names: one for each channel.
        mask: (batch, num_losses, H, W); where it is 0, losses and weights are left grey.

    Colours have one scale for each column.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: shapes do not fit together.
        OSError: the file cannot be written.
    """
    if losses.dim() != 4:
        raise ValueError(f"losses must be (batch, num_losses, H, W), got {tuple(losses.shape)}")
    batch, num_losses, height, width = losses.shape
    channels = images.shape[1] if images.dim() == 4 else 0
    if channels not in (1, 3) or images.shape != (batch, channels, height, width):
        raise ValueError(f"images must be ({batch}, 1 or 3, {height}, {width}), got {tuple(images.shape)}")
    for name, tensor in (("weights", weights), ("mask", mask)):
        if tensor is not None and tensor.shape != losses.shape:
            raise ValueError(f"{name} must have the losses' shape {tuple(losses.shape)}, got {tuple(tensor.shape)}")
    if len(loss_names) != num_losses:
        raise ValueError(f"loss_names must be {num_losses}, got {len(loss_names)}")
    figure_module = import_extra("matplotlib.figure", "matplotlib")
    columns = 1 + 2 * num_losses
    figure = figure_module.Figure(figsize=(2.4 * columns, 2.2 * batch + 0.6), dpi=110, layout="constrained")
    axes = figure.subplots(batch, columns, squeeze=False)
    for row, image in zip(axes, _array(images), strict=True):
        row[0].imshow(np.moveaxis(image, 0, -1).squeeze(), cmap="gray")
    axes[0, 0].set_title("image", fontsize=10)
    for j, name in enumerate(loss_names):
        known = None if mask is None else _array(mask[:, j]) != 0
        _draw_column(figure, axes[:, 1 + j], _array(losses[:, j]), known, "viridis", f"{name} loss")
        scaled = _array(weights[:, j]) * height * width
        _draw_column(figure, axes[:, 1 + num_losses + j], scaled, known, "magma", f"weight of {name}")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.supxlabel("Grey: unknown, masked. A weight of 1 is that of a plain mean over all pixels.", fontsize=9)
    figure.savefig(path)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


def _draw_column(
    figure: Any, column: np.ndarray, values: np.ndarray, known: np.ndarray | None, colours: str, title: str
) -> None:
    """One picture a row of `values` (batch, H, W), on one scale of colours; `known` (batch, H, W) is what to show."""
    shown = np.ma.masked_invalid(values if known is None else np.ma.masked_array(values, ~known))
    low, high = (0.0, 1.0) if shown.count() == 0 else (shown.min(), shown.max())
    if low == high:  # a scale needs some length
        low, high = low - 0.5, high + 0.5
    for axis, picture in zip(column, shown, strict=True):
        drawn = axis.imshow(picture, cmap=colours, vmin=low, vmax=high)
        axis.set_facecolor("0.8")
    figure.colorbar(drawn, ax=list(column), shrink=0.8)
    column[0].set_title(title, fontsize=10)
