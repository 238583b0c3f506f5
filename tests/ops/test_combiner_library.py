"""The combiner's raw ops as torch sees them (opcheck, fake tensors), its errors, and where the reference takes over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from auxfast.ops import combiner as module
from auxfast.ops.combiner import CombinerNetwork, combiner

from .combiner_cases import DEVICES, SMALL, TOLERANCES, assert_agree, inputs, normal, of_kernels, of_reference

OPS = torch.ops.auxfast
PER_SAMPLE = replace(SMALL, reduction="none")


def _calls(network: CombinerNetwork, batch: int, save: bool, dtype: torch.dtype, device: str) -> list[tuple[Any, Any]]:
    """Sample calls of the four ops: (op, arguments)."""
    second_order, hessian = OPS.combiner_second_order.default, OPS.combiner_hessian.default
    losses, phi, grad, tangent = inputs(network, batch, dtype, device)
    _, _, saved = OPS.combiner_forward(losses, phi, network.packed, save)
    several = normal(2, batch, network.num_losses, dtype=dtype, device=device)
    later = grad, losses, phi, saved, network.packed
    return [
        (OPS.combiner_forward.default, (losses, phi, network.packed, save)),
        (OPS.combiner_backward_phi.default, later),
        *((op, (some, *later)) for op in (second_order, hessian) for some in (tangent, several)),
    ]


# 64 samples fill their tile. Behind the last sample `saved` holds whatever was there, and opcheck would compare it.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("network", "batch", "save", "dtype"), [(SMALL, 64, True, torch.float32), (PER_SAMPLE, 5, False, torch.float64)]
)
def test_opcheck(network, batch, save, dtype, device):
    """Every utility of opcheck. The ops have no autograd of their own (`combiner`'s Functions are that), so the inputs
    require no gradients."""
    for op, args in _calls(network, batch, save, dtype, device):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("network", [SMALL, PER_SAMPLE, CombinerNetwork(50, (10,) * 5)])
@pytest.mark.parametrize(("batch", "save"), [(1, True), (65, True), (65, False)])
def test_fake_tensors_have_the_shapes_of_real_ones(batch, save, network):
    for op, args in _calls(network, batch, save, torch.float32, "cpu"):
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        for one, other in zip(*((t,) if isinstance(t, Tensor) else t for t in (real, fake)), strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_meta_tensors():
    losses, phi, *_ = (t.to("meta") for t in inputs(SMALL, 5))
    assert combiner(losses, phi, SMALL).shape == ()
    assert combiner(losses, phi, PER_SAMPLE).shape == (5,)


# ------------------------------------------------------------------------------------------------------------- errors

NETWORK_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "num_losses": ({"num_losses": 0}, "num_losses must be at least 1, got 0"),
    "no hidden": ({"hidden": ()}, r"hidden must hold one positive width .*, got \(\)"),
    "zero width": ({"hidden": (3, 0)}, r"hidden must .*, got \(3, 0\)"),
    "activation": ({"activation": "relu"}, "activation must be one of identity, softplus, got 'relu'"),
    "reduction": ({"reduction": "max"}, "reduction must be one of none, sum, mean, got 'max'"),
    "main": ({"main": 3}, "main must be None or a column 0 to 2, got 3"),
    "negative main": ({"main": -1}, "main must be None or a column 0 to 2, got -1"),
}


@pytest.mark.parametrize(("changes", "message"), NETWORK_ERRORS.values(), ids=NETWORK_ERRORS.keys())
def test_network_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        CombinerNetwork(**{"num_losses": 3, "hidden": (4, 2), **changes})


COMBINER_ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], type[Exception], str]] = {
    "columns": ("losses", lambda t: t[:, 1:], ValueError, r"losses must be \(batch, 3\), got \(5, 2\)"),
    "one dimension": ("losses", lambda t: t[0], ValueError, r"losses must be \(batch, 3\), got \(3,\)"),
    "integers": ("losses", Tensor.long, TypeError, r"losses must be floating point, got torch\.int64"),
    "complex": ("losses", lambda t: t.to(torch.cfloat), TypeError, "losses must be floating point"),
    "float losses": ("losses", Tensor.float, TypeError, r"losses are torch\.float32 and phi is torch\.float64"),
    "half losses": ("losses", Tensor.half, TypeError, r"losses are torch\.float32 and phi is torch\.float64"),
    "phi's size": ("phi", lambda t: t[1:], ValueError, r"phi must be \(28,\), got \(27,\)"),
    "phi's rank": ("phi", lambda t: t[None], ValueError, r"phi must be \(28,\), got \(1, 28\)"),
    "phi's dtype": ("phi", Tensor.float, TypeError, r"phi is torch\.float32: convert one"),
    "integer phi": ("phi", Tensor.long, TypeError, r"phi is torch\.int64"),
    "phi's device": ("phi", lambda t: t.to("meta"), RuntimeError, "losses are on cpu and phi is on meta"),
    "losses' device": ("losses", lambda t: t.to("meta"), RuntimeError, "losses are on meta and phi is on cpu"),
    "mask's shape": ("mask", lambda t: t[:, :1], ValueError, r"mask must have .* \(5, 3\), got \(5, 1\)"),
    "mask's device": ("mask", lambda t: t.to("meta"), RuntimeError, "losses are on cpu and mask is on meta"),
}


@pytest.mark.parametrize(("which", "change", "error", "message"), COMBINER_ERRORS.values(), ids=COMBINER_ERRORS.keys())
def test_combiner_errors(which, change, error, message):
    losses, phi, *_ = inputs(SMALL, 5)
    given = {"losses": losses, "phi": phi, "mask": torch.ones(5, 3, dtype=torch.bool)}
    given[which] = change(given[which])
    mask = given["mask"] if which == "mask" else None
    with pytest.raises(error, match=message):
        combiner(given["losses"], given["phi"], SMALL, mask)


def _raw(network: str = SMALL.packed, **changes: Callable[[Tensor], Tensor]) -> list[Callable[[], object]]:
    """Calls of the four ops, with arguments changed."""
    losses, phi, grad, tangents = inputs(SMALL, 5)
    _, _, saved = OPS.combiner_forward(losses, phi, SMALL.packed, True)
    given = {"losses": losses, "phi": phi, "grad": grad, "tangents": tangents, "saved": saved}
    for key, change in changes.items():
        given[key] = change(given[key])
    losses, phi, grad, tangents, saved = given.values()
    return [
        lambda: OPS.combiner_forward(losses, phi, network, True),
        lambda: OPS.combiner_backward_phi(grad, losses, phi, saved, network),
        lambda: OPS.combiner_second_order(tangents, grad, losses, phi, saved, network),
        lambda: OPS.combiner_hessian(tangents, grad, losses, phi, saved, network),
    ]


EVERY, LATER, LAST = slice(0, 4), slice(1, 4), slice(2, 4)
RAW_ERRORS: dict[str, tuple[slice, dict[str, Any], str]] = {
    "integers": (EVERY, {"losses": Tensor.long}, "losses must be float32 or float64"),
    "half": (EVERY, {"losses": Tensor.half, "phi": Tensor.half}, "losses must be float32 or float64"),
    "rank of losses": (EVERY, {"losses": lambda t: t[0]}, r"losses must be \(batch, num_losses\), got 1 dim"),
    "no samples": (slice(0, 1), {"losses": lambda t: t[:0]}, "losses must not be empty"),
    "no losses": (slice(0, 2), {"losses": lambda t: t[:, :0]}, "losses must not be empty"),
    "size of phi": (EVERY, {"phi": lambda t: t[1:]}, "phi must have 28 elements, got 27"),
    "rank of phi": (EVERY, {"phi": lambda t: t[None]}, "phi must have 28 elements"),
    "dtype of phi": (EVERY, {"phi": Tensor.float}, "phi and losses must have one dtype"),
    "size of grad": (LATER, {"grad": lambda t: t.expand(5)}, "grad must have 1 elements, got 5"),
    "dtype of grad": (LATER, {"grad": Tensor.float}, "grad and losses must have one dtype"),
    "size of saved": (LATER, {"saved": lambda t: t[1:]}, "saved is not what combiner_forward returned"),
    "dtype of saved": (LATER, {"saved": Tensor.float}, "saved and losses must have one dtype"),
    "dtype of tangents": (LAST, {"tangents": Tensor.float}, "tangents and losses must have one dtype"),
    "rank of tangents": (LAST, {"tangents": lambda t: t[0]}, r"tangents must be \(batch, num_losses\) or"),
    "rank 4": (LAST, {"tangents": lambda t: t[None, None]}, r"tangents must be \(batch, num_losses\) or"),
    "batch of tangents": (LAST, {"tangents": lambda t: t[1:]}, r"tangents must be \(batch, num_losses\) or"),
    "columns of tangents": (LAST, {"tangents": lambda t: t[:, 1:]}, r"tangents must be \(batch, num_losses\) or"),
    "no layers": (EVERY, {"network": "1,1,0,2"}, "hidden layer"),
    "no network": (EVERY, {"network": ""}, "network must be numbers with commas between, got ''"),
    "words": (EVERY, {"network": "1,1,0,2,ten"}, "network must be numbers with commas between, got '1,1,0,2,ten'"),
    "a number too little": (EVERY, {"network": "1,1,0,2,4,"}, "network must be numbers with commas between"),
    "9 layers": (slice(0, 1), {"network": "1,1,0,2" + ",2" * 9}, "1 to 8 hidden layers, got 9"),
    "width 65": (slice(0, 1), {"network": "1,1,0,2,65"}, "widths of 1 to 64, got 65"),
    "width 0": (slice(0, 1), {"network": "1,1,0,2,0"}, "widths of 1 to 64, got 0"),
    "main": (EVERY, {"network": "1,1,3,2,4,2"}, "main loss 3 of 3 losses"),
    "negative main": (EVERY, {"network": "1,1,-2,2,4,2"}, "main loss -2 of 3 losses"),
}


@pytest.mark.parametrize(("calls", "changes", "message"), RAW_ERRORS.values(), ids=RAW_ERRORS.keys())
def test_raw_ops_check_what_they_are_given(calls, changes, message):
    for call in _raw(**changes)[calls]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_memory_of_activations_serves_again_once_it_is_free():
    """The blocks that csrc/common/recycled_memory.h keeps are handed out to one tensor at a time, by size."""
    losses, phi, *_ = inputs(SMALL, 67)

    def saved(samples: int) -> Tensor:
        return OPS.combiner_forward(losses[:samples], phi, SMALL.packed, True)[2]

    first, second, smaller = saved(67), saved(67), saved(3)
    assert len({t.untyped_storage().data_ptr() for t in (first, second, smaller)}) == 3
    free, kept = first.data_ptr(), second.clone()
    del first
    assert saved(3).data_ptr() != free
    again = saved(67)
    assert again.data_ptr() == free
    again.zero_()
    assert torch.equal(second, kept)


def test_raw_ops_are_not_differentiable_by_themselves():
    losses, phi, *_ = (t.requires_grad_() for t in inputs(SMALL, 5))
    assert not any(t.requires_grad for t in OPS.combiner_forward(losses, phi, SMALL.packed, True))


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.fixture
def kernel_calls(monkeypatch) -> list[int]:
    made: list[int] = []
    original = module._forward
    monkeypatch.setattr(module, "_forward", lambda *args: (made.append(1), original(*args))[1])
    return made


@pytest.mark.parametrize(("hidden", "fits"), [((4,) * 8, True), ((64,), True), ((4,) * 9, False), ((3, 65), False)])
def test_larger_networks_run_on_the_reference(hidden, fits, kernel_calls):
    network = CombinerNetwork(3, hidden, main=0)
    given = inputs(network, 70)
    actual = of_kernels(network, *given)
    assert len(kernel_calls) == fits
    assert_agree(actual, of_reference(network, *given), TOLERANCES[torch.float64])


@pytest.mark.parametrize("network", [SMALL, PER_SAMPLE, replace(SMALL, reduction="sum")])
def test_empty_batch_runs_on_the_reference(network, kernel_calls):
    phi = inputs(network, 1)[1].requires_grad_()
    losses = torch.empty(0, 3, dtype=torch.float64, requires_grad=True)
    value = combiner(losses, phi, network)
    assert kernel_calls == []
    assert value.shape == ((0,) if network.reduction == "none" else ())
    assert value.isnan().item() if network.reduction == "mean" else value.sum() == 0
    grad_losses, grad_phi = torch.autograd.grad(value.sum(), (losses, phi))
    assert grad_losses.shape == (0, 3)
    assert grad_phi.shape == phi.shape
