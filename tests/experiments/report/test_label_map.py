import pytest
import torch

from auxfast.experiments.report.label_map import LabelledImages, draw_label_maps

pytest.importorskip("sklearn")
figure_module = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure,
        "savefig",
        lambda self, path, **options: (figures.append(self), save(self, path, **options)),
    )
    return figures


def _images(soft_labels, name="bag"):
    return LabelledImages(name, torch.ones(len(soft_labels), 3, 4), soft_labels)


def test_a_map_has_the_images_in_frames_of_their_likeliest_class(drawn, tmp_path):
    soft_labels = torch.eye(2).repeat_interleave(torch.tensor([3, 9]), dim=0)
    draw_label_maps(tmp_path / "a.svg", [_images(soft_labels), _images(soft_labels, "shirt")])
    assert "<svg" in (tmp_path / "a.svg").read_text()
    left, right = drawn[0].axes
    assert (left.get_title("left"), right.get_title("left")) == ("bag", "shirt")
    assert [text.get_text() for text in left.texts] == ["■ 25%", "■ 75%"]
    pixels = torch.tensor(left.images[0].get_array()).flatten(0, 1)
    black = (pixels == 0).all(dim=1).sum()
    assert 0 < black <= 12 * 3 * 4
    assert black % 12 == 0  # whole images


def test_labels_that_are_all_the_same_have_a_map_too(tmp_path):
    draw_label_maps(tmp_path / "a.svg", [_images(torch.full((8, 5), 0.2))])
    assert (tmp_path / "a.svg").exists()


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match=r"got \(5, 3, 4\) and \(4, 2\)"):
        LabelledImages("bag", torch.ones(5, 3, 4), torch.ones(4, 2))
    with pytest.raises(ValueError, match="4 or more for a map, got 3"):
        _images(torch.ones(3, 2))
