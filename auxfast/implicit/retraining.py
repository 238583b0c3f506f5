"""A check of the hypergradient against training itself: whole trainings with the outer parameters moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxfast.autograd.engine import zeros_for_none
from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit.arguments import as_tuple
from auxfast.implicit.bilevel_problem import assign, flat, restored
from auxfast.implicit.derivatives import CurvatureName, check_curvature
from auxfast.implicit.finite import NotFiniteError
from auxfast.implicit.hypergradient import HypergradientResult, hypergradient
from auxfast.implicit.losses import Loss, LossFn, LossFns, LossGraph, as_loss_fns, check_call, mean_gradient, mean_loss
from auxfast.implicit.retraining_report import Prediction, RetrainingReport
from auxfast.solvers import MINRES, Solver, SolveStats
from auxfast.solvers.base import check_positive, check_solver, check_steps

Train = Callable[[int], tuple[Loss, Loss, Iterable[Tensor]]]
"""Trains the inner problem from its start and returns `(outer_loss, inner_loss, inner_params)`."""

_SAME = 1e-4
"""Largest relative difference of two trainings that are called the same."""
_NEAR_ZERO = 0.01
"""Part of the typical size below which an entry has no size of its own to take a share of."""


def verify_against_retraining(
    train: Train,
    outer_params: Iterable[Tensor],
    *,
    seeds: Iterable[int] = range(5),
    solver: Solver | Mapping[str, Solver] | None = None,
    curvature: CurvatureName = "hessian",
    share: float = 0.25,
    step: float | None = None,
    max_directions: int = 8,
) -> RetrainingReport:
    """Compares hypergradients with what whole trainings do when the outer parameters are moved: would learning help?

    `verify_hypergradient` asks whether the theorem is computed right. This asks whether the theorem is about *this*
    training: a network that is stopped early, overfitted or shaken by small batches is at no minimum, and the exact
    hypergradient may then point away from where training goes. For each seed the inner problem is trained once with the
    outer parameters as they are, where hypergradients are taken, and twice for each direction: moved up and moved down.

    What is compared are changes of the outer loss, for a move of each entry by `share` of its size: half the difference
    of the trainings moved up and down, and what the hypergradient says of that move. `report.verdict`, at the end of
    `print(report)`, is one of three for each solver. The statistics are means over seeds, with bounds by Student's t at
    5%, one-sided, so that few seeds of a noisy training decide nothing:

    - *points right*: the cosine of the hypergradient with retraining is above 0 beyond noise: a step against it lowers
      the outer loss.
    - *does not point where retraining goes*: that cosine is below 0 beyond noise; or it is below 0.5 beyond noise,
      while retraining agrees with itself (the cosine of its changes by moves up and by moves down is above 0 beyond
      noise; pure noise has -0.5).
    - *not distinguishable from noise*: neither. Take more seeds, or a larger share or step.

    With one or two directions, where a cosine is little more than a sign, "above 0" and "below 0" are those of the
    change by retraining along the hypergradient.

    It costs `len(seeds) * (2 * directions + 1) + 1` trainings.

    Args:
        train: called with a seed; trains the inner problem from its start with `outer_params` as they are, and returns
            `(outer_loss, inner_loss, inner_params)` as `hypergradient` takes them. All randomness (first parameters,
            batches, dropout) must come from the seed, so that trainings of one seed differ by the outer parameters
            alone.
        outer_params: leaves; moved in place, and put back exactly, with their `.grad`, also after an exception.
        seeds: at least two; five or more if training is noisy.
        solver: what is compared, or several by name, from the same trainings; `None`: the default of `hypergradient`,
            `MINRES()`.
        curvature: as for `hypergradient`.
        share: how far each entry is moved, as a part of its size. An entry below 1% of the root mean square of its
            tensor is moved by that share of the root mean square; where a tensor is zero, of 1.
        step: how far every entry is moved, in place of `share`: for logarithms of weights, whose size means nothing,
            0.25 moves the weights by about 25%.
        max_directions: up to so many entries are each moved; of more, all at once along so many directions of random
            signs.

    Raises:
        TypeError: `train` is not a function or returns something else than a tuple of three, seeds or parameters that
            are no iterable, or a solver that is none.
        ValueError: a setting outside its range; fewer than two seeds, or one twice; outer parameters that are no
            leaves, or without any `requires_grad=True`; a `train` that is not deterministic for a seed, ignores
            `outer_params` or changes them; or what `hypergradient` raises.
        NotFiniteError: the outer loss after a training holds NaN or inf; or as `hypergradient` does.
    """
    given: Any = train
    if not callable(given):
        raise TypeError(f"train must be a function of a seed, not a {type(given).__name__}")
    solvers = _by_name(solver)
    check_curvature(curvature)
    check_positive("share", share)
    if step is not None:
        check_positive("step", step)
    check_steps("max_directions", max_directions)
    if not isinstance(seeds, Iterable):
        raise TypeError(f"seeds must be an iterable, such as range(5), not a {type(seeds).__name__}")
    tried = tuple(seeds)
    if len(set(tried)) < max(2, len(tried)):
        raise ValueError(f"seeds must be at least two different ones, not {tried}: their spread gives the error bars")
    outer = [phi for phi in as_tuple("outer_params", outer_params) if phi.requires_grad]
    if not outer:
        raise ValueError("outer_params has no parameter with requires_grad=True: there is nothing to verify")
    if any(not phi.is_leaf for phi in outer):
        raise ValueError("outer_params must be leaves: their values are moved in place")

    phi = flat(outer)
    sizes = _sizes(outer) * share if step is None else torch.full_like(phi, step)
    moves = _signs(len(phi), max_directions) * sizes
    training = _Training(train, outer, curvature)
    losses: list[float] = []
    changes_up, changes_down, norms = [], [], []
    predicted: dict[str, list[Tensor]] = {name: [] for name in solvers}
    stats: dict[str, list[SolveStats]] = {name: [] for name in solvers}
    with restored(outer):
        for seed in tried:
            trained = training.at(phi, seed)
            for name, each in solvers.items():
                result = trained.hypergradient(outer, each)
                predicted[name].append(moves @ flat(result.grads))
                stats[name].append(result.stats)
            norms.append(trained.inner_gradient_norm())
            loss = trained.loss
            del trained  # its graphs
            if not losses:
                _check_same(loss, training.at(phi, seed).loss, seed)
            above, below = (
                torch.tensor([training.at(phi + sign * move, seed).loss for move in moves], dtype=torch.float64)
                for sign in (1, -1)
            )
            if not losses and bool((above == loss).all() & (below == loss).all()):
                raise ValueError(
                    f"train ignores outer_params: with seed {seed} the outer loss is {loss:.9g} however they are "
                    "moved. Does it compute the inner loss from these very tensors, and not from copies?"
                )
            losses.append(loss)
            changes_up.append(above - loss)
            changes_down.append(loss - below)
    up, down = torch.stack(changes_up), torch.stack(changes_down)
    return RetrainingReport(
        seeds=tried,
        moves=moves,
        share=share if step is None else None,
        changes_up=up,
        changes_down=down,
        outer_losses=torch.tensor(losses, dtype=torch.float64),
        inner_gradient_norms=torch.tensor(norms, dtype=torch.float64),
        predictions={name: Prediction(torch.stack(predicted[name]), up, down, tuple(stats[name])) for name in solvers},
    )


@dataclass(frozen=True)
class _Training:
    """Trainings with the outer parameters at given values."""

    train: Train
    outer: list[Tensor]
    curvature: CurvatureName

    def at(self, values: Tensor, seed: int) -> _Trained:
        """values: (n,)"""
        assign(self.outer, values)
        before = flat(self.outer)
        returned: Any = self.train(seed)
        if not isinstance(returned, tuple) or len(returned) != 3:
            given = f"{len(returned)} things" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
            raise TypeError(f"train must return a tuple (outer_loss, inner_loss, inner_params), not {given}")
        if not torch.equal(flat(self.outer), before):
            raise ValueError("train changes outer_params: it must train the inner parameters alone")
        outer_loss, inner_loss, inner_params = returned
        with preserved_state(check=check_call) as guard:
            loss = mean_loss(_loss_fns("outer_loss", outer_loss, guard)).item()
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"The outer loss is {loss} after training with seed {seed}: inner training has diverged. Take a "
                "smaller learning rate for it, or a smaller share or step"
            )
        return _Trained(outer_loss, inner_loss, as_tuple("inner_params", inner_params), loss, self.curvature)


@dataclass(frozen=True)
class _Trained:
    """What a training has returned, and the outer loss after it."""

    outer_loss: Loss
    inner_loss: Loss
    inner_params: tuple[Tensor, ...]
    loss: float
    curvature: CurvatureName

    def hypergradient(self, outer: Sequence[Tensor], solver: Solver) -> HypergradientResult:
        return hypergradient(
            self.outer_loss,
            self.inner_loss,
            self.inner_params,
            outer,
            solver=solver,
            curvature=self.curvature,
            retain_graph=True,
            warn=False,
        )

    def inner_gradient_norm(self) -> float:
        """Norm of the gradient that the theorem takes for 0. The graph of a tensor is spent."""
        active = [w for w in self.inner_params if w.requires_grad]
        with preserved_state(check=check_call) as guard:
            fns = _loss_fns("inner_loss", self.inner_loss, guard, self.curvature == "gauss-newton")
            return float(flat(zeros_for_none(mean_gradient(fns, active), active)).norm())


def _loss_fns(name: str, loss: Loss, guard: preserved_state, with_outputs: bool = False) -> LossFns:
    if isinstance(loss, Tensor):
        graph = LossGraph(name, loss)
        return LossFns([LossFn(lambda: graph)])
    return as_loss_fns(name, loss, guard.replay, with_outputs)


def _by_name(solver: Solver | Mapping[str, Solver] | None) -> dict[str, Solver]:
    if isinstance(solver, Mapping):
        if not solver:
            raise ValueError("solver is empty: it must hold a solver, by its name")
        solvers = {str(name): each for name, each in solver.items()}
    else:
        only = MINRES() if solver is None else solver
        solvers = {type(only).__name__: only}
    for each in solvers.values():
        check_solver(each)
    return solvers


def _check_same(first: float, second: float, seed: int) -> None:
    if abs(first - second) > _SAME * abs(first):
        raise ValueError(
            f"train is not deterministic: two trainings with seed {seed} and the same outer_params ended with outer "
            f"losses of {first:.9g} and {second:.9g}. Take all randomness from the seed (torch.manual_seed(seed) at "
            "its start), build the network anew, and on a GPU call torch.use_deterministic_algorithms(True)"
        )


def _sizes(params: Sequence[Tensor]) -> Tensor:
    """(n,): the size of each entry, or that of its tensor where the entry is next to nothing."""
    parts = []
    for param in params:
        entries = flat([param]).abs()
        typical = float(entries.square().mean().sqrt()) or 1.0 if len(entries) else 1.0
        parts.append(torch.where(entries < _NEAR_ZERO * typical, typical, entries))
    return torch.cat(parts)


def _signs(size: int, most: int) -> Tensor:
    """(m, size): one entry each, or all of them with random signs."""
    if size <= most:
        return torch.eye(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return 2.0 * torch.randint(2, (most, size), generator=generator).double() - 1
