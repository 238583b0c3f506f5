"""Batches of vectors through one graph: what is left to the engine, and that answers are the engine's in any case."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import auxfast
from auxfast.autograd.engine import in_own_task, vjp
from auxfast.autograd.pullback import Pullback
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.losses import LossGraph

K = 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def vectors_like(tensors: list[Tensor], k: int = K) -> list[Tensor]:
    return [torch.randn(k, *t.shape, dtype=t.dtype) for t in tensors]


def one_by_one(outputs: list[Tensor], inputs: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    rows = [vjp(outputs, inputs, row) for row in zip(*vectors, strict=True)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def check(pullback: Pullback, outputs: list[Tensor], inputs: list[Tensor], vectors: list[Tensor] | None = None) -> None:
    vectors = vectors_like(outputs) if vectors is None else vectors
    expected = one_by_one(outputs, inputs, vectors)
    torch.testing.assert_close([*pullback.batched(vectors)], expected, equal_nan=True)


def test_few_vectors_go_in_a_batch_once_a_batch_was_confirmed():
    outputs, inputs = Net().gradient()
    pullback = Pullback(outputs, inputs, symmetric=True)
    for k, batched in ((3, 0), (8, 8), (3, 11), (2, 11)):
        check(pullback, outputs, inputs, vectors_like(outputs, k))
        assert pullback.num_batched == batched
    alone = Pullback(outputs, inputs)  # where each batch costs a product of the engine
    check(alone, outputs, inputs)
    check(alone, outputs, inputs, vectors_like(outputs, 3))
    assert alone.num_batched == 8


def test_batches_within_a_backward_pass_have_a_pass_of_their_own():
    outputs, inputs = Net().gradient()
    pullback = Pullback(outputs, inputs)
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: check(pullback, outputs, inputs))
    y.sum().backward()
    assert pullback.num_batched == K
    assert x.grad.tolist() == [2.0, 2.0]

    def fail() -> None:
        raise KeyError("as it is")

    y = x * 2
    y.register_hook(lambda grad: in_own_task(fail))
    with pytest.raises(KeyError, match="as it is"):
        y.sum().backward()
    assert in_own_task(lambda: 3) == 3


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, width).double(), nn.Linear(width, 3).double()

    def gradient(self, rows: int = 4) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient of a loss, with its graph, and the parameters."""
        loss = self.last(self.first(torch.randn(rows, 5).double()).tanh()).square().mean()
        return [*torch.autograd.grad(loss, [*self.parameters()], create_graph=True)], [*self.parameters()]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Decorated(Double):
    @staticmethod
    @torch.no_grad()
    def backward(ctx, grad):
        return 2 * grad


# ------------------------------------------------------------------------------------------------------------- hooks

Hook = Callable[[Tensor], Any]


def _on_node(register: str) -> Callable[[Tensor, Hook], Any]:
    def add(tensor: Tensor, hook: Hook) -> Any:
        return getattr(tensor.grad_fn, register)(lambda grads, *others: (hook(grads[0]), *grads[1:]))

    return add


PLACES: dict[str, tuple[str, Callable[[Tensor, Hook], Any]]] = {
    "a leaf": ("w", Tensor.register_hook),
    "a tensor inside": ("h", Tensor.register_hook),
    "a tensor that no node saves": ("z", Tensor.register_hook),
    "a Function's result": ("f", Tensor.register_hook),
    "before a node": ("h", _on_node("register_prehook")),
    "after a node": ("z", _on_node("register_hook")),
    "before a Function": ("f", _on_node("register_prehook")),
    "after a Function": ("f", _on_node("register_hook")),
}


def hooked(place: str, hook: Hook) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and inputs of a graph with a hook, in which no tensor but the leaves is alive any more."""
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    f = Double.apply(w)
    z = f @ torch.randn(5, 3, dtype=torch.float64)
    h = z.tanh()
    name, register = PLACES[place]
    register({"w": w, "f": f, "z": z, "h": h}[name], hook)
    return [h.square(), h.sin().sum()], [w]


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_is_seen_before_it_changes_anything(place):
    factor = 1.0
    outputs, inputs = hooked(place, lambda grad: grad * factor)
    pullback = Pullback(outputs, inputs)
    check(pullback, outputs, inputs)
    assert "hook" in str(pullback.refusal)
    factor = 0.1
    check(pullback, outputs, inputs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "hook", [lambda grad: grad.clamp(max=0.1), lambda grad: grad + 1, lambda grad: grad / grad.norm()]
)
def test_hooks_that_are_not_linear_act_on_each_vector(place, hook):
    outputs, inputs = hooked(place, hook)
    check(Pullback(outputs, inputs), outputs, inputs)
    check(Pullback(outputs, inputs), outputs, inputs, [torch.zeros(K, *t.shape, dtype=t.dtype) for t in outputs])


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_that_acts_from_the_second_batch_on_acts(place):
    scale: list[float] = []
    outputs, inputs = hooked(place, lambda grad: grad * scale[0] if scale else grad)
    pullback = Pullback(outputs, inputs)
    check(pullback, outputs, inputs)
    scale.append(0.1)
    check(pullback, outputs, inputs)


def test_a_hook_that_was_added_after_the_first_batch_acts():
    h = torch.randn(4, 5, dtype=torch.float64, requires_grad=True).sin()
    w = [h.grad_fn.next_functions[0][0].variable]
    outputs = [h.exp()]
    pullback = Pullback(outputs, w)
    check(pullback, outputs, w)
    assert pullback.refusal is None
    h.register_hook(lambda grad: grad.clamp(max=0.1))
    check(pullback, outputs, w)


def test_a_hook_that_calls_nothing_of_torch_is_found_by_its_result():
    """It is found even if only a vector that is small beside the others gets there."""
    u, v = (torch.randn(4, requires_grad=True) for _ in range(2))
    h, nothing = v.sin(), torch.zeros(4)
    h.register_hook(lambda grad: nothing)
    outputs, inputs = [u.exp(), h * 2], [u, v]
    pullback = Pullback(outputs, inputs)
    vectors = vectors_like(outputs)
    vectors[1][:-1] = 0
    vectors[0][-1] = 0
    vectors[1][-1] *= 1e-6
    check(pullback, outputs, inputs, vectors)
    assert pullback.refusal == "the engine finds something else"


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_vectors_whose_norms_overflow_or_underflow_are_compared(scale):
    u, v = (torch.randn(4, requires_grad=True) for _ in range(2))
    h, nothing = v.sin(), torch.zeros(4)
    h.register_hook(lambda grad: nothing)
    outputs, inputs = [u.exp(), h * 2], [u, v]
    pullback = Pullback(outputs, inputs)
    check(pullback, outputs, inputs, [scale * vectors for vectors in vectors_like(outputs)])
    assert pullback.refusal == "the engine finds something else"


def test_products_whose_norms_underflow_are_compared():
    u, v = (torch.randn(4, requires_grad=True) for _ in range(2))
    h, nothing = v.sin(), torch.zeros(4)
    h.register_hook(lambda grad: nothing)
    outputs, inputs = [1e-30 * u.exp(), 1e-30 * h], [u, v]
    pullback = Pullback(outputs, inputs)
    check(pullback, outputs, inputs)
    assert pullback.refusal == "the engine finds something else"


def test_a_hook_with_a_decorator_that_a_backward_pass_has_too_is_seen():
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    f = Decorated.apply(w)
    f.register_hook(torch.no_grad()(lambda grad: grad.clamp(-100, 100)))
    outputs = [f.exp()]
    pullback = Pullback(outputs, [w])
    check(pullback, outputs, [w], [1e3 * vectors for vectors in vectors_like(outputs)])
    assert "hook" in str(pullback.refusal)


def test_a_tensor_that_retains_its_gradient_is_left_to_the_engine():
    h = torch.randn(4, requires_grad=True).sin()
    w = [h.grad_fn.next_functions[0][0].variable]
    h.retain_grad()
    outputs = [h.exp() @ h.exp().diag()]
    pullback = Pullback(outputs, w)
    check(pullback, outputs, w)
    h = torch.randn(4, 5, requires_grad=True).sin()
    h.retain_grad()
    outputs, w = [h @ torch.randn(5, 3, requires_grad=True)], [h.grad_fn.next_functions[0][0].variable]
    pullback = Pullback([outputs[0].sin(), h], w)
    check(pullback, [outputs[0].sin(), h], w)
    assert "hook" in str(pullback.refusal)


def test_hooks_that_autograd_grad_never_runs_do_not_matter():
    w = torch.randn(4, requires_grad=True)
    w.register_post_accumulate_grad_hook(lambda w: pytest.fail("nothing is accumulated"))
    outputs = [w.exp()]
    pullback = Pullback(outputs, [w])
    check(pullback, outputs, [w])
    assert pullback.refusal is None


# ------------------------------------------------------------------------------------------- what is left to the engine


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["all", "a vector", "an output"])
def test_zero_and_nonfinite_vectors_give_what_the_engine_gives(where, value):
    outputs, inputs = Net().gradient()
    vectors = vectors_like(outputs)
    for tensor in vectors if where != "an output" else vectors[:1]:
        tensor[2 if where == "a vector" else slice(None)] = value
    check(Pullback(outputs, inputs), outputs, inputs, vectors)


def test_few_vectors_go_one_by_one():
    outputs, inputs = Net().gradient()
    pullback = Pullback(outputs, inputs)
    check(pullback, outputs, inputs, vectors_like(outputs, 3))
    assert pullback.num_batched == 0


def test_inputs_of_many_numbers_need_more_vectors():
    w = torch.randn((1 << 20) + 1, requires_grad=True)
    pullback = Pullback([w.exp()[:3]], [w])
    pullback.batched([torch.randn(8, 3)])
    assert pullback.num_batched == 0
    check(pullback, [w.exp()[:3]], [w], [torch.randn(16, 3)])
    assert pullback.num_batched == 16


def test_no_vectors_are_no_error():
    w = torch.randn(3, requires_grad=True)
    assert Pullback([w.exp()], [w]).batched([torch.empty(0, 3)]) == [None]


def test_many_vectors_go_through_a_large_graph_in_parts():
    outputs, inputs = Net(512).gradient(rows=64)  # 256 KiB
    pullback = Pullback(outputs, inputs)
    check(pullback, outputs, inputs, vectors_like(outputs, 19))
    assert pullback.num_batched == 19


def test_graphs_with_larger_activations_are_left_to_the_engine():
    outputs, inputs = Net(512).gradient(rows=65)
    pullback = Pullback(outputs, inputs)
    check(pullback, outputs, inputs)
    assert "large" in str(pullback.refusal)


def test_under_autocast_the_engine_is_asked():
    outputs, inputs = Net().gradient()
    pullback = Pullback(outputs, inputs)
    with torch.autocast("cpu"):
        check(pullback, outputs, inputs)
        assert pullback.num_batched == 0
    check(pullback, outputs, inputs)
    assert pullback.num_batched == K


def test_distances_whose_vmap_rule_is_wrong_go_one_by_one():
    u, v = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    pullback = Pullback([torch.cdist(u, v)], [u, v])
    check(pullback, [torch.cdist(u, v)], [u, v])
    assert pullback.num_batched == K


def test_complex_numbers_are_left_to_the_engine():
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    outputs = [(torch.fft.fft2(w) @ (1j * w).exp()).abs().square()]
    pullback = Pullback(outputs, [w])
    check(pullback, outputs, [w])
    assert "complex" in str(pullback.refusal)


def test_a_coarser_dtype_within_the_graph_does_not_loosen_the_check():
    w, v = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    outputs = [(w.float().tanh().double() @ v).sin()]
    pullback = Pullback(outputs, [w, v])
    check(pullback, outputs, [w, v])
    assert pullback.refusal == "the engine finds something else"


def test_outputs_of_several_dtypes():
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    outputs = [w.sin(), w.exp().float()]
    check(Pullback(outputs, [w]), outputs, [w])


def checkpointed(w: Tensor, calls: list[int]) -> list[Tensor]:
    def segment(w: Tensor) -> Tensor:
        calls.append(1)
        return (w @ w).tanh()

    h = checkpoint(segment, w, use_reentrant=False)
    return [*torch.autograd.grad(h.square().sum(), [w], create_graph=True)]


def test_checkpointed_graphs_are_recomputed_no_more_often_than_by_the_engine():
    """Whatever was done before with a graph of the same structure."""
    w = torch.randn(9, 9, dtype=torch.float64, requires_grad=True)
    plain = [*torch.autograd.grad((w @ w).tanh().square().sum(), [w], create_graph=True)]
    check(Pullback(plain, [w]), plain, [w])
    counts = []
    for within in (auxfast.engine_only, nullcontext):
        calls: list[int] = []
        outputs = checkpointed(w, calls)
        pullback = Pullback(outputs, [w])
        with within():
            pullback.batched(vectors_like([w]))
        counts.append(len(calls))
    assert counts[0] == counts[1]
    assert "unpacked by hooks" in str(pullback.refusal)


def test_engine_only_takes_vectors_one_by_one():
    outputs, inputs = Net().gradient()
    pullback = Pullback(outputs, inputs)
    with auxfast.engine_only():
        check(pullback, outputs, inputs)
    assert pullback.num_batched == 0
    check(pullback, outputs, inputs)
    assert pullback.num_batched == K


@pytest.mark.slow
@pytest.mark.parametrize(("value", "batched"), [("0", 0), ("1", 8)])
def test_the_environment_switches_batches_off(value, batched):
    program = (
        "import torch; from auxfast.autograd.pullback import Pullback\n"
        "w = torch.randn(3, requires_grad=True); pullback = Pullback([w.exp()], [w])\n"
        "pullback.batched([torch.ones(8, 3)]); print(pullback.num_batched)"
    )
    environment = {**os.environ, "AUXFAST_BATCHED_BACKWARD": value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(batched)]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("batches_before", [0, 1])
def test_a_tensor_that_was_overwritten_is_an_error(batches_before):
    outputs, inputs = Net().gradient()
    pullback = Pullback(outputs, inputs)
    for _ in range(batches_before):
        check(pullback, outputs, inputs)
    with torch.no_grad():
        inputs[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pullback.batched(vectors_like(outputs))


def test_a_graph_that_was_freed_is_an_error():
    outputs, inputs = Net().gradient()
    torch.autograd.grad(outputs, inputs, outputs)
    with pytest.raises(RuntimeError, match="second time"):
        Pullback(outputs, inputs).batched(vectors_like(outputs))


def test_an_error_in_a_function_is_the_engines():
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("not today")

    w = torch.randn(3, requires_grad=True)
    pullback = Pullback([Stubborn.apply(w.sin())], [w])
    for _ in range(2):
        with pytest.raises(ValueError, match="not today"):
            pullback.batched([torch.ones(K, 3)])


def test_a_function_that_returns_too_few_gradients_is_the_engines_error():
    class Short(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * y

        @staticmethod
        def backward(ctx, grad):
            return grad

    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="incorrect number of gradients"):
        Pullback([Short.apply(x, y)], [x, y]).batched([torch.ones(K, 3)])


def test_a_batched_backward_is_for_functions_of_one_result():
    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x, 3 * x

        @staticmethod
        def backward(ctx, first, second):
            return 2 * first + 3 * second

        @staticmethod
        def batched_backward(ctx, wanted, grads):
            pytest.fail("it would get one of two gradients")

    x = torch.randn(3, requires_grad=True)
    outputs = [*Pair.apply(x)]
    pullback = Pullback(outputs, [x])
    check(pullback, outputs, [x])
    assert "2 outputs" in str(pullback.refusal)


# -------------------------------------------------------------------------------------------------- what else must hold


def test_an_output_may_be_an_input():
    w, alone = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    outputs = [w.tanh(), alone, w]
    for inputs in ([w, alone], [w]):
        pullback = Pullback(outputs, inputs)
        for _ in range(2):
            check(pullback, outputs, inputs)
        assert pullback.num_batched == 2 * K


def test_nothing_depends_on_nothing():
    w = torch.randn(3, requires_grad=True)
    assert Pullback([], [w])([]) == [None]
    assert Pullback([], [w]).batched([]) == [None]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_parameters_of_any_rank(shape):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    curvature = Hessian(LossGraph("inner_loss", w.exp().square().sum()), [w])
    block = torch.randn(K, *shape, dtype=torch.float64)
    torch.testing.assert_close(curvature.batched([block])[0], block * 4 * (2 * w.detach()).exp())
    assert curvature.pullback.num_batched == K


def test_nothing_of_a_graph_is_kept():
    """Nothing waits for the garbage collector either."""
    net = Net()
    hidden = net.first(torch.randn(4, 5).double()).relu()  # a tensor that its node saves
    outputs = [*torch.autograd.grad(net.last(hidden).square().mean(), [*net.parameters()], create_graph=True)]
    pullback = Pullback(outputs, [*net.parameters()])
    gc.disable()
    try:
        check(pullback, outputs, [*net.parameters()])
        assert pullback.num_batched == K
        reference = weakref.ref(hidden)
        del hidden, outputs
        assert reference() is not None
        del pullback
        assert reference() is None
    finally:
        gc.enable()


def test_filters_of_warnings_are_never_touched(monkeypatch):
    """Operators without a rule for batches, for which vmap has a warning, are among these."""
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    loss = F.huber_loss(F.mish(w), torch.ones_like(w)) ** 2 + F.cross_entropy(w, torch.tensor([0, 1, 2, 3]))
    outputs = [*torch.autograd.grad(loss, [w], create_graph=True)]
    pullback = Pullback(outputs, [w])
    vectors = vectors_like(outputs)
    expected = one_by_one(outputs, [w], vectors)
    monkeypatch.setattr(warnings, "catch_warnings", lambda *args, **options: pytest.fail("filters are touched"))
    monkeypatch.setattr(warnings, "filters", before := (*warnings.filters,))
    found = pullback.batched(vectors)
    assert warnings.filters is before
    assert pullback.refusal is None
    torch.testing.assert_close([*found], expected)
