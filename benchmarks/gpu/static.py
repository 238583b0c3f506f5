"""Kernels that calls launch on a GPU, and how often the host waits for it, counted on a CPU.

python -m benchmarks.gpu.static            the tables
python -m benchmarks.gpu.static --docs     puts them into docs/gpu.md
python -m benchmarks.gpu.static --check    fails where docs/gpu.md has others
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import auxfast
from auxfast.autograd.batched_backward import BatchedBackward, SingleBackward
from auxfast.nn import ConvCombiner, NonlinearCombiner
from auxfast.solvers import DEFAULT_SOLVER, MINRES, Chebyshev, ConjugateGradient, Neumann, Solver, StopReason
from benchmarks.eager import EagerCombiner
from benchmarks.gpu.emulation import EmulatedGPU
from benchmarks.networks import mlp

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
STEPS, STEP_SIZE = 20, 0.01
BOUNDS = (0.1, 100.0)  # around the eigenvalues
SOLVERS = {
    f"`Neumann({STEPS}, {STEP_SIZE})`": Neumann(STEPS, STEP_SIZE),
    "the same, `certify=False`": Neumann(STEPS, STEP_SIZE, certify=False),
    f"`MINRES({STEPS}, tol=None)`": MINRES(STEPS, tol=None),
    f"`ConjugateGradient({STEPS}, tol=None)`": ConjugateGradient(STEPS, tol=None),
    f"`Chebyshev({STEPS}, bounds, tol=None)`": Chebyshev(STEPS, BOUNDS, tol=None),
    "none, the default": DEFAULT_SOLVER,
}

Run = Callable[[], object]


def counted(run: Run) -> EmulatedGPU:
    """The counts of a call."""
    with EmulatedGPU() as gpu:
        run()
    return gpu


def tables() -> dict[str, str]:
    """Tables in Markdown by title."""
    return {
        "Launches of parts": _parts(),
        "Launches of hypergradients": _hypergradients(),
        "Launches in graphs": _graphed(),
    }


# ----------------------------------------------------------------------------------------------------------- parts


def _parts() -> str:
    columns = []
    for context in (nullcontext, auxfast.reference_kernels):
        with context():
            passes = {name: counted(run).launches.total() for name, run in _passes().items()}
            columns.append(passes | {name: _launches_of_step(solver) for name, solver in _STEPPED.items()})
    ours, others = columns
    return _table(("", "auxfast", "reference"), ((name, f"{ours[name]:.3g}", f"{others[name]:.3g}") for name in ours))


def _passes() -> dict[str, Run]:
    combiner, image = NonlinearCombiner(4, (10,) * 5), ConvCombiner(3, (8, 16))
    problem = MLP()
    vector = [torch.randn_like(w) for w in problem.inner_params]
    gradient = torch.autograd.grad(problem.inner_loss(), problem.inner_params, create_graph=True)
    single = SingleBackward(gradient, problem.inner_params)
    batched = BatchedBackward(gradient, problem.inner_params)
    return {
        **_passes_of("combiner", combiner, torch.rand(64, 4)),
        **_passes_of("loss image", image, torch.rand(2, 3, 64, 64)),
        "Hessian product of the MLP": partial(
            torch.autograd.grad, gradient, problem.inner_params, vector, retain_graph=True
        ),
        "the same by `SingleBackward`": torch.no_grad()(partial(single, vector)),
        "the same by `BatchedBackward`, of one vector": torch.no_grad()(lambda: batched([v[None] for v in vector])),
    }


def _passes_of(title: str, module: nn.Module, losses: Tensor) -> dict[str, Run]:
    losses.requires_grad_()
    params, tangent = list(module.parameters()), torch.randn_like(losses)

    def gradient(create_graph: bool = False) -> Tensor:
        (found,) = torch.autograd.grad(module(losses), losses, create_graph=create_graph)
        return found

    recorded = gradient(create_graph=True)
    return {
        f"{title}: value and gradient": gradient,
        f"{title}: Hessian product": partial(torch.autograd.grad, recorded, losses, tangent, retain_graph=True),
        f"{title}: value, gradient, Hessian and mixed product": lambda: torch.autograd.grad(
            gradient(create_graph=True), [losses, *params], tangent
        ),
    }


_STEPPED: dict[str, Callable[[int], Solver]] = {
    "Neumann, a step": lambda steps: Neumann(steps, 0.01),
    "MINRES, a step": lambda steps: MINRES(steps, tol=None),
    "conjugate gradients, a step": lambda steps: ConjugateGradient(steps, tol=None),
    "Chebyshev, a step": lambda steps: Chebyshev(steps, (0.5, 150.0), tol=None),
}


def _launches_of_step(solver: Callable[[int], Solver]) -> float:
    """The mean of 16 steps, with their two looks and without their products, each of one launch here."""
    diagonal = [torch.linspace(1, 100, w.numel()).view(w.shape) for w in MLP().inner_params]
    rhs = [torch.ones_like(d) for d in diagonal]

    def solve(steps: int) -> None:
        _, stats = solver(steps).solve(lambda vectors: torch._foreach_mul(vectors, diagonal), rhs)
        assert stats.stop_reason == StopReason.STEPS, f"{solver(steps)} stopped: {stats}"

    few, many = (counted(partial(solve, steps)).launches.total() for steps in (8, 24))
    return (many - few) / 16 - 1


# --------------------------------------------------------------------------------------------------- hypergradients


class MLP:
    """The MLP 64-128-128-10 under a combiner of 5 x 10, with a batch of 64. The inner parameters are nearly at their
    minimum, and the two losses have the same inputs: so no solver stops before its last step."""

    def __init__(self, with_torch_nn: bool = False) -> None:
        torch.manual_seed(0)
        self.net, self.inputs = mlp(64, 128, 128, 10, batch=64)
        self.targets = self.net(self.inputs).detach() + 1e-5 * torch.randn(64, 10)
        self.held_out_targets = torch.randn(64, 10)
        combiner = NonlinearCombiner(10, (10,) * 5)
        self.combiner = EagerCombiner(combiner) if with_torch_nn else combiner
        self.inner_params, self.outer_params = list(self.net.parameters()), list(self.combiner.parameters())

    def outer_loss(self) -> Tensor:
        return (self.net(self.inputs) - self.held_out_targets)[:, 0].square().mean()

    def inner_loss(self) -> Tensor:
        return self.combiner((self.net(self.inputs) - self.targets).square())


def _hypergradients() -> str:
    rows = [(f"textbook loop of {STEPS}, `torch.nn`", STEPS, counted(partial(_textbook, MLP(with_torch_nn=True))))]
    for name, solver in SOLVERS.items():
        problem = MLP()
        with EmulatedGPU() as gpu:
            products = _hypergradient(problem, solver).stats.matvecs
        rows.append((name, products, gpu))
    rows.append(("`HyperOptimizer.step`, the default", *_second_step(MLP())))
    return _table(
        ("solver", "products", "launches", "of auxfast's kernels", "waits"),
        (
            (name, *map(str, (products, gpu.launches.total(), gpu.launches_of("auxfast"), gpu.waits.total())))
            for name, products, gpu in rows
        ),
    )


def _graphed() -> str:
    rows = []
    for name, solver in SOLVERS.items():
        if isinstance(solver, Chebyshev):  # cannot be static
            continue
        problem = MLP()
        graphed = auxfast.GraphedHypergradient(
            problem.outer_loss, problem.inner_loss, problem.inner_params, problem.outer_params, solver=solver
        )
        gpu = counted(graphed)
        rows.append((name, *map(str, (gpu.launches.total(), gpu.launches_of("auxfast"), gpu.waits.total()))))
    return _table(("solver", "launches", "of auxfast's kernels", "waits"), rows)


def _hypergradient(problem: MLP, solver: Solver) -> auxfast.HypergradientResult:
    result = auxfast.hypergradient(
        problem.outer_loss(), problem.inner_loss(), problem.inner_params, problem.outer_params, solver=solver
    )
    assert result.stats.stop_reason == StopReason.STEPS, f"{solver} stopped: {result.stats}"
    return result


def _second_step(problem: MLP) -> tuple[int, EmulatedGPU]:
    """The products and the counts of a step with losses that are functions. The first one also checks the losses."""
    adam = torch.optim.Adam(problem.outer_params, foreach=True)
    outer = auxfast.HyperOptimizer(adam, project=[problem.combiner])
    outer.step(problem.outer_loss, problem.inner_loss, problem.inner_params)
    with EmulatedGPU() as gpu:
        stats = outer.step(problem.outer_loss, problem.inner_loss, problem.inner_params)
    return stats.matvecs, gpu


def _textbook(problem: MLP) -> list[Tensor]:
    """The paper's Algorithm 2 as it is usually written, with the factor `STEP_SIZE`."""
    w = problem.inner_params
    v = torch.autograd.grad(problem.outer_loss(), w)
    gradient = torch.autograd.grad(problem.inner_loss(), w, create_graph=True)
    p = [each.clone() for each in v]
    for _ in range(STEPS):
        products = torch.autograd.grad(gradient, w, v, retain_graph=True)
        v = [a - STEP_SIZE * b for a, b in zip(v, products, strict=True)]
        p = [a + b for a, b in zip(p, v, strict=True)]
    return [-STEP_SIZE * g for g in torch.autograd.grad(gradient, problem.outer_params, p)]


# ------------------------------------------------------------------------------------------------------------- page


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def with_tables(page: str, found: dict[str, str]) -> str:
    """The page with each table where its title stands in a comment, in the place of the one that is there."""
    for title, table in found.items():
        page, count = re.subn(rf"(?<=<!-- {title} -->\n\n)\|.*?(?=\n\n|\n$)", lambda _: table, page, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"{PAGE} must have one table after <!-- {title} -->, not {count}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.static", description=__doc__)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--docs", action="store_true", help="put the tables into docs/gpu.md")
    given.add_argument("--check", action="store_true", help="fail where docs/gpu.md has others")
    chosen = parser.parse_args()
    found, page = tables(), PAGE.read_text()
    print("\n\n".join(f"### {title}\n\n{table}" for title, table in found.items()))
    if chosen.docs:
        PAGE.write_text(with_tables(page, found))
    elif chosen.check and with_tables(page, found) != page:
        raise SystemExit(f"{PAGE} has other counts: run `make gpu-static`, and look at what has changed")


if __name__ == "__main__":
    main()
