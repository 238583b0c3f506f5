import pytest
import torch

from auxfast.experiments.paper.diabetes import EXPERIMENT, DiabetesOptions, findings, make_task

from .handmade import runs_of, unfinished

pytest.importorskip("sklearn")


def test_labels_are_what_their_names_say():
    task = make_task(2, DiabetesOptions(), hold_out=True)
    related = torch.corrcoef(torch.cat([task.target[:, None], task.labels], dim=1).T)[0, 1:]
    main, helpful, harmful, shuffled = related.tolist()
    assert 0.3 < main < 0.65  # 1 / sqrt(1 + 2^2), and a little for the labels given with care
    assert helpful > 0.8
    assert harmful < -0.8
    assert abs(shuffled) < 0.2
    torch.testing.assert_close(task.labels[task.auxiliary, 0], task.target[task.auxiliary])  # with care
    training = task.features[task.training]
    torch.testing.assert_close(training.mean(dim=0), torch.zeros(10), atol=1e-5, rtol=0)


def test_noise_is_that_of_the_options():
    task = make_task(0, DiabetesOptions(main_noise=0.0, other_noise=0.0), hold_out=True)
    torch.testing.assert_close(task.labels[:, 0], task.target)
    torch.testing.assert_close(task.labels[:, 1], task.target)
    torch.testing.assert_close(task.labels[:, 2], -task.target)


def test_parts_have_the_sizes_that_the_module_says():
    task = make_task(0, DiabetesOptions(), hold_out=True)
    assert [len(p) for p in (task.training, task.auxiliary, task.validation, task.test)] == [180, 20, 42, 200]


def test_the_score_is_the_explained_variance():
    task = make_task(0, DiabetesOptions(), hold_out=True)
    target = task.target[task.test]
    with torch.no_grad():
        task.model.bias[0] = target.mean()
    assert task.score() == pytest.approx(0, abs=1e-4)  # no better than the mean


def test_findings_say_whether_linear_wins_and_by_how_much():
    scores = {"linear": [40, 42, 44, 42, 42], "stl": [30, 31, 35, 32, 32], "equal": [40, 43, 44, 42, 42]}
    runs = [run for method, own in scores.items() for run in runs_of(method, own)]
    against_stl, against_equal, against_frozen = findings([*runs, *unfinished("linear-frozen")])
    assert against_stl.holds is True
    assert against_stl.text == (
        "Linear, learned scores above STL (main loss only): the difference is +10.0 +- 0.3, paired over 5 seeds."
    )
    assert against_equal.holds is False
    assert "the difference is -0.2 +- 0.2" in against_equal.text
    assert against_frozen.holds is None
    assert "not known" in against_frozen.text


def test_equal_has_the_weight_that_was_chosen_for_it():
    assert EXPERIMENT.config.weighting["equal"] == {"auxiliary_weight": 0.2}
