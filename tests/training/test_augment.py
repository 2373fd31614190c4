import numpy as np
import pytest
import torch

from torchtower.training.augment import Distortions, centre, distort
from torchtower.training.chance import generator_for


def _standardized(crop):
    """Write tf.image.per_image_standardization by hand, in float64."""
    crop = crop.astype(np.float64)
    return (crop - crop.mean()) / max(crop.std(), 1 / np.sqrt(crop.size))


def _images(batch, size, channels=3):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, size, size, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _candidates(image, size):
    """Yield every crop of an image, and every mirrored one, as (top, left, flipped, pixels)."""
    for top in range(image.shape[0] - size + 1):
        for left in range(image.shape[1] - size + 1):
            crop = image[top : top + size, left : left + size]
            yield top, left, False, crop
            yield top, left, True, crop[:, ::-1]


def test_a_batch_holds_crops_of_its_own_images_at_all_places_and_both_ways_round():
    images = _images(200, 6)
    batch = distort(images, Distortions(4, flip=True), generator_for("test", 0, 0))
    seen = set()
    for image, result in zip(images.numpy(), batch.permute(0, 2, 3, 1).numpy(), strict=True):
        matches = [
            (top, left, flipped)
            for top, left, flipped, crop in _candidates(image, 4)
            if np.allclose(_standardized(crop), result, atol=1e-5)
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 18


def test_padding_lets_a_crop_move_beyond_the_border():
    images = torch.full((64, 4, 4, 1), 200, dtype=torch.uint8)
    batch = distort(images, Distortions(4, padding=1), generator_for("test", 0, 0))
    assert len({int(count) for count in (batch < 0).sum((1, 2, 3))}) > 1


def test_contrast_spreads_each_channel_about_its_own_mean():
    image = torch.zeros(2, 2, 2, 2, dtype=torch.uint8)
    image[..., 0] = torch.tensor([[100, 140], [100, 140]])
    image[..., 1] = 20
    doubled = distort(image, Distortions(2, contrast=(2.0, 2.0)), generator_for("test", 0, 0))
    expected = np.stack([np.array([[80, 160], [80, 160]]), np.full((2, 2), 20)])
    np.testing.assert_allclose(doubled[0].numpy(), _standardized(expected), atol=1e-5)


def test_brightness_is_undone_by_standardisation():
    images, same = _images(8, 4), generator_for("test", 0, 0).get_state()
    results = []
    for delta in (0.0, 63.0):
        generator = torch.Generator()
        generator.set_state(same)
        results.append(distort(images, Distortions(4, max_brightness_delta=delta), generator))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_evaluation_takes_the_middle():
    images = _images(3, 32)
    batch = centre(images, Distortions(24))
    expected = np.stack([_standardized(image[4:28, 4:28]) for image in images.numpy()])
    np.testing.assert_allclose(batch.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_a_flat_image_becomes_zero_not_nan():
    flat = torch.full((1, 8, 8, 3), 17, dtype=torch.uint8)
    assert torch.equal(centre(flat, Distortions(8)), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("make", [centre, lambda *args: distort(*args, generator_for("t", 0, 0))])
def test_batches_are_channels_last_in_memory(make):
    batch = make(_images(4, 8), Distortions(6))
    assert batch.is_contiguous(memory_format=torch.channels_last) and batch.dtype == torch.float32


def test_chance_depends_on_purpose_seed_and_index_and_on_nothing_else():
    def draw(*key):
        torch.rand(3)
        return torch.rand(4, generator=generator_for(*key)).tolist()

    assert draw("order", 1, 2) == draw("order", 1, 2)
    keys = [("order", 1, 2), ("distortions", 1, 2), ("order", 2, 2), ("order", 1, 3)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
