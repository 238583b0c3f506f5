import math

import pytest
import torch

from auxfast.experiments.base import train_run
from auxfast.experiments.paper.noisy_auxiliaries import (
    AUXILIARIES,
    EXPERIMENT,
    NoisyAuxiliariesOptions,
    draw,
    findings,
    make_task,
    noise_deviations,
    rank_correlation,
    ranks,
)
from auxfast.train.methods import parse_method
from auxfast.train.serialization import to_table

from .handmade import runs_of, unfinished


def _task(hold_out=True, **options):
    return make_task(0, NoisyAuxiliariesOptions(**options), hold_out=hold_out)


def _runs(*weights):
    runs = []
    for seed, auxiliaries in enumerate(weights):
        (run,) = runs_of("linear", [0.0], weights=[(1.0, *auxiliaries)])
        run.seed, run.config = seed, to_table(EXPERIMENT.config)
        runs.append(run)
    return runs


def test_auxiliary_noise_is_positive_and_its_variance_grows_with_the_task():
    options = NoisyAuxiliariesOptions(labelled=20_000, auxiliary=2000)
    task = make_task(0, options, hold_out=True)
    noise = task.labels - task.target[:, None]
    assert (noise[:, 1:] >= -1e-5).all()
    expected = 0.25 * torch.arange(1.0, AUXILIARIES + 1).sqrt()
    torch.testing.assert_close(noise_deviations(options), expected)
    torch.testing.assert_close(noise[:, 1:].square().mean(dim=0).sqrt(), expected, rtol=0.05, atol=0)
    assert noise[:, 0].mean().item() == pytest.approx(0, abs=0.03)


def test_parts_are_disjoint_and_of_the_sizes_that_the_module_says():
    task, spent = _task(), _task(hold_out=False)
    together = torch.cat([task.training, task.auxiliary, task.validation, task.test])
    assert len(together.unique()) == len(together)
    assert [len(p) for p in (task.training, task.auxiliary, task.validation, task.test)] == [900, 100, 200, 1000]
    assert len(spent.training) == 1000
    assert torch.equal(spent.labels, task.labels)


def test_losses_are_squared_errors_of_every_task():
    task = _task()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    rows = task.training[torch.randperm(900, generator=torch.Generator().manual_seed(0))[:256]]
    assert mask is None
    torch.testing.assert_close(losses, task.labels[rows].square())  # the model starts at 0
    assert task.outer_loss().item() == pytest.approx(task.labels[task.auxiliary, 0].square().mean().item())
    assert task.score() <= 1


def test_ties_share_their_mean_rank():
    values = torch.tensor([3.0, 1.0, 3.0, 0.0, 3.0])
    assert ranks(values).tolist() == [4, 2, 4, 1, 4]


def test_rank_correlation_is_spearmans():
    rising = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(rising, rising.exp()) == pytest.approx(1)
    assert rank_correlation(rising, -(rising**3)) == pytest.approx(-1)
    # By hand, ranks 1 2 3 4 and 1.5 1.5 3 4: covariance 4.5, sums of squares 5 and 4.5.
    assert rank_correlation(rising, torch.tensor([0.0, 0.0, 1.0, 2.0])) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert math.isnan(rank_correlation(rising, torch.zeros(4)))


def test_the_finding_is_of_the_worst_seed():
    falling = torch.linspace(1, 0, AUXILIARIES).tolist()
    rising = falling[::-1]
    (good,) = findings([*_runs(falling, falling), *unfinished("linear"), *runs_of("stl", [1.0])])
    assert good.holds is True
    assert "-1.000 on average and -1.000 at worst over 2 seeds" in good.text
    assert "On average 1 weights are 0" in good.text
    (bad,) = findings(_runs(falling, rising))
    assert bad.holds is False
    assert "1.000 at worst" in bad.text
    assert findings(runs_of("stl", [1.0])) == []


def test_a_few_outer_steps_already_order_the_weights(tmp_path):
    pytest.importorskip("matplotlib")
    run = train_run(EXPERIMENT, "", parse_method("linear"), 0, tmp_path, overrides={"train.outer_steps": 3})
    (finding,) = findings([run])
    assert finding.holds is True
    draw(tmp_path / "none.png", unfinished("linear"))
    assert not (tmp_path / "none.png").exists()
    draw(tmp_path / "some.png", [run])
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
