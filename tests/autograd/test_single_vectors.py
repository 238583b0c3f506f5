"""Single vectors through one graph by a pass of our own: when it runs, and that answers are the engine's in any case.

The policy is that of a GPU; the tests put it in place on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import auxfast
from auxfast.autograd import pullback as module
from auxfast.autograd import streams
from auxfast.autograd.batched_backward import BatchedBackward, SingleBackward
from auxfast.autograd.engine import vjp
from auxfast.autograd.pullback import Pullback, products_before_a_pass
from auxfast.autograd.symmetric_probe import rounding_of_products
from auxfast.nn import NonlinearCombiner
from auxfast.solvers import MINRES, Neumann

BEFORE = 4


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(module, "products_before_a_pass", lambda device: BEFORE)


def network(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
    """A loss whose combiner and layers are those of auxfast's own benchmarks, small, and the parameters."""
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).to(device, dtype)
    x, y = (torch.randn(8, n, dtype=dtype, device=device) for n in (5, 3))
    combiner = NonlinearCombiner(3, (4, 4)).to(device, dtype)
    return combiner((net(x) - y).square()), [*net.parameters()]


def gradient_of(loss: Tensor, params: list[Tensor]) -> list[Tensor]:
    return [*torch.autograd.grad(loss, params, create_graph=True)]


def check(pullback: Pullback, outputs: Sequence[Tensor], inputs: Sequence[Tensor], times: int = BEFORE + 3) -> None:
    for _ in range(times):
        vectors = [torch.randn_like(output) for output in outputs]
        found, expected = pullback(vectors), vjp(outputs, inputs, vectors)
        torch.testing.assert_close([*found], [*expected])


def test_the_engine_takes_the_first_vectors_and_a_pass_the_others():
    loss, params = network()
    outputs = gradient_of(loss, params)
    pullback = Pullback(outputs, params, symmetric=True)
    check(pullback, outputs, params, BEFORE)
    assert pullback.num_single == 0
    check(pullback, outputs, params, 3)
    assert (pullback.num_single, pullback.refusal) == (3, None)


def test_a_pass_follows_where_separable_parts_are_split_off():
    loss, params = network()
    outputs = gradient_of(loss + 0.1 * sum(p.square().sum() for p in params), params)
    pullback = Pullback(outputs, params, symmetric=True)
    check(pullback, outputs, params)
    assert pullback.num_single == 3


def test_on_a_cpu_the_engine_is_asked():
    on_cpu, on_gpu = map(torch.device, ("cpu", "cuda"))
    assert products_before_a_pass(on_cpu) == float("inf")
    assert products_before_a_pass(on_gpu) == BEFORE


@pytest.mark.parametrize("solver", [MINRES(12, tol=None), Neumann(12, 0.05)])
def test_a_hypergradient_is_that_of_the_engine(solver, monkeypatch):
    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        combiner = NonlinearCombiner(3, (4,)).double()
        x, y = torch.randn(9, 5).double(), torch.randn(9, 3).double()
        inner = combiner((net(x) - y).square()) + 0.1 * sum(p.square().sum() for p in net.parameters())
        outer = F.mse_loss(net(x.flip(0)), y)
        return auxfast.hypergradient(
            outer, inner, net.parameters(), combiner.parameters(), solver=solver, warn=False
        ).grads

    passes: list[int] = []
    single = SingleBackward.__call__
    monkeypatch.setattr(SingleBackward, "__call__", lambda self, vectors: passes.append(1) or single(self, vectors))
    found = gradients()
    assert len(passes) >= 12 - BEFORE
    with auxfast.engine_only():
        torch.testing.assert_close(found, gradients(), rtol=1e-6, atol=1e-10)


# ------------------------------------------------------------------------------------------- what is left to the engine


def test_a_wrong_product_is_never_seen(monkeypatch):
    """The pass is wrong in one entry, from its third product on."""
    loss, params = network()
    outputs = gradient_of(loss, params)
    right, calls = SingleBackward.__call__, []

    def wrong(self: SingleBackward, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        products = right(self, vectors)
        calls.append(1)
        if len(calls) > 2:
            products[1][3] += 1e-4
        return products

    monkeypatch.setattr(SingleBackward, "__call__", wrong)
    pullback = Pullback(outputs, params, symmetric=True)
    check(pullback, outputs, params)
    assert (pullback.num_single, len(calls)) == (2, 3)


NOTHING = torch.zeros(7, 5, dtype=torch.float64)


@pytest.mark.parametrize("hook", [lambda grad: grad.clamp(max=0.1), lambda grad: NOTHING])
def test_hooks_act(hook):
    """One that computes is seen, and one that calls nothing of torch shows in its result."""
    loss, params = network()
    first, *others = gradient_of(loss, params)
    hooked = first * 1
    hooked.register_hook(hook)
    outputs = [hooked * 1, *others]
    pullback = Pullback(outputs, params, symmetric=True)
    check(pullback, outputs, params)
    assert pullback.num_single == 0


def test_a_matrix_that_is_not_symmetric_is_left_to_the_engine():
    loss, params = network()
    outputs = [2 * grad if i == 0 else grad for i, grad in enumerate(gradient_of(loss, params))]
    for symmetric in (True, False):
        pullback = Pullback(outputs, params, symmetric=symmetric)
        check(pullback, outputs, params)
        assert (pullback.num_single, pullback.refusal) == (0, None)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_zero_and_nonfinite_vectors_give_what_the_engine_gives(value):
    loss, params = network()
    outputs = gradient_of(loss, params)
    pullback = Pullback(outputs, params, symmetric=True)
    check(pullback, outputs, params)
    vectors = [torch.full_like(output, value) for output in outputs]
    torch.testing.assert_close([*pullback(vectors)], [*vjp(outputs, params, vectors)], equal_nan=True)


def test_autocast_and_engine_only_leave_all_to_the_engine():
    loss, params = network()
    outputs = gradient_of(loss, params)
    pullback = Pullback(outputs, params, symmetric=True)
    for within in (auxfast.engine_only, lambda: torch.autocast("cpu")):
        with within():
            check(pullback, outputs, params)
        assert pullback.num_single == 0
    check(pullback, outputs, params, 2)
    assert pullback.num_single == 2


def test_a_function_of_the_user_runs_as_in_the_engine():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 3 * grad * x**2

    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    outputs = gradient_of((Cube.apply(w) @ w.T).sin().sum(), [w])
    pullback = Pullback(outputs, [w], symmetric=True)
    check(pullback, outputs, [w])
    assert pullback.num_single == 3


def test_a_graph_of_another_stream_is_left_to_the_engine(monkeypatch):
    """The engine runs nodes on the stream of their forward pass, which only a hook within the pass can tell."""
    loss, params = network()
    outputs = gradient_of(loss, params)
    seen: list[int] = []

    def use(in_a_pass: str, now: str) -> None:
        def stream(device: torch.device) -> str:
            task = torch._C._current_graph_task_id()
            seen.extend([task] if task != -1 else [])
            return now if task == -1 else in_a_pass

        for each in (module, streams):
            monkeypatch.setattr(each, "current_stream", stream)

    use("recorded", "current")
    pullback = Pullback(outputs, params, symmetric=True)
    check(pullback, outputs, params)
    assert pullback.num_single == 0
    assert "stream" in str(pullback.refusal)

    use("recorded", "recorded")
    pullback = Pullback(outputs, params, symmetric=True)
    check(pullback, outputs, params)
    assert pullback.num_single == 3
    use("recorded", "another")
    check(pullback, outputs, params, 2)
    assert pullback.num_single == 3
    use("recorded", "recorded")
    check(pullback, outputs, params, 2)
    assert pullback.num_single == 5
    assert len(set(seen)) == 2  # a pass of the engine for each pullback, and no hook stays


def test_a_bias_before_a_batch_normalisation_does_not_end_the_passes():
    """Its second derivatives are zero, and what is computed of them is rounding."""
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    params = [*net.parameters()]
    outputs = gradient_of(F.cross_entropy(net(torch.randn(12, 5)), torch.arange(12) % 3), params)
    pullback = Pullback(outputs, params, symmetric=True)
    for _ in range(BEFORE + 3):
        pullback([torch.randn_like(output) for output in outputs])
    assert pullback.num_single == 3
    batch = [torch.randn(8, *output.shape) for output in outputs]
    pullback.batched(batch)
    assert pullback.num_batched == 8


def test_products_in_tf32_are_compared_as_such():
    on_gpu, single = torch.device("cuda"), torch.float32
    epsilon = torch.finfo(single).eps
    assert rounding_of_products(torch.device("cpu"), single, True) == epsilon
    assert rounding_of_products(on_gpu, single, False) == epsilon
    assert rounding_of_products(on_gpu, single, True) == 2**-10  # torch's default
    assert rounding_of_products(on_gpu, torch.float64, True) == torch.finfo(torch.float64).eps


# -------------------------------------------------------------------------------------------- what a pass launches


class Operations(TorchDispatchMode):
    """Names of the operations that write to memory. One that makes the host wait is an error."""

    VIEWS = ("alias", "detach", "expand", "select", "t", "transpose", "unsqueeze", "view", "_unsafe_view")
    READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert name not in self.READS
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "most"), [(None, 45), (BatchedBackward, 30), (SingleBackward, 27)])
def test_a_product_launches_few_operations_and_waits_for_none(kind, most):
    """The fewest are 14 matrix products, 4 activations, 3 sums over the rows, one combiner, and 5 for the squares."""
    loss, params = network()
    outputs = gradient_of(loss, params)
    vectors = [torch.randn_like(output) for output in outputs]
    if kind is None:
        run, given = (lambda vectors: vjp(outputs, params, vectors)), vectors
    else:
        run, given = kind(outputs, params), [v[None] for v in vectors] if kind is BatchedBackward else vectors
    with torch.no_grad(), Operations() as operations:
        run(given)
    assert len(operations.names) == most, operations.names


@pytest.mark.parametrize("kind", [BatchedBackward, SingleBackward])
def test_passes_through_common_operators_never_wait_for_the_device(kind):
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4)
    )
    params = [*net.parameters()]
    outputs = gradient_of(F.cross_entropy(net(torch.randn(6, 1, 4, 4)), torch.arange(6) % 4), params)
    vectors = [torch.randn_like(output) for output in outputs]
    run = kind(outputs, params)
    with torch.no_grad(), Operations():
        run([v[None] for v in vectors] if kind is BatchedBackward else vectors)


@pytest.mark.cuda
def test_on_a_gpu_a_graph_of_a_side_stream_is_left_to_the_engine():
    with torch.cuda.stream(torch.cuda.Stream()):
        loss, params = network(torch.float32, "cuda")
    torch.cuda.synchronize()
    outputs = gradient_of(loss, params)
    pullback = Pullback(outputs, params, symmetric=True)
    check(pullback, outputs, params)
    assert pullback.num_single == 0
    assert "stream" in str(pullback.refusal)


@pytest.mark.cuda
@pytest.mark.parametrize("side", [False, True])
def test_on_a_gpu_single_vectors_go_through_a_pass_on_the_stream_of_the_graph(side):
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        loss, params = network(torch.float32, "cuda")
        outputs = gradient_of(loss, params)
        pullback = Pullback(outputs, params, symmetric=True)
        check(pullback, outputs, params)
        torch.cuda.synchronize()
    assert (pullback.num_single, pullback.refusal) == (3, None)


@pytest.mark.cuda
def test_a_captured_product_is_the_engines():
    with torch.cuda.stream(torch.cuda.Stream()):
        loss, params = network(torch.float32, "cuda")
        outputs = gradient_of(loss, params)
        pullback = Pullback(outputs, params, symmetric=True)
        check(pullback, outputs, params)
        vectors = [torch.randn_like(output) for output in outputs]
        expected = vjp(outputs, params, vectors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            found = pullback(vectors)
        graph.replay()
        torch.cuda.synchronize()
    assert pullback.num_single == 3
    torch.testing.assert_close([*found], [*expected])
