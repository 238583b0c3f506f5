"""Whole hypergradients, with the forward passes of both losses: eager, as a graph, and by the textbook loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auxfast import GraphedHypergradient, hypergradient
from auxfast.autograd.batched_backward import SingleBackward
from auxfast.nn import NonlinearCombiner
from auxfast.solvers import DEFAULT_SOLVER, MINRES, Chebyshev, ConjugateGradient, Neumann, Solver
from benchmarks.eager import EagerCombiner, textbook_neumann
from benchmarks.gpu.section import Call, Section
from benchmarks.networks import mlp, resnet

OUTPUTS, HIDDEN, BATCH = 10, (10,) * 5, 64
STEP_SIZE = 0.01
"""The Hessian of the MLP has eigenvalues from -1.8 to 8.2, and up to 8.6 that of the large network. At this step the
terms of the series shrink for 20 steps, so that auxfast does not cut it and both ways compute the same. At 0.1 they
grow after the third."""

SOLVERS: dict[str, Solver] = {
    "Neumann(20)": Neumann(20, STEP_SIZE),
    "MINRES(20)": MINRES(20, tol=None),
    "CG(20)": ConjugateGradient(20, tol=None),
    "the default": DEFAULT_SOLVER,
}


class Problem:
    """A network, the combiner of its squared errors, and data that are drawn on the CPU, the same on each machine."""

    def __init__(self, make: Callable[[], tuple[nn.Module, Tensor]], device: torch.device) -> None:
        torch.manual_seed(0)
        net, x = make()
        batch = len(x)
        drawn = x, torch.randn(batch, OUTPUTS), torch.randn_like(x), torch.randn(batch, OUTPUTS)
        self.net, combiner = net.to(device), NonlinearCombiner(OUTPUTS, HIDDEN)
        self.combiner, self.eager = combiner.to(device), EagerCombiner(combiner).to(device)
        x, y, outer_x, outer_y = (tensor.to(device) for tensor in drawn)
        self.inner_inputs, self.outer_inputs = (x, y), (outer_x, outer_y)
        self.inner_params, self.outer_params = list(self.net.parameters()), list(self.combiner.parameters())

    def errors(self, x: Tensor, y: Tensor) -> Tensor:
        """(batch, num_losses)"""
        return (self.net(x) - y).square()

    def inner_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.combiner(self.errors(x, y))

    def outer_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.errors(x, y)[:, 0].mean()

    def auxfast(self, solver: Solver) -> Any:
        losses = self.outer_loss(*self.outer_inputs), self.inner_loss(*self.inner_inputs)
        return hypergradient(*losses, self.inner_params, self.outer_params, solver=solver, warn=False)

    def graphed(self, solver: Solver) -> GraphedHypergradient:
        return GraphedHypergradient(
            self.outer_loss,
            self.inner_loss,
            self.inner_params,
            self.outer_params,
            outer_inputs=self.outer_inputs,
            inner_inputs=self.inner_inputs,
            solver=solver,
        )

    def replay(self, graphed: GraphedHypergradient) -> Any:
        return graphed(self.outer_inputs, self.inner_inputs)

    def textbook(self, steps: int) -> list[Tensor]:
        losses = self.outer_loss(*self.outer_inputs), self.eager(self.errors(*self.inner_inputs))
        return textbook_neumann(*losses, self.inner_params, list(self.eager.parameters()), steps, STEP_SIZE)


def relative_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    a, b = (torch.cat([tensor.reshape(-1).double() for tensor in some]) for some in (one, other))
    return float((a - b).norm() / b.norm())


def hypergradients(section: Section) -> None:
    """Hypergradients of the MLP 64-128-128-10, and one product with its Hessian."""
    problem = Problem(_mlp, section.device)
    steps = 3 if section.small else 20
    solver = Neumann(steps, STEP_SIZE)
    ways = {"auxfast": lambda _: lambda: problem.auxfast(solver)}
    section.compare(f"Neumann({steps})", ways, graph=False)
    section.compare(f"Neumann({steps}), textbook", {"torch": lambda _: lambda: problem.textbook(steps)})
    result = problem.auxfast(solver)
    section.note("Neumann, stop reason", result.stats.stop_reason)
    section.note("Neumann, products", result.stats.matvecs)
    section.note("Neumann, relative difference", relative_difference(result.grads, problem.textbook(steps)))
    others = {"MINRES(20)": SOLVERS["MINRES(20)"], "CG(20)": SOLVERS["CG(20)"], "the default": DEFAULT_SOLVER}
    for name, other in (others | {"Chebyshev(20)": Chebyshev(20, (1e-3, 10.0), tol=None)}).items():
        call = {"auxfast": lambda _, other=other: lambda: problem.auxfast(other)}
        section.compare(name, call, graph=False)
    section.compare("a product", {"engine": _engine(problem.combiner, problem), "own pass": _own_pass(problem)})
    section.compare("a product, torch.nn combiner", {"torch": _engine(problem.eager, problem)})


def _mlp() -> tuple[nn.Module, Tensor]:
    return mlp(64, 128, 128, OUTPUTS, batch=BATCH)


def _recorded(combiner: nn.Module, problem: Problem) -> tuple[Sequence[Tensor], list[Tensor]]:
    """The gradient with its graph, and a vector like the parameters."""
    loss = combiner(problem.errors(*problem.inner_inputs))
    gradient = torch.autograd.grad(loss, problem.inner_params, create_graph=True)
    return gradient, [torch.randn_like(w) for w in problem.inner_params]


def _engine(combiner: nn.Module, problem: Problem) -> Callable[[int], Call]:
    def make(_: int) -> Call:
        gradient, v = _recorded(combiner, problem)
        return lambda: torch.autograd.grad(gradient, problem.inner_params, v, retain_graph=True)

    return make


def _own_pass(problem: Problem) -> Callable[[int], Call]:
    def make(_: int) -> Call:
        gradient, v = _recorded(problem.combiner, problem)
        return partial(SingleBackward(gradient, problem.inner_params), v)

    return make


def graphed(section: Section) -> None:
    """`GraphedHypergradient` of the same problem, called with new inputs each time."""
    problem = Problem(_mlp, section.device)
    for name, solver in SOLVERS.items():
        _graphed(section, problem, name, solver)


def _graphed(section: Section, problem: Problem, name: str, solver: Solver) -> None:
    def make(_: int) -> Call:
        captured = problem.graphed(solver)
        return lambda: problem.replay(captured)

    # A call launches the graph and what copies the inputs and the results: it is measured as it is used.
    section.compare(name, {"auxfast": make}, graph=False)
    difference = relative_difference(problem.replay(problem.graphed(solver)).grads, problem.auxfast(solver).grads)
    section.note(f"{name}, relative difference to eager", difference)


def large_network(section: Section) -> None:
    """Hypergradients of a residual network with 11 million parameters, on 32 images of 64 x 64."""
    width, batch = (4, 2) if section.small else (64, 32)
    problem = Problem(lambda: resnet(width, OUTPUTS, batch=batch), section.device)
    section.note("parameters", sum(w.numel() for w in problem.inner_params))
    steps = 2 if section.small else 5
    solver = Neumann(steps, STEP_SIZE)
    section.compare(f"Neumann({steps})", {"auxfast": lambda _: lambda: problem.auxfast(solver)}, graph=False)
    section.compare(f"Neumann({steps}), textbook", {"torch": lambda _: lambda: problem.textbook(steps)})
    difference = relative_difference(problem.auxfast(solver).grads, problem.textbook(steps))
    section.note("Neumann, relative difference", difference)
    _graphed(section, problem, f"Neumann({steps}), graphed", solver)
