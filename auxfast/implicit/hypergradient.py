"""The hypergradient by the implicit function theorem: the paper's equation 4, and the direct gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxfast.implicit.curvature import Curvature
from auxfast.solvers.base import TRIVIAL, Solver, SolveStats


@dataclass(frozen=True)
class HypergradientResult:
    """Gradients aligned with `outer_params`, of their shapes and dtypes, and how the solve went."""

    grads: tuple[Tensor, ...]
    stats: SolveStats


def hypergradient(
    outer_loss: Tensor,
    inner_loss: Tensor,
    inner_params: Iterable[Tensor],
    outer_params: Iterable[Tensor],
    *,
    solver: Solver,
    retain_graph: bool = False,
) -> HypergradientResult:
    """Gradient of `outer_loss(W*(phi), phi)` in `phi`, where `W*(phi)` minimises the inner loss:

        d outer / d phi  -  (d outer / d W) H^-1 (d^2 inner / d W d phi),    H = d^2 inner / d W^2

    with all derivatives taken at the parameters as they are, so it is as good as they are close to `W*`, and
    as the solver is at `H^-1`. Nothing is written to any `.grad`.

    Args:
        outer_loss: one element; depends on `inner_params`, and may depend on `outer_params` (whence the
            direct gradient).
        inner_loss: one element; depends on `inner_params` and, to be of any use, on `outer_params`. The two
            losses may share a part of their graph.
        inner_params: `W`, any iterable of tensors, generators included, of one dtype on one device. Left out
            of the system, since nothing of `phi` reaches the outer loss through them: those with
            `requires_grad=False`, those that the inner loss does not use, and those in which its gradient is
            constant.
        outer_params: `phi`, any iterable of tensors, of any floating dtypes. These and `inner_params` need
            not be leaves, but none may be computed from another.
        solver: how to apply `H^-1`, say `auxfast.solvers.Neumann(steps=20, step_size=0.1)`.
        retain_graph: keep both graphs for further use. Otherwise they are spent: that of `outer_loss` before
            the solve unless `inner_loss` needs a part of it, that of `inner_loss` as far as the last product
            runs through it; what is then left goes with the last reference to `inner_loss`.

    Returns:
        The gradients, zeros (never `None`) for a parameter that plays no part or has `requires_grad=False`,
        and the solver's statistics.

    Raises:
        TypeError: a loss that is not a tensor, or parameters that are not an iterable of tensors.
        ValueError: a loss of more than one element or without a graph to the inner parameters; parameters
            that are none, repeated, in both lists, computed from one another, complex, or (the inner ones)
            of several dtypes or devices.
        RuntimeError: a graph that was freed before, or an inner loss that went through `torch.compile`.
    """
    inner, outer = _as_tuple("inner_params", inner_params), _as_tuple("outer_params", outer_params)
    _check_independent(inner, outer)
    _check_uniform(inner)
    _check_loss("outer_loss", outer_loss)
    _check_loss("inner_loss", inner_loss)
    active_inner = [w for w in inner if w.requires_grad]
    active_outer = [phi for phi in outer if phi.requires_grad]

    inner_graph = _graph([inner_loss.grad_fn])
    _check_not_compiled(inner_graph)
    # Common leaves do not count: their nodes are empty.
    keep_outer = retain_graph or any(n.next_functions for n in _graph([outer_loss.grad_fn]) & inner_graph)
    outer_grads = _grad("outer_loss", outer_loss, [*active_inner, *active_outer], retain_graph=keep_outer)
    inner_grads = _grad("inner_loss", inner_loss, active_inner, retain_graph=True, create_graph=True)
    rhs, direct = outer_grads[: len(active_inner)], outer_grads[len(active_inner) :]
    _check_connected("outer_loss", rhs)
    _check_connected("inner_loss", inner_grads)

    # (gradient, parameter, right-hand side), without the parameters whose gradient is constant
    system = [
        (grad, w, torch.zeros_like(w) if b is None else b)
        for grad, w, b in zip(inner_grads, active_inner, rhs, strict=True)
        if grad is not None and grad.requires_grad
    ]
    mixed: Sequence[Tensor | None] = [None] * len(active_outer)
    stats = TRIVIAL
    if system:
        grads, params, b = zip(*system, strict=True)
        curvature = Curvature(grads, params)
        solution, stats = solver.solve(curvature.matvec, b)
        mixed = curvature.mixed(solution, active_outer, retain_graph)

    total = iter([_difference(*terms) for terms in zip(active_outer, direct, mixed, strict=True)])
    return HypergradientResult(
        tuple(next(total) if phi.requires_grad else torch.zeros_like(phi) for phi in outer), stats
    )


def _difference(phi: Tensor, direct: Tensor | None, mixed: Tensor | None) -> Tensor:
    """`direct - mixed`, always a tensor of its own (autograd may give one tensor to two parameters)."""
    if mixed is None:
        return torch.zeros_like(phi) if direct is None else direct.detach().clone()
    return -mixed if direct is None else direct - mixed


def _as_tuple(name: str, params: Iterable[Tensor]) -> tuple[Tensor, ...]:
    given: Any = params
    if isinstance(given, (Tensor, torch.nn.Module)) or not isinstance(given, Iterable):
        hint = "module.parameters()" if isinstance(given, torch.nn.Module) else "a list"
        raise TypeError(f"{name} must be an iterable of tensors, not a {type(given).__name__}: pass {hint}")
    items = tuple(given)
    for i, item in enumerate(items):
        if not isinstance(item, Tensor):
            raise TypeError(f"{name} must hold tensors, but number {i} is a {type(item).__name__}")
        if item.is_complex():
            raise ValueError(f"{name} must hold real tensors, but number {i} is {item.dtype}")
    if not items:
        raise ValueError(f"{name} is empty (a generator that was used up before also is)")
    return items


def _check_independent(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> None:
    places: dict[int, str] = {}
    for name, params in (("inner_params", inner), ("outer_params", outer)):
        for i, param in enumerate(params):
            place = f"{name}[{i}]"
            if (before := places.setdefault(id(param), place)) != place:
                raise ValueError(f"{place} is the same tensor as {before}: each may be given once")
    nodes = {p.grad_fn: places[id(p)] for p in (*inner, *outer) if p.grad_fn is not None}
    for node, place in nodes.items():  # a path from one to another would count a dependence twice
        for above in _graph(following for following, _ in node.next_functions):
            origin = nodes.get(above) or places.get(id(getattr(above, "variable", None)))
            if origin is not None:
                raise ValueError(f"{place} is computed from {origin}: parameters must be independent")


def _check_uniform(inner: Sequence[Tensor]) -> None:
    for what in ("dtype", "device"):
        values = {getattr(param, what) for param in inner}
        if len(values) > 1:
            listed = " and ".join(sorted(map(str, values)))
            raise ValueError(f"inner_params must be of one {what}, not of {listed}")


def _check_loss(name: str, loss: Tensor) -> None:
    given: Any = loss
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, not a {type(given).__name__}")
    if given.numel() != 1:
        raise ValueError(f"{name} must be a scalar, not of shape {tuple(given.shape)}: take its mean or sum")
    if not given.requires_grad:
        raise ValueError(f"{name} has no graph: it was computed under torch.no_grad(), detached, or from no parameter")


def _check_connected(name: str, grads: Sequence[Tensor | None]) -> None:
    if all(grad is None for grad in grads):
        raise ValueError(
            f"{name} does not depend on any of inner_params: were they replaced since it was computed, or do "
            "all have requires_grad=False?"
        )


def _grad(
    name: str, loss: Tensor, params: Sequence[Tensor], *, retain_graph: bool, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    if not params:
        return ()
    try:
        return torch.autograd.grad(
            loss, params, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            f"The graph of {name} was freed before, by backward() or by an earlier hypergradient(). Compute "
            "the loss anew, or let the call that came before keep it with retain_graph=True."
        ) from error


def _check_not_compiled(inner_graph: Iterable[Any]) -> None:
    """torch.compile records a backward that looks constant: second derivatives would be zeros without a word."""
    if any("CompiledFunction" in node.name() for node in inner_graph):
        raise RuntimeError(
            "inner_loss was computed with torch.compile, which has no second derivatives: compute it without, for the "
            "outer steps at least (the outer loss may stay compiled)"
        )


def _graph(start: Iterable[Any]) -> set[Any]:
    """The nodes of a recorded graph, from `start` to the leaves."""
    seen: set[Any] = {None}
    stack = [*start]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return seen - {None}
