"""Images in files, decoded when they are asked for, and a quick look at whether such files are whole."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from auxfast.experiments.data.checks import row_numbers
from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.data.files import DatasetError

PAPER_SIZE = 256  # pixels a side to which the paper's B.1 resizes photographs

# Formats that the sets of photographs hold, some under a wrong file name: how a file begins, and how it ends.
_FORMATS = (
    (b"\xff\xd8\xff", b"\xff\xd9"),  # JPEG
    (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"),
    (b"GIF8", b";"),
)
_TAIL = 1024  # bytes at the end that are looked at; some writers pad a file with zeros


class ImageFiles:
    """Images (n, 3, size, size), uint8, red, green, blue: an `ImageSource` of files that Pillow reads.

    A batch is decoded when it is asked for, on as many threads as torch has, and kept: a second epoch decodes nothing.
    An image that is kept takes 3 * size * size bytes, 192 KiB at size 256: 3.2 GB for 16,185 photographs.

    Grey, palette and CMYK images become RGB, transparency is dropped. Resizing is bilinear over all pixels that a new
    one covers, and does not keep the aspect ratio, as in the paper (B.1).

    Args:
        paths: the files.
        size: width and height of the images, in pixels.

    Raises:
        DatasetError: a file does not exist; when images are asked for, Pillow cannot decode one.
        MissingExtraError: Pillow is not installed.
    """

    def __init__(self, paths: Sequence[Path], size: int = PAPER_SIZE) -> None:
        import_extra("PIL.Image", "pillow")  # is missed here, and not after hours of training
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise DatasetError(f"{missing[0]}: no such file; of {len(paths)} images, {len(missing)} are missing")
        self._paths = tuple(paths)
        self._size = size
        self._decoded: dict[int, Tensor] = {}

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in the order of the images."""
        return self._paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Images (k, 3, size, size), uint8. rows: (k,) int64."""
        numbers = row_numbers(rows)
        new = [number for number in dict.fromkeys(numbers) if number not in self._decoded]
        if new:
            with ThreadPoolExecutor(min(len(new), torch.get_num_threads())) as pool:
                images = pool.map(lambda number: _decode(self._paths[number], self._size), new)
                self._decoded.update(zip(new, images, strict=True))
        if not numbers:
            return torch.empty(0, 3, self._size, self._size, dtype=torch.uint8)
        return torch.stack([self._decoded[number] for number in numbers])


def check_image_files(paths: Sequence[Path]) -> None:
    """Checks that image files are there and whole by how they begin and end, thousands in a second.

    Real copies hold images that end in an unusual way and decode all the same: one that looks wrong is decoded.

    Raises:
        DatasetError: a file is missing, empty, or looks wrong and does not decode.
        MissingExtraError: a file looks wrong, and Pillow is not installed.
    """
    for path in paths:
        if not _looks_whole(path):
            _decode(path, size=1)


def _looks_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(8)
            length = file.seek(0, 2)
            file.seek(max(0, length - _TAIL))
            tail = file.read()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}, expected an image") from error
    if not length:
        raise DatasetError(f"{path}: 0 bytes, expected an image")
    return any(head.startswith(begin) and tail.rstrip(b"\0").endswith(end) for begin, end in _FORMATS)


def _decode(path: Path, size: int) -> Tensor:
    """The image (3, size, size), uint8, in a file."""
    pillow = import_extra("PIL.Image", "pillow")
    # What Pillow raises for damaged files depends on their format and on where the damage is.
    errors = (OSError, SyntaxError, ValueError, EOFError, struct.error, pillow.DecompressionBombError)
    try:
        with pillow.open(path) as image:
            if "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns where a palette loses it in one step
            pixels = np.array(image.convert("RGB").resize((size, size), pillow.Resampling.BILINEAR))
    except errors as error:
        raise DatasetError(f"{path}: {error}, expected a whole image that Pillow can decode") from error
    return torch.from_numpy(pixels).movedim(-1, 0).contiguous()
