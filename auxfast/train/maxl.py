"""The outer step of MAXL, a baseline: the generator is judged after one look-ahead step of the student on its labels.

Liu, Davison and Johns 2019, "Self-Supervised Generalisation with Meta Auxiliary Learning": on a training batch the
generator descends

    main(W - lr * d inner / dW (W, phi)) + entropy_weight * sum_k y_k log y_k,      y = mean of the batch's labels

where main and inner loss are those of the same batch: no samples are held out, which is why the entropy term has to
keep the labels from collapsing. The inner loss has the student's weight decay in it, and the labels are those of the
samples (points) that have the main loss. The derivative of the look-ahead is exact, second order included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from auxfast.autograd.preserved_state import preserved_state
from auxfast.implicit import HyperOptimizer
from auxfast.solvers import OneStep
from auxfast.train.averaging import factor_of_part
from auxfast.train.task import LabelBatch
from auxfast.train.training_loss import GeneratedLabelsLoss, factor_of_main, known_main_losses, with_decay


def maxl_step(
    draw: Callable[[torch.Generator], LabelBatch],
    loss: GeneratedLabelsLoss,
    outer: HyperOptimizer,
    parameters: Sequence[nn.Parameter],
    lr: float,
    generator: torch.Generator,
    weight_decay: float = 0.0,
) -> Tensor | None:
    """Takes one outer step on one batch. Returns the main loss after the look-ahead, a scalar (of several ranks, this
    one's term, see `main_loss`); or None, without a step, where there is nothing to learn from: no sample of the batch
    has the main loss, or `lr` is 0.

    Args:
        draw: the student's losses on a batch that the random generator chooses.
        outer: holds the parameters of the label generator.
        parameters: the student's, which stay as they are.
        lr, weight_decay: those of the look-ahead step, the student's own. Schedulers may end at an lr of 0.
    """
    start = generator.get_state()
    reached: list[Tensor] = []
    first = draw(generator)
    # Ranks exchange their numbers before the outer loss is called: if it raised on one, the others would wait for it.
    factor = factor_of_main(loss.ranks, known_main_losses(first, loss.main))
    if lr == 0 or factor == 0:
        return None
    with preserved_state():
        of_all = loss.labels_of_all(first)

    def batch() -> LabelBatch:
        generator.set_state(start)
        return draw(generator)

    def outer_loss() -> Tensor:
        ahead = batch()
        losses = known_main_losses(ahead, loss.main)
        reached[:] = [losses.mean() if loss.ranks is None else losses.sum() * factor]
        return reached[0] + loss.entropy_term(ahead, of_all)

    outer.solver = OneStep(lr, lookahead=True)
    inner_loss = loss(*first)
    if loss.ranks is not None:
        inner_loss = inner_loss * factor_of_part(loss.ranks, len(first.losses))
    outer.step(outer_loss, with_decay(inner_loss, parameters, weight_decay), parameters)
    return reached[0].detach()
