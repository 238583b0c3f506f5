"""An optimizer of outer parameters: hypergradient, clipping, a torch optimizer's step, and projection."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from auxfast.implicit.advice import warn_of_no_group, warn_once
from auxfast.implicit.derivatives import CurvatureName, check_curvature
from auxfast.implicit.finite import NotFiniteError
from auxfast.implicit.free_entries import Free
from auxfast.implicit.graphed import GraphedResult
from auxfast.implicit.hypergradient import HypergradientResult, hypergradient
from auxfast.implicit.losses import Loss, LossGraph
from auxfast.implicit.ranks import ProcessGroup, Ranks, ranks_of
from auxfast.implicit.trust_region import mean_weights, sees, trust_region
from auxfast.implicit.watch import TEXTS, Watch
from auxfast.nn import Combiner, LabelGenerator
from auxfast.nn.combiner_base import combiners_of, unprojected
from auxfast.solvers import DEFAULT_SOLVER, Identity
from auxfast.solvers.base import NOT_FINITE, Solver, SolverState, SolveStats, are_alike, check_positive, check_solver

# Some hundred outer steps are many: Adam's own 0.999 would remember the first gradients to the end.
_BETAS = (0.9, 0.99)

_UNSEEN = (
    "max_weight_change and keep_total do nothing for a combiner whose calls are not seen: calls under torch.compile or "
    "transforms of torch.func, or of a combiner whose phi is parametrized. Call the combiner itself, outside of these."
)


@runtime_checkable
class Projectable(Protocol):
    """Something that can move its parameters back into the set where they belong, as a combiner can."""

    def project_(self) -> Any: ...


@dataclass
class _Accumulated:
    """Hypergradients since the last step.

    Attributes:
        grads: their weighted sum; `None` as long as none was added.
        stats: of all tasks, those that were left out too.
        left_out: the number of those.
        reason: why the last of them was.
    """

    grads: Sequence[Tensor] | None = None
    stats: list[SolveStats] = field(default_factory=list)
    left_out: int = 0
    reason: str | None = None
    _outer_losses: list[tuple[float, Tensor | None]] = field(default_factory=list)

    def take(self, result: HypergradientResult | GraphedResult, outer_loss: Tensor | None, weight: float) -> bool:
        """Adds a hypergradient, or leaves it out where the solver has found nothing; returns whether it was added."""
        if result.direct_only or math.isinf(result.stats.residual):
            self.leave_out(result.stats, "the solver has found nothing better than x = 0")
            return False
        grads = result.grads if weight == 1 else [weight * grad for grad in result.grads]
        self.grads = grads if self.grads is None else [a + b for a, b in zip(self.grads, grads, strict=True)]
        self.stats.append(result.stats)
        self._outer_losses.append((weight, outer_loss))
        return True

    def leave_out(self, stats: SolveStats, reason: str) -> None:
        self.stats.append(stats)
        self.left_out += 1
        self.reason = reason

    def outer_loss(self, ranks: Ranks | None) -> float | None:
        """The weighted mean of the outer losses, where all are tensors; over ranks the mean of theirs."""
        own = self._own_outer_loss()
        if ranks is None:
            return own
        found = [value for is_there, value in ranks.gather([own is not None, own or 0.0]) if is_there]
        return sum(found) / len(found) if found else None

    def _own_outer_loss(self) -> float | None:
        values = [(weight, float(loss)) for weight, loss in self._outer_losses if loss is not None]
        if len(values) < len(self._outer_losses):
            return None
        return sum(weight * value for weight, value in values) / sum(weight for weight, _ in values)


class HyperOptimizer:
    """Updates the parameters of a torch optimizer along their hypergradient, as the paper's Algorithm 1 does; or along
    the sum of those of several tasks, see `accumulate`.

    Args:
        optimizer: holds the outer parameters, in its parameter groups, and makes the update.
        solver, curvature, warn: see `hypergradient`. What the solver learns in one step, and which warnings were given,
            is kept for the next in `state`.
        max_grad_norm: hypergradients of a larger total norm are scaled down to it; `None`: as they are.
        max_weight_change: the largest share by which one step may change the mean weight of any loss on the batch of a
            combiner's latest call, whatever the torch optimizer proposes: a longer step is shortened. `None`: no limit.
        keep_total: whether the weights of each combiner add up, on that batch, to what they did at the first step: for
            the sample where they add up to most, and without the 1 of a main loss that is added as it is. Weights of
            both signs are counted by their sizes, and may shrink. Learning then shapes the mix, and leaves the speed of
            inner training alone.
        project: modules whose `project_()` is called after each update.
        process_group: see `hypergradient`; the updates are the same on all ranks.

    Attributes:
        optimizer: the one that was given. Learning rate schedulers take it.
        state: what the solver keeps from one step for the next; of several tasks, for the first.
        task_states: the same for the other tasks of `accumulate`, by their places in the order or their names.
        skipped_steps: the number of steps that changed nothing; see `step`.
        skipped_tasks: the number of hypergradients that were left out of their steps; see `accumulate`.
        watch: what was noticed in the course of the steps; `watch.noticed` names it.

    Raises:
        TypeError: `optimizer` is not a torch optimizer, or needs a closure, as LBFGS does; `solver` is no solver; or
            something in `project` has no `project_()`.
        ValueError: `curvature` is unknown, or `max_grad_norm` or `max_weight_change` is not above 0.

    Warns of monotone combiners whose `phi` the optimizer holds and nothing in `project` projects; and, once each, of
    auxiliary losses that have all lost their weight, of weights that have grown tenfold, of an outer loss, given as a
    tensor, that has been rising for long, and of a combiner whose calls are not seen (under torch.compile), where there
    is a limit to what steps may do to its weights.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        solver: Solver = DEFAULT_SOLVER,
        curvature: CurvatureName = "hessian",
        max_grad_norm: float | None = None,
        max_weight_change: float | None = 0.15,
        keep_total: bool = False,
        project: Sequence[Projectable] = (),
        process_group: ProcessGroup | None = None,
        warn: bool = True,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not a {type(optimizer).__name__}")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"optimizer must be one whose step() needs no closure, not {type(optimizer).__name__}: a hypergradient "
                "is not evaluated again within a step. Take SGD or Adam."
            )
        check_solver(solver)
        check_curvature(curvature)
        if max_grad_norm is not None:
            check_positive("max_grad_norm", max_grad_norm)
        if max_weight_change is not None:
            check_positive("max_weight_change", max_weight_change)
        self.project = _projectable(project)
        if warn:
            _warn_of_unprojected(optimizer, self.project)
        self.optimizer = optimizer
        self.solver = solver
        self.curvature = curvature
        self.process_group = process_group
        self.warn = warn
        self.state = SolverState()
        if warn:
            warn_of_no_group(process_group, self.state)
        self.task_states: dict[int | str, SolverState] = {}
        self.skipped_steps = 0
        self.skipped_tasks = 0
        self.max_grad_norm = max_grad_norm
        self.max_weight_change = max_weight_change
        self._totals: list[float | None] | None = [] if keep_total else None
        self.watch = Watch()
        self._accumulated = _Accumulated()

    @classmethod
    def recommended(
        cls,
        combiner: Combiner | None = None,
        *,
        generator: LabelGenerator | None = None,
        lr: float = 0.1,
        generator_lr: float = 1e-3,
        **settings: Any,
    ) -> HyperOptimizer:
        """The optimizer to begin with for a combiner of losses, a label generator, or both: for combiners it needs
        no tuning on the tasks that it was tried on (docs/outer-loop.md), and takes the same settings for every one.

        It keeps the total of the weights, and makes `phi` of a monotone combiner, in place, the logarithms of the
        weights (`Combiner.positive_`), so that none is lost for good; the combined loss stays as it is. The steps are
        Adam's, along a hypergradient by `Identity()`, which looks at no curvature: the cheapest one, and damped MINRES
        learned no better weights. Which of them points where training goes differs between tasks, and the page has it.

        Args:
            combiner: one that has not been trained yet, on its device.
            generator: a label generator, on its device.
            lr: relative change of a weight in one step, at most about.
            generator_lr: learning rate of the generator's parameters.
            settings: further arguments of `HyperOptimizer`, such as `solver`.

        Raises:
            TypeError: `combiner` is none, `generator` is none, or neither is given; or see `HyperOptimizer`.
            ValueError: all weights of a monotone combiner are 0, and would stay so, since their total is kept; or see
                `HyperOptimizer`.
        """
        for name, module, kind in (("combiner", combiner, Combiner), ("generator", generator, LabelGenerator)):
            if module is not None and not isinstance(module, kind):
                raise TypeError(
                    f"{name} must be one of auxfast.nn, not a {type(module).__name__}: for other outer parameters make "
                    "HyperOptimizer(torch_optimizer, ...)"
                )
        if combiner is None and generator is None:
            raise TypeError("recommended takes a combiner, a generator, or both, and got neither")
        check_positive("lr", lr)
        check_positive("generator_lr", generator_lr)
        groups: list[dict[str, Any]] = []
        if combiner is not None:
            groups.append({"params": list(combiner.parameters())})
        if generator is not None:
            groups.append({"params": list(generator.parameters()), "lr": generator_lr})
        if combiner is not None and combiner.monotone:
            if combiner.positive == "clip" and settings.get("keep_total", True) and not combiner.phi.any():
                raise ValueError(
                    "combiner must start with weights above 0, for their total is kept: give it an init_value above 0, "
                    "or pass keep_total=False"
                )
            combiner.positive_("exp")
        optimizer = torch.optim.Adam(groups, lr=lr, betas=_BETAS)
        project = [] if combiner is None else [combiner]
        return cls(optimizer, **{"solver": Identity(), "keep_total": True, "project": project, **settings})

    def step(
        self,
        outer_loss: Loss | None = None,
        inner_loss: Loss | None = None,
        inner_params: Iterable[Tensor] | None = None,
        *,
        outputs: Tensor | Sequence[Tensor] | None = None,
        free: Free | None = None,
        retain_graph: bool = False,
    ) -> SolveStats:
        """One update of the outer parameters; arguments and errors are those of `hypergradient`.

        The hypergradient replaces their `.grad`. Where it is not finite, or the solver finds nothing better than x = 0,
        the step is skipped: parameters, the optimizer's momentum and the solver's state stay as they are,
        `skipped_steps` counts it, and a warning says why, once. `stats.stop_reason` is then `not finite`, or the
        solver's.

        After `accumulate`, the update is along the sum of the hypergradients of all tasks. The losses are then those of
        the last task, or there are none: `step()`, as after `accumulate_result`. What is returned is of the task with
        the largest residual.

        Raises:
            TypeError: only some of the three arguments were given; or see `hypergradient`.
            RuntimeError: there are no losses, and nothing was accumulated; or see `hypergradient`.
        """
        if outer_loss is not None and inner_loss is not None and inner_params is not None:
            self.accumulate(outer_loss, inner_loss, inner_params, outputs=outputs, free=free, retain_graph=retain_graph)
        elif outer_loss is not None or inner_loss is not None or inner_params is not None:
            raise TypeError("step takes outer_loss, inner_loss and inner_params, or none of them after accumulate()")
        elif not self._accumulated.stats:
            raise RuntimeError(
                "step() without losses needs accumulate() or accumulate_result() before it: there is no gradient to "
                "follow"
            )
        accumulated, self._accumulated = self._accumulated, _Accumulated()
        self._count(accumulated)
        if accumulated.grads is not None:
            self._update(accumulated)
        return max(accumulated.stats, key=lambda stats: math.inf if math.isnan(stats.residual) else stats.residual)

    def accumulate(
        self,
        outer_loss: Loss,
        inner_loss: Loss,
        inner_params: Iterable[Tensor],
        *,
        weight: float = 1.0,
        task: int | str | None = None,
        outputs: Tensor | Sequence[Tensor] | None = None,
        free: Free | None = None,
        retain_graph: bool = False,
    ) -> SolveStats:
        """Adds the hypergradient of a task to the sum that the next `step` follows, so that several tasks, each with
        inner parameters of its own, make one update.

        A task whose hypergradient is not finite, or for which the solver finds nothing better than x = 0, is left out:
        its part of the solver's state stays as it is, `skipped_tasks` counts it, and the step warns of it, once. A step
        of which no task is left is skipped.

        Args:
            outer_loss, inner_loss, inner_params, outputs, free, retain_graph: see `hypergradient`.
            weight: what the hypergradient is multiplied by, above 0; `1 / number of tasks` makes the sum a mean.
            task: what the solver keeps from this task, such as eigenvalues and solutions for a warm start, goes to that
                of the same number or name in later steps. `None`: its place in the order of this step, from 0 on. Tasks
                that are drawn anew for each step have nothing to hand on: take a solver that keeps nothing, such as
                `MINRES()`, and not the default, which starts from the last solution.

        Raises:
            TypeError, ValueError, RuntimeError: as `hypergradient` does; also for another `weight` or `task`. Nothing
                is added then.
        """
        check_positive("weight", weight)
        if task is not None and (isinstance(task, bool) or not isinstance(task, (int, str))):
            raise TypeError(f"task must be an integer, a text or None, not a {type(task).__name__}")
        accumulated = self._accumulated
        state = self._state_of(len(accumulated.stats) if task is None else task)
        before = vars(state).copy()
        value = _value_of(outer_loss)
        try:
            result = hypergradient(
                outer_loss,
                inner_loss,
                inner_params,
                self._params(),
                solver=self.solver,
                curvature=self.curvature,
                outputs=outputs,
                free=free,
                state=state,
                process_group=self.process_group,
                retain_graph=retain_graph,
                warn=self.warn,
            )
        except NotFiniteError as error:
            vars(state).update(before, warned=state.warned)
            accumulated.leave_out(NOT_FINITE, str(error))
            return NOT_FINITE
        if not accumulated.take(result, value, weight):
            # What the solver has thrown away, such as eigenvalues that did not serve, would only fail again.
            before = {name: None if vars(state)[name] is None else kept for name, kept in before.items()}
            vars(state).update(before, warned=state.warned)
        return result.stats

    def accumulate_result(self, result: GraphedResult, *, weight: float = 1.0) -> SolveStats:
        """The same for a hypergradient that a `GraphedHypergradient` has computed; solver, curvature and warnings are
        then the ones of that. Waits for the device.

        Raises:
            TypeError: `result` is no `GraphedResult`.
            ValueError: another `weight`, or gradients that are not aligned with the parameters of the optimizer.
        """
        check_positive("weight", weight)
        if not isinstance(result, GraphedResult):
            raise TypeError(
                f"result must be what a call of a GraphedHypergradient returns, not a {type(result).__name__}: "
                "accumulate() takes losses"
            )
        if not are_alike(result.grads, self._params()):
            raise ValueError(
                "result must have a gradient like each parameter of the optimizer, in its order: make the "
                "GraphedHypergradient with the same outer_params"
            )
        accumulated = self._accumulated
        try:
            accumulated.take(result, None, weight)
        except NotFiniteError as error:
            accumulated.leave_out(NOT_FINITE, str(error))
            return NOT_FINITE
        return result.stats

    def _params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _state_of(self, task: int | str) -> SolverState:
        """The state that the solver has for a task. Warnings are given once for all tasks."""
        if task == 0:
            return self.state
        return self.task_states.setdefault(task, SolverState(warned=self.state.warned))

    def _count(self, accumulated: _Accumulated) -> None:
        """Counts tasks that were left out, or the step if none is left, and warns of them."""
        if accumulated.reason is None:
            return
        self.skipped_tasks += accumulated.left_out
        if accumulated.grads is None:
            self.skipped_steps += 1
            kind, text = "skipped", "An outer step was skipped, and HyperOptimizer.skipped_steps counts it"
        else:
            kind = "task left out"
            text = "A task was left out of an outer step, and HyperOptimizer.skipped_tasks counts it"
        if self.warn:
            warn_once(kind, f"{text}: {accumulated.reason}", self.state)

    def _update(self, accumulated: _Accumulated) -> None:
        params, grads = self._params(), accumulated.grads
        assert grads is not None
        if len(params) != len(grads):
            raise RuntimeError(
                f"optimizer holds {len(params)} parameters at the step, and held {len(grads)} when gradients were "
                "accumulated: add parameter groups after step()"
            )
        for param, grad in zip(params, self._clipped(grads), strict=True):
            param.grad = grad if param.requires_grad else None
        ranks = ranks_of(self.process_group, params[0].device)
        combiners = list(combiners_of(params))
        seen = [combiner for combiner in combiners if sees(combiner, ranks)]
        watched = seen[0] if seen else None
        if watched is not None and self.watch.first_total is None:  # it may be this step after which they have grown
            self.watch.first_total = float(mean_weights(watched, ranks, whole=True).abs().sum())
        with trust_region(params, self.max_weight_change, self._totals, ranks) as reached:
            self.optimizer.step()
            for module in self.project:
                module.project_()
        is_limited = self.max_weight_change is not None or self._totals is not None
        if self.warn and is_limited and any(c not in seen and _has_gradient(c) for c in combiners):
            warn_once("unseen", _UNSEEN, self.state)
        self._observe(accumulated.outer_loss(ranks), watched, reached, ranks)

    def _observe(
        self,
        outer_loss: float | None,
        combiner: Combiner | None,
        reached: Mapping[Combiner, Tensor],
        ranks: Ranks | None,
    ) -> None:
        """Warns of what is noticed for the first time.

        Args:
            outer_loss: its value; None where it is not known.
            combiner: the first that is seen, since several are not told apart; None if there is none.
            reached: mean weights after the step, as far as they are known; those of whole batches are without a mask.
        """
        weights: list[float] = []
        if combiner is not None:
            has_mask = combiner.last_call is None or combiner.last_call[1] is not None
            known = None if has_mask or ranks is not None else reached.get(combiner)
            weights = (mean_weights(combiner, ranks, whole=True) if known is None else known).tolist()
        for kind in self.watch.observe(outer_loss, weights, None if combiner is None else combiner.main):
            if self.warn:
                warn_once(kind, TEXTS[kind], self.state)

    def _clipped(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.max_grad_norm is None:
            return grads
        norm = torch.nn.utils.get_total_norm(grads)
        if not norm.isfinite():  # the squares have overflowed
            norm = torch.nn.utils.get_total_norm([grad.double() for grad in grads])
        scale = (self.max_grad_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
        return [grad * scale.to(grad.device, grad.dtype) for grad in grads]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears `.grad` of the outer parameters, where the inner loss's backward() leaves its own."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of the torch optimizer, `state` and `task_states`, which the solver keeps, `skipped_steps`,
        `skipped_tasks` and `watch`. A run that goes on from here gives the same numbers as one without a break.

        Raises:
            RuntimeError: gradients were accumulated that no step has followed: they are not saved.
        """
        if self._accumulated.stats:
            raise RuntimeError(
                "state_dict() between accumulate() and step() would lose the gradients of the tasks: call step() first"
            )
        return {
            **self.optimizer.state_dict(),
            "solver_state": dict(vars(self.state)),
            "task_states": {task: _without_warned(state) for task, state in self.task_states.items()},
            "skipped_steps": self.skipped_steps,
            "skipped_tasks": self.skipped_tasks,
            "watch": self.watch.state_dict(),
            "totals": deepcopy(self._totals),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or the state of a torch optimizer, from which the solver learns nothing.

        Raises:
            ValueError: it is neither.
        """
        if not isinstance(state_dict, Mapping) or "param_groups" not in state_dict:
            raise ValueError(
                "state_dict must be that of a HyperOptimizer or of a torch optimizer: it has no param_groups"
            )
        self.optimizer.load_state_dict(state_dict)
        self.state = SolverState(**deepcopy(state_dict.get("solver_state", {})))
        states = deepcopy(state_dict.get("task_states", {}))
        self.task_states = {task: SolverState(**kept, warned=self.state.warned) for task, kept in states.items()}
        self.skipped_steps = state_dict.get("skipped_steps", 0)
        self.skipped_tasks = state_dict.get("skipped_tasks", 0)
        self._accumulated = _Accumulated()
        self.watch = Watch.from_state_dict(state_dict.get("watch", {}))
        if self._totals is not None:
            self._totals = list(state_dict.get("totals") or [])


def _value_of(outer_loss: Loss) -> Tensor | None:
    """The value of a loss that is a tensor. `None` also where something is wrong with it: that is for `hypergradient`
    to raise, which tells the other ranks."""
    if not isinstance(outer_loss, Tensor):
        return None
    try:
        return LossGraph("outer_loss", outer_loss).value
    except (ValueError, RuntimeError):
        return None


def _without_warned(state: SolverState) -> dict[str, Any]:
    """The fields, but for the warnings, which are those of `HyperOptimizer.state`."""
    return {name: kept for name, kept in vars(state).items() if name != "warned"}


def _projectable(project: Any) -> tuple[Projectable, ...]:
    wanted = "project must be a list of modules that have project_()"
    if not isinstance(project, Iterable) or isinstance(project, torch.nn.Module):
        raise TypeError(f"{wanted}, got a {type(project).__name__}")
    modules = tuple(project)
    for module in modules:
        if not hasattr(module, "project_"):
            raise TypeError(f"{wanted}, got one with a {type(module).__name__}")
    return modules


def _has_gradient(combiner: Combiner) -> bool:
    return any(param.grad is not None and bool(param.grad.any()) for param in combiner.parameters())


def _warn_of_unprojected(optimizer: torch.optim.Optimizer, projected: Sequence[Projectable]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if names := {type(combiner).__name__ for combiner in unprojected(params, projected)}:
        text = "Nothing keeps a monotone {} monotone: pass project=[combiner], or make it with monotone=False."
        warn_once("not projected", text.format(", ".join(sorted(names))), None)
