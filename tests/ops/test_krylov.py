"""The Krylov solvers' vector work against its definition in float64, in every shape and thread count that matters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auxfast import reference_kernels
from auxfast.ops.krylov import (
    NUMBERS,
    conjugate_gradient_step_,
    conjugate_gradient_step_reference_,
    linear_combination_,
    linear_combination_reference_,
    minres_step_,
    minres_step_reference_,
    row_dots,
    row_dots_reference,
)

from .krylov_cases import (
    DTYPES,
    SHAPES,
    STEP_SHAPES,
    DiagonalSystems,
    assert_same_solves,
    coefficients_for,
    rows,
)

NAN = float("nan")


def assert_combination(out: Tensor, terms: list[Tensor], coefficients: Tensor) -> None:
    """Calls the op and compares with its definition in float64, on finite operands."""
    rounded = coefficients.to(out.dtype).double()[..., None]
    products = [c * operand.double() for c, operand in zip(rounded, [out, *terms], strict=True)]
    wanted, scale = sum(products), sum(product.abs() for product in products)
    squares = linear_combination_(out, terms, coefficients)
    assert bool(((out.double() - wanted).abs() <= 2 * torch.finfo(out.dtype).eps * scale).all())
    assert (squares.dtype, squares.shape, squares.device) == (torch.float64, out.shape[:1], out.device)
    exact = out.double().square().sum(1)  # of what was stored, so exact in float32 too
    torch.testing.assert_close(squares, exact, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_combination_is_its_definition(shape, dtype, device):
    for terms in (1, 2, 3):
        out, *others = rows(shape, 1 + terms, dtype, device)
        assert_combination(out, others, coefficients_for(out, terms))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_dots_are_their_definition(shape, dtype, device):
    a, b = rows(shape, 2, dtype, device)
    dots = row_dots(a, b)
    assert (dots.dtype, dots.shape, dots.device) == (torch.float64, a.shape[:1], a.device)
    products = a.double() * b.double()
    assert bool(((dots - products.sum(1)).abs() <= 1e-14 * products.abs().sum(1)).all())
    torch.testing.assert_close(row_dots(a, a), a.double().square().sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16])
def test_reference_and_kernel_agree(dtype, device):
    out, *terms = rows((7, 1009), 4, dtype, device)
    coefficients = coefficients_for(out, 3)
    coefficients[1, 2] = coefficients[0, 3] = coefficients[:, 4] = 0
    reference = out.clone()
    squares = linear_combination_(out, terms, coefficients)
    reference_squares = linear_combination_reference_(reference, terms, coefficients)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, reference, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(squares, reference_squares, rtol=4 * tolerance, atol=0)
    torch.testing.assert_close(row_dots(*terms[:2]), row_dots_reference(*terms[:2]), rtol=1e-12, atol=1e-12)


def test_reference_kernels_context_runs_the_reference(device):
    out, *terms = rows((3, 1009), 3, torch.float32, device)
    coefficients, other = coefficients_for(out, 2), out.clone()
    with reference_kernels():
        squares, dots = linear_combination_(out, terms, coefficients), row_dots(*terms)
    assert torch.equal(squares, linear_combination_reference_(other, terms, coefficients))
    assert torch.equal(out, other)
    assert torch.equal(dots, row_dots_reference(*terms))


@pytest.mark.parametrize("shape", [(1, 200_003), (5, 70_001), (4099, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(shape, dtype):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            out, *terms = rows(shape, 3, dtype, "cpu")
            squares = linear_combination_(out, terms, coefficients_for(out, 2))
            results.append([out, squares, row_dots(*terms)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_wherever_the_rows_lie(dtype, device):
    """A row has the same sums alone as among others, and off the alignment of an allocation."""
    a, b = rows((5, 40_009), 2, dtype, device)
    alone = [row_dots(a[i : i + 1].clone(), b[i : i + 1].clone()) for i in range(5)]
    assert torch.equal(row_dots(a, b), torch.cat(alone))


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_sums_neither_underflow_nor_overflow_in_float32(magnitude, device):
    out, term = (magnitude * t for t in rows((2, 1003), 2, torch.float32, device))
    assert_combination(out, [term], coefficients_for(out, 1))
    torch.testing.assert_close(row_dots(out, out), out.double().square().sum(1), rtol=1e-12, atol=0)


def test_coefficients_of_any_strides(device):
    out, *terms = rows((4, 100), 3, torch.float32, device)
    assert_combination(out, terms, coefficients_for(out, 2).mT.contiguous().mT)
    assert_combination(
        out, terms, torch.tensor([[1.0], [0.5], [-2.0]], dtype=torch.float64, device=device).expand(3, 4)
    )


# ----------------------------------------------------------------------------------------------------- what zero means


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 1009, 40_009])
def test_a_coefficient_of_zero_leaves_its_operand_out(n, dtype, device, native):
    combine = linear_combination_ if native else linear_combination_reference_
    out, *terms = rows((4, n), 4, dtype, device)
    before = out.clone()
    for term in terms:
        term[0] = NAN  # of a row that is frozen
    out[1] = float("inf")  # overwritten
    terms[1][2] = NAN  # left out among others
    coefficients = torch.tensor(
        [
            [1.0, 0.0, 1.0, 0.0],
            [0.0, 2.0, 1.0, 0.0],
            [-0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, -1.0, 0.0],
        ],
        dtype=torch.float64,
        device=device,
    )
    squares = combine(out, terms, coefficients)
    wanted = torch.stack([before[0], 2 * terms[0][1], before[2] + terms[0][2] - terms[2][2], torch.zeros_like(out[3])])
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(out[0], before[0])
    torch.testing.assert_close(squares, out.double().square().sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("where", ["out", "term", "coefficient"])
def test_what_is_not_finite_shows_in_its_own_row_only(where, value, device):
    out, term = rows((3, 1003), 2, torch.float32, device)
    coefficients = coefficients_for(out, 1)
    {"out": out, "term": term, "coefficient": coefficients.mT}[where][1, -1] = value
    squares = linear_combination_(out, [term], coefficients)
    assert squares.isfinite().tolist() == [True, False, True]
    assert out.isfinite().all(1).tolist() == [True, False, True]
    assert row_dots(out, term).isfinite().tolist() == [True, False, True]


# ----------------------------------------------------------------------------------------------- memory and autograd


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
def test_a_term_may_be_out_itself(device, native):
    combine = linear_combination_ if native else linear_combination_reference_
    out, other = rows((3, 40_009), 2, torch.float64, device)
    before = out.clone()
    combine(out, [out, other], torch.tensor([2.0, 3, 1], dtype=torch.float64, device=device)[:, None].expand(3, 3))
    torch.testing.assert_close(out, 5 * before + other)


def test_autograd_sees_that_out_changed():
    out, term = rows((2, 3), 2, torch.float32, "cpu")
    weight = torch.ones(2, 3, requires_grad=True)
    product = (weight * out).sum()
    versions = out._version, term._version
    linear_combination_(out, [term], coefficients_for(out, 1))
    row_dots(out, term)
    assert (out._version, term._version) == (versions[0] + 1, versions[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# ------------------------------------------------------------------------------------------------------------ library


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 0), (0, 3), (4, 129)], ids=str)
def test_opcheck(shape, dtype, device):
    out, *terms = rows(shape, 3, dtype, device)
    torch.library.opcheck(torch.ops.auxfast.linear_combination_.default, (out, terms, coefficients_for(out, 2)))
    torch.library.opcheck(torch.ops.auxfast.row_dots.default, (out, terms[0]))


# -------------------------------------------------------------------------------------------------------- whole steps

STEPS = {
    "conjugate gradients": (
        DiagonalSystems.conjugate_gradients,
        conjugate_gradient_step_,
        conjugate_gradient_step_reference_,
    ),
    "MINRES": (DiagonalSystems.minres, minres_step_, minres_step_reference_),
}
methods = pytest.mark.parametrize("method", STEPS.values(), ids=STEPS.keys())


@methods
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("shape", STEP_SHAPES.values(), ids=STEP_SHAPES.keys())
def test_steps_are_the_reference(method, shape, preconditioned, dtype, device):
    solve, step, reference = method
    systems = DiagonalSystems.of(shape, dtype, device)
    for steps in (1, 2, 4):
        wanted = solve(systems, reference, steps, preconditioned)
        assert_same_solves(solve(systems, step, steps, preconditioned), wanted, dtype)


@methods
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 200_003), (5, 70_001), (4099, 33)], ids=str)
def test_steps_have_the_same_bits_for_any_number_of_threads(method, shape, dtype):
    solve, step, _ = method
    systems, threads, results = DiagonalSystems.of(shape, dtype, "cpu"), torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(solve(systems, step, 3, False))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


@methods
def test_a_row_that_has_stopped_is_left_alone(method, device):
    solve, step, _ = method
    systems = DiagonalSystems.of((5, 40), torch.float64, device)
    before, after = (solve(systems, step, steps, False) for steps in (0, 4))
    assert torch.equal(after["x"][4], before["x"][4])
    assert torch.equal(after["r"][4], before["r"][4])
    assert not torch.equal(after["r"][0], before["r"][0])


@methods
def test_steps_within_reference_kernels_run_the_reference(method, device):
    solve, step, reference = method
    systems = DiagonalSystems.of((5, 40), torch.float32, device)
    with reference_kernels():
        results, wanted = (solve(systems, each, 3, False) for each in (step, reference))
    torch.testing.assert_close(results, wanted, rtol=0, atol=0, equal_nan=True)


@methods
def test_steps_solve_their_systems(method, device):
    """A diagonal of two values is solved in two steps, to the rounding of float64."""
    solve, step, _ = method
    systems = DiagonalSystems.of((1, 30), torch.float64, device)
    systems.diagonal = torch.where(systems.diagonal > 1, 3.0, 0.5)
    results = solve(systems, step, 2, False)
    torch.testing.assert_close(results["x"], systems.rhs / systems.diagonal, rtol=1e-12, atol=1e-12)
    assert results["numbers"].shape == (NUMBERS, 1)
