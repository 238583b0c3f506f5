"""Backward passes by autograd's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from auxfast.autograd.transforms import in_transform_of_torch_func

Result = TypeVar("Result")
Output = Tensor | GradientEdge
"""A result in a graph: the tensor, or the edge at which its gradients come together."""

# torch.autograd.grad hands to this method after checks in Python that take an eighth of a small Hessian product. The
# engine itself checks shapes and devices.
_run_backward: Any = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)
_present_task: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
_own_tasks: set[int] = set()
_keeps_graph: Callable[[], bool] | None = getattr(
    getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None
)


def vjp(
    outputs: Sequence[Output],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Products `vectors^T d outputs / d inputs`, `None` for an input that plays no part. They are dense, also where a
    module of embeddings makes sparse gradients."""
    gradients = run_engine(outputs, inputs, vectors, retain_graph, create_graph)
    for grad in gradients:  # a loop, since this is done for every product
        if grad is not None and grad.is_sparse:
            with torch.set_grad_enabled(create_graph):
                return tuple(each if each is None else each.to_dense() for each in gradients)
    return gradients


def run_engine(
    outputs: Sequence[Output],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    retain_graph: bool = True,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """`vjp` as the engine gives it: this calls nothing else of torch."""
    if _run_backward is None:
        mixed: Any = outputs  # its types know of lists of one kind only
        return torch.autograd.grad(
            mixed, inputs, vectors, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )
    gradients: tuple[Tensor | None, ...] = _run_backward(
        tuple(outputs), tuple(vectors), retain_graph, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return gradients


def in_own_task(function: Callable[[], Result]) -> Result:
    """`function()`. Where a backward pass is under way, another one is begun for it: nodes that are called from Python
    compute only what the present pass wants of them, so that a `BatchedBackward` would find `None`. That takes 0.1 ms,
    and nothing within another call of this."""
    if _run_backward is None or _present_task is None or in_transform_of_torch_func():
        return function()
    if (task := _present_task()) == -1 or task in _own_tasks:
        return function()
    results: list[Result] = []

    def call(_: Tensor) -> None:
        task = _present_task()
        _own_tasks.add(task)
        try:
            results.append(function())
        finally:
            _own_tasks.discard(task)

    with torch.enable_grad():
        start = torch.ones((), requires_grad=True)
        start.register_hook(call)
        end = start.clone()
    _run_backward((end,), (torch.ones_like(end),), False, False, (), True, accumulate_grad=True)
    return results[0]


def keeps_graph() -> bool:
    """Whether the backward pass that is under way was told to keep its graph (`retain_graph`); True where torch does
    not tell: what a node holds then goes with the node."""
    return _keeps_graph is None or _keeps_graph()


def spread(tensors: Iterable[Tensor | None], places: Sequence[bool]) -> list[Tensor | None]:
    """The inverse of `itertools.compress`: the next of `tensors` at each place that is true, `None` at the others."""
    rest = iter(tensors)
    return [next(rest) if place else None for place in places]


def zeros_for_none(gradients: Iterable[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """`gradients`, with zeros of the shapes in `like` where there is `None`."""
    return [torch.zeros_like(t) if grad is None else grad for grad, t in zip(gradients, like, strict=True)]
