"""Several inner problems at once, as in iMAML: one adapted network a task, and outer parameters that all share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import auxfast
from auxfast.solvers import (
    GMRES,
    MINRES,
    BlockDiagonal,
    ConjugateGradient,
    Dense,
    Identity,
    Neumann,
    NormalEquations,
    SolverState,
)

TASKS = 6
EXACT = {
    "MINRES": MINRES(500, tol=1e-12),
    "ConjugateGradient": ConjugateGradient(500, tol=1e-12),
    "GMRES": GMRES(500, tol=1e-12),
    "NormalEquations": NormalEquations(2000, tol=1e-12),
    "Neumann": Neumann(5000, 0.05, tol=1e-12),
}
exact = pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT.keys())


class Sinusoids:
    """iMAML of a linear model on sinusoids of several amplitudes and phases.

    inner_t(w) = |F_t w - y_t|^2 / 2 + lambda / 2 |w - phi|^2,    outer = sum_t |F'_t w_t - y'_t|^2 / 2

    F holds features of the samples. With A_t = F_t^T F_t + lambda I the minimum is w_t = A_t^-1 (F_t^T y_t + lambda
    phi), and with q_t = A_t^-1 (gradient of the outer loss in w_t) the hypergradients are lambda sum_t q_t in phi and
    sum_t <q_t, phi - w_t> in lambda.
    """

    def __init__(self, shots: int = 5, features: int = 8) -> None:
        torch.manual_seed(1)
        amplitude, phase = 0.1 + 4.9 * torch.rand(TASKS, 1).double(), math.pi * torch.rand(TASKS, 1).double()
        frequencies = torch.arange(1, features // 2 + 1) / 2

        def samples() -> tuple[Tensor, Tensor]:
            x = 10 * torch.rand(TASKS, shots).double() - 5
            angles = x[..., None] * frequencies
            return torch.cat([angles.sin(), angles.cos()], dim=-1), amplitude * (x + phase).sin()

        (self.x, self.y), (self.outer_x, self.outer_y) = samples(), samples()
        self.phi = (0.1 * torch.randn(features).double()).requires_grad_()
        self.strength = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        self.w = self.adapted().requires_grad_()

    def hessians(self) -> Tensor:
        return self.x.mT @ self.x + self.strength.detach() * torch.eye(self.x.shape[-1]).double()

    def adapted(self) -> Tensor:
        """(TASKS, features)"""
        right = (self.x.mT @ self.y[..., None])[..., 0] + self.strength.detach() * self.phi.detach()
        return torch.linalg.solve(self.hessians(), right)

    def inner_losses(self) -> Tensor:
        """(TASKS,)"""
        fit = ((self.x @ self.w[..., None])[..., 0] - self.y).square().sum(dim=1)
        return fit / 2 + self.strength / 2 * (self.w - self.phi).square().sum(dim=1)

    def inner_loss(self) -> Tensor:
        return self.inner_losses().sum()

    def outer_losses(self) -> Tensor:
        """(TASKS,)"""
        return ((self.outer_x @ self.w[..., None])[..., 0] - self.outer_y).square().sum(dim=1) / 2

    def outer_loss(self) -> Tensor:
        return self.outer_losses().sum()

    def exact(self) -> tuple[Tensor, Tensor]:
        """The hypergradient in (phi, strength)."""
        (b,) = torch.autograd.grad(self.outer_loss(), [self.w])
        q = torch.linalg.solve(self.hessians(), b)
        phi, w = self.phi.detach(), self.w.detach()
        return self.strength.detach() * q.sum(dim=0), (q * (phi - w)).sum()


def assert_close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tol: float = 1e-10) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol * float(b.norm()))


@exact
@pytest.mark.parametrize("as_function", [True, False], ids=["functions", "tensors"])
def test_imaml_of_a_linear_model_has_its_closed_form(solver, as_function):
    problem = Sinusoids()
    losses = (problem.outer_loss, problem.inner_loss)
    if not as_function:
        losses = tuple(loss() for loss in losses)
    result = auxfast.hypergradient(
        *losses, [problem.w], [problem.phi, problem.strength], solver=BlockDiagonal(solver), warn=False
    )
    assert_close(result.grads, problem.exact(), 1e-9)
    assert len(result.stats.residuals) == TASKS
    assert max(result.stats.residuals) <= 1e-12
    assert result.stats.converged


def test_a_mean_over_tasks_is_the_same_problem():
    problem = Sinusoids()
    result = auxfast.hypergradient(
        problem.outer_loss(),
        problem.inner_loss() / TASKS,
        [problem.w],
        [problem.phi, problem.strength],
        solver=BlockDiagonal(MINRES(tol=1e-12)),
    )
    assert_close(result.grads, problem.exact(), 1e-9)


def test_damping_is_added_to_the_hessian_of_each_task():
    problem = Sinusoids()
    solver = BlockDiagonal(MINRES(tol=1e-12, damping=0.5))
    result = auxfast.hypergradient(
        problem.outer_loss(), problem.inner_loss(), [problem.w], [problem.phi], solver=solver, warn=False
    )
    (b,) = torch.autograd.grad(problem.outer_loss(), [problem.w])
    q = torch.linalg.solve(problem.hessians() + 0.5 * torch.eye(b.shape[1]).double(), b)
    assert_close(result.grads, (problem.strength.detach() * q.sum(dim=0),), 1e-9)


def test_an_outer_loss_may_mix_the_tasks():
    """A worst case over tasks mixes them, and each still has its own right-hand side."""
    problem = Sinusoids()
    outer = problem.outer_losses().logsumexp(dim=0) + problem.w.var(dim=0).sum()
    args = ([problem.w], [problem.phi, problem.strength])
    result = auxfast.hypergradient(
        outer, problem.inner_loss(), *args, solver=BlockDiagonal(MINRES(tol=1e-12)), retain_graph=True
    )
    wanted = auxfast.hypergradient(outer, problem.inner_loss(), *args, solver=Dense())
    assert_close(result.grads, wanted.grads, 1e-9)


class Networks:
    """A small network adapted to each task, kept near shared weights by a learned strength; and the same one by one."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
        self.names = [name for name, _ in self.net.named_parameters()]
        self.shared = [p.detach().clone().requires_grad_() for p in self.net.parameters()]
        self.log_strength = torch.tensor(1.5, dtype=dtype, requires_grad=True)
        self.outer_params = [*self.shared, self.log_strength]
        self.w = [(p.detach() + 0.3 * torch.randn(TASKS, *p.shape).to(dtype)).requires_grad_() for p in self.shared]
        self.x, self.outer_x = 4 * torch.rand(2, TASKS, 7, 1).to(dtype) - 2
        self.y, self.outer_y = (self.x + torch.rand(TASKS, 1, 1).to(dtype)).sin(), self.outer_x.sin()

    def fit(self, w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(self.net, dict(zip(self.names, w, strict=True)), (x,)) - y).square().mean()

    def inner(self, w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        away = sum((a - b).square().sum() for a, b in zip(w, self.shared, strict=True))
        return self.fit(w, x, y) + self.log_strength.exp() / 2 * away

    def inner_loss(self) -> Tensor:
        return vmap(self.inner)(self.w, self.x, self.y).sum()

    def outer_loss(self) -> Tensor:
        return vmap(self.fit)(self.w, self.outer_x, self.outer_y).sum()

    def one_by_one(self, solver: object) -> tuple[tuple[Tensor, ...], list[auxfast.solvers.SolveStats]]:
        total, stats = [torch.zeros_like(p) for p in self.outer_params], []
        for t in range(TASKS):
            w = [p[t].detach().requires_grad_() for p in self.w]
            outer, inner = self.fit(w, self.outer_x[t], self.outer_y[t]), self.inner(w, self.x[t], self.y[t])
            result = auxfast.hypergradient(outer, inner, w, self.outer_params, solver=solver, warn=False)
            total = [a + b for a, b in zip(total, result.grads, strict=True)]
            stats.append(result.stats)
        return tuple(total), stats


@exact
def test_networks_of_all_tasks_are_those_of_one_after_the_other(solver):
    problem = Networks()
    wanted, stats = problem.one_by_one(solver)
    result = auxfast.hypergradient(
        problem.outer_loss, problem.inner_loss, problem.w, problem.outer_params, solver=BlockDiagonal(solver)
    )
    assert_close(result.grads, wanted)
    assert result.stats.converged
    assert all(s.converged for s in stats)


@pytest.mark.parametrize(
    "solver", [MINRES(4), ConjugateGradient(4), GMRES(4), NormalEquations(4), Neumann(4, 0.1), Identity(0.2)], ids=repr
)
def test_unconverged_tasks_are_those_of_one_after_the_other_too(solver):
    problem = Networks()
    wanted, stats = problem.one_by_one(solver)
    result = auxfast.hypergradient(
        problem.outer_loss(),
        problem.inner_loss(),
        problem.w,
        problem.outer_params,
        solver=BlockDiagonal(solver),
        warn=False,
    )
    assert_close(result.grads, wanted)
    assert result.stats.residuals == pytest.approx([s.residual for s in stats], rel=1e-6)


def test_float32_is_as_good_as_its_certificate():
    problem = Networks(torch.float32)
    result = auxfast.hypergradient(
        problem.outer_loss(),
        problem.inner_loss(),
        problem.w,
        problem.outer_params,
        solver=BlockDiagonal(MINRES(tol=1e-5)),
    )
    wanted, _ = problem.one_by_one(Dense())
    assert_close(result.grads, wanted, 1e-4)


@pytest.mark.parametrize("curvature", ["hessian", "finite-difference"])
def test_micro_batches_and_other_products_serve(curvature):
    problem = Networks()

    def part(rows: slice) -> Callable[[], Tensor]:
        return lambda: vmap(problem.inner)(problem.w, problem.x[:, rows], problem.y[:, rows]).sum()

    parts = [part(slice(0, 3)), part(slice(3, 6))]
    args = (problem.w, problem.outer_params)
    result = auxfast.hypergradient(
        problem.outer_loss, parts, *args, curvature=curvature, solver=BlockDiagonal(MINRES(tol=1e-8)), warn=False
    )
    wanted = auxfast.hypergradient(
        problem.outer_loss, lambda: (parts[0]() + parts[1]()) / 2, *args, solver=Dense(), warn=False
    )
    assert_close(result.grads, wanted.grads, 1e-6)


def test_entries_that_are_held_fixed_stay_out():
    problem = Sinusoids()
    free = torch.rand(problem.w.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    solvers = (BlockDiagonal(MINRES(tol=1e-12)), Dense())
    found, wanted = (
        auxfast.hypergradient(
            problem.outer_loss(), problem.inner_loss(), [problem.w], [problem.phi], solver=solver, free=[free]
        ).grads
        for solver in solvers
    )
    assert_close(found, wanted, 1e-9)


def test_finite_differences_through_tasks_that_are_solved_anew():
    """Logistic regressions of two groups of samples, re-solved by Newton's method for each outer parameter moved."""
    torch.manual_seed(0)
    x, outer_x = torch.randn(2, TASKS, 20, 3).double()
    y, outer_y = (x.sum(dim=-1) > 0).double(), (outer_x[..., 0] > 0).double()
    phi = torch.tensor([0.3, -0.2, 0.1, -0.5], dtype=torch.float64, requires_grad=True)
    w = torch.zeros(TASKS, 3, dtype=torch.float64, requires_grad=True)

    def inner(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        fit = nn.functional.binary_cross_entropy_with_logits(x @ w, y)
        return fit + phi[3].exp() / 2 * (w - phi[:3]).square().sum()

    def outer_loss() -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits((outer_x @ w[..., None])[..., 0], outer_y)

    def inner_loss() -> Tensor:
        return vmap(inner)(w, x, y).sum()

    def solve() -> float:
        for _ in range(20):
            (gradient,) = torch.autograd.grad(inner_loss(), [w])
            with torch.no_grad():
                p = (x @ w[..., None]).sigmoid()
                hessians = x.mT @ (p * (1 - p) * x) / x.shape[1] + phi[3].exp() * torch.eye(3)
                w.sub_(torch.linalg.solve(hessians, gradient))
        return outer_loss().item()

    differences = []
    for i in range(len(phi)):
        values = []
        for sign in (1, -1):
            phi.data[i] += sign * 1e-5
            values.append(solve())
            phi.data[i] -= sign * 1e-5
        differences.append((values[0] - values[1]) / 2e-5)
    solve()
    solver = BlockDiagonal(MINRES(tol=1e-12))
    (grad,) = auxfast.hypergradient(outer_loss, inner_loss, [w], [phi], solver=solver).grads
    torch.testing.assert_close(grad, torch.tensor(differences).double(), rtol=1e-6, atol=1e-9)


def test_a_task_that_is_harder_goes_on_alone():
    """The certificates are of each: the tasks that are done early are as exact as they were."""
    problem = Sinusoids()
    problem.x.data[0] *= torch.logspace(-2, 0, problem.x.shape[-1]).double()
    problem.w.data.copy_(problem.adapted())
    problem.strength.data.fill_(1e-4)
    result = auxfast.hypergradient(
        problem.outer_loss, problem.inner_loss, [problem.w], [problem.phi], solver=BlockDiagonal(MINRES(4)), warn=False
    )
    (b,) = torch.autograd.grad(problem.outer_loss(), [problem.w])
    for t, hessian in enumerate(problem.hessians()):
        _, stats = MINRES(4).solve(lambda v, hessian=hessian: [hessian @ v[0]], [b[t]])
        assert result.stats.residuals[t] == pytest.approx(stats.residual, rel=1e-6)


def test_implicit_minimum_gives_the_tasks_and_each_of_their_gradients():
    """One outer loss for each task: their Jacobian is one batched solve of all right-hand sides of all tasks."""
    problem = Sinusoids()
    outer_params = [problem.phi, problem.strength]
    (w,) = auxfast.implicit_minimum(
        problem.inner_loss, [problem.w], outer_params, solver=BlockDiagonal(MINRES(tol=1e-12))
    )
    losses = ((problem.outer_x @ w[..., None])[..., 0] - problem.outer_y).square().sum(dim=1) / 2
    found = torch.autograd.grad(losses.sum(), outer_params, retain_graph=True)
    assert_close(found, problem.exact(), 1e-9)
    rows = torch.eye(TASKS, dtype=torch.float64)
    jacobian = torch.autograd.grad(losses, outer_params, rows, is_grads_batched=True)
    assert_close(tuple(j.sum(dim=0) for j in jacobian), problem.exact(), 1e-9)


def test_roots_of_all_tasks_are_found_side_by_side():
    """z = tanh(A_t z + phi) for each task, a root that is no gradient; d z_t / d phi is (I - D_t A_t)^-1 D_t with the
    slopes D_t."""
    torch.manual_seed(0)
    weights = torch.randn(TASKS, 5, 5).double() / 5
    phi = torch.randn(5).double().requires_grad_()
    z = torch.zeros(TASKS, 5, dtype=torch.float64, requires_grad=True)

    def step() -> Tensor:
        return ((weights @ z[..., None])[..., 0] + phi).tanh()

    with torch.no_grad():
        for _ in range(200):
            z.copy_(step())
    solver = BlockDiagonal(GMRES(tol=1e-12))
    (root,) = auxfast.implicit_root(lambda: z - step(), [z], [phi], solver=solver)
    (found,) = torch.autograd.grad(root.square().sum() / 2, [phi])
    slopes = torch.diag_embed(1 - z.detach().square())
    each = torch.linalg.solve(torch.eye(5) - slopes @ weights, slopes)  # (TASKS, 5, 5)
    torch.testing.assert_close(found, torch.einsum("ti,tij->j", z.detach(), each), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- outer steps


def test_outer_steps_of_tasks_start_from_the_last_solutions():
    problem = Networks()
    outer = auxfast.HyperOptimizer(
        torch.optim.SGD(problem.outer_params, lr=1e-3), solver=BlockDiagonal(MINRES(tol=1e-6, warm_start=True))
    )
    first, second = (outer.step(problem.outer_loss, problem.inner_loss, problem.w) for _ in range(2))
    assert first.converged
    assert second.converged
    assert second.matvecs < first.matvecs
    assert [x.shape for x in outer.state.solution] == [w.shape for w in problem.w]
    assert outer.state.blocks == TASKS
    copy = auxfast.HyperOptimizer(torch.optim.SGD(problem.outer_params, lr=1e-3), solver=outer.solver)
    copy.load_state_dict(outer.state_dict())
    assert copy.state.blocks == TASKS


def test_identity_of_each_task_is_no_reason_to_warn():
    problem = Networks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auxfast.hypergradient(
            problem.outer_loss(),
            problem.inner_loss(),
            problem.w,
            problem.outer_params,
            solver=BlockDiagonal(Identity(9.0)),
        )


# ------------------------------------------------------------------------------------------------------------- mistakes


def shared_statistics(problem: Networks) -> Tensor:
    """Normalised over samples of all tasks, as a BatchNorm of all of them would."""
    hidden = torch.tanh(problem.x @ problem.w[0].mT + problem.w[1][:, None])
    hidden = (hidden - hidden.mean(dim=(0, 1))) / hidden.std(dim=(0, 1))
    return (hidden @ problem.w[2].mT - problem.y).square().mean() + problem.inner_loss()


def penalty_on_differences(problem: Networks) -> Tensor:
    return problem.inner_loss() + sum(w.var(dim=0).sum() for w in problem.w)


@pytest.mark.parametrize("loss", [shared_statistics, penalty_on_differences])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tasks_that_depend_on_each_other_are_refused(loss, dtype):
    problem = Networks(dtype)
    args = (problem.w, problem.outer_params)
    with pytest.raises(ValueError, match="the 6 problems of BlockDiagonal depend on each other"):
        auxfast.hypergradient(problem.outer_loss, lambda: loss(problem), *args, solver=BlockDiagonal())
    state = SolverState()
    auxfast.hypergradient(
        problem.outer_loss, problem.inner_loss, *args, solver=BlockDiagonal(), state=state, warn=False
    )


def test_wrong_shapes_are_refused_with_a_remedy():
    problem = Sinusoids()
    solver = BlockDiagonal()
    for outer, inner in (
        (problem.outer_loss(), problem.inner_losses()),
        (problem.outer_losses(), problem.inner_loss()),
    ):
        with pytest.raises(ValueError, match=r"must be a scalar, not of shape \(6,\): take its mean or sum"):
            auxfast.hypergradient(outer, inner, [problem.w], [problem.phi], solver=solver)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)  # one for all tasks
    inner = problem.inner_loss() + (scale.square() * problem.w[:, :3]).sum()
    with pytest.raises(
        ValueError, match=r"the same number of problems as their first axis, got shapes \(6, 8\), \(3,\)"
    ):
        auxfast.hypergradient(
            problem.outer_loss() + scale.sum(), inner, [problem.w, scale], [problem.phi], solver=solver
        )
