"""Losses that a `torch.amp.GradScaler` has multiplied: backward passes in float16 need it, hypergradients do not."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import auxfast
from auxfast.implicit import hypergradient, verify_hypergradient
from auxfast.solvers import MINRES, Dense, Identity, OneStep, SolverState


class Decay:
    """A network of five weights, the logarithm of its weight decay, and the losses of both, scaled where asked for."""

    def __init__(
        self, outer_scale: object = None, inner_scale: object = None, dtype: torch.dtype | None = None
    ) -> None:
        torch.manual_seed(0)
        self.net, self.decay = nn.Linear(4, 1), torch.zeros((), requires_grad=True)
        self.x, self.y = torch.randn(2, 32, 4), torch.randn(2, 32, 1)
        self.scales, self.dtype = (outer_scale, inner_scale), dtype

    def error(self, i: int) -> Tensor:
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return (self.net(self.x[i]).float().tanh() - self.y[i]).square().mean()

    def scaled(self, loss: Tensor, i: int) -> Tensor:
        scale = self.scales[i]
        return scale.scale(loss) if isinstance(scale, GradScaler) else loss if scale is None else loss * scale

    def outer(self) -> Tensor:
        return self.scaled(self.error(1), 0)

    def inner(self) -> Tensor:
        penalty = torch.stack([w.square().sum() for w in self.net.parameters()]).sum()
        return self.scaled(self.error(0) + self.decay.exp() * penalty, 1)

    def inner_with_outputs(self) -> tuple[Tensor, Tensor]:
        outputs = self.net(self.x[0])
        penalty = torch.stack([w.square().sum() for w in self.net.parameters()]).sum()
        return self.scaled((outputs - self.y[0]).square().mean() + self.decay.exp() * penalty, 1), outputs

    def double(self) -> Decay:
        self.net.double()
        self.decay = self.decay.detach().double().requires_grad_()
        self.x, self.y = self.x.double(), self.y.double()
        return self

    @property
    def params(self) -> tuple[list[Tensor], list[Tensor]]:
        return [*self.net.parameters()], [self.decay]


def of_tensors(case: Decay, **options):
    return hypergradient(case.outer(), case.inner(), *case.params, **{"solver": Dense(damping=0.1), **options})


def of_functions(case: Decay, **options):
    return hypergradient(case.outer, case.inner, *case.params, **{"solver": Dense(damping=0.1), **options})


def of_micro_batches(case: Decay, **options):
    return of_functions_in_lists(case, **{"solver": MINRES(damping=0.1, tol=1e-6), **options})


def of_functions_in_lists(case: Decay, **options):
    return hypergradient([case.outer] * 2, [case.inner] * 2, *case.params, **options)


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("call", [of_tensors, of_functions, of_micro_batches])
def test_a_scale_changes_no_digit(call, which):
    scaler = GradScaler("cpu")
    plain, scaled = call(Decay()), call(Decay(*(scaler if is_scaled else None for is_scaled in which)))
    assert torch.equal(scaled.grads[0], plain.grads[0])
    assert scaled.stats == plain.stats


@pytest.mark.parametrize("curvature", ["gauss-newton", "finite-difference"])
def test_a_scale_changes_no_digit_of_another_curvature(curvature):
    def result(scaler: GradScaler | None):
        case = Decay(scaler, scaler)
        inner = case.inner_with_outputs if curvature == "gauss-newton" else case.inner
        options = {"solver": Dense(damping=0.1), "curvature": curvature, "state": SolverState(), "warn": False}
        return hypergradient(case.outer, inner, *case.params, **options)

    plain, scaled = result(None), result(GradScaler("cpu"))
    torch.testing.assert_close(scaled.grads, plain.grads, rtol=1e-6, atol=0)
    assert scaled.stats.symmetry_error == plain.stats.symmetry_error


@pytest.mark.parametrize("solver", [Identity(), OneStep(0.1), OneStep(0.1, lookahead=True, mixed="difference")])
def test_a_scale_changes_no_step(solver):
    plain, scaled = (of_functions(Decay(s, s), solver=solver) for s in (None, GradScaler("cpu")))
    torch.testing.assert_close(scaled.grads, plain.grads, rtol=1e-6, atol=0)


def test_a_scale_that_is_no_power_of_two_is_taken_out_up_to_rounding():
    scaler = GradScaler("cpu", init_scale=1000.0)
    torch.testing.assert_close(of_tensors(Decay(scaler, scaler)).grads, of_tensors(Decay()).grads, rtol=1e-6, atol=0)


def test_a_scaler_that_is_off_changes_nothing():
    scaler = GradScaler("cpu", enabled=False)
    assert torch.equal(of_tensors(Decay(scaler, scaler)).grads[0], of_tensors(Decay()).grads[0])


def test_minima_as_functions_have_the_gradients_and_second_derivatives_of_the_loss_itself():
    found = []
    for scaler in (None, GradScaler("cpu")):
        case = Decay(None, scaler)
        w, phi = case.params
        solved = auxfast.implicit_minimum(case.inner(), w, phi, solver=Dense(damping=0.1), warn=False)
        total = torch.stack([each.square().sum() for each in solved]).sum()
        (first,) = torch.autograd.grad(total, phi, create_graph=True)
        found.append((first.detach(), *torch.autograd.grad(first, phi)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("number", [65536.0, 3.0, torch.tensor(3.0), torch.tensor(65536.0, dtype=torch.float64)])
def test_numbers_of_users_multiply_the_loss_while_a_scaler_is_in_use(number):
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))  # from here on it has the scale 65536
    plain, own = of_tensors(Decay()), of_tensors(Decay(number))
    torch.testing.assert_close(own.grads[0], float(number) * plain.grads[0], rtol=1e-5, atol=0)


def parts(scaler: GradScaler, case: Decay) -> Tensor:
    return scaler.scale(case.error(1)) + scaler.scale(case.error(0))


def part_of_a_mean(scaler: GradScaler, case: Decay) -> Tensor:
    return scaler.scale(case.error(1)) / 2


def twice(scaler: GradScaler, case: Decay) -> Tensor:
    return scaler.scale(scaler.scale(case.error(1)))


def one_of_a_list(scaler: GradScaler, case: Decay) -> Tensor:
    return scaler.scale([case.error(1), case.error(0)])[0]


def terms_of_a_mean(scaler: GradScaler, case: Decay) -> Tensor:
    return scaler.scale(torch.stack([case.error(1), case.error(0)])).mean()


@pytest.mark.parametrize("scaled", [parts, part_of_a_mean, twice, one_of_a_list, terms_of_a_mean])
@pytest.mark.parametrize("as_function", [False, True])
def test_a_scale_that_is_not_that_of_the_whole_loss_is_refused(scaled, as_function):
    case, scaler = Decay(), GradScaler("cpu")
    outer = (lambda: scaled(scaler, case)) if as_function else scaled(scaler, case)
    with pytest.raises(ValueError, match=r"outer_loss was multiplied by the scale of a torch.amp.GradScaler in a part"):
        hypergradient(outer, case.inner, *case.params)


def test_a_loss_from_before_an_update_of_the_scale_is_refused():
    scaler = GradScaler("cpu")
    case = Decay(scaler)
    outer, optimizer = case.outer(), torch.optim.SGD(case.net.parameters(), lr=0.0)
    scaler.scale(case.error(0)).backward()
    scaler.step(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match=r"outer_loss was computed before the inner step.* Compute outer_loss anew"):
        hypergradient(outer, case.inner, *case.params)


@pytest.mark.slow
def test_finite_differences_of_verify_are_of_the_loss_without_its_scale():
    reports = []
    for scaler in (None, GradScaler("cpu")):
        case = Decay(scaler, scaler).double()
        reports.append(verify_hypergradient(case.outer, case.inner, *case.params, solver=Dense()))
    plain, scaled = reports
    torch.testing.assert_close(scaled.finite_differences, plain.finite_differences, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.hypergradient, plain.hypergradient, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_training_with_a_scaler_and_scaled_losses_in_outer_steps_learns_what_it_does_without():
    decays = []
    for scaler in (GradScaler("cpu", enabled=False), GradScaler("cpu", growth_interval=2)):
        case = Decay(scaler, scaler)
        inner = torch.optim.SGD(case.net.parameters(), lr=0.05)
        outer = auxfast.HyperOptimizer(torch.optim.SGD([case.decay], lr=1.0), solver=MINRES())
        for _ in range(25):
            for _ in range(2):
                inner.zero_grad()
                case.inner().backward()
                scaler.step(inner)
                scaler.update()
            outer.step(case.outer(), case.inner(), case.params[0])
        decays.append(case.decay.item())
        assert outer.watch.noticed == []  # a scale that grows is no outer loss that rises
        assert outer.watch.latest_outer_loss < 10
    assert decays[1] == pytest.approx(decays[0], rel=1e-5)


def test_an_overflow_of_float16_skips_the_outer_step_and_says_why():
    scaler = GradScaler("cpu", init_scale=2.0**30)
    case = Decay(scaler, None, torch.float16)
    outer = auxfast.HyperOptimizer(torch.optim.SGD([case.decay], lr=1.0))
    with pytest.warns(RuntimeWarning, match="An outer step was skipped.*gradients of outer_loss in inner_params hold"):
        stats = outer.step(case.outer, case.inner, case.params[0])
    assert stats.stop_reason == "not finite"
    assert (outer.skipped_steps, case.decay.item()) == (1, 0.0)


def test_a_scale_keeps_small_gradients_in_the_range_of_float16():
    def gradient(scaler: GradScaler | None, dtype: torch.dtype | None = torch.float16) -> float:
        case = Decay(scaler, None, dtype)
        outer = case.scaled(1e-6 * case.error(1), 0)  # its gradients are below what float16 has
        return hypergradient(outer, case.inner(), *case.params, solver=MINRES(), warn=False).grads[0].item()

    exact = gradient(None, None)
    assert gradient(GradScaler("cpu")) == pytest.approx(exact, rel=0.02)
    assert gradient(None) != pytest.approx(exact, rel=0.1)


def test_nothing_is_searched_where_there_is_no_scaler(monkeypatch):
    gc.collect()  # of scalers of other tests
    of_functions(Decay())  # the first call counts who else refers to what scalers refer to

    def fail(*objects: object) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr(gc, "get_referrers", fail)
    of_functions(Decay(torch.tensor(3.0), torch.tensor(3.0)))
