"""Sums and means over the processes that share a run: of gradients, buffers and numbers.

Each rank r has n_r of a batch's samples, and `factor = size * n_r / sum(n)`: the plain mean over ranks of
`factor * loss` is the mean over the samples. Without ranks, all of this is what one process does alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from auxfast.implicit.ranks import ProcessGroup, Ranks
from auxfast.train.files import RunError

Result = TypeVar("Result")


def total(ranks: Ranks | None, numbers: Sequence[float]) -> list[float]:
    """The sum of each of the numbers over ranks."""
    return list(numbers) if ranks is None else ranks.totals(numbers)


def factor_of_part(ranks: Ranks | None, samples: int) -> float:
    """What a mean over this rank's samples is multiplied by, see above. 0 if no rank has any."""
    if ranks is None:
        return 1.0
    (whole,) = total(ranks, [samples])
    return ranks.size * samples / whole if whole else 0.0


def average_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter], samples: int) -> None:
    """Replaces each rank's gradients, of a mean over so many samples, by those of the mean over all, by one all-reduce.
    Where no rank has a gradient, there is none."""
    parameter = parameters[0]
    grads = [None if p.grad is None else samples * p.grad for p in parameters]
    has_grad = parameter.new_tensor([float(grad is not None) for grad in grads], dtype=torch.float32)
    count = parameter.new_tensor(float(samples), dtype=torch.float32)
    *sums, counts, whole = ranks.sum([*grads, has_grad, count], [*parameters, has_grad, count])
    lacking = [i for i, grad in enumerate(grads) if grad is None]
    absent = [i for i in lacking if not counts[i]]  # where this rank has them all, nobody need wait for the device
    for i, (p, grad) in enumerate(zip(parameters, sums, strict=True)):
        p.grad = None if i in absent else grad.div_(whole)


@torch.no_grad()
def average_buffers(ranks: Ranks, modules: Iterable[nn.Module]) -> None:
    """Replaces the buffers of each rank, such as BatchNorm's statistics, by their mean, and those that are no floating
    point numbers by the first rank's."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    floating = [buffer for buffer in buffers if buffer.is_floating_point()]
    for buffer, summed in zip(floating, ranks.sum(floating, floating), strict=True):
        buffer.copy_(summed / ranks.size)
    for buffer in buffers:
        if not buffer.is_floating_point():
            buffer.copy_(ranks.of_first(buffer.contiguous()))


def share_random_state(ranks: Ranks, device: torch.device) -> None:
    """Sets torch's random states to the first rank's: dropout draws more for a larger part of a batch."""
    torch.set_rng_state(ranks.of_first(torch.get_rng_state().to(device)).cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(ranks.of_first(torch.cuda.get_rng_state(device).to(device)).cpu(), device)


@torch.no_grad()
def start_alike(ranks: Ranks, facts: Mapping[str, str], modules: Mapping[str, nn.Module]) -> None:
    """Gives all ranks the first one's parameters and buffers.

    Raises:
        ValueError: they differ by more than machines round, or the facts do.
    """
    ranks.check_same(facts, {name: list(module.parameters()) for name, module in modules.items()})
    for module in modules.values():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(ranks.of_first(tensor.detach().contiguous()))


class _AveragedLosses(torch.autograd.Function):
    """Losses of the whole batch, whose gradients are summed over ranks when they are asked for."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, own: Tensor, whole: Tensor, *parameters: Tensor) -> Tensor:
        ctx.ranks, ctx.own, ctx.parameters = ranks, own, parameters
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        (cotangent,) = cotangents
        with torch.enable_grad():
            grads = torch.autograd.grad(ctx.own.value, ctx.parameters, cotangent, retain_graph=True, allow_unused=True)
        return None, None, None, *ctx.ranks.sum(grads, ctx.parameters)


@dataclass(frozen=True)
class _Own:
    """A tensor that autograd does not see as the input of a Function."""

    value: Tensor


def averaged_losses(ranks: Ranks, means: Tensor, samples: int, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The means of the losses over all samples, (num_losses,), from those of this rank's samples. Their gradients in
    the parameters, which take an all-reduce each time, are of all samples too."""
    count = means.new_tensor(float(samples))
    sums, whole = ranks.sum([samples * means, count], [means, count])
    share = samples / whole
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return sums / whole
    averaged: Tensor = _AveragedLosses.apply(ranks, _Own(share * means), sums / whole, *trained)  # type: ignore[no-untyped-call]
    return averaged


def of_first(process_group: ProcessGroup | None, call: Callable[[], Result]) -> Result:
    """The result of a function that the first rank calls, on all ranks; so is the RunError that it raises."""
    if process_group is None:
        return call()
    answer: list[Any] = [None]
    if distributed.get_rank(process_group) == 0:
        try:
            answer = [(None, call())]
        except RunError as error:
            answer = [(error, None)]
    distributed.broadcast_object_list(answer, group=process_group, group_src=0)
    raised, result = answer[0]
    if raised is not None:
        raise raised
    returned: Result = result
    return returned


def is_from_collective(error: BaseException) -> bool:
    """Whether an error, or one that led to it, came out of torch.distributed: where another rank has ended."""
    home = Path(distributed.__file__).parent
    if any(home in Path(frame.f_code.co_filename).parents for frame, _ in walk_tb(error.__traceback__)):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and is_from_collective(before)
