"""Losses in bfloat16 and float16: under `torch.autocast`, which keeps casts of the parameters for as long as it lasts,
and with parameters that are narrow themselves."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import auxfast
from auxfast.curvature import Hessian
from auxfast.implicit import HypergradientResult, hypergradient, verify_hypergradient
from auxfast.solvers import (
    MINRES,
    Chebyshev,
    ConjugateGradient,
    Dense,
    Identity,
    Neumann,
    Nystrom,
    Solver,
    SolverState,
)

NARROW = [torch.bfloat16, torch.float16]
ANY_DTYPE = pytest.mark.parametrize("dtype", NARROW)


class Decay:
    """A small network in bfloat16, and the weight decay that its outer loss asks for."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.decay = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), torch.zeros(1)
        self.decay.requires_grad_()
        self.x, self.y = torch.randn(2, 32, 5), torch.randn(2, 32, 1)

    def inner(self) -> Tensor:
        penalty = sum(w.square().sum() for w in self.net.parameters())
        return (self.net(self.x[0]).float() - self.y[0]).square().mean() + self.decay.exp() * penalty

    def outer(self) -> Tensor:
        return (self.net(self.x[1]).float() - self.y[1]).square().mean()


def autocast(cache: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)


@pytest.mark.parametrize("curvature", ["hessian", "finite-difference"])
def test_casts_that_autocast_keeps_do_not_hide_that_parameters_are_moved(curvature):
    results = []
    for cache in (False, True):
        case = Decay()
        args = case.outer, case.inner, list(case.net.parameters()), [case.decay]
        with autocast(cache):
            options = {"curvature": curvature, "solver": Dense(), "state": SolverState(), "warn": False}
            results.append(hypergradient(*args, **options))
    torch.testing.assert_close(results[1].grads, results[0].grads, rtol=0, atol=0)
    assert results[1].stats == results[0].stats
    assert results[1].stats.stop_reason != "not symmetric"


@pytest.mark.parametrize("check", ["finite-difference", "verify"])
def test_what_follows_within_autocast_sees_the_parameters_as_they_are(check):
    case = Decay()
    args = case.outer, case.inner, list(case.net.parameters()), [case.decay]
    with autocast():
        before = case.net(case.x[0])
        if check == "verify":
            verify_hypergradient(*args, solve_inner=lambda: None)
        else:
            hypergradient(*args, curvature="finite-difference", warn=False)
        assert torch.equal(case.net(case.x[0]), before)


class Trained:
    """A network of 431 weights near the minimum of its inner loss in float32, which is then computed in `dtype`.

    Args:
        dtype: of the products of matrices; `None`: float32.
        cache_enabled: whether autocast keeps casts of parameters.
        checkpoints: whether activations are computed again in backward passes.
        nested: whether the second half of the network is in float32 all the same.
    """

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        cache_enabled: bool = True,
        checkpoints: bool = False,
        nested: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        self.second = nn.Sequential(nn.Tanh(), nn.Linear(16, 1))
        self.params = [*self.first.parameters(), *self.second.parameters()]
        self.decay = torch.full((1,), -4.0, requires_grad=True)
        self.x, self.y = torch.randn(2, 256, 8), torch.randn(2, 256, 1)
        self.dtype: torch.dtype | None = None
        self.cache_enabled, self.checkpoints, self.nested = cache_enabled, checkpoints, nested
        with torch.no_grad():
            for w, value in zip(self.params, minimum(self), strict=True):
                w.copy_(value)
        self.dtype = dtype

    def autocast(self, enabled: bool = True) -> torch.autocast:
        enabled = enabled and self.dtype is not None
        return torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=enabled, cache_enabled=self.cache_enabled)

    def outputs(self, x: Tensor) -> Tensor:
        with self.autocast():
            hidden = checkpoint(self.first, x, use_reentrant=False) if self.checkpoints else self.first(x)
            with self.autocast(not self.nested):
                found: Tensor = self.second(hidden.float() if self.nested else hidden)
        return found

    def error(self, outputs: Tensor, i: int, rows: slice) -> Tensor:
        return (outputs.float() - self.y[i, rows]).square().mean()

    def inner(self, rows: slice = slice(None)) -> Tensor:
        return self.inner_and_outputs(rows)[0]

    def inner_and_outputs(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        outputs = self.outputs(self.x[0, rows])
        penalty = torch.stack([w.square().sum() for w in self.params]).sum()
        return self.error(outputs, 0, rows) + self.decay.exp().sum() * penalty, outputs

    def outer(self, rows: slice = slice(None)) -> Tensor:
        return self.error(self.outputs(self.x[1, rows]), 1, rows)


_MINIMUM: list[Tensor] = []


def minimum(case: Trained) -> list[Tensor]:
    """Its weights, found once for all: every case begins with the same numbers."""
    if not _MINIMUM:
        lbfgs = torch.optim.LBFGS(case.params, max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            lbfgs.zero_grad()
            loss = case.inner()
            loss.backward()
            return loss

        lbfgs.step(closure)
        _MINIMUM.extend(w.detach().clone() for w in case.params)
    return _MINIMUM


def result_of(case: Trained, solver: Solver, curvature: str = "hessian", **options: Any) -> HypergradientResult:
    inner = case.inner_and_outputs if curvature == "gauss-newton" else case.inner
    options = {"solver": solver, "curvature": curvature, "warn": False, **options}
    return hypergradient(case.outer, inner, case.params, [case.decay], **options)


@functools.cache
def usual_result(dtype: torch.dtype | None, solver: Solver, curvature: str = "hessian") -> HypergradientResult:
    return result_of(Trained(dtype), solver, curvature)


OTHER_SOLVERS = [
    pytest.param(torch.bfloat16, solver, marks=pytest.mark.slow, id=type(solver).__name__)
    for solver in (
        Neumann(steps=30, step_size="auto"),
        Chebyshev(steps=30),
        ConjugateGradient(damping=0.01),
        Nystrom(rank=20, damping=0.1),
        Identity(),
    )
]
EACH_DTYPE_AND_SOLVER = pytest.mark.parametrize(
    ("dtype", "solver"), [*((dtype, MINRES()) for dtype in NARROW), *OTHER_SOLVERS]
)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@EACH_DTYPE_AND_SOLVER
def test_every_solver_is_within_two_percent_of_float32_and_finds_no_asymmetry(dtype, solver, curvature):
    exact = usual_result(None, solver, curvature)
    found = result_of(Trained(dtype), solver, curvature, state=SolverState())
    torch.testing.assert_close(found.grads, exact.grads, rtol=0.02, atol=0)
    assert found.stats.stop_reason != "not symmetric"
    assert found.stats.residual < exact.stats.residual + 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_finite_differences_are_coarse_and_say_so(dtype):
    exact, found = usual_result(None, MINRES()), result_of(Trained(dtype), MINRES(), "finite-difference")
    error = abs(found.grads[0] / exact.grads[0] - 1).item()
    assert error < found.stats.operator_error < 0.2
    assert found.stats.stop_reason == "inexact"


@ANY_DTYPE
@pytest.mark.parametrize("solver", [MINRES(), MINRES(tol=0.01), Chebyshev(steps=30)])
def test_the_residual_is_that_of_exact_products_up_to_what_rounding_makes_of_one(solver, dtype):
    case = Trained(dtype)
    b, hessian = torch.autograd.grad(case.outer(), case.params), Hessian(case.inner, case.params)
    case.dtype = None
    exact = Hessian(case.inner, case.params)
    x, stats = solver.solve(hessian, b)

    def norm(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in tensors]).norm()

    case.dtype = dtype
    products = Hessian(case.inner, case.params)(x), exact(x)
    true = norm([p - q for p, q in zip(b, products[1], strict=True)]) / norm(b)
    rounding = norm([p - q for p, q in zip(*products, strict=True)]) / norm(b)
    assert 0 < rounding < 4 * torch.finfo(dtype).eps
    assert abs(true - stats.residual) <= 1.01 * rounding
    assert stats.residual_from == "product"
    assert stats.converged == (stats.residual <= solver.tol)


class Matmuls(TorchDispatchMode):
    """The dtypes of the matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.__name__:
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, Tensor)}
        return func(*args, **(kwargs or {}))


@ANY_DTYPE
@pytest.mark.parametrize("within", [False, True], ids=["outside", "within"])
def test_products_multiply_matrices_in_the_dtype_of_the_forward_pass_wherever_they_are_taken(dtype, within):
    case = Trained(dtype)
    hessian = Hessian(case.inner(), case.params)
    vectors = [torch.randn_like(w) for w in case.params]
    outside = hessian(vectors)
    with case.autocast() if within else nullcontext(), Matmuls() as seen:
        products = hessian(vectors)
    assert seen.dtypes == {dtype}
    assert all(product.dtype == torch.float32 for product in products)
    assert all(torch.equal(a, b) for a, b in zip(products, outside, strict=True))


@pytest.mark.parametrize("cache_enabled", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("checkpoints", [True, False], ids=["checkpoints", "stored"])
@pytest.mark.parametrize("within", [False, True], ids=["outside", "within"])
@pytest.mark.parametrize("as_tensors", [False, True], ids=["functions", "tensors"])
def test_no_digit_depends_on_caches_checkpoints_or_where_the_call_stands(
    cache_enabled, checkpoints, within, as_tensors
):
    expected, case = usual_result(torch.bfloat16, MINRES()), Trained(torch.bfloat16, cache_enabled, checkpoints)
    with case.autocast() if within else nullcontext():
        outer, inner = (case.outer(), case.inner()) if as_tensors else (case.outer, case.inner)
        found = hypergradient(outer, inner, case.params, [case.decay], solver=MINRES(), warn=False)
    assert torch.equal(found.grads[0], expected.grads[0])
    assert found.stats == expected.stats


@ANY_DTYPE
def test_a_part_of_the_network_in_float32_keeps_its_own_products(dtype):
    case = Trained(dtype, nested=True)
    with Matmuls() as seen:
        found = result_of(case, MINRES())
    assert seen.dtypes == {dtype, torch.float32}
    torch.testing.assert_close(found.grads, usual_result(None, MINRES()).grads, rtol=0.02, atol=0)


@ANY_DTYPE
def test_batched_products_are_those_of_each_vector(dtype):
    case = Trained(dtype)
    hessian = Hessian(case.inner, case.params)
    vectors = torch.randn(hessian.shape[0], 12)
    expected = torch.stack([hessian.matvec(vector) for vector in vectors.T.contiguous()], dim=1)
    for context in (nullcontext(), case.autocast()):
        with context:
            torch.testing.assert_close(hessian.matmat(vectors), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_micro_batches_are_the_whole_batch_up_to_rounding(dtype):
    case, whole = Trained(dtype), usual_result(None, MINRES())
    rows = [slice(0, 100), slice(100, 256)]
    outer, inner = (auxfast.MicroBatches(loss, rows, [100, 156]) for loss in (case.outer, case.inner))
    found = hypergradient(outer, inner, case.params, [case.decay], solver=MINRES(), state=SolverState(), warn=False)
    torch.testing.assert_close(found.grads, whole.grads, rtol=0.02, atol=0)
    assert found.stats.stop_reason != "not symmetric"


@ANY_DTYPE
def test_minima_as_functions_have_the_same_gradient(dtype):
    case = Trained(dtype)
    solved = auxfast.implicit_minimum(case.inner, case.params, [case.decay], solver=MINRES(), warn=False)
    halves = zip((case.first, case.second), (solved[:4], solved[4:]), strict=True)
    outputs = case.x[1]
    with case.autocast():
        for half, values in halves:
            names = [name for name, _ in half.named_parameters()]
            outputs = torch.func.functional_call(half, dict(zip(names, values, strict=True)), (outputs,))
    (gradient,) = torch.autograd.grad(case.error(outputs, 1, slice(None)), case.decay)
    assert torch.equal(gradient, usual_result(dtype, MINRES()).grads[0])


@EACH_DTYPE_AND_SOLVER
def test_parameters_that_are_narrow_themselves_give_what_float32_does_up_to_their_rounding(dtype, solver):
    exact, case = usual_result(None, solver), Trained()
    for half in (case.first, case.second):
        half.to(dtype)
    case.x = case.x.to(dtype)
    found = result_of(case, solver, state=SolverState())
    torch.testing.assert_close(found.grads, exact.grads, rtol=0.03, atol=0)
    assert found.stats.stop_reason != "not symmetric"


class Adapters:
    """A frozen linear layer and a trained product of two narrow matrices beside it, as LoRA has them.

    Args:
        base: dtype of the layer, whose numbers are those of bfloat16 in any case; the adapters are in float32.
    """

    def __init__(self, base: torch.dtype) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(12, 12).bfloat16().to(base)
        self.down, self.up = (0.3 * torch.randn(shape) for shape in ((2, 12), (12, 2)))
        self.params = [self.down.requires_grad_(), self.up.requires_grad_()]
        self.logits = torch.zeros(64, requires_grad=True)
        self.x, self.y = torch.randn(2, 64, 12), torch.randn(2, 64, 12)

    def errors(self, i: int) -> Tensor:
        base = (self.x[i].to(self.weight.dtype) @ self.weight.T).float()
        return (base + self.x[i] @ self.down.T @ self.up.T - self.y[i]).square().mean(dim=1)

    def inner(self) -> Tensor:
        penalty = torch.stack([w.square().sum() for w in self.params]).sum()
        return (self.logits.softmax(0) * self.errors(0)).sum() + 0.5 * penalty

    def outer(self) -> Tensor:
        return self.errors(1).mean()


def test_adapters_in_float32_over_a_frozen_base_in_bfloat16_are_as_exact_as_in_float32():
    narrow, wide = (
        hypergradient(case.outer, case.inner, case.params, [case.logits], solver=MINRES(tol=1e-5, damping=1.0))
        for case in (Adapters(torch.bfloat16), Adapters(torch.float32))
    )
    assert narrow.stats.converged  # its products are those of float32: the base has no part in them
    error = (narrow.grads[0] - wide.grads[0]).norm() / wide.grads[0].norm()
    assert 0 < error < 0.02
