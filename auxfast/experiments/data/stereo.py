"""scikit-image's motorcycle: a photograph of a garage, and the disparity that a stereo rig measured for its pixels.

The left view of a pair of the Middlebury benchmark (Scharstein et al., "High-resolution stereo datasets with
subpixel-accurate ground truth", GCPR 2014), reduced by scikit-image. Comes with scikit-image: nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from auxfast.experiments.data.checks import check_array
from auxfast.experiments.data.extras import MissingExtraError, import_extra

_SHAPE = (500, 741)
_FILES = ("motorcycle_left.png", "motorcycle_right.png", "motorcycle_disp.npz")
_LARGEST_DISPARITY = 64.0

COLOUR_CLASSES = ("grey", "brown", "red")
UNKNOWN = -100  # F.cross_entropy ignores this label


@dataclass(frozen=True)
class StereoData:
    """image: (3, H, W) float32 in [0, 1], red, green, blue. disparity: (H, W) float32, in pixels of the full-size
    image, 0 where unknown; inversely proportional to depth. valid: (H, W) bool, where the disparity is known."""

    image: Tensor
    disparity: Tensor
    valid: Tensor

    def halved(self) -> StereoData:
        """The data at half the resolution: means of 2 x 2 pixels, whose disparity is known if that of all four is."""
        image, disparity = F.avg_pool2d(self.image, 2), F.avg_pool2d(self.disparity[None], 2)[0]
        valid = F.avg_pool2d(self.valid[None].float(), 2)[0] == 1
        return StereoData(image, disparity.where(valid, 0.0), valid)

    def colour_classes(self) -> Tensor:
        """(H, W) int64: the class of each pixel in `COLOUR_CLASSES`; UNKNOWN for pixels that are too dark to tell and
        for the few of another colour.

        Grey (concrete, metal, rubber) is a saturation below 0.35; of the others, a hue within 15 degrees of red is
        red (paint), up to 70 brown (wood, cardboard). Too dark is a value below 0.15.
        """
        red, green, blue = self.image
        value, smallest = self.image.amax(dim=0), self.image.amin(dim=0)
        grey = value - smallest < 0.35 * value
        hue = torch.rad2deg(torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue))  # -180 to 180; 0 is red
        classes = torch.full(value.shape, UNKNOWN)
        classes[(hue >= 15) & (hue < 70)] = 1
        classes[hue.abs() < 15] = 2
        classes[grey] = 0
        classes[value < 0.15] = UNKNOWN
        return classes


def load_stereo() -> StereoData:
    """Reads the pair's left view and its disparity, which are installed with scikit-image.

    Raises:
        MissingExtraError: scikit-image is not installed, or without these files.
        ValueError: the data are not what this reader knows (shapes, ranges, a share of unknown disparities below 10%).
    """
    module = import_extra("skimage.data", "scikit-image")
    folder = Path(str(module.__file__)).parent
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:  # asking scikit-image for them would start a download
        raise MissingExtraError(f"this scikit-image comes without {', '.join(missing)} in {folder}: try another one")
    image, _, disparity = module.stereo_motorcycle()
    image, disparity = np.asarray(image), np.asarray(disparity)
    check_array("stereo image", image, shape=(*_SHAPE, 3), low=0, high=255, whole=True)
    valid = disparity != np.inf
    check_array("stereo disparity", np.where(valid, disparity, 0), shape=_SHAPE, low=0, high=_LARGEST_DISPARITY)
    if (share := 1 - valid.mean()) >= 0.1:
        raise ValueError(f"stereo disparity: {share:.0%} are unknown, expected less than 10%")
    return StereoData(
        torch.tensor(image / 255, dtype=torch.float32).movedim(-1, 0).contiguous(),
        torch.tensor(np.where(valid, disparity, 0), dtype=torch.float32),
        torch.tensor(valid),
    )
