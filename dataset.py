"""A dataset by name, held in memory: images (N, C, H, W) uint8 and labels (N,) int64.

A loader is a function of (data_dir, train) that returns these two tensors; DATASETS maps names to loaders.
Batches are cut from the tensors by index and become floats in [-1, 1] on the device: see `normalize`.
"""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import NotAvailable, UserError
from loaders.glyphs import load_glyphs
from loaders.mnist import load_mnist

DATASETS = {"mnist": load_mnist, "glyphs": load_glyphs}


class Dataset(NamedTuple):
    """A dataset's name, its images (N, C, H, W) uint8 and its labels (N,) int64."""

    name: str
    images: Tensor
    labels: Tensor


def load_dataset(name: str, data_dir: str, train: bool = True, image_size: int | None = None) -> Dataset:
    """A dataset by name; "auto" is mnist, or glyphs (said loudly) where MNIST cannot be had.

    Args:
        image_size: pad images with black to this size.

    Raises:
        UserError: for an unknown name, a damaged file, or an image_size smaller than the images.
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
    images, labels = DATASETS[name](data_dir, train)
    if images.ndim != 4 or images.dtype != torch.uint8 or labels.shape != images.shape[:1]:
        raise UserError(f"dataset {name}: its images must be (N, C, H, W) uint8 and its labels (N,)")
    height, width = images.shape[2:]
    size = image_size or max(height, width)
    if size < max(height, width):
        raise UserError(f"image_size {size} is smaller than the {height} x {width} images of {name}")
    left, top = (size - width) // 2, (size - height) // 2
    images = F.pad(images, (left, size - width - left, top, size - height - top))
    return Dataset(name, images, labels.long())


def normalize(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def denormalize(x: Tensor) -> Tensor:
    """float in [-1, 1], clipped to it -> uint8 in [0, 255]."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
