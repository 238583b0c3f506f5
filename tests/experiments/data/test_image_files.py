import struct

import numpy as np
import pytest
import torch

from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.image_files import ImageFiles, check_image_files
from tests.experiments.data.fixtures import write_jpeg

Image = pytest.importorskip("PIL.Image")

COLOUR = (200, 100, 50)


def photograph(path, colour=COLOUR):
    """A JPEG of one colour, 30 x 20 pixels, that ends with two bytes 255, 217."""
    write_jpeg(path, np.full((20, 30, 3), colour, dtype=np.uint8))
    return path


def test_images_come_in_the_order_asked_for_and_in_the_size_asked_for(tmp_path):
    images = ImageFiles([photograph(tmp_path / f"{k}.jpg", (40 * k, 0, 0)) for k in range(4)], size=8)
    batch = images[torch.tensor([3, 1, 3])]
    assert len(images) == 4
    assert batch.dtype == torch.uint8
    assert batch.shape == (3, 3, 8, 8)
    assert batch[:, 0].float().mean(dim=(1, 2)).tolist() == pytest.approx([120, 40, 120], abs=3)
    assert images[torch.tensor([], dtype=torch.int64)].shape == (0, 3, 8, 8)


def test_an_image_is_decoded_once(tmp_path):
    path = photograph(tmp_path / "a.jpg")
    images = ImageFiles([path], size=8)
    first = images[torch.tensor([0])]
    path.unlink()
    assert torch.equal(images[torch.tensor([0, 0])], first.expand(2, -1, -1, -1))


@pytest.mark.parametrize("rows", [torch.tensor([True, False]), torch.tensor(1), torch.tensor([[0]])])
def test_rows_that_are_a_mask_or_of_another_shape_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match=r"rows: got shape .*; must be \(k,\), torch.int64"):
        ImageFiles([photograph(tmp_path / f"{k}.jpg") for k in range(2)])[rows]


def test_the_aspect_ratio_is_not_kept(tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = 255
    write_jpeg(tmp_path / "a.jpg", pixels)
    image = ImageFiles([tmp_path / "a.jpg"], size=10)[torch.tensor([0])][0, 0].float()
    assert image[:, :4].max() < 20
    assert image[:, 6:].min() > 235


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "transparent palette"])
def test_images_of_other_modes_become_red_green_blue(tmp_path, mode):
    image = Image.new("RGB", (6, 6), COLOUR)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "transparent palette":
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2).save(path, transparency=bytes([255, 0]))
    else:
        image.convert(mode, **({"palette": Image.Palette.ADAPTIVE} if mode == "P" else {})).save(path)
    pixels = ImageFiles([path], size=4)[torch.tensor([0])][0].float().mean(dim=(1, 2)).tolist()
    if mode in ("L", "1"):
        assert pixels[0] == pixels[1] == pixels[2]
    else:
        assert pixels == pytest.approx(COLOUR, abs=4)


def test_a_missing_image_is_named_before_any_is_decoded(tmp_path):
    there, missing = photograph(tmp_path / "a.jpg"), tmp_path / "b.jpg"
    with pytest.raises(DatasetError, match=rf"^{missing}: no such file; of 3 images, 2 are missing"):
        ImageFiles([there, missing, tmp_path / "c.jpg"])


def test_a_truncated_image_is_named_when_it_is_asked_for(tmp_path):
    path = photograph(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DatasetError, match=rf"^{path}: .*, expected a whole image that Pillow can decode"):
        ImageFiles([path])[torch.tensor([0])]


def test_whole_files_pass_the_check_also_under_a_wrong_name_and_with_an_unusual_end(tmp_path):
    padded, stamped = photograph(tmp_path / "padded.jpg"), photograph(tmp_path / "stamped.jpg")
    padded.write_bytes(padded.read_bytes() + bytes(100))
    stamped.write_bytes(stamped.read_bytes() + b"some camera's remark")
    Image.new("L", (5, 5)).save(tmp_path / "in truth a gif.jpg", format="GIF")
    Image.new("L", (5, 5)).save(tmp_path / "in truth a png.jpg", format="PNG")
    check_image_files(sorted(tmp_path.iterdir()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "0 bytes, expected an image"),
        (lambda content: content[:-40], "expected a whole image"),
        (lambda content: b"<html>not found</html>", "expected a whole image"),
        (lambda content: bytes(len(content)), "expected a whole image"),
    ],
)
def test_damaged_files_do_not_pass_the_check(tmp_path, damage, message):
    path = photograph(tmp_path / "a.jpg")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError, match=rf"^{path}: .*{message}"):
        check_image_files([path])


def test_a_damaged_png_does_not_pass_the_check(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 40), COLOUR).save(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DatasetError, match=rf"^{path}: "):
        check_image_files([path])


def test_an_image_of_absurd_size_is_refused(tmp_path):
    """Pillow takes such a file for an attack: a few bytes that fill the memory."""
    path = tmp_path / "a.bmp"
    Image.new("L", (4, 4)).save(path)
    content = bytearray(path.read_bytes())
    content[18:26] = struct.pack("<2i", 100_000, 100_000)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"^{path}: .*, expected a whole image"):
        check_image_files([path])
