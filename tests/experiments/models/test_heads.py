import pytest
import torch

from auxfast.experiments.models import ConvNet, ResNet8, TwoHeads

from .networks import parameters


def test_main_logits_come_first_and_heads_are_linear():
    backbone = ResNet8(width=2)
    model = TwoHeads(backbone, backbone.num_features, 3, 5).eval()
    images = torch.randn(4, 3, 8, 8)
    logits = model(images)
    assert logits.shape == (4, 8)
    torch.testing.assert_close(logits[:, :3], model.main(backbone(images)))
    torch.testing.assert_close(logits[:, 3:], model.auxiliary(backbone(images)))
    assert parameters(model) - parameters(backbone) == (8 + 1) * (3 + 5)


def test_hidden_heads_are_two_layers():
    model = TwoHeads(ConvNet(width=4), 4, 37, 185, hidden=512)
    assert parameters(model) - parameters(model.backbone) == 2 * (4 + 1) * 512 + (512 + 1) * (37 + 185)


def test_a_loss_reaches_the_backbone_and_its_own_head():
    model = TwoHeads(ConvNet(width=4), 4, 2, 3)
    model(torch.randn(2, 3, 8, 8))[:, :2].sum().backward()
    assert all(p.grad is not None for part in (model.backbone, model.main) for p in part.parameters())
    assert not any(p.grad.any() for p in model.auxiliary.parameters())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 2, 2), "num_features: got 0"), ((4, 0, 2), "num_main: got 0"), ((4, 2, 2, 0), "hidden: got 0, must be 1")],
)
def test_sizes_below_one_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        TwoHeads(ConvNet(width=4), *sizes)
