"""Rows, coefficients, shapes and whole solves for the tests of the Krylov solvers' vector work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from auxfast.ops.krylov import (
    AFTER_PRECONDITIONER,
    BEFORE_PRECONDITIONER,
    CONJUGATE_GRADIENT_NUMBERS,
    LANCZOS,
    MINRES_NUMBERS,
    NUMBERS,
    REACHED,
    row_dots,
)

DTYPES = [torch.float32, torch.float64]
SHAPES = {
    "one": (1, 1),
    "no rows": (0, 5),
    "empty rows": (3, 0),
    "around a vector": (4, 17),
    "around a block of vectors": (3, 65),
    "around a GPU's block": (2, 2049),
    "one row of a chunk": (1, 32768),
    "rows just above a chunk": (3, 32769),
    "long": (1, 200_003),
    "long rows, several": (5, 70_001),
    "thousands of rows": (4099, 3),
    "many rows of one": (70_000, 1),
    "chunks of several rows": (37, 5000),
}


def rows(shape: tuple[int, int], count: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(count)]


def coefficients_for(out: Tensor, terms: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1 + terms, len(out), generator=generator, dtype=torch.float64).to(out.device)


STEP_SHAPES = {
    "one": (1, 1),
    "no rows": (0, 5),
    "empty rows": (3, 0),
    "around a vector": (4, 17),
    "around a block's threads": (2, 257),
    "just above a GPU's block": (2, 2049),
    "more than a chunk": (2, 32_771),
    "long, for several threads": (1, 70_003),
    "many rows": (301, 3),
    "chunks of several rows": (23, 3001),
}

Step = Callable[..., None]
"""`conjugate_gradient_step_` or `minres_step_`, their references, or other kernels with the same arguments."""


@dataclass
class DiagonalSystems:
    """k diagonal systems, of which the fifth has stopped before the first step.

    Attributes:
        rhs, diagonal: (k, n).
        precondition: (n,), the diagonal of a preconditioner.
    """

    rhs: Tensor
    diagonal: Tensor
    precondition: Tensor

    @classmethod
    def of(cls, shape: tuple[int, int], dtype: torch.dtype, device: str) -> DiagonalSystems:
        """Systems (k, n) of which the second is negative definite, the third zero, and the fourth has NaN in its
        products."""
        rhs, diagonal = rows(shape, 2, dtype, device)
        diagonal = diagonal.abs() + 0.1
        for row, value in ((1, -1.0), (2, 0.0), (3, torch.nan)):
            diagonal[row : row + 1] *= value
        return cls(rhs, diagonal, torch.linspace(0.5, 2, shape[1], dtype=torch.float64).to(device, dtype))

    def _numbers(self, names: dict[str, int], **first: Tensor) -> Tensor:
        numbers = self.rhs.new_zeros(NUMBERS, len(self.rhs), dtype=torch.float64)
        numbers[LANCZOS:] = numbers[names["asymmetry"]] = torch.nan
        numbers[names["status"], 4:5] = REACHED
        square = row_dots(self.rhs, self.rhs)
        for name, value in (first | {"square": square, "tolerance": 1e-3 * square.sqrt()}).items():
            numbers[names[name]] = value
        return numbers

    def conjugate_gradients(self, step: Step, steps: int, preconditioned: bool) -> dict[str, Tensor]:
        """What a few steps leave behind, but for the direction, which is rounding after the last step there is."""
        x, r = torch.zeros_like(self.rhs), self.rhs.clone()
        best, z = x.clone(), self.precondition * r if preconditioned else r
        p, rz, pp, rr = z.clone(), row_dots(r, z), row_dots(z, z), row_dots(r, r)
        numbers = self._numbers(CONJUGATE_GRADIENT_NUMBERS, rz=rz, pp=pp, best_square=rr)
        for _ in range(steps):
            product = self.diagonal * p
            if preconditioned:
                step(x, best, r, p, z, product, numbers, BEFORE_PRECONDITIONER)
                z = self.precondition * r
                step(x, best, r, p, z, product, numbers, AFTER_PRECONDITIONER)
            else:
                step(x, best, r, p, None, product, numbers)
        return {"x": x, "best": best, "numbers": numbers, "r": r}

    def minres(self, step: Step, steps: int, preconditioned: bool) -> dict[str, Tensor]:
        """What a few steps leave behind, but for the Lanczos vector: after the last step there is it is rounding."""
        r, u = self.rhs.clone(), self.rhs.clone()
        x, w, w_old = (torch.zeros_like(r, dtype=torch.float64) for _ in range(3))
        z, u_old = self.precondition * r if preconditioned else r, u
        beta = row_dots(r, z).sqrt()
        v = z / beta[:, None].to(z.dtype)
        numbers = self._numbers(MINRES_NUMBERS, beta=beta, phibar=beta, c=-torch.ones_like(beta))
        for _ in range(steps):
            product = self.diagonal * v
            if preconditioned:
                step(x, w, w_old, v, u, u_old, r, None, product, numbers, BEFORE_PRECONDITIONER)
                z = self.precondition * product
                step(x, w, w_old, v, u, u_old, r, z, product, numbers, AFTER_PRECONDITIONER)
            else:
                step(x, w, w_old, v, u, u_old, r, None, product, numbers)
            w, w_old, u, u_old = w_old, w, product, u
        return {"x": x, "numbers": numbers, "r": r}


def assert_same_solves(results: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    """All vectors and numbers are near to each other, relative to the largest of each."""
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    for name, value in wanted.items():
        largest = float(value.nan_to_num(0, 0, 0).abs().amax()) if value.numel() else 0.0
        atol = tolerance * max(1.0, largest)
        torch.testing.assert_close(results[name], value, rtol=tolerance, atol=atol, equal_nan=True, msg=name)
