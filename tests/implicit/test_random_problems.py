"""Random inner problems, of any dtype, scale and curvature: what is said of a hypergradient is true of it, by dense
algebra in float64."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import auxfast
from auxfast.solvers import MINRES, Chebyshev, ConjugateGradient, Dense, Identity, Jacobi, Neumann, Nystrom, Solver

PROBLEMS_A_TEST = 25
TESTS = 20
SHAPES = [(), (1,), (3,), (2, 2), (4, 1), (0,)]


@dataclasses.dataclass
class Problem:
    """The inner loss `c sum_i d_i log cosh(y_i) + phi . w + decay` with `y = sum_k A_k (w_k / s_k)`, in which the mixed
    derivative is the identity, so that the hypergradient of the outer loss `b . w` is -x.

    One parameter is in `phi . w` alone, which is a row and a column of zeros of H. Others are in the outer loss alone:
    they are in no system, and their hypergradient is zero. Names in the formula are those of the fields.
    """

    dtype: torch.dtype
    w: list[Tensor]
    phi: list[Tensor]
    b: list[Tensor]
    a: list[Tensor]  # (m, n_k), for the parameters that bend the loss
    s: list[float]
    d: Tensor  # (m,)
    c: float
    decay: float
    curvature: str
    solver: Solver

    @staticmethod
    def of(seed: int) -> Problem:
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        dtype = draw.choice([torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16])

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        shapes = [draw.choice(SHAPES[2:5]), *draw.sample(SHAPES, draw.randint(1, 4))]
        bent = draw.randint(1, len(shapes))
        widest = draw.choice([0, 0, 2, 6])
        s = [10.0 ** draw.uniform(-widest, widest) for _ in shapes]
        w = [(scale * normal(*shape)).to(dtype).requires_grad_() for scale, shape in zip(s, shapes, strict=True)]
        rows = draw.choice([2, 6, 15])
        d = normal(rows)
        curvature = draw.choice(["hessian", "hessian", "gauss-newton", "finite-difference"])
        if draw.random() < 0.6 or curvature == "gauss-newton":
            d = d.abs()
        c = 10.0 ** draw.choice([0, 0, draw.uniform(-6, 6)])
        decay = draw.choice([0.0, 0.1, 1.0]) * c
        largest = (float(d.abs().sum()) * 10 * c + decay) / min(s[:bent]) ** 2
        return Problem(
            dtype=dtype,
            w=w,
            phi=[normal(*shape).to(dtype).requires_grad_() for shape in shapes],
            b=[(normal(*shape) / scale).to(dtype) for scale, shape in zip(s, shapes, strict=True)],
            a=[normal(rows, math.prod(shape)).to(dtype) for shape in shapes[:bent]],
            s=s,
            d=d.to(dtype),
            c=c,
            decay=decay,
            curvature=curvature,
            solver=solver_of(draw, largest),
        )

    @property
    def in_system(self) -> int:
        return min(len(self.a) + 1, len(self.w))

    def outputs(self, w: Sequence[Tensor]) -> Tensor:
        """y, (m,)"""
        terms = [a @ (u.reshape(-1) / s) for a, u, s in zip(self.a, w, self.s, strict=False)]
        return torch.stack(terms).sum(0)

    def inner_loss(self, w: Sequence[Tensor], outputs: Tensor) -> Tensor:
        bends = self.c * (self.d * (outputs - 0.3).cosh().log()).sum()
        decays = [0.5 * self.decay * (u / s).square().sum() for u, s, _ in zip(w, self.s, self.a, strict=False)]
        linear = [(u * phi).sum() for u, phi in zip(w, self.phi[: self.in_system], strict=False)]
        return bends + sum(decays) + sum(linear)

    def outer_loss(self) -> Tensor:
        return torch.stack([(u * b).sum() for u, b in zip(self.w, self.b, strict=True)]).sum()

    def hypergradient(self) -> auxfast.HypergradientResult:
        settings: dict[str, Any] = {"solver": self.solver, "curvature": self.curvature, "warn": False}
        if self.curvature == "finite-difference":
            inner: Any = lambda: self.inner_loss(self.w, self.outputs(self.w))  # noqa: E731
            return auxfast.hypergradient(self.outer_loss, inner, self.w, self.phi, **settings)
        outputs = self.outputs(self.w)
        inner = self.inner_loss(self.w, outputs)
        if self.curvature == "gauss-newton":
            settings["outputs"] = outputs
        return auxfast.hypergradient(self.outer_loss(), inner, self.w, self.phi, **settings)

    def dense(self) -> tuple[Tensor, Tensor]:
        """The curvature (n, n) in float64, which is exact for a Gauss-Newton matrix too, y being linear in w; and the
        sizes of what rounding is relative to."""
        w = [u.detach().double() for u in self.w[: len(self.a)]]
        factors = [a.double() / s for a, s in zip(self.a, self.s, strict=False)]
        outputs = torch.stack([f @ u.reshape(-1) for f, u in zip(factors, w, strict=True)]).sum(0)
        factor, sizes = (
            torch.cat(factors, dim=1),
            torch.cat([torch.full((u.numel(),), s, dtype=torch.float64) for u, s in zip(w, self.s, strict=False)]),
        )
        bend = self.c * self.d.double() / (outputs - 0.3).cosh().square()
        decay = self.decay * torch.diag(sizes**-2)
        matrix = factor.T @ (bend[:, None] * factor) + decay
        rounded = factor.abs().T @ (bend.abs()[:, None] * factor.abs()) + decay
        straight = sum(u.numel() for u in self.w[len(self.a) : self.in_system])
        return tuple(torch.nn.functional.pad(m, (0, straight, 0, straight)) for m in (matrix, rounded))


def solver_of(draw: random.Random, largest: float) -> Solver:
    steps, tol = draw.choice([2, 10, 60]), draw.choice([None, 1e-2, 1e-3, 1e-6])
    damping = draw.choice([0.0, 0.0, 1e-2]) * largest
    preconditioner = draw.choice([None, None, Jacobi(), Nystrom(3)])
    return draw.choice(
        [
            MINRES(),
            MINRES(steps, tol, damping, preconditioner=preconditioner),
            ConjugateGradient(steps, tol, damping, preconditioner=preconditioner),
            Neumann(steps, "auto", tol, damping),
            Neumann(steps, draw.choice([0.5, 1.5, 30.0]) / largest, None, damping),
            Neumann(steps, 1 / largest, damping=damping, certify=False),
            Chebyshev(steps, "auto", tol, damping),
            Nystrom(draw.choice([2, 30]), damping, tol),
            Dense(damping, tol),
            Identity(1 / largest),
        ]
    )


def assert_true(problem: Problem, result: auxfast.HypergradientResult) -> None:
    stats = result.stats
    certified = getattr(problem.solver, "certify", True)
    assert all(grad.isfinite().all() for grad in result.grads)
    assert [(g.shape, g.dtype) for g in result.grads] == [(phi.shape, phi.dtype) for phi in problem.phi]
    assert not any(grad.any() for grad in result.grads[problem.in_system :])
    figures = [stats.largest_eigenvalue, stats.symmetry_error]
    assert all(figure is None or math.isfinite(figure) for figure in figures)
    assert (stats.operator_error is not None) == (problem.curvature == "finite-difference")
    if stats.operator_error is not None and not math.isfinite(stats.operator_error):  # nothing is left of a product
        assert stats.stop_reason == "inexact"
    assert math.isfinite(stats.residual) == certified or stats.stop_reason == "trivial"
    if not certified:
        assert stats.converged == (stats.stop_reason == "trivial")
        return
    tol = getattr(problem.solver, "tol", None) or 0.0
    differences = problem.curvature == "finite-difference"  # their products have errors of their own
    if differences and not stats.converged:
        return
    assert stats.stop_reason not in ("not symmetric", "not finite")
    assert stats.converged == (stats.residual <= tol)
    matrix, sizes = problem.dense()
    x, b = (torch.cat([t.double().reshape(-1) for t in ts[: problem.in_system]]) for ts in (result.grads, problem.b))
    x, damping = -x, getattr(problem.solver, "damping", 0.0)
    true = float((b - matrix @ x - damping * x).norm() / b.norm())
    # Rounding of y acts like an error of w that large, and the curvature changes with w.
    inexact = (
        30 * torch.finfo(problem.dtype).eps * float((sizes @ x.abs() + damping * x.abs() + b.abs()).norm() / b.norm())
    )
    if differences:
        inexact += 10 * stats.operator_error * float((sizes @ x.abs()).norm() / b.norm())
    drift = 0.03 * tol if stats.residual_from == "recurrence" else 0.0
    assert stats.residual == pytest.approx(true, rel=1e-3, abs=inexact + drift)
    if stats.converged:
        assert true <= tol + inexact
        matrix = matrix + damping * torch.eye(len(b), dtype=torch.float64)
        values = torch.linalg.svdvals(matrix)
        smallest = float(values[-1])
        if smallest > 1e-12 * float(values[0]):
            exact = torch.linalg.solve(matrix, b)
            assert float((x - exact).norm()) <= (tol + inexact) * float(b.norm()) / smallest * (1 + 1e-6)


@pytest.mark.parametrize("first", range(0, TESTS * PROBLEMS_A_TEST, PROBLEMS_A_TEST))
def test_what_is_said_of_a_hypergradient_is_true_of_it(first):
    for seed in range(first, first + PROBLEMS_A_TEST):
        problem = Problem.of(seed)
        try:
            result = problem.hypergradient()
            assert_true(problem, result)
        except Exception as error:
            raise AssertionError(f"problem {seed}: {problem.dtype}, {problem.curvature}, {problem.solver}") from error
