"""What `hypergradient` refuses, and that it says which argument is meant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auxfast.implicit import hypergradient
from auxfast.solvers import Neumann

from .problems import Ridge

SOLVER = Neumann(20, 1e-2)


def call(**changes):
    problem = Ridge()
    arguments = {
        "outer_loss": problem.outer_loss(),
        "inner_loss": problem.inner_loss(),
        "inner_params": [problem.w],
        "outer_params": [problem.decay],
    }
    for name, change in changes.items():
        arguments[name] = change(problem) if callable(change) else change
    return hypergradient(**arguments, solver=SOLVER)


@pytest.mark.parametrize("name", ["outer_loss", "inner_loss"])
def test_losses(name):
    with pytest.raises(
        TypeError,
        match=f"{name} must be a tensor, a function.*or a list of such functions or of .weight, function. pairs, not a float",
    ):
        call(**{name: 1.0})
    with pytest.raises(ValueError, match=rf"{name} must be a scalar, not of shape \(5,\)"):
        call(**{name: lambda problem: problem.w.square()})
    with pytest.raises(ValueError, match=f"{name} has no graph"):
        call(**{name: lambda problem: problem.inner_loss().detach()})
    with pytest.raises(ValueError, match=f"{name} does not depend on any of inner_params"):
        call(**{name: lambda problem: problem.decay.square().sum()})


@pytest.mark.parametrize("name", ["outer_loss", "inner_loss"])
def test_freed_graphs(name):
    def used(problem):
        loss = problem.outer_loss() if name == "outer_loss" else problem.inner_loss()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=f"graph of {name} was freed before, by backward"):
        call(**{name: used})


@pytest.mark.parametrize("name", ["outer_loss", "inner_loss"])
def test_graphs_from_before_the_inner_step(name):
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    losses = {"outer_loss": lambda: w.square().sum(), "inner_loss": lambda: (phi * w.square()).sum()}
    losses[name] = losses[name]()
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match=f"{name} was computed before the inner step.* Compute {name} anew") as info:
        hypergradient(**losses, inner_params=[w], outer_params=[phi], solver=SOLVER)
    assert "modified by an inplace operation" in str(info.value)


def test_a_graph_that_changes_before_a_product():
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)

    class Changes(Neumann):
        def solve(self, matvec, rhs, **options):
            with torch.no_grad():
                phi.add_(1)
            return super().solve(matvec, rhs, **options)

    with pytest.raises(RuntimeError, match="inner_loss was computed before the inner step"):
        hypergradient(w.sum(), (phi * w).square().sum(), [w], [phi], solver=Changes(3, 0.1))


def test_other_errors_of_autograd_pass_unchanged():
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    inner = (phi * w.square()).sum() + w.exp().mul_(2).sum()
    with pytest.raises(RuntimeError, match=r"one of the variables needed.*which is output 0 of"):
        hypergradient(w.sum(), inner, [w], [phi], solver=SOLVER)


@pytest.mark.parametrize("name", ["outer_loss", "inner_loss"])
def test_several_losses_where_one_belongs(name):
    with pytest.raises(TypeError, match=f"{name} must be .*, not a list of tensors: combine them into one"):
        call(**{name: lambda problem: [problem.inner_loss(), problem.inner_loss()]})
    both = Ridge()
    losses = {"outer_loss": both.outer_loss, "inner_loss": both.inner_loss, name: lambda: [both.inner_loss()] * 2}
    with pytest.raises(TypeError, match=f"{name} must be .*, not a list: combine them into one"):
        hypergradient(**losses, inner_params=[both.w], outer_params=[both.decay])


def test_inference_mode():
    with torch.inference_mode():
        inner = Ridge().inner_loss()
    with pytest.raises(ValueError, match=r"inner_loss has no graph.*torch\.inference_mode\(\)"):
        call(inner_loss=inner)
    problem, normal = Ridge(), torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=r"outer_loss has no graph.*torch\.inference_mode\(\)"), torch.inference_mode():
        hypergradient(problem.outer_loss, problem.inner_loss, [normal], [problem.decay])
    with torch.inference_mode():
        made = torch.ones(3, requires_grad=True)
    for name in ("inner_params", "outer_params"):
        with pytest.raises(ValueError, match=f"{name}.* number 0 was made under .*: make it outside"):
            call(**{name: [made]})


@pytest.mark.parametrize("name", ["inner_params", "outer_params"])
def test_parameters_are_an_iterable_of_tensors(name):
    with pytest.raises(TypeError, match=f"{name} must be an iterable of tensors, not a Tensor: pass a list"):
        call(**{name: lambda problem: problem.w})
    with pytest.raises(TypeError, match=f"{name}.*not a Linear: pass module.parameters"):
        call(**{name: lambda problem: nn.Linear(2, 2)})
    with pytest.raises(TypeError, match=f"{name} must be an iterable of tensors, not a NoneType"):
        call(**{name: None})
    with pytest.raises(TypeError, match=f"{name} must hold tensors, but number 0 is a tuple"):
        call(**{name: lambda problem: nn.Linear(2, 2).named_parameters()})
    with pytest.raises(TypeError, match=rf"{name}.*not a dict: pass its values\(\)"):
        call(**{name: lambda problem: dict(nn.Linear(2, 2).named_parameters())})
    with pytest.raises(ValueError, match=f"{name} is empty"):
        call(**{name: iter(())})
    with pytest.raises(ValueError, match=f"{name} must hold real tensors, but number 0 is torch.complex64"):
        call(**{name: [torch.zeros(2, dtype=torch.complex64, requires_grad=True)]})


def test_repeated_parameters():
    with pytest.raises(ValueError, match=r"inner_params\[1\] is the same tensor as inner_params\[0\]"):
        call(inner_params=lambda problem: [problem.w, problem.w])
    with pytest.raises(ValueError, match=r"outer_params\[2\] is the same tensor as outer_params\[0\]"):
        call(outer_params=lambda problem: [problem.decay, problem.weights, problem.decay])
    with pytest.raises(ValueError, match=r"outer_params\[1\] is the same tensor as inner_params\[0\]"):
        call(outer_params=lambda problem: [problem.decay, problem.w])


def test_parameters_computed_from_one_another():
    with pytest.raises(ValueError, match=r"outer_params\[1\] is computed from outer_params\[0\]"):
        call(outer_params=lambda problem: [problem.decay, problem.decay.view(-1)])
    w = torch.ones(3, requires_grad=True)
    phi = torch.ones(3, requires_grad=True)
    unrolled = w - 0.1 * phi
    with pytest.raises(ValueError, match=r"inner_params\[0\] is computed from outer_params\[0\]"):
        hypergradient(unrolled.sum(), unrolled.square().sum(), [unrolled], [phi], solver=SOLVER)
    later = unrolled.exp()
    with pytest.raises(ValueError, match=r"outer_params\[0\] is computed from inner_params\[0\]"):
        hypergradient(unrolled.sum(), later.square().sum(), [unrolled], [later], solver=SOLVER)


def test_inner_parameters_are_of_one_device():
    elsewhere = torch.ones(2, requires_grad=True, device="meta")
    with pytest.raises(ValueError, match="inner_params must be of one device, not of cpu and meta"):
        call(inner_params=lambda problem: [problem.w, elsewhere])


def test_all_inner_parameters_frozen():
    problem = Ridge()
    frozen = [problem.w.detach()]
    with pytest.raises(ValueError, match="do all have requires_grad=False"):
        hypergradient(problem.outer_loss(), problem.inner_loss(), frozen, [problem.decay], solver=SOLVER)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of torch's
def test_a_compiled_inner_loss_is_refused_and_a_compiled_outer_loss_is_not():
    w, phi, x = torch.randn(5, requires_grad=True), torch.ones(5, requires_grad=True), torch.randn(6, 5)

    def loss(w, phi):
        return (x @ w).square().sum() + (phi * w * w).sum()

    compiled = torch.compile(loss, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"inner_loss was computed with torch\.compile"):
        hypergradient(loss(w, phi), compiled(w, phi), [w], [phi], solver=SOLVER)
    result = hypergradient(compiled(w, phi.detach()), loss(w, phi), [w], [phi])
    assert bool(result.grads[0].any())


@pytest.mark.parametrize("name", ["outer_loss", "inner_loss"])
def test_transforms_of_torch_func(name):
    problem = Ridge()

    def within(scale):
        losses = {"outer_loss": problem.outer_loss(), "inner_loss": problem.inner_loss}
        losses[name] = lambda: scale * problem.w.square().sum()
        return hypergradient(**losses, inner_params=[problem.w], outer_params=[problem.decay]).grads[0].sum()

    with pytest.raises(RuntimeError, match=r"_loss cannot be used within a transform of torch\.func"):
        torch.func.grad(within)(torch.ones(1, dtype=torch.float64))
