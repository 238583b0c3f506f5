"""Hypergradients in the parameters of a combiner of loss images, with every solver there is."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import auxfast
from auxfast import reference_kernels, solvers
from auxfast.nn import ConvCombiner

# Every solver, so set that it converges on the problem below. Those that take a step for the inverse cannot.
A_STEP = (solvers.Identity, solvers.OneStep, solvers.SingleLoop)
SOLVERS = {
    "Chebyshev": solvers.Chebyshev(steps=2000, tol=1e-9),
    "CompactMINRES": solvers.CompactMINRES(steps=200, tol=1e-9),
    "ConjugateGradient": solvers.ConjugateGradient(steps=200, tol=1e-9),
    "Dense": solvers.Dense(),
    "GMRES": solvers.GMRES(steps=200, tol=1e-9),
    "Identity": solvers.Identity(scale=0.7),
    "MINRES": solvers.MINRES(steps=200, tol=1e-9),
    "Neumann": solvers.Neumann(steps=2000, tol=1e-9),
    "NormalEquations": solvers.NormalEquations(steps=1000, tol=1e-9),
    "Nystrom": solvers.Nystrom(rank=12),
    "OneStep": solvers.OneStep(lr=0.7),
    "SingleLoop": solvers.SingleLoop(step_size=0.7),
}


class Problem:
    """A linear map of 4 features to 3 targets at every pixel, shared by all pixels; squared errors are the losses.

    They are convex in the weights, and so is what a monotone and convex network makes of them: a Hessian without
    negative eigenvalues.
    """

    def __init__(self, weight_norm: bool) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.features, self.targets, self.held_out = normal(2, 4, 6, 7), normal(2, 3, 6, 7), normal(2, 3, 6, 7)
        self.mask = normal(2, 3, 6, 7) > -1
        self.weights = normal(3, 4).requires_grad_()
        self.combiner = ConvCombiner(3, (4, 3), weight_norm=weight_norm).double()

    def _errors(self, targets: Tensor, weights: Tensor) -> Tensor:
        return (torch.einsum("of,bfhw->bohw", weights, self.features) - targets).square()

    def inner_loss(self, weights: Tensor | None = None) -> Tensor:
        weights = self.weights if weights is None else weights
        losses = self._errors(self.targets, weights).where(self.mask, torch.nan)
        return self.combiner(losses, self.mask) + 0.05 * weights.square().sum()

    def outer_loss(self) -> Tensor:
        return self._errors(self.held_out, self.weights)[:, 0].mean()

    def expected(self, solver: object) -> Tensor:
        """The hypergradient from the dense Hessian of plain PyTorch operations."""
        with reference_kernels():
            hessian = torch.autograd.functional.hessian(self.inner_loss, self.weights.detach()).view(12, 12)
            assert torch.linalg.eigvalsh(hessian).min() > 0
            (rhs,) = torch.autograd.grad(self.outer_loss(), self.weights)
            inverse = 0.7 * torch.eye(12).double() if isinstance(solver, A_STEP) else hessian.inverse()
            (slope,) = torch.autograd.grad(self.inner_loss(), self.weights, create_graph=True)
            (mixed,) = torch.autograd.grad((slope.flatten() * (inverse @ rhs.flatten())).sum(), self.combiner.phi)
        return -mixed


def test_no_solver_is_forgotten():
    every = [getattr(solvers, name) for name in solvers.__all__]
    classes = [s for s in every if inspect.isclass(s) and not inspect.isabstract(s) and s is not solvers.Solver]
    names = {s.__name__ for s in classes if hasattr(s, "solve")}
    others = {"GradientFlow", "BlockDiagonal", "SAMA"}  # another system, one of several problems, needs an optimizer
    assert names - others == set(SOLVERS)


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_hypergradient_with_every_solver(solver, weight_norm):
    problem = Problem(weight_norm)
    result = auxfast.hypergradient(
        problem.outer_loss(),
        problem.inner_loss(),
        [problem.weights],
        problem.combiner.parameters(),
        solver=solver,
        warn=False,
    )
    expected = problem.expected(solver)
    assert expected.norm() > 0
    torch.testing.assert_close(result.grads[0], expected, rtol=1e-6, atol=1e-7 * expected.abs().max().item())
    if not isinstance(solver, A_STEP):
        assert result.stats.residual < 1e-8
