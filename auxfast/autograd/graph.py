"""Nodes of a recorded autograd graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction


def graph_from(start: Iterable[Any], until: Collection[tuple[Any, int]] = ()) -> set[Any]:
    """Nodes of the graph from `start` to the leaves, or to the edges (node, index of its input) in `until`."""
    seen = {node for node in start if node is not None}
    found = [*seen]
    for node in found:  # the list grows while the loop runs
        for edge in node.next_functions:
            if edge[0] is not None and edge[0] not in seen and edge not in until:
                seen.add(edge[0])
                found.append(edge[0])
    return seen


def reaches(start: Any, tensors: Iterable[Tensor]) -> bool:
    """Whether the graph from the node `start` leads to one of the tensors."""
    nodes = graph_from([start])
    leaves = {id(node.variable) for node in nodes if hasattr(node, "variable")}
    return any(id(t) in leaves if t.grad_fn is None else t.grad_fn in nodes for t in tensors)


def functions_of(nodes: Iterable[Any]) -> list[Any]:
    """The nodes that belong to a `torch.autograd.Function`."""
    return [node for node in nodes if isinstance(node, BackwardCFunction)]


def function_class(node: Any) -> Any:
    """Class of the `torch.autograd.Function` that made the node; `None` for other nodes, and where torch has renamed
    the attribute that leads to it: then nothing is known of the Function."""
    return getattr(type(node), "_forward_cls", None)


def is_compiled(function: Any) -> bool:
    return "CompiledFunction" in type(function).__name__


def leaves_into(nodes: Iterable[Any], names: Collection[str]) -> list[Any]:
    """The leaf tensors that go straight into a node of one of these names."""
    found = [node.next_functions[0][0] for node in nodes if type(node).__name__ in names]
    return [node.variable for node in found if hasattr(node, "variable")]
