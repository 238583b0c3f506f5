"""The scalar versions in docs/kernels against the kernels, in float64: values, gradients and second order; each
page's reading order, and its figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ops import combiner_cases, loss_image_cases
from ops.combiner_cases import assert_agree, derivatives, normal
from ops.test_neumann import neumann_step_
from pages import DOCS, ROOT, run
from torch import Tensor

from auxfast.ops.combiner import combiner
from auxfast.ops.krylov import linear_combination_, row_dots
from auxfast.ops.loss_image import loss_image
from auxfast.ops.network import CombinerNetwork, LossImageNetwork
from auxfast.solvers import ConjugateGradient, Neumann

COMBINER, LOSS_IMAGE, NEUMANN, KRYLOV = (
    run(DOCS / "kernels" / f"{page}.md") for page in ("combiner", "loss-image", "neumann", "krylov")
)
TOLERANCES = 1e-12, 2e-12  # relative to the largest entry: of values and gradients, and of second derivatives


def hide_some(losses: Tensor) -> Tensor:
    """A mask that keeps two thirds of the losses, and of the last sample or image none. What it hides becomes NaN."""
    mask = torch.rand(losses.shape, generator=torch.Generator().manual_seed(7)) < 2 / 3
    mask[-1] = False
    losses[~mask] = float("nan")
    return mask


def named(results: Sequence[Any]) -> dict[str, Tensor]:
    """A page's results as `derivatives` has them."""
    names = ("value", "weights", "phi", "hessian product", "mixed product")
    return {name: torch.as_tensor(np.array(result)) for name, result in zip(names, results, strict=True)}


# ----------------------------------------------------------------------------------------------------------- combiners

COMBINERS = [
    CombinerNetwork(1, (1,)),
    CombinerNetwork(3, (4, 2), main=0),
    CombinerNetwork(5, (2, 3, 4), main=4, reduction="sum"),
    CombinerNetwork(2, (3, 3), main=1, reduction="none"),
    CombinerNetwork(51, (5,)),
    CombinerNetwork(4, (3, 2), activation="identity", main=2),
    CombinerNetwork(3, (4, 2), bias=False, reduction="none"),
]


def scalar_combiner(network: CombinerNetwork, mask: Tensor, *given: Tensor) -> dict[str, Tensor]:
    losses, phi, grad, tangent = given
    parts = {name: part.tolist() for name, part in network.split(phi).items()}
    layers = [(parts[f"{i}.weight"], parts.get(f"{i}.bias", [0.0] * size)) for i, size in enumerate(network.hidden)]
    matrices = losses.tolist(), mask.tolist(), tangent.tolist()
    act, options = COMBINER[network.activation], (network.main, network.reduction)
    results = named(COMBINER["combiner"](*matrices, grad.tolist(), layers, parts["out.weight"], act, *options))
    if not network.bias:  # the page's layers always have biases: theirs are 0
        for name in ("phi", "mixed product"):
            every = replace(network, bias=True).split(results[name])
            results[name] = torch.cat([every[part].flatten() for part in network.shapes])
    return results


@pytest.mark.parametrize("masked", [False, True], ids=["all losses", "some losses"])
@pytest.mark.parametrize("network", COMBINERS, ids=combiner_cases.name)
def test_the_scalar_combiner_is_the_op(network, masked):
    given = combiner_cases.inputs(network, 3)
    mask = hide_some(given[0]) if masked else torch.ones_like(given[0], dtype=torch.bool)
    wanted = derivatives(lambda losses, phi: combiner(losses, phi, network, mask), *given)
    assert_agree(scalar_combiner(network, mask, *given), wanted, TOLERANCES)


# --------------------------------------------------------------------------------------------------------- loss images

LOSS_IMAGES = [
    (LossImageNetwork(1, (1,)), (1, 1)),
    (LossImageNetwork(2, (3, 2), main=0), (9, 13)),
    (LossImageNetwork(3, (2,), main=2, main_reduction="sum", reduction="sum"), (4, 3)),
    (LossImageNetwork(2, (2, 3), main=1, main_reduction="valid_mean", reduction="none"), (4, 6)),
    (LossImageNetwork(2, (2, 2, 2), reduction="none"), (9, 1)),
    (LossImageNetwork(2, (3, 2), activation="identity", main=1), (3, 5)),
]


def scalar_loss_image(network: LossImageNetwork, mask: Tensor, *given: Tensor) -> dict[str, Tensor]:
    losses, phi, grad, tangent = given
    parts = {name: part.numpy() for name, part in network.split(phi).items()}
    layers = [(parts[f"{i}.weight"], parts[f"{i}.bias"]) for i in range(len(network.channels))]
    images = losses.numpy(), mask.numpy(), tangent.numpy()
    act, options = LOSS_IMAGE[network.activation], (network.main, network.main_reduction, network.reduction)
    return named(LOSS_IMAGE["loss_image"](*images, grad.numpy(), layers, parts["out.weight"], act, *options))


@pytest.mark.parametrize("masked", [False, True], ids=["all pixels", "some pixels"])
@pytest.mark.parametrize(("network", "size"), LOSS_IMAGES, ids=[loss_image_cases.name(case[0]) for case in LOSS_IMAGES])
def test_the_scalar_loss_image_is_the_op(network, size, masked):
    given = loss_image_cases.inputs(network, 3, *size)
    mask = hide_some(given[0]) if masked else torch.ones_like(given[0], dtype=torch.bool)
    wanted = derivatives(lambda losses, phi: loss_image(losses, phi, network, mask), *given)
    assert_agree(scalar_loss_image(network, mask, *given), wanted, TOLERANCES)


# -------------------------------------------------------------------------------------------------- vectors in solvers


def tensor(numbers: Sequence[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def assert_close(actual: Tensor | float, wanted: Tensor | float, rtol: float = 1e-12) -> None:
    """Relative to the largest entry."""
    actual, wanted = (torch.as_tensor(each, dtype=torch.float64) for each in (actual, wanted))
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(actual, wanted, rtol=0, atol=rtol * largest)


def positive_definite(n: int) -> Tensor:
    """A symmetric matrix with eigenvalues between 1 and 3."""
    vectors, _ = torch.linalg.qr(normal(n, n))
    return vectors @ torch.linspace(1, 3, n).double().diag() @ vectors.T


def test_the_scalar_neumann_step_is_the_op():
    lists = [[normal(size, seed=seed + size) for size in (3, 1, 130, 0)] for seed in (0, 200, 400)]
    scalars = [[each.tolist() for each in tensors] for tensors in lists]
    squares = NEUMANN["neumann_step"](*scalars, 0.3)
    assert_close(neumann_step_(*lists, 0.3), squares)
    for tensors, rows in zip(lists, scalars, strict=True):
        for actual, wanted in zip(tensors, rows, strict=True):
            assert_close(actual, tensor(wanted))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_scalar_neumann_series_is_the_solver(steps):
    h, b = positive_definite(5), normal(5, seed=1)
    (solution,), stats = Neumann(steps=steps, step_size=0.4).solve(lambda v: [h @ v[0]], [b])
    (scalar,), _ = NEUMANN["neumann"](lambda v: [(h @ tensor(v[0])).tolist()], [b.tolist()], 0.4, steps)
    _, residuals = NEUMANN["neumann"](lambda v: [(h @ tensor(v[0])).tolist()], [b.tolist()], 0.4, steps + 1)
    assert_close(tensor(scalar), solution)
    assert_close(residuals[-1] / b.norm(), stats.residual)


def test_a_neumann_step_leaves_the_residual_of_the_solution_before_it():
    h, b = positive_definite(4), normal(4, seed=1)
    before, after = (
        NEUMANN["neumann"](lambda v: [(h @ tensor(v[0])).tolist()], [b.tolist()], 0.4, steps) for steps in (3, 4)
    )
    (solution,), (*_, residual) = before[0], after[1]
    assert_close(residual, (b - h @ tensor(solution)).norm())


def test_the_neumann_page_solves_its_own_system():
    assert NEUMANN["residuals"][-1] < 2e-8
    assert [[round(x, 6) for x in each] for each in NEUMANN["solution"]] == [[1, 1], [2]]


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_the_scalar_linear_combination_is_the_op(terms):
    out, *others = (normal(3, 5, seed=i) for i in range(1 + terms))
    coefficients = normal(1 + terms, 3, seed=9)
    coefficients[0, 1] = coefficients[1, 2] = 0  # what these operands hold does not matter
    out[1], others[0][2] = float("nan"), float("inf")
    scalar = out.tolist()
    squares = KRYLOV["linear_combination"](scalar, [term.tolist() for term in others], coefficients.tolist())
    assert_close(linear_combination_(out, others, coefficients), tensor(squares))
    assert_close(out, tensor(scalar))


def test_a_term_may_be_out_itself():
    out, coefficients = normal(2, 3), normal(2, 2, seed=1)
    scalar = out.tolist()
    KRYLOV["linear_combination"](scalar, [scalar], coefficients.tolist())
    linear_combination_(out, [out], coefficients)
    assert_close(out, tensor(scalar))


def test_the_scalar_dot_products_are_the_op():
    a, b = normal(4, 7), normal(4, 7, seed=1)
    assert_close(row_dots(a, b), tensor(KRYLOV["row_dots"](a.tolist(), b.tolist())))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_scalar_conjugate_gradients_are_the_solver(steps):
    h, b = positive_definite(4), normal(3, 4, seed=1)
    b[2] = 0  # a system that is solved before it begins
    (solution,), _ = ConjugateGradient(steps=steps, tol=None).solve(lambda v: [v[0] @ h], [b], batched=True)
    scalar, norms = KRYLOV["conjugate_gradients"](lambda row: (h @ tensor(row)).tolist(), b.tolist(), steps)
    assert_close(tensor(scalar), solution)
    residual = (b - tensor(scalar) @ h).norm(dim=1)
    torch.testing.assert_close(tensor(norms), residual, rtol=1e-9, atol=1e-13)
    if steps == len(h):
        assert residual.max() < 1e-12


# ------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("page", ["combiner", "loss-image", "neumann", "krylov"])
def test_the_reading_order_has_every_file_of_the_op(page):
    text = (DOCS / "kernels" / f"{page}.md").read_text()
    ((folder, rows),) = re.findall(r"^\| file in `([\w/]+)/` \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    listed = [name for row in rows.splitlines() for name in re.findall(r"`([\w.]+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(path.name for path in (ROOT / folder).iterdir())


@pytest.mark.parametrize("page", ["combiner", "loss-image", "neumann"])
def test_the_figures_are_those_of_the_benchmarks(page):
    _, measured = (DOCS / "kernels" / f"{page}.md").read_text().split("## Measured\n")
    (figures,) = re.findall(r"^\|[-|]+\n((?:\|.*\n)+)", measured, re.MULTILINE)
    assert figures in (DOCS / "benchmarks.md").read_text()
