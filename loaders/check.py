"""What a loader promises, held against what it gave, before anything is built on it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.errors import UserError
from support.machine import check_memory


def check_loaded(loaded: Any, name: str, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """A loader's images, labels as int64 and class names; None for labels makes all of them 0: one class.

    Images are (N, C, H, W) uint8, not empty; labels are (N,) whole numbers from 0 on. How many classes there are is the
    training labels' to say, so that those leave no number out. Class names need not be given, which is no names: [];
    or there is a different one for each class. In place of labels there may be captions (N, L): numbers of words, and
    then padding, 0; the class names are the words then, and have to be given, for not all need to be used.

    Args:
        name: what the loader is of, for the error.

    Raises:
        UserError: for a promise not kept, with what was found.
    """

    def promise(kept: bool, wanted: str, found: str) -> None:
        if not kept:
            raise UserError(f"{name}, {'training' if train else 'test'} part: {wanted}; found {found}")

    given = isinstance(loaded, tuple | list) and len(loaded) in (2, 3)
    promise(given, "give a pair, images and labels, or those and class names", kind(loaded))
    images, labels, *names = loaded
    of_bytes = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.numel() > 0
    promise(of_bytes, "images must be a tensor (N, C, H, W) uint8, and not empty", kind(images))
    C, H, W = images.shape[1:]
    swapped = H != W and (C == H > W or C > 4 >= W)  # "squares" of C x H, or at most four columns
    promise(not swapped, "images seem to be (N, H, W, C); give images.permute(0, 3, 1, 2)", kind(images))
    if labels is None:
        labels = torch.zeros(len(images), dtype=torch.int64)
    whole = isinstance(labels, Tensor) and torch.can_cast(labels.dtype, torch.int64)
    shape = (len(images),)
    captions = whole and labels.ndim == 2 and labels.shape[1] > 0 and names not in ([], [[]])
    fits = whole and (labels[:, 0] if captions else labels).shape == shape
    promise(fits, f"labels must be a tensor {shape} of whole numbers, or None", kind(labels))
    labels = labels.long()
    there = labels.unique().tolist()
    span = f"{len(there)} different ones from {there[0]} to {there[-1]}"
    gapless = not train or captions or there[-1] < len(there)
    promise(there[0] >= 0 and gapless, "labels must be 0, 1, 2, ... without a gap", span)
    padded_after = not captions or not labels[:, 1:][labels[:, :-1] == 0].any()
    promise(padded_after, "labels of two dimensions are captions, whose padding, 0, is after their words", kind(labels))
    if not names or names == [[]]:
        return images, labels, []
    (names,) = names
    words = isinstance(names, tuple | list) and all(isinstance(name, str) and name.strip() for name in names)
    promise(words and len(set(names)) == len(names), "class names must be a list of different words", kind(names))
    enough = len(names) == there[-1] + 1 if train and not captions else len(names) > there[-1]
    promise(enough, f"there must be a class name for each label, 0 to {there[-1]}", f"{len(names)} of them")
    return images, labels, list(names)


def padded(images: Tensor, image_size: int | None, name: str) -> Tensor:
    """Images (N, C, H, W) with a black margin that makes squares of them, of image_size or as small as can be.

    Raises:
        UserError: if image_size is smaller than the images, or memory too small.
    """
    height, width = images.shape[2:]
    size = image_size or max(height, width)
    if size < max(height, width):
        raise UserError(f"image_size {size} is smaller than the {height} x {width} images of {name}")
    room = len(images) * images.shape[1] * size**2
    check_memory(room, f"{len(images):,} images of {size} x {size}", "try a smaller --image-size")
    left, top = (size - width) // 2, (size - height) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


def kind(value: Any) -> str:
    """What a value is, in words."""
    if not hasattr(value, "dtype"):
        return f"a {type(value).__name__}" + (f" of {len(value)}" if hasattr(value, "__len__") else "")
    return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}".replace("torch.", "")
