"""Liu, Johns and Davison."""

from __future__ import annotations

import math

import pytest
import torch

from auxfast.weighting import DynamicWeightAverage


def _weights(weighting: DynamicWeightAverage, losses: list[list[float]]) -> torch.Tensor:
    return torch.stack([weighting(torch.tensor(row, dtype=torch.float64), []) for row in losses])


def test_three_periods_by_hand():
    """Averages (3, 1), then (1.5, 1): ratios 1/2 and 1, over the temperature of 2 1/4 and 1/2. The softmax of them is
    1 / (1 + exp(1/4)) and the rest; times two losses."""
    weighting = DynamicWeightAverage(2, period=2).double()
    weights = _weights(weighting, [[4, 1.5], [2, 0.5], [2, 1], [1, 1], [9, 9], [9, 9]])
    assert weights[:4].tolist() == [[1, 1]] * 4
    first = 2 / (1 + math.exp(0.25))
    expected = torch.tensor([[first, 2 - first]] * 2, dtype=torch.float64)
    torch.testing.assert_close(weights[4:], expected)


def test_sums_to_the_number_of_losses():
    weighting = DynamicWeightAverage(5, period=3, temperature=0.5).double()
    losses = torch.rand(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    weights = _weights(weighting, losses.tolist())
    torch.testing.assert_close(weights.sum(dim=1), torch.full((30,), 5.0, dtype=torch.float64))
    assert weights[6:].std() > 0.1  # they are not just even


def test_a_higher_temperature_is_more_even():
    losses = [[4.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    cold, hot = (_weights(DynamicWeightAverage(2, temperature=t, period=1).double(), losses)[2] for t in (0.5, 5.0))
    assert 0 < 1 - hot[0] < 1 - cold[0]


def test_absent_calls_are_not_in_the_average():
    """Loss 0 averages 4 over the one call that has it, then (2 + 3) / 2: a ratio of 5/8."""
    weighting = DynamicWeightAverage(2, temperature=1.0, period=2).double()
    weights = _weights(weighting, [[4, 1], [0, 1], [2, 1], [3, 1], [9, 9]])
    torch.testing.assert_close(weights[4, 0] / weights[4, 1], torch.tensor(math.exp(5 / 8 - 1), dtype=torch.float64))


def test_a_loss_absent_for_whole_periods_has_a_ratio_of_1():
    weighting = DynamicWeightAverage(2, temperature=1.0, period=1).double()
    weights = _weights(weighting, [[4, 1], [0, 1], [2, 1], [0, 1], [0, 1]])
    assert weights[2].tolist() == [1, 1]  # after 4, nothing: not 0 / 4
    torch.testing.assert_close(weights[3, 0] / weights[3, 1], torch.tensor(math.exp(-0.5), dtype=torch.float64))
    assert weights[4].tolist() == [1, 1]


def test_sums_and_ratios_that_overflow():
    """A loss that rises from 1e-30 to 1e38 has all the weight; two that stay at 3e38 have the same."""
    weighting = DynamicWeightAverage(2, temperature=0.1, period=4)
    for losses in [[1e-30, 1.0]] * 4 + [[1e38, 1.0]] * 4:
        weighting(torch.tensor(losses), [])
    assert weighting(torch.tensor([1.0, 1.0]), []).tolist() == [2, 0]
    weighting = DynamicWeightAverage(2, period=4)
    for _ in range(9):
        weights = weighting(torch.tensor([3e38, 3e38]), [])
        assert all(buffer.isfinite().all() for buffer in weighting.buffers())
    assert weights.tolist() == [1, 1]


def test_a_checkpoint_of_a_longer_period():
    """The period that it was in the middle of ends at once."""
    long, short = DynamicWeightAverage(2, period=9), DynamicWeightAverage(2, period=2)
    _weights(long.double(), [[2.0, 1.0]] * 5)
    short.double().load_state_dict(long.state_dict())
    _weights(short, [[1.0, 1.0]] * 2)
    assert _weights(short, [[9.0, 9.0]])[0, 0] < 1  # the first loss fell from 2 to 1


@pytest.mark.parametrize("state", ["3", {"calls": "3"}, {}, {"calls": 2.5}], ids=str)
def test_a_checkpoint_that_holds_something_else_than_calls(state):
    weighting = DynamicWeightAverage(2)
    with pytest.raises(TypeError, match="calls in the checkpoint must be an int, got"):
        weighting.load_state_dict({**weighting.state_dict(), "_extra_state": state})


def test_options_out_of_range():
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        DynamicWeightAverage(2, temperature=0)
    with pytest.raises(ValueError, match="period must be at least 1, got 0"):
        DynamicWeightAverage(2, period=0)
    with pytest.raises(TypeError, match=r"period must be an int, got 2\.5"):
        DynamicWeightAverage(2, period=2.5)
