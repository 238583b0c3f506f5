"""Hypergradients against the dense program of docs/theorem.md, on several problems, and the program itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from pages import DOCS, fenced, run
from torch import Tensor, nn
from torch.func import functional_call, grad

import auxfast
from auxfast.solvers import MINRES, ConjugateGradient, Dense

PAGE = DOCS / "theorem.md"
PROGRAM, DEMONSTRATION = fenced(PAGE, "python")
theorem = run(PAGE, [PROGRAM])
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """outer, inner: losses of flat vectors (w, phi). w, phi: where to start. minimum: whether w is taken to W*(phi), by
    `descent` steps of gradient descent and then by Newton's method."""

    outer: Loss
    inner: Loss
    w: Tensor
    phi: Tensor
    minimum: bool = True
    descent: int = 0

    def point(self) -> Tensor:
        """The inner parameters at which derivatives are taken."""
        if not self.minimum:
            return self.w
        w = self.w
        for _ in range(self.descent):
            w = w - 0.1 * grad(self.inner)(w, self.phi)
        result: Tensor = theorem["inner_minimum"](self.inner, w, self.phi)
        return result


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ridge() -> Problem:
    """A weight decay for each feature; the outer loss depends on phi directly, too."""
    x, y, outer_x, outer_y = normal(30, 6, seed=1), normal(30, seed=2), normal(20, 6, seed=3), normal(20, seed=4)
    return Problem(
        outer=lambda w, phi: (outer_x @ w - outer_y).square().mean() + phi.square().sum(),
        inner=lambda w, phi: (x @ w - y).square().mean() + (phi.exp() * w.square()).sum(),
        w=torch.zeros(6).double(),
        phi=normal(6, seed=5),
    )


def logistic_regression() -> Problem:
    """A weight for each training example."""
    x, outer_x = normal(40, 5, seed=1), normal(20, 5, seed=2)
    y, outer_y = (normal(40, seed=3) > 0).double(), (normal(20, seed=4) > 0).double()
    loss = F.binary_cross_entropy_with_logits

    def inner(w: Tensor, phi: Tensor) -> Tensor:
        return (phi.softmax(0) * loss(x @ w, y, reduction="none")).sum() + 0.05 * w.square().sum()

    return Problem(lambda w, phi: loss(outer_x @ w, outer_y), inner, torch.zeros(5).double(), normal(40, seed=5))


def module_from(module: nn.Module, flat: Tensor, *inputs: Tensor) -> Tensor:
    """The output of a module whose parameters are the parts of a flat vector."""
    names, params = zip(*module.named_parameters(), strict=True)
    parts = flat.split([param.numel() for param in params])
    views = {name: part.view(param.shape) for name, part, param in zip(names, parts, params, strict=True)}
    result: Tensor = functional_call(module, views, inputs)
    return result


def flat_parameters(module: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in module.parameters()])


def network_under(combiner: nn.Module, minimum: bool) -> Problem:
    """A small network, whose losses in three targets a combiner turns into one."""
    torch.manual_seed(3)
    net, combiner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), combiner.double()
    x, y, outer_x, outer_y = normal(12, 3, seed=1), normal(12, 3, seed=2), normal(9, 3, seed=3), normal(9, seed=4)

    def inner(w: Tensor, phi: Tensor) -> Tensor:
        losses = (module_from(net, w, x) - y).square()
        return module_from(combiner, phi, losses) + 0.3 * w.square().sum()

    def outer(w: Tensor, phi: Tensor) -> Tensor:
        return (module_from(net, w, outer_x)[:, 0] - outer_y).square().mean()

    return Problem(outer, inner, flat_parameters(net), flat_parameters(combiner), minimum, descent=200)


def learned_labels() -> Problem:
    """Soft labels come from a second network, whose parameters are phi."""
    torch.manual_seed(4)
    student, teacher = nn.Linear(3, 4).double(), nn.Sequential(nn.Linear(3, 4), nn.Softmax(1)).double()
    x, outer_x, outer_y = normal(15, 3, seed=1), normal(9, 3, seed=2), torch.arange(9) % 4

    def inner(w: Tensor, phi: Tensor) -> Tensor:
        return F.cross_entropy(module_from(student, w, x), module_from(teacher, phi, x)) + 0.1 * w.square().sum()

    def outer(w: Tensor, phi: Tensor) -> Tensor:
        return F.cross_entropy(module_from(student, w, outer_x), outer_y)

    return Problem(outer, inner, flat_parameters(student), flat_parameters(teacher))


def saddle() -> Problem:
    """An indefinite Hessian: the formula holds at any stationary point."""
    signs = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    return Problem(
        outer=lambda w, phi: w.square().sum() + w.prod() + phi.sum() * w.sum(),
        inner=lambda w, phi: (signs * (w - phi.sin()).square()).sum(),
        w=torch.zeros(4).double(),
        phi=normal(4, seed=1),
    )


PROBLEMS = {
    "ridge": ridge,
    "logistic regression": logistic_regression,
    "linear combiner": lambda: network_under(auxfast.nn.LinearCombiner(3), minimum=True),
    "nonlinear combiner": lambda: network_under(auxfast.nn.NonlinearCombiner(3, hidden=(5, 4)), minimum=False),
    "polynomial combiner": lambda: network_under(auxfast.nn.PolynomialCombiner(3), minimum=False),
    "learned labels": learned_labels,
    "saddle": saddle,
}
AWAY_FROM_THE_MINIMUM = ("nonlinear combiner", "polynomial combiner")  # where there is no function to difference
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
SOLVERS = {"default": MINRES(), "MINRES": MINRES(steps=500, tol=1e-12), "dense": Dense()}


@each_problem
@pytest.mark.parametrize("functions", [False, True], ids=["tensors", "functions"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_hypergradient_is_that_of_the_dense_program(problem, functions, solver):
    problem = problem()
    w, phi = problem.point().requires_grad_(), problem.phi.clone().requires_grad_()
    truth = theorem["dense_hypergradient"](problem.outer, problem.inner, w.detach(), phi.detach())

    def outer_loss() -> Tensor:
        return problem.outer(w, phi)

    def inner_loss() -> Tensor:
        return problem.inner(w, phi)

    losses = (outer_loss, inner_loss) if functions else (outer_loss(), inner_loss())
    result = auxfast.hypergradient(*losses, [w], [phi], solver=solver, warn=False)
    assert result.stats.converged
    error = (result.grads[0] - truth).norm() / truth.norm()
    assert error < (1e-2 if solver == MINRES() else 1e-9)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in AWAY_FROM_THE_MINIMUM])
def test_dense_program_agrees_with_finite_differences(name):
    problem = PROBLEMS[name]()
    w = problem.point()
    dense = theorem["dense_hypergradient"](problem.outer, problem.inner, w, problem.phi)
    differences = theorem["finite_differences"](problem.outer, problem.inner, w, problem.phi)
    torch.testing.assert_close(dense, differences, rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_agree_where_the_hessian_is_definite():
    problem = ridge()
    w, phi = problem.point().requires_grad_(), problem.phi.clone().requires_grad_()
    solver = ConjugateGradient(tol=1e-12)
    result = auxfast.hypergradient(problem.outer(w, phi), problem.inner(w, phi), [w], [phi], solver=solver)
    truth = theorem["dense_hypergradient"](problem.outer, problem.inner, w.detach(), phi.detach())
    torch.testing.assert_close(result.grads[0], truth, rtol=1e-9, atol=1e-11)


def test_the_page_shows_the_same_number_three_times(capsys):
    names = run(PAGE, [PROGRAM, DEMONSTRATION])
    torch.testing.assert_close(names["differences"], names["dense"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(names["result"].grads[0], names["dense"], rtol=1e-8, atol=1e-10)
    assert capsys.readouterr().out.count("tensor") == 3


def test_the_program_is_thirty_lines():
    lines = [line for line in PROGRAM.splitlines() if line.strip()]
    assert len(lines) <= 30
