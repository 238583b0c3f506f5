"""Inputs of the combiners' ops, checked and converted before the network sees them; reduction of its values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from auxfast._native import has_kernels, within_reference_kernels
from auxfast.autograd.transforms import in_transform
from auxfast.ops.network import Network, Reduction

_is_compiling = torch.compiler.is_compiling  # looked up once: ops ask at every call

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_DENSE = torch.strided
_EACH_SAMPLES = ", of each sample's own losses, as reduction='none' gives them"


def present_losses(losses: Tensor, mask: Tensor | None, num_losses: int, image: bool = False) -> Tensor:
    """The losses (batch, num_losses), or those of an `image` (batch, num_losses, H, W): checked, 0 where the mask is 0,
    and in float32 if they came in less. The mask's zeros pass no gradient, and nothing of what they hide.

    Raises:
        TypeError: `losses` or `mask` is no dense tensor, or `losses` is not floating point.
        ValueError: a shape is wrong, or `mask` holds something else than 0 and 1 (found on the CPU alone).
        RuntimeError: the two are on different devices.
    """
    try:  # only what is no tensor pays
        shape, dtype, layout = losses.shape, losses.dtype, losses.layout
    except AttributeError:
        raise not_a_tensor(losses) from None
    if len(shape) != (4 if image else 2) or shape[1] != num_losses:
        wanted = f"(batch, {num_losses}, H, W)" if image else f"(batch, {num_losses})"
        raise ValueError(f"losses must be {wanted}, got {tuple(shape)}{_EACH_SAMPLES if len(shape) < 2 else ''}")
    if not dtype.is_floating_point:
        raise TypeError(f"losses must be floating point, got {dtype}")
    if layout is not _DENSE:
        raise TypeError(f"losses must be dense, got {layout}: pass losses.to_dense()")
    if mask is not None:
        losses = torch.where(_as_bool(mask, losses), losses, 0.0)
    return losses.float() if dtype in _LOW_PRECISION else losses


def not_a_tensor(losses: Any) -> TypeError:
    """The error for losses that are no tensor."""
    is_list = isinstance(losses, (list, tuple))
    scalars = is_list and not any(isinstance(loss, Tensor) and loss.dim() for loss in losses)
    remedy = ": pass torch.stack([...], dim=1)" if is_list else ""
    return TypeError(
        f"losses must be one tensor, got a {type(losses).__name__}{remedy}{_EACH_SAMPLES if scalars else ''}"
    )


def _as_bool(mask: Tensor, losses: Tensor) -> Tensor:
    """The mask, checked. Its values are where reading them is cheap: on the CPU, and not in a subclass of tensors,
    which may have none."""
    if not isinstance(mask, Tensor) or mask.layout is not _DENSE:
        given = mask.layout if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise TypeError(f"mask must be a dense tensor, got {given}")
    if mask.shape != losses.shape:
        raise ValueError(f"mask must have the losses' shape {tuple(losses.shape)}, got {tuple(mask.shape)}")
    if mask.device != losses.device:
        raise RuntimeError(f"losses are on {losses.device} and mask is on {mask.device}: move one to the other")
    if mask.dtype is torch.bool:
        return mask
    present = mask.bool()  # NaN and 0.5 become True
    readable = type(mask) is Tensor and mask.is_cpu and not (_is_compiling() or in_transform())
    if readable and not torch.equal(mask * mask, mask):
        other = mask[mask * mask != mask][0].item()
        raise ValueError(f"mask must hold 1 where a sample has a loss and 0 where it has not, got {other}")
    return present


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it is float16 or bfloat16."""
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor


def op_inputs(
    losses: Tensor, phi: Tensor, network: Network, mask: Tensor | None, image: bool = False
) -> tuple[Tensor, Tensor, bool]:
    """The losses as `present_losses` leaves them; `phi`, checked against the network and the losses, and in float32 if
    it came in less; and whether the kernels run. They do not where something that their Functions know nothing of is
    under way, and would get errors or silent zeros."""
    losses = present_losses(losses, mask, network.num_losses, image)
    if phi.shape != network.phi_shape:
        raise ValueError(f"phi must be {network.phi_shape}, got {tuple(phi.shape)}")
    if losses.dtype != phi.dtype:
        phi = full_precision(phi)
        if losses.dtype != phi.dtype:
            raise TypeError(f"losses are {losses.dtype} and phi is {phi.dtype}: convert one, e.g. combiner.to(losses)")
    device = losses.device
    if device != phi.device:
        raise RuntimeError(f"losses are on {device} and phi is on {phi.device}: move one to the other")
    native = (
        not (_is_compiling() or in_transform())
        and has_kernels(device)  # these two: use_native() without its frame
        and not within_reference_kernels()
        and network.fits_kernels
        and losses.numel() > 0
    )
    return losses, phi, native


def without_autocast(losses: Tensor) -> AbstractContextManager[Any]:
    """Keeps products of losses out of autocast's half precision: they are small, and a loss needs its digits."""
    device = losses.device.type
    enabled = _has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    """Whether autocast knows the device. torch.compile of 2.11 cannot trace the question."""
    return torch.amp.is_autocast_available(device)


def reduce_values(values: Tensor, reduction: Reduction) -> Tensor:
    """The values (batch,) themselves for "none", or their "mean" or "sum"."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()
