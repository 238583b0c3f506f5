"""Maps of learned auxiliary labels: images, side by side where their labels are alike (paper, Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.report.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, new_figure

_CELLS = 16  # of a map along an edge; a cell holds one image
_FRAME = 2  # pixels of colour around an image
_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE)
_PERPLEXITY = 30.0  # t-SNE's usual number of neighbours of an image
_FEWEST_IMAGES = 4  # the perplexity would be below one neighbour with fewer
_MOST_DRAWN = 200  # images of a class: t-SNE takes seconds for more, and they would hide each other


@dataclass(frozen=True)
class LabelledImages:
    """Images of one main class, and the soft labels that a teacher gives them.

    name: that of the main class.
    images: (n, H, W), grey levels from 0, white, to 1, black.
    soft_labels: (n, k), each row a distribution over the auxiliary classes of the main class.
    """

    name: str
    images: Tensor
    soft_labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dim() != 3 or self.soft_labels.dim() != 2 or len(self.images) != len(self.soft_labels):
            raise ValueError(
                "images and soft_labels must be (n, H, W) and (n, k), got "
                f"{tuple(self.images.shape)} and {tuple(self.soft_labels.shape)}"
            )
        if len(self.images) < _FEWEST_IMAGES:
            raise ValueError(f"images must be {_FEWEST_IMAGES} or more for a map, got {len(self.images)}")


def draw_label_maps(path: str | Path, classes: Sequence[LabelledImages]) -> None:
    """Draws a map for each main class: t-SNE of the soft labels, with the images as its points. The frame of an image
    has the colour of its likeliest auxiliary class, and below stands the share of each. Of many images the first 200
    are drawn, and where several of them fall into a cell, the first.

    Raises:
        MissingExtraError: matplotlib or scikit-learn is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure(4.6 * len(classes), 5.3)
    for axes, labelled in zip(figure.subplots(1, len(classes), squeeze=False)[0], classes, strict=True):
        axes.imshow(_label_map(labelled), interpolation="none")
        shares = np.bincount(_likeliest(labelled), minlength=labelled.soft_labels.shape[1]) / len(labelled.images)
        axes.set_title(labelled.name, fontsize=12, fontweight="bold", loc="left")
        axes.set_axis_off()
        for k, share in enumerate(shares):
            axes.annotate(
                f"■ {share:.0%}",
                (k / len(shares), -0.02),
                xycoords="axes fraction",
                va="top",
                color=_COLOURS[k % len(_COLOURS)],
                fontsize=11,
            )
    figure.supxlabel(
        "Neighbours have like labels (t-SNE); frame: the likeliest auxiliary class", fontsize=9, color=GREY
    )
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _likeliest(labelled: LabelledImages) -> np.ndarray:
    """The likeliest auxiliary class of each image, (n,)."""
    likeliest: np.ndarray = labelled.soft_labels.argmax(dim=1).cpu().numpy()
    return likeliest


def _label_map(labelled: LabelledImages) -> np.ndarray:
    """The map as a picture, (height, width, 3) in [0, 1]."""
    colours = import_extra("matplotlib.colors", "matplotlib")
    height, width = labelled.images.shape[1:]
    cell = (height + 2 * _FRAME + 1, width + 2 * _FRAME + 1)  # one pixel between neighbours
    canvas = np.ones((_CELLS * cell[0], _CELLS * cell[1], 3))
    images = labelled.images[:_MOST_DRAWN].cpu().double().clamp(0, 1).numpy()
    likeliest, places = _likeliest(labelled)[:_MOST_DRAWN], _places(labelled.soft_labels[:_MOST_DRAWN])
    taken = set()
    for image, k, place in zip(images, likeliest, places, strict=True):
        row, column = place.tolist()
        if (row, column) in taken:
            continue
        taken.add((row, column))
        top, left = row * cell[0], column * cell[1]
        framed = canvas[top : top + cell[0] - 1, left : left + cell[1] - 1]
        framed[:] = colours.to_rgb(_COLOURS[k % len(_COLOURS)])
        framed[_FRAME:-_FRAME, _FRAME:-_FRAME] = 1 - image[:, :, None]
    return canvas


def _places(soft_labels: Tensor) -> np.ndarray:
    """Cells of the map, (n, 2): row and column of each image."""
    manifold = import_extra("sklearn.manifold", "scikit-learn")
    perplexity = min(_PERPLEXITY, (len(soft_labels) - 1) / 3)
    tsne = manifold.TSNE(perplexity=perplexity, init="random", random_state=0)
    points = tsne.fit_transform(soft_labels.cpu().double().numpy())
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / np.where(high > low, high - low, 1.0)
    cells: np.ndarray = np.minimum((scaled * _CELLS).astype(int), _CELLS - 1)
    return cells
