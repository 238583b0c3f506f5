"""Scores against torchmetrics where it has them, and else against loops that say what is meant."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

from auxfast.experiments.metrics import (
    PartIoU,
    accuracy,
    confusion_matrix,
    mean_iou,
    mean_iou_of_images,
    part_iou,
    pixel_accuracy,
)

CLASSES, IGNORED = 5, -1


def _segmentation(seed: int = 0):
    """Predictions and labels of six images, some pixels of which are unknown. Class 4 is neither there nor predicted,
    and each image lacks some of the others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (6, 7, 5), generator=generator) + torch.arange(6).view(6, 1, 1) % 2
    predicted = torch.where(torch.rand(6, 7, 5, generator=generator) < 0.6, labels, labels.flip(1))
    labels[torch.rand(6, 7, 5, generator=generator) < 0.2] = IGNORED
    return predicted, labels


@pytest.mark.slow  # importing torchmetrics takes more than a second
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_torchmetrics(seed):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    predicted, labels = _segmentation(seed)
    confusion = confusion_matrix(predicted, labels, CLASSES, ignored=IGNORED)
    options = {"num_classes": CLASSES, "ignore_index": IGNORED}
    assert torch.equal(confusion, functional.multiclass_confusion_matrix(predicted, labels, **options))
    theirs = functional.multiclass_jaccard_index(predicted, labels, average="macro", **options)
    assert mean_iou(confusion) == pytest.approx(100 * theirs.item(), rel=1e-6)
    theirs = functional.multiclass_accuracy(predicted, labels, average="micro", **options)
    assert pixel_accuracy(confusion) == pytest.approx(100 * theirs.item(), rel=1e-6)
    logits, classes = torch.randn(50, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(50) % 8
    for k in (1, 3, 5):
        theirs = functional.multiclass_accuracy(logits, classes, num_classes=8, average="micro", top_k=k)
        assert accuracy(logits, classes, k) == pytest.approx(100 * theirs.item(), rel=1e-6)


def test_accuracy_is_the_share_of_labels_among_the_largest_logits():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    labels = torch.tensor([0, 0, 1, 2])
    assert [accuracy(logits, labels, k) for k in (1, 2, 3)] == [25.0, 75.0, 100.0]


def test_logits_that_are_not_numbers_are_no_hit():
    logits = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [torch.nan, torch.nan]])
    assert accuracy(logits, torch.zeros(3, dtype=torch.int64)) == pytest.approx(100 / 3)


def test_rows_of_a_confusion_matrix_are_labels_and_batches_add_up():
    predicted, labels = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [2, 1]])
    confusion = confusion_matrix(predicted, labels, 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert torch.equal(confusion, sum(confusion_matrix(*pair, 3) for pair in zip(predicted, labels, strict=True)))


def test_classes_that_are_neither_there_nor_predicted_have_no_part_in_the_mean():
    confusion = torch.tensor([[3, 1, 0, 0], [0, 4, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert mean_iou(confusion) == pytest.approx(100 * (3 / 4 + 4 / 7 + 0) / 3)
    assert pixel_accuracy(confusion) == 70.0


def _mean_iou_of_images_by_loops(predicted, labels, count_ignored):
    images = []
    for guess, truth in zip(predicted.tolist(), labels.tolist(), strict=True):
        pixels = [pair for rows in zip(guess, truth, strict=True) for pair in zip(*rows, strict=True)]
        ratios = []
        for label in range(CLASSES):
            union = [p for p in pixels if label in p and (count_ignored or p[1] != IGNORED)]
            if union:
                ratios.append(sum(p == (label, label) for p in union) / len(union))
        images.append(fmean(ratios))
    return 100 * fmean(images)


@pytest.mark.parametrize("count_ignored", [False, True])
def test_the_mean_over_images_is_that_of_each_images_own_classes(count_ignored):
    predicted, labels = _segmentation()
    score = mean_iou_of_images(predicted, labels, CLASSES, IGNORED, count_ignored=count_ignored)
    assert score == pytest.approx(_mean_iou_of_images_by_loops(predicted, labels, count_ignored))
    assert abs(score - mean_iou(confusion_matrix(predicted, labels, CLASSES, IGNORED))) > 0.5


def test_an_image_without_a_known_pixel_is_left_out():
    predicted, labels = _segmentation()
    unknown = torch.cat([labels, torch.full_like(labels[:1], IGNORED)])
    for count_ignored in (False, True):
        scores = [
            mean_iou_of_images(p, t, CLASSES, IGNORED, count_ignored=count_ignored)
            for p, t in [(predicted, labels), (torch.cat([predicted, predicted[:1]]), unknown)]
        ]
        assert scores[0] == scores[1]


PARTS = {"mug": [0, 1], "lamp": [2, 3, 4], "chair": [5, 6]}


def test_a_part_that_is_neither_there_nor_predicted_counts_as_100():
    predicted = [torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 3]), torch.tensor([2, 3])]
    labels = [torch.tensor([0, 1, 1, 1]), torch.tensor([2, 2, 3]), torch.tensor([2, 2])]
    score = part_iou(predicted, labels, ["mug", "lamp", "lamp"], PARTS)
    mug, whole, lamp = 100 * (1 / 2 + 2 / 3) / 2, 100.0, 100 * (1 / 2 + 0 + 1) / 3
    assert isinstance(score, PartIoU)
    assert score.by_category == pytest.approx({"mug": mug, "lamp": (whole + lamp) / 2})
    assert score.of_categories == pytest.approx((mug + (whole + lamp) / 2) / 2)
    assert score.of_shapes == pytest.approx((mug + whole + lamp) / 3)


def test_a_part_of_another_category_is_wrong():
    score = part_iou([torch.tensor([0, 5])], [torch.tensor([0, 0])], ["mug"], PARTS)
    assert score.of_shapes == pytest.approx(100 * (1 / 2 + 1) / 2)


_ONES = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy(torch.zeros(2, 3), torch.zeros(3)), r"logits and labels: got shapes \(2, 3\) and \(3,\)"),
        (lambda: accuracy(torch.zeros(0, 3), torch.zeros(0)), "n of 1 or more"),
        (
            lambda: accuracy(torch.zeros(2, 3), torch.zeros(2), 4),
            "k: got 4, must be from 1 to 3, the number of classes",
        ),
        (lambda: accuracy(torch.zeros(2, 3), torch.tensor([0, 3])), "labels: got 3, must be from 0 to 2"),
        (lambda: confusion_matrix(_ONES, _ONES.T, 2), r"got shapes \(2, 3\) and \(3, 2\), must be the same"),
        (lambda: confusion_matrix(_ONES, _ONES + 1, 2), "labels: got 2, must be from 0 to 1"),
        (lambda: confusion_matrix(_ONES, _ONES + 1, 2, IGNORED), "labels: got 2, must be from 0 to 1"),
        (lambda: confusion_matrix(_ONES - 2, _ONES, 2, IGNORED), "predicted: got -1, must be from 0 to 1"),
        (lambda: mean_iou(torch.zeros(2, 2)), "no pixels with a known label"),
        (lambda: pixel_accuracy(torch.zeros(2, 2)), "no pixels with a known label"),
        (lambda: mean_iou_of_images(_ONES, _ONES - 2, 2, IGNORED), "no pixels with a known label"),
        (
            lambda: mean_iou_of_images(_ONES[0], _ONES[0], 2),
            r"got shapes \(3,\) and \(3,\), must be the same, with 2 axes",
        ),
        (lambda: part_iou([], [], [], PARTS), "got 0, 0 and 0, must be as many, and at least one"),
        (
            lambda: part_iou([_ONES[0]], [_ONES[0]], ["cup"], PARTS),
            r"categories\[0\]: got 'cup', must be one of mug, lamp",
        ),
        (lambda: part_iou([_ONES[0]], [_ONES[:, 0]], ["mug"], PARTS), r"predicted\[0\]: got shape \(3,\)"),
        (lambda: part_iou([_ONES[0]], [_ONES[0]], ["lamp"], PARTS), r"labels\[0\]: got 1, must be one of \[2, 3, 4\]"),
    ],
)
def test_what_has_no_score_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
