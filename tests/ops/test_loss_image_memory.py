"""How much memory the loss image takes."""

from __future__ import annotations

import pytest

from .combining_cases import printed_json

# Peak memory in KiB beyond what the process had, of gradient and second order with parameters.
_MEMORY = """
import json
import resource
import torch
from auxfast.ops.loss_image import loss_image, loss_image_reference
from auxfast.ops.network import LossImageNetwork

network = LossImageNetwork(3, (8, 16), main=0)
phi = torch.rand(network.num_parameters).requires_grad_()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth(function, height: int, width: int, batch: int) -> int:
    losses = torch.rand(batch, 3, height, width).requires_grad_()
    tangent = torch.rand_like(losses)
    before = peak()
    (gradient,) = torch.autograd.grad(function(losses, phi, network), losses, create_graph=True)
    torch.autograd.grad(gradient, (losses, phi), tangent)
    return peak() - before


growth(loss_image, 8, 8, 1)
growth(loss_image_reference, 8, 8, 1)
print(json.dumps([growth(*case) for case in CASES]))
"""


@pytest.mark.slow
def test_memory_is_a_twelfth_of_eager():
    cases = "[(loss_image, 288, 384, 8), (loss_image_reference, 288, 384, 8)]"
    fused, eager = printed_json(_MEMORY.replace("CASES", cases))
    assert fused <= eager / 12


@pytest.mark.slow
def test_memory_grows_with_the_row():
    """Three results have the size of the losses: weights, scaled weights, Hessian product. The rest is compared."""
    (tall,) = printed_json(_MEMORY.replace("CASES", "[(loss_image, 4096, 256, 1)]"))
    (wide,) = printed_json(_MEMORY.replace("CASES", "[(loss_image, 256, 4096, 1)]"))
    results = 3 * 3 * 4096 * 256 * 4 // 1024
    assert tall - results <= 3 * 1024
    assert wide - results <= 16 * 1024
