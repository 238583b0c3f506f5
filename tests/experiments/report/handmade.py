"""Runs of a small experiment, made by hand."""

from pathlib import Path

from auxfast.train import OuterRecord, Run, RunResult, parse_method
from auxfast.train.serialization import to_table


def record(learned=True, outer_seconds=0.0, **changes):
    made = OuterRecord(
        step=0,
        training_loss=1.0,
        main_loss=1.0,
        outer_loss=1.0 if learned else None,
        validation_score=1.0,
        residual=None,
        matvecs=3 if learned else None,
        loss_weights=(1.0, 1.0, 1.0),
        phi=None,
        inner_seconds=0.5,
        outer_seconds=outer_seconds / 2,
    )
    return made._replace(**changes)


def run_of(experiment, method, seed, score, *, setting="", outer_seconds=0.0, config=None, further_scores=None):
    result = RunResult(
        score=score,
        validation_score=score,
        outer_steps=2,
        stopped_early=False,
        inner_seconds=1.0,
        outer_seconds=outer_seconds,
        seconds=1.5,
        further_scores=further_scores or {},
    )
    return Run(
        path=Path(f"runs/{method}/seed-{seed}"),
        experiment=experiment.name,
        setting=setting,
        method=parse_method(method),
        seed=seed,
        config=to_table(config or experiment.config),
        records=[record(parse_method(method).learned, outer_seconds)] * 2,
        result=None if score is None else result,
        environment={},
    )


def runs_of(experiment, scores, **others):
    return [run_of(experiment, m, seed, score, **others) for m, own in scores.items() for seed, score in enumerate(own)]
