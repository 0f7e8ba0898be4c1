"""A dataset by name, folder or file: images (N, C, H, W) uint8, labels (N,) int64 and the names of the classes.

Digits and their like are arrays in memory, from a loader in DATASETS: a function of (data_dir, train). Anything else is
image files: a source lists them, and loaders/packing.py brings them to one size and packs them into one array on disk.
Either way a batch is cut out by index and becomes floats in [-1, 1]: see `Dataset.draw`.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from loaders.check import check_loaded, padded
from loaders.glyphs import load_glyphs
from loaders.latents import draw_latents
from loaders.mnist import load_fashion, load_kmnist, load_mnist
from loaders.scenes import load_scenes
from loaders.sources import full_name, load_packed
from support.errors import NotAvailable, UserError
from support.machine import free_memory

DATASETS = {"mnist": load_mnist, "fashion": load_fashion, "kmnist": load_kmnist, "glyphs": load_glyphs}
DATASETS |= {"scenes": load_scenes}


class Dataset(NamedTuple):
    """Images (N, C, H, W) uint8, which are squares, labels (N,); `size` is their height and width before padding.

    In place of labels there may be captions (N, L): numbers of words, which class_names are then; 0 is padding.
    Of an autoencoder's latents: `images` are means and deviations, see loaders/latents.py.
    """

    name: str
    images: Tensor
    labels: Tensor
    size: tuple[int, int]
    class_names: tuple[str, ...] | None = None
    about: dict[str, Any] | None = None  # what the pack says of itself; None for an array in memory
    latents: dict[str, Any] | None = None  # how they are drawn: draw_latents' scale and shift, and their `deviation`

    @property
    def num_classes(self) -> int:
        """How many classes, or words, there are, of a training part: a test part may lack the last ones."""
        return int(self.labels.max()) + 1 if self.labels.ndim == 1 else len(self.class_names)

    @property
    def caption_length(self) -> int | None:
        """L, where the labels are captions (N, L): numbers of words, whose names are class_names."""
        return self.labels.shape[1] if self.labels.ndim == 2 else None

    @property
    def channels(self) -> int:
        """Of an image, or of a latent as it is drawn."""
        return self.images.shape[1] // (2 if self.latents and self.latents["deviation"] else 1)

    def to(self, device: torch.device) -> "Dataset":
        """The same with its images on a GPU, if they take at most half of what is free there; the labels always."""
        fits = device.type == "cpu" or 2 * self.images.nbytes <= free_memory(device)
        return self._replace(images=self.images.to(device) if fits else self.images, labels=self.labels.to(device))

    def draw(
        self, index: Tensor, mirrored: Tensor | None, generator: Generator, part: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """x_0 (B, C, H, W) and labels (B,) at index (B,), on its device; some mirrored (B,), by their columns.

        Of the batch only `part` is fetched, though what is random is drawn for all of it.
        """
        own, noise = index[part], None
        if self.latents is not None:  # which are mirrored before they are encoded: a second half of as many
            moments = self.fetch(own if mirrored is None else own + len(self.labels) * mirrored[part])
            if self.latents["deviation"]:
                shape = (len(index), self.channels, *moments.shape[2:])
                noise = torch.randn(shape, generator=generator, device=generator.device)[part]
            x0 = draw_latents(moments, noise, self.latents["scale"], self.latents["shift"])
        else:
            x0 = normalize(self.fetch(own))
            x0 = x0 if mirrored is None else torch.where(mirrored[part].view(-1, 1, 1, 1), x0.flip(-1), x0)
        return x0, self.labels[own]

    def fetch(self, index: Tensor) -> Tensor:
        """The images at index (B,), on its device; where that is CUDA's, copied to it without waiting."""
        images = self.images[index.to(self.images.device)]
        if index.device.type == "cuda" and images.device.type == "cpu":
            return images.pin_memory().to(index.device, non_blocking=True)
        return images.to(index.device)


def load_dataset(
    name: str, data_dir: str | Path, train: bool = True, image_size: int | None = None, skip_damaged: bool = False
) -> Dataset:
    """A dataset by name, "hf:NAME", folder or .zip; "auto" is mnist, or glyphs (said loudly) where that cannot be had.

    Args:
        image_size: bring images to this size; those of arrays are padded with black instead.
        skip_damaged: leave out image files that cannot be read, and list them.

    Raises:
        UserError: for an unknown name, a damaged file, for what a loader must not give (see loaders/check.py), or an
            image_size smaller than the images of an array.
        NotAvailable: for a dataset asked for by name that cannot be had.
    """
    if name == "auto":
        try:
            return load_dataset("mnist", data_dir, train, image_size)
        except NotAvailable as error:
            print(f"\n*** {error}\n*** Going on with --dataset glyphs: digits drawn from fonts.\n", file=sys.stderr)
            name = "glyphs"
    name, about = full_name(name, ("auto", *DATASETS)), None
    if name == "scenes" and image_size and image_size % 2:
        raise UserError(f"image_size {image_size} is not even, as that of scenes must be; try {image_size + 1}")
    if name in DATASETS:
        loaded = DATASETS[name](data_dir, train)
    else:
        *loaded, about = load_packed(name, Path(data_dir), train, image_size, skip_damaged)
    images, labels, class_names = check_loaded(loaded, f"dataset {name}", train)
    size = tuple(images.shape[2:])
    if about is None:
        images = padded(images, image_size, name)
    return Dataset(name, images, labels, size, tuple(class_names) or None, about)


def normalize(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def denormalize(x: Tensor) -> Tensor:
    """float in [-1, 1], clipped to it -> uint8 in [0, 255]; UserError for what is no number, which would be black."""
    if not x.isfinite().all():
        raise UserError("the images have pixels that are not finite numbers; the weights are damaged or have diverged")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
