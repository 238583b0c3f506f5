"""Terms of a loss that are sums over the entries of a parameter, such as a weight decay: their second derivatives are a
diagonal, and a product with it is one operation where autograd runs a handful of nodes for each parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.engine import vjp
from auxfast.autograd.graph import reaches
from auxfast.autograd.hooks import has_hook

# Nodes whose gradients are products and sums entry by entry. Where no other node lies between a gradient and the
# parameter that it is in, and both have one shape, each entry depends on its own alone: a node that broadcasts makes
# the shape larger, and none of these makes it smaller.
_ELEMENTWISE = frozenset(
    f"{name}Backward{i}" for name in ("Abs", "Add", "Mul", "Neg", "Pow", "Sgn", "Sub") for i in (0, 1)
)
# Nodes through which penalties are looked for. What is found is judged by its own graph, so that a name too many or too
# few here changes no answer.
_PASSED = _ELEMENTWISE | frozenset(
    f"{name}Backward{i}" for name in ("Cat", "Div", "Dot", "Mean", "Stack", "Sum", "Unsqueeze", "View") for i in (0, 1)
)


class SeparableTerms:
    """While active, the one pass that records the gradient of a loss leaves out the separable terms, and keeps their
    gradients here.

    Args:
        loss: the loss.
        params: what it is differentiated in.

    Attributes:
        places: for each gradient in here, the index of its parameter.
        gradients: with their graphs. Entry i of one depends on entry i of its parameter and on no other of `params`.
    """

    def __init__(self, loss: Tensor, params: Sequence[Tensor]) -> None:
        self.places: list[int] = []
        self.gradients: list[Tensor] = []
        self._params = params
        self._leaves = {id(param): i for i, param in enumerate(params) if param.grad_fn is None}
        self._results = {(param.grad_fn, param.output_nr): i for i, param in enumerate(params) if param.grad_fn}
        self._root = loss.grad_fn
        self._handles: list[Any] = []

    def __enter__(self) -> SeparableTerms:
        if self._params:
            self._handles = [node.register_hook(self._hook(places)) for node, places in self._candidates(self._root)]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def diagonals(self) -> dict[int, Tensor]:
        """The second derivatives, by the index of the parameter; those that are linear terms alone have none."""
        if not self.places:
            return {}
        places = sorted(set(self.places))
        params = [self._params[place] for place in places]
        found = vjp(self.gradients, params, [torch.ones_like(gradient) for gradient in self.gradients])
        return {place: diagonal for place, diagonal in zip(places, found, strict=True) if diagonal is not None}

    def _candidates(self, root: Any) -> list[tuple[Any, list[int | None]]]:
        """The nodes near the loss with an edge to a parameter, and the parameter of each of their edges."""
        found, seen, pending = [], {root}, [root]
        for node in pending:  # the list grows while the loop runs
            if type(node).__name__ not in _PASSED:
                continue
            edges = node.next_functions
            places = [None if edge[0] is None else self._place(edge) for edge in edges]
            if any(place is not None for place in places):
                found.append((node, places))
            for following, _ in edges:
                if following is not None and following not in seen:
                    seen.add(following)
                    pending.append(following)
        return found

    def _place(self, edge: tuple[Any, int]) -> int | None:
        """Index of the parameter that the edge leads to."""
        leaf = self._leaves.get(id(getattr(edge[0], "variable", None)))
        return self._results.get(edge) if leaf is None else leaf

    def _hook(self, places: Sequence[int | None]) -> Callable[..., Any]:
        def hook(outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> Any:
            kept = list(outgoing)
            for i, (gradient, place) in enumerate(zip(outgoing, places, strict=True)):
                if gradient is not None and place is not None and self._is_separable(gradient, place):
                    self.places.append(place)
                    self.gradients.append(gradient)
                    kept[i] = None
            return tuple(kept)

        return hook

    def _is_separable(self, gradient: Tensor, place: int) -> bool:
        param = self._params[place]
        if gradient.grad_fn is None or gradient.shape != param.shape or gradient.dtype != param.dtype:
            return False
        if has_hook(param):  # a hook sees the sum of all gradients in the parameter
            return False
        pending, others = [gradient.grad_fn], []
        for node in pending:  # the list grows while the loop runs
            if type(node).__name__ not in _ELEMENTWISE:
                others.append(node)
                continue
            for edge in node.next_functions:
                found = None if edge[0] is None else self._place(edge)
                if found is None and edge[0] is not None and edge[0] not in pending:
                    pending.append(edge[0])
                elif found not in (None, place):
                    return False
        return not reaches(others, self._params)
