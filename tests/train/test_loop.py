"""The loop, on a problem whose answers are known: one weight w, losses (w - target_j)^2 of one sample."""

import pytest
import torch
from torch import nn

from auxfast import HyperOptimizer
from auxfast.nn import ConvCombiner, LinearCombiner
from auxfast.solvers import Neumann
from auxfast.train import Batch, TrainConfig, train
from auxfast.train.loop import mean_loss_weights


class OneWeight:
    """Main loss pulls w to 0, the helpful auxiliary to 1, the harmful one to -1; the outer loss wants 1."""

    loss_names = ("main", "helpful", "harmful")
    main = 0

    def __init__(self, start: float) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, start)

    def training_batch(self, generator: torch.Generator) -> Batch:
        return Batch((self.model.weight - torch.tensor([[0.0, 1.0, -1.0]])).square(), None)

    def outer_loss(self) -> torch.Tensor:
        return (self.model.weight - 1).square().sum()

    def score(self) -> float:
        return -abs(self.model.weight.item() - 1)


def _config(**changes):
    settings = {
        "outer_steps": 20,
        "inner_steps": 20,
        "inner_lr": 0.05,
        "outer_lr": 0.1,
        "solver": Neumann(steps=50, step_size=0.05),
        **changes,
    }
    return TrainConfig(**settings)


def _equal_weights() -> LinearCombiner:
    combiner = LinearCombiner(3)
    nn.init.ones_(combiner.phi)
    return combiner


def _train(combine, config, outer=None, start=0.0, **arguments):
    task = OneWeight(start)
    return task, train(task, combine, config, torch.Generator().manual_seed(0), outer=outer, **arguments)


def test_without_an_outer_optimizer_only_the_model_learns():
    combiner = _equal_weights()
    before = combiner.phi.detach().clone()
    task, records = _train(lambda losses, mask: combiner(losses, mask) + losses[:, 1].mean(), _config())
    assert torch.equal(combiner.phi, before)
    assert task.model.weight.item() == pytest.approx(0.25, abs=1e-4)  # (0 + 1 + 1 - 1) / 4
    assert [record.outer_loss for record in records] == [None] * 20
    assert [record.residual for record in records] == [None] * 20


def test_the_combiner_learns_which_auxiliary_helps():
    config, combiner = _config(), _equal_weights()
    task, records = _train(combiner, config, config.outer_optimizer(combiner))
    assert len(records) == 20
    assert records[-1].outer_loss < 0.5 * records[0].outer_loss
    main, helpful, harmful = records[-1].loss_weights
    assert helpful > main >= 0
    assert helpful > harmful >= 0
    assert all(0 <= record.residual < 1e-1 for record in records)
    assert task.score() > -0.5


def test_records_are_handed_over_as_they_are_made():
    seen = []
    _, records = _train(_equal_weights(), _config(outer_steps=3), on_outer_step=seen.append)
    assert seen == records
    assert records[0].loss_weights == (1.0, 1.0, 1.0)


def test_the_hypergradient_knows_the_weight_decay():
    # w* = (phi_1 - phi_2) / (sum phi + decay / 2): with phi = 1, d w* / d phi_1 = 1 / (3 + decay / 2) at w* = 0,
    # so the hypergradient in phi_1 is 2 (0 - 1) / (3 + decay / 2).
    combiner = _equal_weights()
    config = _config(outer_steps=1, weight_decay=2.0, outer_momentum=0.0, outer_lr=1.0)
    optimizer = torch.optim.SGD(combiner.parameters(), lr=1.0)
    outer = HyperOptimizer(optimizer, solver=Neumann(steps=400, step_size=0.05))
    _train(combiner, config, outer)
    assert combiner.phi[1].item() == pytest.approx(1 + 2 / (3 + 1), rel=1e-4)


def test_inner_steps_leave_no_gradient_in_the_combiner():
    combiner = _equal_weights()
    _train(combiner, _config(outer_steps=1))
    assert combiner.phi.grad is None


def test_a_diverging_run_says_so_and_what_to_try():
    with pytest.raises(FloatingPointError, match=r"training loss is (inf|nan) at outer step \d+: try a smaller"):
        _train(_equal_weights(), _config(inner_lr=10.0), start=1.0)


def test_mean_loss_weights_are_over_the_samples_that_have_the_loss():
    combiner = LinearCombiner(2)
    with torch.no_grad():
        combiner.phi.copy_(torch.tensor([2.0, 3.0]))
    batch = Batch(torch.rand(4, 2), torch.tensor([[1.0, 1], [0, 1], [0, 1], [0, 1]]))
    assert mean_loss_weights(combiner, batch) == pytest.approx((2.0, 3.0))
    assert mean_loss_weights(combiner, Batch(torch.rand(4, 2), None)) == pytest.approx((2.0, 3.0))


def test_mean_loss_weights_of_images_are_over_pixels():
    combiner = LinearCombiner(2)
    with torch.no_grad():
        combiner.phi.copy_(torch.tensor([2.0, 3.0]))
    mask = torch.ones(2, 2, 3, 4)
    mask[0, 0] = mask[1, 0, :2] = 0

    def combine(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return combiner((losses * mask).mean((2, 3)))

    assert mean_loss_weights(combine, Batch(torch.rand(2, 2, 3, 4), mask)) == pytest.approx((2.0, 3.0))


class OnePixelwiseWeight(OneWeight):
    """The same for every pixel of an image; the harmful loss is unknown in half of the pixels."""

    def training_batch(self, generator: torch.Generator) -> Batch:
        losses = super().training_batch(generator).losses[:, :, None, None].expand(1, 3, 6, 6)
        mask = torch.ones(1, 3, 6, 6)
        mask[:, 2, 3:] = 0
        return Batch(losses, mask)


def test_a_combiner_of_loss_images_learns_which_auxiliary_helps():
    torch.manual_seed(0)
    combiner = ConvCombiner(3, (4, 4), init_range=(0.1, 0.3))
    config = _config(outer_lr=0.05)
    task = OnePixelwiseWeight(0.0)
    outer = config.outer_optimizer(combiner)
    records = train(task, combiner, config, torch.Generator().manual_seed(0), outer=outer)
    assert records[-1].outer_loss < 0.5 * records[0].outer_loss
    _, helpful, harmful = records[-1].loss_weights
    assert helpful > 2 * harmful >= 0
    assert all(0 <= record.residual < 1e-1 for record in records)
    assert min(part.min() for name, part in combiner.layers().items() if "weight" in name) >= 0


def test_a_loss_that_nobody_has_has_no_weight():
    batch = Batch(torch.rand(4, 2), torch.tensor([[0.0, 1]]).expand(4, 2))
    assert mean_loss_weights(_combiner_of_two(), batch) == pytest.approx((0.0, 1.0))


def _combiner_of_two() -> LinearCombiner:
    combiner = LinearCombiner(2)
    nn.init.ones_(combiner.phi)
    return combiner
