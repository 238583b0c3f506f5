"""NYUv2, and what it shares with all tasks of scenes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from auxfast.experiments.base import run_config, train_run
from auxfast.experiments.data.scenes import UNKNOWN
from auxfast.experiments.paper.nyuv2 import EXPERIMENT, NYUv2Options, draw, make_task
from auxfast.experiments.paper.scenes import METHODS, make_scene_task, segmentation_loss
from auxfast.train.methods import parse_method
from auxfast.train.training_loss import make_training_loss
from experiments.data.fixtures_scenes import write_nyuv2

CLASSES = 13
SMALL = {"widths": (4, 4, 4, 4, 4), "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_nyuv2(tmp_path_factory.mktemp("nyuv2"), train=12, val=2, height=32, width=32))


def _task(folder, seed=0, hold_out=True, **options):
    return make_task(seed, NYUv2Options(folder, **SMALL, **options), hold_out=hold_out)


class Predictions(nn.Module):
    """The same predictions of 13 classes, a depth and a normal for every image; each a parameter."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), nn.Identity()
        generator = torch.Generator().manual_seed(0)
        self.maps = nn.ParameterList(torch.randn(1, size, 32, 32, generator=generator) for size in (CLASSES, 1, 3))

    def forward(self, images):
        return tuple(values.expand(len(images), -1, -1, -1) for values in self.maps)


@pytest.fixture
def by_hand(folder):
    """A task whose predictions are known, and the first of its training scenes."""
    task = _task(folder)
    task.model = Predictions()
    return task, task.training[:1]


def test_losses_are_a_cross_entropy_an_absolute_error_and_one_minus_a_cosine(by_hand):
    task, row = by_hand
    losses, mask = task.losses(row)
    assert losses.shape == mask.shape == (1, 3, 32, 32)
    logits, depth, normal = (values[0] for values in task.model.maps)
    targets = task.read(row, torch.tensor([False])).targets
    i, j = torch.nonzero(mask[0].all(dim=0))[5].tolist()
    label = int(targets[0][0, i, j])
    assert losses[0, 0, i, j].item() == pytest.approx((logits[:, i, j].logsumexp(0) - logits[label, i, j]).item())
    assert losses[0, 1, i, j].item() == pytest.approx(abs(depth[0, i, j] - targets[1][0, 0, i, j]).item())
    true = targets[2][0, :, i, j]
    cosine = (normal[:, i, j] @ true / normal[:, i, j].norm() / true.norm()).item()
    assert losses[0, 2, i, j].item() == pytest.approx(1 - cosine, abs=1e-5)


@pytest.mark.parametrize("method", ["equal", "linear", "conv"])
def test_pixels_without_a_target_have_no_loss_and_no_gradient(by_hand, method):
    task, row = by_hand
    batch = task.losses(row)
    targets = task.read(row, torch.tensor([False])).targets
    known = [targets[0] != UNKNOWN, targets[1][:, 0] != 0, targets[1][:, 0] != 0]
    make_training_loss(parse_method(method), run_config(EXPERIMENT, ""), task)(*batch).backward()
    for j, (own, predicted) in enumerate(zip(known, task.model.maps, strict=True)):
        assert torch.equal(batch.mask[:, j].bool(), own)
        assert 0 < own.float().mean() < 1
        assert (batch.losses[:, j][~own] == 0).all()
        has_gradient = (predicted.grad != 0).any(dim=1)
        assert not has_gradient[~own].any()
        assert has_gradient[own].float().mean() > 0.9


def test_a_mirrored_scene_is_the_scene_seen_in_a_mirror(folder):
    task = _task(folder)
    rows = task.training[:2]
    plain, other = task.read(rows, torch.tensor([False, False])), task.read(rows, torch.tensor([True, False]))
    labels, depths, normals = other.targets
    assert torch.equal(other.images[0], plain.images[0].flip(-1))
    assert torch.equal(labels[0], plain.targets[0][0].flip(-1))
    assert torch.equal(depths[0], plain.targets[1][0].flip(-1))
    assert torch.equal(normals[0], plain.targets[2][0].flip(-1) * torch.tensor([-1, 1, 1])[:, None, None])
    assert torch.equal(other.known[0], plain.known[0].flip(-1))
    assert torch.equal(other.images[1], plain.images[1])
    assert torch.equal(normals[1], plain.targets[2][1])


def test_only_with_mirror_are_training_scenes_mirrored_and_the_batches_are_otherwise_the_same(folder):
    seen = {}
    for mirror in (False, True):
        task, calls = _task(folder, mirror=mirror), []
        task.read = lambda rows, mirrored, read=task.read, calls=calls: (
            calls.append((rows.tolist(), mirrored.tolist())) or read(rows, mirrored)
        )
        task.model = Predictions()
        for batch in range(3):
            task.training_batch(torch.Generator().manual_seed(batch))
        seen[mirror] = calls
    assert [rows for rows, _ in seen[False]] == [rows for rows, _ in seen[True]]
    assert not any(any(mirrored) for _, mirrored in seen[False])
    flips = [flip for _, mirrored in seen[True] for flip in mirrored]
    assert {True, False} == set(flips)


def test_scores_are_those_of_a_slow_loop(folder):
    task = _task(folder)
    scenes = task.read(task.test, torch.zeros(2, dtype=torch.bool))
    task.model.eval()
    with torch.no_grad():
        predicted = task.model(scenes.images)[0].argmax(dim=1)
    task.model.train()
    labels, of_images, hits = scenes.targets[0], [], [0, 0]
    pixels = [[0, 0] for _ in range(CLASSES)]
    for guess, truth in zip(predicted, labels, strict=True):
        ratios = []
        for c in range(CLASSES):
            both = ((guess == c) & (truth == c)).sum().item()
            either = ((guess == c) | (truth == c)).sum().item()  # unknown pixels too, as in the paper's code
            ratios += [both / either] if either else []
            pixels[c][0] += both
            pixels[c][1] += (((guess == c) | (truth == c)) & (truth != UNKNOWN)).sum().item()
        of_images.append(100 * sum(ratios) / len(ratios))
        hits[0] += (guess == truth).sum().item()
        hits[1] += (truth != UNKNOWN).sum().item()
    assert task.score() == pytest.approx(sum(of_images) / 2)
    whole = [both / either for both, either in pixels if either]
    assert task.further_scores() == {
        "mIoU of all pixels, %": pytest.approx(100 * sum(whole) / len(whole)),
        "pixel accuracy, %": pytest.approx(100 * hits[0] / hits[1]),
    }
    assert task.model.training


def test_the_heads_are_not_among_the_shared_parameters(folder):
    task = _task(folder)
    shared = {id(parameter) for parameter in task.shared_parameters()}
    heads = {id(parameter) for parameter in task.model.heads.parameters()}
    assert shared | heads == {id(parameter) for parameter in task.model.parameters()}
    assert not shared & heads


def test_the_split_of_the_official_scenes_is_the_papers():
    sizes, parts = [], []
    for hold_out in (True, False):
        task = make_scene_task(
            3,
            NYUv2Options(**SMALL),
            training=torch.arange(795),
            test=torch.arange(795, 1449),
            read=None,
            pixel_losses=[segmentation_loss(2)],
            loss_names=("segmentation",),
            hold_out=hold_out,
        )
        parts = [task.training, task.auxiliary, task.validation, task.test]
        sizes.append([len(part) for part in parts])
        assert len(torch.cat(parts).unique()) == 1449
    assert sizes == [[699, 17, 79, 654], [716, 17, 79, 654]]
    train = EXPERIMENT.config.train
    assert train.outer_steps * train.inner_steps == 200 * math.ceil(699 / 8)
    assert train.inner_scheduler.options["step_size"] == 100 * math.ceil(699 / 8)


def test_methods_are_those_of_table_2_and_their_controls():
    families = {parse_method(name).family for name in METHODS}
    assert families == {
        *("stl", "equal", "uncertainty", "dwa", "gradnorm", "mgda", "gcs"),
        *("linear", "deep-linear", "nonlinear", "conv"),
    }


def test_a_missing_copy_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*task.folder=PATH.*auxfast data check nyuv2 PATH"):
        make_task(0, NYUv2Options(str(tmp_path / "nowhere")), hold_out=True)


@pytest.mark.parametrize("change", [{"auxiliary": 0.6}, {"batch_size": 0}])
def test_options_out_of_range_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}: got"):
        NYUv2Options(**change)


@pytest.mark.slow
def test_two_epochs_train_end_to_end_and_give_the_picture_of_figure_3(folder, tmp_path):
    pytest.importorskip("matplotlib")
    changes = {f"task.{name}": value for name, value in SMALL.items()}
    changes |= {"task.folder": folder, "train.outer_steps": 2, "train.inner_steps": 3}
    runs = []
    for method in ("gradnorm", "nonlinear", "conv"):
        run = train_run(EXPERIMENT, "", parse_method(method), 0, tmp_path, overrides=changes)
        assert run.losses == EXPERIMENT.loss_names
        assert 0 <= run.result.score <= 100
        assert set(run.result.further_scores) == {"mIoU of all pixels, %", "pixel accuracy, %"}
        runs.append(run)
    draw(tmp_path / "figure3.png", runs)
    assert (tmp_path / "figure3.png").read_bytes().startswith(b"\x89PNG")
