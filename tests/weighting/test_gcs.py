"""Du et al."""

from __future__ import annotations

import pytest
import torch

from auxfast.weighting import GradientCosineSimilarity

from .problems import linear_losses, network_losses


def test_by_hand():
    """Cosines with (2, 0): 3/5, -3/5, 0 (orthogonal), and 0 (no gradient)."""
    losses, parameters = linear_losses([1.0] * 5, [[2.0, 0.0], [3.0, 4.0], [-3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    assert GradientCosineSimilarity(5)(losses, parameters).tolist() == [1, 1, 0, 1, 1]
    weighted = GradientCosineSimilarity(5, weighted=True)(losses, parameters)
    torch.testing.assert_close(weighted, torch.tensor([1, 0.6, 0, 0, 0]))


def test_the_main_loss_need_not_be_the_first():
    losses, parameters = linear_losses([1.0] * 3, [[-1.0, 1.0], [1.0, 2.0], [3.0, -2.0]])
    # against (3, -2): -3 - 2 = -5 and 3 - 4 = -1; against (1, 2): -1 + 2 = 1 and 3 - 4 = -1
    assert GradientCosineSimilarity(3, main=2)(losses, parameters).tolist() == [0, 0, 1]
    assert GradientCosineSimilarity(3, main=1)(losses, parameters).tolist() == [1, 1, 0]


def test_summed_auxiliaries_have_one_weight_by_the_gradient_of_their_sum():
    losses, parameters = linear_losses([1.0] * 3, [[-3.0, 4.0], [2.0, 0.0], [6.0, 0.0]])  # the sum is (3, 4)
    for weighted, weight in ((False, 1.0), (True, 0.6)):
        weights = GradientCosineSimilarity(3, main=1, weighted=weighted, summed=True)(losses, parameters)
        torch.testing.assert_close(weights, torch.tensor([weight, 1.0, weight]))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_main_loss_never_rises(weighted):
    """The training loss's gradient has no component against the main loss's: the method's guarantee."""
    kept = []
    for seed in range(20):
        losses, parameters = network_losses(4, seed, dtype=torch.float64)
        weights = GradientCosineSimilarity(4, weighted=weighted)(losses, parameters)
        main, combined = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
            for loss in (losses[0], (weights * losses).sum())
        )
        assert main @ combined >= main @ main * (1 - 1e-12)
        kept.append(weights[1:] > 0)
    assert 0 < torch.stack(kept).double().mean() < 1  # some kept, some dropped


def test_tiny_gradients_keep_their_sign():
    """Their inner product, -1e-60, is 0 in float32."""
    losses, parameters = linear_losses([1.0, 1.0], [[1e-15, 0.0], [-1e-18, 0.0]])
    assert GradientCosineSimilarity(2)(losses, parameters).tolist() == [1, 0]


@pytest.mark.parametrize(
    "scales", [(1e-30, 1.0), (1.0, 1e-30), (1e30, 1.0), (1.0, 1e30), (1e-40, 1e30), (1e-30, 1e-30)]
)
def test_squares_outside_of_the_range_of_float32(scales):
    """The cosine knows no lengths: 3/5 here."""
    one, two = scales
    losses, parameters = linear_losses([1.0, 1.0], [[2.0 * one, 0.0], [3.0 * two, 4.0 * two]])
    weights = GradientCosineSimilarity(2, weighted=True)(losses, parameters)
    torch.testing.assert_close(weights, torch.tensor([1, 0.6]), rtol=1e-4, atol=0)
    assert GradientCosineSimilarity(2)(-losses * torch.tensor([1, -1]), parameters).tolist() == [1, 0]
