"""What all experiments on real data have in common."""

from dataclasses import fields, replace
from importlib.util import find_spec

import pytest
import torch

from auxfast.experiments.base import run_config, train_run
from auxfast.experiments.paper import deep_supervision, diabetes, digits, missing_labels, sensitivity, stereo
from auxfast.train.methods import COMBINER_LABELS, WEIGHTING_LABELS, parse_method

pytest.importorskip("sklearn")

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        diabetes.EXPERIMENT,
        digits.EXPERIMENT,
        stereo.EXPERIMENT,
        sensitivity.SIZE,
        sensitivity.DEPTH,
        missing_labels.EXPERIMENT,
        deep_supervision.EXPERIMENT,
    )
}
OF_SAMPLES = [name for name in (*WEIGHTING_LABELS, *COMBINER_LABELS) if name != "conv"]
SHORT = {"train.outer_steps": 2, "train.inner_steps": 2}
# Some settings take large sets on purpose; the warning has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:the auxiliary set takes:UserWarning")


needs_skimage = pytest.mark.skipif(find_spec("skimage") is None, reason="needs scikit-image")


def _case(name, *others):
    return pytest.param(name, *others, marks=[needs_skimage] if name == "stereo" else [])


@pytest.fixture
def experiment(request):
    return EXPERIMENTS[request.param]


each_experiment = pytest.mark.parametrize("experiment", [_case(name) for name in EXPERIMENTS], indirect=True)
each_default_method = pytest.mark.parametrize(
    ("experiment", "method"),
    [_case(name, method) for name, experiment in EXPERIMENTS.items() for method in experiment.methods],
    indirect=["experiment"],
)


def _task(experiment, seed, setting=None, hold_out=True):
    config = run_config(experiment, next(iter(experiment.settings)) if setting is None else setting)
    return experiment.make_task(seed, config.task, hold_out=hold_out)


def _parts(task):
    unlabelled = getattr(task, "unlabelled", torch.tensor([], dtype=torch.int64))
    return task.training, unlabelled, task.auxiliary, task.validation, task.test


@each_experiment
def test_with_the_auxiliary_set_held_out_all_parts_are_disjoint_and_none_is_empty(experiment):
    for setting in experiment.settings:
        task = _task(experiment, 3, setting)
        together = torch.cat(_parts(task))
        assert len(together.unique()) == len(together)
        for part in (task.training, task.auxiliary, task.validation, task.test):
            assert len(part) > 0


@each_experiment
def test_without_an_auxiliary_set_its_samples_are_trained_on_and_the_rest_is_the_same(experiment):
    held, spent = _task(experiment, 3), _task(experiment, 3, hold_out=False)
    assert torch.equal(spent.training, torch.cat([held.training, held.auxiliary]))
    assert torch.equal(spent.validation, held.validation)
    assert torch.equal(spent.test, held.test)
    assert len(held.auxiliary) <= 0.1 * len(spent.training)
    for one, other in zip(spent.model.parameters(), held.model.parameters(), strict=True):
        assert torch.equal(one, other)


@each_experiment
def test_a_task_depends_on_its_seed_and_nothing_else(experiment):
    first = _task(experiment, 0)
    torch.rand(5)
    again, other = _task(experiment, 0), _task(experiment, 1)
    for field in fields(first):
        value = getattr(first, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again, field.name), value)
    assert not torch.equal(other.training, first.training)
    for one, same in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, same)


@each_experiment
def test_losses_are_as_named_and_scores_are_percentages(experiment):
    task = _task(experiment, 0)
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert task.loss_names == experiment.loss_names
    assert losses.shape[1] == len(task.loss_names)
    assert mask is None or mask.shape == losses.shape
    assert (losses >= 0).all()
    assert task.outer_loss().shape == ()
    assert task.score() <= 100
    assert task.validation_score() <= 100


@each_experiment
def test_scores_are_of_the_part_that_their_name_says(experiment):
    task = _task(experiment, 0)
    score, validation_score = task.score(), task.validation_score()
    task.test, task.validation = task.validation, task.test
    assert (task.score(), task.validation_score()) == (validation_score, score)


@each_default_method
def test_every_method_of_every_experiment_trains(experiment, method, tmp_path):
    setting = list(experiment.settings)[-1]
    run = train_run(experiment, setting, parse_method(method), 0, tmp_path, overrides=SHORT)
    assert run.result.score <= 100
    assert len(run.records) == 2
    assert all(weight >= 0 for weight in run.records[-1].loss_weights)
    assert (run.records[-1].residual is not None) == parse_method(method).learned


@pytest.mark.parametrize("method", [*OF_SAMPLES, "linear-free", "nonlinear-free-frozen"])
@pytest.mark.parametrize("experiment", ["diabetes", "digits"], indirect=True)
def test_weightings_and_combiners_all_run_on_samples(experiment, method, tmp_path):
    run = train_run(experiment, "", parse_method(method), 0, tmp_path, overrides=SHORT)
    assert run.result.score <= 100
    assert len(run.records[-1].loss_weights) == len(experiment.loss_names)


@each_experiment
def test_settings_differ(experiment):
    configs = [repr(run_config(experiment, setting)) for setting in experiment.settings]
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (diabetes.DiabetesOptions(), {"labelled": 201}, "labelled: got 201, must be from 3 to 200"),
        (diabetes.DiabetesOptions(), {"auxiliary": 0}, "auxiliary: got 0, must be from 1 to 198"),
        (diabetes.DiabetesOptions(), {"auxiliary": 199}, "auxiliary: got 199, must be from 1 to 198"),
        (diabetes.DiabetesOptions(), {"main_noise": -1.0}, "main_noise: got -1.0, must be from 0 to"),
        (diabetes.DiabetesOptions(), {"other_noise": float("nan")}, "other_noise: got nan, must be from 0 to"),
        (digits.DigitsOptions(), {"shots": 1}, "shots: got 1, must be from 2 to 100"),
        (digits.DigitsOptions(), {"auxiliary_shots": 10}, "auxiliary_shots: got 10, must be from 1 to 9"),
        (digits.DigitsOptions(), {"unlabelled": 1008}, "unlabelled: got 1008, must be from 0 to 1007"),
        (digits.DigitsOptions(), {"unknown_attributes": 1.1}, "unknown_attributes: got 1.1, must be from 0 to 1"),
        (stereo.StereoOptions(), {"labelled": 91}, "labelled: got 91, must be from 2 to 90"),
        (stereo.StereoOptions(), {"auxiliary": 40}, "auxiliary: got 40, must be from 1 to 39"),
        (stereo.StereoOptions(), {"unlabelled": 51}, "unlabelled: got 51, must be from 0 to 50"),
        (deep_supervision.DeepSupervisionOptions(), {"shots": 81}, "shots: got 81, must be from 2 to 80"),
        (
            deep_supervision.DeepSupervisionOptions(),
            {"auxiliary_shots": 0},
            "auxiliary_shots: got 0, must be from 1 to 19",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(options, **changes)


@pytest.mark.parametrize(
    ("experiment", "options"),
    [
        ("diabetes", diabetes.DiabetesOptions(labelled=3, auxiliary=1)),
        ("digits", digits.DigitsOptions(shots=100, auxiliary_shots=1, unlabelled=107)),
        ("digits", digits.DigitsOptions(shots=2, unlabelled=0)),
        ("deep-supervision", deep_supervision.DeepSupervisionOptions(shots=80)),
    ],
    indirect=["experiment"],
)
def test_options_at_the_ends_of_their_ranges_make_tasks(experiment, options):
    task = experiment.make_task(0, options, hold_out=True)
    together = torch.cat(_parts(task))
    assert len(together.unique()) == len(together)
    assert torch.isfinite(task.training_batch(torch.Generator().manual_seed(0)).losses).all()
