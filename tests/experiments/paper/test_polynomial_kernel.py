from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from auxfast.experiments.base import train_run
from auxfast.experiments.paper.polynomial_kernel import (
    EXPERIMENT,
    PolynomialKernelOptions,
    draw,
    findings,
    make_task,
    monomial_names,
    monomial_weights,
)
from auxfast.train.methods import parse_method
from auxfast.train.serialization import to_table

from .handmade import runs_of, unfinished

pytest.importorskip("sklearn")


def _task(hold_out=True):
    return make_task(0, PolynomialKernelOptions(), hold_out=hold_out)


def _run(phi, weights, seed=0):
    records = [SimpleNamespace(phi=p, loss_weights=w) for p, w in zip(phi, weights, strict=True)]
    same = {"method": parse_method("polynomial"), "setting": "", "config": to_table(EXPERIMENT.config)}
    return SimpleNamespace(**same, seed=seed, records=records, result=SimpleNamespace(score=90.0 + seed))


def test_parts_are_disjoint_and_stratified():
    task, spent = _task(), _task(hold_out=False)
    together = torch.cat([task.training, task.auxiliary, task.validation, task.test])
    assert len(together.unique()) == len(together) == 90 + 10 + 200 + 600
    assert torch.bincount(task.labels[task.auxiliary]).tolist() == [1] * 10
    assert torch.bincount(task.labels[task.training]).tolist() == [9] * 10
    assert (torch.bincount(task.labels[task.test]) - 60).abs().max() <= 5
    assert torch.equal(spent.training, torch.cat([task.training, task.auxiliary]))


def test_losses_are_those_of_digit_attributes_and_picture():
    task = _task()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    rows = task.training[torch.randperm(90, generator=torch.Generator().manual_seed(0))[:64]]
    digits, attributes, pictures = task.model(task.images[rows])
    assert mask is None
    torch.testing.assert_close(losses[:, 0], F.cross_entropy(digits, task.labels[rows], reduction="none"))
    chance = torch.where(task.attributes[rows] == 1, attributes.sigmoid(), 1 - attributes.sigmoid())
    torch.testing.assert_close(losses[:, 1], -chance.log().mean(dim=1))
    error = ((pictures - task.images[rows]) ** 2).mean(dim=1)
    assert (losses[:, 2] / error).std() < 1e-3  # one constant: what it is
    assert losses[:, 2].mean() > error.mean()  # over a variance below 1


def test_outer_loss_and_score_are_the_digits_alone():
    task = _task()
    with torch.no_grad():
        task.model.layers[2].weight[10:] = torch.nan
        task.model.layers[2].weight[:10] = 0
        task.model.layers[2].bias[:10] = F.one_hot(torch.tensor(7), 10).float()
    assert torch.isfinite(task.outer_loss())
    assert task.score() == pytest.approx(100 * (task.labels[task.test] == 7).double().mean().item())


def test_monomials_are_named_in_phis_order_and_the_skip_is_counted():
    names = monomial_names(2)
    assert names[:4] == ["digit", "attributes", "picture", "digit^2"]
    assert names[4:] == ["digit · attributes", "digit · picture", "attributes^2", "attributes · picture", "picture^2"]
    assert monomial_names(3)[-1] == "picture^3"
    weights = monomial_weights(_run([(0.5,) + (0.1,) * 8], [(1, 1, 1)]))
    assert weights[0, :2].tolist() == pytest.approx([1.5, 0.1])


def test_findings_name_the_largest_terms_and_mains_growth():
    phi = (0.2, 0.1, 0.1, 0.0, 0.9, 0.0, 0.0, 0.0, 0.3)
    runs = [_run([phi, phi], [(1, 1, 2), (2, 1, 1 + 0.05 * seed)], seed) for seed in range(5)]
    largest, growth, *rest = findings([*runs, *runs_of("linear", [80, 80, 81, 80, 81]), *unfinished("polynomial")])
    assert largest.holds is True
    assert "2 of digit (1.20), digit · attributes (0.90), picture^2 (0.30)" in largest.text
    assert growth.holds is True
    assert "from 25% to 49%" in growth.text
    assert [finding.holds for finding in rest] == [None, True, None]


def test_findings_of_weights_that_stay_do_not_hold():
    start = (0.0, 0.5, 0.5) + (0.0,) * 6
    runs = [_run([start, start], [(1, 0.5, 0.5)] * 2, seed) for seed in range(5)]
    assert [finding.holds for finding in findings(runs)[:2]] == [False, False]
    assert findings(runs[:4])[1].holds is None
    assert findings(runs_of("stl", [1.0])) == []


def test_a_short_run_moves_products_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    short = {"train.outer_steps": 3, "train.inner_steps": 3}
    run = train_run(EXPERIMENT, "", parse_method("polynomial"), 0, tmp_path, overrides=short)
    weights = monomial_weights(run)
    assert weights[0].tolist() == [1, 0.5, 0.5] + [0] * 6
    assert weights[-1, 3:].max() > 0
    draw(tmp_path / "none.png", unfinished("polynomial"))
    assert not (tmp_path / "none.png").exists()
    draw(tmp_path / "some.png", [run])
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
