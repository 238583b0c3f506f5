"""The label generator: soft labels over the auxiliary classes of each sample's main class, differentiable twice."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

from auxfast.nn import LabelGenerator, focal_loss, negative_entropy, soft_cross_entropy

HIERARCHY = (3, 1, 2)
OWNERS = torch.tensor([0, 0, 0, 1, 2, 2])


def generator(**settings):
    torch.manual_seed(0)
    return LabelGenerator(nn.Linear(4, 6), HIERARCHY, **settings).double()


INPUTS = torch.linspace(-2, 3, 28, dtype=torch.float64).view(7, 4)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2])


def test_labels_are_a_softmax_over_the_classes_of_the_main_class():
    made = generator(temperature=0.7)
    soft_labels = made(INPUTS, LABELS)
    for row, logits, label in zip(soft_labels, made.backbone(INPUTS) / 0.7, LABELS, strict=True):
        own = label == OWNERS
        torch.testing.assert_close(row[own], logits[own].softmax(0))
        assert not row[~own].any()
    assert made.num_auxiliary == 6


def test_points_have_labels_of_their_own_or_of_their_object():
    points = LabelGenerator(nn.Conv1d(3, 6, 1), HIERARCHY)
    clouds = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    of_object = points(clouds, torch.tensor([2, 0]))
    of_points = points(clouds, torch.tensor([[2] * 5, [0] * 5]))
    assert of_object.shape == (2, 6, 5)
    assert torch.equal(of_object, of_points)
    torch.testing.assert_close(of_object.sum(dim=1), torch.ones(2, 5))
    assert not of_object[0, OWNERS != 2].any()


@pytest.mark.parametrize(
    "loss", [soft_cross_entropy, focal_loss, partial(focal_loss, gamma=1), partial(focal_loss, gamma=3.5)]
)
def test_first_and_second_derivatives_are_right(loss):
    made = generator(temperature=1.5)
    logits = torch.linspace(-1, 2, 42, dtype=torch.float64).view(7, 6).requires_grad_()

    def total(weight, logits):
        soft_labels = torch.func.functional_call(made, {"backbone.weight": weight}, (INPUTS, LABELS))
        return loss(logits, soft_labels).square().sum() + negative_entropy(soft_labels)

    assert gradcheck(total, (made.backbone.weight, logits))
    assert gradgradcheck(total, (made.backbone.weight, logits))


def test_gradients_of_each_sample_come_from_vmap():
    made = generator()
    phi = {name: value.detach() for name, value in made.named_parameters()}

    def first_label(phi, row, label):
        return functional_call(made, phi, (row[None], label[None]))[0, 0]

    together = vmap(grad(first_label), in_dims=(None, 0, 0))(phi, INPUTS, LABELS)
    for i, (row, label) in enumerate(zip(INPUTS, LABELS, strict=True)):
        alone = torch.autograd.grad(made(row[None], label[None])[0, 0], made.parameters())
        torch.testing.assert_close([together[name][i] for name, _ in made.named_parameters()], list(alone))


def test_labels_out_of_range_are_nan_where_they_are_not_read():
    made = generator()
    soft_labels = vmap(lambda row, label: made(row[None], label[None])[0])(INPUTS, LABELS - 1)
    assert torch.equal(soft_labels.isnan().all(dim=1), LABELS == 0)
    torch.testing.assert_close(soft_labels[LABELS > 0], made(INPUTS[LABELS > 0], LABELS[LABELS > 0] - 1))


@pytest.mark.slow
def test_torch_compile_takes_it_as_one_graph():
    made = generator()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    assert torch.equal(compiled(INPUTS, LABELS), made(INPUTS, LABELS))


@pytest.mark.parametrize("assign", [True, False])
def test_a_generator_made_without_memory_is_filled_by_a_state_dict(assign):
    made = generator()
    with torch.device("meta"):
        empty = LabelGenerator(nn.Linear(4, 6), HIERARCHY).double()
        assert empty(INPUTS.to("meta"), LABELS.to("meta")).shape == (7, 6)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(made.state_dict(), assign=assign)
    assert torch.equal(empty(INPUTS, LABELS), made(INPUTS, LABELS))
    assert torch.equal(deepcopy(empty)(INPUTS, LABELS), made(INPUTS, LABELS))


def test_the_hierarchy_may_be_an_array():
    for hierarchy in (np.array(HIERARCHY), torch.tensor(HIERARCHY), [np.int64(size) for size in HIERARCHY]):
        assert LabelGenerator(nn.Linear(4, 6), hierarchy).hierarchy == HIERARCHY


def test_losses_are_those_of_their_formulas():
    logits, soft_labels = torch.randn(5, 6, 2, generator=torch.Generator().manual_seed(0)), torch.rand(5, 6, 2)
    p = logits.softmax(dim=1)
    torch.testing.assert_close(soft_cross_entropy(logits, soft_labels), -(soft_labels * p.log()).sum(1))
    expected = -(soft_labels * (1 - p) ** 2 * p.log()).sum(1)
    torch.testing.assert_close(focal_loss(logits, soft_labels), expected)
    torch.testing.assert_close(focal_loss(logits, soft_labels, gamma=0), soft_cross_entropy(logits, soft_labels))
    target = torch.randint(6, (5, 2), generator=torch.Generator().manual_seed(1))
    one_hot = nn.functional.one_hot(target, 6).movedim(-1, 1).float()
    expected = nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, one_hot), expected)


def test_a_student_that_is_sure_has_finite_second_derivatives():
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    for loss in (soft_cross_entropy, focal_loss):
        for label in torch.eye(3)[:, None]:
            (gradient,) = torch.autograd.grad(loss(logits, label).sum(), logits, create_graph=True)
            (second,) = torch.autograd.grad(gradient.square().sum() + gradient.sum(), logits)
            assert gradient.isfinite().all()
            assert second.isfinite().all()


def test_the_entropy_is_lowest_where_labels_spread():
    spread, collapsed = torch.eye(4), torch.eye(4)[[0, 0, 0, 0]]
    assert negative_entropy(spread).item() == pytest.approx(-torch.tensor(4.0).log().item())
    assert negative_entropy(collapsed) == 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LabelGenerator(len, [2]), TypeError, "backbone must be a torch.nn.Module, not a builtin"),
        (lambda: LabelGenerator(nn.Linear(1, 2), 2), TypeError, "hierarchy must be a list of ints, one for each"),
        (lambda: LabelGenerator(nn.Linear(1, 2), [1.5]), TypeError, r"hierarchy must be a list of ints.*got \[1.5\]"),
        (lambda: LabelGenerator(nn.Linear(1, 2), None), TypeError, "hierarchy must be a list of ints.*got None"),
        (lambda: LabelGenerator(nn.Linear(1, 2), [2, 0]), ValueError, r"at least one class.*got \[2, 0\]"),
        (lambda: LabelGenerator(nn.Linear(1, 2), []), ValueError, r"at least one class.*got \[\]"),
        (lambda: generator(temperature=0.0), ValueError, "temperature must be a finite number above 0, got 0.0"),
        (lambda: generator(temperature="1"), TypeError, "temperature must be a number, not a str"),
        (lambda: LabelGenerator(nn.LSTM(4, 6), [6])(INPUTS.float(), LABELS), TypeError, "logits, got a tuple"),
        (lambda: generator()(INPUTS, LABELS[:, None]), ValueError, r"have the shape \(7,\), got \(7, 1\)"),
        (lambda: generator()(INPUTS, LABELS.to("meta")), RuntimeError, "labels are on meta and the backbone's output"),
        (
            lambda: negative_entropy(torch.ones(3)),
            ValueError,
            r"soft_labels must be \(batch, classes, ...\), got \(3,\)",
        ),
        (
            lambda: generator()(INPUTS, LABELS.double()),
            TypeError,
            "labels must be a tensor of int64, got torch.float64",
        ),
        (lambda: generator()(INPUTS, LABELS[:5]), ValueError, r"labels must have the shape \(7,\).*got \(5,\)"),
        (lambda: generator()(INPUTS, LABELS - 1), ValueError, "main classes from 0 to 2, got some from -1 to 1"),
        (lambda: generator()(INPUTS, LABELS + 1), ValueError, "main classes from 0 to 2, got some from 1 to 3"),
        (
            lambda: LabelGenerator(nn.Linear(4, 5), HIERARCHY)(INPUTS.float(), LABELS),
            ValueError,
            r"backbone must return \(batch, 6, ...\).*got \(7, 5\)",
        ),
        (
            lambda: soft_cross_entropy(torch.ones(2, 3), torch.ones(2, 4)),
            ValueError,
            r"same shape.*\(2, 3\) and \(2, 4\)",
        ),
        (lambda: focal_loss(torch.ones(2, 3), torch.ones(2, 3), gamma=0.5), ValueError, "gamma must be 0, 1.*got 0.5"),
    ],
)
def test_errors_name_what_was_given(make, error, words):
    with pytest.raises(error, match=words):
        make()
