import pytest
import torch

from auxfast.experiments.report.plotting import draw_loss_images

figure_module = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = figure_module.Figure.savefig
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
    return figures


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_shows_the_image_its_losses_and_what_they_weigh(channels, drawn, tmp_path):
    images, losses, weights = torch.rand(2, channels, 5, 7), torch.rand(2, 3, 5, 7), torch.rand(2, 3, 5, 7)
    mask = torch.ones(2, 3, 5, 7)
    mask[0, 1, 2] = 0
    mask[:, 2] = 0  # nobody has this loss
    losses[0, 1, 2] = torch.nan
    draw_loss_images(tmp_path / "a.png", images, losses, weights, ("main", "depth", "normals"), mask)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    axes = [axis for axis in drawn[0].axes if axis.images]
    assert [axis.get_title() for axis in axes[:7]] == [
        *["image", "main loss", "depth loss", "normals loss"],
        *["weight of main", "weight of depth", "weight of normals"],
    ]
    pictures = [axis.images[0].get_array() for axis in axes]
    assert pictures[7].shape == ((5, 7) if channels == 1 else (5, 7, 3))
    torch.testing.assert_close(torch.tensor(pictures[8].data), losses[1, 0])
    torch.testing.assert_close(torch.tensor(pictures[4].data), 35 * weights[0, 0])  # 1 is that of a plain mean
    assert pictures[2].mask.tolist() == [[row == 2] * 7 for row in range(5)]
    assert pictures[3].mask.all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": torch.rand(2, 5, 7)}, r"losses must be \(batch, num_losses, H, W\), got \(2, 5, 7\)"),
        ({"images": torch.rand(2, 2, 5, 7)}, r"images must be \(2, 1 or 3, 5, 7\), got \(2, 2, 5, 7\)"),
        ({"images": torch.rand(2, 5, 7)}, r"images must be \(2, 1 or 3, 5, 7\), got \(2, 5, 7\)"),
        ({"weights": torch.rand(2, 2)}, r"weights must have the losses' shape \(2, 3, 5, 7\), got \(2, 2\)"),
        ({"mask": torch.rand(2, 1, 5, 7)}, r"mask must have the losses' shape \(2, 3, 5, 7\), got \(2, 1, 5, 7\)"),
        ({"loss_names": ("one",)}, "loss_names must be 3, got 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message, tmp_path):
    given = {"images": torch.rand(2, 3, 5, 7), "losses": torch.rand(2, 3, 5, 7), "weights": torch.rand(2, 3, 5, 7)}
    with pytest.raises(ValueError, match=message):
        draw_loss_images(tmp_path / "a.png", **{**given, "loss_names": ("a", "b", "c"), **changes})


def test_weights_that_are_all_alike_have_one_colour_in_all_rows(drawn, tmp_path):
    losses, weights = torch.rand(3, 2, 5, 7), torch.full((3, 2, 5, 7), 1 / 35)
    draw_loss_images(tmp_path / "a.png", torch.rand(3, 1, 5, 7), losses, weights, ("main", "depth"))
    of_depth = [axis.images[0] for axis in drawn[0].axes if axis.images][4::5]
    assert len({image.to_rgba(image.get_array()).tobytes() for image in of_depth}) == 1
    assert of_depth[0].get_clim() == pytest.approx((0.5, 1.5))
