"""The time of one hypergradient on an experiment's own problem, on the kernels and on the reference."""

from __future__ import annotations

import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from auxfast import hypergradient, reference_kernels
from auxfast.experiments.base import Experiment
from auxfast.train.methods import parse_method
from auxfast.train.recording import reproducible
from auxfast.train.training_loss import CombinedLoss, make_training_loss

WARM_UP = 3  # rounds that are not timed: they load code and allocate
REPEATS = 40  # rounds that are timed, each of one hypergradient on the kernels and one on the reference


def time_hypergradient(experiment: Experiment) -> dict[str, Any]:
    """Median time of one hypergradient of the last method's combiner, from the losses to the gradient in phi.

    The kernels and the reference take turns, so that whatever else the machine does hits both.
    """
    method, config = parse_method(experiment.methods[-1]), experiment.config
    task = experiment.make_task(0, config.task, hold_out=True)
    generator = torch.Generator().manual_seed(0)
    milliseconds: dict[str, list[float]] = {"native": [], "reference": []}
    with reproducible(0, config.train):
        training_loss = make_training_loss(method, config, task)
        assert isinstance(training_loss, CombinedLoss)
        for repeat in range(-WARM_UP, REPEATS):
            for name, kernels in (("native", nullcontext), ("reference", reference_kernels)):
                with kernels():
                    start = time.perf_counter()
                    inner_loss = training_loss(*task.training_batch(generator))
                    hypergradient(
                        task.outer_loss(),
                        inner_loss,
                        task.model.parameters(),
                        training_loss.parameters(),
                        solver=config.train.solver,
                        warn=False,  # training does not warn either
                    )
                    if repeat >= 0:
                        milliseconds[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: round(median(values), 3) for name, values in milliseconds.items()}
    batch = task.training_batch(generator).losses
    return {
        "experiment": experiment.name,
        "losses": list(batch.shape),
        "solver": repr(config.train.solver),
        "repeats": REPEATS,
        "milliseconds": medians,
        "ratio": round(medians["reference"] / medians["native"], 3),
    }


def describe_timing(timing: dict[str, Any]) -> str:
    """Sentence that tells the times, also where the kernels do not win."""
    native, reference = timing["milliseconds"]["native"], timing["milliseconds"]["reference"]
    outcome = f"{timing['ratio']:.2f} times faster" if timing["ratio"] > 1 else "NOT faster"
    shape = ", ".join(map(str, timing["losses"]))
    return (
        f"One hypergradient ({timing['experiment']}, losses ({shape}), {timing['solver']}, one "
        f"thread, median of {timing['repeats']}):\n  native {native:.2f} ms, reference {reference:.2f} ms: "
        f"{outcome} on the kernels, the model's own derivatives included"
    )
