import numpy as np
import pytest
import torch
from PIL import Image

from loaders.packing import Source, bring_to_size, pack


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(2) if bands == 1 else pixels, mode)


def source_of(*images, labels=None, class_names=(), key="key") -> Source:
    """A source of images in memory; what is no image is raised."""

    def open_image(i: int) -> Image.Image:
        if isinstance(images[i], Exception):
            raise images[i]
        return images[i].copy()

    labels = [0] * len(images) if labels is None else labels
    names = [f"{i}.png" for i in range(len(images))]
    return Source("pictures", list(class_names), labels, names, key, open_image)


def center_crop_arr(image: Image.Image, size: int) -> np.ndarray:
    """What the published code of ADM and DiT does to an image, as they describe it."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(64, 64), (32, 32), (31, 57), (300, 129), (128, 127), (65, 640), (7, 9), (1, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_are_brought_to_size_as_the_paper_does_it(shape, mode):
    image = noise(*shape, mode)
    assert np.array_equal(np.array(bring_to_size(image, 32)), center_crop_arr(image, 32))


def test_what_is_packed_is_what_was_there(tmp_path):
    images = [noise(32, 32, seed=i) for i in range(50)]
    labels = [i % 3 for i in range(50)]
    folder = tmp_path / "packed" / "train"
    found = pack(source_of(*images, labels=labels, class_names="abc"), folder, None)
    assert found.images.shape == (50, 3, 32, 32) and found.images.dtype == torch.uint8
    assert all(np.array_equal(found.images[i].permute(1, 2, 0), images[i]) for i in range(50))
    assert found.labels.tolist() == labels and found.labels.dtype == torch.int64
    assert found.class_names == ["a", "b", "c"] and found.about["image_size"] == 32
    assert {path.name for path in folder.iterdir()} == {"images.npy", "labels.npy", "pack.json"}
    assert list(folder.parent.iterdir()) == [folder]
