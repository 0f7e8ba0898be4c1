"""MNIST (LeCun et al., 1998) and the sets in its format through torchvision: read, checked, downloaded where missing.

Each is four files of 28-pixel grey images in ten classes: Fashion-MNIST (Xiao et al., 2017) shows clothes, KMNIST
(Clanuwat et al., 2018) letters of cursive Japanese.
"""

import struct
from pathlib import Path

from torch import Tensor

from loaders.download import check_md5, downloading
from support.errors import UserError

MNIST_FILES = {  # MD5 of the uncompressed originals
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
FASHION_FILES = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
KMNIST_FILES = dict.fromkeys(MNIST_FILES)  # published for the compressed files alone, and checked when they are fetched


def load_mnist(data_dir: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """The 60,000 training or 10,000 test digits of MNIST, (N, 1, 28, 28) uint8, and their labels (N,).

    Raises:
        UserError: if a file is damaged, naming it.
        NotAvailable: if MNIST is neither in data_dir nor to be downloaded.
    """
    return load("MNIST", MNIST_FILES, data_dir, train)[:2]


def load_fashion(data_dir: str | Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Fashion-MNIST's clothes, labels and class names; otherwise as load_mnist."""
    return load("FashionMNIST", FASHION_FILES, data_dir, train)


def load_kmnist(data_dir: str | Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """KMNIST's letters, labels and class names, which are the letters' sounds; otherwise as load_mnist."""
    return load("KMNIST", KMNIST_FILES, data_dir, train)


def load(
    name: str, files: dict[str, str | None], data_dir: str | Path, train: bool
) -> tuple[Tensor, Tensor, list[str]]:
    """Images, labels and class names of a set that torchvision calls `name`; its files by name, with their MD5."""
    from torchvision import datasets  # here, for it takes seconds that sampling need not wait

    kind = getattr(datasets, name)
    folder = Path(data_dir) / name / "raw"
    for file, md5 in files.items():
        if (folder / file).exists():
            check_md5(folder / file, md5, name) if md5 else check_format(folder / file, name)
    if not all((folder / file).exists() for file in files):
        with downloading(name, folder, (mirror + kind.resources[1][0] for mirror in kind.mirrors)) as temporary:
            kind(temporary, download=True)
            for file in files:
                (temporary / name / "raw" / file).replace(folder / file)
    data = kind(data_dir, train=train)
    return data.data.unsqueeze(1), data.targets, list(kind.classes)


def check_format(path: Path, name: str) -> None:
    """UserError if a file has not the head and the size of one in MNIST's format: what is told without its MD5."""
    count, of_images = 60_000 if path.name.startswith("train") else 10_000, "images" in path.name
    head = struct.pack(">4i", 0x803, count, 28, 28) if of_images else struct.pack(">2i", 0x801, count)
    with open(path, "rb") as file:
        intact = file.read(len(head)) == head
    if not intact or path.stat().st_size != len(head) + count * (28 * 28 if of_images else 1):
        wanted = f"{count:,} {'images of 28 x 28' if of_images else 'labels'} in MNIST's format"
        raise UserError(f"{path} is damaged, or not {name} (it is not {wanted}); move it away")
