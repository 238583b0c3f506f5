"""What a combiner remembers of its last call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap

from auxfast.nn import NonlinearCombiner

from .every_combiner import ALL, losses_of

# Forward-mode AD and Dynamo, on their first use, touch what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")


@ALL
def test_the_losses_of_the_last_call_that_phi_learns_from(make):
    combiner = make(3, main=0).double()
    assert combiner.last_call is None
    losses = losses_of(combiner).requires_grad_()
    combiner(losses * 1)
    given, mask = combiner.last_call
    assert mask is None
    assert torch.equal(given, losses)
    assert given.grad_fn is None
    assert not given.requires_grad
    present = losses > 0.7
    combiner(2 * losses, present)
    assert torch.equal(combiner.last_call[0], 2 * losses)
    assert combiner.last_call[1] is not None
    weights = combiner.loss_weights(*combiner.last_call)
    assert torch.equal(weights, combiner.loss_weights(2 * losses, present))
    assert torch.equal(combiner.last_call[0], 2 * losses)  # loss_weights is no call


@ALL
def test_calls_that_phi_does_not_learn_from_are_not_remembered(make):
    combiner = make(3, main=0).double()
    losses = losses_of(combiner)
    with torch.no_grad():
        combiner(losses)
    combiner.requires_grad_(False)
    combiner(losses.requires_grad_())
    assert combiner.last_call is None


@ALL
def test_a_call_that_raises_is_not_remembered(make):
    combiner = make(3, main=0)
    with pytest.raises(ValueError, match="losses must be"):
        combiner(torch.ones(3))
    assert combiner.last_call is None


def _transformed(combiner: NonlinearCombiner, losses: Tensor) -> None:
    def function(phi: Tensor, losses: Tensor) -> Tensor:
        return functional_call(combiner, {"phi": phi}, (losses,))

    grad(function)(combiner.phi.detach(), losses)
    vmap(combiner)(losses.unsqueeze(1))
    with forward_ad.dual_level():
        combiner(forward_ad.make_dual(losses, losses))


def _traced(combiner: NonlinearCombiner, losses: Tensor) -> None:
    torch.compile(combiner, backend="eager", fullgraph=True)(losses)
    for strict in (False, True):
        torch.export.export(combiner, (losses,), strict=strict)


@pytest.mark.parametrize("call", [_transformed, pytest.param(_traced, marks=pytest.mark.slow)])
def test_tensors_of_transforms_and_traces_are_not_remembered(call):
    combiner = NonlinearCombiner(3, (4,))
    call(combiner, torch.rand(5, 3))
    assert combiner.last_call is None


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_start_without_it(how):
    combiner = NonlinearCombiner(3)
    combiner(torch.rand(5, 3))
    twin = how(combiner)
    assert twin.last_call is None
    assert combiner.last_call is not None
    assert list(combiner.state_dict()) == ["phi"]
    twin(torch.rand(2, 3))
    assert twin.last_call[0].shape == (2, 3)
