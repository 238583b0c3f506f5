"""What outer steps are warned of in their course, once each, with the remedy."""

from __future__ import annotations

import math
import random
import warnings

import pytest
import torch

import auxfast
from auxfast.implicit.watch import TEXTS, Watch
from auxfast.nn import LinearCombiner


@pytest.mark.parametrize(
    ("weights", "main", "seen"),
    [
        ([2.0, 0.01, 0.005], 0, ["vanished"]),  # together below a hundredth
        ([2.0, 0.01, 0.015], 0, []),
        ([0.0, 0.0, 1.0], 2, ["vanished"]),
        ([2.0, 0.0, 0.0], None, []),  # which one is the main loss is not known
        ([1.0], 0, []),
        ([], None, []),
    ],
)
def test_auxiliaries_that_have_all_lost_their_weight(weights, main, seen):
    watch = Watch()
    assert watch.observe(1.0, weights, main) == []  # they may start without weight
    watch.observe(1.0, [1.0] * len(weights), main)
    assert watch.observe(1.0, weights, main) == seen


def test_weights_that_have_grown_tenfold():
    watch = Watch()
    assert [watch.observe(1.0, [0.5 * growth, 0.5], 0) for growth in (1, 3, 18.9, 19.1, 30)] == [
        [],
        [],
        [],
        ["grown"],
        [],
    ]


@pytest.mark.parametrize(
    ("course", "seen"),
    [
        (lambda step: 2 - 0.02 * step, False),
        (lambda step: 1 + 0.01 * step, True),
        (lambda step: 0.3 + math.exp(-step / 5), False),
        (lambda step: abs(step - 30) / 30 + 1, True),
        (lambda step: 5.0 if step == 59 else 4.0, False),
        (lambda step: -2 + 0.01 * step, True),
        (lambda step: 1 + 0.04 * (-1) ** step, False),
    ],
)
def test_an_outer_loss_that_has_been_rising(course, seen):
    watch = Watch()
    for step in range(60):
        watch.observe(course(step), [1.0, 1.0], 0)
    assert (watch.noticed == ["outer loss rising"]) is seen


@pytest.mark.parametrize("drift", [0.0, 0.01])
def test_an_outer_loss_that_is_noise_alone_has_not_been_rising_however_long_it_goes_on(drift):
    told = 0
    for seed in range(20):
        noise, watch = random.Random(seed), Watch()
        for step in range(1000 if drift == 0 else 200):
            watch.observe(noise.gauss(1 + drift * step, 0.3), [1.0, 1.0], 0)
        told += watch.noticed == ["outer loss rising"]
    assert told <= 1 if drift == 0 else told == 20


def optimizer_of(combiner, **options):
    optimizer = torch.optim.SGD(combiner.parameters(), lr=1e-6)
    return auxfast.HyperOptimizer(optimizer, project=[combiner], solver=auxfast.solvers.Identity(), **options)


def step_with(outer, combiner, weights, outer_loss=1.0):
    w = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        combiner.phi.copy_(torch.tensor(weights))
    outer.step(outer_loss * w.square().sum(), combiner((w - 1).square()[None] + 0.1 * w), [w])


@pytest.mark.parametrize("warn", [True, False])
def test_each_is_told_once_with_its_remedy(warn):
    combiner = LinearCombiner(2, main=0)
    outer = optimizer_of(combiner, warn=warn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for weights in ([0.1, 0.5], [1.0, 1e-9], [1.0, 1e-9], [50.0, 50.0], [50.0, 50.0]):
            step_with(outer, combiner, weights)
    told = [str(warning.message) for warning in caught if "weights of" in str(warning.message)]
    assert told == ([TEXTS["vanished"], TEXTS["grown"]] if warn else [])
    assert outer.watch.noticed == ["vanished", "grown"]


def test_a_resumed_optimizer_remembers_what_it_has_seen():
    combiner = LinearCombiner(2, main=0)
    outer, resumed = optimizer_of(combiner), optimizer_of(combiner)
    step_with(outer, combiner, [1.0, 1.0])
    with pytest.warns(RuntimeWarning, match="below 1%"):
        step_with(outer, combiner, [1.0, 1e-9])
    resumed.load_state_dict(outer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_with(resumed, combiner, [1.0, 1e-9])
    assert vars(resumed.watch)["noticed"] == ["vanished"]


def test_auxiliaries_that_a_batch_lacks_have_not_lost_their_weight():
    combiner, w = LinearCombiner(2, main=0), torch.ones(2, requires_grad=True)
    outer = optimizer_of(combiner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mask in ([1.0, 1.0], [1.0, 0.0], [0.0, 1.0]):
            losses = (w - 1).square()[None] + 0.1 * w
            outer.step(w.square().sum(), combiner(losses, torch.tensor([mask])), [w])
    assert outer.watch.noticed == []


def test_growth_in_the_first_step_is_seen():
    combiner, w = LinearCombiner(2), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD(combiner.parameters(), lr=1e3)
    identity = auxfast.solvers.Identity()
    outer = auxfast.HyperOptimizer(optimizer, project=[combiner], solver=identity, max_weight_change=None)
    with pytest.warns(RuntimeWarning, match="grown tenfold"):
        outer.step((w - 2).square().sum(), combiner((w - 3).square()[None]), [w])
