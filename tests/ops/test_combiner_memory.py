"""The blocks of memory that the combiner keeps for activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .combiner_cases import SMALL, inputs


def test_memory_of_activations_serves_again_once_it_is_free():
    """The blocks that csrc/common/recycled_memory.h keeps are handed out to one tensor at a time, by size."""
    losses, phi, *_ = inputs(SMALL, 67)

    def saved(samples: int) -> Tensor:
        return torch.ops.auxfast.combiner_forward(losses[:samples], phi, SMALL.packed, True)[2]

    first, second, smaller = saved(67), saved(67), saved(3)
    assert len({t.untyped_storage().data_ptr() for t in (first, second, smaller)}) == 3
    free, kept = first.data_ptr(), second.clone()
    del first
    assert saved(3).data_ptr() != free
    again = saved(67)
    assert again.data_ptr() == free
    again.zero_()
    assert torch.equal(second.view(torch.int64), kept.view(torch.int64))  # bits: what no sample fills may be NaN
