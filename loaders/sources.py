"""Data sets of image files by name: a folder, a .zip, hf:NAME, or a set of torchvision's; see packing.py."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from loaders.hugging_face import open_hub
from loaders.image_folder import open_folder, open_zip
from loaders.packing import Pack, Source, pack
from loaders.torchvision_sets import open_cifar10, open_flowers
from support.errors import UserError

SOURCES = {"cifar10": open_cifar10, "flowers": open_flowers}


def full_name(name: str, arrays: Iterable[str] = ()) -> str:
    """A data set's name; of a folder or file, its path from the root, the same wherever a command is called from.

    Args:
        arrays: names of sets that are no image files.

    Raises:
        UserError: for a name of nothing.
    """
    if name in arrays or name in SOURCES or name.startswith("hf:"):
        return name
    path = os.path.abspath(os.path.expanduser(name))
    if not os.path.exists(path):
        known = ", ".join((*arrays, *SOURCES))
        raise UserError(f"dataset {name!r} is not one of {known}, nor a folder, a .zip or hf:NAME that is there")
    return path


def open_source(name: str, data_dir: Path, train: bool) -> Source:
    """The image files of one part, training or test, of a data set."""
    if name.startswith("hf:"):
        return open_hub(name, data_dir, train)
    if name in SOURCES:
        return SOURCES[name](name, data_dir, train)
    return (open_folder if Path(name).is_dir() else open_zip)(name, data_dir, train)


def packed_folder(data_dir: Path, name: str) -> Path:
    """Where a data set is packed: a folder with a name that can be read, and is no other set's."""
    readable = "".join(letter if letter.isalnum() else "-" for letter in Path(name).stem)[:40]
    return data_dir / "packed" / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def load_packed(name: str, data_dir: Path, train: bool, image_size: int | None, skip_damaged: bool) -> Pack:
    """One part of a data set, packed when it is first asked for; the test part is made as the training part is."""
    folder = packed_folder(data_dir, name)
    if image_size and packed_size(folder / "own") == image_size:
        image_size = None
    folder = folder / str(image_size or "own")
    part = pack(open_source(name, data_dir, True), folder / "train", image_size, skip_damaged)
    if train:
        return part
    channels, size = part.images.shape[1:3]
    return pack(open_source(name, data_dir, False), folder / "test", size, skip_damaged, channels)


def packed_size(folder: Path) -> int | None:
    """The size of the images packed in a folder; None if there is nothing that can be read."""
    try:
        return json.loads((folder / "train" / "pack.json").read_text())["image_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
