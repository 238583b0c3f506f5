"""Scores of predictions, in percent: classification, segmentation of images and of point clouds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """The percentage of samples whose label is among the k largest logits: top-k accuracy. A sample with a NaN
    among its logits counts as wrong.

    Args:
        logits: (n, classes).
        labels: (n,) int64, from 0 to classes - 1.
        k: from 1 to the number of classes.

    Raises:
        ValueError: shapes that do not fit, no samples, a label that is no class, or `k` outside its range.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"logits and labels: got shapes {tuple(logits.shape)} and {tuple(labels.shape)}, must be (n, classes) and "
            "(n,), with n of 1 or more"
        )
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k: got {k}, must be from 1 to {logits.shape[1]}, the number of classes")
    _check_range("labels", labels, logits.shape[1])
    hits = logits.topk(k, dim=1).indices == labels.unsqueeze(1)
    return 100 * (hits.any(dim=1) & ~logits.isnan().any(dim=1)).double().mean().item()


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int, ignored: int | None = None) -> Tensor:
    """Counts of samples or pixels, by their labels (rows) and what is predicted (columns): (classes, classes) int64.
    Matrices of several batches add up to that of all of them.

    Args:
        predicted, labels: int64, of the same shape, from 0 to classes - 1.
        ignored: label of samples that do not count, such as -1.

    Raises:
        ValueError: shapes that differ, or the first value that is outside the range.
    """
    _check_shapes(predicted, labels, 1)
    return _confusion(predicted.unsqueeze(0), labels.unsqueeze(0), classes, ignored)[0, :classes]


def pixel_accuracy(confusion: Tensor) -> float:
    """The percentage of pixels that are predicted right, by their `confusion_matrix`.

    Raises:
        ValueError: there are no pixels.
    """
    return 100 * (confusion.diagonal().sum().double() / _some(confusion).sum()).item()


def mean_iou(confusion: Tensor) -> float:
    """Mean over the classes of their intersection over union, each over all pixels of all images, by their
    `confusion_matrix`: what MTAN's code has computed since 2020, and the usual meaning of mIoU.

    A class without a pixel that is labelled or predicted so has none, and is left out.

    Raises:
        ValueError: there are no pixels.
    """
    hits = _some(confusion).diagonal()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - hits
    return 100 * (hits.double() / union)[union > 0].mean().item()


def mean_iou_of_images(
    predicted: Tensor, labels: Tensor, classes: int, ignored: int | None = None, *, count_ignored: bool = False
) -> float:
    """Mean over images of the mean intersection over union of those classes that an image has, in its labels or in what
    is predicted: what AuxiLearn's code computes, and MTAN's did before 2020. On the same predictions it is another
    figure than `mean_iou`.

    Args:
        predicted, labels: (n, ...) int64, of the same shape, from 0 to classes - 1.
        ignored: label of pixels that are unknown, such as -1. An image of nothing else is left out.
        count_ignored: count what is predicted at unknown pixels as wrong, as AuxiLearn's code does.

    Raises:
        ValueError: shapes that differ, the first value that is outside the range, or no known pixel in any image.
    """
    _check_shapes(predicted, labels, 2)
    counts = _confusion(predicted, labels, classes, ignored)
    known = _some(counts[:, :classes])
    hits = known.diagonal(dim1=1, dim2=2)
    union = (counts if count_ignored else known).sum(dim=1) + known.sum(dim=2) - hits
    has_labels = known.sum(dim=(1, 2)) > 0
    hits, union = hits[has_labels], union[has_labels]
    ratios = torch.where(union > 0, hits.double() / union, 0.0)
    return 100 * (ratios.sum(dim=1) / (union > 0).sum(dim=1)).mean().item()


class PartIoU(NamedTuple):
    """Scores of part segmentation, in percent.

    by_category: mean over the shapes of each category. of_categories: the mean of these. of_shapes: mean over all
    shapes.
    """

    by_category: dict[str, float]
    of_categories: float
    of_shapes: float


def part_iou(
    predicted: Sequence[Tensor], labels: Sequence[Tensor], categories: Sequence[str], parts: Mapping[str, Sequence[int]]
) -> PartIoU:
    """Intersection over union of part segmentation, as Qi et al. (2017, section 5.2) define it: for a shape, the mean
    over all parts of its category, where a part that is neither there nor predicted counts as 100.

    Args:
        predicted: what is predicted for each shape's points, (points,) int64. Parts of other categories are wrong like
            any other, so the usual prediction is the largest logit among those of the shape's own category.
        labels: the parts of each shape's points, (points,) int64.
        categories: the category of each shape.
        parts: the parts of each category.

    Raises:
        ValueError: no shapes, other numbers of them in the three lists, shapes of tensors that differ, an unknown
            category, or a label that is no part of the shape's category.
    """
    if not 0 < len(predicted) == len(labels) == len(categories):
        raise ValueError(
            f"predicted, labels and categories: got {len(predicted)}, {len(labels)} and {len(categories)}, must be as "
            "many, and at least one"
        )
    scores: dict[str, list[float]] = {}
    for number, (guess, truth, category) in enumerate(zip(predicted, labels, categories, strict=True)):
        if category not in parts:
            raise ValueError(f"categories[{number}]: got {category!r}, must be one of {', '.join(parts)}")
        scores.setdefault(category, []).append(_shape_iou(number, guess, truth, parts[category]))
    by_category = {category: fmean(scores[category]) for category in parts if category in scores}
    of_shapes = fmean(score for shapes in scores.values() for score in shapes)
    return PartIoU(by_category, fmean(by_category.values()), of_shapes)


def _shape_iou(number: int, predicted: Tensor, labels: Tensor, parts: Sequence[int]) -> float:
    if predicted.shape != labels.shape or labels.numel() == 0:
        raise ValueError(
            f"predicted[{number}]: got shape {tuple(predicted.shape)}, must be that of labels, {tuple(labels.shape)}, "
            "with one point or more"
        )
    own = torch.tensor(list(parts), device=labels.device).unsqueeze(1)
    is_labelled, is_predicted = labels.flatten() == own, predicted.flatten() == own  # (parts, points)
    if not bool(is_labelled.any(dim=0).all()):
        wrong = labels.flatten()[~is_labelled.any(dim=0)][0].item()
        raise ValueError(f"labels[{number}]: got {wrong}, must be one of {list(parts)}, the parts of its category")
    union = (is_labelled | is_predicted).sum(dim=1)
    ratios = torch.where(union > 0, (is_labelled & is_predicted).sum(dim=1).double() / union, 1.0)
    return 100 * ratios.mean().item()


def _confusion(predicted: Tensor, labels: Tensor, classes: int, ignored: int | None) -> Tensor:
    """The confusion matrix of each image, and below it a row of what is predicted at ignored pixels: (n, classes + 1,
    classes). predicted, labels: (n, ...)."""
    predicted, labels = predicted.flatten(1), labels.flatten(1)
    _check_range("predicted", predicted, classes)
    _check_range("labels", labels if ignored is None else labels[labels != ignored], classes)
    rows = labels if ignored is None else torch.where(labels == ignored, classes, labels)
    images = torch.arange(len(labels), device=labels.device).unsqueeze(1)
    cells = (images * (classes + 1) + rows) * classes + predicted
    counts = torch.bincount(cells.flatten(), minlength=len(labels) * (classes + 1) * classes)
    return counts.view(len(labels), classes + 1, classes)


def _check_shapes(predicted: Tensor, labels: Tensor, axes: int) -> None:
    if predicted.shape != labels.shape or labels.dim() < axes:
        shapes = f"{tuple(predicted.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"predicted and labels: got shapes {shapes}, must be the same, with {axes} axes or more")


def _check_range(name: str, values: Tensor, classes: int) -> None:
    wrong = values[(values < 0) | (values >= classes)]
    if len(wrong):
        raise ValueError(f"{name}: got {wrong[0].item()}, must be from 0 to {classes - 1}")


def _some(counts: Tensor) -> Tensor:
    if not bool(counts.any()):
        raise ValueError("there are no pixels with a known label, so there is no score")
    return counts
