"""The Lanczos process of several rows, fully reorthogonalised, for solvers that take few steps."""

from __future__ import annotations

import torch
from torch import Tensor

from auxfast.solvers.linear_system import LinearSystem
from auxfast.solvers.preconditioners import Apply


class Lanczos:
    """Orthonormal bases of the Krylov spaces of k rows, side by side (Paige 1972).

    A step costs one product a row. Nothing waits for the device. A row that has found an invariant subspace, or whose
    product is not finite, goes on with vectors of zeros.

    Args:
        system: it has the operator.
        start: (k, n); rows of zeros are left alone.
        steps: at least 1, the most that will be taken; `steps + 1` vectors a row are held, twice as many with a
            preconditioner.
        precondition: with it, the bases are orthonormal in the inner product that it induces.
        index: (k,), the right-hand sides that the rows belong to; None: all, in order.

    Attributes:
        basis: (k, steps + 1, n).
        images: (k, steps + 1, n), the preconditioned basis; `basis` itself without a preconditioner.
        coefficients: (3, steps + 1, k) float64 on the device, the tridiagonal matrices: [0] their diagonals, NaN where
            a product was not finite; [1] what stands beside them, with the norm of `start` for entry 0, and 0 behind an
            invariant subspace; [2] of which only entry 1 is filled, with what stands above the diagonal there: [1]
            has the same if the operator is symmetric.
        taken: steps so far.
    """

    def __init__(
        self,
        system: LinearSystem,
        start: Tensor,
        steps: int,
        precondition: Apply | None = None,
        index: Tensor | None = None,
    ) -> None:
        rows, size = start.shape
        self._system, self._precondition, self._index = system, precondition, index
        self._rounding = 10 * torch.finfo(start.dtype).eps
        self.basis = start.new_zeros(rows, steps + 1, size)
        self.images = self.basis if precondition is None else torch.zeros_like(self.basis)
        self.coefficients = torch.zeros(3, steps + 1, rows, dtype=torch.float64, device=start.device)
        self._diagonal, self._beside, self._above = self.coefficients
        self.taken = 0
        norms, image = self._norms_and_images(start)
        self._append(start, image, norms, norms > 0)

    def step(self) -> None:
        """Multiplies the last vectors and appends the next ones."""
        j = self.taken
        basis, images = self.basis[:, : j + 1], self.images[:, : j + 1]
        vector = self._system.product(self.images[:, j].contiguous(), self._index)
        negligible = self._rounding * self._norms_and_images(vector)[0]
        for _ in range(2):  # one Gram-Schmidt pass leaves what rounding put back
            overlap = self._system.space.sum(images @ vector[..., None])  # (k, j + 1, 1)
            vector = vector - (basis.mT @ overlap)[..., 0]
            self._diagonal[j] += overlap[:, j, 0]
            if j == 1:
                self._above[1] += overlap[:, 0, 0]
        norms, image = self._norms_and_images(vector)
        self._diagonal[j] += norms - norms  # NaN where that is not finite
        self.taken += 1
        self._append(vector, image, norms, norms > negligible)

    def is_exhausted(self) -> bool:
        """Whether no row has a vector left to multiply; waits for the device."""
        return not self._system.space.read(self._beside[self.taken]).any()

    def _norms_and_images(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """(k,) in the preconditioner's norm, and (k, n), the preconditioned vector."""
        image = vector if self._precondition is None else self._precondition(vector)
        return self._system.space.dots(vector, image).clamp(min=0).sqrt(), image

    def _append(self, vector: Tensor, image: Tensor, norms: Tensor, kept: Tensor) -> None:
        kept = kept & norms.isfinite()
        self._beside[self.taken] = torch.where(kept, norms, 0)
        for store, row in ((self.basis, vector), (self.images, image))[: 1 if self.images is self.basis else 2]:
            store[:, self.taken] = torch.where(kept[:, None], row / norms[:, None], 0)
