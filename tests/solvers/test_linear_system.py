"""The linear system that solvers work on: rows and back, products, and the checks of what they are given."""

from __future__ import annotations

import math

import pytest
import torch

from auxfast.solvers.block_operator import BlockOperator
from auxfast.solvers.linear_system import LinearSystem

from .systems import SHAPES, Operator, cut, flat, gaussian, symmetric, with_eigenvalues


def loop_only(operator: Operator):
    return lambda vectors: operator(vectors)


def test_flat_rows_and_back():
    system = symmetric()
    linear = LinearSystem(system.matvec, system.rhs, 0.0, batched=False)
    assert torch.equal(linear.rhs, flat(system.rhs)[None])
    assert linear.shapes == [torch.Size(shape) for shape in SHAPES]
    for there, back in zip(system.rhs, linear.unflatten(linear.rhs), strict=True):
        assert torch.equal(there, back)
        assert there.shape == back.shape


def test_batched_rows_and_back():
    rhs = [gaussian(3, *shape, seed=i) for i, shape in enumerate(SHAPES)]
    linear = LinearSystem(symmetric().matvec, rhs, 0.0, batched=True)
    assert linear.rhs.shape == (3, 19)
    assert linear.shapes == [torch.Size(shape) for shape in SHAPES]
    for row in range(3):
        assert torch.equal(linear.rhs[row], flat([t[row] for t in rhs]))
    for there, back in zip(rhs, linear.unflatten(linear.rhs), strict=True):
        assert torch.equal(there, back)


def test_right_hand_sides_are_copied_without_a_graph():
    rhs = [torch.ones(3, requires_grad=True)]
    linear = LinearSystem(lambda v: v, rhs, 0.0, batched=False)
    linear.rhs.zero_()
    assert torch.equal(rhs[0].detach(), torch.ones(3))
    assert not linear.rhs.requires_grad


def test_norms_are_those_of_the_rows_in_float64():
    linear = LinearSystem(lambda v: v, [torch.tensor([[3.0, 4.0], [3e5, 4e5]])], 0.0, batched=True)
    assert linear.rhs_norms.tolist() == [5.0, 5e5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_extreme_norms_are_scaled_by_powers_of_two_and_back(dtype):
    limits = torch.finfo(dtype)
    rhs = torch.tensor([[3, 4], [0, 0], [limits.max, 1], [limits.smallest_normal, 0], [1, limits.tiny]], dtype=dtype)
    linear = LinearSystem(lambda v: v, [rhs], 0.0, batched=True)
    assert all(1 <= norm <= 5 for norm in linear.rhs_norms[[0, 2, 3, 4]])
    assert linear.rhs_norms[1] == 0
    assert torch.equal(linear.unflatten(linear.rhs)[0], rhs)
    assert torch.equal(linear.flatten([rhs]), linear.rhs)
    powers = (rhs[:, 0].double() / linear.rhs[:, 0].double())[[0, 2, 3, 4]].log2()
    assert torch.equal(powers, powers.round())
    assert torch.equal(linear.rounded(linear.rhs, torch.arange(5)), linear.rhs)
    assert linear.rounded(4 * linear.rhs[2:3], torch.tensor([2])).isinf().any()


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("batched_products", [True, False], ids=["batched", "loop"])
def test_product_is_with_the_damped_operator(damping, rows, batched_products):
    operator = Operator(gaussian(6, 6))
    operator.matrix = operator.matrix + operator.matrix.T
    linear = LinearSystem(operator if batched_products else loop_only(operator), [gaussian(6)], damping, batched=False)
    vectors = gaussian(rows, 6, seed=1)
    before = vectors.clone()
    product = linear.product(vectors)
    torch.testing.assert_close(product, vectors @ operator.matrix + damping * vectors)
    assert torch.equal(vectors, before)
    assert linear.matvecs == operator.products == rows


@pytest.mark.parametrize("batched", [False, True])
def test_product_gives_the_operator_the_shapes_of_the_parameters(batched):
    system = symmetric()
    rhs = [torch.stack([b, b]) for b in system.rhs] if batched else system.rhs
    seen = []

    def matvec(vectors):
        seen.append([v.shape for v in vectors])
        return system.matvec(vectors)

    linear = LinearSystem(matvec, rhs, 0.0, batched)
    rows = gaussian(2, 19)
    torch.testing.assert_close(linear.product(rows), rows @ system.matrix)
    assert seen == [[torch.Size(shape) for shape in SHAPES]] * 2


@pytest.mark.parametrize("batched_products", [True, False], ids=["batched", "loop"])
@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_product_of_no_rows(damping, batched_products):
    operator = Operator(torch.eye(4))
    linear = LinearSystem(
        operator if batched_products else loop_only(operator), [torch.ones(4)], damping, batched=False
    )
    assert linear.product(torch.ones(0, 4)).shape == (0, 4)
    assert operator.products == 0


def test_batched_products_are_of_so_many_rows_that_memory_is_bounded():
    seen = []

    class Recorded(Operator):
        def batched(self, vectors):
            seen.append(len(vectors[0]))
            return super().batched(vectors)

    linear = LinearSystem(Recorded(with_eigenvalues(torch.arange(100.0).double())), [gaussian(100)], 0.5, batched=False)
    rows = gaussian(97, 100)
    torch.testing.assert_close(linear.product(rows), rows @ linear.product(torch.eye(100, dtype=torch.float64)))
    assert max(seen) <= 32
    assert linear.matvecs == 197


def test_product_may_return_what_it_was_given():
    linear = LinearSystem(lambda v: v, [torch.ones(3), torch.ones(2)], 1.0, batched=False)
    rows = gaussian(1, 5, dtype=torch.float32)
    before = rows.clone()
    assert torch.equal(linear.product(rows), 2 * before)
    assert torch.equal(rows, before)


def test_product_has_no_graph():
    weight = torch.full((3,), 0.5, requires_grad=True)
    linear = LinearSystem(lambda v: [weight * v[0]], [torch.ones(3)], 0.0, batched=False)
    assert not linear.product(torch.ones(1, 3)).requires_grad


class Wrong(Operator):
    """`batched` drops the axis in front."""

    def batched(self, vectors):
        return [vectors[0][0]]


@pytest.mark.parametrize(
    ("matvec", "message"),
    [
        (lambda v: [v[0][:2], v[1]], r"torch.float32 \(2,\) for tensor 0, not torch.float32 \(4,\)"),
        (lambda v: [v[0], v[1][None]], r"\(1, 4\) for tensor 1"),
        (lambda v: [v[0], v[1].double()], r"torch.float64 \(4,\) for tensor 1, not torch.float32"),
        (lambda v: v[:1], "1 tensors for 2 parameters"),
    ],
)
def test_product_of_another_kind_is_named(matvec, message):
    linear = LinearSystem(matvec, [torch.ones(4), torch.ones(4)], 0.0, batched=False)
    with pytest.raises(RuntimeError, match=message):
        linear.product(torch.ones(1, 8))


def test_batched_product_without_its_axis_is_named():
    linear = LinearSystem(Wrong(torch.eye(4)), [torch.ones(4)], 0.0, batched=False)
    with pytest.raises(RuntimeError, match=r"\(4,\) for tensor 0, not torch.float32 \(4, 4\)"):
        linear.product(torch.ones(4, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_right_hand_side_must_be_finite(value):
    with pytest.raises(ValueError, match="rhs is not finite"):
        LinearSystem(lambda v: v, [torch.ones(3), torch.tensor(value)], 0.0, batched=False)


@pytest.mark.parametrize(
    ("rhs", "batched", "message"),
    [
        ([], False, "rhs is empty"),
        ([torch.ones(3), torch.ones(3).double()], False, "one floating dtype on one device, got torch.float32 on cpu"),
        ([torch.ones(3, dtype=torch.int64)], False, "one floating dtype .* torch.int64"),
        ([torch.ones(3, 2), torch.ones(2, 2)], True, r"one axis of right-hand sides .* \(3, 2\), \(2, 2\)"),
        ([torch.ones(3, 2), torch.ones(())], True, r"one axis of right-hand sides .* \(\)"),
        ([torch.ones(0, 2)], True, r"one axis of right-hand sides .* \(0, 2\)"),
    ],
)
def test_right_hand_side_is_checked(rhs, batched, message):
    with pytest.raises(ValueError, match=message):
        LinearSystem(lambda v: v, rhs, 0.0, batched)


def test_cut_and_flat_of_the_test_systems_are_inverse():
    vector = gaussian(19)
    assert torch.equal(flat(cut(vector)), vector)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_rows_with_matrices_of_their_own_are_multiplied_by_those(damping):
    matrices, rhs = gaussian(3, 4, 4), gaussian(3, 4, seed=5)
    operator = BlockOperator(lambda v: [(matrices @ v[0][..., None])[..., 0]], 3)
    linear = LinearSystem(operator, [rhs], damping, batched=True)
    wanted = (matrices @ rhs[..., None])[..., 0] + damping * rhs
    torch.testing.assert_close(linear.product(rhs), wanted)
    for index in ([2, 0], [1], []):
        rows = rhs[index]
        torch.testing.assert_close(linear.product(rows, torch.tensor(index, dtype=torch.long)), wanted[index])
    assert operator.products == 4


def test_the_system_of_the_transpose_has_the_same_right_hand_sides():
    operator, rhs = Operator(gaussian(4, 4)), gaussian(2, 4)
    linear = LinearSystem(operator, [rhs], 0.3, batched=True)
    assert linear.transposed is linear  # it does not say that it is not symmetric
    operator.symmetric, operator.transposed = False, Operator(operator.matrix.T)
    linear = LinearSystem(operator, [rhs], 0.3, batched=True)
    torch.testing.assert_close(linear.product(rhs), rhs @ operator.matrix.T + 0.3 * rhs)
    torch.testing.assert_close(linear.transposed.product(rhs), rhs @ operator.matrix + 0.3 * rhs)
    assert torch.equal(linear.transposed.rhs, linear.rhs)
    assert (linear.matvecs, linear.transposed.matvecs) == (2, 2)
