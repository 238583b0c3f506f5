"""Every CUDA kernel against its CPU twin, in small sizes: what compute-sanitizer runs (`make test-gpu`)."""

from __future__ import annotations

import pytest
import torch
from ops import loss_image_cases
from ops.combiner_cases import TOLERANCES, assert_agree, inputs, name, of_kernels
from ops.krylov_cases import DiagonalSystems, assert_same_solves, coefficients_for, rows
from ops.test_neumann import STEP, beginning, lists, neumann_step_

from auxfast.ops.krylov import conjugate_gradient_step_, linear_combination_, minres_step_, row_dots
from auxfast.ops.network import CombinerNetwork, LossImageNetwork
from auxfast.ops.neumann import neumann_guarded_step_

from .cases import SHAPES

pytestmark = pytest.mark.cuda

NETWORKS = [
    CombinerNetwork(5, (10, 6), main=1),
    CombinerNetwork(3, (7,), "identity", bias=False, reduction="sum"),
    CombinerNetwork(20, (32, 17), main=19),  # small in float32, as those above, with eight lanes a sample
    CombinerNetwork(33, (5, 64), "identity", main=32, reduction="none"),
    CombinerNetwork(40, (64,) * 8),  # a tile does not fit into shared memory
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 67])
@pytest.mark.parametrize("network", NETWORKS, ids=map(name, NETWORKS))
def test_combiner(network, batch, dtype):
    given = inputs(network, batch, torch.float32)
    wanted = of_kernels(network, *(t.double() for t in given))
    actual = of_kernels(network, *(t.to("cuda", dtype) for t in given))
    assert_agree({key: tensor.cpu() for key, tensor in actual.items()}, wanted, TOLERANCES[dtype])


LOSS_IMAGES = [
    LossImageNetwork(3, (8, 16), main=0),
    LossImageNetwork(2, (5, 3, 4, 1), "identity", main=1, main_reduction="sum", reduction="none"),
    LossImageNetwork(17, (9,), reduction="sum"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 35, 70)])
@pytest.mark.parametrize("network", LOSS_IMAGES, ids=map(loss_image_cases.name, LOSS_IMAGES))
def test_loss_image(network, shape, dtype):
    given = loss_image_cases.inputs(network, *shape, torch.float32)
    wanted = loss_image_cases.of_kernels(network, *(t.double() for t in given))
    actual = loss_image_cases.of_kernels(network, *(t.to("cuda", dtype) for t in given))
    results = {key: tensor.cpu() for key, tensor in actual.items()}
    assert_agree(results, wanted, loss_image_cases.TOLERANCES[dtype])


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1.2e-7), (torch.float64, 4e-16)])
def test_neumann_step(dtype, rtol):
    given = lists(SHAPES, dtype, "cpu")
    on_gpu = [[tensor.to("cuda") for tensor in some] for some in given]
    squares, squares_on_gpu = neumann_step_(*given, STEP), neumann_step_(*on_gpu, STEP)
    for which in (0, 2):
        results = [tensor.cpu() for tensor in on_gpu[which]]
        torch.testing.assert_close(results, given[which], rtol=rtol, atol=8 * rtol)
    torch.testing.assert_close(squares_on_gpu.cpu(), squares, rtol=4 * rtol, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1.2e-7), (torch.float64, 4e-16)])
@pytest.mark.parametrize("smallest", [0.0, float("inf")], ids=["grows", "shrinks"])
def test_guarded_neumann_step(smallest, dtype, rtol):
    given, numbers = lists(SHAPES, dtype, "cpu", 4), beginning("cpu", smallest)
    on_gpu, numbers_on_gpu = [[tensor.to("cuda") for tensor in some] for some in given], numbers.to("cuda")
    for _ in range(2):
        neumann_guarded_step_(*given, numbers, STEP)
        neumann_guarded_step_(*on_gpu, numbers_on_gpu, STEP)
    for which in (1, 3):
        results = [tensor.cpu() for tensor in on_gpu[which]]
        torch.testing.assert_close(results, given[which], rtol=rtol, atol=8 * rtol)
    torch.testing.assert_close(numbers_on_gpu.cpu(), numbers, rtol=max(4 * rtol, 1e-12), atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 5e-7), (torch.float64, 1e-15)])
@pytest.mark.parametrize("shape", [(5, 17), (3, 2049)])
def test_krylov(shape, dtype, rtol):
    results = []
    for device in ("cpu", "cuda"):
        out, *terms = rows(shape, 4, dtype, device)
        squares = linear_combination_(out, terms, coefficients_for(out, 3))
        results.append([tensor.cpu() for tensor in (out, squares, row_dots(out, out))])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=rtol, atol=8 * rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 17), (5, 2049)])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_krylov_steps(shape, preconditioned, dtype):
    on_cpu, on_gpu = (DiagonalSystems.of(shape, dtype, device) for device in ("cpu", "cuda"))
    for solve, step in (
        (DiagonalSystems.conjugate_gradients, conjugate_gradient_step_),
        (DiagonalSystems.minres, minres_step_),
    ):
        results = {name: tensor.cpu() for name, tensor in solve(on_gpu, step, 3, preconditioned).items()}
        assert_same_solves(results, solve(on_cpu, step, 3, preconditioned), dtype)
