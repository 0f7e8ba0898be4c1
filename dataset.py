"""A dataset by name, held in memory: images (N, C, H, W) uint8 and labels (N,) int64.

A loader is a function of (data_dir, train) that returns these two tensors; DATASETS maps names to loaders.
Batches are cut from the tensors by index and become floats in [-1, 1] on the device: see `normalize`.
"""

import socket
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import calculate_md5

from checkpoint import load_file, save_file
from config import UserError
from glyphs import draw_glyphs


class NotAvailable(UserError):
    """A dataset that is neither on disk nor to be downloaded."""


MNIST_FILES = {  # MD5 of the uncompressed originals
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_mnist(data_dir: str, train: bool) -> tuple[Tensor, Tensor]:
    """The 60,000 training or 10,000 test digits of MNIST (LeCun et al., 1998), downloaded where they are not.

    Raises:
        UserError: if a file is damaged, naming it.
        NotAvailable: if MNIST is neither in data_dir nor to be downloaded.
    """
    folder = Path(data_dir) / "MNIST" / "raw"
    for name, md5 in MNIST_FILES.items():
        if (folder / name).exists() and calculate_md5(folder / name) != md5:
            raise UserError(f"{folder / name} is damaged (its MD5 is not {md5}); delete it to have it downloaded anew")
    if not all((folder / name).exists() for name in MNIST_FILES):
        download_mnist(folder)
    data = MNIST(data_dir, train=train)
    return data.data.unsqueeze(1), data.targets


def download_mnist(folder: Path, timeout: float = 10.0) -> None:
    """Download MNIST's four files into folder, all or none; NotAvailable within `timeout` s without a network."""
    reached = threading.Event()

    def try_mirrors() -> None:
        for mirror in MNIST.mirrors:
            try:
                urllib.request.urlopen(mirror + MNIST.resources[1][0], timeout=timeout / 2).close()
                return reached.set()
            except OSError:
                continue

    # A thread, because a name server that does not answer heeds no timeout.
    prober = threading.Thread(target=try_mirrors, daemon=True)
    prober.start()
    prober.join(timeout)
    if not reached.is_set():
        raise NotAvailable(
            f"MNIST is not in {folder} and its servers cannot be reached; "
            "connect to the internet, name its folder with --data-dir, or train on --dataset glyphs"
        )
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            MNIST(temporary, download=True)
            for name in MNIST_FILES:
                (Path(temporary) / "MNIST" / "raw" / name).replace(folder / name)
    except (RuntimeError, OSError) as error:  # RuntimeError is torchvision's for a failed or falsified download
        raise NotAvailable(f"MNIST cannot be downloaded ({error}); try again, or train on --dataset glyphs") from error
    finally:
        socket.setdefaulttimeout(patience)


def load_glyphs(data_dir: str, train: bool) -> tuple[Tensor, Tensor]:
    """The offline stand-in for MNIST: 60,000 + 10,000 digits drawn from matplotlib's fonts, cached in data_dir.

    Raises:
        UserError: if the cached file is damaged, naming it.
    """
    path = Path(data_dir) / "glyphs" / ("train.pth" if train else "test.pth")
    if path.exists():
        try:
            images, labels = load_file(path)
            return images.view(-1, 1, 28, 28), labels.view(len(images))
        except Exception as error:
            raise UserError(f"{path} is damaged; delete it to have the glyphs drawn anew") from error
    images, labels = draw_glyphs(60_000, seed=0) if train else draw_glyphs(10_000, seed=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file([images, labels], path)
    except (OSError, UserError) as error:
        print(f"The glyphs are drawn anew each time: {error}", file=sys.stderr)
    return images, labels


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
