"""The solvers' work on vectors: a Neumann step, steps of CG and MINRES, linear combinations and dot products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from auxfast.ops.krylov import (
    CONJUGATE_GRADIENT_NUMBERS,
    LANCZOS,
    MINRES_NUMBERS,
    NUMBERS,
    conjugate_gradient_step_,
    linear_combination_,
    minres_step_,
    row_dots,
)
from auxfast.ops.neumann import GREW, GUARDED_NUMBERS, SMALLEST, NeumannSteps, neumann_guarded_step_
from benchmarks.gpu.section import Call, Section
from benchmarks.networks import resnet18_shapes

MLP = [(128, 64), (128,), (128, 128), (128,), (10, 128), (10,)]
STEPS = 20
_NEUMANN_STEPS = 8
"""Steps that a solver takes on a GPU before it looks at their norms."""
_STEP = 1e-9


def vectors(section: Section) -> None:
    lists = {"MLP 64-128-128-10": MLP, "300 biases of 10": [(10,)] * 300, "ResNet-18": resnet18_shapes()}
    sizes = {name: sum(torch.Size(shape).numel() for shape in shapes) for name, shapes in lists.items()}
    with torch.no_grad():
        for name, shapes in lists.items():
            if not section.small or name != "ResNet-18":
                row = f"{_NEUMANN_STEPS} Neumann steps, {name}"
                ways = {"auxfast": neumann, "auxfast, guarded": _guarded_neumann, "foreach": _foreach}
                ways["list comprehensions"] = _comprehensions
                section.compare(row, {way: _made(make, shapes, section.device) for way, make in ways.items()})
                if us := section.figures[row]["auxfast"].get("graph us"):
                    section.note(f"{row}, TB/s", _NEUMANN_STEPS * 5 * 4e-6 * sizes[name] / us)
        for n in [1000] if section.small else [sizes["MLP 64-128-128-10"], sizes["ResNet-18"]]:
            # A step has its product with a diagonal matrix; that alone is the row to take from it.
            of_steps = {"CG": conjugate_gradients, "MINRES": minres}
            section.compare(
                f"{STEPS} steps, 1 x {n}", {way: _made(make, n, section.device) for way, make in of_steps.items()}
            )
            section.compare(f"a product, 1 x {n}", {"torch": _made(_diagonal_product, n, section.device)})
            for k in (1, 8):
                _rows(section, k, n)


def _made(make: Callable[..., Call], *given: Any) -> Callable[[int], Call]:
    return lambda _: make(*given)


def _normal(shapes: list[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    return [torch.randn(shape, device=device) for shape in shapes]


def neumann(shapes: list[tuple[int, ...]], device: torch.device, steps: int = _NEUMANN_STEPS) -> Call:
    series, hv = NeumannSteps(_normal(shapes, device), _STEP), _normal(shapes, device)
    series.squares()

    def run() -> Tensor:
        for _ in range(steps):
            series.step(hv)
        return series.squares()

    return run


def _guarded_neumann(shapes: list[tuple[int, ...]], device: torch.device) -> Call:
    """The steps of a static program. The product is near to v, so that the norm does not grow, which would stop it."""
    v, p = (_normal(shapes, device) for _ in range(2))
    v_before, hv = ([tensor.clone() for tensor in v] for _ in range(2))
    start = torch.zeros(GUARDED_NUMBERS, dtype=torch.float64, device=device)
    start[SMALLEST] = torch.inf

    def run() -> Tensor:
        numbers, terms = start.clone(), (v, v_before)
        for _ in range(_NEUMANN_STEPS):
            neumann_guarded_step_(*terms, hv, p, numbers, _STEP)
            terms = terms[::-1]
        return numbers

    if run()[GREW]:
        raise RuntimeError("the series has stopped: there is nothing to measure")
    return run


def _foreach(shapes: list[tuple[int, ...]], device: torch.device) -> Call:
    v, hv, p = (_normal(shapes, device) for _ in range(3))

    def run() -> Tensor:
        squares = []
        for _ in range(_NEUMANN_STEPS):
            torch._foreach_add_(v, hv, alpha=-_STEP)
            torch._foreach_add_(p, v)
            squares.append(torch.stack(torch._foreach_norm(v)).square().sum())
        return torch.stack(squares)

    return run


def _comprehensions(shapes: list[tuple[int, ...]], device: torch.device) -> Call:
    first, hv, begin = (_normal(shapes, device) for _ in range(3))

    def run() -> Any:
        v, p, squares = first, begin, []
        for _ in range(_NEUMANN_STEPS):
            v = [a - _STEP * b for a, b in zip(v, hv, strict=True)]
            p = [a + b for a, b in zip(p, v, strict=True)]
            squares.append(sum(a.square().sum() for a in v))
        return v, p, squares

    return run


def _diagonal(n: int, device: torch.device) -> Tensor:
    """(1, n): as many eigenvalues as entries, over three decades, so that no row is solved within STEPS steps."""
    return torch.logspace(-3, 0, n, device=device)[None]


def _diagonal_product(n: int, device: torch.device) -> Call:
    diagonal, direction = _diagonal(n, device), torch.randn(1, n, device=device)
    return lambda: diagonal * direction


def _numbers(names: dict[str, int], like: Tensor, **first: float) -> Tensor:
    numbers = like.new_zeros(NUMBERS, 1, dtype=torch.float64)
    numbers[LANCZOS:] = numbers[names["asymmetry"]] = torch.nan
    for name, value in first.items():
        numbers[names[name]] = value
    return numbers


def _checked(run: Callable[[], Tensor], names: dict[str, int]) -> Call:
    """`run`, whose numbers say that its rows are still going on after the last step."""
    if run()[names["status"]].any():
        raise RuntimeError("the row has stopped: there is nothing to measure")
    return run


def conjugate_gradients(n: int, device: torch.device, steps: int = STEPS) -> Call:
    diagonal, b = _diagonal(n, device), torch.ones(1, n, device=device)
    start = _numbers(CONJUGATE_GRADIENT_NUMBERS, b, square=n, rz=n, pp=n, best_square=n)

    def run() -> Tensor:
        x, best, r, p, numbers = torch.zeros_like(b), torch.zeros_like(b), b.clone(), b.clone(), start.clone()
        for _ in range(steps):
            conjugate_gradient_step_(x, best, r, p, None, diagonal * p, numbers)
        return numbers

    return _checked(run, CONJUGATE_GRADIENT_NUMBERS)


def minres(n: int, device: torch.device, steps: int = STEPS) -> Call:
    diagonal, b = _diagonal(n, device), torch.ones(1, n, device=device)
    beta = n**0.5
    start = _numbers(MINRES_NUMBERS, b, square=n, beta=beta, phibar=beta, c=-1.0)

    def run() -> Tensor:
        x, w, w_old = (torch.zeros_like(b, dtype=torch.float64) for _ in range(3))
        u, r, v, numbers = b.clone(), b.clone(), b / beta, start.clone()
        u_old = u
        for _ in range(steps):
            product = diagonal * v
            minres_step_(x, w, w_old, v, u, u_old, r, None, product, numbers)
            w, w_old, u, u_old = w_old, w, product, u
        return numbers

    return _checked(run, MINRES_NUMBERS)


def _rows(section: Section, k: int, n: int) -> None:
    """Linear combinations and dot products of k rows."""
    out, a, b = (torch.randn(k, n, device=section.device) for _ in range(3))
    coefficients = torch.full((2, k), 1e-9, dtype=torch.float64, device=section.device)
    coefficients[0] = 1
    factor = coefficients[1].float()[:, None]

    def by_torch() -> Tensor:
        out.addcmul_(factor, a)
        return torch.linalg.vecdot(out, out)

    combination = {
        "auxfast": lambda _: lambda: linear_combination_(out, [a], coefficients),
        "torch": lambda _: by_torch,
    }
    dots = {"auxfast": lambda _: lambda: row_dots(a, b), "torch": lambda _: lambda: torch.linalg.vecdot(a, b)}
    section.compare(f"combination and norms, {k} x {n}", combination, launches=False)
    section.compare(f"dot products, {k} x {n}", dots, launches=False)
