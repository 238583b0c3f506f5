"""Pretext tasks of clouds of points, against what they should do by hand."""

from __future__ import annotations

import pytest
import torch

from auxfast.experiments.paper.point_clouds import (
    DAE,
    DEFREC,
    PRETEXTS,
    RS,
    VOXELS,
    chamfer_losses,
    normalised,
    sample,
    voxel_centres,
    voxels,
)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def clouds():
    """(3, 3, 200), in the unit ball."""
    return torch.stack([normalised(torch.randn(200, 3, generator=_generator(k))).T for k in range(3)])


def test_normalised_points_have_mean_0_and_touch_the_unit_ball(clouds):
    torch.testing.assert_close(clouds.mean(dim=2), torch.zeros(3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(clouds.norm(dim=1).amax(dim=1), torch.ones(3))


def test_points_are_drawn_without_repetition_as_far_as_there_are_so_many():
    assert len(sample(30, 50, _generator()).unique()) == 30
    assert sample(7, 3, _generator()).bincount().tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
    assert torch.equal(sample(3, 3, _generator()).sort().values, torch.arange(3))


def test_voxels_cut_the_cube_in_three_along_each_axis():
    points = torch.tensor([[-0.9, -0.9, -0.9], [0, 0, 0], [0.9, -0.9, 0], [1, 1, 1], [-1, -1, 0.34]])
    assert voxels(points.T[None]).tolist() == [[0, 13, 2 * 9 + 1, 26, 2]]
    assert torch.equal(voxels(voxel_centres()[None])[0], torch.arange(VOXELS))
    torch.testing.assert_close(voxel_centres()[:, 1], torch.tensor([-2 / 3, -2 / 3, 0]))


def test_the_chamfer_distance_is_that_of_a_slow_loop_over_the_region(clouds):
    predicted = torch.randn(3, 3, 200, generator=_generator(9))
    region = torch.rand(3, 200, generator=_generator(8)) < 0.2
    losses = chamfer_losses(predicted, clouds, region)
    assert losses.shape == (3, 200)
    assert (losses[~region] == 0).all()
    for loss, guess, truth, own in zip(losses, predicted, clouds, region, strict=True):
        guess, truth = guess.T[own].tolist(), truth.T[own].tolist()

        def nearest(point, others):
            return min(sum((a - b) ** 2 for a, b in zip(point, other, strict=True)) for other in others)

        there = sum(nearest(point, truth) for point in guess) / len(guess)
        back = sum(nearest(point, guess) for point in truth) / len(truth)
        assert loss.mean().item() == pytest.approx(there + back, rel=1e-5)


def test_the_chamfer_distance_is_0_for_the_same_points_in_another_order_and_has_derivatives(clouds):
    region = torch.ones(3, 200, dtype=torch.bool)
    order = torch.randperm(200, generator=_generator())
    assert (chamfer_losses(clouds[:, :, order], clouds, region) == 0).all()
    few = clouds[:1, :, :6].double()
    predicted = torch.randn(1, 3, 6, generator=_generator(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda p: chamfer_losses(p, few, region[:1, :6]), [predicted])


def test_denoising_sees_noise_of_variance_a_hundredth_and_rebuilds_all_points(clouds):
    corrupted = DAE.corrupt(clouds, _generator())
    assert (corrupted.points - clouds).var().item() == pytest.approx(0.01, rel=0.1)
    assert corrupted.target.all()
    assert (DAE.loss(clouds, clouds, corrupted.target) == 0).all()
    torch.testing.assert_close(
        DAE.loss(corrupted.points, clouds, corrupted.target),
        20 * chamfer_losses(corrupted.points, clouds, corrupted.target),
    )


def test_a_deformed_region_is_one_voxel_whose_points_lie_around_its_centre(clouds):
    corrupted = DEFREC.corrupt(clouds, _generator())
    of_point = voxels(clouds)
    for cloud, seen, region, own in zip(clouds, corrupted.points, corrupted.target, of_point, strict=True):
        (voxel,) = own[region].unique().tolist()
        assert torch.equal(region, own == voxel)
        assert region.sum() >= 200 / VOXELS
        assert torch.equal(seen[:, ~region], cloud[:, ~region])
        away = (seen[:, region] - voxel_centres()[:, voxel, None]).norm(dim=0)
        assert 0 < away.mean() < 0.1
    assert (DEFREC.loss(clouds, clouds, corrupted.target) == 0).all()


def test_each_large_voxel_may_be_the_deformed_one(clouds):
    chosen = {int(voxels(clouds)[0][DEFREC.corrupt(clouds, _generator(seed)).target[0]][0]) for seed in range(100)}
    counts = voxels(clouds)[0].bincount(minlength=VOXELS)
    assert chosen == set(torch.nonzero(counts >= 200 / VOXELS).flatten().tolist())


def test_shuffled_voxels_are_moved_as_a_whole_and_the_target_is_where_they_were(clouds):
    corrupted = RS.corrupt(clouds, _generator())
    assert torch.equal(corrupted.target, voxels(clouds))
    centres = voxel_centres()
    for cloud, seen, own in zip(clouds, corrupted.points, corrupted.target, strict=True):
        moves = seen - cloud
        places = []
        for voxel in own.unique():
            move = moves[:, own == voxel]
            torch.testing.assert_close(move, move[:, :1].expand_as(move), atol=1e-5, rtol=0)
            places.append((centres - (centres[:, voxel] + move[:, 0])[:, None]).norm(dim=0).argmin().item())
        assert len(set(places)) == len(places) > 3
        assert moves.norm(dim=0).max() > 0.5
    logits = torch.nn.functional.one_hot(corrupted.target, VOXELS).mT * 50.0
    assert RS.loss(logits, clouds, corrupted.target).max() < 1e-5


@pytest.mark.parametrize("name", PRETEXTS)
def test_a_corruption_depends_on_its_generator_and_leaves_the_true_points(clouds, name):
    before = clouds.clone()
    first, again, other = (PRETEXTS[name].corrupt(clouds, _generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.points, again.points)
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.points, other.points)
    assert torch.equal(clouds, before)
