"""Checks that a problem is a `Task`: errors that name the member, what was given and what is allowed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auxfast.train.files import described
from auxfast.train.task import WHOLE, Batch, LabelBatch, Part, Task

_METHODS = ("training_batch", "outer_loss", "validation_score", "score")
_OPTIONAL = ("release_auxiliary", "shared_parameters", "further_scores", "split_indices")


def check_members(task: Task) -> None:
    """Checks what a task has, without calling it.

    Raises:
        TypeError, ValueError: a member is missing, or is not what it must be.
    """
    for name in ("loss_names", "main", "model", *_METHODS):
        if not hasattr(task, name):
            raise TypeError(f"task.{name}: {type(task).__name__} has none; see auxfast.train.Task for what a task has")
    names: Any = task.loss_names
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"task.loss_names: got {names!r}, must be a tuple of strings, one for each loss")
    if not names:
        raise ValueError("task.loss_names: got none, must name one loss at least")
    main: Any = task.main
    if isinstance(main, bool) or not isinstance(main, int) or not 0 <= main < len(names):
        raise ValueError(
            f"task.main: got {main!r}, must be the index of the main loss, an integer from 0 to {len(names) - 1}"
        )
    _check_module("model", task.model)
    for name in (*_METHODS, *_OPTIONAL):
        if not callable(getattr(task, name, callable)):
            raise TypeError(f"task.{name}: got {type(getattr(task, name)).__name__}, must be a method")
    if getattr(task, "training_loss", None) is not None:
        own_training_loss(task)


def own_training_loss(task: Task) -> nn.Module:
    """The task's own training loss, which holds outer parameters.

    Raises:
        TypeError, ValueError: there is none; or it is no module, has no parameters to learn, or the model's.
    """
    loss = getattr(task, "training_loss", None)
    if loss is None:
        raise TypeError(
            "task.training_loss: there is none, and the method own needs it: a torch.nn.Module that returns the "
            "training loss, and whose parameters are the outer ones"
        )
    return _outer_module("training_loss", loss, task)


def label_generator(task: Task) -> nn.Module:
    """The task's label generator.

    Raises:
        TypeError, ValueError: there is none; it is no module, has no parameters to learn, or the model's; or its labels
            have no loss of their own.
    """
    generator = getattr(task, "label_generator", None)
    if generator is None:
        raise TypeError(
            "task.label_generator: there is none, and methods that train on generated labels need it: a "
            "torch.nn.Module such as auxfast.nn.LabelGenerator"
        )
    if task.main == len(task.loss_names) - 1:
        raise ValueError(
            f"task.main: got {task.main}, the last of task.loss_names, which must be the loss of the generated labels"
        )
    return _outer_module("label_generator", generator, task)


def _outer_module(name: str, module: Any, task: Task) -> nn.Module:
    """The module, after the check that it has parameters, and none of the model's."""
    _check_module(name, module)
    inner = {id(parameter) for parameter in task.model.parameters() if parameter.requires_grad}
    shared = [own for own, parameter in module.named_parameters() if id(parameter) in inner]
    if shared:
        raise ValueError(
            f"task.{name}: its parameter {shared[0]} is one of task.model too, must be an outer parameter only"
        )
    outer: nn.Module = module
    return outer


def _check_module(name: str, module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"task.{name}: got {type(module).__name__}, must be a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"task.{name}: got {type(module).__name__} with no parameter that requires gradients")


def check_batch(batch: Batch, num_losses: int) -> None:
    """Checks the shape of a batch, which takes no time.

    Raises:
        TypeError, ValueError: it is not what `Task.training_batch` must return.
    """
    if getattr(batch, "_fields", ())[:2] != Batch._fields or not isinstance(batch.losses, Tensor):
        raise TypeError(
            f"task.training_batch: got {type(batch).__name__}, must return a Batch(losses, mask) of tensors"
        )
    shape = tuple(batch.losses.shape)
    if shape[1:2] != (num_losses,):
        raise ValueError(
            f"task.training_batch: got losses of shape {shape}, must be (batch, {num_losses}) or (batch, "
            f"{num_losses}, height, width), one for each of task.loss_names"
        )
    if not batch.losses.requires_grad:
        raise ValueError("task.training_batch: got losses without a graph, must be computed from task.model")


def check_scalar(name: str, loss: Any) -> None:
    """Raises TypeError unless the `name` of a task has returned a scalar tensor with a graph."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return
    given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    if isinstance(loss, Tensor) and loss.numel() == 1:
        given = "a tensor without a graph"
    raise TypeError(f"task.{name}: got {given}, must return a scalar tensor with a graph to the model")


def draw_batch(task: Task, generator: torch.Generator, part: Part) -> Any:
    """This part of a batch of the task, unchecked."""
    draw: Any = task.training_batch
    return draw(generator) if part.size == 1 else draw(generator, part=part)


def check_takes_part(task: Task) -> None:
    """Raises TypeError unless the task can be told which part of each batch a process computes."""
    if "part" not in inspect.signature(task.training_batch).parameters:
        raise TypeError(
            f"task.training_batch: {type(task).__name__}'s takes no argument part, and several processes share each "
            "batch, which must be drawn whole and then taken in parts: see auxfast.train.Task; or start one process"
        )


def check_task(task: Task, *, own: bool = False, labels: bool = False, processes: int = 1) -> None:
    """Checks a task by calling each of its methods once: it draws, and should be thrown away.

    Args:
        own: whether its own training loss is needed.
        labels: whether its label generator is needed.
        processes: how many share each batch. If there are several, their parts are compared with the whole.

    Raises:
        TypeError, ValueError: a member is missing, raises, or returns what it must not.
    """
    check_members(task)
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    batch = _check_training_batch(task)
    _check_graph("training_batch", "losses", batch.losses.sum(), parameters)
    if own:
        training_loss = own_training_loss(task)
        loss = _called("training_loss", lambda: training_loss(*batch))
        check_scalar("training_loss", loss)
        _check_graph("training_loss", "a loss", loss, parameters)
        outer = [parameter for parameter in training_loss.parameters() if parameter.requires_grad]
        _check_graph("training_loss", "a loss", loss, outer, "its own parameters")
    if labels:
        _check_label_batch(task, batch)
    if processes > 1:
        check_takes_part(task)
        _check_parts(task, processes, own)
    outer_loss = _called("outer_loss", task.outer_loss)
    check_scalar("outer_loss", outer_loss)
    _check_graph("outer_loss", "a loss", outer_loss, parameters)
    for name in ("validation_score", "score"):
        number = _checked_number(name, _called(name, getattr(task, name)), "a number, more is better")
        if math.isnan(number):
            raise ValueError(f"task.{name}: got nan before the first step, must return a number, more is better")
    further_scores(task)
    split_indices(task)
    if hasattr(task, "release_auxiliary"):
        _called("release_auxiliary", task.release_auxiliary)
        _check_training_batch(task)


def _check_training_batch(task: Task) -> Any:
    """A batch of the task, after its check."""
    batch = _called("training_batch", lambda: task.training_batch(torch.Generator().manual_seed(0)))
    check_batch(batch, len(task.loss_names))
    _check_losses(batch)
    return batch


@torch.no_grad()
def _check_parts(task: Task, processes: int, own: bool) -> None:
    """Checks that the parts of a batch are the whole batch, as far as that can be seen: where the model is left in the
    mode of evaluation, in which it draws nothing."""
    modes = [(module, module.training) for module in task.model.modules()]
    task.model.eval()
    generators = [torch.Generator().manual_seed(0) for _ in range(processes + 1)]
    parts = [WHOLE, *(Part(rank, processes) for rank in range(processes))]
    whole, *batches = (
        _called("training_batch", partial(draw_batch, task, generator, part))
        for generator, part in zip(generators, parts, strict=True)
    )
    is_comparable = not any(module.training for module in task.model.modules())
    for module, training in modes:
        module.training = training
    remedy = (
        "draw everything from the generator for the whole batch, as one process does, and then take part.of() of it"
    )
    for generator in generators[1:]:
        if not torch.equal(generator.get_state(), generators[0].get_state()):
            raise ValueError(f"task.training_batch: draws less for a part of a batch than for the whole: {remedy}")
    for part, batch in zip(parts[1:], batches, strict=True):
        check_samples(batch, part)
    counts = [len(batch.losses) for batch in batches]
    if sum(counts) != len(whole.losses):
        raise ValueError(
            f"task.training_batch: got parts of {', '.join(map(str, counts))} samples, and the whole batch has "
            f"{len(whole.losses)}: {remedy}"
        )
    if not is_comparable:
        return
    if not torch.allclose(_sorted_losses(*batches), _sorted_losses(whole), rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"task.training_batch: got other losses in the parts of a batch than in the whole: {remedy}; and no loss "
            "of a sample may depend on the other samples"
        )
    if own:
        loss = own_training_loss(task).eval()
        mean = sum(count * loss(*batch) for count, batch in zip(counts, batches, strict=True)) / sum(counts)
        if not torch.allclose(mean, loss(*whole), rtol=1e-3, atol=1e-5):
            raise ValueError(
                f"task.training_loss: got {loss(*whole):.6g} for a batch and {mean:.6g} as the mean of its parts, "
                "weighted by their samples: must be a mean over samples, for several processes to share it"
            )


def check_samples(batch: Batch, part: Part) -> None:
    """Raises ValueError where a part of a batch has no sample."""
    if not batch.losses.numel():
        raise ValueError(
            f"task.training_batch: got no sample in part {part.rank} of {part.size}, must have one for each process"
        )


def _sorted_losses(*batches: Batch) -> Tensor:
    """The known losses of all samples (pixels), each loss sorted: (n, num_losses)."""
    known = [b.losses if b.mask is None else torch.where(b.mask.bool(), b.losses, 0.0) for b in batches]
    return torch.cat([losses.movedim(1, -1).flatten(0, -2) for losses in known]).sort(dim=0).values


def _check_label_batch(task: Task, batch: Any) -> None:
    """Checks that a batch can be labelled, and the labels be predicted."""
    generator = label_generator(task)
    if not isinstance(batch, LabelBatch):
        raise TypeError(f"task.training_batch: got {type(batch).__name__}, must return a LabelBatch to be labelled")
    if not isinstance(batch.mask, Tensor) or bool(batch.mask[:, -1].any()):
        raise ValueError(
            "task.training_batch: got a mask that is not 0 in the column of the generated labels, the last"
        )
    if bool((batch.losses[:, -1] != 0).any()):
        raise ValueError(
            "task.training_batch: got losses that are not 0 in the column of the generated labels, the last: no loss "
            "that stands there is trained on"
        )
    logits, of_one_loss = batch.auxiliary_logits, batch.losses[:, 0].shape
    if logits.dim() < 2 or logits.shape[:1] + logits.shape[2:] != of_one_loss:
        raise ValueError(
            f"task.training_batch: got auxiliary_logits of shape {tuple(logits.shape)}, and a loss has the shape "
            f"{tuple(of_one_loss)}: must have the classes along dimension 1, and otherwise that shape"
        )
    soft_labels = _called("label_generator", lambda: generator(batch.inputs, batch.labels))
    given, expected = tuple(soft_labels.shape), tuple(batch.auxiliary_logits.shape)
    if given != expected:
        raise ValueError(
            f"task.label_generator: got labels of shape {given}, must be {expected}, as the batch's auxiliary_logits"
        )
    known = soft_labels.detach().movedim(1, -1)[batch.mask[:, task.main].bool()]
    if not bool((known >= 0).all()) or not torch.allclose(known.sum(dim=1), known.new_ones(len(known)), atol=0.01):
        raise ValueError(
            "task.label_generator: got labels that are no distributions, must be at least 0 and add up to 1 over the "
            "classes, dimension 1, as a softmax makes them"
        )
    outer = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    _check_graph("label_generator", "labels", soft_labels.sum(), outer, "its own parameters")


def as_number(score: Any) -> float:
    """A score that a task has returned, which may be a tensor."""
    return float(score.detach() if isinstance(score, Tensor) else score)


def further_scores(task: Task) -> dict[str, float]:
    """The further scores of a task by their names; none if it has no such method.

    Raises:
        TypeError, ValueError: it raises, or returns something else than numbers by names.
    """
    if not hasattr(task, "further_scores"):
        return {}
    given = _called("further_scores", task.further_scores)
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"task.further_scores: got {given!r}, must return a dict of numbers by their names")
    return {name: _checked_number("further_scores", score, "numbers by names") for name, score in given.items()}


def split_indices(task: Task) -> dict[str, Tensor]:
    """The indices of each part's samples in a task; none if it does not say.

    Raises:
        TypeError, ValueError: it raises, or returns something else than indices by names.
    """
    if not hasattr(task, "split_indices"):
        return {}
    given = _called("split_indices", task.split_indices)
    for name, indices in given.items() if isinstance(given, Mapping) else [("", given)]:
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1 or not name:
            raise TypeError(
                f"task.split_indices: got {given!r}, must return a dict of (n,) int64 tensors by their names"
            )
    return dict(given)


def _checked_number(name: str, score: Any, expected: str) -> float:
    try:
        return as_number(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"task.{name}: got {type(score).__name__}, must return {expected}") from error


def _called(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # it is the user's code
        raise ValueError(f"task.{name}: raised {described(error)}") from error


def _check_losses(batch: Batch) -> None:
    losses, mask = batch.losses, batch.mask
    if not losses.numel():
        raise ValueError(f"task.training_batch: got losses of shape {tuple(losses.shape)}, must have a sample")
    if mask is None:
        known = losses
    else:
        if not isinstance(mask, Tensor) or mask.shape != losses.shape:
            given = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"task.training_batch: got a mask of {given}, must be None or {tuple(losses.shape)}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("task.training_batch: got a mask of other numbers than 0 and 1")
        known = losses[mask.bool()]
    if not bool(known.isfinite().all()):
        raise ValueError("task.training_batch: got losses that are not finite before the first step")


def _check_graph(
    member: str, what: str, loss: Tensor, parameters: Sequence[Tensor], of: str = "the parameters of task.model"
) -> None:
    if not loss.requires_grad or all(
        grad is None for grad in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    ):
        raise ValueError(f"task.{member}: got {what} that {of} play no part in, must be computed from them")
