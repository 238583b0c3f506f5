"""Nodes of a recorded autograd graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction


def walk(start: Iterable[Any], until: Collection[tuple[Any, int]] = ()) -> Iterator[Any]:
    """The nodes of the graph from `start` to the leaves, or to the edges (node, index of its input) in `until`; each
    once, and found only as far as they are asked for."""
    found = [*dict.fromkeys(node for node in start if node is not None)]
    seen = set(found)
    for node in found:  # the list grows while the loop runs
        yield node
        for edge in node.next_functions:
            if edge[0] is not None and edge[0] not in seen and edge not in until:
                seen.add(edge[0])
                found.append(edge[0])


def by_type(nodes: Iterable[Any]) -> dict[type, list[Any]]:
    """The nodes by their types, of which there are far fewer: what is asked of a node's type is asked once for each."""
    found: dict[type, list[Any]] = defaultdict(list)
    for node in nodes:
        found[type(node)].append(node)
    return found


def reaches(start: Iterable[Any], tensors: Sequence[Tensor], until: Collection[tuple[Any, int]] = ()) -> bool:
    """Whether the graph from the nodes `start` leads to one of the tensors; `until`: see `walk`."""
    leaves = {id(t) for t in tensors if t.grad_fn is None}
    results = {t.grad_fn for t in tensors if t.grad_fn is not None}
    return any(node in results or id(getattr(node, "variable", None)) in leaves for node in walk(start, until))


def functions_of(nodes: Mapping[type, Iterable[Any]]) -> list[Any]:
    """The nodes (by type) that belong to a `torch.autograd.Function`."""
    return [node for kind, found in nodes.items() if issubclass(kind, BackwardCFunction) for node in found]


def function_class(node: Any) -> Any:
    """Class of the `torch.autograd.Function` that made the node; `None` for other nodes, and where torch has renamed
    the attribute that leads to it: then nothing is known of the Function."""
    return getattr(type(node), "_forward_cls", None)


def is_compiled(function: Any) -> bool:
    return "CompiledFunction" in type(function).__name__


def named(nodes: Mapping[type, Iterable[Any]], names: Collection[str]) -> list[Any]:
    """The nodes (by type) whose types have one of these names."""
    return [node for kind, found in nodes.items() if kind.__name__ in names for node in found]


def leaves_into(nodes: Mapping[type, Iterable[Any]], names: Collection[str]) -> list[Any]:
    """The leaf tensors that go straight into a node (by type) of one of these names."""
    found = [node.next_functions[0][0] for node in named(nodes, names)]
    return [node.variable for node in found if hasattr(node, "variable")]
