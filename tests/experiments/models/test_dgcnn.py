import pytest
import torch

from auxfast.experiments.models import DGCNN

from .networks import parameters, unfilled


def _small(*outputs, **options):
    return DGCNN(*outputs, **{"neighbours": 4, "width": 4, "embedding": 8, **options})


def test_dgcnn_has_the_parameters_of_the_segmentation_network_without_the_objects_label():
    # The published network has 1,460,361: 17,536 of them for the label, and no bias in the last of its layers (50).
    assert parameters(unfilled(DGCNN, 50)) == 1_442_875 == 1_460_361 - 17_536 + 50


def test_a_layer_sees_each_point_beside_its_nearest_ones():
    model = _small(3).eval()
    points = torch.randn(2, 3, 9)
    seen = []
    model.backbone.edges[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(points)  # the predicted matrix is the identity at first
    for shape in range(2):
        for i in range(9):
            here = points[shape, :, i]
            nearest = sorted(range(9), key=lambda j: float((points[shape, :, j] - here).norm()))[:4]
            ways = torch.stack([points[shape, :, j] - here for j in nearest], dim=1)
            torch.testing.assert_close(seen[0][shape, :3, i], ways)
            torch.testing.assert_close(seen[0][shape, 3:, i], here[:, None].expand(3, 4))


def test_predictions_move_with_the_points_and_the_order_of_points_does_not_matter():
    model = _small(3).eval().double()
    points, order = torch.randn(2, 3, 12, dtype=torch.float64), torch.randperm(12)
    torch.testing.assert_close(model(points[:, :, order]), model(points)[:, :, order])


def test_a_batch_may_be_empty():
    assert _small(3).eval()(torch.empty(0, 3, 9)).shape == (0, 3, 9)


def test_both_heads_share_the_features():
    model = _small(3, 5)
    outputs = model(torch.randn(2, 3, 10))
    assert outputs.shape == (2, 8, 10)
    outputs[:, 3:].sum().backward()
    assert all(p.grad is not None for part in (model.backbone, model.auxiliary) for p in part.parameters())
    assert not any(p.grad.any() for p in model.main.parameters())


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 4, 9), (3, 9)])
def test_other_shapes_and_fewer_points_than_neighbours_are_refused(shape):
    with pytest.raises(ValueError, match=r"points: got shape .*at least 4 points, the number of neighbours"):
        _small(2)(torch.randn(shape))
