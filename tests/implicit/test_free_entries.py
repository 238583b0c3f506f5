"""`free=`: entries at a kink or a bound are held fixed, and the hypergradient is that of the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auxfast import HyperOptimizer, hypergradient
from auxfast.solvers import MINRES, Chebyshev, ConjugateGradient, Dense, Identity, Jacobi, Neumann, Nystrom, SolverState

SOLVERS = [
    Dense(),
    MINRES(steps=200, tol=1e-10),
    ConjugateGradient(steps=200, tol=1e-10),
    MINRES(steps=200, tol=1e-10, preconditioner=Jacobi()),
    MINRES(steps=200, tol=1e-10, preconditioner=Jacobi(probes=100)),
    MINRES(steps=200, tol=1e-10, preconditioner=Nystrom(rank=5)),
    ConjugateGradient(steps=200, tol=1e-10, preconditioner=Jacobi()),
    Nystrom(rank=12),
    Nystrom(rank=10, tol=1e-6),
    Chebyshev(steps=400, tol=1e-8),
    Neumann(steps=5000, tol=1e-8, step_size="auto"),
]


class Held:
    """Least squares in two tensors of 6 entries each, whose example weights and decay are learned; 3 entries are held
    fixed.

    inner = 1/2 sum_i s_i (x_i w - y_i)^2 + 1/2 e^d |w|^2, so that with A = X^T S X + e^d I, restricted to the free
    entries F, and A_FF q = (d outer / d w)_F: d outer / d s_i = -(x_iF q) r_i, d outer / d d = -e^d (w_F q).
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x, self.y, self.target = normal(20, 12), normal(20), normal(12)
        self.matrix, self.vector = normal(2, 3).requires_grad_(), normal(6).requires_grad_()
        self.weights = normal(20).exp().requires_grad_()
        self.decay = torch.tensor(-0.5, dtype=dtype, requires_grad=True)
        self.free = [torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), torch.tensor([0, 1, 1, 0, 1, 1]).bool()]
        self.inner_params, self.outer_params = [self.matrix, self.vector], [self.weights, self.decay]

    def w(self) -> Tensor:
        return torch.cat([self.matrix.flatten(), self.vector])

    def outer_loss(self) -> Tensor:
        return 0.5 * (self.w() - self.target).square().sum()

    def inner_loss(self) -> Tensor:
        fit = self.weights @ (self.x @ self.w() - self.y).square()
        return 0.5 * fit + 0.5 * self.decay.exp() * self.w().square().sum()

    def micro_batches(self):
        def batch(rows: slice):
            def loss() -> Tensor:
                fit = self.weights[rows] @ (self.x[rows] @ self.w() - self.y[rows]).square()
                return fit + 0.5 * self.decay.exp() * self.w().square().sum()

            return loss

        return [batch(slice(0, 10)), batch(slice(10, 20))]

    def with_outputs(self):
        z = self.x @ self.w()
        return 0.5 * self.weights @ (z - self.y).square() + 0.5 * self.decay.exp() * self.w().square().sum(), z

    def exact(self, damping: float = 0.0) -> list[Tensor]:
        """The hypergradient in (weights, decay)."""
        with torch.no_grad():
            free, w = torch.cat([mask.flatten() for mask in self.free]), self.w()
            x, size = self.x[:, free], int(free.sum())
            h = x.T @ (self.weights[:, None] * x) + (self.decay.exp() + damping) * torch.eye(size, dtype=x.dtype)
            q = torch.linalg.solve(h, (w - self.target)[free])
            return [-(x @ q) * (self.x @ w - self.y), -self.decay.exp() * (w[free] @ q)]


def of(problem: Held, **options):
    return hypergradient(
        problem.outer_loss(),
        problem.inner_loss(),
        problem.inner_params,
        problem.outer_params,
        **{"free": problem.free, **options},
    )


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_every_solver_gives_the_hypergradient_of_the_free_entries(solver):
    problem = Held()
    result = of(problem, solver=solver)
    assert result.stats.residual < 1e-6
    torch.testing.assert_close(list(result.grads), problem.exact(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [Dense(damping=0.7), MINRES(damping=0.7, tol=1e-10), Nystrom(rank=12, damping=0.7)])
def test_damping_acts_on_the_free_entries(solver):
    problem = Held()
    result = of(problem, solver=solver)
    torch.testing.assert_close(list(result.grads), problem.exact(0.7), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("curvature", ["hessian", "micro-batches", "gauss-newton", "finite-difference"])
def test_every_curvature_gives_the_hypergradient_of_the_free_entries(curvature):
    problem = Held()
    inner, name = problem.inner_loss, curvature
    if curvature == "micro-batches":
        inner, name = problem.micro_batches(), "hessian"
    elif curvature == "gauss-newton":
        inner = problem.with_outputs
    for solver in (Dense(), Nystrom(rank=12)):  # these take batched products
        result = hypergradient(
            problem.outer_loss,
            inner,
            problem.inner_params,
            problem.outer_params,
            free=problem.free,
            curvature=name,
            solver=solver,
        )
        torch.testing.assert_close(list(result.grads), problem.exact(), rtol=1e-5, atol=1e-5)


def test_the_held_entries_are_as_if_they_were_constants():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()
    x, y, phi = torch.randn(20, 4).double(), torch.randn(20, 1).double(), torch.zeros((), requires_grad=True)
    inner = lambda: (net(x) - y).square().mean() + phi.exp() * sum(p.square().sum() for p in net.parameters())  # noqa: E731
    outer = lambda: (net(2 * x) - y).square().mean()  # noqa: E731
    without = hypergradient(outer(), inner(), net[2].parameters(), [phi], solver=Dense())
    free = [torch.zeros_like(p, dtype=torch.bool) for p in net[0].parameters()] + [None, None]
    held = hypergradient(outer(), inner(), net.parameters(), [phi], free=free, solver=Dense())
    torch.testing.assert_close(held.grads, without.grads)


def test_the_support_of_a_lasso():
    curvatures, c = torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([3.0, 1.0])
    penalty = torch.tensor(1.0, requires_grad=True)
    w = torch.tensor([2.0, 0.0], requires_grad=True)  # the exact minimum
    inner = 0.5 * w @ curvatures @ w - c @ w + penalty * w.abs().sum()
    outer = 0.5 * (w - torch.tensor([0.0, 1.0])).square().sum()
    assert hypergradient(outer, inner, [w], [penalty], free=[w != 0]).grads[0].item() == pytest.approx(-2)


def test_a_group_of_a_group_lasso_at_zero():
    w = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    penalty = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def gradient(norms: Tensor, free) -> Tensor:
        fit = (w - torch.tensor([[2.0, 1.0], [0.1, 0.1]])).square().sum() + (w[0] * w[1]).sum()
        return hypergradient(w.square().sum(), fit + penalty * norms, [w], [penalty], free=free, solver=Dense()).grads

    mask = [torch.tensor([[True, True], [False, False]])]
    torch.testing.assert_close(gradient(w.norm(dim=1).sum(), mask), gradient(w[0].norm(), mask))


def test_what_is_not_finite_in_a_held_entry_does_no_harm():
    w, phi = torch.tensor([0.5, 0.0], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    inner = (w - phi).square().sum() + w[1].sqrt()  # its derivatives at 0 are infinite
    outer = w.square().sum() + w[1].sqrt()
    result = hypergradient(outer, inner, [w], [phi], free=[w != 0], solver=Dense())
    assert result.grads[0].item() == pytest.approx(1)


def test_a_changing_support_and_a_solver_with_a_state():
    problem, state = Held(), SolverState()
    solver = MINRES(tol=1e-10, steps=200, warm_start=True, preconditioner=Nystrom(rank=5, refresh=3))
    for shift in range(4):
        problem.free = [mask.roll(shift) for mask in problem.free]
        result = of(problem, solver=solver, state=state)
        torch.testing.assert_close(list(result.grads), problem.exact(), rtol=1e-6, atol=1e-6)


def test_all_free_is_the_same_as_no_mask_and_frozen_parameters_need_none():
    problem = Held()
    frozen = torch.ones(3, dtype=torch.float64)
    plain = of(problem, free=None, solver=Dense())
    for free in ([None, None], [torch.ones_like(w, dtype=torch.bool) for w in problem.inner_params]):
        masked = of(problem, free=free, solver=Dense())
        torch.testing.assert_close(masked.grads, plain.grads)
    result = hypergradient(
        problem.outer_loss(),
        problem.inner_loss(),
        [frozen, *problem.inner_params],
        problem.outer_params,
        free=iter([torch.zeros(3, dtype=torch.bool), *problem.free]),
        solver=Dense(),
    )
    torch.testing.assert_close(list(result.grads), problem.exact())


def test_the_outer_optimizer_takes_it():
    problem = Held()
    expected = problem.decay.item() - 0.1 * problem.exact()[1].item()
    outer = HyperOptimizer(torch.optim.SGD([problem.decay], lr=0.1), solver=Dense())
    outer.step(problem.outer_loss(), problem.inner_loss(), problem.inner_params, free=problem.free)
    assert problem.decay.item() == pytest.approx(expected)


def test_identity_is_the_gradient_of_the_free_entries():
    problem = Held()
    with torch.no_grad():
        free, w = torch.cat([mask.flatten() for mask in problem.free]), problem.w()
        q = (w - problem.target) * free
        expected = -(problem.x @ q) * (problem.x @ w - problem.y)
    result = of(problem, solver=Identity(1.0), warn=False)
    torch.testing.assert_close(result.grads[0], expected)


@pytest.mark.parametrize(
    ("free", "error", "message"),
    [
        (
            torch.ones(6).bool(),
            TypeError,
            "free must be a list, one mask or None for each of inner_params, not a Tensor",
        ),
        (True, TypeError, "free must be a list, one mask or None for each of inner_params, not a bool"),
        ([None], ValueError, "free must have one mask or None for each of the 2 inner_params, not 1"),
        ([None, [True] * 6], TypeError, r"free\[1\] must be a tensor of torch.bool or None, not a list"),
        (
            [None, torch.ones(6)],
            ValueError,
            r"free\[1\] must be of torch.bool, not torch.float32: compare, as in w != 0",
        ),
        ([None, torch.ones(5).bool()], ValueError, r"free\[1\] must have the shape of inner_params\[1\], \(6,\), not"),
        (
            [None, torch.ones(6, device="meta").bool()],
            ValueError,
            r"free\[1\] must be on the device of inner_params\[1\]",
        ),
        ([torch.zeros(2, 3).bool(), torch.zeros(6).bool()], ValueError, "free holds no free entry"),
    ],
)
def test_masks_that_are_refused(free, error, message):
    problem = Held()
    with pytest.raises(error, match=message):
        of(problem, free=free)


@pytest.mark.parametrize("function", [torch.abs, torch.relu])
@pytest.mark.parametrize("form", ["tensor", "function", "micro-batches"])
def test_zeros_at_a_kink_are_told_unless_they_are_held(function, form):
    w, v = torch.tensor([2.0, 0.0], requires_grad=True), torch.zeros(2, requires_grad=True)
    lam = torch.tensor(1.0, requires_grad=True)

    def inner() -> Tensor:
        return 0.5 * (w - 3).square().sum() + lam * function(w).sum() + (v - w).square().sum()

    given = {"tensor": inner(), "function": inner, "micro-batches": [inner, inner]}[form]
    outer = w.sum() if form == "tensor" else lambda: w.sum()
    with pytest.warns(RuntimeWarning, match=r"exactly 0, where abs\(\) or relu\(\).*free="):
        hypergradient(outer, given, [w, v], [lam], retain_graph=True)
    result = hypergradient(outer, given, [w, v], [lam], free=[w != 0, None], retain_graph=True)
    torch.testing.assert_close(result.grads[0], torch.tensor(-1.0), rtol=1e-3, atol=1e-3)
