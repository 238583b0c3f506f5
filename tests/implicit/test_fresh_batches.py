"""Fresh batches: a new one for every product of the Neumann series, right on average, without a certificate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from auxfast import FreshBatches, MicroBatches, hypergradient, verify_hypergradient
from auxfast.implicit import HyperOptimizer
from auxfast.solvers import (
    MINRES,
    Chebyshev,
    ConjugateGradient,
    GradientFlow,
    Identity,
    Neumann,
    Nystrom,
    OneStep,
    SingleLoop,
)
from auxfast.solvers import Dense as DenseSolver

SERIES = Neumann(15, 0.2, certify=False)


class Rows:
    """Ridge regression on 24 rows with a learned decay, in batches of 6."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.data = TensorDataset(torch.randn(24, 4).double(), torch.randn(24).double())
        self.w, self.phi = (torch.randn(4).double().requires_grad_() for _ in range(2))
        self.seen: list[Tensor] = []

    def loader(self, **options) -> DataLoader:
        return DataLoader(self.data, batch_size=6, shuffle=True, **options)

    def inner(self, batch) -> Tensor:
        self.seen.append(batch[0])
        return 0.5 * (batch[0] @ self.w - batch[1]).square().mean() + 0.5 * (self.phi.exp() * self.w.square()).sum()

    def outer(self) -> Tensor:
        return (self.w - 1).square().sum()

    def hypergradient(self, inner, solver=SERIES, **options):
        return hypergradient(self.outer, inner, [self.w], [self.phi], solver=solver, warn=False, **options)


def test_the_mean_of_many_calls_is_the_series_of_all_batches():
    rows = Rows()
    sampler = RandomSampler(rows.data, replacement=True)  # independent batches: those of one epoch are not
    inner = FreshBatches(rows.inner, DataLoader(rows.data, batch_size=6, sampler=sampler))
    found = torch.stack([rows.hypergradient(inner).grads[0] for _ in range(60)])
    whole = rows.hypergradient(MicroBatches(rows.inner, rows.loader())).grads[0]
    error = found.std(0) / math.sqrt(len(found))
    assert (error > 0).all()
    assert ((found.mean(0) - whole).abs() < 4 * error).all()
    assert error.norm() < 0.1 * whole.norm()


def test_every_product_takes_another_batch_and_calls_go_on_where_the_last_one_was():
    rows = Rows()
    inner = FreshBatches(rows.inner, rows.loader())
    stats = rows.hypergradient(inner).stats
    assert stats.matvecs == 15
    rows.hypergradient(inner)
    assert len(rows.seen) == 32  # 15 products and the mixed one, twice
    for epoch in range(8):
        batches = rows.seen[4 * epoch : 4 * epoch + 4]
        assert torch.equal(torch.cat(batches).sort(0).values, rows.data.tensors[0].sort(0).values)
    assert not torch.equal(rows.seen[0], rows.seen[16])  # torch's random states were put back, the order was not


def test_there_is_no_certificate():
    rows = Rows()
    stats = rows.hypergradient(FreshBatches(rows.inner, rows.loader())).stats
    assert math.isnan(stats.residual)
    assert not stats.converged
    assert stats.symmetry_error is None


def test_torch_s_random_states_are_as_before():
    rows = Rows()
    inner = FreshBatches(rows.inner, rows.loader())
    state = torch.get_rng_state()
    rows.hypergradient(inner)
    assert torch.equal(torch.get_rng_state(), state)


def test_gauss_newton_products_and_the_optimizer_take_them():
    rows = Rows()

    def inner(batch) -> tuple[Tensor, Tensor]:
        z = batch[0] @ rows.w
        return 0.5 * (z - batch[1]).square().mean() + 0.5 * (rows.phi.exp() * rows.w.square()).sum(), z

    torch.manual_seed(1)
    exact = rows.hypergradient(FreshBatches(rows.inner, rows.loader())).grads[0]
    torch.manual_seed(1)
    same = rows.hypergradient(FreshBatches(inner, rows.loader()), curvature="gauss-newton").grads[0]
    torch.testing.assert_close(same, exact)  # the network is linear
    before = rows.phi.detach().clone()
    torch.manual_seed(1)
    optimizer = HyperOptimizer(torch.optim.SGD([rows.phi], lr=0.1), solver=SERIES, warn=False)
    optimizer.step(rows.outer, FreshBatches(rows.inner, rows.loader()), [rows.w])
    torch.testing.assert_close(rows.phi.detach(), before - 0.1 * exact)


def test_parameters_that_only_some_batches_use_are_in_the_system():
    w, extra, phi = (torch.ones(2).double().requires_grad_() for _ in range(3))

    def inner(i: int) -> Tensor:
        return (phi.exp() * w.square()).sum() + (extra - phi).square().sum() * i

    batches = FreshBatches(inner, [0, 1])
    result = hypergradient(
        lambda: w.sum() + extra.sum(), batches, [w, extra], [phi], solver=Neumann(1, 0.1, certify=False), warn=False
    )
    # The product takes batch 0, the mixed one batch 1: x = 0.1 (b + (1 - 0.1 H) b), mixed = (2 e w, -2).
    x_w, x_extra = 0.1 * (2 - 0.2 * math.e), 0.1 * 2
    torch.testing.assert_close(result.grads[0], torch.full((2,), -2 * math.e * x_w + 2 * x_extra).double())


@pytest.mark.parametrize(
    "solver",
    [
        MINRES(),
        ConjugateGradient(),
        Chebyshev(),
        Nystrom(),
        DenseSolver(),
        Identity(),
        GradientFlow(10.0),
        Neumann(5, 0.1),
        OneStep(0.1),
        OneStep(0.1, mixed="difference"),
        OneStep(0.1, lookahead=True),
        SingleLoop(0.1),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_other_solvers_refuse_them_by_name(solver):
    rows = Rows()
    with pytest.raises(ValueError, match=rf"Neumann\(certify=False\) alone.*{type(solver).__name__}.*needs the same"):
        rows.hypergradient(FreshBatches(rows.inner, rows.loader()), solver)


def test_a_list_of_micro_batches_holds_no_fresh_ones():
    rows = Rows()
    fresh = FreshBatches(rows.inner, rows.loader())
    with pytest.raises(ValueError, match="inner_loss must not hold FreshBatches in a list"):
        rows.hypergradient([fresh, (2.0, fresh)], solver=MINRES())


def test_what_is_refused():
    rows = Rows()
    used = FreshBatches(rows.inner, iter(rows.loader()))
    with pytest.raises(ValueError, match=r"batches of FreshBatches has no batch left, .*pass the loader itself"):
        rows.hypergradient(used)
    assert len(rows.seen) == 4
    with pytest.raises(ValueError, match="batches of FreshBatches is empty"):
        rows.hypergradient(FreshBatches(rows.inner, []))
    with pytest.raises(TypeError, match="batches must be a list"):
        FreshBatches(rows.inner, torch.ones(3))
    with pytest.raises(TypeError, match="loss_of_batch must be a function"):
        FreshBatches(rows.loader(), rows.inner)
    fresh = FreshBatches(rows.inner, rows.loader())
    with pytest.raises(ValueError, match=r"curvature=.finite-difference. .* inner_loss must not be FreshBatches"):
        rows.hypergradient(fresh, curvature="finite-difference")
    with pytest.raises(ValueError, match=r"inner_loss must not be FreshBatches.*MicroBatches"):
        verify_hypergradient(rows.outer, fresh, [rows.w], [rows.phi], solver=SERIES)


def test_an_outer_loss_takes_the_next_batch():
    rows = Rows()
    outer = FreshBatches(lambda batch: (batch * rows.w).sum(), [torch.ones(4), 2 * torch.ones(4)])
    everything = MicroBatches(rows.inner, rows.loader())
    grads = [
        hypergradient(outer, everything, [rows.w], [rows.phi], solver=SERIES, warn=False).grads[0] for _ in range(2)
    ]
    torch.testing.assert_close(grads[1], 2 * grads[0])
