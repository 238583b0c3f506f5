from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from auxfast.experiments.base import restore, train_run
from auxfast.experiments.paper.illustrative import (
    EXPERIMENT,
    HARMFUL_WEIGHTS,
    MAIN_WEIGHTS,
    TRAINING_SET,
    IllustrativeOptions,
    distance,
    draw,
    findings,
    make_task,
    path_of_weights,
    shares,
    weights_of,
)
from auxfast.train.methods import parse_method
from auxfast.train.run import read_config
from auxfast.train.serialization import to_table

from .handmade import runs_of, unfinished

SHORT = {"train.outer_steps": 3, "train.inner_steps": 4}


def _task(hold_out=True, **options):
    return make_task(0, IllustrativeOptions(**options), hold_out=hold_out)


def _runs(weights, setting="", seeds=1):
    runs = runs_of("linear", [0.0] * seeds, setting, weights)
    for run in runs:
        run.config = to_table(EXPERIMENT.config)
    return runs


def test_labels_have_the_noise_and_the_truth_of_their_task():
    task = _task(labelled=20_000, auxiliary=2000, main_noise=4.0, other_noise=0.5, careful_noise=1.0)
    truth = torch.tensor([MAIN_WEIGHTS, MAIN_WEIGHTS, HARMFUL_WEIGHTS])
    noise = task.labels - task.features @ truth.T
    torch.testing.assert_close(noise[task.training].std(dim=0), torch.tensor([4.0, 0.5, 0.5]), rtol=0.05, atol=0)
    assert noise[task.auxiliary, 0].std().item() == pytest.approx(1.0, rel=0.1)


def test_parts_are_disjoint_and_of_the_sizes_that_the_module_says():
    task, spent = _task(), _task(hold_out=False)
    together = torch.cat([task.training, task.auxiliary, task.validation])
    assert len(together.unique()) == len(together)
    assert [len(part) for part in (task.training, task.auxiliary, task.validation)] == [180, 20, 100]
    assert torch.equal(spent.training, torch.cat([task.training, task.auxiliary]))
    assert torch.equal(spent.labels, task.labels)


def test_a_noise_below_zero_is_refused_by_name():
    with pytest.raises(ValueError, match="main_noise: got -1"):
        IllustrativeOptions(main_noise=-1.0)


def test_the_landscape_is_that_of_the_weighted_training_loss():
    task, weights = _task(), (0.5, 2.0, 1.5)
    minimum, curvature = task.landscape(weights)
    w = torch.tensor([0.3, -0.8])

    def loss(at):
        with torch.no_grad():
            task.model.weight.copy_(at)
            losses, _ = task.training_batch(torch.Generator())
        return torch.dot(losses.mean(dim=0), torch.tensor(weights)).item() / sum(weights)

    offset = w.double() - minimum
    assert loss(w) - loss(minimum) == pytest.approx((offset @ curvature @ offset).item(), rel=1e-3)


def test_the_score_is_the_distance_to_the_truth():
    task = _task()
    with torch.no_grad():
        task.model.weight.copy_(torch.tensor([[4.0, 5.0]]))  # 3 and 4 from w*
    assert task.score() == pytest.approx(-500)
    assert distance(torch.tensor(MAIN_WEIGHTS)) == 0


def test_shares_are_of_all_weights():
    (run,) = _runs([(1, 1, 2), (3, 1, 0)])
    torch.testing.assert_close(shares(run), torch.tensor([[0.25, 0.25, 0.5], [0.75, 0.25, 0.0]], dtype=torch.float64))


def test_findings_hold_where_the_weights_say_so():
    good = [*_runs([(1, 1, 1), (0.2, 4, 0)], seeds=3), *_runs([(1, 1, 1), (4, 0.1, 0)], TRAINING_SET, seeds=3)]
    vanishes, nearer, reduces = findings([*good, *unfinished("linear")])
    assert [vanishes.holds, nearer.holds, reduces.holds] == [True, True, True]
    assert "to 0.0% on average" in vanishes.text
    assert "with 3 of 3 seeds" in nearer.text
    assert "mean share of 98%" in reduces.text


def test_findings_do_not_hold_where_the_weights_stay():
    stay = [(1, 1, 1)] * 2
    found = findings([*_runs(stay, seeds=2), *_runs(stay, TRAINING_SET, seeds=2)])
    assert [finding.holds for finding in found] == [False, False, False]
    assert "33.3% at most; below 5% with 0 of 2 seeds" in found[0].text
    assert "with 0 of 2 seeds" in found[1].text
    assert findings(runs_of("stl", [0.0])) == []


def test_a_run_trains_and_its_recorded_weights_are_what_the_model_saw(tmp_path):
    run = train_run(EXPERIMENT, "", parse_method("linear"), 0, tmp_path, overrides=SHORT)
    assert run.records[0].loss_weights == pytest.approx((1, 1, 1))
    assert run.records[-1].loss_weights[2] < 1
    config = read_config(EXPERIMENT.config, run)
    path = path_of_weights(run, make_task(0, config.task, hold_out=True), config.train)
    assert path.shape == (3 * 4 + 1, 2)
    trained, _ = restore(EXPERIMENT, run)
    torch.testing.assert_close(path[-1], weights_of(trained.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("both", [False, True])
def test_the_picture_needs_a_run_with_the_auxiliary_set(tmp_path, both):
    pytest.importorskip("matplotlib")
    weights = [(1.0, 1.0, 1.0), (1.0, 2.0, 0.1)]
    short = replace(EXPERIMENT.config, train=replace(EXPERIMENT.config.train, inner_steps=2))
    runs = [*_runs(weights, seeds=2), *(_runs(weights, TRAINING_SET) if both else [])]
    draw(tmp_path / "none.png", [SimpleNamespace(**{**vars(run), "setting": TRAINING_SET}) for run in runs])
    assert not (tmp_path / "none.png").exists()
    for run in runs:
        run.config = to_table(short)
    draw(tmp_path / "some.png", runs)
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
