"""The part of a task that most experiments share."""

import pytest
import torch

from auxfast.experiments.paper.diabetes import DiabetesOptions, make_task


@pytest.mark.parametrize("hold_out", [True, False])
def test_a_released_auxiliary_set_is_trained_on_once(hold_out):
    task = make_task(0, DiabetesOptions(), hold_out=hold_out)
    auxiliary, everyone = task.auxiliary.clone(), make_task(0, DiabetesOptions(), hold_out=False).training
    for _ in range(2):
        task.release_auxiliary()
    assert torch.equal(task.training.sort().values, everyone.sort().values)
    assert torch.equal(task.auxiliary, auxiliary)
    assert task.training_batch(torch.Generator()).losses.shape == (len(everyone), 4)


def test_a_task_says_the_samples_of_its_parts_which_do_not_overlap():
    parts = make_task(0, DiabetesOptions(), hold_out=True).split_indices()
    assert list(parts) == ["training", "unlabelled", "auxiliary", "validation", "test"]
    samples = torch.cat(list(parts.values()))
    assert len(samples.unique()) == len(samples)
