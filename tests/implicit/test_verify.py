"""`verify_hypergradient`: it confirms what is right, and tells what is wrong and where; its verdict in one sentence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import auxfast
from auxfast.implicit import Agreement, verify_hypergradient
from auxfast.solvers import MINRES, Dense, Identity, OneStep

from .problems import Reverse, Ridge

EXACT = MINRES(tol=1e-10)


def verify_ridge(problem: Ridge, **options):
    return verify_hypergradient(
        problem.outer_loss, problem.inner_loss, [problem.w], [problem.decay, problem.weights], **options
    )


def test_a_right_hypergradient_is_confirmed():
    problem = Ridge()
    report = verify_ridge(problem, solver=EXACT, max_directions=17)
    torch.testing.assert_close(report.finite_differences, torch.cat(problem.exact()).detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(report.directions, torch.eye(17, dtype=torch.float64))
    assert report.solver.relative_error < 1e-9
    assert report.total.relative_error < 1e-7
    assert report.total.cosine > 1 - 1e-12
    assert report.inner_gradient_norm < 1e-12
    assert report.resolved_gradient_norm < 1e-12


def test_many_outer_parameters_are_varied_along_random_directions():
    report = verify_ridge(Ridge(), solver=EXACT, max_directions=3)
    torch.testing.assert_close(report.directions @ report.directions.T, torch.eye(3, dtype=torch.float64))
    assert report.directions.shape == (3, 17)
    assert report.total.relative_error < 1e-7


def test_an_unsolved_system_is_told():
    report = verify_ridge(Ridge(), solver=Identity(1e-4))
    assert report.solver.relative_error > 0.5
    assert report.total.relative_error > 0.5
    assert "residual 9.9" in str(report)


def test_parameters_away_from_the_minimum_are_told():
    problem = Ridge()
    with torch.no_grad():
        problem.w.add_(1)
    report = verify_ridge(problem, solver=EXACT)
    assert report.solver.relative_error < 1e-8  # the linear system is right,
    assert report.total.relative_error > 0.1  # but not the place
    assert report.inner_gradient_norm > 1


def test_a_path_that_is_missing_is_told():
    problem = Ridge()
    inner = lambda: problem.inner_loss() + 0 * problem.decay.sum()  # noqa: E731
    outer = lambda: problem.outer_loss() - problem.decay.square().sum() + problem.decay.detach().square().sum()  # noqa: E731
    report = verify_hypergradient(outer, inner, [problem.w], [problem.decay], solver=EXACT)
    assert report.solver.relative_error < 1e-8
    assert report.total.relative_error > 1e-2


def test_a_network_in_float32_and_a_solver_of_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))
    x, y = torch.randn(30, 3), torch.randn(30, 1)
    decay = torch.tensor(-1.0, requires_grad=True)
    calls = []

    def inner_loss():
        penalty = sum(p.square().sum() for p in net.parameters())
        return (net(x) - y).square().mean() + decay.exp() * penalty

    def solve_inner():
        calls.append(1)
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, line_search_fn="strong_wolfe")
        random = torch.get_rng_state()

        def closure():
            torch.set_rng_state(random)
            optimizer.zero_grad()
            loss = inner_loss()
            loss.backward()
            return loss

        optimizer.step(closure)

    solve_inner()
    state = torch.get_rng_state()
    decay.grad = torch.tensor(3.0)
    values = [p.detach().clone() for p in (*net.parameters(), decay)]
    report = verify_hypergradient(
        lambda: (net(x[:10]) - 2 * y[:10]).square().mean(),
        inner_loss,
        net.parameters(),
        [decay],
        solve_inner=solve_inner,
    )
    assert len(calls) in (3, 4)  # at both sides of phi, then at phi if the finite differences disagree
    assert report.dense.dtype == torch.float64
    assert math.isfinite(report.total.relative_error)
    assert all(torch.equal(p, v) for p, v in zip((*net.parameters(), decay), values, strict=True))
    assert decay.grad == 3
    assert all(p.grad is not None for p in net.parameters())  # solve_inner's own, from before
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_agrees_to_its_precision():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(30, 3), torch.randn(30, 1)
    decay = torch.tensor(-4.0, requires_grad=True)

    def inner_loss():
        return (net(x) - y).square().mean() + decay.exp() * sum(p.square().sum() for p in net.parameters())

    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = inner_loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    report = verify_hypergradient(lambda: (net(x) - 2 * y).square().mean(), inner_loss, net.parameters(), [decay])
    assert report.total.relative_error < 0.05


def test_values_come_back_after_an_error():
    problem = Ridge()
    before = problem.decay.detach().clone()

    def fails():
        raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError):
        verify_ridge(problem, solve_inner=fails)
    assert torch.equal(problem.decay, before)


def test_large_systems_are_not_solved_densely():
    report = verify_ridge(Ridge(), max_dense=4)
    assert report.dense is None
    assert report.solver is None
    assert "too large" in str(report)


def test_agreement():
    a = torch.tensor([3.0, 4.0])
    assert Agreement.of(a, a) == Agreement(cosine=1.0, relative_error=0.0)
    assert Agreement.of(-a, a) == Agreement(cosine=-1.0, relative_error=2.0)
    assert Agreement.of(0 * a, 0 * a).relative_error == 0
    assert Agreement.of(a, 0 * a).relative_error == math.inf
    assert math.isnan(Agreement.of(0 * a, a).cosine)


def quadratic(w, phi, **options):
    """A problem whose minimum is w = phi."""
    return verify_hypergradient(
        lambda: w.square().sum(), lambda: (w - phi).square().sum(), [w], [phi], solver=EXACT, **options
    )


def leaf(*values, dtype=torch.float64):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verdict_right(dtype):
    report = quadratic(leaf(1, 2, dtype=dtype), leaf(1, 2, dtype=dtype))
    assert report.verdict == "right: less than 0.01% off the finite differences"
    assert report.at_minimum is None
    assert str(report).endswith(report.verdict)


def test_verdict_not_at_a_minimum():
    report = quadratic(leaf(38, 76), leaf(1, 2))
    assert report.verdict.startswith(
        "direction right, size 38 times too large: the inner parameters are not at a minimum"
    )
    torch.testing.assert_close(report.at_minimum, report.finite_differences)
    assert quadratic(leaf(2, -1), leaf(1, 2)).verdict.startswith("direction wrong (cosine 0.00): the inner parameters")
    assert quadratic(leaf(-1, -2), leaf(1, 2)).verdict.startswith("direction opposite (cosine -1.00): the inner param")
    assert quadratic(leaf(0, 0), leaf(1, 2)).verdict.startswith("zero, where the finite differences are not: the inner")


def test_verdict_linear_system_not_solved():
    report = verify_ridge(Ridge(), solver=Identity(1e-4), max_directions=3)
    assert "the linear system is not solved: residual 1, " in report.verdict
    report = verify_ridge(Ridge(), solver=OneStep(1e-4), max_directions=3)
    assert "the linear system is not solved: residual not known, " in report.verdict
    report = verify_ridge(Ridge(), solver=MINRES(steps=1), max_dense=4, max_directions=3)
    assert "the linear system is not solved: residual 0." in report.verdict


def test_verdict_a_path_is_missing():
    w, phi = leaf(1, 2), leaf(1, 2)
    report = verify_hypergradient(
        lambda: w.square().sum() - 3 * phi.square().sum() + 3 * phi.detach().square().sum(),
        lambda: (w - phi).square().sum(),
        [w],
        [phi],
    )
    assert report.verdict.startswith("direction opposite")
    assert "a path from outer_params to a loss may be missing" in report.verdict


def test_verdict_zero():
    w, phi = leaf(1, 2), leaf(1, 2)
    report = verify_hypergradient(lambda: w.sum(), lambda: (w - 1).square().sum() + 0 * phi.sum(), [w], [phi])
    assert report.verdict == "zero, and so are the finite differences: do outer_params play a part in the losses?"


def test_verdict_finite_differences_cannot_be_trusted():
    w, phi = leaf(1, 2), leaf(1, 2)

    def few_steps():
        with torch.no_grad():
            w.sub_(0.1 * (w - phi))

    report = quadratic(w, phi, solve_inner=few_steps)
    assert report.finite_difference_error > 1
    assert "finite differences cannot be trusted: their estimated error is 900%" in report.verdict
    report = quadratic(w, phi, solve_inner=lambda: None)
    assert report.verdict == (
        "finite differences cannot be trusted: they are zero: does solve_inner change inner_params?"
    )


def test_the_estimated_error_of_the_finite_differences_is_that_of_an_inner_problem_half_solved():
    problem, steps = Ridge(), 3

    def gradient_steps():
        for _ in range(steps):
            (grad,) = torch.autograd.grad(problem.inner_loss(), problem.w)
            with torch.no_grad():
                problem.w.sub_(grad / torch.linalg.eigvalsh(problem.hessian())[-1])

    for steps in (3, 30, 100):  # noqa: B007
        report = verify_ridge(problem, solver=EXACT, solve_inner=gradient_steps, max_directions=3)
        assert report.finite_difference_error == pytest.approx(report.total.relative_error, rel=0.3, abs=1e-7)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


class SavedSquare(torch.autograd.Function):
    """A square whose derivative is saved as a value, without its graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class HalfSavedProduct(torch.autograd.Function):
    """A product whose backward pass has lost the graph of one factor."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(b)
        ctx.a = a.detach().clone()
        return a * b

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], grad * ctx.a


def reversal(w, c, phi):
    return (0.5 * (w - phi) ** 2 + 0.5 * Reverse.apply(w) * c + 0.5 * c**2).sum()


def detached_weight(w, c, phi):
    errors = (torch.stack([w, c]) - phi).square()
    return (torch.sigmoid(-errors.detach()) * errors).sum() + 0.1 * (w**2 + c**2).sum()


def straight_through(w, c, phi):
    return (StraightThrough.apply(w) - phi).square().sum() + (c - phi).square().sum() + w.square().sum()


def saved_square(w, c, phi):
    return (SavedSquare.apply(w) - phi).square().sum() + (c - w).square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [reversal, detached_weight, straight_through, saved_square])
def test_verdict_recorded_second_derivatives_that_are_not_those_of_the_gradient(inner, dtype):
    w, c, phi = leaf([0.8, 0.3], dtype=dtype), leaf([-0.4, 0.7], dtype=dtype), leaf(1.0, dtype=dtype)
    report = verify_hypergradient(lambda: (w + c).sum(), lambda: inner(w, c, phi), [w, c], [phi])
    assert "the recorded second derivatives are " in report.verdict
    assert report.recorded_error > 0.05


def test_verdict_not_symmetric():
    a, b, phi = leaf(0.8, 0.3), leaf(-0.4, 0.7), leaf(1.0)
    inner = lambda: HalfSavedProduct.apply(a, b).sum() + a.square().sum() + (b - phi).square().sum()  # noqa: E731
    report = verify_hypergradient(lambda: (a + b).sum(), inner, [a, b], [phi])
    assert "not symmetric: the inner Hessian differs from its transpose by " in report.verdict
    assert report.symmetry_error == pytest.approx(1 / 3, rel=0.9)
    right = lambda: (a * b).sum() + a.square().sum() + (b - phi).square().sum()  # noqa: E731
    assert verify_hypergradient(lambda: (a + b).sum(), right, [a, b], [phi]).symmetry_error < 1e-12


def test_differences_tell_that_a_reversal_is_not_symmetric():
    w, c, phi = leaf(0.8, 0.3), leaf(-0.4, 0.7), leaf(1.0)
    report = verify_hypergradient(
        lambda: (w + c).sum(),
        lambda: reversal(w, c, phi),
        [w, c],
        [phi],
        curvature="finite-difference",
        solve_inner=lambda: None,
    )
    assert "not symmetric" in report.verdict


def network(activation, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 1)).to(dtype)
    return net, torch.randn(40, 3, dtype=dtype), torch.randn(40, 1, dtype=dtype), leaf(-3.0, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.GELU()], ids=repr)
def test_a_network_away_from_its_kinks_is_not_said_to_be_at_one(activation, dtype):
    net, x, y, decay = network(activation, dtype)
    report = verify_hypergradient(
        lambda: (net(x) - 2 * y).square().mean(),
        lambda: (net(x) - y).square().mean() + decay.exp() * sum(p.square().sum() for p in net.parameters()),
        net.parameters(),
        [decay],
        solve_inner=lambda: None,
    )
    assert (report.held, report.oblique, report.suggested_free) == (0, 0, None)
    assert report.recorded_error < 0.01
    assert report.symmetry_error < 1e-5


def test_verdict_kinks_are_near():
    net, x, y, decay = network(nn.ReLU(), torch.float64)
    inner = lambda: (net(x) - y).square().mean() + decay.exp() * sum(p.square().sum() for p in net.parameters())  # noqa: E731
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=300, line_search_fn="strong_wolfe")  # ends in a fold

    def closure():
        optimizer.zero_grad()
        loss = inner()
        loss.backward()
        return loss

    optimizer.step(closure)
    report = verify_hypergradient(
        lambda: (net(x) - 2 * y).square().mean(), inner, net.parameters(), [decay], solver=Dense()
    )
    assert report.resolved_gradient_norm > 1e-4
    assert report.gradient_change > 3
    assert "so kinks (ReLU, L1) are near" in report.verdict


class Lasso:
    """Least squares with an L1 penalty of learned size, at its exact minimum."""

    def __init__(self, dtype=torch.float64, seed: int = 0, scale: float = 1.0) -> None:
        """scale: of the features, and of the inverse parameters."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x, self.outer_x, self.y, self.outer_y = normal(30, 12), normal(30, 12), normal(30), normal(30)
        self.x, self.outer_x = scale * self.x, scale * self.outer_x
        self.penalty = leaf(-2.0 + math.log(scale), dtype=dtype)
        self.w = torch.zeros(12, dtype=dtype, requires_grad=True)
        self.solve()
        assert 0 < (self.w == 0).sum() < 12

    def inner_loss(self):
        return 0.5 * (self.x @ self.w - self.y).square().mean() + self.penalty.exp() * self.w.abs().sum()

    def outer_loss(self):
        return (self.outer_x @ self.w - self.outer_y).square().mean()

    def solve(self):
        with torch.no_grad():
            step = 30 / torch.linalg.eigvalsh(self.x.T @ self.x)[-1]
            for _ in range(2000):
                z = self.w - step * self.x.T @ (self.x @ self.w - self.y) / 30
                self.w.copy_(z.sign() * (z.abs() - step * self.penalty.exp()).clamp(min=0))

    def verify(self, **options):
        return verify_hypergradient(self.outer_loss, self.inner_loss, [self.w], [self.penalty], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own_solver", [True, False])
def test_verdict_kinks_and_the_way_out(own_solver, dtype):
    problem = Lasso(dtype)
    options = {"solve_inner": problem.solve} if own_solver else {}
    report = problem.verify(**options)
    held = int((problem.w == 0).sum())
    assert f"kinks: {held} of 12 inner entries stay at a kink or a bound" in report.verdict
    (suggested,) = report.suggested_free
    assert torch.equal(suggested, problem.w != 0)
    assert report.total.relative_error > 0.1
    right = problem.verify(free=report.suggested_free, **options)
    assert right.verdict.startswith("right: ")
    assert right.suggested_free is None


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("seed", range(1, 6))
def test_the_support_is_found_whatever_the_scale(seed, scale):
    problem = Lasso(torch.float32 if seed % 2 else torch.float64, seed, scale)
    report = problem.verify(solve_inner=lambda: None)
    assert torch.equal(report.suggested_free[0], problem.w != 0)
    assert report.oblique == 0


def test_verdict_all_entries_are_at_kinks():
    w, penalty, phi = leaf(0, 0), leaf(5.0), leaf(0.3)
    inner = lambda: (w - phi).square().sum() + penalty * w.abs().sum()  # noqa: E731
    report = verify_hypergradient(lambda: (w - 1).square().sum() + phi**2, inner, [w], [phi])
    assert report.finite_differences.item() == pytest.approx(2 * 0.3)
    assert "kinks: all inner entries stay at a kink or a bound: what acts is the direct gradient" in report.verdict


def test_a_group_at_its_tip_and_a_kink_that_an_entry_is_about_to_leave():
    w, phi = leaf([[2.0, 1.0], [0.0, 0.0], [0.0, 0.0]]), leaf(1.0)
    pull = torch.tensor([[3.0, 2.0], [0.5, 0.8], [4.0, 1.0]], dtype=torch.float64)  # the last is stronger than 1
    inner = lambda: 0.5 * (w - pull).square().sum() + phi * w.norm(dim=1).sum()  # noqa: E731
    report = verify_hypergradient(lambda: w.sum(), inner, [w], [phi])
    assert report.suggested_free[0].tolist() == [[True, True], [False, False], [True, True]]
    assert report.verdict.startswith("not finite: kinks: 2 of 6 inner entries")  # the norm of a zero vector


def test_frozen_parameters_have_no_mask():
    problem, frozen = Lasso(), torch.ones(3, dtype=torch.float64)
    report = verify_hypergradient(problem.outer_loss, problem.inner_loss, [frozen, problem.w], [problem.penalty])
    assert report.suggested_free[0] is None
    free = report.suggested_free
    right = verify_hypergradient(
        problem.outer_loss, problem.inner_loss, [frozen, problem.w], [problem.penalty], free=free
    )
    assert right.verdict.startswith("right: ")


def test_bounds_are_found_where_the_inner_solver_stays_against_a_gradient():
    problem, decay = Lasso(), leaf(-1.0)
    inner = lambda: 0.5 * (problem.x @ problem.w - problem.y).square().mean() + decay.exp() * problem.w.square().sum()  # noqa: E731

    def solve():  # w >= 0
        for _ in range(500):
            (grad,) = torch.autograd.grad(inner(), problem.w)
            with torch.no_grad():
                problem.w.sub_(0.2 * grad).clamp_(min=0)

    solve()
    report = verify_hypergradient(problem.outer_loss, inner, [problem.w], [decay], solve_inner=solve)
    assert torch.equal(report.suggested_free[0], problem.w != 0)
    right = verify_hypergradient(
        problem.outer_loss, inner, [problem.w], [decay], solve_inner=solve, free=report.suggested_free
    )
    assert right.verdict.startswith("right: ")
    without = verify_hypergradient(problem.outer_loss, inner, [problem.w], [decay])  # nothing tells of the bounds
    assert "not at a minimum (if that is one within bounds, pass solve_inner or free)" in without.verdict


@pytest.mark.parametrize("feature", [(1.0, 1.0), (1.0, 0.3), (0.1, 2.0)])
def test_verdict_kinks_across_several_entries(feature):
    x = torch.tensor(feature, dtype=torch.float64)
    w, margin = (x / x.square().sum()).requires_grad_(), leaf(1.0)
    inner = lambda: 0.5 * w.square().sum() + 5 * torch.relu(margin - w @ x)  # noqa: E731
    report = verify_hypergradient(lambda: w.sum(), inner, [w], [margin])
    assert (report.held, report.oblique, report.suggested_free) == (0, 2, None)
    assert "kinks: the inner gradient jumps in 2 of 2 entries at once, which no mask describes" in report.verdict


def test_how_far_off_gauss_newton_is():
    torch.manual_seed(0)
    w, phi = leaf(1.0, 0.5), leaf(1.0)

    def inner_loss():
        outputs = torch.stack([w[0].sin(), w[0] * w[1], w[1].exp()])
        return (outputs - torch.tensor([0.2, 1.0, 0.5])).square().sum() + phi * w.square().sum(), outputs

    exact = verify_hypergradient(lambda: w.sum(), lambda: inner_loss()[0], [w], [phi], solve_inner=None)
    with torch.no_grad():
        for _ in range(500):
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(inner_loss()[0], w)
            w.sub_(0.1 * grad)
    exact = verify_hypergradient(lambda: w.sum(), lambda: inner_loss()[0], [w], [phi])
    report = verify_hypergradient(lambda: w.sum(), inner_loss, [w], [phi], curvature="gauss-newton", solver=EXACT)
    assert exact.verdict.startswith("right: ")
    torch.testing.assert_close(report.finite_differences, exact.finite_differences)
    assert report.verdict.endswith("curvature='gauss-newton' is too far from the inner Hessian")


def test_what_is_refused():
    problem = Ridge()
    with pytest.raises(TypeError, match=r"inner_loss must be a function .*, not a Tensor: lambda: \.\.\."):
        verify_hypergradient(problem.outer_loss, problem.inner_loss(), [problem.w], [problem.decay])
    with pytest.raises(TypeError, match=r"inner_loss must be .*, not a list of tensors"):
        verify_hypergradient(problem.outer_loss, [problem.inner_loss()], [problem.w], [problem.decay])
    with pytest.raises(ValueError, match="inner_params must be leaves"):
        verify_hypergradient(problem.outer_loss, problem.inner_loss, [problem.w * 1], [problem.decay])
    with pytest.raises(ValueError, match="outer_params has no parameter with requires_grad=True"):
        verify_hypergradient(problem.outer_loss, problem.inner_loss, [problem.w], [torch.ones(1)])
    with pytest.raises(ValueError, match="inner_params has no parameter with requires_grad=True"):
        verify_hypergradient(problem.outer_loss, problem.inner_loss, [torch.ones(1)], [problem.decay])
    with pytest.raises(TypeError, match="inner_params must be an iterable of tensors, not a Tensor: pass a list"):
        verify_hypergradient(problem.outer_loss, problem.inner_loss, problem.w, [problem.decay])
    with pytest.raises(TypeError, match="outer_params must be an iterable of tensors, not a Tensor: pass a list"):
        verify_hypergradient(problem.outer_loss, problem.inner_loss, [problem.w], problem.decay)
    with pytest.raises(ValueError, match="inner_params is empty"):
        verify_hypergradient(problem.outer_loss, problem.inner_loss, iter(()), [problem.decay])
    with pytest.raises(ValueError, match=r"free\[0\] must be of torch.bool"):
        verify_ridge(problem, free=[problem.w])
    with pytest.raises(ValueError, match="step must be a finite number above 0, not -1"):
        verify_ridge(problem, step=-1)
    with pytest.raises(ValueError, match="max_directions must be an integer of at least 1, not 0"):
        verify_ridge(problem, max_directions=0)
    with pytest.raises(TypeError, match=r"inner_loss must return \(loss, outputs\) for curvature='gauss-newton'"):
        verify_ridge(problem, curvature="gauss-newton")


def test_losses_that_are_not_finite_or_not_the_same_twice():
    problem, numbers = Ridge(), iter(range(10))
    arguments = [[problem.w], [problem.decay]]
    with pytest.raises(ValueError, match="outer_loss is nan at the given parameters"):
        verify_hypergradient(lambda: problem.outer_loss() * math.nan, problem.inner_loss, *arguments)
    with pytest.raises(ValueError, match="inner_loss is not deterministic: two calls at the same parameters gave"):
        verify_hypergradient(problem.outer_loss, lambda: problem.inner_loss() * (1 + next(numbers)), *arguments)
    with pytest.raises(TypeError, match="outer_loss must be a tensor, or a function that returns one, not a float"):
        verify_hypergradient(lambda: 1.0, problem.inner_loss, *arguments)
    dropout = lambda: nn.functional.dropout(problem.w, 0.5).sum()  # noqa: E731  # torch's own numbers are replayed
    assert verify_hypergradient(dropout, problem.inner_loss, *arguments, solver=EXACT).verdict.startswith("right: ")


def test_it_is_public():
    assert auxfast.verify_hypergradient is verify_hypergradient


@pytest.mark.parametrize("name", ["inner_params", "outer_params"])
def test_parameters_given_as_one_tensor(name):
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    params = {"inner_params": [w], "outer_params": [phi], name: torch.ones(3, requires_grad=True)}
    with pytest.raises(TypeError, match=f"{name} must be an iterable of tensors, not a Tensor: pass a list"):
        verify_hypergradient(lambda: w.sum(), lambda: (phi * w * w).sum(), **params)
