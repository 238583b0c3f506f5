import pytest
import torch

from auxfast.train import Batch, CombinerConfig, RunConfig, make_training_loss, parse_method
from auxfast.train.methods import COMBINER_LABELS, WEIGHTING_LABELS, Method
from auxfast.train.training_loss import CombinedLoss, main_loss, make_combiner, mean_losses
from train.problems import Noisy, NoisyOptions, OneWeight, train_config

SHAPES = {"samples": (6, 3), "pixels": (2, 3, 8, 8)}


def _training_loss(name: str, **combiner) -> CombinedLoss:
    torch.manual_seed(0)
    return CombinedLoss(make_combiner(parse_method(name), CombinerConfig(**combiner), 3, main=0))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("stl", Method("stl")),
        ("linear", Method("linear")),
        ("deep-linear", Method("deep-linear")),
        ("nonlinear-free", Method("nonlinear", monotone=False)),
        ("conv-frozen", Method("conv", phi="frozen")),
        ("polynomial-free-fixed", Method("polynomial", monotone=False, phi="fixed")),
        ("own", Method("own")),
        ("own-frozen", Method("own", phi="frozen")),
    ],
)
def test_a_method_has_a_name_that_is_parsed_back(name, method):
    assert parse_method(name) == method
    assert method.name == name
    assert method.holds_out == (name != "stl")
    assert method.learned == (name in ("linear", "deep-linear", "nonlinear-free", "own"))


@pytest.mark.parametrize(
    "name", ["", "line", "stl-frozen", "equal-free", "linear-frozen-free", "linear-fixed-frozen-x", "own-free"]
)
def test_other_names_are_refused_with_what_there_is(name):
    with pytest.raises(ValueError, match=rf"method: got {name!r}, must be one of stl, equal.*-free .*-frozen .*-fixed"):
        parse_method(name)


def test_labels_differ():
    endings = ("", "-free", "-frozen", "-free-fixed")
    names = [
        *WEIGHTING_LABELS,
        "own",
        "own-frozen",
        *(family + ending for family in COMBINER_LABELS for ending in endings),
    ]
    assert len({parse_method(name).label for name in names}) == len(names)


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("family", COMBINER_LABELS)
def test_combiners_start_with_the_auxiliaries_weight_they_are_told(family, skip, weight_norm):
    loss = _training_loss(family, initial_weight=0.3, skip=skip, weight_norm=weight_norm, positive="clip")
    main, *others = loss.mean_weights(Batch(torch.ones(1, 3, 64, 64), None))
    assert sum(others) / 2 == pytest.approx(0.3, rel=1e-4)
    if family in ("linear", "polynomial"):
        assert main == pytest.approx(1)
        assert others == pytest.approx([0.3, 0.3])
    else:
        assert main > skip


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("family", COMBINER_LABELS)
def test_logarithms_start_with_the_same_weights(family, skip, weight_norm):
    ones = Batch(torch.ones(1, 3, 64, 64), None)
    options = {"initial_weight": 0.3, "weight_norm": weight_norm, "skip": skip}
    plain = _training_loss(family, **options, positive="clip")
    loss = _training_loss(family, **options, positive="exp")
    main = 0.3 if skip and family in ("linear", "polynomial") else 0.0  # its second weight, which may grow
    assert loss.combiner.positive == "exp"
    weights, (plain_main, *others) = loss.mean_weights(ones), plain.mean_weights(ones)
    assert weights == pytest.approx([plain_main + main, *others], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("family", COMBINER_LABELS)
def test_combiners_that_are_not_monotone_have_no_logarithms(family):
    assert _training_loss(f"{family}-free", positive="exp").combiner.positive == "clip"


@pytest.mark.parametrize("family", COMBINER_LABELS)
def test_only_monotone_combiners_are_kept_monotone(family):
    for ending, lowest in (("", 0), ("-free", -1)):
        combiner = _training_loss(family + ending, positive="clip").combiner
        with torch.no_grad():
            combiner.phi.fill_(-1)
        combiner.project_()
        assert max(part.min() for name, part in combiner.layers().items() if "weight" in name) == lowest


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(
            (name, shape)
            for name in ("stl", "equal", "uncertainty", *COMBINER_LABELS)
            for shape in SHAPES
            if name != "conv"
        ),
        ("conv", "pixels"),
    ],
)
def test_what_a_mask_hides_plays_no_part(name, shape):
    losses, mask = torch.rand(SHAPES[shape]), (torch.rand(SHAPES[shape]) > 0.4).float()
    task = Noisy(0, NoisyOptions(), hold_out=True)
    values = []
    for hidden in (0.0, 1e6):
        torch.manual_seed(0)
        loss = make_training_loss(parse_method(name), RunConfig(train_config()), task)
        given = torch.where(mask.bool(), losses, hidden).requires_grad_()
        value = loss(given, mask)
        (gradient,) = torch.autograd.grad(value, given)
        assert (gradient[mask == 0] == 0).all()
        values.append(value.item())
    assert values[0] == values[1]


def test_a_combiner_of_samples_takes_pixels_for_samples():
    losses, mask = torch.rand(2, 3, 3, 4), torch.rand(2, 3, 3, 4) > 0.3
    loss = _training_loss("linear", initial_weight=0.2, positive="clip")
    present = losses * mask
    expected = present[:, 0].mean() + 0.2 * present[:, 1:].sum(dim=1).mean()
    torch.testing.assert_close(loss(losses, mask), expected)
    torch.testing.assert_close(mean_losses(losses, mask), present.mean(dim=(0, 2, 3)))


@pytest.mark.parametrize("shape", SHAPES)
def test_single_task_learning_is_a_combiner_without_weight_on_the_auxiliaries(shape):
    losses, mask = torch.rand(SHAPES[shape]), (torch.rand(SHAPES[shape]) > 0.4).float()
    stl = make_training_loss(parse_method("stl"), RunConfig(train_config()), Noisy(0, NoisyOptions(), hold_out=True))
    for given in (mask, None):
        torch.testing.assert_close(
            stl(losses, given), _training_loss("linear", initial_weight=0.0, positive="clip")(losses, given)
        )


def test_the_main_loss_is_a_mean_over_those_who_have_it():
    losses, mask = torch.rand(4, 2), torch.tensor([[1.0, 1], [0, 1], [1, 1], [0, 0]])
    assert main_loss(Batch(losses, mask), 0) == (losses[0, 0] + losses[2, 0]) / 2
    assert main_loss(Batch(losses, None), 1) == losses[:, 1].mean()


def test_a_weighting_has_its_options_from_the_configuration():
    task, config = (
        Noisy(0, NoisyOptions(), hold_out=True),
        RunConfig(train_config(), weighting={"equal": {"auxiliary_weight": 0.2}}),
    )
    loss = make_training_loss(parse_method("equal"), config, task)
    losses = torch.rand(5, 3)
    torch.testing.assert_close(loss(losses, None), losses.mean(0) @ torch.tensor([1.0, 0.2, 0.2]))
    assert loss.mean_weights(Batch(losses, None)) == pytest.approx((1.0, 0.2, 0.2))
    wrong = RunConfig(train_config(), weighting={"equal": {"weight": 0.2}})
    with pytest.raises(ValueError, match=r"weighting\.equal: got {'weight': 0\.2}: equal has no option 'weight'"):
        make_training_loss(parse_method("equal"), wrong, task)


def test_a_combiner_s_weight_decay_is_the_outer_optimizer_s():
    config = RunConfig(train_config(), CombinerConfig(weight_decay=5e-5, positive="clip"))
    (group,) = make_training_loss(parse_method("linear"), config, OneWeight()).parameter_groups()
    assert group["weight_decay"] == 5e-5
