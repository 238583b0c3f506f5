"""Products by forward-mode AD through the backward pass: those of the recorded Hessian, and what cannot go that way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import auxfast
from auxfast.implicit.curvature import Hessian
from auxfast.implicit.forward_over_reverse import ForwardOverReverse
from auxfast.implicit.losses import LossFn, LossGraph
from auxfast.nn import NonlinearCombiner
from auxfast.solvers import MINRES, Neumann, OneStep, SingleLoop

from .problems import Dense, Ridge
from .test_micro_batches import Samples

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Reweighted:
    """A network whose losses are weighted: by outer parameters, one for each class, or by a combiner."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self.net = net.double()
        self.x = x.double() if x.is_floating_point() else x
        self.y = torch.randint(4, (len(x),))
        self.phi = torch.randn(4, dtype=torch.float64, requires_grad=True)
        self.params = [*self.net.parameters()]

    def loss(self) -> Tensor:
        logits = self.net(self.x).flatten(1)[:, :4]
        return (self.phi.exp()[self.y] * F.cross_entropy(logits, self.y, reduction="none")).mean()

    def graph(self) -> LossGraph:
        torch.manual_seed(1)  # of dropout
        with torch.enable_grad():
            return LossGraph("inner_loss", self.loss())

    def both(self) -> tuple[Hessian, ForwardOverReverse]:
        return Hessian(self.graph(), self.params, retain_graph=True), ForwardOverReverse(
            LossFn(self.graph), self.params, [self.phi]
        )


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def _problems() -> dict[str, Callable[[], Reweighted]]:
    dense = lambda *layers: nn.Sequential(nn.Linear(3, 6), *layers, nn.Linear(6, 4))  # noqa: E731
    conv = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)]
    wide = torch.randn(5, 3)
    return {
        "mlp": lambda: Reweighted(dense(nn.Tanh()), wide),
        "relu, dropout": lambda: Reweighted(dense(nn.ReLU(), nn.Dropout(0.3)), wide),
        "layer norm": lambda: Reweighted(dense(nn.LayerNorm(6), nn.GELU()), wide),
        "conv, batch norm": lambda: Reweighted(nn.Sequential(*conv), torch.randn(5, 2, 6, 6)),
        "embedding": lambda: Reweighted(
            nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(6, 4)), torch.randint(9, (5, 3))
        ),
        "transformer": lambda: Reweighted(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), torch.randn(5, 3, 4)
        ),
        "checkpoints": lambda: Reweighted(Checkpointed(*dense(nn.Tanh(), nn.Dropout(0.3))), wide),
        "combiner": lambda: Combined(dense(nn.Tanh()), wide),
        "linear": lambda: Reweighted(nn.Linear(3, 4), wide),
    }


class Combined(Reweighted):
    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__(net, x)
        self.combiner = NonlinearCombiner(4, (5, 5)).double()
        self.phi = self.combiner.phi

    def loss(self) -> Tensor:
        return self.combiner(self.net(self.x).square())


# An older torch's checkpoints go through a Function without a jvp, and are refused.
with_checkpoints = pytest.mark.skipif(
    hasattr(torch.utils.checkpoint, "_NoopSaveInputs"), reason="checkpoints of this torch have no forward mode"
)


def _cases(names: Iterable[Any], checkpoints: Any) -> list[Any]:
    return [pytest.param(name, marks=with_checkpoints) if name == checkpoints else name for name in names]


@pytest.mark.parametrize("name", _cases(_problems(), "checkpoints"))
def test_products_are_those_of_the_recorded_hessian(name):
    torch.manual_seed(0)
    problem = _problems()[name]()
    with sdpa_kernel(SDPBackend.MATH):
        recorded, found = problem.both()
        assert found.in_system == recorded.in_system
        vectors = [torch.randn(3, *w.shape, dtype=w.dtype) for w in recorded.params]
        first = [v[0] for v in vectors]
        torch.testing.assert_close(found.batched(vectors), recorded.batched(vectors), **EXACT)
        torch.testing.assert_close(found.mixed(first, [problem.phi]), recorded.mixed(first, [problem.phi]), **EXACT)
        product, mixed = found.with_mixed(first, [problem.phi])
        torch.testing.assert_close(product, recorded(first), **EXACT)
        torch.testing.assert_close(mixed, recorded.mixed(first, [problem.phi]), **EXACT)
    assert not any(tensor.requires_grad for tensor in product)


def test_the_system_has_the_parameters_of_the_recorded_one():
    w, linear, scaled, unused = (torch.ones(3, requires_grad=True) for _ in range(4))
    phi = torch.ones(3, requires_grad=True)

    def loss() -> LossGraph:
        return LossGraph("inner_loss", w.square().sum() + linear.sum() + (phi * scaled).sum())

    params = [unused, linear, scaled, w]
    found = ForwardOverReverse(LossFn(loss), params, [phi])
    assert found.in_system == Hessian(loss(), params).in_system == [False, False, True, True]
    torch.testing.assert_close(found([torch.ones(3), torch.ones(3)]), [torch.zeros(3), torch.full((3,), 2.0)])
    assert found.mixed([torch.ones(3), torch.ones(3)], [w.detach().requires_grad_()]) == [None]


@pytest.mark.parametrize(
    "solver", [Dense(), MINRES(tol=1e-14), OneStep(0.1, lookahead=True), SingleLoop(0.1)], ids=repr
)
def test_hypergradients_and_minima_are_those_of_the_hessian(solver):
    ridge = Ridge()
    args = (ridge.outer_loss, ridge.inner_loss, [ridge.w], [ridge.decay, ridge.weights])
    expected = auxfast.hypergradient(*args, solver=solver, warn=False)
    found = auxfast.hypergradient(*args, solver=solver, curvature="hessian-jvp", warn=False)
    torch.testing.assert_close(found.grads, expected.grads, **EXACT)
    assert found.stats.converged == expected.stats.converged
    if isinstance(solver, MINRES):
        torch.testing.assert_close(found.grads, ridge.exact())
        solved = auxfast.implicit_minimum(*args[1:], solver=solver, curvature="hessian-jvp")
        outer = 0.5 * (ridge.outer_x @ solved[0] - ridge.outer_y).square().sum() + ridge.decay.square().sum()
        torch.testing.assert_close(torch.autograd.grad(outer, args[3]), expected.grads, **EXACT)


def test_micro_batches_and_fresh_ones_go_that_way():
    case = Samples()
    batches = [*case.loader()]
    found = case.hypergradient(
        auxfast.MicroBatches(case.outer, batches), auxfast.MicroBatches(case.inner, batches), curvature="hessian-jvp"
    )
    torch.testing.assert_close(found, case.whole(), **EXACT)
    solver = Neumann(4, 0.05, certify=False)
    by_curvature = [
        auxfast.hypergradient(
            lambda: case.outer(batches[0]),
            auxfast.FreshBatches(case.inner, cycle(batches)),
            case.params,
            [case.phi],
            solver=solver,
            curvature=curvature,
            warn=False,
        ).grads
        for curvature in ("hessian", "hessian-jvp")
    ]
    torch.testing.assert_close(*by_curvature, **EXACT)


def test_autocast_losses_go_that_way():
    problem = Reweighted(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(5, 3))
    problem.net, problem.x = problem.net.float(), problem.x.float()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return problem.loss().float()

    params, solver = [*problem.net.parameters()], Neumann(3, 0.1)
    args = (lambda: problem.net(problem.x).square().mean(), loss, params, [problem.phi])
    with torch.autocast("cpu", torch.bfloat16):  # around the call, so that its cache of casts lives on
        found = auxfast.hypergradient(*args, solver=solver, curvature="hessian-jvp", warn=False)
        expected = auxfast.hypergradient(*args, solver=solver, warn=False)
    torch.testing.assert_close(found.grads, expected.grads, rtol=0.05, atol=1e-3)


def test_parameters_keep_bits_versions_and_graphs_that_were_made_before():
    problem = _problems()["relu, dropout"]()
    with torch.no_grad():
        problem.params[0][0, 0] = -0.0
    before = [w.detach().clone() for w in problem.params]
    earlier, versions = problem.loss(), [w._version for w in problem.params]
    auxfast.hypergradient(
        lambda: problem.net(problem.x).sum(),
        problem.loss,
        problem.params,
        [problem.phi],
        curvature="hessian-jvp",
        warn=False,
    )
    assert [w._version for w in problem.params] == versions
    assert all(
        torch.equal(w.view(torch.int64), b.view(torch.int64)) for w, b in zip(problem.params, before, strict=True)
    )
    earlier.backward()
    with torch.autograd.forward_ad.dual_level():
        assert all(torch.autograd.forward_ad.unpack_dual(w).tangent is None for w in problem.params)


def test_threads_wait_for_each_other():
    results: dict[int, Any] = {}

    def solve(i: int) -> None:
        ridge = Ridge()
        args = (ridge.outer_loss, ridge.inner_loss, [ridge.w], [ridge.decay, ridge.weights])
        results[i] = auxfast.hypergradient(*args, solver=Dense(), curvature="hessian-jvp").grads, ridge.exact()

    threads = [threading.Thread(target=solve, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(results) == 3
    for found, exact in results.values():
        torch.testing.assert_close(found, exact)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2


def attention(x: Tensor) -> Tensor:
    x = x.expand(1, 1, 4, 3) * torch.arange(1.0, 5)[:, None]
    return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (F.silu, "went through aten::silu_backward, which has no forward-mode derivatives: pass curvature='hessian'"),
        (Cube.apply, "went through CubeBackward, .*: give it a jvp, or pass curvature='hessian'"),
        (attention, "_scaled_dot_product_flash_attention_for_cpu, .*: compute attention within .*MATH.*'hessian'"),
        pytest.param(
            lambda x: torch.compile(torch.sin, backend="aot_eager")(x),
            "torch.compile, which has no second derivatives",
            marks=pytest.mark.slow,  # importing the compiler takes seconds
        ),
    ],
    ids=["operator", "Function", "attention", "compiled"],
)
def test_what_has_no_forward_mode_is_named_with_the_remedy(function, message):
    w, phi = torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match=f"inner_loss .*{message}"):
        auxfast.hypergradient(lambda: w.sum(), lambda: (phi * function(w)).sum(), [w], [phi], curvature="hessian-jvp")


def _teacher(w: Tensor) -> Tensor:
    with torch.no_grad():
        return w.exp()


def _part(w: Tensor) -> Tensor:
    with torch.no_grad():
        return w.view(2, 2).T.reshape(4)[1:].repeat(2)[:4]


def _view(w: Tensor) -> Tensor:
    with torch.no_grad():
        return w.view(4)


def _average(w: Tensor) -> Tensor:
    average = torch.ones(4, dtype=w.dtype)
    with torch.no_grad():
        torch._foreach_add_([average], [w])
        average.mul_(0.9).add_(w, alpha=0.1)
    return average


def _largest(w: Tensor) -> Tensor:
    with torch.no_grad():
        return w.square().sort().values


def _first_order(w: Tensor) -> Tensor:
    return torch.autograd.grad(w.pow(3).sum(), w)[0]


def _in_checkpoint(w: Tensor) -> Tensor:
    constant: Tensor = checkpoint(lambda u: _teacher(u) * u.square(), w, use_reentrant=False)
    return constant


CONSTANTS = [_teacher, _part, _view, _average, _largest, _first_order, _in_checkpoint]


@pytest.mark.parametrize("constant", _cases(CONSTANTS, _in_checkpoint))
def test_what_is_a_constant_for_autograd_has_no_tangent(constant):
    torch.manual_seed(0)
    w, phi = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    _compare(lambda: (constant(w) * phi * w.square()).sum() + w.pow(3).sum(), w, phi)


def _compare(loss: Callable[[], Tensor], w: Tensor, phi: Tensor) -> None:
    v = [torch.randn_like(w)]
    graph = lambda: LossGraph("inner_loss", loss())  # noqa: E731
    recorded, found = Hessian(graph(), [w], retain_graph=True), ForwardOverReverse(LossFn(graph), [w], [phi])
    torch.testing.assert_close(found(v), recorded(v), **EXACT)
    torch.testing.assert_close(found.mixed(v, [phi]), recorded.mixed(v, [phi]), **EXACT)


def test_squared_errors_go_that_way_whichever_of_the_tensors_depends_on_the_parameters():
    torch.manual_seed(0)
    w, phi, x = (torch.randn(4, dtype=torch.float64, requires_grad=grad) for grad in (True, True, False))
    _compare(lambda: phi.sum() * F.mse_loss(w.sin(), x), w, phi)
    _compare(lambda: phi.sum() * F.mse_loss(input=x, target=w.sin()), w, phi)
    _compare(lambda: nn.MSELoss()(w.sin(), phi[:1].expand(4)), w, phi)


@pytest.mark.parametrize(
    "function",
    [
        torch.linalg.det,
        torch.logdet,
        torch.cholesky_inverse,
        lambda a: torch.linalg.solve(a, a.detach()),
        lambda a: torch.cumprod(a, 0),
        lambda a: torch.ones(2).double().scatter_reduce(0, torch.tensor([0, 0]), a[0], "prod"),
    ],
)
def test_operators_that_lose_tangents_are_refused(function):
    w = torch.tensor([[2.0, 0.0], [1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    graph = lambda: LossGraph("inner_loss", function(w).square().sum() + w.sum())  # noqa: E731
    with pytest.raises(RuntimeError, match=r"inner_loss went through .*Backward0, .* torch gets wrong .*'hessian'"):
        ForwardOverReverse(LossFn(graph), [w], [])([torch.ones_like(w)])
    batches = ForwardOverReverse(LossFn(graph), [w], [], is_fresh=True)
    with pytest.raises(RuntimeError, match="torch gets wrong"):
        batches([torch.ones_like(w)])


class _CubeByNumpy(Cube):
    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 3 * tangent * x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * grad.detach().numpy() * x.detach().numpy() ** 2)


def test_a_function_whose_backward_pass_loses_tangents_is_refused():
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    graph = lambda: LossGraph("inner_loss", (phi * _CubeByNumpy.apply(w)).sum() + w.square().sum())  # noqa: E731
    with pytest.raises(RuntimeError, match=r"inner_loss went through _CubeByNumpyBackward, .* without a tangent"):
        ForwardOverReverse(LossFn(graph), [w], [phi])


def test_a_tensor_is_refused():
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(TypeError, match="inner_loss must be a function for curvature='hessian-jvp'"):
        auxfast.hypergradient(w.sum(), w.square().sum(), [w], [torch.ones(1)], curvature="hessian-jvp")


def _of_rank(rank: int) -> Tensor:
    case = Samples()
    part = tuple(t[[slice(0, 4), slice(4, 11)][rank]] for t in case.data.tensors)
    outer = auxfast.MicroBatches(case.outer, [part])
    inner = auxfast.MicroBatches(case.inner, [part])
    group = torch.distributed.group.WORLD
    return case.hypergradient(outer, inner, curvature="hessian-jvp", process_group=group)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")
def test_ranks_share_it():
    for found in on_ranks(_of_rank):
        torch.testing.assert_close(found, Samples().whole(), **EXACT)
