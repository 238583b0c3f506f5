"""Stored images become inputs: cropped, mirrored and normalised, by what the given generator draws."""

import numpy as np
import pytest
import torch

from auxfast.experiments.paper.preparation import Preparation, channel_statistics


def _images(count=5, side=8):
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _windows(image, crop, padding, flip):
    """All inputs that an image could give, each as a tuple."""
    image = np.pad(image.numpy() / np.float32(255), ((0, 0), (padding, padding), (padding, padding)))
    places = range(image.shape[1] - crop + 1)
    cuts = [image[:, top : top + crop, left : left + crop] for top in places for left in places]
    return {tuple(cut.ravel()) for cut in cuts + [cut[:, :, ::-1] for cut in cuts if flip]}


def test_without_a_generator_it_is_the_middle_with_mean_0_and_deviation_1():
    images = _images()
    inputs = Preparation((0.5, 0.0, 0.25), (0.5, 1.0, 2.0), crop=4, padding=3, flip=True)(images, None)
    middle = images[:, :, 2:6, 2:6].float() / 255
    expected = torch.stack([(middle[:, 0] - 0.5) / 0.5, middle[:, 1], (middle[:, 2] - 0.25) / 2], dim=1)
    torch.testing.assert_close(inputs, expected)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (2, False), (2, True)])
def test_with_a_generator_each_image_is_a_window_of_its_own(padding, flip):
    images = _images(40)
    prepare = Preparation((0.0,) * 3, (1.0,) * 3, crop=6, padding=padding, flip=flip)
    inputs = prepare(images, torch.Generator().manual_seed(1))
    for image, made in zip(images, inputs, strict=True):
        assert tuple(made.numpy().ravel()) in _windows(image, 6, padding, flip)
    mirrored = [
        tuple(made.numpy().ravel()) not in _windows(image, 6, padding, False)
        for image, made in zip(images, inputs, strict=True)
    ]
    assert (8 < sum(mirrored) < 32) if flip else not any(mirrored)


def test_the_generator_alone_decides_what_is_drawn():
    images, state = _images(), torch.get_rng_state()
    prepare = Preparation((0.0,) * 3, (1.0,) * 3, crop=5, padding=1, flip=True)
    first, again = (prepare(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, prepare(images, torch.Generator().manual_seed(4)))
    assert torch.equal(torch.get_rng_state(), state)


def test_images_that_are_too_small_are_told():
    with pytest.raises(ValueError, match="crop: got 9, must be at most the images' 8 pixels"):
        Preparation((0.0,) * 3, (1.0,) * 3, crop=9)(_images(), None)


def test_channel_statistics_are_those_of_all_pixels():
    images, rows = _images(700), torch.arange(100, 700)
    mean, deviation = channel_statistics(images, rows)
    pixels = images[rows].double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(dim=1).tolist())
    assert deviation == pytest.approx(pixels.std(dim=1, correction=0).tolist())
