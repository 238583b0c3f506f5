"""Does the hypergradient of learned labels point where retraining goes? On `digits-labels`.

    python -m benchmarks.learning.label_directions [--seeds 5] [--share 0.05]

prints one table: what happens to the outer loss if a teacher's weights are moved and the student is trained from its
start on the labels that result, and what solvers say of that. The teacher is the one that the first seed draws, before
it has learned; moves are along eight random directions. Seeds are from 1000 on, on which settings are chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import auxfast
from auxfast.experiments.paper.digits_labels import EXPERIMENT, make_task
from auxfast.nn import LabelGenerator
from auxfast.solvers import MINRES, Identity
from auxfast.train import Trainer, make_training_loss, parse_method

FIRST_SEED = 1000
SOLVERS = {
    "identity": Identity(),
    "MINRES, 10, damping 0.1": MINRES(steps=10, damping=0.1, tol=None),
    "MINRES, 50": MINRES(steps=50, tol=None),
}


def training_of(teacher: LabelGenerator) -> Callable[[int], tuple[Any, Any, list[Tensor]]]:
    """`train` of `verify_against_retraining`: the student's training on the labels of this teacher."""
    config = EXPERIMENT.config
    frozen = parse_method("auxilearn-labels-frozen")

    def train(seed: int) -> tuple[Any, Any, list[Tensor]]:
        task = make_task(seed, config.task, hold_out=True)
        task.label_generator = teacher
        loss = make_training_loss(frozen, config, task)
        # A cool-down would train on the auxiliary set.
        trainer = Trainer(task, loss, replace(config.train, cooldown=0.0), seed)
        trainer.run()
        # The curvature is that of all training samples: that of one batch is as noisy as it is small.
        task = replace(task, batch_size=len(task.training))

        def inner_loss() -> Tensor:
            value: Tensor = loss(*task.training_batch(torch.Generator().manual_seed(seed)))
            return value

        return task.outer_loss, inner_loss, trainer.parameters

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument(
        "--share", type=float, default=0.05, help="part of its size by which each weight is moved (0.05)"
    )
    arguments = parser.parse_args()
    teacher = make_task(FIRST_SEED, EXPERIMENT.config.task, hold_out=True).label_generator
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    report = auxfast.verify_against_retraining(
        training_of(teacher), teacher.parameters(), seeds=seeds, solver=SOLVERS, share=arguments.share
    )
    print(report)


if __name__ == "__main__":
    main()
