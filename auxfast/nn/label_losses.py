"""Losses between a student's logits and the soft labels of a teacher. Both have classes along dimension 1.

Logits must be finite: at one of -inf they are NaN, as torch's cross-entropy is, though its soft label be 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_cross_entropy(logits: Tensor, soft_labels: Tensor) -> Tensor:
    """Cross-entropy - sum_k y_k log p_k, where p = softmax(logits), of each sample (and point): (batch, ...).

    Args:
        logits, soft_labels: (batch, classes, ...).

    Raises:
        ValueError: their shapes differ.
    """
    _check_shapes(logits, soft_labels)
    return -(soft_labels * logits.log_softmax(dim=1)).sum(dim=1)


def focal_loss(logits: Tensor, soft_labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss - sum_k y_k (1 - p_k)^gamma log p_k, where p = softmax(logits), of each sample (and point):
    (batch, ...). Classes that the student is already sure of count less (Lin et al. 2017); MAXL trains on it.

    Args:
        logits, soft_labels: (batch, classes, ...).
        gamma: 0, which is the cross-entropy; 1; or a finite number of at least 2. Between them the second derivative
            has no bound.

    Raises:
        ValueError: their shapes differ, or gamma is another number.
    """
    _check_shapes(logits, soft_labels)
    if gamma not in (0, 1) and not 2 <= gamma < math.inf:
        raise ValueError(f"gamma must be 0, 1, or a finite number of at least 2, got {gamma}")
    log_p = logits.log_softmax(dim=1)
    return -(soft_labels * (-torch.expm1(log_p)) ** gamma * log_p).sum(dim=1)


def negative_entropy(soft_labels: Tensor) -> Tensor:
    """Negative entropy sum_k y_k log y_k of the mean of soft labels (batch, classes, ...) over all but the classes: a
    scalar. MAXL adds it to the teacher's loss, so that its labels spread over the classes instead of collapsing to one.
    It is NaN if there are none.

    Raises:
        ValueError: soft_labels have less than two dimensions.
    """
    if soft_labels.dim() < 2:
        raise ValueError(f"soft_labels must be (batch, classes, ...), got {tuple(soft_labels.shape)}")
    mean = soft_labels.movedim(1, 0).flatten(1).mean(dim=1)
    return torch.xlogy(mean, mean.clamp(min=torch.finfo(mean.dtype).tiny)).sum()


def _check_shapes(logits: Tensor, soft_labels: Tensor) -> None:
    if logits.shape != soft_labels.shape or logits.dim() < 2:
        raise ValueError(
            "logits and soft_labels must have the same shape (batch, classes, ...), got "
            f"{tuple(logits.shape)} and {tuple(soft_labels.shape)}"
        )
