"""krylov_cuda.cu on the CPU, against the references in float64."""

from __future__ import annotations

import pytest
import torch
from ops.krylov_cases import DTYPES, DiagonalSystems, assert_same_solves, coefficients_for, rows
from torch import Tensor

from auxfast.ops.krylov import (
    WHOLE,
    conjugate_gradient_step_reference_,
    linear_combination_reference_,
    minres_step_reference_,
    row_dots_reference,
)

from .kernels import MODE, call, in_any_order, launches, unwritten

SHAPES = {
    "one": (1, 1),
    "no rows": (0, 5),
    "empty rows": (3, 0),
    "around a warp": (3, 33),
    "around a block's threads": (2, 257),
    "a whole block": (2, 2048),
    "just above a block": (3, 2049),
    "long rows": (3, 20_011),
    "more blocks than threads add up": (1, 600_001),
    "many rows": (301, 3),
}

STEP_SHAPES = {name: SHAPES[name] for name in ("one", "no rows", "empty rows", "a whole block")}
STEP_SHAPES |= {"many rows": (65, 3), "three blocks": (3, 4099)}


def combine(out: Tensor, terms: list[Tensor], coefficients: Tensor) -> dict[str, Tensor]:
    """What the kernel makes of a copy of `out`, and of the terms that are `out` itself."""

    def run() -> dict[str, Tensor]:
        new, squares = out.clone(), unwritten(len(out), dtype=torch.float64)
        given = [new if term is out else term for term in terms]
        call(
            "linear_combination", out.dtype == torch.float64, *out.shape, new, len(terms), given, coefficients, squares
        )
        return {"out": new, "squares": squares}

    return in_any_order(run)


def assert_combination(out: Tensor, terms: list[Tensor], coefficients: Tensor) -> None:
    result = combine(out, terms, coefficients)
    wanted, rounded = out.double(), coefficients.to(out.dtype).double()
    linear_combination_reference_(wanted, [term.double() for term in terms], rounded)
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(result["out"].double(), wanted, rtol=4 * eps, atol=16 * eps)
    torch.testing.assert_close(result["squares"], result["out"].double().square().sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_combination_is_the_reference(shape, terms, dtype):
    out, *others = rows(shape, 1 + terms, dtype, "cpu")
    assert_combination(out, others, coefficients_for(out, terms))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_term_may_be_out_itself(dtype):
    out, other = rows((2, 2500), 2, dtype, "cpu")
    assert_combination(out, [out, other], coefficients_for(out, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [33, 2500])
def test_a_coefficient_of_zero_leaves_its_operand_out(n, dtype):
    out, term = rows((3, n), 2, dtype, "cpu")
    term[0] = out[1] = out[2] = float("nan")
    coefficients = torch.tensor([[1.0, 0, 0], [0, 2, 0]], dtype=torch.float64)
    result = combine(out, [term], coefficients)
    assert torch.equal(result["out"], torch.stack([out[0], 2 * term[1], torch.zeros_like(out[2])]))
    torch.testing.assert_close(result["squares"], result["out"].double().square().sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_dots_are_the_reference(shape, dtype):
    a, b = rows(shape, 2, dtype, "cpu")

    def run() -> dict[str, Tensor]:
        dots = unwritten(len(a), dtype=torch.float64)
        call("row_dots", dtype == torch.float64, *shape, a, b, dots)
        return {"dots": dots}

    torch.testing.assert_close(in_any_order(run)["dots"], row_dots_reference(a, b), rtol=1e-12, atol=1e-10)


def cuda_conjugate_gradient_step(x: Tensor, *rest: Tensor | int | None) -> None:
    step("conjugate_gradient_step", x, *rest)


def cuda_minres_step(x: Tensor, *rest: Tensor | int | None) -> None:
    step("minres_step", x, *rest)


def step(function: str, x: Tensor, *rest: Tensor | int | None) -> None:
    *vectors, numbers, part = rest if isinstance(rest[-1], int) else (*rest, WHOLE)
    call(function, vectors[-1].dtype == torch.float64, *x.shape, x, *vectors, numbers, part)  # the product is last


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("shape", STEP_SHAPES.values(), ids=STEP_SHAPES.keys())
def test_steps_of_conjugate_gradients_are_the_reference(shape, preconditioned, dtype):
    systems = DiagonalSystems.of(shape, dtype, "cpu")
    results = in_any_order(lambda: systems.conjugate_gradients(cuda_conjugate_gradient_step, 3, preconditioned))
    wanted = systems.conjugate_gradients(conjugate_gradient_step_reference_, 3, preconditioned)
    assert_same_solves(results, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("shape", STEP_SHAPES.values(), ids=STEP_SHAPES.keys())
def test_steps_of_minres_are_the_reference(shape, preconditioned, dtype):
    systems = DiagonalSystems.of(shape, dtype, "cpu")
    results = in_any_order(lambda: systems.minres(cuda_minres_step, 3, preconditioned))
    assert_same_solves(results, systems.minres(minres_step_reference_, 3, preconditioned), dtype)


def test_steps_add_up_more_blocks_than_there_are_threads():
    systems = DiagonalSystems.of(SHAPES["more blocks than threads add up"], torch.float32, "cpu")
    for solve, step_, reference_ in (
        (systems.conjugate_gradients, cuda_conjugate_gradient_step, conjugate_gradient_step_reference_),
        (systems.minres, cuda_minres_step, minres_step_reference_),
    ):
        results = in_any_order(lambda solve=solve, step_=step_: solve(step_, 1, False))
        assert_same_solves(results, solve(reference_, 1, False), torch.float32)


@pytest.mark.skipif(MODE != "plain", reason="counts are the same in all modes")
@pytest.mark.parametrize(("n", "conjugate_gradients", "minres"), [(2048, 3, 4), (100_000, 6, 7)])
def test_a_step_is_at_most_eight_launches(n, conjugate_gradients, minres):
    """A pass over rows of several blocks is two launches: the second adds up the blocks' sums."""
    systems = DiagonalSystems.of((2, n), torch.float32, "cpu")
    for solve, step_, a_step in (
        (systems.conjugate_gradients, cuda_conjugate_gradient_step, conjugate_gradients),
        (systems.minres, cuda_minres_step, minres),
    ):
        assert launches(lambda run=solve, step_=step_: run(step_, 2, False)) == 2 * a_step
