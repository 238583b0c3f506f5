import warnings

import pytest
import torch

from auxfast.experiments.data import (
    allocate_auxiliary,
    draw_batch,
    draw_per_class,
    split,
    standardise,
    warn_if_auxiliary_set_is_large,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_parts_are_disjoint_and_of_the_sizes_asked_for():
    indices = torch.arange(100, 200)
    parts = split(indices, (10, 50, 0, 30), _generator())
    assert [len(part) for part in parts] == [10, 50, 0, 30]
    together = torch.cat(parts)
    assert len(together.unique()) == 90
    assert torch.isin(together, indices).all()


def test_the_same_seed_draws_the_same_parts_and_another_seed_others():
    first, again, other = (split(torch.arange(50), (20, 30), _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_parts_of_unequal_classes_are_stratified_to_one_or_two_samples():
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([200, 100, 60, 40]))
    shares = torch.tensor([0.5, 0.25, 0.15, 0.1])
    for seed in range(5):
        for part in split(torch.arange(400), (40, 100, 60), _generator(seed), labels):
            counts = torch.bincount(labels[part], minlength=4)
            assert (counts - len(part) * shares).abs().max() <= 2


def test_equal_classes_are_stratified_exactly():
    labels = torch.arange(10).repeat(10)
    small, large = split(torch.arange(100), (10, 90), _generator(), labels)
    assert torch.bincount(labels[small]).tolist() == [1] * 10
    assert torch.bincount(labels[large]).tolist() == [9] * 10


@pytest.mark.parametrize("sizes", [(5, 6), (-1, 5)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=r"sizes: got .*add up to at most 10"):
        split(torch.arange(10), sizes, _generator())


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"labels: got shape \(9,\), must be \(10,\)"):
        split(torch.arange(10), (5,), _generator(), torch.zeros(9, dtype=torch.int64))


def test_draw_per_class_draws_so_many_of_each_and_returns_the_others():
    labels = torch.tensor([0, 1, 2] * 20)
    drawn, others = draw_per_class(labels, 4, _generator())
    assert torch.bincount(labels[drawn]).tolist() == [4, 4, 4]
    assert torch.equal(torch.cat([drawn, others]).sort().values, torch.arange(60))


def test_draw_per_class_names_the_class_that_is_too_small():
    with pytest.raises(ValueError, match="count: got 3, but class 7 has only 2 samples"):
        draw_per_class(torch.tensor([5, 5, 5, 7, 7]), 3, _generator())
    with pytest.raises(ValueError, match="count: got -1, must be 1 or more"):
        draw_per_class(torch.tensor([5, 5, 5, 7, 7]), -1, _generator())


def test_a_large_auxiliary_set_is_warned_of_and_a_small_one_is_not():
    with pytest.warns(UserWarning, match=r"30 of 100 main labels \(30%\)"):
        warn_if_auxiliary_set_is_large(30, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_auxiliary_set_is_large(10, 100)


def test_standardise_uses_the_training_rows_only():
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [1000.0, 7.0]])
    scaled = standardise(values, torch.tensor([0, 1]))
    deviation = 2**0.5  # of 1 and 3, with n - 1
    expected = torch.tensor([[-1 / deviation, 0.0], [1 / deviation, 0.0], [998 / deviation, 2.0]])
    torch.testing.assert_close(scaled, expected)  # the second column is constant in training: only shifted


def test_the_auxiliary_set_is_allocated_from_the_labelled_samples_and_stratified():
    labelled, labels = torch.arange(300, 500), torch.arange(10).repeat(20)
    training, auxiliary = allocate_auxiliary(labelled, 20, _generator(), labels)
    assert torch.equal(torch.cat([training, auxiliary]).sort().values, labelled)
    assert torch.bincount(labels[auxiliary - 300]).tolist() == [2] * 10
    assert torch.bincount(labels[training - 300]).tolist() == [18] * 10


def test_without_holding_out_the_auxiliary_samples_are_trained_on_too_and_no_size_is_warned_of():
    held = allocate_auxiliary(torch.arange(100), 10, _generator())
    training, auxiliary = allocate_auxiliary(torch.arange(100), 10, _generator(), hold_out=False)
    assert torch.equal(auxiliary, held[1])
    assert torch.equal(training, torch.cat(held))
    allocate_auxiliary(torch.arange(100), 50, _generator(), hold_out=False)
    with pytest.warns(UserWarning, match=r"50 of 100 main labels \(50%\)"):
        allocate_auxiliary(torch.arange(100), 50, _generator())


@pytest.mark.parametrize("count", [0, -1, 10, 11])
def test_an_auxiliary_set_of_nothing_or_of_everything_is_refused(count):
    with pytest.raises(ValueError, match=f"count: got {count}, must be from 1 to 9"):
        allocate_auxiliary(torch.arange(10), count, _generator())


def test_a_batch_repeats_nothing_and_is_everything_if_there_is_not_enough():
    indices = torch.arange(100, 120)
    batch = draw_batch(indices, 8, _generator())
    assert len(batch.unique()) == 8
    assert torch.isin(batch, indices).all()
    assert torch.equal(draw_batch(indices, 30, _generator()).sort().values, indices)
