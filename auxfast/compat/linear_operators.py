"""Linear operators of curvlinops and SciPy as auxfast's solvers take them, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from auxfast.solvers.base import is_symmetric


class ParameterOperator(Protocol):
    """A symmetric operator that knows its parameters, such as `auxfast.curvature.Hessian`; see also
    `solvers.LinearOperator`."""

    @property
    def params(self) -> Sequence[Tensor]:
        """The parameters, of the shapes, dtype and device of the tensors that it multiplies."""
        ...

    def __call__(self, vectors: Sequence[Tensor], /) -> Sequence[Tensor]: ...

    def batched(self, vectors: Sequence[Tensor], /) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class _FromCurvlinops:
    """Products of an operator of curvlinops, for which the axis of a batch is the last one, not the first."""

    operator: Any

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad():  # solvers work without, and KFAC computes its factors at the first product
            return [product.detach() for product in self.operator @ list(vectors)]

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return [product.movedim(-1, 0) for product in self([v.movedim(0, -1) for v in vectors])]


@dataclass(frozen=True)
class _FromScipy:
    """Products of an operator of SciPy."""

    operator: Any
    symmetric: bool

    @property
    def transposed(self) -> _FromScipy:
        return self if self.symmetric else _FromScipy(self.operator.T, False)

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return [product[0] for product in self.batched([v[None] for v in vectors])]

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        columns = _rows(vectors).T.cpu()  # (n, k)
        if columns.dtype not in (torch.float32, torch.float64):
            columns = columns.float()  # NumPy has no bfloat16
        rows = _real("operator", self.operator.matmat(columns.numpy())).T.to(vectors[0])
        parts = rows.split([v.shape[1:].numel() for v in vectors], dim=1)
        return [part.reshape(v.shape) for part, v in zip(parts, vectors, strict=True)]


def from_curvlinops(operator: Any) -> _FromCurvlinops:
    """A curvlinops operator, such as `HessianLinearOperator`, as a solver's `matvec`; one of its inverses, such as
    KFAC's, for `solvers.InverseOperator`.

    Args:
        operator: a square `PyTorchLinearOperator` over lists of tensors.

    Raises:
        TypeError: `operator` is none.
    """
    if not hasattr(operator, "_matmat") or not hasattr(operator, "SELF_ADJOINT"):
        raise TypeError(f"operator must be a PyTorchLinearOperator of curvlinops, not a {type(operator).__name__}")
    return _FromCurvlinops(operator)


def from_scipy(operator: Any, *, symmetric: bool = True) -> _FromScipy:
    """A SciPy operator as a solver's `matvec`, or for `solvers.InverseOperator`: it multiplies the entries of all
    tensors one after another, on the CPU.

    Args:
        operator: a square `scipy.sparse.linalg.LinearOperator`, or what `aslinearoperator` makes one of: a matrix,
            dense or sparse.
        symmetric: whether it is, which most solvers need; otherwise `GMRES`, or `NormalEquations`, which multiplies
            with its transpose (`rmatvec`), too.

    Raises:
        TypeError: `operator` is none of these.
        ModuleNotFoundError: SciPy is not installed.
    """
    return _FromScipy(_optional("scipy.sparse.linalg", "scipy").aslinearoperator(operator), symmetric)


def to_curvlinops(operator: ParameterOperator) -> Any:
    """A `PyTorchLinearOperator` of curvlinops, for its spectra, traces and diagonals.

    Args:
        operator: such as `auxfast.curvature.Hessian(loss, params)`.

    Raises:
        TypeError: `operator` has no `params` or no `batched`, or says that it is not symmetric.
        ModuleNotFoundError: curvlinops is not installed.
    """
    params = _params_of(operator)
    base: Any = _optional("curvlinops._torch_base", "curvlinops-for-pytorch").PyTorchLinearOperator

    class Operator(base):  # type: ignore[misc] # of a package that may not be there
        SELF_ADJOINT = True
        device, dtype = params[0].device, _widest_dtype(params)

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [product.movedim(0, -1) for product in operator.batched([x.movedim(-1, 0) for x in X])]

    shapes = [tuple(w.shape) for w in params]
    return Operator(shapes, shapes)


def to_scipy(operator: ParameterOperator) -> Any:
    """A `scipy.sparse.linalg.LinearOperator` (n, n), for SciPy's `eigsh`, `cg`, `minres` and the like; n counts the
    entries of all parameters, one after another.

    Args:
        operator: such as `auxfast.curvature.Hessian(loss, params)`.

    Raises:
        TypeError: `operator` has no `params` or no `batched`, or says that it is not symmetric.
        ModuleNotFoundError: SciPy is not installed.
    """
    params = _params_of(operator)
    sizes = [w.numel() for w in params]

    def matmat(columns: Any) -> Any:
        rows = _real("the vector", columns).T.to(params[0].device, dtype)  # (k, n)
        parts = [part.reshape(len(rows), *w.shape) for part, w in zip(rows.split(sizes, dim=1), params, strict=True)]
        return _rows(operator.batched(parts)).T.to("cpu", numpys.dtype).numpy()

    def matvec(vector: Any) -> Any:
        return matmat(vector.reshape(-1, 1))

    dtype = _widest_dtype(params)
    numpys = torch.empty(0, dtype=torch.promote_types(dtype, torch.float32))  # NumPy has no bfloat16
    linalg: Any = _optional("scipy.sparse.linalg", "scipy")
    return linalg.LinearOperator(
        (sum(sizes), sum(sizes)),
        matvec=matvec,
        rmatvec=matvec,
        matmat=matmat,
        rmatmat=matmat,
        dtype=numpys.numpy().dtype,
    )


def _widest_dtype(params: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, [w.dtype for w in params])


def _rows(vectors: Sequence[Tensor]) -> Tensor:
    """The k vectors of tensors (k, ...) as rows (k, n)."""
    return torch.cat([v.detach().reshape(len(v), v.shape[1:].numel()) for v in vectors], dim=1)


def _real(name: str, array: Any) -> Tensor:
    tensor = torch.as_tensor(array)
    if tensor.is_complex():
        raise TypeError(f"{name} must be real, not {tensor.dtype}: take its real and imaginary parts one by one")
    return tensor


def _params_of(operator: Any) -> list[Tensor]:
    if not hasattr(operator, "params") or not hasattr(operator, "batched"):
        raise TypeError(
            "operator must have `params` and `batched`, as auxfast.curvature.Hessian has, and a "
            f"{type(operator).__name__} has not"
        )
    if not is_symmetric(operator):
        raise TypeError(f"operator must be symmetric, for it stands for its transpose too, not {operator!r:.60}")
    return list(operator.params)


def _optional(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{package} is not installed, and this needs it: pip install {package}") from error
