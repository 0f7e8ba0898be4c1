"""Sets of colour images through torchvision, as sources of images: read, checked, downloaded where they are missing."""

import hashlib
from pathlib import Path

from PIL import Image

from loaders.download import check_md5, downloading
from loaders.packing import Source
from support.errors import optional

FLOWERS_ADDRESS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/setid.mat"
FLOWERS_FILES = {  # MD5
    "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
    "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
}


def open_cifar10(where: str, data_dir: str | Path, train: bool) -> Source:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training or 10,000 test images of 32 pixels in ten classes.

    Its files are pickles, which could run code; only those with the originals' MD5 are opened.

    Raises:
        UserError: if a file is damaged, naming it.
        NotAvailable: if CIFAR-10 is neither in data_dir nor to be downloaded.
    """
    from torchvision.datasets import CIFAR10  # here, for it takes seconds that sampling need not wait

    folder = Path(data_dir) / CIFAR10.base_folder
    meta = CIFAR10.meta
    files = dict([*CIFAR10.train_list, *CIFAR10.test_list, (meta["filename"], meta["md5"])])
    for name, md5 in files.items():
        if (folder / name).exists():
            check_md5(folder / name, md5, "CIFAR-10")
    if not all((folder / name).exists() for name in files):
        with downloading("CIFAR-10", folder, [CIFAR10.url]) as temporary:
            CIFAR10(temporary, download=True)
            for name in files:
                (temporary / CIFAR10.base_folder / name).replace(folder / name)
    data = CIFAR10(data_dir, train=train)
    images = data.data  # (N, 32, 32, 3)
    names = [f"{'training' if train else 'test'} image {i}" for i in range(len(images))]
    key = hashlib.sha256(repr(files).encode()).hexdigest()  # the files are these or refused
    return Source(where, list(data.classes), list(data.targets), names, key, lambda i: Image.fromarray(images[i]))


def open_flowers(where: str, data_dir: str | Path, train: bool) -> Source:
    """Flowers102 (Nilsback & Zisserman, 2008): photographs of flowers of 102 kinds.

    Its training and validation parts together, 2,040 images, train; its test part, 6,149, is held out.

    Raises:
        UserError: if a file is damaged, naming it, or scipy is missing.
        NotAvailable: if Flowers102 is neither in data_dir nor to be downloaded.
    """
    loadmat = optional("scipy.io", "--dataset flowers").loadmat
    from torchvision.datasets import Flowers102  # here, for it takes seconds that sampling need not wait

    folder = Path(data_dir) / "flowers-102"

    def read(file: str) -> dict:
        return loadmat(folder / file, squeeze_me=True)

    def listed() -> list[Path]:
        """All the images; image 1 comes first."""
        return [folder / "jpg" / f"image_{i:05d}.jpg" for i in range(1, len(read("imagelabels.mat")["labels"]) + 1)]

    for file, md5 in FLOWERS_FILES.items():
        if (folder / file).exists():
            check_md5(folder / file, md5, "Flowers102")
    if not all((folder / file).exists() for file in FLOWERS_FILES) or not all(path.exists() for path in listed()):
        with downloading("Flowers102", folder, [FLOWERS_ADDRESS]) as temporary:
            Flowers102(temporary, download=True)
            (folder / "jpg").mkdir(exist_ok=True)
            for path in sorted((temporary / folder.name).glob("jpg/*.jpg")):
                path.replace(folder / "jpg" / path.name)
            for file in FLOWERS_FILES:
                (temporary / folder.name / file).replace(folder / file)
    paths, labels, parts = listed(), read("imagelabels.mat")["labels"] - 1, read("setid.mat")
    mine = [i - 1 for part in (("trnid", "valid") if train else ("tstid",)) for i in parts[part].tolist()]
    key = hashlib.sha256()
    for path in paths:
        state = path.stat()
        key.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    names = [f"jpg/{paths[i].name}" for i in mine]
    return Source(
        where,
        list(Flowers102.classes),
        labels[mine].tolist(),
        names,
        key.hexdigest(),
        lambda i: Image.open(folder / names[i], formats=["JPEG"]),
    )
