"""Weighted micro-batches: the mean over all samples, however they are cut, loaded and shuffled."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import auxfast
from auxfast import MicroBatches
from auxfast.implicit import HyperOptimizer, hypergradient
from auxfast.solvers import MINRES, OneStep, SingleLoop

from .problems import Dense


class Samples:
    """A small network on 11 samples, of which a loader makes batches of 4, 4 and 3."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.phi = nn.Parameter(torch.tensor([0.3, -0.2]).double())
        self.data = TensorDataset(torch.randn(11, 3).double(), torch.randn(11, 2).double())
        self.params = list(self.net.parameters())

    def loader(self, **options) -> DataLoader:
        return DataLoader(self.data, batch_size=4, **options)

    def inner(self, batch) -> Tensor:
        return self.inner_with_outputs(batch)[0]

    def inner_with_outputs(self, batch) -> tuple[Tensor, Tensor]:
        z = self.net(batch[0])
        decay = sum(p.square().sum() for p in self.params)
        return (self.phi.exp() * (z - batch[1]).square().mean(0)).sum() + 0.1 * decay, z

    def outer(self, batch) -> Tensor:
        return (self.net(batch[0].flip(1)) - batch[1]).square().mean() + self.phi.sum()

    def hypergradient(self, outer, inner, **options):
        return hypergradient(outer, inner, self.params, [self.phi], solver=Dense(), **options).grads[0]

    def whole(self, **options) -> Tensor:
        inner = self.inner_with_outputs if options.get("curvature") == "gauss-newton" else self.inner
        everything = self.data.tensors
        return self.hypergradient(lambda: self.outer(everything), lambda: inner(everything), **options)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton", "finite-difference"])
def test_a_short_last_batch_counts_for_its_samples(curvature):
    case = Samples()
    inner = case.inner_with_outputs if curvature == "gauss-newton" else case.inner
    batches = MicroBatches(inner, case.loader(shuffle=True))
    found = case.hypergradient(MicroBatches(case.outer, case.loader()), batches, curvature=curvature)
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if curvature == "finite-difference" else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found, case.whole(curvature=curvature), **tolerance)


@pytest.mark.parametrize(
    "solver", [OneStep(0.1), OneStep(0.1, lookahead=True), OneStep(0.1, mixed="difference"), SingleLoop(0.1)], ids=repr
)
def test_one_step_solvers_take_them(solver):
    case = Samples()
    everything = case.data.tensors
    rest = (case.params, [case.phi])
    whole = hypergradient(lambda: case.outer(everything), lambda: case.inner(everything), *rest, solver=solver)
    batches = MicroBatches(case.outer, case.loader()), MicroBatches(case.inner, case.loader(shuffle=True))
    found = hypergradient(*batches, *rest, solver=solver)
    torch.testing.assert_close(found.grads, whole.grads)


@pytest.mark.parametrize("form", ["iterator", "generator", "list", "dict", "islice"])
def test_batches_of_any_kind_serve(form):
    case = Samples()
    loader = case.loader()
    batches = {
        "iterator": iter(loader),
        "generator": (batch for batch in loader),
        "list": list(loader),
        "dict": [{"flag": torch.tensor(1), "x": (x, None), "y": y} for x, y in loader],
        "islice": itertools.islice(itertools.cycle(loader), 3),
    }[form]
    loss = (lambda batch: case.inner((batch["x"][0], batch["y"]))) if form == "dict" else case.inner
    found = case.hypergradient(MicroBatches(case.outer, loader), MicroBatches(loss, batches))
    torch.testing.assert_close(found, case.whole(), rtol=1e-12, atol=1e-12)


def test_a_loader_that_shuffles_is_read_once_and_a_sequence_at_every_product():
    case, reads = Samples(), []

    class Sliced:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int):
            reads.append(i)
            return case.data[4 * i : 4 * i + 4]

    loader = case.loader(shuffle=True)
    batches = MicroBatches(case.inner, loader)
    first = case.hypergradient(MicroBatches(case.outer, loader), batches)
    torch.testing.assert_close(first, case.whole(), rtol=1e-12, atol=1e-12)
    lazily = MicroBatches(case.inner, Sliced())
    assert reads == [0, 1, 2]  # for the numbers of samples
    torch.testing.assert_close(case.hypergradient(lambda: case.outer(case.data.tensors), lazily), case.whole())
    assert len(reads) == 3 + 3 * (1 + 26 + 1)  # which parameters couple, products, mixed product


def test_pairs_of_weight_and_function_are_a_weighted_mean():
    case = Samples()
    x, y = case.data.tensors
    parts = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    inner = [(w, lambda part=part: case.inner(part)) for w, part in zip((8, 8, 6), parts, strict=True)]
    outer = [*(lambda part=part: case.outer(part) for part in parts[:2]), (0.75, lambda: case.outer(parts[2]))]
    torch.testing.assert_close(case.hypergradient(outer, inner), case.whole(), rtol=1e-12, atol=1e-12)


def test_a_batch_of_weight_0_is_left_out():
    case = Samples()
    batches = [*case.loader(), (torch.full((1, 3), torch.nan).double(), torch.zeros(1, 2).double())]
    inner = MicroBatches(case.inner, batches, weights=torch.tensor([4, 4, 3, 0]))
    outer = MicroBatches(case.outer, batches, weights=[4.0, 4.0, 3.0, 0.0])
    torch.testing.assert_close(case.hypergradient(outer, inner), case.whole(), rtol=1e-12, atol=1e-12)


def test_dropout_masks_are_the_same_in_every_product():
    case = Samples()
    case.net.insert(2, nn.Dropout(0.5))
    batches = MicroBatches(case.inner, case.loader(shuffle=True))
    solver = MINRES(60, tol=1e-9, damping=1.0)
    args = (lambda: case.outer(case.data.tensors), batches, case.params, [case.phi])
    assert hypergradient(*args, solver=solver, warn=False).stats.converged


def test_the_optimizer_takes_them():
    case = Samples()
    before, exact = case.phi.detach().clone(), case.whole()
    optimizer = HyperOptimizer(torch.optim.SGD([case.phi], lr=0.5), solver=Dense())
    optimizer.step(MicroBatches(case.outer, case.loader()), MicroBatches(case.inner, case.loader()), case.params)
    torch.testing.assert_close(case.phi.detach(), before - 0.5 * exact)


def test_a_part_of_them_is_a_list_of_pairs():
    weights, functions = zip(*MicroBatches(lambda batch: batch.sum(), torch.arange(11).split(4))[1:], strict=True)
    assert weights == (4, 3)
    assert [int(function()) for function in functions] == [4 + 5 + 6 + 7, 8 + 9 + 10]


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0, -1.0, 1.0], ValueError, "weights must be finite and at least 0, but number 1 is -1.0"),
        ([1.0, math.nan, 1.0], ValueError, "but number 1 is nan"),
        ([1.0, 1.0, math.inf], ValueError, "but number 2 is inf"),
        ([0, 0, 0], ValueError, "weights must not all be 0"),
        ([1.0, 1.0], ValueError, "weights must be one for each of the 3 batches, not 2"),
        (["1", 1, 1], TypeError, "weights must be numbers, but number 0 is a str"),
    ],
)
def test_bad_weights_are_refused(weights, error, message):
    with pytest.raises(error, match=message):
        MicroBatches(lambda batch: batch.sum(), torch.ones(6).split(2), weights=weights)
    if len(weights) == 3:
        case = Samples()
        pairs = [(weight, lambda: case.inner(case.data.tensors)) for weight in weights]
        with pytest.raises(error, match=f"weights of inner_loss must.*{message[-10:]}"):
            case.hypergradient(lambda: case.outer(case.data.tensors), pairs)


def test_weights_that_are_no_list_are_refused():
    for weights in (2, torch.tensor(2.0)):
        with pytest.raises(
            TypeError, match=r"weights must be a list of one number for each batch, not (2|tensor\(2.\))"
        ):
            MicroBatches(lambda batch: batch.sum(), torch.ones(6).split(2), weights=weights)


def test_bad_batches_are_refused():
    used = iter(torch.ones(6).split(2))
    list(used)
    for empty in ([], used, DataLoader([], batch_size=2)):
        with pytest.raises(ValueError, match=r"batches is empty \(an iterator that was used up"):
            MicroBatches(lambda batch: batch.sum(), empty)
    with pytest.raises(TypeError, match=r"batches must be a list, .* not a Tensor: pass a list of batches"):
        MicroBatches(lambda batch: batch.sum(), torch.ones(6))
    with pytest.raises(TypeError, match="loss_of_batch must be a function of a batch, not a tuple"):
        MicroBatches(torch.ones(6).split(2), lambda batch: batch.sum())
    with pytest.raises(ValueError, match="weights must be given, since batch 1, a int, holds no tensor"):
        MicroBatches(lambda batch: batch.sum(), [torch.ones(2), 3])


def test_pairs_in_another_order_are_told():
    case = Samples()
    with pytest.raises(TypeError, match=r"inner_loss must be .*, not a list of pairs that are not \(weight, func"):
        case.hypergradient(lambda: case.outer(case.data.tensors), [(lambda: case.inner(case.data.tensors), 0.5)])


@pytest.mark.parametrize("name", ["outer_loss", "inner_loss"])
def test_a_loader_or_its_iterator_as_a_loss_is_told_what_to_write(name):
    case = Samples()
    losses = {"outer_loss": lambda: case.outer(case.data.tensors), "inner_loss": lambda: case.inner(case.data.tensors)}
    for given in (case.loader(), iter(case.loader())):
        with pytest.raises(TypeError, match=rf"{name} must be .*auxfast.MicroBatches\(.*auxfast.FreshBatches\("):
            hypergradient(**{**losses, name: given}, inner_params=case.params, outer_params=[case.phi])


def test_a_loss_of_a_batch_that_is_wrong_is_named():
    case = Samples()
    with pytest.raises(ValueError, match=r"inner_loss\[0\] must be a scalar, not of shape \(4, 2\)"):
        case.hypergradient(
            lambda: case.outer(case.data.tensors), MicroBatches(lambda batch: case.net(batch[0]), case.loader())
        )
    assert auxfast.MicroBatches is MicroBatches
