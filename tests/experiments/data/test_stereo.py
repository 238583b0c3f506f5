import sys

import numpy as np
import pytest
import torch

from auxfast.experiments.data import StereoData, load_stereo
from auxfast.experiments.data.extras import MissingExtraError
from auxfast.experiments.data.stereo import UNKNOWN

skimage_data = pytest.importorskip("skimage.data")


def test_stereo_is_what_scikit_image_has():
    data = load_stereo()
    assert data.image.shape == (3, 500, 741)
    assert data.image.min() >= 0
    assert 0.9 < data.image.max() <= 1
    assert data.disparity.dtype == torch.float32
    assert data.disparity.shape == data.valid.shape == (500, 741)
    assert (~data.valid).float().mean().item() == pytest.approx(0.0735, abs=1e-4)
    assert (data.disparity[~data.valid] == 0).all()
    assert 7 < data.disparity[data.valid].min() < data.disparity.max() < 60
    assert data.disparity[450].median() > data.disparity[50].median()  # the floor is nearer than the wall


def test_nothing_is_unknown_by_halves():
    image = torch.arange(48.0).view(3, 4, 4)
    disparity = torch.tensor([[1.0, 3, 4, 0], [5, 7, 4, 4], [0, 0, 2, 2], [0, 0, 2, 2]])
    half = StereoData(image, disparity, disparity > 0).halved()
    assert half.image[0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert half.valid.tolist() == [[True, False], [False, True]]
    assert half.disparity.tolist() == [[4, 0], [0, 2]]


def test_colours_by_hand():
    colours = {
        (0.5, 0.5, 0.5): 0,
        (0.5, 0.4, 0.35): 0,
        (0.6, 0.4, 0.2): 1,
        (0.8, 0.1, 0.1): 2,
        (0.8, 0.1, 0.15): 2,
        (0.1, 0.02, 0.02): UNKNOWN,  # too dark
        (0.1, 0.2, 0.8): UNKNOWN,  # blue
        (0.1, 0.8, 0.2): UNKNOWN,
    }
    image = torch.tensor(list(colours)).T[:, None]  # (3, 1, colours)
    blank = torch.zeros(1, len(colours))
    assert StereoData(image, blank, blank.bool()).colour_classes()[0].tolist() == list(colours.values())


def test_most_pixels_of_the_motorcycle_have_a_class():
    classes = load_stereo().colour_classes()
    shares = [(classes == k).float().mean().item() for k in range(3)]
    assert shares[0] > shares[1] > shares[2] > 0.05
    assert sum(shares) > 0.85


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, disparity: (image[:400], disparity), r"stereo image: shape \(400, 741, 3\), expected \(500,"),
        (lambda image, disparity: (image, disparity[:, :9]), r"stereo disparity: shape \(500, 9\), expected \(500,"),
        (lambda image, disparity: (image, 0 * disparity), r"stereo disparity: nan at .*, expected finite numbers"),
        (lambda image, disparity: (image, np.full_like(disparity, np.inf)), "stereo disparity: 100% are unknown"),
        (lambda image, disparity: (image, disparity + 9), r"stereo disparity: 6.* at .*, expected .* from 0 to 64"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0 * inf
def test_stereo_that_is_not_as_known_is_refused(monkeypatch, change, message):
    left, right, disparity = skimage_data.stereo_motorcycle()
    image, disparity = change(left, disparity)
    monkeypatch.setattr(skimage_data, "stereo_motorcycle", lambda: (image, right, disparity))
    with pytest.raises(ValueError, match=message):
        load_stereo()


def test_without_scikit_image_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "skimage.data")
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(MissingExtraError, match=r"scikit-image is not installed.*pip install scikit-image$"):
        load_stereo()


def test_a_scikit_image_without_the_files_is_not_asked_to_download_them(monkeypatch, tmp_path):
    monkeypatch.setattr(skimage_data, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(skimage_data, "stereo_motorcycle", lambda: pytest.fail("asked"))
    with pytest.raises(MissingExtraError, match=r"comes without motorcycle_left\.png, motorcycle_right\.png, .*\.npz"):
        load_stereo()
