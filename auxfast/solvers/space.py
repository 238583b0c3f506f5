"""Where the vectors of a linear system live: in one process, or in several that solve it together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from auxfast.ops.krylov import row_dots

Floats = npt.NDArray[np.float64]


class VectorSpace:
    """Vectors of which this process has all entries, and nobody else takes part. An operator may have another one as
    its attribute `space`, see `LinearOperator`."""

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """The dot products of the rows of `a` and `b`, both (k, n): see `row_dots`. The same in all processes."""
        return row_dots(a, b)

    def read(self, numbers: Tensor) -> Floats:
        """Float64 numbers on the host, the same in all processes, for a solver to make its decisions from."""
        on_host: Floats = numbers.cpu().numpy()  # waits for the device
        return on_host


LOCAL = VectorSpace()
