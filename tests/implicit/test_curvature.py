"""Products with second derivatives against the matrices themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from auxfast.implicit.curvature import Curvature


def problem() -> tuple[Curvature, list[Tensor], list[Tensor], Tensor, Tensor]:
    """inner = sum(exp(u)^T M v) + phi . v^2 / 2 with W = (u, v); also its Hessian and d grad / d phi."""
    generator = torch.Generator().manual_seed(0)
    u, v, phi = (torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for n in (3, 4, 4))
    m = torch.randn(3, 4, generator=generator, dtype=torch.float64)

    def inner(u: Tensor, v: Tensor, phi: Tensor) -> Tensor:
        return u.exp() @ m @ v + 0.5 * (phi * v.square()).sum()

    blocks = torch.autograd.functional.hessian(inner, (u.detach(), v.detach(), phi.detach()))
    hessian = torch.cat([torch.cat(blocks[i][:2], dim=1) for i in range(2)])
    mixed = torch.cat([blocks[i][2] for i in range(2)])
    grads = torch.autograd.grad(inner(u, v, phi), [u, v], create_graph=True)
    return Curvature(grads, [u, v]), [u, v], [phi], hessian, mixed


def test_matvec():
    curvature, _, _, hessian, _ = problem()
    for column, unit in zip(hessian.T, torch.eye(7, dtype=torch.float64), strict=True):
        product = curvature.matvec(unit.split([3, 4]))
        torch.testing.assert_close(torch.cat(product), column)
        assert not any(t.requires_grad for t in product)


def test_mixed():
    curvature, _, phi, _, mixed = problem()
    q = torch.arange(7, dtype=torch.float64)
    unused = torch.ones(2, requires_grad=True)
    products = curvature.mixed(q.split([3, 4]), [unused, *phi], retain_graph=False)
    assert products[0] is None
    torch.testing.assert_close(products[1], q @ mixed)
    assert curvature.mixed(q.split([3, 4]), [], retain_graph=False) == []


def test_a_parameter_without_curvature_has_a_zero_product():
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    grads = torch.autograd.grad((w * phi).sum(), [w], create_graph=True)
    assert torch.equal(Curvature(grads, [w]).matvec([torch.ones(3)])[0], torch.zeros(3))
