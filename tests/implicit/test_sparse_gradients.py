"""Modules of embeddings with `sparse=True`: the same hypergradient as with dense gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import auxfast
from auxfast.solvers import MINRES, Dense, Nystrom

I = torch.tensor([0, 3, 3, 5])  # noqa: E741


class Embeddings:
    """Words are inner parameters, labels outer ones."""

    def __init__(self, sparse: bool) -> None:
        torch.manual_seed(0)
        self.words, self.labels = (nn.Embedding(6, size, sparse=sparse).double() for size in (3, 2))
        self.head, self.phi = nn.Linear(3, 2).double(), torch.zeros(4, dtype=torch.float64, requires_grad=True)
        self.inner_params = [*self.words.parameters(), *self.head.parameters()]

    def inner(self, with_outputs: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        z = self.head(self.words(I).tanh())
        decay = self.head.weight.square().sum() + self.words(I).square().sum()
        loss = (self.phi.exp() * (z - self.labels(I)).square().sum(1)).sum() + 0.1 * decay
        return (loss, z) if with_outputs else loss

    def outer(self) -> Tensor:
        return self.head(self.words(I[:3])).square().sum() + self.labels(I[2:]).square().sum()


@pytest.mark.parametrize("solver", [Dense(damping=0.1), MINRES(damping=0.1), Nystrom(damping=0.1)])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton", "finite-difference"])
def test_hypergradients_of_sparse_embeddings(curvature, count, solver):
    found = []
    for sparse in (False, True):
        case = Embeddings(sparse)
        inner = (lambda case=case: case.inner(True)) if curvature == "gauss-newton" else case.inner
        outer_params = [case.phi, case.labels.weight]
        losses = [case.outer] * count, [inner] * count
        options = {"curvature": curvature, "solver": solver, "warn": False}
        found.append(auxfast.hypergradient(*losses, case.inner_params, outer_params, **options).grads)
    torch.testing.assert_close(found[1], found[0])


def test_a_loss_that_is_sparse_everywhere():
    words, decay = nn.Embedding(5, 2, sparse=True), torch.zeros(1, requires_grad=True)
    outer, inner = (lambda: words(I[:2]).sum()), (lambda: decay.exp() * (words(I[:2]) - 1).square().sum())
    grads = auxfast.hypergradient(outer, inner, words.parameters(), [decay]).grads
    torch.testing.assert_close(grads[0], (1 - words(I[:2])).sum().detach().reshape(1))


def test_usefulness_of_sparse_embeddings():
    scores = []
    for sparse in (False, True):
        case = Embeddings(sparse)
        aux = [case.words(I).sum(), case.head(case.words(I)).square().sum()]
        losses = case.outer(), case.inner(), aux
        scores.append(auxfast.auxiliary_usefulness(*losses, case.inner_params, solver=Dense(damping=0.1)).scores)
    torch.testing.assert_close(scores[1], scores[0])


@pytest.mark.parametrize("as_function", [False, True])
def test_a_dense_and_a_sparse_gradient_of_one_parameter_are_refused_with_the_remedy(as_function):
    words, decay = nn.Embedding(5, 2, sparse=True), torch.zeros(1, requires_grad=True)

    def inner() -> Tensor:
        return decay.exp() * words.weight.square().sum() + (words(I[:2]) - 1).square().sum()

    loss = inner if as_function else inner()
    with pytest.raises(RuntimeError, match=r"^inner_loss has a sparse and a dense gradient .* sparse=False"):
        auxfast.hypergradient(lambda: words(I[:2]).sum(), loss, words.parameters(), [decay])
