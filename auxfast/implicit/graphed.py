"""Hypergradients that are recorded once and replayed: on a GPU as CUDA graphs, which the host only has to start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from auxfast.autograd.preserved_state import preserved_buffers, preserved_state
from auxfast.implicit.advice import warn_of
from auxfast.implicit.cuda_graphs import CapturedProgram, Program, memory_read, run_through
from auxfast.implicit.distributed import refuse_params
from auxfast.implicit.fresh_batches import FreshBatches
from auxfast.implicit.hypergradient import hypergradient
from auxfast.implicit.inner_problem import GivenParams, given_params
from auxfast.implicit.losses import LossFn, as_loss_fns, check_call
from auxfast.implicit.static_hypergradient import CURVATURES, StaticHypergradient
from auxfast.nn import Combiner
from auxfast.nn.combiner_base import Positive
from auxfast.solvers import DEFAULT_SOLVER
from auxfast.solvers.base import Solver, SolverState, SolveStats, StopReason, check_solver
from auxfast.solvers.static_solvers import static_solve

_WARM_UP = 2
"""Calls before the capture: libraries choose their algorithms, load their kernels and take their workspaces."""
_MAKE_ANEW = "make a new GraphedHypergradient"
_NOT_SYMMETRIC = StopReason.NOT_SYMMETRIC
_FACTS = "memory", "shape", "strides", "dtype", "requires_grad"

_Mode = tuple[bool, Positive | None]
"""Whether a module trains, and how a combiner's `phi` is meant: as weights or as their logarithms."""


class GraphedResult:
    """Hypergradients as `HypergradientResult` has them; what the host has not read yet is read when it is asked for.

    Attributes:
        grads: gradients aligned with `outer_params`, of their shapes and dtypes, for the caller to keep. NaN where
            something is not finite.
    """

    def __init__(self, grads: tuple[Tensor, ...], read: Callable[[], tuple[SolveStats, bool]]) -> None:
        self.grads = grads
        self._read = read

    @property
    def stats(self) -> SolveStats:
        """How the solve went. The first look waits for the device, and warns as `hypergradient` does.

        Raises:
            NotFiniteError: see `hypergradient`.
        """
        return self._outcome[0]

    @property
    def direct_only(self) -> bool:
        """Whether the solver found nothing better than x = 0: `grads` are then the direct gradients. Waits, warns and
        raises as `stats` does."""
        return self._outcome[1]

    @cached_property
    def _outcome(self) -> tuple[SolveStats, bool]:
        return self._read()

    def __repr__(self) -> str:
        return f"GraphedResult(grads={self.grads!r})"


class GraphedHypergradient:
    """`hypergradient` for many calls of one problem, in which the host decides nothing: all operations are recorded
    when the object is made, and a call on a GPU replays them as one CUDA graph, or a few. Small networks, for which a
    GPU waits for its host most of the time, gain most.

        graphed = auxfast.GraphedHypergradient(outer_loss, inner_loss, net.parameters(), combiner.parameters(),
                                               outer_inputs=(x_held_out, y_held_out), inner_inputs=(x, y))
        for (x, y), (x_held_out, y_held_out) in zip(loader, held_out):
            ...                                       # inner steps, in place
            result = graphed((x_held_out, y_held_out), (x, y))
            optimizer_step(result.grads)              # waits for nothing; result.stats waits for the device

    The losses are functions of their inputs. Examples of these are given once, and each call copies its own into the
    same memory. Parameters are read where they are: steps that write to them in place, as those of torch.optim do, are
    seen by the next call. Whatever else the losses read, a learning rate or a number of an `if`, stays as it was when
    they were recorded.

    **Solvers.** `Neumann` with a number for `step_size`, `tol=None` and no warm start, `ConjugateGradient` and `MINRES`
    without a preconditioner, and `Identity` can do without a host: where a series grows, it is cut on the device, and a
    system that is solved is left alone. Results are those of `hypergradient`, up to rounding, with these exceptions. A
    Krylov solver does not restart where its own residual and the true one differ, which `stats.residual` tells. A
    Neumann series whose norm hardly falls before it grows may have some terms more: that raises its residual by 0.1% at
    most, but can move hypergradients by some per cent, since neither sum is near the solution. Products that contradict
    symmetry are looked into when the object is made, and not again. With more than 16 steps and a `tol`, steps are
    replayed in chunks of 8, and the host stops one chunk after the last that was needed.

    **A CUDA graph** cannot hold what reads a number on the host (`.item()`, `if loss > 1`), moves data between host and
    device (`torch.tensor(0.5, device="cuda")`, tensors on the CPU), or makes tensors whose shapes depend on numbers
    (boolean masks as indices). A loss that does so is refused when the object is made. No graph of the parameters that
    was recorded before may be alive then: autograd would follow its stream; and no other thread may wait for the GPU,
    since that is an error in the whole process while the losses are tried. Numbers of the CPU, tensors of one element
    included, stay as they were. All memory of a call stays in use as long as the object lives, or a result of it.

    **State.** The losses leave no trace in buffers: statistics of BatchNorm are read anew in each call, and stay as
    they are. On a GPU dropout draws other masks in each call, which moves torch's generator on. On a CPU the generator
    stays, and the masks are those that the next forward pass draws. Autocast, TF32 and deterministic algorithms are
    those of the moment when the object was made, whatever the caller has active later.

    On tensors of the CPU the same operations run in each call, without a graph. Calls of several threads wait for each
    other.

    Args:
        outer_loss: a function that computes the loss from tensors like `outer_inputs`, and from the parameters.
        inner_loss: the same of `inner_inputs`. With `curvature="gauss-newton"` it returns `(loss, outputs)`.
        inner_params: see `hypergradient`; leaves of autograd's graph.
        outer_params: the same, on the same device.
        outer_inputs: examples of the tensors that `outer_loss` takes, on the device of the parameters.
        inner_inputs: examples of those that `inner_loss` takes.
        solver: see above. With `warm_start`, each solve starts from the last one's solution where that is better than
            x = 0, until `reset`.
        curvature: "hessian" or "gauss-newton".
        warn: give the warnings of `hypergradient` when the stats are read, each kind once.

    Raises:
        TypeError: see `hypergradient`; losses that are not functions, inputs that are not tensors, or a solver of a
            kind that cannot be static.
        ValueError: see `hypergradient`; settings of the solver that cannot be static, a curvature that evaluates the
            loss anew, parameters that are no leaves or on other devices, or an inner loss without second derivatives.
        RuntimeError: see `hypergradient`; or the losses cannot be captured.
        NotFiniteError: the hypergradient of the examples is not finite.
    """

    def __init__(
        self,
        outer_loss: Callable[..., Any],
        inner_loss: Callable[..., Any],
        inner_params: Iterable[Tensor],
        outer_params: Iterable[Tensor],
        *,
        outer_inputs: Sequence[Tensor] = (),
        inner_inputs: Sequence[Tensor] = (),
        solver: Solver = DEFAULT_SOLVER,
        curvature: str = "hessian",
        warn: bool = True,
    ) -> None:
        for name, loss in (("outer_loss", outer_loss), ("inner_loss", inner_loss)):
            _check_loss(name, loss)
        if curvature not in CURVATURES:
            raise ValueError(
                f"curvature must be one of {', '.join(CURVATURES)} for a GraphedHypergradient, not {curvature!r}: the "
                "others evaluate the loss again for every product"
            )
        check_solver(solver)
        self._solve = static_solve(solver)
        self._params = params = given_params(inner_params, outer_params, None)
        self._device = params.inner[0].device
        _check_params(params, self._device)
        self._solver, self._warn = solver, warn
        self._state = SolverState()
        self._lock = Lock()
        self._autocast = _present_autocast(self._device.type)
        called: dict[int, Module] = {}
        self._stream: torch.cuda.Stream | None = None
        self._memory: list[torch.UntypedStorage] = []
        with self._recording():
            with self._side_stream():
                given = ("outer_inputs", outer_inputs), ("inner_inputs", inner_inputs)
                self._inputs = [_static(name, tensors, self._device) for name, tensors in given]
                outer, inner = (
                    partial(loss, *tensors)
                    for loss, tensors in zip((outer_loss, inner_loss), self._inputs, strict=True)
                )
                self._static = StaticHypergradient(
                    _loss_fn("outer_loss", outer, False, called),
                    _loss_fn("inner_loss", inner, curvature == "gauss-newton", called),
                    params,
                    self._solve,
                    curvature,
                )
                self._program = Program(self._static)
                eager = hypergradient(
                    outer,
                    inner,
                    params.inner,
                    params.outer,
                    solver=solver,
                    curvature=curvature,  # type: ignore[arg-type]
                    state=SolverState(),
                    warn=False,
                )
                self._asymmetry = eager.stats.symmetry_error if eager.stats.stop_reason == _NOT_SYMMETRIC else None
                self._make_program()
            self._solve.reset()
            self._done = self._event()
        self._modules = [*called.values()]
        self._kinds = [_kinds(tensors) for tensors in self._inputs]
        self._held = [
            (module, name)
            for module in self._modules
            for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            for name, _ in tensors
        ]
        self._facts = self._present_facts()

    def _make_program(self) -> None:
        """Warms up, and captures on a GPU."""
        with preserved_state(warn=self._warn, check=check_call):
            for _ in range(1 if self._stream is None else _WARM_UP):
                run_through(self._static)
            if self._stream is not None:
                self._memory = memory_read(self._static)
        if self._stream is not None:
            self._program = CapturedProgram(self._static, self._stream)
            with preserved_state(warn=self._warn):  # the first replay takes the graph to the device, fills its memory
                self._program.run()

    def __call__(self, outer_inputs: Sequence[Tensor] = (), inner_inputs: Sequence[Tensor] = ()) -> GraphedResult:
        """The hypergradient at the present parameters, of these inputs. On a GPU it waits for nothing, but, where steps
        go in chunks, for the last chunk but one.

        Raises:
            TypeError: inputs that are not a list of tensors.
            ValueError: inputs of another number, shape, dtype or device than the examples.
            RuntimeError: parameters, or modules that the losses call, are not what was recorded: others, elsewhere in
                memory, of another shape or dtype, or in another mode: of training, or of a combiner's `positive`.
        """
        given = ("outer_inputs", outer_inputs), ("inner_inputs", inner_inputs)
        for (name, tensors), kinds in zip(given, self._kinds, strict=True):
            _check_inputs(name, tensors, kinds)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._present_facts() != self._facts:
                raise self._what_changed()
            run = self._replay if isinstance(self._program, CapturedProgram) else self._run
            flat_grads, numbers, steps = run([*outer_inputs, *inner_inputs])
            grads = self._static.grads_of(flat_grads)
            return GraphedResult(grads, partial(self._outcome, numbers, steps, self._done))

    def _replay(self, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor, int]:
        """The vectors of hypergradients, the numbers and the steps of a call, on the present stream."""
        assert self._stream is not None
        assert self._done is not None
        with torch.cuda.device(self._device):
            present = torch.cuda.current_stream()
            self._stream.wait_stream(present)
            self._stream.wait_event(self._done)  # its results may have been copied on another stream
            # A graph holds workspaces of the stream that it was captured on, and nothing else may use them meanwhile.
            try:
                with torch.cuda.stream(self._stream):
                    self._copy(inputs)
                    steps = self._program.run()
            finally:
                present.wait_stream(self._stream)
            results = self._program.results()
            self._done = self._event()
        return *results, steps

    def _run(self, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor, int]:
        self._copy(inputs)
        with self._recording(), preserved_state(warn=self._warn, check=check_call):
            steps = self._program.run()
        return *self._program.results(), steps

    def _copy(self, inputs: list[Tensor]) -> None:
        if inputs:
            torch._foreach_copy_([*self._inputs[0], *self._inputs[1]], inputs, non_blocking=True)

    def reset(self) -> None:
        """Lets the next call of a solver with `warm_start` start from x = 0 again."""
        with self._lock, self._recording():
            if self._done is not None:  # the last call may have been on another stream
                torch.cuda.current_stream().wait_event(self._done)
            self._solve.reset()
            self._done = self._event()

    def _event(self) -> torch.cuda.Event | None:
        """The end of what is on the present stream; `None` where nothing waits for anything."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """The modes in which everything is recorded, whatever the caller has active."""
        device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), self._autocast(), device:
            yield

    @contextmanager
    def _side_stream(self) -> Iterator[None]:
        """Makes a stream of its own on a GPU, as captures need it, the present one. Autograd's engine runs each node on
        the stream of its forward pass, so all is recorded there. All that a replay writes to belongs to this stream, on
        which it runs too: once it is freed, others get that memory behind the last replay."""
        if self._device.type != "cuda":
            yield
            return
        present = torch.cuda.current_stream()
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            yield
        present.wait_stream(self._stream)

    def _outcome(self, numbers: Tensor, steps: int, done: torch.cuda.Event | None) -> tuple[SolveStats, bool]:
        if done is not None:
            done.synchronize()
        stats, direct_only, problem = self._static.outcome(numbers.cpu().numpy(), steps, self._solver, self._state)
        if self._asymmetry is not None:
            error = max(self._asymmetry, stats.symmetry_error or 0.0)
            stats = replace(stats, converged=False, stop_reason=_NOT_SYMMETRIC, symmetry_error=error)
            problem = str(_NOT_SYMMETRIC)
        if self._warn:
            warn_of(problem, self._solver, self._state)
        return stats, direct_only

    def _present_facts(self) -> tuple[list[Any], list[_Mode], list[int | None]]:
        """What must stay as it was recorded. Graphs hold addresses: those of all that a module may read count. A CPU
        looks at them as well, so that what runs there runs on a GPU."""
        given = [
            (t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad)
            for tensors in (self._params.inner, self._params.outer)
            for t in tensors
        ]
        modes = [
            (module.training, module.positive if isinstance(module, Combiner) else None) for module in self._modules
        ]
        tensors = (getattr(module, name, None) for module, name in self._held)
        held = [t.data_ptr() if isinstance(t, Tensor) else None for t in tensors]
        return given, modes, held

    def _what_changed(self) -> RuntimeError:
        given, modes, held = self._present_facts()
        names = [
            f"{name}[{i}]"
            for name, tensors in (("inner_params", self._params.inner), ("outer_params", self._params.outer))
            for i in range(len(tensors))
        ]
        for name, now, before in zip(names, given, self._facts[0], strict=True):
            for what, new, old in zip(_FACTS, now, before, strict=True):
                if new != old:
                    return RuntimeError(
                        f"{name} is no longer what was recorded: its {what} was {_shown(old)} and is {_shown(new)}. "
                        f"Write to parameters in place, or {_MAKE_ANEW}"
                    )
        for module, now, before in zip(self._modules, modes, self._facts[1], strict=True):
            for what, new, old in zip(("training", "positive"), now, before, strict=True):
                if new != old:
                    return RuntimeError(
                        f"a {type(module).__name__} that the losses call was recorded with {what}={old!r}, and has "
                        f"{what}={new!r}: set the mode that was recorded, or {_MAKE_ANEW}"
                    )
        module, name = next(
            named for named, now, before in zip(self._held, held, self._facts[2], strict=True) if now != before
        )
        return RuntimeError(
            f"{name} of a {type(module).__name__} that the losses call was replaced, or lies elsewhere in memory than "
            f"when it was recorded: write to it in place, or {_MAKE_ANEW}"
        )


def _shown(fact: Any) -> str:
    return f"at {fact:#x}" if type(fact) is int else str(tuple(fact) if isinstance(fact, torch.Size) else fact)


def _check_loss(name: str, loss: Any) -> None:
    if callable(loss) and not isinstance(loss, (Tensor, Sequence, FreshBatches)):
        return
    raise TypeError(
        f"{name} must be one function of its inputs for a GraphedHypergradient, which records it, not a "
        f"{type(loss).__name__}: hypergradient() takes tensors, lists of functions, MicroBatches and FreshBatches"
    )


def _check_params(params: GivenParams, device: torch.device) -> None:
    """Raises ValueError or RuntimeError for parameters that do not stay where they are."""
    refuse_params("inner_params", params.active_inner)
    for name, tensors in (("inner_params", params.inner), ("outer_params", params.outer)):
        for i, tensor in enumerate(tensors):
            if tensor.grad_fn is not None:
                raise ValueError(
                    f"{name}[{i}] must be a leaf for a GraphedHypergradient, which records where it lies: it is "
                    "computed from another tensor"
                )
            if tensor.device != device:
                raise ValueError(f"{name}[{i}] must be on the device of inner_params, {device}, not {tensor.device}")


def _static(name: str, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of the examples, which each call writes its inputs to."""
    _check_tensors(name, tensors)
    for i, tensor in enumerate(tensors):
        if tensor.device != device:
            raise ValueError(f"{name}[{i}] must be on the device of the parameters, {device}, not {tensor.device}")
    return [tensor.detach().clone() for tensor in tensors]


def _check_tensors(name: str, tensors: Any) -> None:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name} must be a tuple or a list of tensors, not a {type(tensors).__name__}")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must hold tensors, but number {i} is a {type(tensor).__name__}")


Kind = tuple[torch.Size, torch.dtype, torch.device]


def _kinds(tensors: Sequence[Tensor]) -> list[Kind]:
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]


def _check_inputs(name: str, tensors: Sequence[Tensor], kinds: Sequence[Kind]) -> None:
    _check_tensors(name, tensors)
    given = _kinds(tensors)
    if given == kinds:
        return
    if len(given) != len(kinds):
        raise ValueError(f"{name} must be {len(kinds)} tensors, as the examples were, not {len(given)}")
    for i, (now, wanted) in enumerate(zip(given, kinds, strict=True)):
        if now != wanted:
            words = [f"{dtype} {tuple(shape)} on {device}" for shape, dtype, device in (wanted, now)]
            raise ValueError(
                f"{name}[{i}] must be of {words[0]}, as its example was, not of {words[1]}: make inputs of one shape "
                f"(drop_last=True of a DataLoader), or {_MAKE_ANEW}"
            )


def _loss_fn(name: str, function: Callable[[], Any], with_outputs: bool, called: dict[int, Module]) -> LossFn:
    """The loss, which finds all buffers as they are outside of it, whatever the other one does to them.

    Args:
        called: where to put the modules that it calls, by id.
    """

    def preserved() -> Any:
        with preserved_buffers(check_call) as guard:
            result = function()
        called.update((id(module), module) for module in guard.modules)
        return result

    (loss_fn,) = as_loss_fns(name, preserved, lambda given: given, with_outputs)
    return loss_fn


def _present_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context with the autocast that is active now. No casts are kept beyond an operation: those of parameters would
    be replayed as they were recorded."""
    return partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
