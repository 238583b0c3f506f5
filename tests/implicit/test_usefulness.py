"""`auxiliary_usefulness` against the closed form, and against training with a little of each auxiliary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from auxfast.implicit import auxiliary_usefulness, hypergradient
from auxfast.solvers import Dense


class Quadratics:
    """A main, an outer and several auxiliary losses in 6 weights, all quadratic, at the main loss's minimum."""

    def __init__(self, auxiliaries: int = 4) -> None:
        generator = torch.Generator().manual_seed(2)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x, self.y = normal(20, 6), normal(20)
        self.target, self.centers = normal(6), normal(auxiliaries, 6)
        self.w = torch.linalg.lstsq(self.x, self.y[:, None]).solution[:, 0].requires_grad_()

    def main(self) -> Tensor:
        return 0.5 * (self.x @ self.w - self.y).square().sum()

    def outer(self) -> Tensor:
        return 0.5 * (self.w - self.target).square().sum()

    def auxiliaries(self) -> Tensor:
        return 0.5 * (self.w - self.centers).square().sum(1)

    def trained_with(self, phi: Tensor) -> Tensor:
        """The outer loss at the minimum of main + phi . auxiliaries."""
        hessian = self.x.T @ self.x + phi.sum() * torch.eye(6, dtype=torch.float64)
        w = torch.linalg.solve(hessian, self.x.T @ self.y + self.centers.T @ phi)
        return 0.5 * (w - self.target).square().sum()


def test_closed_form():
    problem = Quadratics()
    w = problem.w.detach()
    newton = torch.linalg.solve(problem.x.T @ problem.x, (w - problem.centers).T)  # (6, auxiliaries)
    result = auxiliary_usefulness(problem.outer(), problem.main(), problem.auxiliaries(), [problem.w], solver=Dense())
    torch.testing.assert_close(result.scores, (w - problem.target) @ newton)
    assert result.stats.converged
    assert not result.scores.requires_grad


def test_it_predicts_what_training_with_a_little_of_each_does():
    problem = Quadratics()
    scores = auxiliary_usefulness(
        problem.outer(), problem.main(), list(problem.auxiliaries()), [problem.w], solver=Dense()
    ).scores
    for score, little in zip(scores, 1e-6 * torch.eye(4, dtype=torch.float64), strict=True):
        fall = (problem.trained_with(-little) - problem.trained_with(little)) / 2e-6
        torch.testing.assert_close(score, fall, rtol=1e-6, atol=1e-8)


def test_it_is_minus_the_hypergradient_in_the_weights():
    problem = Quadratics()
    phi = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    inner = problem.main() + phi @ problem.auxiliaries()
    (grad,) = hypergradient(problem.outer(), inner, [problem.w], [phi], solver=Dense()).grads
    result = auxiliary_usefulness(problem.outer(), problem.main(), problem.auxiliaries(), [problem.w])
    torch.testing.assert_close(result.scores, -grad, rtol=1e-3, atol=1e-3)


def test_normalized_scores_do_not_depend_on_an_auxiliary_s_scale():
    problem = Quadratics()
    scales = torch.tensor([1.0, 1e-3, 1e4, -2.0], dtype=torch.float64)
    plain, scaled = (
        auxiliary_usefulness(problem.outer(), problem.main(), aux, [problem.w], solver=Dense())
        for aux in (problem.auxiliaries(), scales * problem.auxiliaries())
    )
    norms = (problem.w.detach() - problem.centers).norm(dim=1)
    torch.testing.assert_close(plain.normalized_scores, plain.scores / norms)
    torch.testing.assert_close(scaled.scores, scales * plain.scores)
    torch.testing.assert_close(scaled.normalized_scores, scales.sign() * plain.normalized_scores)


def test_an_auxiliary_without_a_gradient_has_the_normalized_score_0():
    problem = Quadratics(2)
    elsewhere = torch.ones((), dtype=torch.float64, requires_grad=True)
    aux = [problem.auxiliaries()[0], elsewhere * 2, (problem.w * 0).sum(), torch.ones((), dtype=torch.float64)]
    result = auxiliary_usefulness(problem.outer(), problem.main(), aux, [problem.w], solver=Dense())
    assert result.scores[0] != 0
    assert result.scores[1:].tolist() == result.normalized_scores[1:].tolist() == [0, 0, 0]


def test_entries_that_are_held_fixed_add_nothing():
    problem = Quadratics()
    free = torch.tensor([True, True, False, True, False, True])
    w, x = problem.w.detach(), problem.x[:, free]
    newton = torch.linalg.solve(x.T @ x, (w - problem.centers)[:, free].T)
    result = auxiliary_usefulness(
        problem.outer(), problem.main(), problem.auxiliaries(), [problem.w], free=[free], solver=Dense()
    )
    torch.testing.assert_close(result.scores, (w - problem.target)[free] @ newton)
    norms = (w - problem.centers)[:, free].norm(dim=1)
    torch.testing.assert_close(result.normalized_scores, result.scores / norms)


def test_many_auxiliaries_cost_no_more_products():
    few, many = (
        auxiliary_usefulness(problem.outer(), problem.main(), problem.auxiliaries(), [problem.w]).stats.matvecs
        for problem in (Quadratics(1), Quadratics(30))
    )
    assert few == many


def test_losses_that_share_their_graph_or_play_no_part():
    problem = Quadratics(2)
    unused, frozen = torch.ones(3, dtype=torch.float64, requires_grad=True), torch.ones(2, dtype=torch.float64)
    shared = problem.x @ problem.w
    main = 0.5 * (shared - problem.y).square().sum()
    constant = (unused.sum() * 2).reshape(1)  # does not depend on w
    aux = torch.cat([0.5 * shared.square().sum().reshape(1), shared[:1], constant])
    result = auxiliary_usefulness(problem.outer(), main, aux, [frozen, problem.w, unused], solver=Dense())
    w = problem.w.detach()
    gradients = torch.stack([problem.x.T @ (problem.x @ w), problem.x[0]], dim=1)
    expected = (w - problem.target) @ torch.linalg.solve(problem.x.T @ problem.x, gradients)
    torch.testing.assert_close(result.scores, torch.cat([expected, torch.zeros(1, dtype=torch.float64)]))


@pytest.mark.parametrize(
    ("aux", "error", "message"),
    [
        (lambda problem: [], ValueError, r"aux_losses must be \(num_auxiliaries,\), at least one, got shape \(0,\)"),
        (lambda problem: problem.main(), ValueError, r"aux_losses must be \(num_auxiliaries,\), .* got shape \(\)"),
        (lambda problem: [problem.main(), problem.w], ValueError, r"number 1 is of shape \(6,\)"),
        (lambda problem: [1.0], TypeError, "number 0 is a float"),
        (lambda problem: problem.auxiliaries().detach(), ValueError, "aux_losses have no graph"),
        (lambda problem: problem.auxiliaries, TypeError, r"aux_losses must be .* not a function: pass aux_losses\(\)"),
        (lambda problem: [problem.main], TypeError, r"number 0 is a method: pass aux_losses\[0\]\(\)"),
    ],
)
def test_auxiliaries_that_are_refused(aux, error, message):
    problem = Quadratics()
    with pytest.raises(error, match=message):
        auxiliary_usefulness(problem.outer(), problem.main(), aux(problem), [problem.w])


def test_other_arguments_that_are_refused():
    problem = Quadratics()
    with pytest.raises(TypeError, match=r"^outer_loss must be a tensor, not a function: pass outer_loss\(\)$"):
        auxiliary_usefulness(problem.outer, problem.main(), problem.auxiliaries(), [problem.w])
    with pytest.raises(TypeError, match=r"^main_loss must be a tensor, not a function: pass main_loss\(\)$"):
        auxiliary_usefulness(problem.outer(), problem.main, problem.auxiliaries(), [problem.w])
    with pytest.raises(ValueError, match=r"free\[0\] must have the shape of params\[0\], \(6,\), not \(5,\)"):
        auxiliary_usefulness(
            problem.outer(), problem.main(), problem.auxiliaries(), [problem.w], free=[torch.ones(5).bool()]
        )
    with pytest.raises(ValueError, match="main_loss must be a scalar"):
        auxiliary_usefulness(problem.outer(), problem.auxiliaries(), problem.auxiliaries(), [problem.w])
    with pytest.raises(ValueError, match="outer_loss does not depend on any of"):
        auxiliary_usefulness(
            problem.outer(), problem.main(), problem.auxiliaries(), [torch.ones(1, requires_grad=True)]
        )
    with pytest.raises(ValueError, match="params is empty"):
        auxiliary_usefulness(problem.outer(), problem.main(), problem.auxiliaries(), [])


def test_one_tensor_for_the_parameters():
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(TypeError, match="params must be an iterable of tensors, not a Tensor: pass a list"):
        auxiliary_usefulness(w.sum(), w.square().sum(), [w.sum()], params=w)


@pytest.mark.parametrize("name", ["outer_loss", "main_loss", "aux_losses"])
def test_reentrant_checkpoints_are_refused(name):
    w, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    losses = {"outer_loss": w.sum(), "main_loss": w.square().sum(), "aux_losses": w.sum()[None]}
    losses[name] = losses[name] + checkpoint(lambda x: (w * x).sum(), x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=f"{name} went through a reentrant"):
        auxiliary_usefulness(**losses, params=[w])
