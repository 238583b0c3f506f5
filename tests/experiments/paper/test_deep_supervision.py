import pytest
import torch
import torch.nn.functional as F

from auxfast.experiments.paper.deep_supervision import (
    EXPERIMENT,
    KAIMING,
    SMALL,
    DeepSupervisionOptions,
    StagedNet,
    draw,
    findings,
    make_task,
)

from .handmade import runs_of, unfinished

pytest.importorskip("sklearn")


def _task(**options):
    return make_task(0, DeepSupervisionOptions(**options), hold_out=True)


def test_the_main_loss_is_the_final_heads_and_the_others_follow_from_the_front():
    task = _task()
    losses, mask = task.training_batch(torch.Generator().manual_seed(0))
    assert mask is None
    rows = task.training[torch.randperm(len(task.training), generator=torch.Generator().manual_seed(0))[:64]]
    features, expected = task.images[rows], []
    for stage, head in zip(task.model.stages, task.model.heads, strict=True):
        features = stage(features)
        expected.append(F.cross_entropy(head(features), task.labels[rows], reduction="none"))
    torch.testing.assert_close(losses, torch.stack([expected[2], expected[0], expected[1]], dim=1))


def test_an_inner_heads_loss_does_not_reach_later_layers():
    task = _task()
    losses, _ = task.training_batch(torch.Generator().manual_seed(0))
    losses[:, 1].mean().backward()
    reached = [bool(stage[0].weight.grad.any()) for stage in task.model.stages]
    assert reached == [True, False, False]


def test_outer_loss_and_score_are_the_final_heads():
    task = _task()
    with torch.no_grad():
        for head in list(task.model.heads)[:-1]:
            head.weight.fill_(torch.nan)
        assert torch.isfinite(task.outer_loss())
        task.model.heads[-1].weight.zero_()
        task.model.heads[-1].bias.copy_(F.one_hot(torch.tensor(3), 10).float())
    share = (task.labels[task.test] == 3).double().mean().item()
    assert task.score() == pytest.approx(100 * share)


def test_signals_vanish_with_small_initial_weights_and_not_with_kaimings():
    images = torch.rand(200, 64, generator=torch.Generator().manual_seed(0))
    spread = {}
    for kaiming in (False, True):
        torch.manual_seed(0)
        net = StagedNet(64, kaiming=kaiming)
        with torch.no_grad():
            spread[kaiming] = torch.nn.Sequential(*net.stages)(images).std(dim=0).mean().item()
    assert spread[False] < 1e-3 < 0.02 < spread[True]


def test_findings_are_of_each_setting():
    weights = [(1.0, 0.3, 0.3), (2.0, 0.5, 0.3)]
    runs = [
        *runs_of("stl", [10, 10.5, 11, 10, 10], SMALL),
        *runs_of("equal", [87, 88, 87, 88, 87], SMALL),
        *runs_of("linear", [87.4, 87.5, 87.4, 87.5, 87.4], SMALL, weights),
        *runs_of("equal", [89, 90], KAIMING),
    ]
    found = findings(runs)
    assert len(found) == 10
    assert found[0].holds is True
    assert found[0].text.startswith(f"{SMALL}: Equal (one common weight) scores above STL")
    assert found[1].holds is False
    assert found[4].holds is True
    assert "from 0.3 times the final head's weight to 0.2 +- 0.0 times" in found[4].text
    assert "from 1, 0.3 and 0.3 to 2.00, 0.50 and 0.30, over 5 seeds" in found[4].text
    assert {finding.holds for finding in found[5:]} == {None}


@pytest.mark.parametrize(
    ("ends", "holds"), [((0.1, 0.4), False), ((0.4, 0.41), False), ((0.28, 0.281), True), ((0.28,), None)]
)
def test_heads_are_turned_down_if_that_is_beyond_noise(ends, holds):
    runs = [runs_of("linear", [0.0] * 6, SMALL, [(1.0, end, end)])[seed] for seed, end in enumerate(ends * 3)]
    assert findings(runs)[4].holds is holds


def test_the_picture_shows_what_was_learned_and_needs_something(tmp_path):
    pytest.importorskip("matplotlib")
    weights = [(1.0, 0.3, 0.3), (1.1, 0.2, 0.4)]
    draw(tmp_path / "none.png", [*runs_of("stl", [1.0], SMALL), *unfinished("linear", SMALL)])
    assert not (tmp_path / "none.png").exists()
    draw(tmp_path / "some.png", runs_of("linear", [1.0, 2.0], KAIMING, weights))
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


def test_equal_and_the_frozen_combiners_have_googlenets_weight():
    assert EXPERIMENT.config.weighting["equal"]["auxiliary_weight"] == EXPERIMENT.config.combiner.initial_weight == 0.3
