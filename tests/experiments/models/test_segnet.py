import pytest
import torch

from auxfast.experiments.models import SegNet

from .networks import parameters, unfilled

NARROW = (4, 4, 6, 8, 8)


def test_segnet_has_the_parameters_of_mtans_split_baseline():
    # The figure was read off MTAN's own network, and the outputs agreed to the last bit with its weights in this one.
    model = unfilled(SegNet, [13, 1, 3])
    assert parameters(model) == 25_055_185
    convolutions = [value for name, value in model.named_parameters() if value.dim() == 4 and "heads" not in name]
    assert len(convolutions) == 2 * 13


@pytest.mark.parametrize("size", [(32, 64), (33, 47), (63, 32)])
def test_predictions_are_one_a_task_and_as_large_as_the_images(size):
    model = SegNet([5, 1, 3], widths=NARROW)
    predictions = model(torch.randn(2, 3, *size))
    assert [tuple(p.shape) for p in predictions] == [(2, channels, *size) for channels in (5, 1, 3)]


def test_the_decoder_puts_pixels_where_the_encoder_found_the_largest():
    model = SegNet([1], widths=NARROW).eval()
    seen = []
    model.encoder[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.decoder[4].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(torch.randn(1, 3, 33, 32))
    found, placed = seen
    largest = found == torch.nn.functional.interpolate(
        torch.nn.functional.max_pool2d(found, 2), size=(32, 32)
    ).repeat_interleave(torch.tensor([1] * 31 + [2]), dim=2)
    assert placed.shape == found.shape
    assert not placed[~largest].any()
    assert not placed[:, :, 32].any()
    assert placed.any()


def test_a_tasks_loss_reaches_what_is_shared_and_its_own_head_alone():
    model = SegNet([2, 1], widths=NARROW)
    model(torch.randn(2, 3, 32, 32))[1].sum().backward()
    assert all(p.grad is not None for part in (model.encoder, model.decoder, model.heads[1]) for p in part.parameters())
    assert all(p.grad is None for p in model.heads[0].parameters())


def test_wrong_widths_and_small_images_are_refused():
    with pytest.raises(ValueError, match=r"widths: got \[4, 4\], must be 5"):
        SegNet([1], widths=(4, 4))
    with pytest.raises(ValueError, match=r"images: got shape \(1, 3, 31, 40\)"):
        SegNet([1], widths=NARROW)(torch.randn(1, 3, 31, 40))
