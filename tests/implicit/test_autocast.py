"""Losses within one `torch.autocast`, which keeps casts of the parameters for as long as it lasts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from auxfast.implicit import hypergradient, verify_hypergradient
from auxfast.solvers import Dense, SolverState


class Decay:
    """A small network in bfloat16, and the weight decay that its outer loss asks for."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.decay = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), torch.zeros(1)
        self.decay.requires_grad_()
        self.x, self.y = torch.randn(2, 32, 5), torch.randn(2, 32, 1)

    def inner(self) -> Tensor:
        penalty = sum(w.square().sum() for w in self.net.parameters())
        return (self.net(self.x[0]).float() - self.y[0]).square().mean() + self.decay.exp() * penalty

    def outer(self) -> Tensor:
        return (self.net(self.x[1]).float() - self.y[1]).square().mean()


def autocast(cache: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)


@pytest.mark.parametrize("curvature", ["hessian", "finite-difference"])
def test_casts_that_autocast_keeps_do_not_hide_that_parameters_are_moved(curvature):
    results = []
    for cache in (False, True):
        case = Decay()
        args = case.outer, case.inner, list(case.net.parameters()), [case.decay]
        with autocast(cache):
            options = {"curvature": curvature, "solver": Dense(), "state": SolverState(), "warn": False}
            results.append(hypergradient(*args, **options))
    torch.testing.assert_close(results[1].grads, results[0].grads, rtol=0, atol=0)
    assert results[1].stats == results[0].stats
    assert results[1].stats.stop_reason != "not symmetric"


@pytest.mark.parametrize("check", ["finite-difference", "verify"])
def test_what_follows_within_autocast_sees_the_parameters_as_they_are(check):
    case = Decay()
    args = case.outer, case.inner, list(case.net.parameters()), [case.decay]
    with autocast():
        before = case.net(case.x[0])
        if check == "verify":
            verify_hypergradient(*args, solve_inner=lambda: None)
        else:
            hypergradient(*args, curvature="finite-difference", warn=False)
        assert torch.equal(case.net(case.x[0]), before)
