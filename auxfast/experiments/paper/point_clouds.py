"""Clouds of points: sampling, and the pretext tasks that the paper compares learned labels with (appendix C.9).

A pretext task corrupts a cloud, and a network that sees the corrupted one predicts, for each point, something of the
true cloud. Clouds are (batch, 3, points) float32, within the unit ball (see `normalised`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CELLS = 3  # voxels along each axis, in DefRec and in RS
VOXELS = _CELLS**3
_NOISE = 0.01  # variance of each coordinate's noise in DAE (paper, appendix C.9)
_BALL = 0.001  # variance of each coordinate of the points that DefRec draws around a voxel's centre, in its code
_CHAMFER_SCALE = 20.0  # factor of DefRec's loss in its code, that brings squared distances near a cross-entropy


class Corrupted(NamedTuple):
    """A corrupted batch of clouds.

    points: (batch, 3, points), what the network sees.
    target: (batch, points), what the loss needs beside the true points: see each pretext task.
    """

    points: Tensor
    target: Tensor


class Pretext(NamedTuple):
    """A pretext task.

    outputs: what the network predicts for each point: so many numbers.
    corrupt: makes a corrupted batch of a batch of clouds; all of it is drawn from the generator, one of the CPU.
    loss: maps predictions (batch, outputs, points), true points (batch, 3, points) and target to losses (batch,
        points), whose mean is the pretext task's loss.
    """

    outputs: int
    corrupt: Callable[[Tensor, torch.Generator], Corrupted]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]


def normalised(points: Tensor) -> Tensor:
    """The points (p, 3) of a shape, shifted to mean 0 and scaled into the unit ball, as Qi et al. (2017) do."""
    centred = points - points.mean(dim=0)
    scaled: Tensor = centred / torch.linalg.vector_norm(centred, dim=1).max()
    return scaled


def sample(count: int, available: int, generator: torch.Generator) -> Tensor:
    """Draws `count` of `available` points, as indices (count,): without repetition, as far as there are so many. Of a
    smaller cloud, every point is drawn about equally often."""
    rounds = -(-count // available)
    return torch.cat([torch.randperm(available, generator=generator) for _ in range(rounds)])[:count]


def voxels(points: Tensor) -> Tensor:
    """The voxel of each point, (batch, points) int64, from 0 to 26: the cube from -1 to 1 in 3 x 3 x 3."""
    cells = ((points + 1) * (_CELLS / 2)).floor().long().clamp(0, _CELLS - 1)
    x, y, z = cells.unbind(dim=1)
    return (x * _CELLS + y) * _CELLS + z


def voxel_centres() -> Tensor:
    """(3, 27): the centre of each voxel."""
    along = (torch.arange(_CELLS) * 2 + 1) / _CELLS - 1
    return torch.cartesian_prod(along, along, along).T.contiguous()


def chamfer_losses(predicted: Tensor, points: Tensor, region: Tensor) -> Tensor:
    """Chamfer distance between predicted and true points of a region, spread over its points.

    For each cloud it is the mean over the region of the squared distance from a predicted point to the nearest true
    one, plus that from a true point to the nearest predicted one. The losses are 0 outside of the region and, within,
    scaled so that their mean over all points is that distance.

    Args:
        predicted, points: (batch, 3, points).
        region: (batch, points) bool, with at least one point a cloud.

    Returns:
        (batch, points).
    """
    with torch.no_grad():
        distances = torch.cdist(predicted.transpose(1, 2), points.transpose(1, 2))  # (batch, predicted, true)
        nearest_true = distances.masked_fill(~region[:, None, :], torch.inf).argmin(dim=2)
        nearest_predicted = distances.masked_fill(~region[:, :, None], torch.inf).argmin(dim=1)
    there = (predicted - _taken(points, nearest_true)).square().sum(dim=1)
    back = (points - _taken(predicted, nearest_predicted)).square().sum(dim=1)
    share = region.float().mean(dim=1, keepdim=True)
    return (there + back).where(region, 0.0) / share


def _taken(points: Tensor, indices: Tensor) -> Tensor:
    """(batch, 3, points) of the points at the indices (batch, points)."""
    return points.gather(2, indices[:, None].expand(-1, 3, -1))


def _reconstruction_loss(predicted: Tensor, points: Tensor, region: Tensor) -> Tensor:
    return _CHAMFER_SCALE * chamfer_losses(predicted, points, region)


def with_noise(points: Tensor, generator: torch.Generator) -> Corrupted:
    """The clouds with noise of N(0, 0.01) on each coordinate; the target is the region of all points."""
    noise = torch.randn(points.shape, generator=generator)
    return Corrupted(points + _NOISE**0.5 * noise, torch.ones(len(points), points.shape[2], dtype=torch.bool))


def with_deformed_region(points: Tensor, generator: torch.Generator) -> Corrupted:
    """The clouds, in each of which the points of a random voxel are drawn anew, around the voxel's centre. The target
    is that region. The voxel is one with at least the mean number of points, 38 of 1024 (DefRec's code: 40)."""
    of_point = voxels(points)
    counts = F.one_hot(of_point, VOXELS).sum(dim=1)  # (batch, VOXELS)
    drawn = torch.rand(counts.shape, generator=generator)
    chosen = drawn.where(counts * VOXELS >= points.shape[2], -1.0).argmax(dim=1)
    region = of_point == chosen[:, None]
    noise = torch.randn(points.shape, generator=generator)
    around = voxel_centres().T[chosen][:, :, None] + _BALL**0.5 * noise
    return Corrupted(around.where(region[:, None], points), region)


def with_shuffled_voxels(points: Tensor, generator: torch.Generator) -> Corrupted:
    """The clouds with their voxels in a random order; the target is the true voxel of each point."""
    of_point = voxels(points)
    order = torch.rand(len(points), VOXELS, generator=generator).argsort(dim=1)
    centres = voxel_centres()
    moves = centres.T[order.gather(1, of_point)] - centres.T[of_point]  # (batch, points, 3)
    return Corrupted(points + moves.transpose(1, 2), of_point)


def _voxel_loss(predicted: Tensor, points: Tensor, of_point: Tensor) -> Tensor:
    return F.cross_entropy(predicted, of_point, reduction="none")


DAE = Pretext(3, with_noise, _reconstruction_loss)
"""Denoising auto-encoder: the points of a noisy cloud are put back to where the shape is (paper, appendix C.9), by the
loss of `DEFREC` over all points."""

DEFREC = Pretext(3, with_deformed_region, _reconstruction_loss)
"""Deformation reconstruction (Achituve, Maron and Chechik, "Self-Supervised Learning for Domain Adaptation on Point
Clouds", WACV 2021): one region of the shape has collapsed to a ball, and the network predicts where its points were, by
the Chamfer distance within the region; the variant with voxels as regions."""

RS = Pretext(VOXELS, with_shuffled_voxels, _voxel_loss)
"""Reconstructing space (Sauder and Sievers, "Self-Supervised Deep Learning on Point Clouds by Reconstructing Space",
NeurIPS 2019): the voxels of the shape are shuffled, and the network tells of each point from which one it came."""

PRETEXTS = {"dae": DAE, "defrec": DEFREC, "rs": RS}
