"""The drop-in's optimizer: what one step does, and 50 outer steps of training beside AuxiLearn's algorithm."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from auxfast.compat.auxilearn import (
    Hypergrad,
    MetaOptimizer,
    MonoLinearHyperNet,
    MonoNoFCCNNHyperNet,
    MonoNonlinearHyperNet,
)
from compat import transcription

# ------------------------------------------------------------------------------------------------------------ one step


class Quadratic:
    """outer(w) = (w - 1)^2 / 2 and inner(w) = sum(phi) w^2 / 2 at w = 2: the mixed derivative is w."""

    def __init__(self, optimizer=lambda params: torch.optim.SGD(params, lr=1.0), **settings):
        self.w, self.phi = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0, 1.0], requires_grad=True)
        self.meta = MetaOptimizer(optimizer([self.phi]), **{"hpo_lr": 0.1, "truncate_iter": 1, **settings})

    def train_loss(self) -> Tensor:
        return (self.phi.sum() * self.w**2).sum() / 2

    def step(self, **changes):
        losses = {
            "val_loss": ((self.w - 1) ** 2).sum() / 2,
            "train_loss": self.train_loss(),
        }
        return self.meta.step(**{**losses, "aux_params": [self.phi], "parameters": [self.w], **changes})


GRADIENT = -3.2  # H = 4: p = 1 + 0.6, times w


def test_arguments():
    made = inspect.signature(MetaOptimizer).parameters
    assert list(made) == ["meta_optimizer", "hpo_lr", "truncate_iter", "max_grad_norm", "scale"]
    assert [made[name].default for name in list(made)[2:]] == [3, 10, "auxilearn"]
    step = inspect.signature(MetaOptimizer.step).parameters
    assert list(step) == ["self", "train_loss", "val_loss", "parameters", "aux_params", "return_grads"]
    assert step["return_grads"].default is False


@pytest.mark.filterwarnings("ignore:The hypergradient is little more:RuntimeWarning")
@pytest.mark.parametrize("scale", ["auxilearn", "exact"])
def test_a_batch_with_nan_changes_nothing_and_is_told_once(scale):
    problem = Quadratic(lambda params: torch.optim.Adam(params, lr=0.1), scale=scale)
    problem.step()
    phi, state = problem.phi.detach().clone(), copy.deepcopy(problem.meta.meta_optimizer.state_dict())
    with pytest.warns(RuntimeWarning, match="A step of MetaOptimizer was skipped") as caught:
        grads = [problem.step(return_grads=True, train_loss=problem.train_loss() * torch.nan) for _ in range(2)]
    assert len(caught) == 1
    assert all(grad.isnan().all() for (grad,) in grads)
    assert torch.equal(problem.phi, phi)
    torch.testing.assert_close(problem.meta.meta_optimizer.state_dict(), state, rtol=0, atol=0)
    problem.step()
    assert not torch.equal(problem.phi, phi)


def test_a_step():
    problem = Quadratic()
    assert problem.step() is None
    torch.testing.assert_close(problem.phi, torch.tensor([3 - GRADIENT, 1 - GRADIENT]))
    assert problem.w.grad is None
    assert isinstance(problem.meta.hypergrad, Hypergrad)
    problem.meta.zero_grad()
    assert problem.phi.grad is None


@pytest.mark.parametrize("largest", [10.0, 0.5, None])
def test_clipping_is_torchs_and_leaves_the_returned_gradients_alone(largest):
    problem = Quadratic(max_grad_norm=largest)
    expected = torch.full((2,), GRADIENT)
    (returned,) = problem.step(return_grads=True)
    torch.testing.assert_close(returned, expected)
    given = torch.zeros(2, requires_grad=True)
    given.grad = expected.clone()
    if largest is not None:
        torch.nn.utils.clip_grad_norm_(given, largest)
    torch.testing.assert_close(problem.phi.grad, given.grad, rtol=1e-6, atol=0)


def test_parameters_from_generators():
    problem = Quadratic()
    problem.step(aux_params=(p for p in [problem.phi]), parameters=(p for p in [problem.w]))
    torch.testing.assert_close(problem.phi, torch.tensor([3 - GRADIENT, 1 - GRADIENT]))


def test_tensors_stand_for_themselves():
    problem = Quadratic()
    problem.step(aux_params=problem.phi, parameters=problem.w)
    torch.testing.assert_close(problem.phi, torch.tensor([3 - GRADIENT, 1 - GRADIENT]))


def test_gradients_of_before_do_not_count():
    problem = Quadratic()
    spare = torch.ones(1, requires_grad=True)
    problem.meta.meta_optimizer.add_param_group({"params": [spare]})
    problem.phi.grad, spare.grad = torch.ones(2), torch.ones(1)
    problem.step()
    torch.testing.assert_close(problem.phi, torch.tensor([3 - GRADIENT, 1 - GRADIENT]))
    assert spare.item() == 1


def test_unused_and_frozen_outer_parameters():
    problem = Quadratic()
    unused, frozen = torch.ones(2, requires_grad=True), torch.ones(2)
    problem.meta.meta_optimizer.add_param_group({"params": [unused, frozen]})
    grads = problem.step(aux_params=[unused, problem.phi, frozen], return_grads=True)
    assert [grad.tolist() for grad in (grads[0], grads[2])] == [[0, 0], [0, 0]]
    torch.testing.assert_close(grads[1], torch.full((2,), GRADIENT))
    assert frozen.grad is None
    assert unused.tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:The hypergradient is little more:RuntimeWarning")
def test_exact_scale():
    problem = Quadratic(scale="exact")
    (grad,) = problem.step(return_grads=True)
    torch.testing.assert_close(grad, torch.full((2,), 0.1 * GRADIENT))
    problem = Quadratic()
    problem.meta.hypergrad.scale, problem.meta.hypergrad.truncate_iter = "exact", 100
    (grad,) = problem.step(return_grads=True)
    torch.testing.assert_close(grad, torch.full((2,), -0.5))  # (w - 1) / H times w


def test_settings_may_change():
    problem = Quadratic()
    problem.meta.hypergrad.learning_rate = 0.0
    problem.meta.max_grad_norm = None
    (grad,) = problem.step(return_grads=True)
    torch.testing.assert_close(grad, torch.full((2,), -4.0))


def test_copies_go_on_alike():
    problem = Quadratic(lambda params: torch.optim.Adam(params, lr=0.1))
    problem.step()
    other = copy.deepcopy(problem)
    problem.step()
    assert not torch.equal(problem.phi, other.phi)
    other.step()
    assert torch.equal(problem.phi, other.phi)


# ------------------------------------------------------------------------------------------------ 50 outer steps


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images / 16), torch.tensor(data.target)


class Training:
    """Digits, in two copies that train side by side, each with its own combiner and optimizers."""

    batch, inner_lr = 32, 0.02

    def __init__(self, net: nn.Module, combiner: nn.Module, outer, dtype: torch.dtype) -> None:
        self.net, self.combiner = copy.deepcopy(net).to(dtype), combiner.to(dtype)
        self.w, self.phi = list(self.net.parameters()), list(self.combiner.parameters())
        self.inner, self.outer = torch.optim.SGD(self.w, lr=self.inner_lr, momentum=0.9), outer(self.phi)
        self.images, self.labels = digits()
        self.images = self.images.to(dtype)

    def run(self, outer_step, clamp) -> Tensor:
        """50 outer steps, each after two inner ones; returns all parameters."""
        generator = torch.Generator().manual_seed(1)

        def losses(first: int, last: int) -> Tensor:
            return self.losses(torch.randint(first, last, (self.batch,), generator=generator))

        for _ in range(50):
            for _ in range(2):
                self.inner.zero_grad()
                self.combiner(losses(0, 1000)).backward()
                self.inner.step()
            outer_step(self.combiner(losses(0, 1000)), losses(1000, 1797)[:, 0].mean())
            clamp()
        return torch.cat([p.detach().flatten() for p in (*self.w, *self.phi)]).double()


class Classes(Training):
    """The digit, whether it is odd, and whether it is large."""

    def losses(self, chosen: Tensor) -> Tensor:
        out, labels = self.net(self.images[chosen].flatten(1)), self.labels[chosen]
        main = nn.functional.cross_entropy(out[:, :10], labels, reduction="none")
        binary = torch.stack([labels % 2, labels // 5], dim=1).to(out.dtype)
        others = nn.functional.binary_cross_entropy_with_logits(out[:, 10:], binary, reduction="none")
        return torch.cat([main[:, None], others], dim=1)


class Pixels(Training):
    """The image without noise, its complement's square, and its differences between neighbours."""

    batch, inner_lr = 8, 0.02

    def losses(self, chosen: Tensor) -> Tensor:
        clean = self.images[chosen][:, None]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(int(chosen[0])), dtype=clean.dtype)
        targets = torch.cat([clean, (1 - clean) ** 2, clean - clean.roll(1, -1)], dim=1)
        return (self.net(clean + 0.3 * noise) - targets).square()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 12))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1))


OUTER = {
    "momentum": lambda phi: torch.optim.SGD(phi, lr=1e-3, momentum=0.9, weight_decay=1e-5),
    "adam": lambda phi: torch.optim.Adam(phi, lr=1e-2),
}
RUNS = {
    "linear": (
        *(Classes, mlp),
        lambda n: MonoLinearHyperNet(0, 3, skip_connection=True, init_value=0.5, weight_normalization=n),
        lambda n: transcription.Linear(3, skip=True, init=0.5, normalize=n),
    ),
    "nonlinear": (
        *(Classes, mlp),
        lambda n: MonoNonlinearHyperNet(0, 3, [10] * 2, init_upper=0.2, weight_normalization=n),
        lambda n: transcription.Nonlinear(3, [10] * 2, init=(0.0, 0.2), normalize=n),
    ),
    "cnn": (
        *(Pixels, cnn),
        lambda n: MonoNoFCCNNHyperNet(0, weight_normalization=n),
        lambda n: transcription.Conv(3, (8, 16), normalize=n),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract:UserWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", RUNS)
def test_fifty_outer_steps(kind, normalize, outer, dtype, tolerance):
    """Relative to how far all parameters went. What rounding does in a step grows over the 150 that follow."""
    training, make_net, make_ours, make_theirs = RUNS[kind]
    torch.manual_seed(0)
    net, combiner, other = make_net(), make_ours(normalize), make_theirs(normalize)
    other.load_state_dict(combiner.state_dict())
    start = torch.cat([p.detach().flatten() for p in (*net.parameters(), *combiner.parameters())])
    ours, theirs = (training(net, one, OUTER[outer], dtype) for one in (combiner, other))

    meta = MetaOptimizer(ours.outer, hpo_lr=0.05, max_grad_norm=5)
    mine = ours.run(lambda train, val: meta.step(train, val, ours.net.parameters(), ours.phi), ours.combiner.clamp)

    def step(train: Tensor, val: Tensor) -> None:
        transcription.outer_step(theirs.outer, train, val, theirs.w, theirs.phi, alpha=0.05, max_norm=5)

    expected = theirs.run(step, lambda: transcription.clamp(theirs.combiner))
    moved = (expected - start).abs().max()
    assert moved > 0.1
    assert (expected - start)[-theirs.phi[-1].numel() :].abs().max() > 1e-3
    assert (mine - expected).abs().max() <= tolerance * moved
