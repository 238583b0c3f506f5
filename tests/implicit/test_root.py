"""`implicit_root` against closed forms, dense linear algebra and roots that are found again."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from auxfast.implicit import NotFiniteError, implicit_minimum, implicit_root
from auxfast.solvers import GMRES, MINRES, Dense, NormalEquations, SolverState

from .problems import Ridge

D = torch.float64
SOLVER = GMRES(500, restart=60, tol=1e-12)


class Linear:
    """`A(phi) w = b(phi)` with `A = matrix + diag(phi)`, not symmetric, and `b = 2 phi`."""

    def __init__(self, size: int = 5) -> None:
        generator = torch.Generator().manual_seed(2)
        self.matrix = torch.randn(size, size, generator=generator, dtype=D)
        self.phi = torch.rand(size, generator=generator, dtype=D).add(3).requires_grad_()
        self.c = torch.randn(size, generator=generator, dtype=D)
        self.w = self.solve(self.phi).detach().requires_grad_()

    def solve(self, phi: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix + torch.diag(phi), 2 * phi)

    def function(self) -> Tensor:
        return self.matrix @ self.w + self.phi * self.w - 2 * self.phi

    def root(self, **options) -> Tensor:
        (w,) = implicit_root(self.function, [self.w], [self.phi], **{"solver": Dense()} | options)
        return w

    def expected(self) -> Tensor:
        return torch.autograd.grad((self.c * self.solve(self.phi).sin()).sum(), self.phi)[0]


@pytest.mark.parametrize("solver", [SOLVER, NormalEquations(50, tol=1e-12), Dense()], ids=lambda s: type(s).__name__)
def test_closed_form_of_a_linear_system(solver):
    problem, stats = Linear(), []
    w = problem.root(solver=solver, on_solve=stats.append)
    assert torch.equal(w, problem.w)
    (problem.c * w.sin()).sum().backward()
    torch.testing.assert_close(problem.phi.grad, problem.expected(), rtol=1e-10, atol=1e-12)
    assert problem.w.grad is None
    (solve,) = stats
    assert solve.converged


def test_equations_may_come_flat_or_as_a_list_or_by_name():
    problem = Linear()
    a, b = (part.detach().clone().requires_grad_() for part in problem.w.split([2, 3]))
    b = b.detach().view(3, 1).requires_grad_()

    def flat() -> Tensor:
        w = torch.cat([a, b[:, 0]])
        return problem.matrix @ w + problem.phi * w - 2 * problem.phi

    def as_list() -> list[Tensor]:
        return [flat()[:2], flat()[2:, None]]

    def by_name() -> dict[str, Tensor]:
        return dict(zip(("b", "a"), reversed(as_list()), strict=True))

    for function in (flat, as_list, by_name):
        given = {"a": a, "b": b} if function is by_name else [a, b]
        found = implicit_root(function, given, [problem.phi], solver=Dense())
        x, y = found.values() if isinstance(found, dict) else found
        assert y.shape == (3, 1)
        (gradient,) = torch.autograd.grad((problem.c * torch.cat([x, y[:, 0]]).sin()).sum(), problem.phi)
        torch.testing.assert_close(gradient, problem.expected(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", [SOLVER, NormalEquations(50, tol=1e-12), Dense()], ids=lambda s: type(s).__name__)
def test_rows_of_a_jacobian_share_one_solve(solver):
    problem, stats = Linear(9), []
    w = problem.root(solver=solver, on_solve=stats.append)
    (rows,) = torch.autograd.grad(w, problem.phi, torch.eye(9, dtype=D), is_grads_batched=True)
    torch.testing.assert_close(
        rows, torch.autograd.functional.jacobian(problem.solve, problem.phi), rtol=1e-10, atol=1e-12
    )
    (solve,) = stats
    assert len(solve.residuals) == 9


def test_the_gradient_of_a_loss_is_a_function_like_others():
    problem = Ridge()

    def gradient() -> Tensor:
        return torch.autograd.grad(problem.inner_loss(), problem.w, create_graph=True)[0]

    phi = [problem.decay, problem.weights]
    (by_root,) = implicit_root(gradient, [problem.w], phi, solver=Dense())
    (by_minimum,) = implicit_minimum(problem.inner_loss, [problem.w], phi, solver=Dense())
    found, expected = (torch.autograd.grad(w.exp().sum(), phi) for w in (by_root, by_minimum))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_an_equilibrium_model():
    """400 units of `z = tanh(W z + U x + b)`, against derivatives through the solution of the dense system."""
    torch.manual_seed(0)
    units = 400
    weight = (0.8 * torch.randn(units, units, dtype=D) / units**0.5).requires_grad_()
    inputs, bias = torch.randn(units, 3, dtype=D, requires_grad=True), torch.randn(units, dtype=D, requires_grad=True)
    x, c = torch.randn(3, dtype=D), torch.randn(units, dtype=D)
    phi = [weight, inputs, bias]

    def step(z: Tensor) -> Tensor:
        return torch.tanh(weight @ z + inputs @ x + bias)

    with torch.no_grad():
        z = torch.zeros(units, dtype=D)
        for _ in range(300):
            z = step(z)
    z.requires_grad_()
    stats = []
    (solved,) = implicit_root(lambda: step(z) - z, [z], phi, solver=SOLVER, on_solve=stats.append)
    found = torch.autograd.grad((c * solved).sum(), phi)
    jacobian = torch.eye(units, dtype=D) - (1 - z.detach().square())[:, None] * weight.detach()
    adjoint = torch.linalg.solve(jacobian.T, c)
    expected = torch.autograd.grad(step(z), phi, adjoint)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    (solve,) = stats
    assert solve.converged

    def value(shift: Tensor) -> Tensor:
        with torch.no_grad():
            moved = z.detach()
            for _ in range(300):
                moved = torch.tanh(weight @ moved + inputs @ x + bias + shift)
        return (c * moved).sum()

    direction = torch.randn(units, dtype=D)
    difference = (value(1e-5 * direction) - value(-1e-5 * direction)) / 2e-5
    torch.testing.assert_close((found[2] * direction).sum(), difference, rtol=1e-6, atol=1e-8)


def test_the_fixed_point_of_meta_weight_net():
    """A network gives each sample a weight by its loss, which the training dynamics take for a constant: their fixed
    point is the minimum of no loss."""
    torch.manual_seed(0)
    x, x_outer = torch.randn(2, 30, 4, dtype=D)
    y, y_outer = x @ torch.randn(4, dtype=D) + 0.5 * torch.randn(30, dtype=D), torch.randn(30, dtype=D)
    weigh = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1), nn.Sigmoid()).to(D)
    phi = list(weigh.parameters())

    def dynamics(w: Tensor) -> Tensor:
        losses = 0.5 * (x @ w - y).square()
        weights = weigh(losses.detach()[:, None])[:, 0]
        (gradient,) = torch.autograd.grad((weights * losses).mean(), w, create_graph=True)
        return gradient + 0.1 * w

    def function(w: Tensor) -> Tensor:
        """The dynamics as a function of w, weights included: a cotangent is a constant of the gradient, and none of its
        graph."""
        losses = 0.5 * (x @ w - y).square()
        weights = weigh(losses[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(losses, w, weights / len(x), create_graph=True)
        return gradient + 0.1 * w

    def solve() -> Tensor:
        w = torch.zeros(4, dtype=D, requires_grad=True)
        for _ in range(8):
            jacobian = torch.autograd.functional.jacobian(function, w)
            w = (w - torch.linalg.solve(jacobian, dynamics(w))).detach().requires_grad_()
        assert dynamics(w).norm() < 1e-14
        return w

    def outer(w: Tensor) -> Tensor:
        return (x_outer @ w - y_outer).square().mean()

    w = solve()
    torch.testing.assert_close(function(w), dynamics(w), rtol=1e-12, atol=1e-14)
    (solved,) = implicit_root(lambda: function(w), [w], phi, solver=SOLVER)
    found = torch.autograd.grad(outer(solved), phi)
    for parameter, gradient in zip(phi, found, strict=True):
        for i in range(min(parameter.numel(), 2)):
            values = []
            for step in (1e-4, -2e-4):
                with torch.no_grad():
                    parameter.view(-1)[i] += step
                values.append(outer(solve().detach()))
            with torch.no_grad():
                parameter.view(-1)[i] += 1e-4
            difference = (values[0] - values[1]) / 2e-4
            torch.testing.assert_close(gradient.view(-1)[i], difference, rtol=1e-6, atol=1e-8)


def test_without_gradients_the_results_are_plain_tensors():
    problem = Linear()
    with torch.no_grad():
        assert not problem.root().requires_grad


# What is wrong, or may be.


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward-mode AD loads what needs it
@pytest.mark.parametrize("call", [implicit_minimum, implicit_root])
def test_forward_mode_and_transforms_of_torch_func_are_refused_and_do_not_get_zeros(call):
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3)

    def solved(phi):
        function = (lambda: w - phi) if call is implicit_root else (lambda: (w - phi).square().sum())
        return call(function, [w], [phi])[0]

    def tangent():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(solved(forward_ad.make_dual(phi, torch.ones(3)))).tangent

    jacobian = torch.autograd.functional.jacobian
    for derivative in (
        tangent,
        lambda: torch.func.jvp(solved, (phi,), (phi,)),
        lambda: torch.func.jacfwd(solved)(phi),
        lambda: torch.func.jacrev(solved)(phi),
        lambda: jacobian(solved, phi, vectorize=True, strategy="forward-mode"),
    ):
        with pytest.raises(RuntimeError, match=f"{call.__name__} cannot be used within a transform of torch.func"):
            derivative()
    torch.testing.assert_close(jacobian(solved, phi, vectorize=True), torch.eye(3))


def test_parameters_that_are_not_at_a_root():
    problem = Linear()
    with torch.no_grad():
        problem.w.mul_(1.5)
    with pytest.warns(RuntimeWarning, match="not at a root: along the outer loss's gradient a Newton step"):
        problem.root().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.root(warn=False).sum().backward()


def test_a_fixed_point_map_in_the_place_of_its_equations():
    torch.manual_seed(0)
    matrix, w = torch.randn(40, 40, dtype=D) / 8, torch.zeros(40, dtype=D)
    phi = torch.ones(40, dtype=D, requires_grad=True)
    for _ in range(200):
        w = torch.tanh(matrix @ w + phi.detach())
    w.requires_grad_()
    for solver in (GMRES(5), Dense()):
        (solved,) = implicit_root(lambda: torch.tanh(matrix @ w + phi), [w], [phi], solver=solver)
        with pytest.warns(RuntimeWarning, match=r"f\(W\) - W"):
            solved.sum().backward()


def test_a_singular_jacobian():
    w, phi = torch.ones(2, dtype=D, requires_grad=True), torch.tensor(2.0, dtype=D, requires_grad=True)

    def function() -> Tensor:
        return torch.stack([w.sum() - phi, 2 * w.sum() - 2 * phi])

    (solved,) = implicit_root(function, [w], [phi], solver=SOLVER)
    with pytest.warns(RuntimeWarning, match="The Jacobian of function in params is singular"):
        solved[0].backward()


def test_solvers_for_symmetric_matrices_are_refused():
    with pytest.raises(ValueError, match=r"the matrix is not symmetric \(a Jacobian of implicit_root"):
        Linear().root(solver=MINRES()).sum().backward()


def test_a_function_without_the_outer_parameters():
    problem, other, state = Linear(), torch.ones(2, requires_grad=True), SolverState()
    (w,) = implicit_root(problem.function, [problem.w], [other], solver=Dense(), state=state)
    with pytest.warns(RuntimeWarning, match="No outer parameter plays a part in function"):
        w.sum().backward()
    assert torch.equal(other.grad, torch.zeros(2))


def test_a_graph_that_was_freed():
    w = Linear().root()
    w.sum().backward()
    with pytest.raises(RuntimeError, match=r"second time.*retain_graph=True"):
        w.sum().backward()


@pytest.mark.parametrize("which", ["w", "phi"])
def test_parameters_that_changed_before_the_backward_pass(which):
    problem = Linear()
    w = problem.root()
    with torch.no_grad():
        getattr(problem, which).mul_(1.1)
    with pytest.raises(RuntimeError, match=r"Parameters were changed .* take the backward pass first, or call it anew"):
        w.sum().backward()


def test_there_are_no_second_derivatives():
    problem = Linear()
    (gradient,) = torch.autograd.grad(problem.root().sum(), problem.phi, create_graph=True)
    with pytest.raises(NotImplementedError, match="implicit_root has first derivatives alone"):
        gradient.sum().backward()


def test_what_is_not_finite_is_an_error():
    problem = Linear()
    with pytest.raises(NotFiniteError, match="The backward pass of implicit_root holds NaN or inf"):
        (problem.root().sum() * float("nan")).backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"function": lambda p: p.function()}, TypeError, "function must be a function of no arguments"),
        ({"function": lambda p: lambda: 1.0}, TypeError, "function must return a tensor or a list of tensors"),
        ({"function": lambda p: lambda: p.w[:3]}, ValueError, r"tensors of the shapes of params, \[\(5,\)\], or one"),
        ({"function": lambda p: lambda: p.w.detach()}, ValueError, "result 0 has no graph, so that the Jacobian is"),
        ({"function": lambda p: lambda: 2 * p.phi}, ValueError, "function does not depend on any of params"),
        ({"function": lambda p: lambda: p.w.float()}, ValueError, "float32 for equation 0, and params are torch.float"),
        ({"function": lambda p: lambda: {"w": p.w * 1}}, ValueError, "params are none of the same names"),
        ({"params": lambda p: [p.w.detach()]}, ValueError, r"params\[0\] has requires_grad=False"),
        ({"params": lambda p: p.w}, TypeError, "params must be an iterable of tensors, not a Tensor"),
        ({"outer_params": lambda p: [p.w]}, ValueError, r"outer_params\[0\] is the same tensor as params\[0\]"),
        ({"solver": lambda p: None}, TypeError, "solver must be a solver"),
    ],
)
def test_arguments_are_checked_by_the_call(change, error, message):
    problem = Linear()
    arguments = {"function": problem.function, "params": [problem.w], "outer_params": [problem.phi]}
    for name, make in change.items():
        arguments[name] = make(problem)
    with pytest.raises(error, match=message):
        implicit_root(**arguments)


def test_hooks_on_the_unknowns_act_on_the_outer_gradient_too():
    case = Linear()
    case.w.register_hook(lambda gradient: 3 * gradient)
    for solver in (Dense(), SOLVER):
        w = case.root(solver=solver)
        (found,) = torch.autograd.grad(w.square().sum(), case.phi)
        matrix = (case.matrix + torch.diag(case.phi)).detach()
        x = torch.linalg.solve(matrix.T, 2 * case.w.detach())
        torch.testing.assert_close(found, -x * (case.w.detach() - 2), rtol=1e-9, atol=1e-9)
