"""The Neumann step against its definition in float64, in every size, layout and thread count that matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from auxfast import reference_kernels
from auxfast.ops.neumann import neumann_step_, neumann_step_reference_

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


def lists(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
        for _ in range(3)
    )


def clones(*tensors: list[Tensor]) -> tuple[list[Tensor], ...]:
    return tuple([tensor.clone() for tensor in some] for some in tensors)


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


@pytest.mark.parametrize("layout", ["transposed", "channels last", "reversed dimensions", "off by one element"])
@pytest.mark.parametrize("product", ["as given", "like v"])
def test_dense_updates_of_any_layout(layout, product, device):
    v, hv, p = lists([(5, 4, 3, 7), (1, 3, 1, 5)], torch.float32, device)
    v, p = [LAYOUTS[layout](t) for t in v], [LAYOUTS[layout](t) for t in p]
    if product == "like v":
        hv = [LAYOUTS[layout](t) for t in hv]
    strides = [t.stride() for t in v]
    assert_step(v, hv, p, 1.2e-7)
    assert [t.stride() for t in v] == strides


@pytest.mark.parametrize("layout", ["sliced", "expanded"])
@pytest.mark.parametrize("which", [0, 2], ids=["v", "p"])
def test_refuses_to_update_what_is_not_dense(layout, which, device):
    given = list(lists([(5, 4, 3, 7)], torch.float32, device))
    given[which] = [LAYOUTS[layout](t) for t in given[which]]
    with pytest.raises(RuntimeError, match=r"v\[0\] and p\[0\] are updated in place and must be dense"):
        neumann_step_(*given, STEP)


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
    "shape of hv": (_with(1, lambda t: t[:-1]), r"hv\[1\].*shape"),
    "rank of p": (_with(2, lambda t: t[None]), r"p\[1\].*shape"),
    "dtype in v": (_with(0, torch.Tensor.double), r"v\[1\].*dtype"),
    "dtype of hv": (_with(1, torch.Tensor.half), r"hv\[1\].*dtype"),
    "device of p": (_with(2, lambda t: t.to("meta")), r"p\[1\].*device"),
    "length of hv": (lambda v, hv, p: hv.pop(), "one length"),
    "length of p": (lambda v, hv, p: p.append(p[0]), "one length"),
    "nothing": (lambda *given: [some.clear() for some in given], "one length"),
}


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_argument(change, message, native):
    given = lists([(3,), (4,)], torch.float32, "cpu")
    change(*given)
    before = clones(*given[:1])[0]
    with pytest.raises(RuntimeError, match=message):
        (neumann_step_ if native else neumann_step_reference_)(*given, STEP)
    assert all(torch.equal(a, b) for a, b in zip(given[0], before, strict=True))


@pytest.mark.parametrize("step", [neumann_step_, neumann_step_reference_], ids=["kernel", "reference"])
def test_refuses_integers(step):
    integers = [torch.zeros(3, dtype=torch.int64)]
    with pytest.raises(RuntimeError, match=r"v\[0\] must be"):
        step(integers, integers, integers, STEP)


def test_refuses_to_lose_a_gradient():
    v, hv, p = lists([(3,)], torch.float32, "cpu")
    hv[0].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        neumann_step_(v, hv, p, STEP)
    with torch.no_grad():
        neumann_step_(v, hv, p, STEP)


def test_autograd_sees_that_v_and_p_changed():
    for which in (0, 2):
        given = lists([(3,)], torch.float32, "cpu")
        weight = torch.ones(3, requires_grad=True)
        product = (weight * given[which][0]).sum()
        neumann_step_(*given, STEP)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, device):
    given = lists([(), (3, 5), (0,), (129,)], dtype, device)
    torch.library.opcheck(torch.ops.auxfast.neumann_step_.default, (*given, STEP))
