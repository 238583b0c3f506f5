"""Weights from how fast every loss falls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from auxfast.weighting.base import Weighting, check_int, check_positive


class DynamicWeightAverage(Weighting):
    """Dynamic weight average (Liu, Johns and Davison, CVPR 2019, equation 7).

    The weights in period t are `num_losses softmax(r / temperature)`, with the ratio `r_k = L_k(t - 1) / L_k(t - 2)` of
    the averages of loss k over the last two periods: a loss that falls slowly gets more weight. The ratio is 1 until
    two averages are known, so in the first two periods all weights are 1, and after a whole period without the loss.

    Args:
        temperature: the larger, the more even the weights. The paper's is 2.
        period: calls that one average covers; the paper's is an epoch. At least 1.
    """

    averages: Tensor  # (2, num_losses), averages over the last period but one, and over the last; 0 where unknown
    sums: Tensor  # (num_losses,), sums of the losses in this period so far
    counts: Tensor  # (num_losses,), calls of this period that had the loss

    def __init__(self, num_losses: int, main: int = 0, temperature: float = 2.0, period: int = 100) -> None:
        check_positive("temperature", temperature)
        check_int("period", period)
        if period < 1:
            raise ValueError(f"period must be at least 1, got {period}")
        super().__init__(num_losses, main)
        self.temperature, self.period = temperature, period
        self.calls = 0  # calls in this period; a Python number, which costs no wait for a GPU
        self.register_buffer("averages", torch.zeros(2, num_losses))
        self.register_buffer("sums", torch.zeros(num_losses))
        self.register_buffer("counts", torch.zeros(num_losses))

    def _weights(self, losses: Tensor, values: list[float], parameters: tuple[Tensor, ...]) -> Tensor:
        if self.calls >= self.period:  # above it after a checkpoint of a longer period
            self._end_period()
        self.calls += 1
        sums = self.sums.add_(losses)
        largest = torch.finfo(sums.dtype).max
        if max(map(abs, values)) * 4 * self.period > largest:  # a sum in which there is no such loss stays in range
            sums.clamp_(-largest / 2, largest / 2)
        self.counts.add_(losses != 0)
        before, last = self.averages
        ratios = torch.where(before == 0, 1, last / before)
        return self.num_losses * torch.softmax(ratios / self.temperature, dim=0)

    def _end_period(self) -> None:
        before = self.averages[1].clone()
        last = torch.where(self.counts == 0, before, self.sums / self.counts)
        # The ratio, divided by the temperature, stays finite: the softmax of inf is NaN.
        largest = torch.finfo(last.dtype).max * min(self.temperature, 1) / 2
        self.averages[0] = before.sign() * before.abs().maximum(last.abs() / largest)
        self.averages[1] = last
        self.sums.zero_()
        self.counts.zero_()
        self.calls = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        calls: Any = state.get("calls") if isinstance(state, dict) else state
        check_int("calls in the checkpoint", calls)
        self.calls = calls
