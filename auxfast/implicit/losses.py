"""Losses as `hypergradient` takes them: a tensor, a function that computes one, or functions of micro-batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from auxfast.autograd.engine import vjp
from auxfast.autograd.grad_scaler import UnknownScaleError, scale_of
from auxfast.autograd.graph import function_class, functions_of, graph_from
from auxfast.autograd.transforms import in_transform_of_torch_func
from auxfast.implicit.arguments import shares_of
from auxfast.implicit.distributed import SpreadOverProcesses, fault_of, refuse_calls, refuse_calls_of_rank
from auxfast.implicit.fresh_batches import FreshBatches
from auxfast.implicit.ranks import Ranks, attempt

Loss = Tensor | Callable[[], Any] | Sequence[Callable[[], Any] | tuple[float, Callable[[], Any]]]
"""A scalar, a function of no arguments that computes it, or a sequence of such functions or of pairs
`(weight, function)`, whose weighted mean it is. A function without a weight has weight 1. For Gauss-Newton products the
functions of the inner loss return `(loss, outputs)`."""


_REENTRANT = (
    "went through a reentrant torch.utils.checkpoint, which hides the parameters inside of it from "
    "torch.autograd.grad: pass use_reentrant=False to checkpoint()"
)
_SCALED = (
    "was multiplied by the scale of a torch.amp.GradScaler in a part of it, or as one of a list of losses, or by a "
    "number equal to the scale: pass it without, or as scaler.scale(loss) of the whole loss, which is recognised"
)
_CHANGED = "modified by an inplace operation"  # autograd's words


LossKind = Literal["tensor", "functions", "fresh"]
GivenKind = Literal["tensor", "functions", "weighted", "fresh"]
_KINDS: dict[GivenKind, str] = {
    "tensor": "a tensor",
    "functions": "functions without weights (each counts 1)",
    "weighted": "pairs (weight, function), as MicroBatches are",
    "fresh": "FreshBatches",
}


class LossGraph:
    """One computed loss with its graph.

    Attributes:
        kind: see `LossFns`.
        loss, outputs: as given.
        ranks: those whose losses this is one of; `None`: this process alone.
        share: what the gradient of this loss is multiplied by in that of the whole one.
        scale: what a `torch.amp.GradScaler` has multiplied the loss by; 1 where none has. Backward passes keep it, for
            the sake of float16, and what comes out of them is divided by it.

    Raises:
        TypeError: it is not a tensor. ValueError: it has more than one element, or no graph, or was scaled in parts.
            RuntimeError: a transform of torch.func is under way, or the graph was freed.
    """

    kind: LossKind = "tensor"

    def __init__(
        self,
        name: str,
        loss: Loss,
        outputs: Tensor | Sequence[Tensor] | None = None,
        ranks: Ranks | None = None,
        share: float = 1.0,
    ) -> None:
        given: Any = loss
        if not isinstance(given, Tensor):
            kind = type(given).__name__
            if callable(given):
                raise TypeError(f"{name} must be a tensor of one element, not a {kind}: call it")
            hint = ": combine them into one" if _are_tensors(given) else ""
            raise TypeError(f"{name} must be a tensor, or a function that returns one, not a {kind}{hint}")
        if given.numel() != 1:
            raise ValueError(f"{name} must be a scalar, not of shape {tuple(given.shape)}: take its mean or sum")
        if in_transform_of_torch_func():
            raise RuntimeError(
                f"{name} cannot be used within a transform of torch.func (grad, jvp, ...), which hides its graph: "
                "hypergradients are taken outside of them, and have no derivatives of their own"
            )
        if not given.requires_grad:
            raise ValueError(
                f"{name} has no graph: it was computed under torch.no_grad() or torch.inference_mode(), detached, or "
                "from no parameter"
            )
        self.name = name
        self.loss: Tensor = given
        self.outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        self.ranks, self.share = ranks, share
        try:
            self.scale = scale_of(given)
        except UnknownScaleError:
            raise ValueError(f"{name} {_SCALED}") from None
        except RuntimeError as error:
            self.explain(error)
            raise

    @property
    def value(self) -> Tensor:
        """The loss as it is without a scale, and without its graph."""
        return self.loss.detach() if self.scale == 1 else self.loss.detach() / self.scale

    @cached_property
    def nodes(self) -> set[Any]:
        return graph_from([self.loss.grad_fn])

    @cached_property
    def functions(self) -> list[Any]:
        """The nodes that belong to a `torch.autograd.Function`."""
        return functions_of(self.nodes)

    def gradient(
        self, params: Sequence[Tensor], *, retain_graph: bool = False, create_graph: bool = False
    ) -> list[Tensor | None]:
        """Gradients of the loss in each of `params`, `None` where it does not depend on it."""
        scaled = self.scaled_gradient(params, retain_graph=retain_graph, create_graph=create_graph)
        return times(1 / self.scale, scaled)

    def scaled_gradient(
        self, params: Sequence[Tensor], *, retain_graph: bool = False, create_graph: bool = False
    ) -> list[Tensor | None]:
        """The gradients times `scale`."""
        if not params:
            return []
        try:
            ones = torch.ones_like(self.loss)
            return list(vjp([self.loss], params, [ones], retain_graph=retain_graph, create_graph=create_graph))
        except RuntimeError as error:
            self.explain(error)
            raise

    def explain(self, error: RuntimeError) -> None:
        """Raises RuntimeError with what is to be done about `error`, which autograd has raised in a pass through the
        graph, if that is known."""
        if "second time" in str(error):
            raise RuntimeError(
                f"The graph of {self.name} was freed before, by backward() or by an earlier hypergradient(). Compute "
                "the loss anew, or let the call that came before keep it with retain_graph=True."
            ) from error
        if _CHANGED in str(error) and "which is output" not in str(error):  # it is no result of an operation
            raise RuntimeError(
                f"{self.name} was computed before the inner step, or another change of parameters or buffers: one that "
                f"its graph needs was {_CHANGED}. Compute {self.name} anew after the step."
            ) from error
        if "add(sparse, dense)" in str(error):
            raise RuntimeError(
                f"{self.name} has a sparse and a dense gradient in the same parameter, which autograd cannot add where "
                "it records second derivatives: pass sparse=False to the embedding"
            ) from error

    def refuse_functions(self) -> None:
        """Raises RuntimeError where the graph holds a checkpoint whose inside autograd does not see, so that gradients
        in its parameters would be left out without a word; or what joins processes."""
        if fault := fault_of(self.functions):
            raise RuntimeError(f"{self.name} {fault}")
        if any(function_class(node) is CheckpointFunction for node in self.functions):
            raise RuntimeError(f"{self.name} {_REENTRANT}")


def check_connected(name: str, grads: Sequence[Tensor | None]) -> None:
    if all(grad is None for grad in grads):
        raise ValueError(
            f"{name} does not depend on any of inner_params: was something detached on the way, were they replaced "
            "since it was computed, or do all have requires_grad=False?"
        )


def check_of(ranks: Ranks | None) -> Callable[[nn.Module], None]:
    """The check of modules that a loss calls, of one process or of several ranks."""
    return check_call if ranks is None else _check_call_of_rank


def check_call(module: nn.Module) -> None:
    """Raises RuntimeError where a loss calls a module whose gradients would be left out without a word."""
    refuse_calls(module)
    _refuse_within_reentrant_checkpoint()


def _check_call_of_rank(module: nn.Module) -> None:
    refuse_calls_of_rank(module)
    _refuse_within_reentrant_checkpoint()


def _refuse_within_reentrant_checkpoint() -> None:
    if not torch.is_grad_enabled():  # the graph does not show a reentrant checkpoint whose inputs need no gradient
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
            frame = frame.f_back
        if frame is not None:
            raise _ReentrantCheckpoint


class _ReentrantCheckpoint(RuntimeError):
    """A module was called within one."""


def _are_tensors(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(item, Tensor) for item in given)


@dataclass(frozen=True)
class LossFn:
    """Function that computes the loss of a micro-batch anew.

    Attributes:
        share: the part that this loss has in the mean of all; the shares add up to 1, over all ranks.
    """

    compute: Callable[[], LossGraph]
    share: float = 1.0

    def __call__(self) -> LossGraph:
        return self.compute()


class LossFns(tuple[LossFn, ...]):
    """The functions of all micro-batches of this process.

    Attributes:
        ranks: those that have others; `None`: no other process has any.
        kind: what the loss is on all ranks that have a part of it: "tensor"; "functions"; or "fresh", where every call
            takes a batch of its own, so that no two give the same.
    """

    ranks: Ranks | None
    kind: LossKind

    def __new__(cls, loss_fns: Iterable[LossFn], ranks: Ranks | None = None, kind: LossKind = "functions") -> LossFns:
        self = super().__new__(cls, loss_fns)
        self.ranks, self.kind = ranks, kind
        return self


CheckedLoss = LossGraph | LossFns
"""A loss with its graph, or the functions that compute it anew."""


def as_loss_fns(
    name: str, loss: Loss, replay: Callable[[Any], Any], with_outputs: bool = False, ranks: Ranks | None = None
) -> LossFns:
    """Functions that compute the loss of each micro-batch anew, without those of weight 0. `loss` is not a tensor;
    `replay` wraps each function of the user, but for fresh batches, which draw fresh random numbers too.

    Raises:
        TypeError, ValueError: as `as_pairs` and `agreed_kind` do.
    """
    is_fresh = isinstance(loss, FreshBatches)
    pairs: list[tuple[float, Any]] = attempt(
        ranks, lambda: [(1.0, loss)] if is_fresh else [*as_pairs(name, loss, ranks is not None)], []
    )
    shares = shares_of(f"weights of {name}", [weight for weight, _ in pairs], ranks)
    given: GivenKind | None = ("weighted" if _has_weights(loss) else "functions") if pairs else None
    kind = agreed_kind(name, "fresh" if is_fresh else given, ranks)
    names = [name] if len(pairs) == 1 else [f"{name}[{i}]" for i in range(len(pairs))]
    return LossFns(
        [
            LossFn(_checked(each, function if is_fresh else replay(function), with_outputs), share)
            for each, (_, function), share in zip(names, pairs, shares, strict=True)
            if share
        ],
        ranks,
        kind,
    )


def agreed_kind(name: str, kind: GivenKind | None, ranks: Ranks | None) -> LossKind:
    """The kind of a loss of which this rank has a part of that `kind`; `None`: it has none. Functions with weights
    ("weighted") and without must not be mixed: beside 100, the number of samples, a function without would count 1.

    Raises:
        ValueError: ranks have parts of several kinds.
    """
    found = [kind] if ranks is None else [*compress(_KINDS, ranks.any([kind == each for each in _KINDS]))]
    if len(found) > 1:
        given = " and ".join(_KINDS[each] for each in found if each is not None)
        raise ValueError(f"{name} must be of one kind on all ranks, not {given}")
    return "tensor" if found == ["tensor"] else "fresh" if found == ["fresh"] else "functions"


def as_pairs(name: str, loss: Loss, may_be_empty: bool = False) -> list[tuple[float, Callable[[], Any]]]:
    """The `(weight, function)` pairs of a loss that is not a tensor.

    Raises:
        TypeError: `loss` is neither a function nor a sequence of functions or of such pairs.
        ValueError: the sequence is empty, and may not be, or holds `FreshBatches`.
    """
    given: Any = loss
    if callable(given):
        return [(1.0, given)]
    pairs = [_weighted(item) for item in given] if isinstance(given, Sequence) else []
    if not isinstance(given, Sequence) or not all(callable(function) for _, function in pairs):
        raise TypeError(
            f"{name} must be a tensor, a function that returns one, or a list of such functions, not a {_what(given)}"
        )
    if not pairs and not may_be_empty:
        raise ValueError(f"{name} is empty: it must hold a function for each micro-batch")
    if any(isinstance(function, FreshBatches) for _, function in pairs):
        raise ValueError(
            f"{name} must not hold FreshBatches in a list, whose functions give the same loss in each call"
        )
    return pairs


def _has_weights(loss: Any) -> bool:
    return isinstance(loss, Sequence) and any(isinstance(item, tuple) for item in loss)


def _weighted(item: Any) -> tuple[Any, Any]:
    return (item[0], item[1]) if isinstance(item, tuple) and len(item) == 2 else (1.0, item)


def _what(given: Any) -> str:
    if _are_tensors(given):
        return "list of tensors: combine them into one"
    kind = type(given).__name__
    if isinstance(given, Sequence) and any(isinstance(item, tuple) for item in given):
        return f"{kind} of pairs that are not (weight, function), a number and a function"
    if isinstance(given, Iterable) and not isinstance(given, (Sequence, Mapping)):
        return (
            f"{kind}. For batches of data pass auxfast.MicroBatches(loss_of_batch, batches), their mean, or "
            "auxfast.FreshBatches(loss_of_batch, batches), of which every product takes the next"
        )
    return kind


def _checked(name: str, function: Callable[[], Any], with_outputs: bool) -> Callable[[], LossGraph]:
    checked = False

    def compute() -> LossGraph:
        nonlocal checked
        torch.clear_autocast_cache()  # it may hold casts of the parameters as they were before they were moved
        try:
            with torch.enable_grad():
                result = function()
        except SpreadOverProcesses as error:
            raise RuntimeError(f"{name} went through {error}") from None
        except _ReentrantCheckpoint:
            raise RuntimeError(f"{name} {_REENTRANT}") from None
        if not with_outputs:
            result = (result, None)
        elif not isinstance(result, tuple) or len(result) != 2:
            what = type(result).__name__
            raise TypeError(f"{name} must return (loss, outputs) for curvature='gauss-newton', not a {what}")
        graph = LossGraph(name, *result)
        if not checked:  # once is enough, and a walk through the graph costs a few percent of its gradient
            graph.refuse_functions()
            checked = True
        return graph

    return compute


def mean_loss(loss_fns: LossFns) -> Tensor:
    """Value of the mean loss."""
    return mean_loss_and_gradient(loss_fns, ())[0]


def mean_loss_and_gradient(loss_fns: LossFns, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Value and gradient of the mean loss. One process has all of it."""
    assert loss_fns.ranks is None
    losses, gradient = _losses_and_gradient(loss_fns, params)
    value: Any = sum(loss_fn.share * loss for loss_fn, loss in zip(loss_fns, losses, strict=True))
    return value, gradient


def mean_gradient(loss_fns: LossFns, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradient of the mean loss, over all ranks."""
    term = gradient_term(loss_fns, params)
    return term if loss_fns.ranks is None else loss_fns.ranks.sum_where_any(term, params)


def gradient_term(loss: CheckedLoss, params: Sequence[Tensor], **retain_graph: bool) -> list[Tensor | None]:
    """This process's term of the gradient of the whole loss, which is all of it where there are no others."""

    def compute() -> list[Tensor | None]:
        if isinstance(loss, LossGraph):
            return times(loss.share, loss.gradient(params, **retain_graph))
        return _losses_and_gradient(loss, params)[1] if params else []

    return attempt(loss.ranks, compute, [None] * len(params))


def term_of_whole(whole: list[Tensor | None], loss_fns: LossFns) -> list[Tensor | None]:
    """This process's term of what all ranks have the whole of: the first has it, and the others nothing."""
    return whole if loss_fns.ranks is None or loss_fns.ranks.rank == 0 else [None] * len(whole)


def _losses_and_gradient(loss_fns: LossFns, params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The losses, and the gradient of their mean, accumulated one micro-batch after the other."""
    losses = []
    total: list[Tensor | None] = [None] * len(params)
    for loss_fn in loss_fns:
        graph = loss_fn()
        losses.append(graph.value)
        total = add(total, times(loss_fn.share, graph.gradient(params)))
        del graph  # it goes before the next one is made
    return losses, total


def add(total: Sequence[Tensor | None], terms: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`total + terms`, where `None` is 0. Not in place: autograd may give one tensor to two parameters."""
    return [a if b is None else b if a is None else a + b for a, b in zip(total, terms, strict=True)]


def times(factor: float, terms: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`factor * terms`, where `None` is 0."""
    return list(terms) if factor == 1 else [None if term is None else factor * term for term in terms]
