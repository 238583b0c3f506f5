"""What the combiner, the loss image, their networks and their raw ops say of arguments that do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .combining_cases import BOTH, COMBINER, LOSS_IMAGE, OPS, CombiningOp

EITHER = COMBINER, LOSS_IMAGE
NETWORK_ERRORS: list[tuple[CombiningOp, dict[str, Any], str]] = [
    *((op, {"num_losses": 0}, "num_losses must be at least 1, got 0") for op in EITHER),
    *((op, {"activation": "relu"}, "activation must be one of identity, softplus, got 'relu'") for op in EITHER),
    *((op, {"reduction": "max"}, "reduction must be one of none, sum, mean, got 'max'") for op in EITHER),
    (COMBINER, {"main": 3}, "main must be None or a column 0 to 2, got 3"),
    (COMBINER, {"main": -1}, "main must be None or a column 0 to 2, got -1"),
    (COMBINER, {"hidden": ()}, "hidden must hold one positive width for each hidden layer, got ()"),
    (COMBINER, {"hidden": (3, 0)}, "hidden must hold one positive width for each hidden layer, got (3, 0)"),
    (LOSS_IMAGE, {"main": 3}, "main must be None or a channel 0 to 2, got 3"),
    (LOSS_IMAGE, {"main": -1}, "main must be None or a channel 0 to 2, got -1"),
    (LOSS_IMAGE, {"channels": ()}, "channels must hold one positive number for each convolution, got ()"),
    (LOSS_IMAGE, {"channels": (3, 0)}, "channels must hold one positive number for each convolution, got (3, 0)"),
    (LOSS_IMAGE, {"main_reduction": "none"}, "main_reduction must be one of mean, sum, valid_mean, got 'none'"),
]
NETWORK_IDS = [f"{op}-{changes}" for op, changes, _ in NETWORK_ERRORS]


@pytest.mark.parametrize(("op", "changes", "message"), NETWORK_ERRORS, ids=NETWORK_IDS)
def test_network_errors(op, changes, message):
    given = {"hidden": (4, 2)} if op is COMBINER else {}
    with pytest.raises(ValueError, match=re.escape(message)):
        type(op.small)(**{"num_losses": 3, **given, **changes})


# {right} is the shape that the argument had before the change, {wrong} the one that it has.
ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], type[Exception], str]] = {
    "losses too few": ("losses", lambda t: t[:, 1:], ValueError, "losses must be (batch, {columns}), got {wrong}"),
    "no batch": ("losses", lambda t: t[0], ValueError, "losses must be (batch, {columns}), got {wrong}"),
    "integers": ("losses", Tensor.long, TypeError, "losses must be floating point, got torch.int64"),
    "complex": ("losses", lambda t: t.to(torch.cfloat), TypeError, "losses must be floating point"),
    "float losses": ("losses", Tensor.float, TypeError, "losses are torch.float32 and phi is torch.float64"),
    "half losses": ("losses", Tensor.half, TypeError, "losses are torch.float32 and phi is torch.float64"),
    "losses' device": ("losses", lambda t: t.to("meta"), RuntimeError, "losses are on meta and phi is on cpu"),
    "phi's size": ("phi", lambda t: t[1:], ValueError, "phi must be {right}, got {wrong}"),
    "phi's rank": ("phi", lambda t: t[None], ValueError, "phi must be {right}, got {wrong}"),
    "phi's dtype": ("phi", Tensor.float, TypeError, "phi is torch.float32: convert one"),
    "integer phi": ("phi", Tensor.long, TypeError, "phi is torch.int64"),
    "phi's device": ("phi", lambda t: t.to("meta"), RuntimeError, "losses are on cpu and phi is on meta"),
    "mask's shape": ("mask", lambda t: t[:, :1], ValueError, "mask must have the losses' shape {right}, got {wrong}"),
    "mask's device": ("mask", lambda t: t.to("meta"), RuntimeError, "losses are on cpu and mask is on meta"),
}


@BOTH
@pytest.mark.parametrize(("which", "change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(which, change, error, message, op):
    losses, phi, *_ = op.inputs(op.small, op.some)
    given = {"losses": losses, "phi": phi, "mask": torch.ones_like(losses, dtype=torch.bool)}
    right = given[which]
    given[which] = wrong = change(right)
    columns = "3" if op is COMBINER else "2, H, W"
    message = message.format(columns=columns, right=tuple(right.shape), wrong=tuple(wrong.shape))
    with pytest.raises(error, match=re.escape(message)):
        op(given["losses"], given["phi"], op.small, given["mask"] if which == "mask" else None)


# ------------------------------------------------------------------------------------------------------------ raw ops


def _raw(op: CombiningOp, network: Any, changes: dict[str, Callable[[Tensor], Tensor]]) -> list[Callable[[], object]]:
    """Calls of the op's passes in their order, with arguments changed."""
    losses, phi, grad, tangents = op.inputs(op.small, op.some)
    given = {"losses": losses, "phi": phi, "grad": grad, "tangents": tangents}
    if op is COMBINER:
        given["saved"] = op.raw_forward(losses, phi, op.small)[2]
    else:
        given["main_weights"] = losses[:, 0, 0, 0]
    for key, change in changes.items():
        given[key] = change(given[key])
    losses, phi, grad, tangents, own = given.values()
    nothing = losses.new_empty(0)
    if op is COMBINER:
        return [
            lambda: OPS.combiner_forward(losses, phi, network, True),
            lambda: OPS.combiner_backward_phi(grad, losses, phi, own, network),
            lambda: OPS.combiner_second_order(tangents, grad, losses, phi, own, network),
            lambda: OPS.combiner_hessian(tangents, grad, losses, phi, own, network),
        ]
    return [
        lambda: OPS.loss_image_forward(losses, phi, own, network, True, False),
        lambda: OPS.loss_image_backward_phi(grad, losses, phi, nothing, network),
        lambda: OPS.loss_image_second_order(tangents, grad, losses, phi, nothing, network),
        lambda: OPS.loss_image_hessian(tangents, grad, losses, phi, nothing, network),
    ]


# The calls that raise, what is changed, and what they say: for both ops, then for each.
EVERY, FIRST, FIRST_TWO, LATER, LAST = slice(None), slice(0, 1), slice(0, 2), slice(1, None), slice(2, None)
TANGENTS = "tangents must have the shape of losses {losses} or one more dimension in front"
RawErrors = dict[str, tuple[slice, dict[str, Any], str]]
RAW_ERRORS: RawErrors = {
    "integers": (EVERY, {"losses": Tensor.long}, "losses must be float32 or float64"),
    "half": (EVERY, {"losses": Tensor.half, "phi": Tensor.half}, "losses must be float32 or float64"),
    "no samples": (FIRST, {"losses": lambda t: t[:0]}, "losses must not be empty"),
    "size of phi": (EVERY, {"phi": lambda t: t[1:]}, "phi has shape ({fewer_parameters},), not ({parameters},)"),
    "rank of phi": (EVERY, {"phi": lambda t: t[None]}, "phi has shape (1, {parameters}), not ({parameters},)"),
    "dtype of phi": (EVERY, {"phi": Tensor.float}, "phi and losses must have one dtype"),
    "size of grad": (LATER, {"grad": lambda t: t.expand(7)}, "grad has shape (7,), not ()"),
    "dtype of grad": (LATER, {"grad": Tensor.float}, "grad and losses must have one dtype"),
    "dtype of tangents": (LAST, {"tangents": Tensor.float}, "tangents and losses must have one dtype"),
    "rank of tangents": (LAST, {"tangents": lambda t: t[0]}, TANGENTS),
    "two ranks more": (LAST, {"tangents": lambda t: t[None, None]}, TANGENTS),
    "batch of tangents": (LAST, {"tangents": lambda t: t[1:]}, TANGENTS),
    "width of tangents": (LAST, {"tangents": lambda t: t[..., 1:]}, TANGENTS),
    "no network": (EVERY, {"network": ""}, "network must be numbers with commas between, got ''"),
    "words": (EVERY, {"network": "1,2,0,1,ten"}, "network must be numbers with commas between, got '1,2,0,1,ten'"),
    "a number too little": (EVERY, {"network": "1,2,0,1,4,"}, "network must be numbers with commas between"),
}
COMBINER_RAW_ERRORS: RawErrors = {
    "rank of losses": (EVERY, {"losses": lambda t: t[0]}, "losses must be (batch, num_losses), got 1 dim"),
    "no losses": (FIRST_TWO, {"losses": lambda t: t[:, :0]}, "losses must not be empty"),
    "size of saved": (LATER, {"saved": lambda t: t[1:]}, "saved is not what combiner_forward returned"),
    "dtype of saved": (LATER, {"saved": Tensor.float}, "saved and losses must have one dtype"),
    "no layers": (EVERY, {"network": "1,2,0,1"}, "1 to 8 hidden layers, got 0"),
    "9 layers": (FIRST, {"network": "1,2,0,1" + ",2" * 9}, "1 to 8 hidden layers, got 9"),
    "width 65": (FIRST, {"network": "1,2,0,1,65"}, "widths of 1 to 64, got 65"),
    "width 0": (FIRST, {"network": "1,2,0,1,0"}, "widths of 1 to 64, got 0"),
    "main": (EVERY, {"network": "1,2,3,1,4,2"}, "main loss 3 of 3 losses"),
    "negative main": (EVERY, {"network": "1,2,-2,1,4,2"}, "main loss -2 of 3 losses"),
    "main beyond 32 bits": (EVERY, {"network": "1,2,4294967296,1,4,2"}, "main loss 4294967296 of 3 losses"),
}
LOSS_IMAGE_RAW_ERRORS: RawErrors = {
    "rank of losses": (EVERY, {"losses": lambda t: t[0]}, "losses must be (batch, num_losses, H, W), got 3 dim"),
    "no images": (EVERY, {"losses": lambda t: t[:0]}, "losses must not be empty"),
    "no columns": (EVERY, {"losses": lambda t: t[..., :0]}, "losses must not be empty"),
    "65 losses": (FIRST, {"losses": lambda t: t[:, :1].expand(3, 65, 5, 6)}, "1 to 64 channels, got 65"),
    "dtype of main_weights": (FIRST, {"main_weights": Tensor.float}, "main_weights and losses must have one dtype"),
    "size of main_weights": (FIRST, {"main_weights": lambda t: t[1:]}, "main_weights has shape (2,), not (3,)"),
    "no convolutions": (EVERY, {"network": "1,2,0,1"}, "1 to 4 convolutions, got 0"),
    "5 convolutions": (EVERY, {"network": "1,2,0,1" + ",2" * 5}, "1 to 4 convolutions, got 5"),
    "65 channels": (FIRST, {"network": "1,2,0,1,65"}, "1 to 64 channels, got 65"),
    "no channels": (FIRST, {"network": "1,2,0,1,0"}, "1 to 64 channels, got 0"),
    "main": (EVERY, {"network": "1,2,2,1,3,2"}, "main loss 2 of 2 losses"),
    "negative main": (EVERY, {"network": "1,2,-2,1,3,2"}, "main loss -2 of 2 losses"),
    "main beyond 32 bits": (EVERY, {"network": "1,2,4294967296,1,3,2"}, "main loss 4294967296 of 2 losses"),
    "2^30 rows": (
        slice(1, 2),
        {
            "losses": lambda _: torch.empty(1, 1, 2**30, 1, dtype=torch.float32),
            "phi": Tensor.float,
            "grad": Tensor.float,
        },
        "images of at most 1073741823 rows and columns, got 1073741824",
    ),
}
ALL_RAW_ERRORS = [
    pytest.param(op, *row, id=f"{op}-{key}")
    for op, own in zip(EITHER, (COMBINER_RAW_ERRORS, LOSS_IMAGE_RAW_ERRORS), strict=True)
    for key, row in {**RAW_ERRORS, **own}.items()
]


@pytest.mark.parametrize(("op", "calls", "changes", "message"), ALL_RAW_ERRORS)
def test_raw_ops_check_what_they_are_given(op, calls, changes, message):
    message = message.format(
        parameters=op.small.num_parameters,
        fewer_parameters=op.small.num_parameters - 1,
        losses=tuple(op.inputs(op.small, op.some)[0].shape),
    )
    changes = dict(changes)
    for call in _raw(op, changes.pop("network", op.small.packed), changes)[calls]:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call()
