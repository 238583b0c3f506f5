"""The tables of docs/gpu.md know how many kernels an op launches at their sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from build_backend import ROOT
from ops.krylov_cases import DiagonalSystems

from auxfast.ops.network import CombinerNetwork, LossImageNetwork

from .kernels import MODE, call, launches, network_numbers, unwritten
from .test_krylov import cuda_conjugate_gradient_step, cuda_minres_step
from .test_neumann import STEP, beginning, step

MLP = [64 * 128, 128, 128 * 128, 128, 128 * 10, 10]
ROWS = (1, sum(MLP))


def of_neumann():
    v, v_before, hv, p = ([torch.zeros(size) for size in MLP] for _ in range(4))
    given = False, len(MLP), v, v_before, hv, p, MLP, STEP, beginning(float("inf"))
    return {
        "neumann_step_": partial(step, v, hv, p),
        "neumann_guarded_step_": partial(call, "neumann_guarded_step", *given),
    }


def of_krylov():
    systems = DiagonalSystems.of(ROWS, torch.float32, "cpu")
    a, b, squares = torch.zeros(ROWS), torch.zeros(ROWS), unwritten(1, dtype=torch.float64)
    return {
        "linear_combination_": partial(
            call, "linear_combination", False, *ROWS, a, 1, [b], torch.zeros(2, 1, dtype=torch.float64), squares
        ),
        "row_dots": partial(call, "row_dots", False, *ROWS, a, b, squares),
        "conjugate_gradient_step_": partial(systems.conjugate_gradients, cuda_conjugate_gradient_step, 1, False),
        "minres_step_": partial(systems.minres, cuda_minres_step, 1, False),
    }


def of_combiner():
    network, losses = CombinerNetwork(4, (10,) * 5, main=0), torch.rand(64, 4)
    sizes, saved = [64, 4, 5], torch.zeros(network.saved_size(64))
    return _passes("combiner", network, sizes, losses, saved)


def of_loss_image():
    network, losses = LossImageNetwork(3, (8, 16), main=0), torch.rand(2, 3, 64, 64)
    saved = torch.zeros(network.saved_size(*losses.shape))
    return _passes("loss_image", network, [*losses.shape, 2], losses, saved)


def _passes(op, network, sizes, losses, saved):
    phi, grad, tangent = torch.rand(network.num_parameters), torch.ones(1), torch.rand(losses.shape)
    given = False, sizes, network_numbers(network.packed), losses, phi, saved
    none = [None] if op == "loss_image" else []  # weights of pixels
    to_losses, to_phi = torch.empty_like(losses), torch.empty_like(phi)
    return {
        f"{op}_forward": partial(call, f"{op}_forward", *given, *none, torch.empty(1), to_losses),
        f"{op}_backward_phi": partial(call, f"{op}_backward_phi", *given, grad, to_phi),
        f"{op}_hessian": partial(call, f"{op}_second_order", *given, grad, 1, tangent, to_losses, None),
        f"{op}_second_order": partial(call, f"{op}_second_order", *given, grad, 1, tangent, to_losses, to_phi),
    }


@pytest.mark.skipif(MODE != "plain", reason="counts are the same in all modes")
@pytest.mark.parametrize("calls", [of_neumann, of_krylov, of_combiner, of_loss_image])
def test_an_op_launches_as_many_kernels_as_the_tables_say(calls, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu.emulation import LAUNCHES

    runs = calls()
    assert {name: launches(run) for name, run in runs.items()} == {name: LAUNCHES[f"auxfast.{name}"] for name in runs}
