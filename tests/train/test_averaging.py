"""Several processes that share a run make the steps of one."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn

from auxfast.solvers import MINRES, Neumann
from auxfast.train import (
    WHOLE,
    Batch,
    CombinerConfig,
    Component,
    LabelsConfig,
    Part,
    RunConfig,
    RunError,
    Trainer,
    make_training_loss,
    parse_method,
    record_run,
)
from auxfast.train.recording import reproducible
from train.problems import Shared, SharedLabels, noisy_plan, train_config, without_seconds

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

ADAM = Component("Adam", {"lr": 0.02})
CASES: dict[str, dict[str, Any]] = {
    "stl": {},
    "equal": {"max_inner_grad_norm": 0.1},
    "uncertainty": {"inner_optimizer": ADAM},
    "dwa": {},
    "gradnorm": {},
    "gcs": {},
    "mgda": {"inner_scheduler": Component("OneCycleLR", {"max_lr": 0.1, "total_steps": 100})},
    "linear": {"solver": MINRES(steps=5, damping=0.1), "outer_optimizer": ADAM, "weight_decay": 0.1},
    "nonlinear": {"patience": 2},
    "polynomial": {"outer_set": "training", "cooldown": 0.3},
    "nonlinear-frozen": {},
    "own": {"outer_optimizer": ADAM},
    "auxilearn-labels": {},
    "maxl": {"warmup": 0.3},
    "maxl-f": {},
}


def trained(
    group: Any, method: str, changes: dict[str, Any], make_task: Callable[[], Any] | None = None, state: Any = None
) -> tuple[list[Any], dict[str, Any]]:
    """Records and state of a short run in float64, from the state that is given on."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        parsed = parse_method(method)
        settings = {"outer_steps": 4, "inner_steps": 3, "solver": Neumann(steps=3, step_size=0.05), **changes}
        config = RunConfig(
            train_config(**settings),
            CombinerConfig(hidden=(4,), skip=True, positive="clip"),
            {"dwa": {"period": 2}},
            labels=LabelsConfig(combiner="nonlinear", lr=0.02, outer_entropy_weight=0.5),
        )
        with reproducible(0, config.train):
            task = (make_task or (SharedLabels if parsed.labels else Shared))()
            loss = make_training_loss(parsed, config, task)
            trainer = Trainer(task, loss, config.train, 0, group)
            if state is not None:
                trainer.load_state_dict(*deepcopy(state))  # processes get the memory of one tensor
            return without_seconds(trainer.run()), trainer.state_dict()
    finally:
        torch.set_default_dtype(dtype)


def of_rank(rank: int, *args: Any) -> tuple[list[Any], dict[str, Any]]:
    return trained(distributed.group.WORLD, *args)


def assert_same(one: tuple[list[Any], dict[str, Any]], other: tuple[list[Any], dict[str, Any]]) -> None:
    for record, expected in zip(*(run[0] for run in (one, other)), strict=True):
        for name, value in record._asdict().items():
            other_value = getattr(expected, name)
            assert (value is None) == (other_value is None), name
            assert value is None or value == pytest.approx(other_value, rel=1e-7, abs=1e-10), name
    for part in ("model", "training_loss"):
        torch.testing.assert_close(one[1][part], other[1][part], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", CASES)
def test_ranks_make_the_steps_of_one_process(method):
    whole = trained(None, method, CASES[method])
    runs = on_ranks(of_rank, method, CASES[method])
    for run in runs:
        assert_same(run, whole)
    torch.testing.assert_close(runs[0][1]["model"], runs[1][1]["model"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradnorm", "nonlinear", "maxl"])
def test_three_ranks_do_too(method):
    assert_same(on_ranks(of_rank, method, CASES[method], size=3)[1], trained(None, method, CASES[method]))


@pytest.mark.parametrize("method", ["nonlinear", "auxilearn-labels"])
def test_a_run_goes_on_with_another_number_of_ranks(method):
    whole, short = trained(None, method, {}), {"outer_steps": 2}
    of_one, of_two = trained(None, method, short), on_ranks(of_rank, method, short)[0]
    assert_same(on_ranks(of_rank, method, {}, None, (of_one[1], of_one[0]))[1], whole)
    assert_same(trained(None, method, {}, None, (of_two[1], of_two[0])), whole)


class NormalisedShared(Shared):
    """The same with BatchNorm and dropout, for which parts are not the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))


def test_statistics_of_batch_norm_and_random_states_stay_the_same_on_all_ranks():
    (records, first), (others, second) = on_ranks(of_rank, "linear", {}, NormalisedShared)
    assert records == others
    for part in ("model", "random"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    assert first["model"]["1.num_batches_tracked"] == 12
    assert first["model"]["1.running_mean"].any()


def error_of_rank(rank: int, function: Callable[..., Any], *args: Any) -> str:
    """The error that all ranks raise alike: their group is still of use."""
    with pytest.raises((TypeError, ValueError, RuntimeError, RunError)) as error:
        function(rank, *args)
    return str(error.value)


class Unaware(Shared):
    def training_batch(self, generator: torch.Generator) -> Batch:
        return super().training_batch(generator)


class DrawsParts(Shared):
    """It takes its part before all is drawn."""

    def training_batch(self, generator: torch.Generator, part: Part = WHOLE) -> Batch:
        batch = super().training_batch(generator, part)
        noise = torch.randn(batch.losses.shape, generator=generator)
        return batch._replace(losses=batch.losses + noise)


class OtherSamples(Shared):
    """Every process draws a split of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.training = torch.arange(20, 59 + distributed.get_rank())


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Unaware, r"task\.training_batch: Unaware's takes no argument part"),
        (DrawsParts, r"ranks 0 and 1 have drawn different numbers by outer step 0.*draw everything .* for the whole"),
        (OtherSamples, r"task must be the same on all ranks"),
    ],
)
def test_tasks_that_do_not_share_their_batches_are_refused_on_all_ranks(task, message):
    for text in on_ranks(error_of_rank, of_rank, "equal", {}, task):
        assert re.search(message, text), text


def recorded(rank: int, out: Any, changes: dict[str, Any]) -> Any:
    return record_run(shared_plan(out, **changes), process_group=distributed.group.WORLD)


def shared_plan(out, **changes):
    plan = noisy_plan(out, "linear", **changes)
    return type(plan)(**{**vars(plan), "make_task": Shared})


def test_the_first_rank_writes_the_folder_of_one_process(tmp_path):
    one = record_run(shared_plan(tmp_path / "one"))
    first, second = on_ranks(recorded, tmp_path / "two", {})
    assert first == second
    assert first.environment["processes"] == {"number": 2, "writer": "rank 0", "backend": "gloo"}
    names = [{path.name for path in made.path.iterdir()} for made in (one, first)]
    assert names[0] == names[1]
    assert first.result.score == pytest.approx(one.result.score, rel=1e-4)
    for record, expected in zip(first.records, one.records, strict=True):
        assert record.training_loss == pytest.approx(expected.training_loss, rel=1e-4)


def test_an_error_of_the_first_rank_is_that_of_all(tmp_path):
    record_run(shared_plan(tmp_path))
    assert all("holds a run already" in text for text in on_ranks(error_of_rank, recorded, tmp_path, {}))
