"""The Krylov solvers' vector work, against what one writes in PyTorch, and against the memory; and what the solvers add
to their products.

Bandwidth counts the reads and writes per element that they cannot do without, and 3 for the triad loop `a = b + s c`,
which is measured in the same run: 11 for a step of conjugate gradients, in four-byte units 23 for one of MINRES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing import interleaved
from torch import Tensor

from auxfast.ops.krylov import (
    CONJUGATE_GRADIENT_NUMBERS,
    MINRES_NUMBERS,
    NUMBERS,
    conjugate_gradient_step_,
    linear_combination_,
    minres_step_,
    row_dots,
)
from auxfast.solvers import MINRES, ConjugateGradient

MLP, RESNET18 = 26_122, 11_689_512  # parameters of MLP 64-128-128-10 and of torchvision's ResNet-18
SHAPES = {
    "MLP": (1, MLP),
    "MLP, 8 rows": (8, MLP),
    "ResNet-18": (1, RESNET18),
    "ResNet-18, 8 rows": (8, RESNET18),
}


def of_run(benchmark: Any, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape; of a hundredth of the columns where nothing is measured."""
    return shape if benchmark.enabled else (shape[0], shape[1] // 100)


def torch_combination(out: Tensor, terms: list[Tensor], coefficients: Tensor) -> Callable[[], Any]:
    """The combination in PyTorch. It takes no pass over `out` alone, since all its coefficients are 1."""
    first, *others = coefficients[1:].to(out.dtype)[..., None]  # (k, 1) each

    def run() -> Tensor:
        out.addcmul_(first, terms[0])
        for coefficient, term in zip(others, terms[1:], strict=True):
            out.addcmul_(coefficient, term)
        return torch.linalg.vecdot(out, out)

    return run


def triad(like: Tensor) -> Callable[[], Any]:
    a, b, c = torch.empty_like(like), torch.randn_like(like), torch.randn_like(like)
    return lambda: torch.add(b, c, alpha=1.5, out=a)


def measure(benchmark: Any, native: Callable[[], Any], eager: Callable[[], Any], like: Tensor, streams: int) -> None:
    rounds = 1 if not benchmark.enabled else 30 if like.numel() < 1e7 else 5
    with torch.no_grad():
        seconds = interleaved({"native": native, "torch": eager, "triad": triad(like)}, rounds=rounds)
        benchmark(native)
    benchmark.extra_info |= {
        "native us": seconds["native"] * 1e6,
        "vs torch": seconds["torch"] / seconds["native"],
        "of the triad's bandwidth": (streams / seconds["native"]) / (3 / seconds["triad"]),
    }


@pytest.mark.benchmark(group="Linear combination and squared norms, float32, one thread")
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear_combination(benchmark: Any, shape: tuple[int, int], terms: int) -> None:
    shape = of_run(benchmark, shape)
    out, *others = (torch.randn(shape) for _ in range(1 + terms))
    coefficients = torch.full((1 + terms, len(out)), 1e-9, dtype=torch.float64)
    coefficients[0] = 1
    eager = torch_combination(torch.randn(shape), others, coefficients)
    measure(benchmark, lambda: linear_combination_(out, others, coefficients), eager, out, 2 + terms)


@pytest.mark.benchmark(group="Row dot products, float32, one thread")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_row_dots(benchmark: Any, shape: tuple[int, int]) -> None:
    shape = of_run(benchmark, shape)
    a, b = torch.randn(shape), torch.randn(shape)
    measure(benchmark, lambda: row_dots(a, b), lambda: torch.linalg.vecdot(a, b), a, 2)


def numbers(names: dict[str, int], rows: int, **known: float) -> Tensor:
    values = torch.zeros(NUMBERS, rows, dtype=torch.float64)
    for name, value in known.items():
        values[names[name]] = value
    return values


def torch_conjugate_gradient_step(x: Tensor, r: Tensor, p: Tensor, product: Tensor) -> Callable[[], Any]:
    rr = torch.linalg.vecdot(r, r)

    def run() -> Tensor:
        alpha = (rr / torch.linalg.vecdot(p, product))[:, None]
        x.addcmul_(alpha, p)
        r.addcmul_(-alpha, product)
        new = torch.linalg.vecdot(r, r)
        torch.addcmul(r, (new / rr)[:, None], p, out=p)
        return new

    return run


@pytest.mark.benchmark(group="A step of conjugate gradients, float32, one thread")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_conjugate_gradient_step(benchmark: Any, shape: tuple[int, int]) -> None:
    shape = of_run(benchmark, shape)
    p, r = torch.randn(shape), 1e-6 * torch.randn(shape)  # so small a residual hardly changes p, however many steps
    vectors = [torch.zeros(shape), torch.zeros(shape), r, p, None, p.clone()]
    square = 1e-12 * shape[1]
    start = numbers(CONJUGATE_GRADIENT_NUMBERS, len(r), rz=square, square=square, best_square=square, pp=shape[1])
    current = start.clone()

    def native() -> None:
        current.copy_(start)
        conjugate_gradient_step_(*vectors, current)

    native()
    assert not current[CONJUGATE_GRADIENT_NUMBERS["status"]].any()  # the row goes on
    eager = torch_conjugate_gradient_step(*(torch.randn(shape) for _ in range(4)))
    measure(benchmark, native, eager, r, 11)


@pytest.mark.benchmark(group="A step of MINRES, float32, one thread; against a step of conjugate gradients in PyTorch")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_minres_step(benchmark: Any, shape: tuple[int, int]) -> None:
    shape = of_run(benchmark, shape)
    r, u = torch.randn(shape), 1e-6 / shape[1] * torch.randn(shape)  # so small a u hardly changes the product
    wide = [torch.zeros(shape, dtype=torch.float64) for _ in range(3)]
    vectors = [*wide, torch.randn(shape), u, u.clone(), r, None, torch.randn(shape)]
    start = numbers(MINRES_NUMBERS, len(r), square=shape[1], beta=1.0, phibar=1.0, c=-1.0)
    current = start.clone()

    def native() -> None:
        current.copy_(start)
        minres_step_(*vectors, current)

    native()
    assert not current[MINRES_NUMBERS["status"]].any()  # the row goes on
    eager = torch_conjugate_gradient_step(*(torch.randn(shape) for _ in range(4)))
    measure(benchmark, native, eager, r, 23)


@pytest.mark.benchmark(group="20 steps on a vector of 50 whose product takes 2 us, one thread")
@pytest.mark.parametrize("solver", [ConjugateGradient(20, tol=None), MINRES(20, tol=None)], ids=["CG", "MINRES"])
def test_what_a_solver_adds_to_its_products(benchmark: Any, solver: ConjugateGradient | MINRES) -> None:
    root, b = torch.randn(50, 50), torch.randn(50)
    matrix = root @ root.T / 50 + 0.1 * torch.eye(50)

    def textbook() -> Tensor:
        x, r, p, rr = torch.zeros_like(b), b.clone(), b.clone(), b @ b
        for _ in range(20):
            product = matrix @ p
            alpha = rr / (p @ product)
            x, r = x + alpha * p, r - alpha * product
            new = r @ r
            p, rr = r + (new / rr) * p, new
        return x

    def solve() -> Any:
        return solver.solve(lambda v: [matrix @ v[0]], [b])

    seconds = interleaved({"solver": solve, "textbook": textbook}, rounds=30 if benchmark.enabled else 1)
    benchmark(solve)
    benchmark.extra_info |= {"solver us": seconds["solver"] * 1e6, "textbook CG us": seconds["textbook"] * 1e6}
