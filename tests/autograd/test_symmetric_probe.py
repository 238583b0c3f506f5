"""Batches of products with a symmetric matrix, compared with one product of the engine for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auxfast.autograd import pullback as module
from auxfast.autograd.pullback import Pullback

K = 9


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """One entry for each pass of the engine by which a batch is checked."""
    calls: list[int] = []
    engine = module.run_engine

    def counted(*args: object) -> object:
        calls.append(1)
        return engine(*args)

    monkeypatch.setattr(module, "run_engine", counted)
    return calls


def second_derivatives(dtype: torch.dtype = torch.float64):
    """A gradient with its graph, and the two parameters that it is in."""
    torch.manual_seed(0)
    u, v = torch.randn(3, 4, dtype=dtype, requires_grad=True), torch.randn(4, dtype=dtype, requires_grad=True)
    h = (u @ v.sin()).tanh()
    loss = h.exp().sum() + 1e-3 * v.square().square().sum()
    return torch.autograd.grad(loss, [u, v], create_graph=True), [u, v]


def batch(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    return [scale * torch.randn(K, 3, 4, dtype=dtype), scale * torch.randn(K, 4, dtype=dtype)]


def check(pullback: Pullback, outputs, inputs, vectors: list[Tensor], rtol: float = 1e-9) -> None:
    found = pullback.batched(vectors)
    rows = [torch.autograd.grad(outputs, inputs, row, retain_graph=True) for row in zip(*vectors, strict=True)]
    expected = [torch.stack(column) for column in zip(*rows, strict=True)]
    torch.testing.assert_close(list(found), expected, rtol=rtol, atol=0)


def test_one_product_of_the_engine_confirms_all_batches(passes):
    outputs, inputs = second_derivatives()
    pullback = Pullback(outputs, inputs, symmetric=True)
    for scale in (1.0, 1e-9, 1e9):
        check(pullback, outputs, inputs, batch(scale=scale))
    check(pullback, outputs, inputs, [torch.zeros_like(each) for each in batch()])
    assert (pullback.num_batched, pullback.refusal, len(passes)) == (4 * K, None, 1)


def test_a_matrix_that_is_not_symmetric_is_compared_with_the_engine_for_each_batch(passes):
    (gu, gv), inputs = second_derivatives()
    outputs = [gu, 2 * gv]
    pullback = Pullback(outputs, inputs, symmetric=True)
    for _ in range(3):
        check(pullback, outputs, inputs, batch())
    assert pullback.refusal is None
    assert len(passes) == 4


def test_a_hook_that_calls_nothing_of_torch_is_found_by_its_result():
    nothing = torch.zeros(4, dtype=torch.float64)
    (gu, gv), inputs = second_derivatives()
    hooked = gv * 1
    hooked.register_hook(lambda grad: nothing)
    outputs = [gu, hooked * 1]
    pullback = Pullback(outputs, inputs, symmetric=True)
    check(pullback, outputs, inputs, batch())
    assert pullback.refusal == "the engine finds something else"


def test_a_hook_that_computes_is_seen():
    (gu, gv), inputs = second_derivatives()
    hooked = gv * 1
    hooked.register_hook(lambda grad: grad.clamp(max=0.1))
    outputs = [gu, hooked * 1]
    pullback = Pullback(outputs, inputs, symmetric=True)
    check(pullback, outputs, inputs, batch())
    assert "hook" in str(pullback.refusal)


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_vectors_whose_norms_leave_the_range_are_compared_with_the_engine(scale, passes):
    outputs, inputs = second_derivatives(torch.float32)
    pullback = Pullback(outputs, inputs, symmetric=True)
    check(pullback, outputs, inputs, batch(torch.float32), rtol=1e-3)
    check(pullback, outputs, inputs, batch(torch.float32, scale), rtol=1e-3)
    assert len(passes) == 2


def test_an_error_in_one_vector_of_one_input_is_found(monkeypatch, passes):
    outputs, inputs = second_derivatives()
    right = module.BatchedBackward.__call__

    def wrong(self, vectors):
        products = right(self, vectors)
        products[1][K - 1, 2] += 1e-5
        return products

    monkeypatch.setattr(module.BatchedBackward, "__call__", wrong)
    pullback = Pullback(outputs, inputs, symmetric=True)
    check(pullback, outputs, inputs, batch())
    assert pullback.num_batched == 0
