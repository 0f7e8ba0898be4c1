"""A folder or a .zip of images, by ImageFolder's convention: a subfolder is a class.

`train/` beside `test/` or `val/` are the two parts; otherwise a fixed tenth is held out. Without subfolders there are
no classes. One folder around it all is looked through, hidden files and those that are no images are left out.
"""

import functools
import hashlib
import io
import math
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from loaders.packing import Source
from support.errors import UserError, believing
from support.files import warn

# Of all that Pillow reads, what runs no other program (as EPS does) and is an image for sure.
FORMATS = "JPEG MPO PNG BMP DIB GIF WEBP TIFF PPM JPEG2000 AVIF TGA".split()
TEST_NAMES = ("test", "val", "valid", "validation")
LARGEST_FILE = 500_000_000  # bytes of an image file in a zip, when decompressed


class Listing(NamedTuple):
    """What a folder or a zip holds: names with slashes, relative to it, without what is hidden."""

    name: str  # for messages
    images: dict[str, str]  # a file's name -> what shows that it has changed
    others: list[str]  # files that are no images
    folders: set[str]


def open_folder(where: str | Path, data_dir: str | Path, train: bool) -> Source:
    """A part of a folder of images.

    Raises:
        UserError: if it cannot be read, or there are no images in it or in one of its classes; see also `part_of`.
    """
    where = Path(where)

    return part_of(list_folder(where), train, lambda name: open_image(where / name))


def open_zip(where: str | Path, data_dir: str | Path, train: bool) -> Source:
    """A part of a zip of images; nothing is extracted.

    Raises:
        UserError: as open_folder, and for what is no zip, is encrypted, or has names that lead out of it.
    """
    try:
        file = open(where, "rb")  # by us, so that it stays open while threads share the archive
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror})") from error
    with believing(f"{where} is damaged, or no zip"):
        archive = zipfile.ZipFile(file)
    listing, members = list_zip(archive, str(where))

    return part_of(listing, train, lambda name: open_image(io.BytesIO(read_member(archive, members[name]))))


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """A file of a zip; UserError, before it is decompressed, for a bomb. Raises BadZipFile if its checksum is wrong."""
    if member.file_size > LARGEST_FILE:
        raise UserError(f"it would be {member.file_size / 1e9:,.1f} GB, decompressed")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others have no bounds in Python
        raise UserError("it is compressed in an unusual way; make the zip anew with the usual one, deflate")
    with archive.open(member) as file:
        return file.read(member.file_size)  # and no more: archive.read would decompress what there is


def open_image(file: Path | io.BytesIO) -> Image.Image:
    """An image, not yet decoded."""
    return Image.open(file, formats=formats())


@functools.cache
def formats() -> list[str]:
    """The FORMATS that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@functools.cache
def extensions() -> frozenset[str]:
    """The endings of their files' names."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats())


def hidden(name: str) -> bool:
    """Whether a file or folder is one that systems leave behind."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in extensions()


def list_folder(where: Path) -> Listing:
    """All of a folder, through links; a loop of links is not entered twice."""
    found = Listing(str(where), {}, [], set())
    seen = set()

    def walk(folder: str) -> None:
        path = os.path.join(where, folder)
        place = os.stat(path)
        if (place.st_dev, place.st_ino) in seen:
            return
        seen.add((place.st_dev, place.st_ino))
        with os.scandir(path) as entries:
            entries = [entry for entry in entries if not hidden(entry.name)]
        for entry in entries:
            name = f"{folder}{entry.name}"
            if entry.is_dir():
                found.folders.add(name)
                walk(f"{name}/")
            elif is_image(name):
                try:
                    state = entry.stat()
                    found.images[name] = f"{state.st_size} {state.st_mtime_ns}"
                except OSError:  # a link to nowhere: it is told of when it is to be read
                    found.images[name] = ""
            else:
                found.others.append(name)
        seen.discard((place.st_dev, place.st_ino))  # two links to one folder are two folders

    try:
        walk("")
    except OSError as error:
        raise UserError(f"{error.filename or where} cannot be read ({error.strerror})") from error
    return found


def list_zip(archive: zipfile.ZipFile, where: str) -> tuple[Listing, dict[str, zipfile.ZipInfo]]:
    """All of a zip, and its members by name."""
    found, members = Listing(where, {}, [], set()), {}
    visible = {"": True}
    for member in archive.infolist():
        name = member.filename.replace("\\", "/").removeprefix("./")  # the former as some programs write on Windows
        folder, _, file = name.rpartition("/")
        if name[:1] == "/" or name[1:3] == ":/" or ".." in name.split("/"):
            raise UserError(f"{where}: the name {member.filename} leads out of the zip; make it anew")
        if folder not in visible:
            parts = folder.split("/")
            visible[folder] = not any(map(hidden, parts))
            if visible[folder]:
                found.folders.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
        if not file or hidden(file) or not visible[folder]:
            continue
        if is_image(file):
            if member.flag_bits & 1:
                raise UserError(f"{where} is encrypted; give a zip without a password")
            found.images[name] = f"{member.file_size} {member.CRC} {member.date_time}"
            members[name] = member
        else:
            found.others.append(name)
    return found, members


def part_of(listing: Listing, train: bool, open_file: Callable[[str], Image.Image]) -> Source:
    """The training or the test part of what was listed.

    Raises:
        UserError: if there are no images, or none in one of the classes; for classes whose names differ only in case;
            for a test part with classes that the training part has not.
    """
    if not listing.images:
        endings = Counter(os.path.splitext(name)[1].lower() for name in listing.others)
        seen = ", ".join(ending or "files without an ending" for ending, _ in endings.most_common(3))
        raise UserError(f"{listing.name} holds no images" + (f", only {seen}" if seen else "; put some in"))
    training, test = parts_of(listing)
    groups = classes_of(listing, training)
    if test is None:
        held_out = hold_out(groups)
        mine = {name: [file for file in files if (file in held_out) != train] for name, files in groups.items()}
        if not train and not held_out:
            raise UserError(f"{listing.name} has one image a class, so none is held out; put more in")
    else:
        there = classes_of(listing, test)
        unknown = sorted(there.keys() - groups.keys())
        if unknown:
            raise UserError(
                f"{listing.name}: {test}{unknown[0]} has no counterpart in {training}; both need the same subfolders"
            )
        mine = groups if train else there
    class_names = [name for name in groups if name]
    names = [file for files in mine.values() for file in files]
    labels = [label for label, name in enumerate(groups) for _ in mine.get(name, ())]
    states = "".join(f"{name}\0{listing.images[name]}\0" for name in sorted(listing.images))
    key = hashlib.sha256(states.encode(errors="surrogateescape")).hexdigest()
    short = Path(listing.name).resolve().name
    return Source(short, class_names, labels, names, key, lambda i: open_file(names[i]))


def parts_of(listing: Listing) -> tuple[str, str | None]:
    """Where the training and the test part begin, such as "train/" and "test/"; None for one that is to be held out."""
    top = ""
    while True:
        inside = {name.removeprefix(top) for name in listing.folders if name.startswith(top)}
        first = sorted(name for name in inside if "/" not in name)
        folders = {name.lower(): f"{top}{name}/" for name in first}
        tests = [folders[name] for name in TEST_NAMES if name in folders]
        if "train" in folders and tests:
            return folders["train"], tests[0]
        alone = len(first) == 1 and len(inside) > 1  # one folder, and folders in it
        if not alone or any("/" not in name.removeprefix(top) for name in listing.images):
            return top, None
        top = folders.popitem()[1]


def classes_of(listing: Listing, start: str) -> dict[str, list[str]]:
    """The images of each subfolder of `start`, in ImageFolder's order; all of them under "" where there are none."""
    folders = {name.removeprefix(start) for name in listing.folders if name.startswith(start)}
    groups: dict[str, list[str]] = {name: [] for name in sorted(folders) if "/" not in name} or {"": []}
    loose = []
    for name in sorted(listing.images, key=lambda name: name.rpartition("/")):
        if name.startswith(start):
            folder, inside, _ = name.removeprefix(start).partition("/")
            groups.get(folder if inside else "", loose).append(name)
    spellings: dict[str, str] = {}
    for name, files in groups.items():
        other = spellings.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(f"{listing.name}: class folders {other} and {name} differ only in case; rename one")
        if not files:
            raise UserError(f"{listing.name}: the folder {start}{name} holds no images; put some in, or remove it")
    if loose:
        warn(f"{listing.name}: {len(loose):,} images beside the class folders, as {loose[0]}, are left out")
    return groups


def hold_out(groups: dict[str, list[str]]) -> set[str]:
    """A tenth of the files, spread over the classes, at least one; one of each class stays.

    Which ones follows from their names, so that hardly any changes its part when files are added.
    """
    held_out: list[str] = []
    total = 0
    for files in groups.values():
        total += len(files) - 1
        share = math.ceil(total / 10) - len(held_out)
        held_out += sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file)).digest())[:share]
    return set(held_out)
