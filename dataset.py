"""A dataset by name, held in memory: images (N, C, H, W) uint8 and labels (N,) int64.

A loader is a function of (data_dir, train) that returns these two tensors, of the training or the test part, with None
for the labels where there are none; DATASETS maps names to loaders.
Batches are cut from the tensors by index and become floats in [-1, 1] on the device: see `normalize`.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loaders.check import check_loaded
from loaders.glyphs import load_glyphs
from loaders.mnist import load_fashion, load_kmnist, load_mnist
from support.errors import NotAvailable, UserError
from support.machine import check_memory

DATASETS = {"mnist": load_mnist, "fashion": load_fashion, "kmnist": load_kmnist, "glyphs": load_glyphs}


class Dataset(NamedTuple):
    """Images (N, C, H, W) uint8, squares perhaps padded from `size`, the height and width of the data; labels (N,)."""

    name: str
    images: Tensor
    labels: Tensor
    size: tuple[int, int]

    @property
    def num_classes(self) -> int:
        """How many classes there are, which is the training part's to say."""
        return int(self.labels.max()) + 1


def load_dataset(name: str, data_dir: str | Path, train: bool = True, image_size: int | None = None) -> Dataset:
    """A dataset by name; "auto" is mnist, or glyphs (said loudly) where MNIST cannot be had.

    Args:
        image_size: pad images with black to this size.

    Raises:
        UserError: for an unknown name, a damaged file, for what a loader must not give (see loaders/check.py), or an
            image_size smaller than the images.
        NotAvailable: for a dataset asked for by name that cannot be had.
    """
    if name == "auto":
        try:
            return load_dataset("mnist", data_dir, train, image_size)
        except NotAvailable as error:
            print(f"\n*** {error}\n*** Going on with --dataset glyphs: digits drawn from fonts.\n", file=sys.stderr)
            name = "glyphs"
    if name not in DATASETS:
        raise UserError(f"dataset {name!r} is not one of auto, {', '.join(DATASETS)}")
    images, labels, _ = check_loaded(DATASETS[name](data_dir, train), f"dataset {name}", train)
    height, width = images.shape[2:]
    size = image_size or max(height, width)
    if size < max(height, width):
        raise UserError(f"image_size {size} is smaller than the {height} x {width} images of {name}")
    room = len(images) * images.shape[1] * size**2
    check_memory(room, f"{len(images):,} images of {size} x {size}", "try a smaller --image-size")
    left, top = (size - width) // 2, (size - height) // 2
    images = F.pad(images, (left, size - width - left, top, size - height - top))
    return Dataset(name, images, labels, (height, width))


def normalize(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def denormalize(x: Tensor) -> Tensor:
    """float in [-1, 1], clipped to it -> uint8 in [0, 255]; UserError for what is no number, which would be black."""
    if not x.isfinite().all():
        raise UserError("the images have pixels that are not finite numbers; the weights are damaged or have diverged")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
