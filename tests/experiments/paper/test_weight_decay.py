import pytest
import torch

from auxfast import hypergradient
from auxfast.experiments.base import train_run
from auxfast.experiments.paper.weight_decay import (
    EXPERIMENT,
    SEX,
    WeightDecayOptions,
    decays,
    draw,
    findings,
    grouped_features,
    make_task,
)
from auxfast.nn import LinearCombiner
from auxfast.solvers import Dense
from auxfast.train.methods import parse_method
from auxfast.train.serialization import to_table

from .handmade import runs_of, unfinished

pytest.importorskip("sklearn")
SIZES = [10, 9, 45, 64]


def _task(hold_out=True, **options):
    return make_task(0, WeightDecayOptions(**options), hold_out=hold_out)


def _runs(weights, scores):
    runs = runs_of("linear", scores, weights=weights)
    for run in runs:
        run.config = to_table(EXPERIMENT.config)
    return runs


def test_groups_are_measurements_squares_products_and_a_strangers():
    measured = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    strangers = torch.tensor([3, 1, 4, 0, 5, 2, 6])
    own, squares, products, other = grouped_features(measured, strangers)
    assert [group.shape[1] for group in (own, squares, products, other)] == SIZES
    columns = [column for column in range(10) if column != SEX]
    torch.testing.assert_close(squares, measured[:, columns] ** 2)
    pairs = [measured[:, i] * measured[:, j] for i in range(10) for j in range(i + 1, 10)]
    torch.testing.assert_close(products, torch.stack(pairs, dim=1))
    torch.testing.assert_close(other, torch.cat([own, squares, products], dim=1)[strangers])


def test_parts_are_disjoint_and_features_standardised_by_the_training_part():
    task, spent = _task(), _task(hold_out=False)
    together = torch.cat([task.training, task.auxiliary, task.validation, task.test])
    assert len(together.unique()) == len(together) == 442
    assert [len(p) for p in (task.training, task.auxiliary, task.validation, task.test)] == [180, 20, 42, 200]
    assert len(spent.training) == 200
    training = task.features[task.training]
    torch.testing.assert_close(training.mean(dim=0), torch.zeros(128), atol=1e-5, rtol=0)
    torch.testing.assert_close(training.std(dim=0), torch.ones(128), atol=1e-4, rtol=0)


def test_the_penalties_are_losses_that_all_patients_share():
    task = _task()
    values = torch.repeat_interleave(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor(SIZES))
    torch.nn.utils.vector_to_parameters(values, task.model.parameters())
    losses, mask = task.training_batch(torch.Generator())
    assert mask is None
    assert losses.shape == (180, 5)
    assert losses[0, 1:].tolist() == [5, 18, 202.5, 0]
    assert (losses[:, 1:] == losses[0, 1:]).all()
    expected = (task.features @ values - task.target)[task.training].square()
    torch.testing.assert_close(losses[:, 0], expected, rtol=1e-4, atol=1e-3)


def test_the_hypergradient_in_the_decays_is_ridge_regressions():
    task = _task()
    task.features, task.target = task.features.double(), task.target.double()
    task.model.double()
    decay = torch.tensor([0.2, 1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)

    def minimum():
        features, target = task.features[task.training], task.target[task.training]
        penalty = torch.diag(torch.repeat_interleave(decay, torch.tensor(SIZES)))
        scale = 2 / len(features)
        return torch.linalg.solve(scale * features.T @ features + penalty, scale * features.T @ target)

    error = task.features[task.auxiliary] @ minimum() - task.target[task.auxiliary]
    (expected,) = torch.autograd.grad(error.square().mean(), decay)

    combiner = LinearCombiner(5, main=0).double()
    with torch.no_grad():
        combiner.phi.copy_(torch.cat([torch.zeros(1), decay.detach()]))
        torch.nn.utils.vector_to_parameters(minimum(), task.model.parameters())
    inner_loss = combiner(task.training_batch(torch.Generator()).losses)
    result = hypergradient(
        task.outer_loss(), inner_loss, task.model.parameters(), combiner.parameters(), solver=Dense()
    )
    torch.testing.assert_close(result.grads[0][1:], expected, rtol=1e-8, atol=1e-12)
    assert expected.abs().min() > 1e-4


def test_decays_are_relative_to_the_errors_weight():
    (run,) = _runs([(2.0, 1.0, 2.0, 3.0, 4.0)], [1.0])
    assert decays(run).tolist() == [[0.5, 1.0, 1.5, 2.0]]


def test_findings_compare_scores_and_look_at_the_measurements():
    one, other = [(1, 1, 1, 1, 1), (1, 0.2, 1, 2, 3)], [(2, 0.8, 0.6, 7, 4.9)]
    good = [*_runs(one, [40] * 3), *_runs(other, [42] * 6)[3:]]
    *scores, smallest = findings([*good, *runs_of("equal", [38] * 3 + [39.9] * 3), *unfinished("stl")])
    assert [finding.holds for finding in scores] == [None, True, None]
    assert smallest.holds is True
    assert "the mean decays are measured 0.30, squares 0.65" in smallest.text
    assert "smallest of all with 3 of 6 seeds" in smallest.text
    assert findings(_runs([(1, 1, 1, 1, 1)], [40] * 5))[-1].holds is False
    assert findings(_runs([(1, 1, 2, 2, 2)], [40]))[-1].holds is None


def test_a_short_run_learns_decays_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    short = {"train.outer_steps": 3, "train.inner_steps": 10}
    run = train_run(EXPERIMENT, "", parse_method("linear"), 0, tmp_path, overrides=short)
    assert decays(run)[0].tolist() == [1.5] * 4
    assert (decays(run)[-1] != 1.5).all()
    draw(tmp_path / "none.png", unfinished("linear"))
    assert not (tmp_path / "none.png").exists()
    draw(tmp_path / "some.png", [run, *runs_of("stl", [-20.0])])
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
