"""Backward passes through one recorded graph, again and again: by autograd's engine, and by passes of our own where
these are faster and the engine agrees: `BatchedBackward` for batches of vectors, `SingleBackward` for vectors that come
one by one on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from math import inf, isfinite
from typing import TypeVar

import torch
from torch import Tensor

from auxfast.autograd.batched_backward import BatchedBackward, BatchingUnsupported, SingleBackward
from auxfast.autograd.engine import in_own_task, run_engine, vjp, zeros_for_none
from auxfast.autograd.hooks import HookDetector
from auxfast.autograd.separable import split, whole
from auxfast.autograd.streams import StreamDetector, current_stream, is_capturing
from auxfast.autograd.symmetric_probe import SymmetricProbe, random_signs, rounding_of_products

Gradients = Sequence[Tensor | None]
Result = TypeVar("Result")

_ENGINE_ONLY: ContextVar[bool] = ContextVar(
    "auxfast_engine_only", default=os.environ.get("AUXFAST_BATCHED_BACKWARD") == "0"
)

_MIN_VECTORS = 8
"""Fewest vectors of a batch, and fewest that must find room at once. To plan a pass takes up to 1.7 of the engine's
products, and to check a batch 1.5 of them: with fewer vectors, not all networks gain from it."""

_MIN_VECTORS_LATER = 3
"""The same once a pass is planned and has its `SymmetricProbe`, as where most rows of a solve have converged. 3 vectors
took 0.7 to 0.8 of the engine's time, 2 took 0.85 to 1."""

_MIN_VECTORS_OF_MANY_NUMBERS, _MANY_NUMBERS = 16, 1 << 20
"""The same where all inputs together have more numbers than the second: neither a batch nor its check then stays in
the caches. With 6 MB of weights, batches of 8 went at 0.8 of the speed of `autograd.grad`, of 20 at 1.1, and 8 vectors
one by one at 0.9, since their products are written into one batch."""

_PRODUCTS_OF_A_SPLIT = 3
"""Products before the outputs are split into separable parts and the rest. A split costs what it saves of 2 to 4, and
many solvers need no more."""

_PRODUCTS_BEFORE_A_PASS = 4
"""Products of single vectors on a GPU before a `SingleBackward` is planned. An H200's host took 5 ms for the plan of a
`BatchedBackward`, what some five products gained; solvers of three steps take four products."""

_MAX_BYTES_ON_CPU = 1 << 21
"""Most bytes of an activation's gradients, of all vectors that go through the graph at once. Batches save most of the
time that autograd and the dispatcher take, and lose to the caches: 8 vectors were 1.4 to 5 times faster in networks
whose activations had at most 256 KiB, and 0.7 to 1.4 times as fast in networks of larger ones, for which batches are
not used; large weights do no harm."""
_MAX_BYTES_ELSEWHERE = 1 << 26
"""The same for a GPU, whose launches leave more room; not measured."""


@contextmanager
def engine_only() -> Iterator[None]:
    """Within this context every backward pass is one of autograd's engine: batches of vectors go through a graph one by
    one, and all hooks run for each of them. The environment variable AUXFAST_BATCHED_BACKWARD=0, set before auxfast is
    imported, does the same everywhere."""
    token = _ENGINE_ONLY.set(True)
    try:
        yield
    finally:
        _ENGINE_ONLY.reset(token)


def products_before_a_pass(device: torch.device) -> float:
    """Vectors that go through the engine, where they come one by one, before a pass of our own is planned.

    On a GPU the host's time counts, and the engine hands each product to the device's thread and back: an MLP's Hessian
    product took an H200's host 2.0 ms by the engine, and 1.1 by a `BatchedBackward` of one vector, which takes more
    operations than a `SingleBackward`. A CPU has no such thread, and there a pass is not worth its check."""
    return _PRODUCTS_BEFORE_A_PASS if device.type == "cuda" else inf


def is_engine_only() -> bool:
    """Whether `engine_only` is active, or the environment variable set."""
    return _ENGINE_ONLY.get()


class Pullback:
    """Products `vectors^T d outputs / d inputs` of a retained graph; `None` for an input that plays no part.

    Args:
        outputs, inputs: tensors of the graph.
        symmetric: whether there is an output for each input, and `d outputs / d inputs` is a symmetric matrix, as the
            second derivatives of a loss are: passes of our own are then checked by inner products. Without harm if it
            is not.

    Attributes:
        num_batched: vectors that went through the graph in batches.
        num_single: vectors that went through a pass of our own one by one.
        refusal: why all vectors are left to the engine from now on; `None`: they are not.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], symmetric: bool = False) -> None:
        self._outputs, self._inputs = outputs, inputs
        self._symmetric = symmetric
        self._probe: SymmetricProbe | None = None
        self._split = whole(outputs)
        self._products = 0
        self._passes: dict[type[BatchedBackward], BatchedBackward] = {}
        self._stream: object = None  # that of the graph, once it is known
        self._many = sum(tensor.numel() for tensor in inputs) > _MANY_NUMBERS
        self.num_batched = self.num_single = 0
        self.refusal: str | None = None

    def __call__(self, vectors: Sequence[Tensor]) -> Gradients:
        """vectors: one for each output."""
        if not self._outputs:
            return [None] * len(self._inputs)
        if self._products == _PRODUCTS_OF_A_SPLIT:
            self._separate()
        self._products += 1
        if not self._split.diagonals:
            return self._single(vectors)
        return self._with_diagonals(self._single(self._of_parts(vectors)), vectors)

    def batched(self, vectors: Sequence[Tensor]) -> Gradients:
        """Products of k vectors: all tensors have one more axis of size k in front."""
        if not self._outputs:
            return [None] * len(self._inputs)
        if self._products <= _PRODUCTS_OF_A_SPLIT:
            self._separate()
            self._products = _PRODUCTS_OF_A_SPLIT + 1
        return self._with_diagonals(self._batched(self._of_parts(vectors)), vectors)

    def _separate(self) -> None:
        if not _ENGINE_ONLY.get():
            self._split = split(self._outputs, self._inputs)

    def _of_parts(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [vectors[i] for i in self._split.outputs]

    def _with_diagonals(self, gradients: Gradients, vectors: Sequence[Tensor]) -> Gradients:
        total = [*gradients]
        for output, place, entries in self._split.diagonals:
            gradient, vector = total[place], vectors[output]
            total[place] = entries * vector if gradient is None else torch.addcmul(gradient, entries, vector)
        return total

    def _by_engine(self, vectors: Sequence[Tensor]) -> Gradients:
        return vjp(self._split.parts, self._inputs, vectors) if vectors else [None] * len(self._inputs)

    def _single(self, vectors: Sequence[Tensor]) -> Gradients:
        """Products of one vector. Each that a pass of our own gives is checked before anybody sees it, for which the
        host waits: a solver that went on meanwhile would have to be taken back. The wait is short, since the host is
        what such products take their time for."""
        if self._products > products_before_a_pass(self._inputs[0].device) and self._symmetric and self._may_pass():
            try:
                gradients = self._confirmed(vectors) if vectors else None
            except BatchingUnsupported as reason:
                self._refuse(reason)
            else:
                if gradients is not None:
                    self.num_single += 1
                    return gradients
        return self._by_engine(vectors)

    def _batched(self, vectors: Sequence[Tensor]) -> Gradients:
        if not vectors:
            return [None] * len(self._inputs)
        if len(vectors[0]) >= self._min_vectors() and self._may_pass():
            try:
                gradients = self._checked(vectors)
            except BatchingUnsupported as reason:
                self._refuse(reason)
            else:
                self.num_batched += len(vectors[0])
                return gradients
        return self._one_by_one(vectors)

    def _min_vectors(self) -> int:
        if self._many:
            return _MIN_VECTORS_OF_MANY_NUMBERS
        return _MIN_VECTORS_LATER if self._symmetric and self._probe is not None else _MIN_VECTORS

    def _may_pass(self) -> bool:
        """Whether a pass of our own may run. Autocast changes the dtypes of the engine's operations, and not of ours.
        The engine runs nodes on the streams of their forward passes, and we on the current one. A check waits for the
        device, which a CUDA graph cannot record."""
        device = self._inputs[0].device
        return not (
            self.refusal is not None
            or _ENGINE_ONLY.get()
            or torch.is_autocast_enabled(device.type)
            or is_capturing(device)
            or (self._stream is not None and self._stream != current_stream(device))
        )

    def _refuse(self, reason: BatchingUnsupported) -> None:
        self._passes.clear()
        self.refusal = str(reason)

    def _one_by_one(self, vectors: Sequence[Tensor]) -> Gradients:
        count = len(vectors[0])
        results: list[Tensor | None] = [None] * len(self._inputs)
        for i, row in enumerate(zip(*vectors, strict=True)):
            for j, gradient in enumerate(self._by_engine(row)):
                if gradient is not None:
                    result = results[j]
                    if result is None:
                        result = results[j] = gradient.new_zeros(count, *gradient.shape)
                    result[i] = gradient
        return results

    @torch.no_grad()
    def _checked(self, vectors: Sequence[Tensor]) -> Gradients:
        """The products by a `BatchedBackward`. Each batch is compared with one product of the engine, so that no answer
        depends on what an earlier batch has shown: that of a combination of the first vector and the last, if the first
        has no zeros and so reaches whatever another reaches, or else of all vectors. (One vector alone would not tell a
        pass that gives the same result, or another one's, to all of them.) Products with a symmetric matrix are
        compared with one product of the engine for all batches, see `SymmetricProbe`; where that does not confirm them,
        by rounding or since the matrix is not symmetric, with one for each as well.

        Whatever goes wrong in a pass of ours is a reason to ask the engine, which then answers, or raises its own
        error. So nothing is hidden but the time that it takes, and `refusal` tells why.

        Raises:
            BatchingUnsupported: the engine is to be asked for each of the vectors.
        """
        planned = self._planned(BatchedBackward)
        at_once = self._vectors_at_once(planned)
        if at_once < _MIN_VECTORS:
            raise BatchingUnsupported("activations are so large that batches are not faster")

        def run() -> tuple[Gradients, bool]:
            gradients = in_own_task(partial(_in_parts, planned, vectors, at_once))
            confirmed = self._symmetric and self._is_confirmed(vectors, gradients, planned)
            return gradients, confirmed or self._agrees_with_engine(vectors, gradients, planned)

        gradients, agrees = _or_refuse("the pass raised", run)
        if not agrees:
            raise BatchingUnsupported("the engine finds something else")
        return gradients

    @torch.no_grad()
    def _confirmed(self, vectors: Sequence[Tensor]) -> Gradients | None:
        """The product of one vector by a `SingleBackward`; `None` where the `SymmetricProbe` does not confirm it, and
        the engine is to be asked, which costs no more than to compare with it.

        Raises:
            BatchingUnsupported: the engine is to be asked from now on.
        """
        planned = self._planned(SingleBackward)

        def run() -> Gradients | None:
            gradients = in_own_task(partial(planned, vectors))
            return gradients if self._is_confirmed(vectors, gradients, planned) else None

        return _or_refuse("the pass raised", run)

    def _planned(self, kind: type[BatchedBackward]) -> BatchedBackward:
        if kind not in self._passes:  # a graph that was freed raises, say
            self._passes[kind] = _or_refuse("planning a pass raised", partial(kind, self._split.parts, self._inputs))
        return self._passes[kind]

    def _is_confirmed(self, vectors: Sequence[Tensor], gradients: Gradients, planned: BatchedBackward) -> bool:
        part_of = {output: i for i, output in enumerate(self._split.outputs)}  # one of them, if it has several
        own = [gradient for output in part_of if (gradient := gradients[output]) is not None]
        if len(own) == len(part_of) == sum(gradient is not None for gradient in gradients):
            if self._probe is None:
                self._probe = self._make_probe(own, [*part_of], planned)
            if self._probe is not None:
                is_single = isinstance(planned, SingleBackward)
                confirms = self._probe.confirms_one if is_single else self._probe.confirms
                if confirms([vectors[i] for i in part_of.values()], own):
                    return True
        self._symmetric = False
        return False

    def _make_probe(
        self, like: Sequence[Tensor], outputs: Sequence[int], planned: BatchedBackward
    ) -> SymmetricProbe | None:
        epsilon = rounding_of_pass(planned, like[0])
        signs = random_signs(like, [self._inputs[output].shape for output in outputs], epsilon)
        image = self._engine([signs[outputs.index(output)] for output in self._split.outputs], planned)
        own = [each for output in outputs if (each := image[output]) is not None]
        return SymmetricProbe(signs, own, epsilon) if len(own) == len(outputs) else None

    def _agrees_with_engine(self, vectors: Sequence[Tensor], gradients: Gradients, planned: BatchedBackward) -> bool:
        combine = _combination(vectors)
        expected = self._engine(combine(vectors), planned)
        combined = iter(combine([gradient for gradient in gradients if gradient is not None]))
        found = [None if gradient is None else next(combined) for gradient in gradients]
        ours, engines = (zeros_for_none(each, self._inputs) for each in (found, expected))
        return agree(ours, engines, rounding_of_pass(planned, engines[0]))

    def _engine(self, vectors: Sequence[Tensor], planned: BatchedBackward) -> Gradients:
        """The product by the engine.

        Raises:
            BatchingUnsupported: a hook takes part, or another stream than the current one.
        """
        device = self._inputs[0].device
        nodes = planned.nodes if self._stream is None else ()
        with StreamDetector(nodes, device) as streams, HookDetector(planned.nodes) as hooks:
            gradients = run_engine(self._split.parts, self._inputs, vectors)
        if hooks.found:
            raise BatchingUnsupported("a hook computes with gradients")
        if streams.found - {current_stream(device)}:
            raise BatchingUnsupported("the graph was recorded on another stream than the current one")
        self._stream = current_stream(device)
        return gradients

    def _vectors_at_once(self, planned: BatchedBackward) -> int:
        end = self._inputs[0]
        most = _MAX_BYTES_ON_CPU if end.device.type == "cpu" else _MAX_BYTES_ELSEWHERE
        return most // max(1, planned.activation_size * end.element_size())


def _or_refuse(what: str, function: Callable[[], Result]) -> Result:
    """`function()`. Whatever goes wrong in there is a reason to ask the engine."""
    try:
        return function()
    except BatchingUnsupported:
        raise
    except Exception as error:  # a Function that cannot run outside of the engine, say
        raise BatchingUnsupported(f"{what} {error!r}") from error


def _in_parts(batched_pass: BatchedBackward, vectors: Sequence[Tensor], at_once: int) -> list[Tensor | None]:
    if len(vectors[0]) <= at_once:
        return batched_pass(vectors)
    parts = [batched_pass(part) for part in zip(*(tensor.split(at_once) for tensor in vectors), strict=True)]
    return [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]


def _combination(vectors: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The sum of rows, with the weights that a batch is checked with: of the first row and the last, or of all if the
    first vector has a zero in it.

    No vector is small in it beside the others, unless it is zero, and all have different weights. It is as large as the
    largest vector, so that a hook which acts on large gradients acts on it too. A vector's size is that of its largest
    element: Euclidean norms can overflow.
    """
    first, last = ([tensor[end] for tensor in vectors] for end in (0, -1))
    if bool(torch.stack([tensor.all() for tensor in first]).all()):
        ratio = _size(first) / (_size(last) or 1.0)
        weight, last_weight = max(1.0, 1 / ratio), 1.5 * max(1.0, ratio)

        def of_ends(tensors: Sequence[Tensor]) -> list[Tensor]:
            ends = [tensor[0] for tensor in tensors], [tensor[-1] for tensor in tensors]
            return [*torch._foreach_add(torch._foreach_mul(ends[0], weight), ends[1], alpha=last_weight)]

        return of_ends
    sizes = torch.stack([_rows(tensor).abs().amax(dim=1) for tensor in vectors if tensor[0].numel()]).amax(dim=0)
    ramp = torch.linspace(1, 2, len(sizes), dtype=sizes.dtype, device=sizes.device)
    weights = ramp * (sizes.amax() / sizes.where(sizes > 0, 1))
    return lambda tensors: [(weights.to(t.dtype) @ _rows(t)).view(t.shape[1:]) for t in tensors]


def _size(tensors: list[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(tensors, torch.inf)).amax())


def _rows(tensor: Tensor) -> Tensor:
    """(k, n)"""
    return tensor.reshape(len(tensor), tensor.shape[1:].numel())


def rounding_of_pass(planned: BatchedBackward, like: Tensor) -> float:
    """The relative rounding of the products, in an input like that."""
    with_convolutions = any("Conv" in type(node).__name__ for node in planned.nodes)
    return rounding_of_products(like.device, like.dtype, with_convolutions)


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], epsilon: float) -> bool:
    """Whether two gradients are equal up to rounding, for each input that has elements by itself, in the largest of
    these. Numbers that are not finite never are. Waits for the device."""
    pairs = [pair for pair in zip(found, expected, strict=True) if pair[0].numel()]
    if not pairs:
        return True
    ours, engines = ([*each] for each in zip(*pairs, strict=True))
    sizes, errors = (
        torch.stack(torch._foreach_norm(each, torch.inf)).tolist()
        for each in (engines, torch._foreach_sub(ours, engines))
    )
    noise = 3 * epsilon * max(sizes)  # what cancellation may leave of an input whose gradient is zero
    return isfinite(noise) and all(
        error <= epsilon**0.5 * size + noise for error, size in zip(errors, sizes, strict=True)
    )
