"""What the Krylov solvers' vector work refuses, and that it says which argument it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from auxfast.ops.krylov import (
    BEFORE_PRECONDITIONER,
    NUMBERS,
    conjugate_gradient_step_,
    conjugate_gradient_step_reference_,
    linear_combination_,
    linear_combination_reference_,
    minres_step_,
    minres_step_reference_,
    row_dots,
    row_dots_reference,
)

from .krylov_cases import coefficients_for, rows


def _term(make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    def change(given: dict[str, Any]) -> None:
        given["terms"][1] = make(given["terms"][1])

    return change


def _other(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    def change(given: dict[str, Any]) -> None:
        given[name] = make(given[name])

    return change


COMBINATION_ERRORS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "shape": (_term(lambda t: t[:, :-1].contiguous()), r"terms\[1\] has shape \(3, 3\), not \(3, 4\)"),
    "rows": (_term(lambda t: t[:1]), r"terms\[1\] has shape \(1, 4\), not \(3, 4\)"),
    "rank": (_term(lambda t: t[0]), r"terms\[1\] must be a contiguous \(k, n\) tensor, not of shape \(4,\)"),
    "strides": (_term(lambda t: t.mT.contiguous().mT), r"terms\[1\] must be a contiguous .* strides"),
    "expanded": (_term(lambda t: t[:1].expand(3, 4)), r"terms\[1\] must be a contiguous .* strides"),
    "dtype": (_term(torch.Tensor.double), r"terms\[1\].*dtype"),
    "device": (_term(lambda t: t.to("meta")), r"terms\[1\].*device"),
    "integer term": (_term(torch.Tensor.long), r"terms\[1\] must be"),
    "integer out": (_other("out", torch.Tensor.long), "out must be"),
    "rank of out": (_other("out", torch.Tensor.flatten), r"out must be a contiguous \(k, n\) tensor"),
    "strides of out": (_other("out", lambda t: t.mT.contiguous().mT), "out must be a contiguous"),
    "no terms": (lambda given: given["terms"].clear(), "terms must be 1 to 3 tensors, not 0"),
    "too many terms": (lambda given: given["terms"].extend(2 * given["terms"]), "terms must be 1 to 3 tensors, not 6"),
    "too few coefficients": (_other("coefficients", lambda t: t[1:]), r"coefficients has shape \(2, 3\), not \(3, 3\)"),
    "rows of coefficients": (_other("coefficients", lambda t: t[:, :1]), r"coefficients has shape \(3, 1\), not"),
    "rank of coefficients": (_other("coefficients", lambda t: t[:, 0]), r"coefficients has shape \(3,\), not \(3, 3\)"),
    "dtype of coefficients": (_other("coefficients", torch.Tensor.float), r"coefficients.* dtype .*float64"),
    "device of coefficients": (_other("coefficients", lambda t: t.to("meta")), "coefficients.* device"),
}


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize(("change", "message"), COMBINATION_ERRORS.values(), ids=COMBINATION_ERRORS.keys())
def test_combination_errors_name_the_argument(change, message, native):
    out, *terms = rows((3, 4), 3, torch.float32, "cpu")
    given = {"out": out, "terms": terms, "coefficients": coefficients_for(out, 2)}
    change(given)
    before = out.clone()
    with pytest.raises(RuntimeError, match=message):
        (linear_combination_ if native else linear_combination_reference_)(**given)
    assert torch.equal(out, before)


DOT_ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "shape": ("b", lambda t: t[:1], r"b has shape \(1, 4\), not \(3, 4\)"),
    "rank": ("a", lambda t: t[0], r"a must be a contiguous \(k, n\) tensor"),
    "strides": ("b", lambda t: t.mT.contiguous().mT, "b must be a contiguous .* strides"),
    "dtype": ("b", torch.Tensor.double, "b.*dtype"),
    "device": ("b", lambda t: t.to("meta"), "b.*device"),
    "integer": ("a", torch.Tensor.long, "a must be"),
}


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize(("which", "make", "message"), DOT_ERRORS.values(), ids=DOT_ERRORS.keys())
def test_dot_errors_name_the_argument(which, make, message, native):
    given = dict(zip("ab", rows((3, 4), 2, torch.float32, "cpu"), strict=True))
    given[which] = make(given[which])
    with pytest.raises(RuntimeError, match=message):
        (row_dots if native else row_dots_reference)(**given)


STEP_ERRORS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "shape": (_other("product", lambda t: t[:1]), r"product has shape \(1, 4\), not \(3, 4\)"),
    "rank": (_other("r", lambda t: t[0]), r"r must be a contiguous \(k, n\) tensor"),
    "strides": (_other("product", lambda t: t.mT.contiguous().mT), "product must be a contiguous .* strides"),
    "dtype": (_other("product", torch.Tensor.double), "product.*dtype"),
    "device": (_other("product", lambda t: t.to("meta")), "product.*device"),
    "integer": (_other("r", torch.Tensor.long), "r must be"),
    "shape of numbers": (_other("numbers", lambda t: t[1:]), r"numbers has shape \(\d+, 3\), not \(\d+, 3\)"),
    "dtype of numbers": (_other("numbers", torch.Tensor.float), "numbers must .* dtype float64"),
    "strides of numbers": (_other("numbers", lambda t: t.mT.contiguous().mT), "numbers must be contiguous"),
    "device of numbers": (_other("numbers", lambda t: t.to("meta")), "numbers and r must be on one device"),
    "part": (_other("part", lambda _: 3), "part must be 0, 1 or 2, not 3"),
    "z of a whole step": (_other("z", lambda _: torch.zeros(3, 4)), "z must be None for part 0"),
    "no z": (_other("part", lambda _: 2), "z must be given for part 2"),
}
CONJUGATE_GRADIENT_ERRORS = {
    "dtype of x": (_other("x", torch.Tensor.double), "x.*dtype"),
    "shape of best": (_other("best", lambda t: t[:, :1]), r"best (has shape|must)"),
    "shape of p": (_other("p", lambda t: t[:1]), "p has shape"),
    "no z before": (_other("part", lambda _: BEFORE_PRECONDITIONER), "z must be given for part 1"),
}
MINRES_ERRORS = {
    "dtype of x": (_other("x", torch.Tensor.float), "x must .* dtype float64"),
    "dtype of w": (_other("w", torch.Tensor.float), "w must .* dtype float64"),
    "shape of w_old": (_other("w_old", lambda t: t[:1]), "w_old has shape"),
    "shape of u": (_other("u", lambda t: t[:1]), "u has shape"),
    "shape of u_old": (_other("u_old", lambda t: t[:1]), "u_old has shape"),
    "shape of v": (_other("v", lambda t: t[:1]), "v has shape"),
}


def _step(names: str, wide: str) -> dict[str, Any]:
    given: dict[str, Any] = {name: torch.zeros(3, 4) for name in names.split()}
    given |= {name: torch.zeros(3, 4, dtype=torch.float64) for name in wide.split()}
    return given | {"z": None, "numbers": torch.zeros(NUMBERS, 3, dtype=torch.float64), "part": 0}


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("change", "message"), (errors := STEP_ERRORS | CONJUGATE_GRADIENT_ERRORS).values(), ids=errors.keys()
)
def test_errors_of_a_step_of_conjugate_gradients_name_the_argument(change, message, native):
    given = _step("x best r p product", "")
    change(given)
    with pytest.raises(RuntimeError, match=f"conjugate_gradient_step_: {message}"):
        (conjugate_gradient_step_ if native else conjugate_gradient_step_reference_)(**given)


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize(("change", "message"), (errors := STEP_ERRORS | MINRES_ERRORS).values(), ids=errors.keys())
def test_errors_of_a_step_of_minres_name_the_argument(change, message, native):
    given = _step("v u u_old r product", "x w w_old")
    change(given)
    with pytest.raises(RuntimeError, match=f"minres_step_: {message}"):
        (minres_step_ if native else minres_step_reference_)(**given)


def test_a_step_refuses_to_lose_a_gradient():
    for step, given in (
        (conjugate_gradient_step_, _step("x best r p product", "")),
        (minres_step_, _step("v u u_old r product", "x w w_old")),
    ):
        given["product"].requires_grad_()
        with pytest.raises(RuntimeError, match="step_ is not differentiable"):
            step(**given)


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("shift", [-1, 1])
def test_refuses_a_term_that_overlaps_out_in_part(shift, device, native):
    combine = linear_combination_ if native else linear_combination_reference_
    memory = torch.zeros(32, device=device)
    out, term = memory[10:20].view(2, 5), memory[10 + shift : 20 + shift].view(2, 5)
    coefficients = torch.ones(3, 2, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=r"terms\[1\] and out share memory"):
        combine(out, [torch.ones_like(out), term], coefficients)
    assert not memory.any()
    combine(out, [torch.ones_like(out), memory[20:30].view(2, 5)], coefficients)  # its neighbour in memory
    assert memory.nonzero().flatten().tolist() == list(range(10, 20))


@pytest.mark.parametrize("which", ["out", "term", "coefficients"])
def test_refuses_to_lose_a_gradient(which):
    out, term = rows((2, 3), 2, torch.float32, "cpu")
    given = {"out": out, "term": term, "coefficients": coefficients_for(out, 1)}
    given[which].requires_grad_()
    with pytest.raises(RuntimeError, match="linear_combination_ is not differentiable"):
        linear_combination_(out, [term], given["coefficients"])
    if which != "coefficients":
        with pytest.raises(RuntimeError, match="row_dots is not differentiable"):
            row_dots(out, term)
    with torch.no_grad():
        linear_combination_(out, [term], given["coefficients"])
        row_dots(out, term)


def test_fake_kernels_refuse_what_the_kernels_refuse():
    meta, double = torch.zeros(3, 4, device="meta"), torch.zeros(3, 4, dtype=torch.float64, device="meta")
    coefficients = torch.zeros(2, 3, dtype=torch.float64, device="meta")
    assert torch.ops.auxfast.linear_combination_(meta, [meta.clone()], coefficients).shape == (3,)
    with pytest.raises(RuntimeError, match=r"terms\[0\] has dtype"):
        torch.ops.auxfast.linear_combination_(meta, [double], coefficients)
    with pytest.raises(RuntimeError, match="coefficients has shape"):
        torch.ops.auxfast.linear_combination_(meta, [meta.clone()], coefficients[:1])
    with pytest.raises(RuntimeError, match="b has dtype"):
        torch.ops.auxfast.row_dots(meta, double)
    numbers = torch.zeros(NUMBERS, 3, dtype=torch.float64, device="meta")
    torch.ops.auxfast.conjugate_gradient_step_(meta, meta, meta, meta, None, meta, numbers, 0)
    torch.ops.auxfast.minres_step_(double, double, double, meta, meta, meta, meta, None, meta, numbers, 0)
    with pytest.raises(RuntimeError, match="product has dtype"):
        torch.ops.auxfast.conjugate_gradient_step_(meta, meta, meta, meta, None, double, numbers, 0)
    with pytest.raises(RuntimeError, match="part must be 0, 1 or 2"):
        torch.ops.auxfast.minres_step_(double, double, double, meta, meta, meta, meta, None, meta, numbers, 4)
