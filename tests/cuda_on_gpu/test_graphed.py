"""Captured hypergradients are those of eager calls on the GPU, in whatever state the caller, the parameters and the
modules are."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from auxfast import GraphedHypergradient, hypergradient
from auxfast.nn import NonlinearCombiner
from auxfast.solvers import DEFAULT_SOLVER, MINRES, ConjugateGradient, Identity, Neumann, SolverState

pytestmark = pytest.mark.cuda
ROWS, TASKS = 30, 4


class Bilevel:
    """A network with an output for each task, and a combiner of their losses."""

    def __init__(self, *middle: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(3)
        layers = nn.Linear(6, 16), *(middle or (nn.Tanh(),)), nn.Linear(16, TASKS)
        self.net = nn.Sequential(*layers).to("cuda", dtype)
        self.combiner = NonlinearCombiner(TASKS, (10, 10), main=0).to("cuda", dtype)
        self.w, self.phi = list(self.net.parameters()), list(self.combiner.parameters())
        self.dtype = dtype

    def outer_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y)[:, 0].square().mean()

    def inner_loss(self, x: Tensor, y: Tensor) -> Tensor:
        decay = sum(p.square().sum() for p in self.w)
        return self.combiner((self.net(x) - y).square()) + 0.2 * decay

    def inputs(self, seed: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        x, y, ox, oy = (
            torch.randn(ROWS, width, generator=generator).to("cuda", self.dtype) for width in (6, TASKS, 6, TASKS)
        )
        return (ox, oy), (x, y)

    def graphed(self, solver=DEFAULT_SOLVER, **options) -> GraphedHypergradient:
        outer, inner = self.inputs(0)
        losses = self.outer_loss, self.inner_loss
        options = {"warn": False, **options}
        return GraphedHypergradient(
            *losses, self.w, self.phi, outer_inputs=outer, inner_inputs=inner, solver=solver, **options
        )

    def eager(self, seed: int, solver=DEFAULT_SOLVER, state=None):
        outer, inner = self.inputs(seed)
        losses = (lambda: self.outer_loss(*outer)), (lambda: self.inner_loss(*inner))
        return hypergradient(*losses, self.w, self.phi, solver=solver, state=state, warn=False)

    def assert_equal(self, result, seed: int, solver=DEFAULT_SOLVER, state=None, rtol: float = 1e-6) -> None:
        wanted = self.eager(seed, solver, state)
        for grad, like in zip(result.grads, wanted.grads, strict=True):
            torch.testing.assert_close(grad, like, rtol=rtol, atol=rtol * float(like.abs().amax()))
        assert result.stats.residual == pytest.approx(  # one may be of the recurrence
            wanted.stats.residual, rel=0.01, nan_ok=True
        )
        assert result.stats.stop_reason == wanted.stats.stop_reason


SOLVERS = {
    "Neumann": Neumann(20, 0.05),
    "growth": Neumann(10, 0.7),
    "not certified": Neumann(5, 0.05, certify=False),
    "damping": Neumann(10, 0.05, damping=0.5),
    "conjugate gradients": ConjugateGradient(8, tol=None, damping=2.0),
    "MINRES": MINRES(8, tol=None),
    "chunks": MINRES(60, tol=1e-4, damping=1.0),
    "identity": Identity(0.1),
    "chunks of conjugate gradients": ConjugateGradient(44, tol=1e-6, damping=1.0),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_replays_are_the_eager_call_at_new_inputs_and_after_steps_in_place(solver):
    problem = Bilevel()
    graphed = problem.graphed(solver)
    sgd = torch.optim.SGD([*problem.w, *problem.phi], lr=0.01)
    for seed in (0, 1, 2):
        result = graphed(*problem.inputs(seed))
        # Lanczos vectors make much of rounding.
        problem.assert_equal(result, seed, solver, rtol=1e-8 if isinstance(solver, (Neumann, Identity)) else 1e-3)
        problem.inner_loss(*problem.inputs(seed)[1]).backward()
        sgd.step()


def test_gauss_newton_products_go_through_the_engine():
    problem = Bilevel()
    options = {"solver": Neumann(5, 0.05), "curvature": "gauss-newton", "warn": False}

    def with_outputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = problem.net(x)
        return problem.combiner((z - y).square()) + 0.1 * problem.w[0].square().sum(), z

    problem.inner_loss = with_outputs
    graphed = problem.graphed(**options)
    outer, inner = problem.inputs(1)
    losses = (lambda: problem.outer_loss(*outer)), (lambda: with_outputs(*inner))
    wanted = hypergradient(*losses, problem.w, problem.phi, **options)
    for grad, like in zip(graphed(outer, inner).grads, wanted.grads, strict=True):
        torch.testing.assert_close(grad, like)


def test_results_stay_when_later_calls_replay():
    problem = Bilevel()
    graphed = problem.graphed(Neumann(5, 0.05))
    results = [graphed(*problem.inputs(seed)) for seed in range(3)]
    for seed, result in enumerate(results):
        problem.assert_equal(result, seed, Neumann(5, 0.05))


def test_warm_start_goes_on_from_call_to_call_until_reset():
    problem = Bilevel()
    graphed = problem.graphed()
    for _ in range(2):
        state = SolverState()
        for seed in (1, 1, 2):
            problem.assert_equal(graphed(*problem.inputs(seed)), seed, state=state, rtol=1e-3)
        graphed.reset()


def test_float32_goes_through_the_kernels():
    problem = Bilevel(dtype=torch.float32)
    problem.assert_equal(problem.graphed(Neumann(20, 0.05))(*problem.inputs(1)), 1, Neumann(20, 0.05), rtol=1e-3)


def test_dropout_draws_new_masks_in_each_call_and_one_in_a_call():
    problem = Bilevel(nn.Tanh(), nn.Dropout(0.5))
    graphed = problem.graphed(MINRES(30, tol=None))
    first, second = (graphed(*problem.inputs(1)) for _ in range(2))
    assert not torch.equal(first.grads[0], second.grads[0])
    # Masks that differ from product to product would be no symmetric matrix.
    assert first.stats.symmetry_error < 1e-10


def test_statistics_of_batch_norm_are_read_anew_and_stay():
    problem = Bilevel(nn.BatchNorm1d(16), nn.Tanh())
    norm = problem.net[1]
    graphed = problem.graphed(Neumann(5, 0.05))
    before = norm.running_mean.clone()
    problem.assert_equal(graphed(*problem.inputs(1)), 1, Neumann(5, 0.05))
    assert torch.equal(norm.running_mean, before)
    assert norm.num_batches_tracked == 0
    problem.net.eval()
    with pytest.raises(RuntimeError, match="training=True"):
        graphed(*problem.inputs(1))
    graphed = problem.graphed(Neumann(5, 0.05))
    norm.running_mean.copy_(torch.linspace(-1, 1, 16))
    problem.assert_equal(graphed(*problem.inputs(1)), 1, Neumann(5, 0.05))


def test_autocast_is_that_of_the_construction():
    problem = Bilevel(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        graphed = problem.graphed(Neumann(5, 0.05))
        wanted = problem.eager(1, Neumann(5, 0.05))
    result = graphed(*problem.inputs(1))
    for grad, like in zip(result.grads, wanted.grads, strict=True):
        torch.testing.assert_close(grad, like, rtol=0.05, atol=0.05 * float(like.abs().amax()))
    plain = problem.eager(1, Neumann(5, 0.05))
    assert not torch.allclose(result.grads[0], plain.grads[0], rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_may_be_in_any_mode(mode):
    problem = Bilevel()
    with mode():
        graphed = problem.graphed(Neumann(5, 0.05))
        result = graphed(*problem.inputs(1))
    assert not result.grads[0].is_inference()
    problem.assert_equal(result, 1, Neumann(5, 0.05))


def test_two_objects_and_streams_side_by_side():
    problems = Bilevel(), Bilevel(nn.Softplus())
    graphed = [problem.graphed(Neumann(10, 0.05)) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    results = []
    for seed in range(4):
        for stream, problem, call in zip(streams, problems, graphed, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                results.append((problem, seed, call(*problem.inputs(seed))))
    torch.cuda.synchronize()
    for problem, seed, result in results:
        problem.assert_equal(result, seed, Neumann(10, 0.05))


def test_a_stream_that_is_busy_is_waited_for():
    """Inputs get their values late, and the results are read on another stream than the one of the call."""
    problem = Bilevel()
    graphed = problem.graphed(Neumann(10, 0.05))
    outer, inner = problem.inputs(0)
    fresh = problem.inputs(1)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graphed(outer, inner)  # what is allocated for the first time may wait for the device
        stream.synchronize()
        torch.cuda._sleep(500_000_000)  # about 0.3 s
        for old, new in zip([*outer, *inner], [*fresh[0], *fresh[1]], strict=True):
            old.copy_(new)
        first = graphed(outer, inner)
        assert not stream.query(), "something waited for the device"
    second = graphed(*problem.inputs(2))  # on the default stream, which must wait for the first
    torch.cuda.synchronize()
    problem.assert_equal(first, 1, Neumann(10, 0.05))
    problem.assert_equal(second, 2, Neumann(10, 0.05))


def test_calls_of_several_threads():
    problem = Bilevel()
    graphed = problem.graphed(Neumann(10, 0.05))
    results = {}

    def work(seed: int) -> None:
        results[seed] = graphed(*problem.inputs(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for seed, result in results.items():
        problem.assert_equal(result, seed, Neumann(10, 0.05))


@pytest.mark.parametrize(
    "factor",
    [
        lambda x: 1 if float(x.detach().sum()) > 0 else 2,
        lambda x: torch.tensor(0.5, device="cuda"),
        lambda x: x.detach()[x > 0].mean(),
    ],
    ids=["a number on the host", "a constant of the CPU", "a shape that depends on numbers"],
)
def test_what_cannot_be_captured_is_said_and_leaves_torch_as_it_was(factor):
    problem = Bilevel(nn.Tanh(), nn.Dropout(0.1))
    plain = problem.inner_loss
    problem.inner_loss = lambda x, y: plain(x, y) * factor(x)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        problem.graphed(Neumann(5, 0.05))
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.rand(3, device="cuda")  # a failed capture would leave the generator unusable
    problem.inner_loss = plain
    assert problem.graphed(Neumann(5, 0.05))(*problem.inputs(1)).grads[0].isfinite().all()


def test_replaced_parameters_and_buffers_are_an_error():
    problem = Bilevel(nn.BatchNorm1d(16))
    graphed = problem.graphed(Neumann(5, 0.05))
    problem.net[1].running_mean = problem.net[1].running_mean.clone()
    with pytest.raises(RuntimeError, match="lies elsewhere in memory"):
        graphed(*problem.inputs(1))
    graphed = problem.graphed(Neumann(5, 0.05))
    problem.w[0].data = problem.w[0].data.clone()
    with pytest.raises(RuntimeError, match=r"inner_params\[0\] is no longer what was recorded: its memory"):
        graphed(*problem.inputs(1))


def test_tensors_that_nothing_but_the_graph_knows_stay():
    problem = Bilevel()
    plain, factor = problem.inner_loss, torch.linspace(0.5, 1.5, TASKS, device="cuda", dtype=torch.float64)
    problem.inner_loss = lambda x, y: plain(x, y) + 0.1 * ((problem.net(x) - y) * factor).square().mean()
    graphed, wanted = problem.graphed(Neumann(5, 0.05)), problem.eager(1, Neumann(5, 0.05))
    factor = None  # whoever asks for memory next gets it
    spoiled = [torch.full((TASKS,), torch.nan, device="cuda", dtype=torch.float64) for _ in range(1000)]
    result = graphed(*problem.inputs(1))
    torch.testing.assert_close(result.grads, wanted.grads)
    del spoiled


def test_memory_goes_to_others_when_the_last_replay_is_done():
    """An object that lives for one call on another stream than the one it was made on."""
    problem = Bilevel()
    inputs, stream = problem.inputs(1), torch.cuda.Stream()
    for _ in range(2):  # what is allocated for the first time may wait for the device
        graphed = problem.graphed(Neumann(10, 0.05))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            grads = graphed(*inputs).grads
        del graphed
        spoiled = [torch.full((ROWS, 6), torch.nan, device="cuda", dtype=torch.float64) for _ in range(1000)]
    torch.cuda.synchronize()
    wanted = problem.eager(1, Neumann(10, 0.05))
    torch.testing.assert_close(grads, wanted.grads)
    del spoiled


def test_the_default_device_of_torch_is_of_no_matter():
    problem, solver = Bilevel(), MINRES(60, tol=1e-4, damping=1.0)
    inputs = problem.inputs(1)
    with torch.device("cuda"):
        result = GraphedHypergradient(
            *(problem.outer_loss, problem.inner_loss, problem.w, problem.phi),
            outer_inputs=inputs[0],
            inner_inputs=inputs[1],
            solver=solver,
        )(*inputs)
    problem.assert_equal(result, 1, solver, rtol=1e-3)


def test_training_goes_on_after_the_object_is_made():
    """No node of the capture stays behind, to which backward() would add on the stream of the capture."""
    problem = Bilevel()
    graphed = problem.graphed(Neumann(5, 0.05))
    for seed in range(3):
        graphed(*problem.inputs(seed))
        problem.inner_loss(*problem.inputs(seed)[1]).backward()
    torch.cuda.synchronize()
