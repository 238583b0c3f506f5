"""What the tests of streams, graphs and devices run: a few calls that together launch every kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from ops import loss_image_cases
from ops.combiner_cases import inputs, normal, of_kernels
from ops.krylov_cases import DiagonalSystems, coefficients_for, rows
from ops.test_neumann import LAYOUTS, STEP, beginning, clones, lists, neumann_step_
from torch import Tensor

from auxfast.ops.combiner import combiner
from auxfast.ops.krylov import conjugate_gradient_step_, linear_combination_, minres_step_, row_dots
from auxfast.ops.network import CombinerNetwork, LossImageNetwork
from auxfast.ops.neumann import neumann_guarded_step_

# More than one launch takes, and one whose hv is copied before.
SHAPES = [(i % 13,) for i in range(200)] + [(5, 4, 3, 7), (1003,)]


@dataclass(frozen=True)
class Case:
    """`run(*make(seed, device))`: tensors from tensors, which stay as they are. A CUDA graph may capture `run`, so it
    takes nothing from the CPU."""

    make: Callable[[int, str], list[Tensor]]
    run: Callable[..., list[Tensor]]


def _combiner(network: CombinerNetwork, batch: int, dtype: torch.dtype) -> Case:
    """The combiner's passes, first and second order."""
    return Case(
        lambda seed, device: list(inputs(network, batch, dtype, device, seed)),
        lambda *given: list(of_kernels(network, *given).values()),
    )


def _several_tangents(network: CombinerNetwork, batch: int) -> Case:
    def make(seed: int, device: str) -> list[Tensor]:
        losses, phi, grad, _ = inputs(network, batch, torch.float32, device, seed)
        tangents = normal(3, batch, network.num_losses, seed=seed, dtype=torch.float32, device=device)
        return [losses, phi, grad, tangents]

    def run(losses: Tensor, phi: Tensor, grad: Tensor, tangents: Tensor) -> list[Tensor]:
        given = losses.detach().requires_grad_(), phi.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(combiner(*given, network), given[0], grad, create_graph=True)
        return list(torch.autograd.grad(gradient, given, tangents, is_grads_batched=True))

    return Case(make, run)


def _loss_image(network: LossImageNetwork, shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """The loss image's passes; shape: (batch, H, W)."""
    return Case(
        lambda seed, device: [t.to(device) for t in loss_image_cases.inputs(network, *shape, dtype, seed)],
        lambda *given: list(loss_image_cases.of_kernels(network, *given).values()),
    )


def _neumann(dtype: torch.dtype) -> Case:
    def make(seed: int, device: str) -> list[Tensor]:
        v, hv, p = lists(SHAPES, dtype, device)
        hv[-2] = LAYOUTS["transposed"](hv[-2])
        return [(1 + seed) * tensor for tensor in (*v, *hv, *p)]

    def run(*given: Tensor) -> list[Tensor]:
        count = len(SHAPES)
        v, p = clones(list(given[:count]), list(given[2 * count :]))
        hv, numbers = list(given[count : 2 * count]), beginning(str(given[0].device))
        square = neumann_step_(v, hv, p, STEP)
        neumann_guarded_step_(list(given[:count]), v, hv, p, numbers, STEP)
        return [square, numbers, *v, *p]

    return Case(make, run)


def _krylov(dtype: torch.dtype) -> Case:
    def make(seed: int, device: str) -> list[Tensor]:
        out, *terms = rows((3, 5000), 4, dtype, device)
        return [(1 + seed) * tensor for tensor in (out, *terms, coefficients_for(out, 3))]

    def run(out: Tensor, *given: Tensor) -> list[Tensor]:
        out, *terms, coefficients = out.clone(), *given
        return [linear_combination_(out, terms, coefficients), out, row_dots(out, terms[0])]

    return Case(make, run)


def _krylov_steps(dtype: torch.dtype) -> Case:
    """A system that goes on."""

    def make(seed: int, device: str) -> list[Tensor]:
        systems = DiagonalSystems.of((1, 5000), dtype, device)
        return [(1 + seed) * systems.rhs, systems.diagonal, systems.precondition]

    def run(*given: Tensor) -> list[Tensor]:
        systems = DiagonalSystems(*given)
        cg = systems.conjugate_gradients(conjugate_gradient_step_, 3, False)
        minres = systems.minres(minres_step_, 3, False)
        return [cg["x"], cg["r"], minres["x"], minres["r"]]

    return Case(make, run)


CASES = {
    "combiner, tiles in shared memory": _combiner(CombinerNetwork(5, (10, 6), main=0), 700, torch.float32),
    "combiner, tiles in the workspace": _combiner(CombinerNetwork(40, (64,) * 8, reduction="none"), 70, torch.float64),
    "combiner, several tangents": _several_tangents(CombinerNetwork(5, (10, 6), "identity"), 700),
    "loss image": _loss_image(LossImageNetwork(3, (8, 16), main=0), (2, 75, 131), torch.float32),
    "loss image, in chunks": _loss_image(LossImageNetwork(2, (64, 5), reduction="none"), (2, 640, 384), torch.float64),
    "Neumann, float32": _neumann(torch.float32),
    "Neumann, float64": _neumann(torch.float64),
    "Krylov, float32": _krylov(torch.float32),
    "Krylov, float64": _krylov(torch.float64),
    "Krylov steps, float32": _krylov_steps(torch.float32),
    "Krylov steps, float64": _krylov_steps(torch.float64),
}


def assert_same_bits(results: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (one, other) in enumerate(zip(results, wanted, strict=True)):
        assert torch.equal(one, other), f"result {i} differs"
