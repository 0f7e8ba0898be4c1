"""A dataset by name, held in memory: images (N, C, H, W) uint8 and labels (N,) int64.

A loader is a function of (data_dir, train) that returns these two tensors; DATASETS maps names to loaders.
Batches are cut from the tensors by index and become floats in [-1, 1] on the device: see `normalize`.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loaders.glyphs import load_glyphs
from loaders.mnist import load_mnist
from support.errors import NotAvailable, UserError
from support.machine import check_memory

DATASETS = {"mnist": load_mnist, "glyphs": load_glyphs}


class Dataset(NamedTuple):
    """Images (N, C, H, W) uint8, squares perhaps padded from `size`, the height and width of the data; labels (N,)."""

    name: str
    images: Tensor
    labels: Tensor
    size: tuple[int, int]


def load_dataset(name: str, data_dir: str | Path, train: bool = True, image_size: int | None = None) -> Dataset:
    """A dataset by name; "auto" is mnist, or glyphs (said loudly) where MNIST cannot be had.

    Args:
        image_size: pad images with black to this size.

    Raises:
        UserError: for an unknown name, a damaged file, a loader that breaks its promise (see check), or an image_size
            smaller than the images.
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
    if labels is None:  # unlabelled: all of one class
        labels = torch.zeros(len(images), dtype=torch.int64)
    check(name, images, labels, train)
    height, width = images.shape[2:]
    size = image_size or max(height, width)
    if size < max(height, width):
        raise UserError(f"image_size {size} is smaller than the {height} x {width} images of {name}")
    room = len(images) * images.shape[1] * size**2
    check_memory(room, f"{len(images):,} images of {size} x {size}", "try a smaller --image-size")
    left, top = (size - width) // 2, (size - height) // 2
    images = F.pad(images, (left, size - width - left, top, size - height - top))
    return Dataset(name, images, labels.long(), (height, width))


def check(name: str, images: Any, labels: Any, train: bool) -> None:
    """UserError unless images are (N, C, H, W) uint8 and labels (N,) 0, 1, 2, ..., in training each of them."""

    def refuse(wanted: str, values: Any) -> None:
        found = " ".join(str(getattr(values, part, "")) for part in ("dtype", "shape"))
        raise UserError(f"dataset {name}: {wanted}; found {type(values).__name__} {found}")

    if not (isinstance(images, Tensor) and images.ndim == 4 and images.dtype == torch.uint8 and images.numel()):
        refuse("images must be a tensor (N, C, H, W) uint8, and not empty", images)
    if images.shape[3] <= 4 < images.shape[1]:
        refuse("images seem to be (N, H, W, C); give images.permute(0, 3, 1, 2)", images)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != images.shape[:1]:
        refuse(f"labels must be a tensor ({len(images)},) of whole numbers, or None", labels)
    there = labels.unique().tolist()
    if there[0] < 0 or (train and there[-1] >= len(there)):
        span = f"{len(there)} different ones from {there[0]} to {there[-1]}"
        raise UserError(f"dataset {name}: labels must be 0, 1, 2, ... with none left out; found {span}")


def normalize(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def denormalize(x: Tensor) -> Tensor:
    """float in [-1, 1], clipped to it -> uint8 in [0, 255]; UserError for what is no number, which would be black."""
    if not x.isfinite().all():
        raise UserError("the images have pixels that are not finite numbers; the weights are damaged or have diverged")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
