"""Zeros that mean a mistake: nothing depends on the outer parameters, or the solver has found nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import auxfast
from auxfast.implicit import HyperOptimizer, hypergradient
from auxfast.solvers import MINRES, Dense, Identity, Neumann, Nystrom, SolverState


@pytest.fixture
def setting():
    torch.manual_seed(0)
    return nn.Linear(3, 1), auxfast.nn.LinearCombiner(2), torch.randn(10, 3), torch.randn(10, 3)


def losses(net: nn.Module, x: Tensor) -> Tensor:
    y = net(x)
    return torch.cat([(y - 1) ** 2, (y - x[:, :1]) ** 2], dim=1)


def test_a_forgotten_combiner(setting):
    net, combiner, x, held_out = setting
    with pytest.warns(RuntimeWarning, match="no outer parameter plays a part in either loss.*without the combiner"):
        grads = hypergradient(
            losses(net, held_out)[:, 0].mean(), losses(net, x).mean(), net.parameters(), combiner.parameters()
        ).grads
    assert not grads[0].any()


def test_detached_loss_weights(setting):
    net, combiner, x, held_out = setting
    inner = (combiner.loss_weights(losses(net, x)) * losses(net, x)).mean()
    with pytest.warns(RuntimeWarning, match="plays a part in either loss.*detached weights"):
        hypergradient(losses(net, held_out)[:, 0].mean(), inner, net.parameters(), combiner.parameters())


def test_frozen_outer_parameters(setting):
    net, combiner, x, held_out = setting
    combiner.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="requires_grad=False"):
        hypergradient(
            losses(net, held_out)[:, 0].mean(), combiner(losses(net, x)), net.parameters(), combiner.parameters()
        )


def test_exchanged_losses(setting):
    net, combiner, x, held_out = setting
    outer = HyperOptimizer(torch.optim.Adam(combiner.parameters(), lr=0.1), project=[combiner])
    with pytest.warns(RuntimeWarning, match="only the direct gradient.*Are outer_loss and inner_loss exchanged"):
        outer.step(combiner(losses(net, x)), losses(net, held_out)[:, 0].mean(), net.parameters())


def test_a_learned_inner_learning_rate(setting):
    net, combiner, x, held_out = setting
    lr = torch.tensor(0.1, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="such as a learning rate, has no hypergradient"):
        hypergradient(losses(net, held_out)[:, 0].mean(), combiner(losses(net, x)), net.parameters(), [lr])


@pytest.mark.parametrize("solver", [MINRES(), Neumann(), Nystrom(rank=4), Dense()], ids=repr)
def test_weights_of_examples_that_are_all_0_have_no_curvature(solver):
    torch.manual_seed(0)
    w, x, y = torch.randn(4, requires_grad=True), torch.randn(10, 4), torch.randn(10)
    weights = torch.zeros(10, requires_grad=True)
    for outer, inner in (
        ((x @ w).square().mean(), (weights * (x @ w - y) ** 2).sum()),
        (lambda: (x @ w).square().mean(), lambda: (weights * (x @ w - y) ** 2).sum()),
    ):
        with pytest.warns(RuntimeWarning, match=r"no curvature.*all weights.*at 0.*damping"):
            result = hypergradient(outer, inner, [w], [weights], solver=solver)
        assert result.direct_only


def test_the_identity_needs_no_curvature():
    w, weights = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    result = hypergradient(w.square().sum(), (weights * w**2).sum(), [w], [weights], solver=Identity(0.1))
    torch.testing.assert_close(result.grads[0], torch.full((4,), -0.4))
    assert not result.direct_only


def test_damping_leads_out_of_weights_that_are_all_0(setting):
    net, combiner, x, held_out = setting
    nn.init.zeros_(combiner.phi)
    for solver, moves in ((MINRES(), False), (MINRES(damping=0.1), True)):
        sgd = torch.optim.SGD(combiner.parameters(), lr=1.0)
        outer = HyperOptimizer(sgd, solver=solver, warn=False, project=[combiner])
        outer.step(losses(net, held_out)[:, 0].mean(), combiner(losses(net, x)), net.parameters())
        assert bool(combiner.phi.any()) == moves
        assert outer.skipped_steps == (not moves)


def test_the_main_loss_stays_with_main(setting):
    net, _, x, held_out = setting
    combiner = auxfast.nn.LinearCombiner(2, main=0, init_value=0.0)
    outer = HyperOptimizer(torch.optim.SGD(combiner.parameters(), lr=1.0), project=[combiner])
    assert outer.step(losses(net, held_out)[:, 0].mean(), combiner(losses(net, x)), net.parameters()).converged


def test_a_right_hand_side_without_curvature_is_told_from_other_failures():
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    phi = torch.ones(2, requires_grad=True)
    inner = (phi * w).sum() + w[0] ** 2  # the outer gradient lies in the null space of H
    with pytest.warns(RuntimeWarning, match="no curvature along"):
        result = hypergradient(w[1] * 1.0, inner, [w], [phi])
    assert not result.grads[0].any()


def test_each_problem_is_told_once_for_a_state(setting):
    net, combiner, x, held_out = setting
    state = SolverState()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            hypergradient(
                losses(net, held_out)[:, 0].mean(),
                losses(net, x).mean(),
                net.parameters(),
                combiner.parameters(),
                state=state,
            )
    assert len(caught) == 1
    assert caught[0].filename == __file__
