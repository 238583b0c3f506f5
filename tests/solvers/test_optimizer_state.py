from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import auxfast
from auxfast.solvers import MINRES, Chebyshev, ConjugateGradient, Dense, FromOptimizer, SolverState
from auxfast.solvers.linear_system import LinearSystem

from .systems import SHAPES, SIZE, cut, flat, gaussian, with_eigenvalues

DIAGONAL = {
    "Adam": {"lr": 1e-2},
    "AdamW": {"lr": 1e-2, "amsgrad": True},
    "NAdam": {"lr": 1e-2},
    "RAdam": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-2, "centered": True},
    "Adagrad": {"lr": 1e-2},
    "Adadelta": {},
}


@dataclass
class Quadratic:
    """The operator of the loss `w A w / 2 - b w`, with its parameters, as a curvature knows them."""

    matrix: Tensor
    rhs: list[Tensor]
    params: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = [torch.zeros_like(b).requires_grad_() for b in self.rhs]

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return cut(self.matrix @ flat(vectors))

    def loss(self) -> Tensor:
        w = flat(self.params)
        return w @ self.matrix @ w / 2 - w @ flat(self.rhs)

    def train(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)


@dataclass
class KnowingItsParameters:
    params: list[Tensor]
    matrix: Tensor

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        product = self.matrix @ flat(vectors)
        parts = product.split([v.numel() for v in vectors])
        return [part.reshape(v.shape) for part, v in zip(parts, vectors, strict=True)]


def badly_scaled(condition: float = 3.0) -> Quadratic:
    """Eigenvalues from 1 to `condition` in coordinates whose scales spread over two decades."""
    scale = torch.logspace(-1, 1, SIZE, dtype=torch.float64)
    matrix = scale[:, None] * with_eigenvalues(torch.linspace(1, condition, SIZE, dtype=torch.float64)) * scale
    return Quadratic(matrix, cut(gaussian(SIZE)))


def system(quadratic: Quadratic, damping: float = 0.0) -> LinearSystem:
    return LinearSystem(quadratic, quadratic.rhs, damping, batched=False)


def matrix_of(preconditioner: FromOptimizer, linear: LinearSystem) -> Tensor:
    apply = preconditioner.build(linear)
    assert apply is not None
    return apply(torch.eye(SIZE, dtype=linear.rhs.dtype))


def trained(name: str, steps: int = 50, **settings: object) -> tuple[Quadratic, torch.optim.Optimizer]:
    quadratic = badly_scaled()
    optimizer = getattr(torch.optim, name)(quadratic.params, **{**DIAGONAL.get(name, {}), **settings})
    quadratic.train(optimizer, steps)
    return quadratic, optimizer


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("name", [*DIAGONAL, "LBFGS"])
def test_positive_definite_and_a_diagonal_bounded_by_the_damping(name, damping):
    quadratic, optimizer = trained(name, 2 if name == "LBFGS" else 50)
    inverse = matrix_of(FromOptimizer(optimizer), system(quadratic, damping))
    torch.testing.assert_close(inverse, inverse.T)
    eigenvalues = torch.linalg.eigvalsh(inverse)
    assert eigenvalues[0] > 0
    if damping and name != "LBFGS":
        assert eigenvalues[-1] <= (1 + 1e-9) / damping


@pytest.mark.parametrize("solver", [ConjugateGradient, MINRES, Chebyshev])
@pytest.mark.parametrize("name", [*DIAGONAL, "LBFGS"])
def test_the_solution_is_that_without_it(name, solver):
    quadratic, optimizer = trained(name, 2 if name == "LBFGS" else 50)
    settings = {"steps": 500, "tol": 1e-9, "damping": 10.0}
    x, stats = solver(**settings, preconditioner=FromOptimizer(optimizer)).solve(quadratic, quadratic.rhs)
    exact, _ = Dense(damping=10.0).solve(quadratic, quadratic.rhs)
    assert stats.converged
    torch.testing.assert_close(x, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "LBFGS"])
def test_it_saves_products_where_inputs_have_different_units(name):
    torch.manual_seed(0)
    x = torch.randn(400, 100, dtype=torch.float64) * torch.logspace(-1.5, 0.5, 100)
    y = torch.randn(400, dtype=torch.float64)
    w = torch.zeros(100, dtype=torch.float64, requires_grad=True)
    phi = torch.zeros(1, requires_grad=True)
    optimizer = getattr(torch.optim, name)([w], lr=0.01 if name != "LBFGS" else 0.1)

    def inner_loss(rows=slice(None)):
        return (x[rows] @ w - y[rows]).square().mean() + 1e-4 * phi.exp().sum() * w.square().sum()

    def closure():
        optimizer.zero_grad()
        loss = inner_loss() if name == "LBFGS" else inner_loss(torch.randint(400, (20,)))
        loss.backward()
        return loss

    for _ in range(500 if name != "LBFGS" else 2):
        optimizer.step(closure)
    plain, helped = (
        auxfast.hypergradient(w.sum(), inner_loss(), [w], [phi], solver=ConjugateGradient(300, 1e-4, preconditioner=p))
        for p in (None, FromOptimizer(optimizer))
    )
    assert plain.stats.converged
    assert helped.stats.converged
    assert helped.stats.matvecs < 0.8 * plain.stats.matvecs
    torch.testing.assert_close(helped.grads, plain.grads, rtol=1e-3, atol=0)


def test_the_diagonal_is_fitted_where_squares_of_gradients_are_its_fourth_powers():
    wanted = torch.logspace(-1, 1, SIZE, dtype=torch.float64)
    quadratic = Quadratic(torch.diag(wanted), cut(gaussian(SIZE)))
    optimizer = torch.optim.Adagrad(quadratic.params)
    for w, part in zip(quadratic.params, cut(wanted), strict=True):
        optimizer.state[w]["sum"] = 9 * part**4
    inverse = matrix_of(FromOptimizer(optimizer), system(quadratic, 0.25))
    torch.testing.assert_close(inverse, torch.diag(1 / (wanted + 0.25)))


def test_adams_bias_towards_zero_is_no_part_of_it():
    """The second parameter has had a single step, with the gradient that the others have had in all."""
    params = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    optimizer = torch.optim.Adam(params)
    for step in range(100):
        optimizer.zero_grad()
        (params[0].sum() + params[1].sum() * (step == 99) + 9 * params[2].sum()).backward()
        if step < 99:
            params[1].grad = None
        optimizer.step()
    matvec = KnowingItsParameters(params, torch.diag(torch.tensor([2.0, 2.0, 6.0])))
    diagonal = FromOptimizer(optimizer).build(LinearSystem(matvec, [torch.ones(1)] * 3, 0.0, batched=False))
    assert diagonal is not None
    torch.testing.assert_close(diagonal(torch.ones(1, 3)), torch.tensor([[1 / 2, 1 / 2, 1 / 6]]))


def test_entries_without_any_gradient_stay_bounded():
    quadratic, optimizer = trained("Adam")
    optimizer.state[quadratic.params[0]]["exp_avg_sq"].zero_()
    inverse = matrix_of(FromOptimizer(optimizer), system(quadratic))
    assert inverse.isfinite().all()
    assert torch.linalg.eigvalsh(inverse)[0] > 0


def test_no_relation_between_the_two_means_no_preconditioner():
    quadratic, optimizer = trained("Adam")
    quadratic.matrix = -quadratic.matrix
    assert FromOptimizer(optimizer).build(system(quadratic)) is None
    quadratic.matrix = quadratic.matrix * torch.nan
    assert FromOptimizer(optimizer).build(system(quadratic)) is None


def test_pairs_of_as_many_steps_as_parameters_are_the_inverse():
    """Exact line searches on a quadratic make LBFGS conjugate gradients, whose pairs span the whole space."""
    matrix = with_eigenvalues(torch.linspace(1, 3, SIZE, dtype=torch.float64))
    quadratic = Quadratic(matrix, cut(gaussian(SIZE)))
    optimizer = torch.optim.LBFGS(quadratic.params)
    steps = torch.linalg.eigh(matrix)[1].T
    state = optimizer.state[quadratic.params[0]]
    state["old_stps"], state["old_dirs"] = list(steps), list(steps @ matrix)
    linear = system(quadratic, 0.5)
    torch.testing.assert_close(
        matrix_of(FromOptimizer(optimizer), linear), torch.linalg.inv(matrix + 0.5 * torch.eye(SIZE))
    )
    assert linear.matvecs == 0


def test_pairs_serve_some_of_the_parameters_in_any_order():
    quadratic, optimizer = trained("LBFGS", 2)
    whole = matrix_of(FromOptimizer(optimizer), system(quadratic))

    matvec = KnowingItsParameters([quadratic.params[4], quadratic.params[0]], torch.eye(17))
    some = FromOptimizer(optimizer).build(
        LinearSystem(matvec, [quadratic.rhs[4], quadratic.rhs[0]], 0.0, batched=False)
    )
    assert some is not None
    index = torch.cat([torch.arange(SIZE - 5, SIZE), torch.arange(torch.Size(SHAPES[0]).numel())])
    torch.testing.assert_close(some(torch.eye(len(index), dtype=torch.float64)), whole[index][:, index])


@pytest.mark.parametrize("name", ["Adam", "LBFGS"])
def test_the_state_is_read_anew_and_kept_nowhere(name):
    quadratic, optimizer = trained(name, 2)
    solver, state = ConjugateGradient(tol=1e-8, preconditioner=FromOptimizer(optimizer)), SolverState()
    _, first = solver.solve(quadratic, quadratic.rhs, state=state)
    assert state.preconditioner is None
    quadratic.train(optimizer, 3)
    _, again = solver.solve(quadratic, quadratic.rhs, state=state)
    _, alone = solver.solve(quadratic, quadratic.rhs)
    assert (again.matvecs, again.residual) == (alone.matvecs, alone.residual)
    assert first.converged
    pickle.dumps(copy.deepcopy(state))


def test_several_right_hand_sides_and_free_entries_in_a_hypergradient():
    torch.manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64) * torch.logspace(-1, 1, 6)
    y = x @ torch.ones(6, dtype=torch.float64)
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    phi = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.1)

    def inner_loss():
        return (x @ w - y).square().mean() + (phi.exp() * w.square()).sum()

    def outer_loss():
        return (w - 1).square().sum()

    for _ in range(2000):
        optimizer.zero_grad()
        inner_loss().backward()
        optimizer.step()
    for free in (None, [torch.tensor([True] * 5 + [False])]):
        for curvature in ("hessian", "finite-difference"):
            found, exact = (
                auxfast.hypergradient(
                    outer_loss, inner_loss, [w], [phi], solver=solver, free=free, curvature=curvature, warn=False
                )
                for solver in (MINRES(tol=1e-6, preconditioner=FromOptimizer(optimizer)), Dense())
            )
            torch.testing.assert_close(found.grads, exact.grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["Adam", "LBFGS"])
def test_low_precision_and_several_right_hand_sides(name):
    quadratic, optimizer = trained(name, 2)
    for w in quadratic.params:
        w.data = w.data.bfloat16()
    linear = LinearSystem(quadratic, [torch.stack([b, -b]).bfloat16() for b in quadratic.rhs], 0.5, batched=True)
    quadratic.matrix = quadratic.matrix.bfloat16()
    apply = FromOptimizer(optimizer).build(linear)
    assert apply is not None
    rows = apply(linear.rhs)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows[0], -rows[1])
    torch.testing.assert_close(rows[:1], apply(linear.rhs[:1]))


def test_what_serves_no_purpose_is_refused():
    w = torch.zeros(3, requires_grad=True)
    with pytest.raises(TypeError, match=r"must be the torch\.optim\.Optimizer of the inner parameters"):
        FromOptimizer([w])
    with pytest.raises(TypeError, match=r"not SGD: take Jacobi\(\)"):
        FromOptimizer(torch.optim.SGD([w]))
    assert repr(FromOptimizer(torch.optim.Adam([w]))) == "FromOptimizer(Adam)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Adam", "the Adam has no state yet for a parameter of shape"),
        ("LBFGS", "the LBFGS has no pairs yet: let it take a step"),
    ],
)
def test_an_optimizer_without_a_step_is_told_to_take_one(name, message):
    quadratic = badly_scaled()
    optimizer = getattr(torch.optim, name)(quadratic.params)
    with pytest.raises(ValueError, match=message):
        MINRES(preconditioner=FromOptimizer(optimizer)).solve(quadratic, quadratic.rhs)


def test_a_state_that_tells_nothing_is_named():
    quadratic, optimizer = trained("Rprop")
    with pytest.raises(ValueError, match=r"the state of Rprop \(step, prev, step_size\) tells nothing of curvature"):
        FromOptimizer(optimizer).build(system(quadratic))


@pytest.mark.parametrize("name", ["Adam", "LBFGS"])
def test_another_optimizer_is_noticed(name):
    _, optimizer = trained(name, 2)
    with pytest.raises(ValueError, match=r"does not hold inner parameter 0 of the system, of shape \(4, 3\)"):
        FromOptimizer(optimizer).build(system(badly_scaled()))


def test_a_matvec_that_knows_no_parameters_is_refused():
    quadratic, optimizer = trained("Adam")
    with pytest.raises(TypeError, match="matvec must have `params`"):
        MINRES(preconditioner=FromOptimizer(optimizer)).solve(quadratic.__call__, quadratic.rhs)
