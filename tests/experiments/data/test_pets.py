import pytest
import torch

from auxfast.experiments.data.files import DatasetError
from auxfast.experiments.data.pets import load_pets
from tests.experiments.data.fixtures import BREEDS, write_pets

Image = pytest.importorskip("PIL.Image")


def test_pets_are_what_the_lists_say(tmp_path):
    data = load_pets(write_pets(tmp_path, 3, 2, classes=4), size=16)
    assert len(data.images) == 20
    assert data.class_names == tuple(BREEDS[:4])
    assert data.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2
    assert data.labels.dtype == torch.int64
    assert data.is_test.tolist() == [False] * 12 + [True] * 8
    with Image.open(tmp_path / "images" / "american_bulldog_2.jpg") as image:
        mean = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(-1, 3).float().mean(dim=0)
    batch = data.images[torch.tensor([4])]
    assert batch.shape == (1, 3, 16, 16)
    torch.testing.assert_close(batch[0].float().mean(dim=(1, 2)), mean, rtol=0, atol=2)


def test_folders_that_hold_the_copy_or_hold_themselves_do_as_well(tmp_path):
    folder = write_pets(tmp_path / "oxford-iiit-pet", 1, 1, classes=3)
    assert len(load_pets(tmp_path).images) == 6
    for name in ("images", "annotations"):
        (folder / name).rename(folder / "moved")
        (folder / name).mkdir()
        (folder / "moved").rename(folder / name / name)
    assert len(load_pets(tmp_path).images) == 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Abyssinian_1 38 1 1", r"expected name, class \(1 to 37\)"),
        ("Abyssinian_1 0 1 1", r"expected name, class \(1 to 37\)"),
        ("Abyssinian_1 one 1 1", r"expected name, class \(1 to 37\)"),
        ("Abyssinian_1 1 3 1", r"species \(1 or 2\)"),
        ("Abyssinian_1 1 1", "expected name"),
        ("", "expected name"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = write_pets(tmp_path, 1, 1, classes=3) / "annotations" / "test.txt"
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DatasetError, match=rf"^{path}, line 4: '{line}', .*{message}"):
        load_pets(tmp_path)


def test_a_breed_with_another_class_is_refused(tmp_path):
    path = write_pets(tmp_path, 1, 1, classes=3) / "annotations" / "test.txt"
    path.write_text("Abyssinian_2 2 1 1\n")
    message = "class 2 of Abyssinian_2, expected that of Abyssinian, not of american_bulldog"
    with pytest.raises(DatasetError, match=rf"^{path}: {message}"):
        load_pets(tmp_path)


def test_a_class_without_images_is_refused(tmp_path):
    path = write_pets(tmp_path, 1, 1, classes=3) / "annotations"
    for name in ("trainval.txt", "test.txt"):
        lines = (path / name).read_text().splitlines(keepends=True)
        (path / name).write_text("".join(line for line in lines if "bulldog" not in line))
    with pytest.raises(DatasetError, match=rf"^{path}: no image of class 2, expected some of each from 1 to 3"):
        load_pets(tmp_path)


def test_an_empty_list_is_refused(tmp_path):
    path = write_pets(tmp_path, 1, 1, classes=3) / "annotations" / "trainval.txt"
    path.write_text("")
    with pytest.raises(DatasetError, match=rf"^{path}: no labels, expected at least one"):
        load_pets(tmp_path)


def test_a_missing_file_and_a_wrong_folder_are_named(tmp_path):
    write_pets(tmp_path, 1, 1, classes=3)
    (tmp_path / "images" / "american_bulldog_1.jpg").unlink()
    with pytest.raises(DatasetError, match=r"american_bulldog_1\.jpg: no such file; of 6 images, 1 are missing"):
        load_pets(tmp_path)
    (tmp_path / "annotations" / "test.txt").unlink()
    with pytest.raises(DatasetError, match=r"test\.txt: no such file, expected in a copy of Oxford-IIIT Pet"):
        load_pets(tmp_path)
    with pytest.raises(DatasetError, match="no such folder, expected one with Oxford-IIIT Pet"):
        load_pets(tmp_path / "elsewhere")
