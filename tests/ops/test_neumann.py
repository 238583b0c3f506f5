"""The Neumann steps against their definition in float64, in every size, layout and thread count that matters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from auxfast import reference_kernels
from auxfast.ops.neumann import (
    CUDA_SUMS,
    GREW,
    GUARDED_NUMBERS,
    SMALLEST,
    SQUARE,
    STEPS,
    NeumannSteps,
    neumann_guarded_step_,
    neumann_guarded_step_reference_,
    neumann_step_reference_,
)

STEP = 0.3

SIZES = {
    "scalar": [()],
    "one": [(1,)],
    "empty": [(0,), (2, 0, 3)],
    "empty among others": [(3,), (0,), (5, 2)],
    "around a tile": [(127,), (128,), (129,)],
    "around a chunk": [(32767,), (1,), (32769,)],
    "prime": [(100003,), (7, 11, 13)],
    "many tiny": [(i % 13,) for i in range(400)],
    "tiny and huge": [(10,)] * 150 + [(400, 501)] + [(3,)] * 50,
}


def lists(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str, count: int = 3) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
        for _ in range(count)
    )


def clones(*tensors: list[Tensor]) -> tuple[list[Tensor], ...]:
    return tuple([tensor.clone() for tensor in some] for some in tensors)


def neumann_step_(v: list[Tensor], hv: list[Tensor], p: list[Tensor], step_size: float) -> Tensor:
    """A step of a series that has come to v and p, which are updated. Returns the squared norm of the new v."""
    steps = NeumannSteps(v, step_size)
    given, own = (*v, *p), (*steps.v, *steps.p)
    for mine, value in zip(own, given, strict=True):
        mine.copy_(value)
    steps.step(steps.v if hv is v else hv)
    for mine, value in zip(own, given, strict=True):
        value.copy_(mine)
    return steps.squares()[1]


def assert_step(v: list[Tensor], hv: list[Tensor], p: list[Tensor], rtol: float) -> None:
    """Runs the step and compares with its definition in float64; rtol relative to the largest term."""
    before = [[tensor.to(torch.float64, copy=True) for tensor in some] for some in (v, hv, p)]
    squares = neumann_step_(v, hv, p, STEP)
    for new_v, new_p, old_v, old_hv, old_p in zip(v, p, *before, strict=True):
        wanted = old_v - STEP * old_hv
        torch.testing.assert_close(new_v.double(), wanted, rtol=rtol, atol=4 * rtol)
        torch.testing.assert_close(new_p.double(), old_p + wanted, rtol=rtol, atol=8 * rtol)
    assert squares.shape == ()
    assert squares.dtype == torch.float64
    assert squares.device == v[0].device
    exact = sum(tensor.double().square().sum() for tensor in v)  # of what was stored, so exact in float32 too
    torch.testing.assert_close(squares, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1.2e-7), (torch.float64, 4e-16)])
@pytest.mark.parametrize("shapes", SIZES.values(), ids=SIZES.keys())
def test_step_is_its_definition(shapes, dtype, rtol, device):
    v, hv, p = lists(shapes, dtype, device)
    assert_step(v, hv, p, rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_reference_and_kernel_agree(dtype, device):
    v, hv, p = lists(SIZES["empty among others"] + SIZES["prime"], dtype, device)
    v2, hv2, p2 = clones(v, hv, p)
    squares = neumann_step_(v, hv, p, STEP)
    squares2 = neumann_step_reference_(v2, hv2, p2, STEP)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(v, v2, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(p, p2, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(squares, squares2, rtol=4 * tolerance, atol=0)


def test_reference_kernels_context_runs_the_reference(device):
    v, hv, p = lists([(1000,), (30, 7)], torch.float32, device)
    v2, hv2, p2 = clones(v, hv, p)
    with reference_kernels():
        squares = neumann_step_(v, hv, p, STEP)
    assert torch.equal(squares, neumann_step_reference_(v2, hv2, p2, STEP))
    assert all(torch.equal(a, b) for a, b in zip(v + p, v2 + p2, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", [SIZES["prime"], SIZES["tiny and huge"]], ids=["prime", "tiny and huge"])
def test_same_bits_for_any_number_of_threads(shapes, dtype):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            v, hv, p = lists(shapes, dtype, "cpu")
            results.append([neumann_step_(v, hv, p, STEP), *v, *p])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
    "reversed dimensions": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "off by one element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_product_of_any_layout(layout, device):
    v, hv, p = lists([(5, 4, 3, 7), (2, 3, 4, 5)], torch.float32, device)
    hv = [layout(tensor) for tensor in hv]
    assert_step(v, hv, p, 1.2e-7)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_right_hand_side_of_any_layout(layout, device):
    (start,) = lists([(5, 4, 3, 7), (1, 3, 1, 5)], torch.float32, device, 1)
    start = [layout(tensor) for tensor in start]
    steps = NeumannSteps(start, STEP)
    for mine in (steps.v, steps.p):
        torch.testing.assert_close(mine, [STEP * tensor for tensor in start], rtol=1e-7, atol=0)
        assert [tensor.stride() for tensor in mine] == [tensor.clone().stride() for tensor in start]


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_norms_of_all_steps_are_there_when_they_are_asked_for(count, device):
    start, *products = lists([(130,), (3, 5)], torch.float32, device, 8)
    steps, wanted = NeumannSteps(start, STEP), []
    for step in range(count):
        wanted.append(sum(tensor.double().square().sum() for tensor in steps.v))
        steps.step(products[step % len(products)])
    assert steps.unread == count + 1
    torch.testing.assert_close(steps.squares()[:count], torch.stack(wanted), rtol=1e-12, atol=0)
    assert (steps.unread, len(steps.squares())) == (0, 0)


@pytest.mark.parametrize("count", [1, 17])
def test_norms_are_read_as_they_are(count, device):
    start, product = lists([(130,), (3, 5)], torch.float32, device, 2)
    read, asked = NeumannSteps(start, STEP), NeumannSteps(start, STEP)
    for steps in (read, asked):
        for _ in range(count):
            steps.step(product)
    assert read.read() == asked.squares().tolist()
    assert read.read() == []


def test_product_may_be_v_itself(device):
    v, _, p = lists([(1000,), (5, 3)], torch.float32, device)
    assert_step(v, v, p, 1.2e-7)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_norm_neither_underflows_nor_overflows_in_float32(magnitude, device):
    v, hv, p = lists([(1003,)], torch.float32, device)
    v, hv, p = ([t * magnitude for t in some] for some in (v, hv, p))
    squares = neumann_step_(v, hv, p, STEP)
    torch.testing.assert_close(squares, v[0].double().square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_norm(value, device):
    v, hv, p = lists([(1003,), (5,)], torch.float32, device)
    hv[1][4] = value
    assert not neumann_step_(v, hv, p, STEP).isfinite()
    assert v[0].isfinite().all()


def _with(position: int, make: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def change(*given: list[Tensor]) -> None:
        given[position][1] = make(given[position][1])

    return change


ERRORS: dict[str, tuple[Callable[..., object], str]] = {
    "shape": (_with(0, lambda t: t[:-1]), r"hv\[1\].*shape"),
    "rank": (_with(0, lambda t: t[None]), r"hv\[1\].*shape"),
    "dtype": (_with(0, torch.Tensor.half), r"hv\[1\].*dtype"),
    "device": (_with(0, lambda t: t.to("meta")), r"hv\[1\].*device"),
    "one too few": (lambda hv: hv.pop(), "one length"),
    "one too many": (lambda hv: hv.append(hv[0]), "one length"),
    "nothing": (lambda hv: hv.clear(), "one length"),
}


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_of_a_step_name_the_argument(change, message, native):
    start, hv = lists([(3,), (4,)], torch.float32, "cpu", 2)
    change(hv)
    with contextlib.nullcontext() if native else reference_kernels():
        steps = NeumannSteps(start, STEP)
    (before,) = clones(steps.v)
    with pytest.raises(RuntimeError, match=message):
        steps.step(hv)
    assert all(torch.equal(a, b) for a, b in zip(steps.v, before, strict=True))


OPERANDS: dict[str, tuple[int, Callable[[Any], Any], str]] = {
    "v too short": (0, lambda t: t[:-1], "v has shape"),
    "p too long": (2, lambda t: torch.cat([t, t]), "p has shape"),
    "p of another dtype": (2, torch.Tensor.double, "p and v must have one dtype"),
    "strided p": (2, lambda t: t.repeat_interleave(2)[::2], "p must be contiguous"),
    "sums of float32": (3, torch.Tensor.float, "sums must be"),
    "sums of one dimension": (3, torch.Tensor.flatten, "sums must be"),
    "no sums": (3, lambda t: t[:0], "row must be a row of sums, not 0 of 0"),
    "layout of int32": (4, torch.Tensor.int, "layout must be"),
    "fewer products than the layout": (1, lambda hv: hv[:1], "hv has only 1 of the tensors of layout"),
    "layout cut short": (4, lambda t: t[:-1], "layout does not tell"),
    "layout with a rank below 0": (4, lambda t: -t, "layout does not tell"),
}


@pytest.mark.parametrize(("which", "change", "message"), OPERANDS.values(), ids=OPERANDS.keys())
def test_the_op_checks_what_it_is_told(which, change, message):
    given = list(arguments(torch.float32, "cpu"))
    given[which] = change(given[which])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.auxfast.neumann_step_.default(*given)


def arguments(dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Those of the op, for two tensors."""
    v, p = (torch.zeros(256, dtype=dtype, device=device) for _ in range(2))
    hv = [torch.ones(3, 5, dtype=dtype, device=device), torch.ones((), dtype=dtype, device=device)]
    sums = torch.zeros(2, CUDA_SUMS if device == "cuda" else 1, dtype=torch.float64, device=device)
    return v, hv, p, sums, torch.tensor([2, 3, 5, 5, 1, 0]), 0, STEP


def test_refuses_integers():
    integers = [torch.zeros(3, dtype=torch.int64)]
    with pytest.raises(RuntimeError, match=r"v\[0\] must be"):
        NeumannSteps(integers, STEP)


def test_refuses_to_lose_a_gradient():
    start, hv = lists([(3,)], torch.float32, "cpu", 2)
    steps = NeumannSteps(start, STEP)
    hv[0].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        steps.step(hv)
    with torch.no_grad():
        steps.step(hv)


@pytest.mark.parametrize("name", ["v", "p"])
def test_autograd_sees_that_v_and_p_changed(name):
    start, hv = lists([(3,), (4,)], torch.float32, "cpu", 2)
    steps = NeumannSteps(start, STEP)
    weight = torch.ones(4, requires_grad=True)
    product = (weight * getattr(steps, name)[1]).sum()
    steps.step(hv)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, device):
    torch.library.opcheck(torch.ops.auxfast.neumann_step_.default, arguments(dtype, device))
    given = *lists([(), (3, 5), (0,), (129,)], dtype, device, 4), beginning(device)
    torch.library.opcheck(torch.ops.auxfast.neumann_guarded_step_.default, (*given, STEP))


# ------------------------------------------------------------------------------------------------------- guarded steps


def beginning(device: str, smallest: float = float("inf")) -> Tensor:
    numbers = torch.zeros(GUARDED_NUMBERS, dtype=torch.float64, device=device)
    numbers[SMALLEST] = smallest
    return numbers


def assert_guarded_step(v: list[Tensor], v_before: list[Tensor], hv: list[Tensor], p: list[Tensor]) -> None:
    """Runs the step and compares with the reference, which takes it in float64."""
    numbers = beginning(str(v[0].device))
    wanted = [[tensor.to(torch.float64, copy=True) for tensor in some] for some in (v, v_before, hv, p)]
    wanted_numbers = numbers.clone()
    neumann_guarded_step_(v, v_before, hv, p, numbers, STEP)
    neumann_guarded_step_reference_(*wanted, wanted_numbers, STEP)
    eps = torch.finfo(v[0].dtype).eps
    for some, exact in zip((v, v_before, hv, p), wanted, strict=True):
        torch.testing.assert_close([tensor.double() for tensor in some], exact, rtol=eps, atol=8 * eps)
    torch.testing.assert_close(numbers, wanted_numbers, rtol=max(8 * eps, 1e-12), atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", SIZES.values(), ids=SIZES.keys())
def test_guarded_step_is_the_reference(shapes, dtype, device):
    assert_guarded_step(*lists(shapes, dtype, device, 4))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_guarded_step_takes_a_product_of_any_layout(layout, device):
    v, v_before, hv, p = lists([(5, 4, 3, 7), (2, 3, 4, 5)], torch.float32, device, 4)
    assert_guarded_step(v, v_before, [layout(tensor) for tensor in hv], p)


@pytest.mark.parametrize("layout", ["sliced", "expanded"])
@pytest.mark.parametrize("which", [0, 1, 3], ids=["v", "v_before", "p"])
def test_guarded_step_refuses_to_update_what_is_not_dense(layout, which, device):
    given = list(lists([(5, 4, 3, 7)], torch.float32, device, 4))
    given[which] = [LAYOUTS[layout](tensor) for tensor in given[which]]
    with pytest.raises(RuntimeError, match=r"v\[0\], v_before\[0\] and p\[0\] are updated in place and must be dense"):
        neumann_guarded_step_(*given, beginning(device), STEP)


GROWN = [0.0, 1 / 1.0025, 1 / 1.0015, 1.0, float("inf"), float("nan")]


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("smallest", GROWN)
def test_guarded_step_stops_for_good_where_the_norm_grows(smallest, native, device):
    """A norm grows where it rises by more than GROWTH."""
    step = neumann_guarded_step_ if native else neumann_guarded_step_reference_
    v, hv, p = ([torch.tensor([x], device=device)] for x in (1.0, 0.0, 5.0))
    v_before, numbers = [torch.tensor([2.0], device=device)], beginning(device, smallest)
    step(v, v_before, hv, p, numbers, STEP)
    grew = not smallest > 1 / 1.002
    assert (v_before[0].item(), p[0].item(), numbers[SQUARE].item()) == (1, 7, 1)
    assert (numbers[GREW].item(), numbers[STEPS].item()) == (grew, 1)
    assert numbers[SMALLEST].item() == (min(smallest, 1.0) if smallest == smallest else 1.0)
    before = numbers.clone()
    step(v_before, v, hv, p, numbers, STEP)
    assert p[0].item() == (7 if grew else 8)
    assert torch.equal(numbers, before) == grew


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_guarded_step_stops_at_what_is_not_finite(value, native, device):
    v, v_before, hv, p = lists([(1003,), (5,)], torch.float32, device, 4)
    hv[1][4], numbers, old_p = value, beginning(device, 3.0), clones(p)[0]
    step = neumann_guarded_step_ if native else neumann_guarded_step_reference_
    step(v, v_before, hv, p, numbers, STEP)
    assert numbers[GREW] == 1
    assert numbers[SMALLEST] == 3
    assert not torch.equal(p[0], old_p[0])  # it has the sum whose residual is v


GUARDED_ERRORS: dict[str, tuple[Callable[..., object], str]] = {
    "dtype in v": (_with(0, torch.Tensor.double), r"v\[1\].*dtype"),
    "shape of v_before": (_with(1, lambda t: t[:-1]), r"v_before\[1\].*shape"),
    "dtype of hv": (_with(2, torch.Tensor.half), r"hv\[1\].*dtype"),
    "rank of p": (_with(3, lambda t: t[None]), r"p\[1\].*shape"),
    "device of p": (_with(3, lambda t: t.to("meta")), r"p\[1\].*device"),
    "length of v_before": (lambda v, v_before, hv, p: v_before.pop(), "one length"),
    "length of hv": (lambda v, v_before, hv, p: hv.pop(), "one length"),
    "length of p": (lambda v, v_before, hv, p: p.append(p[0]), "one length"),
    "nothing": (lambda *given: [some.clear() for some in given], "one length"),
}


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize(("change", "message"), GUARDED_ERRORS.values(), ids=GUARDED_ERRORS.keys())
def test_errors_of_a_guarded_step_name_the_argument(change, message, native):
    given = lists([(3,), (4,)], torch.float32, "cpu", 4)
    change(*given)
    (before,) = clones(given[1])
    with pytest.raises(RuntimeError, match=message):
        (neumann_guarded_step_ if native else neumann_guarded_step_reference_)(*given, beginning("cpu"), STEP)
    assert all(torch.equal(a, b) for a, b in zip(given[1], before, strict=True))


@pytest.mark.parametrize("change", [torch.Tensor.float, lambda t: t[:-1], lambda t: t.repeat_interleave(2)[::2]])
def test_guarded_step_checks_its_numbers(change):
    given = lists([(3,)], torch.float32, "cpu", 4)
    with pytest.raises(RuntimeError, match="numbers"):
        torch.ops.auxfast.neumann_guarded_step_.default(*given, change(beginning("cpu")), STEP)


def test_guarded_step_refuses_to_lose_a_gradient():
    v, v_before, hv, p = lists([(3,)], torch.float32, "cpu", 4)
    hv[0].requires_grad_()
    with pytest.raises(RuntimeError, match="neumann_guarded_step_ is not differentiable"):
        neumann_guarded_step_(v, v_before, hv, p, beginning("cpu"), STEP)
