import pytest
import torch

from auxfast.experiments.base import train_run
from auxfast.experiments.paper.stereo import BATCH, EXPERIMENT, TILE, UNKNOWN, StereoOptions, draw, findings, make_task
from auxfast.train.methods import parse_method

from .handmade import runs_of, unfinished

pytest.importorskip("skimage")


def _task(seed=1, **options):
    return make_task(seed, StereoOptions(**options), hold_out=True)


def test_tiles_without_labels_and_pixels_without_disparity_are_masked():
    task = _task()
    assert (task.labels[task.unlabelled] == UNKNOWN).all()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert losses.shape == mask.shape == (2 * BATCH, 2, TILE, TILE)
    assert not mask[BATCH:, 0].any()
    assert mask[:BATCH, 0].float().mean() > 0.5
    assert 0.8 < mask[:, 1].float().mean() < 1
    seen = torch.cat([task.training, task.unlabelled])
    known = task.disparity[seen][task.valid[seen]]
    torch.testing.assert_close(torch.stack([known.mean(), known.std()]), torch.tensor([0.0, 1.0]), atol=1e-4, rtol=0)


def test_all_tiles_of_the_photograph_are_used():
    task = _task()
    sizes = [len(p) for p in (task.training, task.auxiliary, task.unlabelled, task.validation, task.test)]
    assert sizes == [36, 4, 50, 12, 48]
    assert len(task.images) == sum(sizes)


def test_the_score_is_the_mean_intersection_over_union():
    task = _task()
    labels = task.labels[task.test]
    known = labels != UNKNOWN
    with torch.no_grad():
        for parameter in task.model[-1].parameters():
            parameter.zero_()
        task.model[-1].bias[0] = 1.0  # every pixel is grey
    share = (labels[known] == 0).float().mean().item()
    assert task.score() == pytest.approx(100 * share / 3, rel=1e-5)


def test_the_picture_is_of_the_learned_combiner_and_needs_one(tmp_path):
    pytest.importorskip("matplotlib")
    changes = {"train.outer_steps": 1, "train.inner_steps": 1}
    runs = [train_run(EXPERIMENT, "", parse_method(name), 0, tmp_path, overrides=changes) for name in ("stl", "conv")]
    draw(tmp_path / "none.png", [runs[0], *unfinished("conv")])
    assert not (tmp_path / "none.png").exists()
    draw(tmp_path / "one.png", runs)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_findings_compare_the_convolutional_combiner():
    against_stl, against_equal, against_frozen = findings([*runs_of("conv", [36] * 5), *runs_of("stl", [38] * 5)])
    assert against_stl.holds is False
    assert "the difference is -2.0 +- 0.0" in against_stl.text
    assert against_equal.holds is against_frozen.holds is None
