"""Curvature of a loss as a matrix that is known by its products: the Hessian and the Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import compress
from typing import ClassVar, overload

import torch
from torch import Tensor

from auxfast.autograd.engine import spread, zeros_for_none
from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit.arguments import as_tuple, check_independent, check_one_device
from auxfast.implicit.curvature import in_dtypes_of
from auxfast.implicit.derivatives import CurvatureName, derivatives_of
from auxfast.implicit.distributed import refuse_params
from auxfast.implicit.fresh_batches import FreshBatches
from auxfast.implicit.losses import Loss, LossGraph, as_loss_fns, check_call
from auxfast.solvers.linear_system import MAX_BATCH

__all__ = ["GaussNewton", "Hessian"]


class Hessian:
    """The second derivatives of a loss in n parameters, a symmetric (n, n) matrix, by its products.

        hessian = auxfast.curvature.Hessian(loss, net.parameters())
        flat = hessian.matvec(torch.randn(hessian.shape[0]))
        solution, stats = auxfast.solvers.MINRES().solve(hessian, gradients)

    A product takes vectors as tensors like `params`, or flat, with all entries behind one another in the order of
    `params`; and returns the same kind, of the same dtype, without a graph. Each product is taken in the dtypes of the
    parameters. It is the operator that `hypergradient` uses: it costs one backward pass through the graph of the
    gradient, and k of them at once cost less than k.

    The graph is that of the parameters as they are now: make another operator where they have moved. A list of
    functions is called again for every product, and so must see the same parameters as before.

    Args:
        loss: a scalar with its graph, which stays usable; a function that computes it; or a list of functions or
            `MicroBatches`, for the mean in the memory of one graph. See `hypergradient`.
        params: any iterable of tensors on one device, of any floating dtypes. Rows and columns of entries that the
            loss's gradient does not vary with, and of tensors with `requires_grad=False`, are 0.

    Attributes:
        params: a tuple of these tensors.
        shape: (n, n).
        dtype: the widest of those of `params`.
        device: that of `params`.

    Raises:
        TypeError, ValueError, RuntimeError: what `hypergradient` raises for such a loss and parameters; also where no
            parameter has `requires_grad=True`, or for `FreshBatches`, which are no one matrix.
    """

    _name: ClassVar[CurvatureName] = "hessian"

    def __init__(self, loss: Loss, params: Iterable[Tensor]) -> None:
        self._record(loss, params)

    def _record(self, loss: Loss, params: Iterable[Tensor], outputs: Tensor | Sequence[Tensor] | None = None) -> None:
        self.params = as_tuple("params", params)
        check_independent(params=self.params)
        check_one_device("params", self.params)
        active = [w for w in self.params if w.requires_grad]
        if not active:
            raise ValueError("params has no parameter with requires_grad=True: all of the matrix would be 0")
        if isinstance(loss, FreshBatches):
            raise ValueError("loss must not be FreshBatches, another matrix for every product: pass MicroBatches")
        if isinstance(loss, Tensor):
            refuse_params("params", active)
            graph = LossGraph("loss", loss, outputs)
            curvature = derivatives_of(self._name, graph, active, (), retain_graph=True)
        else:
            with preserved_state(check=check_call) as guard:
                loss_fns = as_loss_fns("loss", loss, guard.replay, with_outputs=self._name == "gauss-newton")
                curvature = derivatives_of(self._name, loss_fns, active, (), retain_graph=True)
        self._curvature = curvature
        inside = iter(curvature.in_system)
        self._in_system = [w.requires_grad and next(inside) for w in self.params]
        self._sizes = [w.numel() for w in self.params]
        self.shape = torch.Size([sum(self._sizes)] * 2)
        self.dtype = reduce(torch.promote_types, [w.dtype for w in self.params])
        self.device = self.params[0].device

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """`H v` for one tensor like each of `params`. This is what makes it a solver's matvec; it checks their number
        alone."""
        if len(vectors) != len(self.params):
            self._check_list("vectors", vectors, batched=False)
        return self._product(self._curvature, vectors)

    def batched(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """`H v` for k vectors at once: each tensor has one more axis of size k in front. The memory is that of k
        backward passes; `matmat` takes 32 at a time."""
        return self._product(self._curvature.batched, vectors)

    @overload
    def matvec(self, vector: Tensor) -> Tensor: ...

    @overload
    def matvec(self, vector: Sequence[Tensor]) -> list[Tensor]: ...

    def matvec(self, vector: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """`H v`.

        Args:
            vector: a tensor like each of `params`, in a list; or all flat, (n,).

        Raises:
            ValueError: it is of other shapes. TypeError: it is of no floating dtype.
        """
        if isinstance(vector, Tensor):
            self._check_flat("vector", vector, (self.shape[0],))
            return torch.cat([product.reshape(-1) for product in self(self._cut(vector))])
        self._check_list("vector", vector, batched=False)
        return self(vector)

    @overload
    def matmat(self, vectors: Tensor) -> Tensor: ...

    @overload
    def matmat(self, vectors: Sequence[Tensor]) -> list[Tensor]: ...

    def matmat(self, vectors: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """`H V` for k vectors, 32 of them at a time.

        Args:
            vectors: the columns of a matrix (n, k), whose product is of the same shape; or a list of tensors like
                `params` with one more axis of size k in front. All of H is `matmat(torch.eye(n))`.

        Raises:
            ValueError: they are of other shapes. TypeError: they are of no floating dtype.
        """
        if isinstance(vectors, Tensor):
            self._check_flat("vectors", vectors, (self.shape[0], vectors.shape[-1] if vectors.dim() else 0))
            pairs = zip(self._in_parts(self._cut(vectors.T)), self._sizes, strict=True)
            return torch.cat([product.reshape(vectors.shape[1], size).T for product, size in pairs])
        self._check_list("vectors", vectors, batched=True)
        return self._in_parts(vectors)

    def _in_parts(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        if not len(vectors[0]):
            return [torch.zeros_like(v) for v in vectors]
        parts = [self.batched(part) for part in zip(*(v.split(MAX_BATCH) for v in vectors), strict=True)]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def _product(self, product: Callable[[Sequence[Tensor]], list[Tensor]], vectors: Sequence[Tensor]) -> list[Tensor]:
        chosen = in_dtypes_of(self._curvature.params, list(compress(vectors, self._in_system)))
        with torch.no_grad():
            terms = zeros_for_none(spread(product(chosen) if chosen else (), self._in_system), vectors)
            return [term.to(v.dtype) for term, v in zip(terms, vectors, strict=True)]

    def _cut(self, flat: Tensor) -> list[Tensor]:
        """(..., n) -> tensors like `params`, with the axes in front"""
        parts = flat.split(self._sizes, dim=-1)
        return [part.reshape(*flat.shape[:-1], *w.shape) for part, w in zip(parts, self.params, strict=True)]

    def _check_flat(self, name: str, given: Tensor, shape: tuple[int, ...]) -> None:
        self._check_dtype(name, given)
        if given.shape != shape:
            wanted = f"({shape[0]}, k)" if len(shape) > 1 else f"({shape[0]},)"
            raise ValueError(
                f"{name} must be of shape {wanted}, or a list of tensors, not of shape {tuple(given.shape)}"
            )

    def _check_list(self, name: str, given: Sequence[Tensor], batched: bool) -> None:
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name} must be a tensor, or a list of tensors like params, not a {type(given).__name__}")
        if len(given) != len(self.params):
            raise ValueError(f"{name} must be one tensor for each of the {len(self.params)} params, not {len(given)}")
        lead = given[0].shape[:1] if batched else torch.Size()
        for i, (tensor, w) in enumerate(zip(given, self.params, strict=True)):
            self._check_dtype(f"{name}[{i}]", tensor)
            if tensor.shape != lead + w.shape or len(lead) != batched:
                wanted = f"(k, {', '.join(map(str, w.shape))})" if batched else f"{tuple(w.shape)}"
                raise ValueError(f"{name}[{i}] must be of shape {wanted}, as params[{i}], not {tuple(tensor.shape)}")

    @staticmethod
    def _check_dtype(name: str, given: Tensor) -> None:
        if not given.is_floating_point():  # the product would be rounded to integers
            raise TypeError(f"{name} must be of a floating dtype, not {given.dtype}")


class GaussNewton(Hessian):
    """The generalised Gauss-Newton matrix of a loss: its Hessian without the second derivatives of the network, and so
    positive semi-definite where the loss is convex in the network's outputs, as squares and cross-entropies are. See
    `auxfast.implicit.curvature.GaussNewton` for what it is of parameters that enter the loss in other ways too, as in a
    weight decay.

        matrix = auxfast.curvature.GaussNewton(loss, net.parameters(), outputs=logits)

    Args:
        loss, params: see `Hessian`. Functions return `(loss, outputs)`.
        outputs: the tensors of the loss's graph where the network ends and the loss begins, such as the logits; `None`
            where `loss` is made of functions.

    Raises:
        TypeError, ValueError, RuntimeError: as `Hessian` does; also where `outputs` do not fit.
    """

    _name: ClassVar[CurvatureName] = "gauss-newton"

    def __init__(self, loss: Loss, params: Iterable[Tensor], outputs: Tensor | Sequence[Tensor] | None = None) -> None:
        if outputs is not None and not isinstance(loss, Tensor):
            raise ValueError("outputs must be None where loss is made of functions: they return (loss, outputs)")
        self._record(loss, params, outputs)
