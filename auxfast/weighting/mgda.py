"""Weights for a direction in which every loss falls."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from auxfast.weighting.base import Weighting, check_finite
from auxfast.weighting.gradients import gram_matrix
from auxfast.weighting.min_norm import min_norm_weights

Normalization = Literal["none", "l2", "loss", "loss+"]


class MGDA(Weighting):
    """Multiple-gradient descent (Sener and Koltun, NeurIPS 2018, equation 3; Desideri, 2012).

    The gradients, each divided by a number `n_i`, have a point of least norm in their convex hull:
    `sum a_i grad L_i / n_i`. It is 0 where no direction decreases all losses (Pareto stationary); elsewhere its
    opposite does. The weights are `a_i / n_i`, scaled to the sum 1, so that the training loss has that direction. (The
    authors' code has the weights `a_i`, with which a loss can rise if the `n_i` differ.) Solved in float64, on the CPU.

    The gradients are those in the `parameters` of the call: in the paper, what the tasks share. All of them are held
    at a time.

    Args:
        normalization: `n_i`: "none": 1, "l2": the gradient's norm, "loss": the loss, "loss+": their product.
        tolerance: the norm found is at most `1 / (1 - tolerance)` times the least; from 0 to below 1.

    A call raises ValueError if a loss that normalises is negative.
    """

    def __init__(
        self, num_losses: int, main: int = 0, normalization: Normalization = "none", tolerance: float = 1e-6
    ) -> None:
        if normalization not in get_args(Normalization):
            allowed = ", ".join(get_args(Normalization))
            raise ValueError(f"normalization must be one of {allowed}, got {normalization!r}")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be from 0 to below 1, got {tolerance}")
        super().__init__(num_losses, main, auxiliary=0.0)
        self.normalization, self.tolerance = normalization, tolerance

    def _weights(self, losses: Tensor, values: list[float], parameters: tuple[Tensor, ...]) -> Tensor:
        gram = gram_matrix(losses, parameters).cpu().double()
        check_finite(gram.flatten().tolist())
        squares, sizes = gram.diagonal(), torch.tensor(values, dtype=torch.float64)
        present = sizes != 0
        if self.normalization in ("none", "l2"):
            present |= squares != 0
        weights = torch.zeros_like(sizes)
        if present.any():  # absent losses are left out: their gradients would be the shortest of all
            scale = self._normalizers(sizes, squares)[present]
            scaled = gram[present][:, present] / torch.outer(scale, scale)
            weights[present] = min_norm_weights(scaled, self.tolerance) / scale
            weights /= weights.sum()
        return weights

    def _normalizers(self, values: Tensor, squares: Tensor) -> Tensor:
        """The divisors `n_i`. The losses, the squares of the gradients' norms, and the result: (num_losses,)."""
        scale = torch.ones_like(values)
        if self.normalization in ("l2", "loss+"):
            scale *= torch.where(squares == 0, 1, squares.sqrt())  # a gradient of 0 stays 0
        if self.normalization in ("loss", "loss+"):
            if (values < 0).any():
                raise ValueError(f"normalization {self.normalization!r} needs losses above 0, got {values.tolist()}")
            scale *= values
        return scale
