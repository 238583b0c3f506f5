"""The hypergradient against closed forms, dense linear algebra and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from auxfast import _native
from auxfast.implicit import hypergradient
from auxfast.solvers import Identity, Neumann

from .problems import Dense, Ridge, flat


def step_size(hessian: Tensor) -> float:
    return 1 / float(torch.linalg.eigvalsh(hessian)[-1])


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
def test_ridge_closed_form(native):
    problem = Ridge()
    solver = Neumann(5000, step_size(problem.hessian()), tol=1e-13)
    args = (problem.outer_loss(), problem.inner_loss(), [problem.w], [problem.decay, problem.weights])
    if native:
        result = hypergradient(*args, solver=solver)
    else:
        with _native.reference_kernels():
            result = hypergradient(*args, solver=solver)
    for grad, exact in zip(result.grads, problem.exact(), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-9, atol=1e-11)
    assert result.stats.converged
    assert problem.w.grad is None
    assert problem.decay.grad is None
    assert not any(grad.requires_grad for grad in result.grads)


def test_truncated_series_is_the_papers_algorithm_with_the_step_size():
    problem, steps, a = Ridge(), 3, 0.02
    hessian, w = problem.hessian(), problem.w.detach()
    b = problem.outer_x.T @ (problem.outer_x @ w - problem.outer_y)
    v = p = b
    for _ in range(steps):
        v = v - a * (hessian @ v)
        p = p + v
    wanted = -a * p * problem.decay.detach().exp() * w + 2 * problem.decay.detach()
    args = (problem.outer_loss(), problem.inner_loss(), [problem.w], [problem.decay])
    result = hypergradient(*args, solver=Neumann(steps, a))
    torch.testing.assert_close(result.grads[0], wanted, rtol=1e-12, atol=1e-12)
    residual = ((b - a * (hessian @ p)).norm() / b.norm()).item()
    assert result.stats.residual == pytest.approx(residual, rel=1e-12)
    assert (result.stats.matvecs, result.stats.step_size) == (steps + 1, a)


def test_identity():
    problem = Ridge()
    args = (problem.outer_loss(), problem.inner_loss(), [problem.w], [problem.decay])
    result = hypergradient(*args, solver=Identity(0.5))
    w, d = problem.w.detach(), problem.decay.detach()
    b = problem.outer_x.T @ (problem.outer_x @ w - problem.outer_y)
    torch.testing.assert_close(result.grads[0], -0.5 * b * d.exp() * w + 2 * d)
    true_residual = (b - 0.5 * problem.hessian() @ b).norm() / b.norm()
    assert result.stats.residual == pytest.approx(true_residual.item(), rel=1e-12)


class MLP:
    """Two layers under a learned loss: per-class weights, and a weight decay for each tensor."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.x, self.y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
        self.outer_x, self.outer_y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
        self.inner_params = list(self.net.parameters())
        self.class_weights = nn.Parameter(torch.tensor([0.7, 1.3]).double())
        self.log_decay = nn.Parameter(torch.zeros(4))  # float32, the inner ones float64
        self.outer_params = [self.class_weights, self.log_decay]

    def inner_from(self, params: list[Tensor], class_weights: Tensor, log_decay: Tensor) -> Tensor:
        w1, b1, w2, b2 = params
        error = (torch.tanh(self.x @ w1.T + b1) @ w2.T + b2 - self.y).square().mean(dim=0)
        decay = sum(d.exp().double() * p.square().sum() for d, p in zip(log_decay, params, strict=True))
        return (class_weights * error).sum() + decay

    def outer_loss(self) -> Tensor:
        return (self.net(self.outer_x) - self.outer_y).square().mean()

    def inner_loss(self) -> Tensor:
        return self.inner_from(self.inner_params, *self.outer_params)


def test_mlp_against_dense_derivatives():
    problem = MLP()
    result = hypergradient(
        problem.outer_loss(),
        problem.inner_loss(),
        problem.net.parameters(),
        problem.outer_params,
        solver=Dense(),
    )
    shapes = [p.shape for p in problem.inner_params]
    sizes = [p.numel() for p in problem.inner_params]

    def inner_flat(w: Tensor, class_weights: Tensor, log_decay: Tensor) -> Tensor:
        params = [t.view(s) for t, s in zip(w.split(sizes), shapes, strict=True)]
        return problem.inner_from(params, class_weights, log_decay)

    w = flat([p.detach() for p in problem.inner_params])
    everything = torch.autograd.functional.hessian(
        inner_flat, (w, problem.class_weights.detach(), problem.log_decay.detach())
    )
    b = flat(torch.autograd.grad(problem.outer_loss(), problem.inner_params))
    q = torch.linalg.solve(everything[0][0], b)
    torch.testing.assert_close(result.grads[0], -q @ everything[0][1], rtol=1e-9, atol=1e-11)
    assert result.grads[1].dtype == torch.float32
    torch.testing.assert_close(result.grads[1], -(q @ everything[0][2].double()).float())

    iterative = hypergradient(
        problem.outer_loss(),
        problem.inner_loss(),
        problem.inner_params,
        problem.outer_params,
        solver=Neumann(2000, step_size(everything[0][0]), tol=1e-12),
    )
    torch.testing.assert_close(iterative.grads, result.grads, rtol=1e-8, atol=1e-10)


def test_against_finite_differences_of_the_solved_inner_problem():
    """Logistic regression with a penalty per weight, solved by Newton's method at every shifted penalty."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    y = (torch.rand(40, generator=generator) > 0.5).double()
    x_outer = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    penalty = torch.tensor([-1.0, -0.5, 0.0, 0.5], dtype=torch.float64, requires_grad=True)

    def inner(w: Tensor, phi: Tensor) -> Tensor:
        fit = nn.functional.binary_cross_entropy_with_logits(x @ w, y)
        return fit + 0.5 * (phi.exp() * w.square()).sum()

    def outer(w: Tensor, phi: Tensor) -> Tensor:
        return torch.tanh(x_outer @ w).square().mean() + 0.1 * phi.sin().sum()

    def solve(phi: Tensor) -> Tensor:
        w = torch.zeros(4, dtype=torch.float64)
        for _ in range(30):
            gradient, hessian = (
                torch.autograd.functional.jacobian(lambda w: inner(w, phi), w),
                torch.autograd.functional.hessian(lambda w: inner(w, phi), w),
            )
            w = w - torch.linalg.solve(hessian, gradient)
        return w

    w = solve(penalty.detach()).requires_grad_()
    result = hypergradient(outer(w, penalty), inner(w, penalty), [w], [penalty], solver=Neumann(3000, 0.5, tol=1e-13))
    differences = []
    for unit in torch.eye(4, dtype=torch.float64) * 1e-5:
        up, down = penalty.detach() + unit, penalty.detach() - unit
        differences.append((outer(solve(up), up) - outer(solve(down), down)) / 2e-5)
    torch.testing.assert_close(result.grads[0], torch.stack(differences), rtol=1e-7, atol=1e-9)


def test_parameters_that_play_no_part_get_zeros():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    phi = torch.tensor(0.5, requires_grad=True)
    unused = torch.ones(2, 3, requires_grad=True)
    frozen = torch.ones(3, dtype=torch.float64)
    only_outer = torch.tensor([2.0], requires_grad=True)
    additive = torch.tensor(1.0, requires_grad=True)  # in the inner loss, but in no gradient of it
    result = hypergradient(
        w.sum() * frozen.sum() + only_outer.square().sum(),
        0.5 * (w.square().sum()) * phi.exp() + additive,
        [w],
        [unused, phi, frozen, only_outer, additive],
        solver=Neumann(400, 0.5),
    )
    wanted = [
        torch.zeros(2, 3),
        torch.tensor(-9.0),
        torch.zeros(3).double(),
        torch.tensor([4.0]),
        torch.tensor(0.0),
    ]
    torch.testing.assert_close(list(result.grads), wanted)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_scalars_may_play_no_part_in_a_loss(curvature):
    """One of the inner ones in the outer loss, and one of the outputs in the inner loss. H is the identity."""
    w, no_part, phi = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.0, 2.0, 0.5))

    def inner() -> tuple[Tensor, list[Tensor]]:
        outputs = [w + 0, no_part + 0, w.exp()]
        return 0.5 * (outputs[0] - phi).square() + 0.5 * (outputs[1] - phi).square(), outputs[:2]

    inner_loss = inner if curvature == "gauss-newton" else lambda: inner()[0]
    result = hypergradient(w.square(), inner_loss, [w, no_part], [phi], solver=Identity(), curvature=curvature)
    torch.testing.assert_close(result.grads[0], torch.tensor(2.0, dtype=torch.float64))


def test_inner_parameters_that_do_not_couple_are_left_out():
    w = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    unused = torch.ones(4, dtype=torch.float64, requires_grad=True)  # by the inner loss; the outer uses it
    linear = torch.ones(2, dtype=torch.float64, requires_grad=True)  # its gradient is constant
    frozen = torch.ones(3, dtype=torch.float64)
    not_in_outer = torch.ones(2, dtype=torch.float64, requires_grad=True)
    phi = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inner = 0.5 * (w - phi).square().sum() + linear.sum() + (frozen * w).sum()
    inner = inner + 0.5 * (not_in_outer - w).square().sum()
    outer = 5 * w.sum() + (unused * unused).sum() + 7 * linear.sum()
    result = hypergradient(
        outer, inner, [frozen, unused, linear, w, not_in_outer], [phi], solver=Neumann(2000, 0.3, tol=1e-13)
    )
    torch.testing.assert_close(result.grads[0], torch.tensor(5.0, dtype=torch.float64))
    assert result.stats.converged


def test_nothing_to_solve_where_the_inner_loss_is_linear():
    w, phi = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    result = hypergradient(w.sum() * phi, w.sum() + phi, [w], [phi], solver=Neumann(3, 1.0), warn=False)
    assert result.grads[0] == 3
    assert (result.stats.matvecs, result.stats.residual, result.stats.stop_reason) == (0, 0.0, "trivial")


def test_a_stationary_outer_loss_has_a_zero_implicit_term():
    w, phi = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    outer, inner = (w - 1).square().sum() + phi, (phi * w.square()).sum()
    result = hypergradient(outer, inner, [w], [phi], solver=Neumann(3, 0.1))
    assert result.grads[0] == 1
    assert result.stats.stop_reason == "trivial"


def test_a_parameter_that_is_linear_in_the_inner_gradient():
    """inner = phi w + w^2 / 2 has w* = -phi, so outer = w*^2 / 2 has the gradient phi."""
    w, phi = torch.tensor(-3.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    result = hypergradient(0.5 * w**2, phi * w + 0.5 * w**2, [w], [phi], solver=Neumann(1, 1.0))
    assert result.grads[0] == 3


def test_generators():
    problem = MLP()
    by_list = hypergradient(
        problem.outer_loss(), problem.inner_loss(), problem.inner_params, problem.outer_params, solver=Dense()
    )
    by_generator = hypergradient(
        problem.outer_loss(),
        problem.inner_loss(),
        problem.net.parameters(),
        (phi for phi in problem.outer_params),
        solver=Dense(),
    )
    assert len(by_generator.grads) == 2
    assert all(torch.equal(a, b) for a, b in zip(by_list.grads, by_generator.grads, strict=True))


def test_parameters_need_not_be_leaves():
    problem = Ridge()
    exact = problem.exact()[0]
    problem.w = problem.w.clone()
    problem.decay = problem.decay * 1.0
    result = hypergradient(problem.outer_loss(), problem.inner_loss(), [problem.w], [problem.decay], solver=Dense())
    torch.testing.assert_close(result.grads[0], exact)


def test_losses_may_share_a_subgraph():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    phi = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def losses(shared: bool) -> tuple[Tensor, Tensor]:
        inner_out, outer_out = (x @ w).exp(), (x @ w).exp()
        inner = ((inner_out if not shared else outer_out) * phi.sigmoid()).sum() + w.square().sum()
        return outer_out.square().sum(), inner

    apart = hypergradient(*losses(False), [w], [phi], solver=Dense())
    together = hypergradient(*losses(True), [w], [phi], solver=Dense())
    torch.testing.assert_close(together.grads, apart.grads)
    same = (w.square() * phi.exp().sum()).sum()  # one and the same loss
    assert hypergradient(same, same, [w], [phi], solver=Dense()).grads[0].isfinite().all()


def test_graphs_are_spent_unless_retained():
    problem = Ridge()
    args = (problem.outer_loss(), problem.inner_loss(), [problem.w], [problem.decay])
    kept = hypergradient(*args, solver=Dense(), retain_graph=True)
    again = hypergradient(*args, solver=Dense())
    assert torch.equal(kept.grads[0], again.grads[0])
    with pytest.raises(RuntimeError, match=r"graph of outer_loss was freed before.*retain_graph=True"):
        hypergradient(*args, solver=Dense())


def test_works_where_gradients_are_off():
    problem = Ridge()
    outer, inner = problem.outer_loss(), problem.inner_loss()
    with torch.no_grad():
        result = hypergradient(outer, inner, [problem.w], [problem.decay], solver=Neumann(9, 1e-2))
    again = hypergradient(
        problem.outer_loss(), problem.inner_loss(), [problem.w], [problem.decay], solver=Neumann(9, 1e-2)
    )
    assert torch.equal(result.grads[0], again.grads[0])


def test_gradients_do_not_share_memory():
    w = torch.ones(3, requires_grad=True)
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    outer, inner = (w + a + b).sum(), (w.square()).sum()
    grads = hypergradient(outer, inner, [w], [a, b], solver=Identity(), warn=False).grads
    assert grads[0].data_ptr() != grads[1].data_ptr()


def test_same_bits_for_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    start, curvature = torch.randn(150_001, generator=generator), torch.rand(150_001, generator=generator)
    threads, grads = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            w, phi = start.clone().requires_grad_(), curvature.clone().requires_grad_()
            outer, inner = w.sin().sum(), (phi * w.square() + 0.1 * w.cos()).sum()
            grads.append(hypergradient(outer, inner, [w], [phi], solver=Neumann(4, 0.3)).grads[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_loss_of_one_element_may_have_any_shape(shape):
    problem = Ridge()
    outer, inner = problem.outer_loss().reshape(shape), problem.inner_loss().reshape(shape)
    result = hypergradient(outer, inner, [problem.w], [problem.decay], solver=Dense())
    torch.testing.assert_close(result.grads[0], problem.exact()[0])
