"""The derivative of torch.optim's own update in the gradient, against autograd and against the formula of SAMA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from auxfast.solvers import SAMA

SHAPES = [(3, 2), (4,), ()]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(kind: Callable[..., torch.optim.Optimizer], steps: int, **options: Any) -> torch.optim.Optimizer:
    """An optimizer of two groups after `steps` steps, the last of whose gradients stand in `.grad`."""
    params = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]
    optimizer = kind([{"params": params[:2]}, {"params": params[2:], "lr": 0.03}], lr=0.1, **options)
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = normal(*param.shape, seed=100 * step + i)
        optimizer.step()
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def adam(w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], decoupled: bool) -> Tensor:
    """One step of torch.optim.Adam or AdamW, written out."""
    (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    w, g = (w * (1 - lr * decay), g) if decoupled else (w, g + decay * w)
    step = float(state["step"]) + 1
    mean = beta1 * state["exp_avg"] + (1 - beta1) * g
    square = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    denominator = (square / (1 - beta2**step)).sqrt() + group["eps"]
    return w - lr * mean / (1 - beta1**step) / denominator


def sgd(w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """One step of torch.optim.SGD, written out."""
    g = g + group["weight_decay"] * w
    if group["momentum"]:
        buffer = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * g
        g = g + group["momentum"] * buffer if group["nesterov"] else buffer
    return w - group["lr"] * g


def derivative_of_next_step(optimizer: torch.optim.Optimizer, seed: int) -> list[Tensor]:
    """Minus the diagonal of the step's Jacobian in the gradient, by autograd; the optimizer makes the step."""
    expected, results = [], []
    for group in optimizer.param_groups:
        for param in group["params"]:
            g = normal(*param.shape, seed=seed + len(expected)).requires_grad_()
            state = optimizer.state[param]
            if isinstance(optimizer, torch.optim.SGD):
                stepped = sgd(param.detach(), g, state, group)
            else:
                stepped = adam(param.detach(), g, state, group, isinstance(optimizer, torch.optim.AdamW))
            expected.append(-torch.autograd.grad(stepped.sum(), g)[0])  # the Jacobian is diagonal
            results.append(stepped.detach())
            param.grad = g.detach()
    optimizer.step()
    for param, stepped in zip(params_of(optimizer), results, strict=True):
        torch.testing.assert_close(param.detach(), stepped)
    return expected


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "SGD, dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "SGD, Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam, large eps": (torch.optim.Adam, {"eps": 0.3, "betas": (0.6, 0.9)}),
    "Adam, weight decay": (torch.optim.Adam, {"weight_decay": 0.5}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.5}),
}


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_is_the_derivative_of_the_last_update_in_its_gradient(kind, options, steps):
    optimizer = trained(kind, steps, **options)
    expected = derivative_of_next_step(optimizer, seed=7)
    b = [normal(*shape, seed=50 + i) for i, shape in enumerate(SHAPES)]
    x, stats = SAMA(optimizer).solve(lambda v: pytest.fail("no product"), b)
    for found, t, d in zip(x, b, expected, strict=True):
        torch.testing.assert_close(found, d * t, rtol=1e-9, atol=1e-12)
    assert (stats.matvecs, stats.converged, stats.stop_reason) == (0, False, "steps")
    assert math.isnan(stats.residual)


def test_is_the_formula_of_betty_once_bias_corrections_are_over():
    """betty takes the moments before the last step from those after it, and the update without bias corrections."""
    beta1, beta2, eps = 0.5, 0.7, 1e-12
    optimizer = trained(torch.optim.Adam, 200, betas=(beta1, beta2), eps=eps)
    b = [normal(*shape, seed=50 + i) for i, shape in enumerate(SHAPES)]
    x, _ = SAMA(optimizer).solve(list, b)
    for group in optimizer.param_groups:
        for param in group["params"]:
            state, g = optimizer.state[param], param.grad
            old_mean = (state["exp_avg"] - (1 - beta1) * g) / beta1
            old_square = (state["exp_avg_sq"] - (1 - beta2) * g * g) / beta2
            scale = (1 - beta1) * beta2 * old_square - beta1 * (1 - beta2) * g * old_mean
            expected = b.pop(0) * scale / (state["exp_avg_sq"].sqrt() + eps) ** 3 * group["lr"]
            torch.testing.assert_close(x.pop(0), expected, rtol=1e-8, atol=1e-12)


def test_the_first_step_of_adam_does_not_depend_on_the_size_of_the_gradient():
    optimizer = trained(torch.optim.Adam, 1, eps=1e-15)
    x, _ = SAMA(optimizer).solve(list, [torch.ones(shape).double() for shape in SHAPES])
    assert all(float(t.abs().max()) < 1e-9 for t in x)


def test_without_the_gradient_its_own_term_is_left_out():
    optimizer = trained(torch.optim.Adam, 30)
    optimizer.zero_grad()
    x, _ = SAMA(optimizer).solve(list, [torch.ones(shape).double() for shape in SHAPES])
    first = optimizer.param_groups[0]["params"][0]
    root = (optimizer.state[first]["exp_avg_sq"] / (1 - 0.999**30)).sqrt()
    torch.testing.assert_close(x[0], 0.1 * 0.1 / (1 - 0.9**30) / (root + 1e-8))


def test_entries_without_a_gradient_so_far_stay_finite():
    optimizer = trained(torch.optim.Adam, 0)
    for param in params_of(optimizer):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    x, _ = SAMA(optimizer).solve(list, [torch.ones(shape).double() for shape in SHAPES])
    assert all(t.isfinite().all() for t in x)


def test_a_parameter_without_a_step_has_no_part():
    optimizer = trained(torch.optim.Adam, 3)
    added = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer.add_param_group({"params": [added]})
    x, _ = SAMA(optimizer).solve(list, [torch.ones(shape).double() for shape in [*SHAPES, (2,)]])
    assert x[0].all()
    assert not x[-1].any()


def test_several_right_hand_sides_are_scaled_alike():
    optimizer = trained(torch.optim.Adam, 3)
    b = [normal(4, *shape, seed=i) for i, shape in enumerate(SHAPES)]
    x, stats = SAMA(optimizer).solve(list, b, batched=True)
    for row in range(4):
        alone, _ = SAMA(optimizer).solve(list, [t[row] for t in b])
        assert all(torch.equal(t[row], a) for t, a in zip(x, alone, strict=True))
    assert len(stats.residuals) == 4


def test_settings_and_right_hand_sides_are_checked():
    params = [torch.ones(2, requires_grad=True)]
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.SGD, Adam or AdamW, not a RMSprop"):
        SAMA(torch.optim.RMSprop(params))
    with pytest.raises(ValueError, match="optimizer must be without amsgrad"):
        SAMA(torch.optim.Adam(params, amsgrad=True))
    with pytest.raises(ValueError, match="optimizer must be without maximize"):
        SAMA(torch.optim.SGD(params, maximize=True))
    with pytest.raises(ValueError, match="mixed must be 'exact' or 'difference', not 'central'"):
        SAMA(torch.optim.SGD(params), mixed="central")
    with pytest.raises(ValueError, match="must have made a step"):
        SAMA(torch.optim.Adam(params)).solve(list, [torch.ones(2)])
    with pytest.raises(ValueError, match="must have the shapes of the optimizer's parameters"):
        SAMA(torch.optim.SGD(params)).solve(list, [torch.ones(3)])
    with pytest.raises(ValueError, match="rhs is not finite"):
        SAMA(torch.optim.SGD(params)).solve(list, [torch.tensor([1.0, torch.nan])])


def test_a_solver_says_what_it_is():
    assert repr(SAMA(torch.optim.SGD([torch.ones(2)]))) == "SAMA(SGD, mixed='difference')"
