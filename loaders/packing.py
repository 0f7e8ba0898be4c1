"""Image files of any kind and size, brought to one size once and packed into one array on disk, indexed ever after.

A `Source` lists and opens images; `pack` brings them to one size, on all cores, and writes a folder of images.npy
(N, C, H, W) uint8, labels.npy (N,) int64 and pack.json (class names, where they came from). It is read through a
memory map, so that a data set larger than memory trains as one that fits. Other arrays are packed as well: `new_pack`.
"""

import contextlib
import io
import json
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from support.command_line import Progress
from support.errors import DamagedFile, UserError, is_memory_error, reason_of
from support.files import locked, save_json, unwritable, warn, writing_folder

MOST_PIXELS = 100_000_000  # of an image: decoded, it takes three bytes each
LARGEST_OWN = 64  # images that are all equal squares, at most so large, keep their size; others are brought to this one


class Source(NamedTuple):
    """One part (training or test) of a data set of image files."""

    name: str  # for messages, such as cats.zip
    class_names: list[str]  # empty where there are no classes; then all labels are 0
    labels: list[int]
    names: list[str]  # of the images, for messages
    key: str  # follows from names, sizes and times of all files of the source, of both parts
    open: Callable[[int], Image.Image]  # image i, decoded or not; raises anything for a damaged one


class Pack(NamedTuple):
    """Images (N, C, H, W), which lie on disk and are not to be written to, and labels (N,) int64."""

    images: Tensor
    labels: Tensor
    class_names: list[str]
    about: dict[str, Any]  # what pack.json says


def bring_to_size(image: Image.Image, size: int) -> Image.Image:
    """A square of `size` pixels, as the data preparation of ADM and DiT makes it (their center_crop_arr).

    Halved with a box filter while the short side is at least twice the size, then bicubic until it is the size, then
    the centre is cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:  # a line of pixels, as long as many images
        raise UserError(f"it is {image.width} x {image.height} pixels, too long for its width")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(source: Source, i: int) -> Image.Image:
    """Image i of a source in mode "L" or "RGB": its first frame, upright, on white.

    Raises:
        DamagedFile: for one that cannot be read, is empty or has more than 100 million pixels, naming it.
    """
    with naming(source, i):
        image = source.open(i)
        if min(image.size) < 1 or image.width * image.height > MOST_PIXELS:
            raise UserError(f"it is {image.width} x {image.height} pixels; 1 to {MOST_PIXELS:,} in all can be used")
        image.load()
        with contextlib.suppress(Exception):  # of a broken note on how the camera was held, not of the image
            image = ImageOps.exif_transpose(image)
        return to_bytes(image)


@contextlib.contextmanager
def naming(source: Source, i: int) -> Iterator[None]:
    """What goes wrong with image i becomes a DamagedFile in one line that names it; too little memory passes."""
    try:
        yield
    except DamagedFile:
        raise
    except Exception as error:  # a damaged file can fail in any way inside its reader
        if is_memory_error(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else reason_of(error)
        if isinstance(error, Image.UnidentifiedImageError):  # which says no more than an object's address
            reason = "it is not an image, or of a kind that is not read"
        raise DamagedFile(
            f"{source.name}: {source.names[i]} cannot be read ({reason}); "
            f"mend or remove it, or go on without such files with --skip-damaged"
        ) from error


def to_bytes(image: Image.Image) -> Image.Image:
    """An image of any mode as "L" or "RGB", eight bits a channel; what is transparent is laid on white.

    Whole numbers beyond eight bits are taken as 16 bit, fractions as 0 to 1, or 0 to 255 where some are above 1.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        white = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
        values[values == image.info.get("transparency", np.nan)] = white
        if not (values.min() >= 0 and values.max() <= white):  # nor with NaN
            raise UserError(f"its pixels are from {values.min():g} to {values.max():g}; save it with 8 bits a channel")
        return Image.fromarray((values / white * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def pack(
    source: Source, folder: Path, image_size: int | None, skip_damaged: bool = False, channels: int | None = None
) -> Pack:
    """A source's images as squares of one size: what `folder` has of them, else packed now.

    Args:
        image_size: None for the images' own if all are equal squares of at most 64 pixels, else 64.
        skip_damaged: leave out images that cannot be read, and list them.
        channels: those of the training part, for the test part; None for 1 if all images are grey, else 3.

    Raises:
        DamagedFile: for an image that cannot be read, if it is not to be left out.
        UserError: if all of a class cannot be read, or the pack cannot be written; nothing is left of it then.
    """
    key = f"{source.key}, size {image_size}, channels {channels}, damaged {'left out' if skip_damaged else 'refused'}"
    found = pack_once(
        folder, key, source.name, lambda: write_images(source, folder, key, image_size, skip_damaged, channels)
    )
    skipped = found.about["skipped"]
    if skipped:
        more = f" and {len(skipped) - 10:,} more" if len(skipped) > 10 else ""
        warn(f"{source.name}: {len(skipped):,} damaged images are left out: {', '.join(skipped[:10])}{more}")
    return found


def write_images(
    source: Source, folder: Path, key: str, image_size: int | None, skip_damaged: bool, channels: int | None
) -> None:
    """The work of `pack`: all images read, brought to size and written."""
    count = len(source.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of oddities in files that it reads all the same
        size = image_size or own_size(source)

        def read(i: int) -> np.ndarray | None:
            """Image i as (C, H, W), or None for a damaged one that is to be left out."""
            try:
                with naming(source, i):
                    image = bring_to_size(read_image(source, i), size)
                    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            except DamagedFile:
                if not skip_damaged:
                    raise
                return None
            return pixels.reshape(size, size, -1).transpose(2, 0, 1)

        about = {"source": source.name, "image_size": size, "class_names": source.class_names, "skipped": []}
        check_room(folder, count * (channels or 3) * size**2, source.name)
        with new_pack(folder, key, about) as new, Progress(count, f"packing {source.name}") as bar:
            grey = True
            for i, pixels in enumerate(in_order(read, count)):
                if pixels is None:
                    about["skipped"].append(source.names[i])
                else:
                    grey = grey and bool((pixels == pixels[:1]).all())
                    new.add(pixels[None], [source.labels[i]])
                bar.update()
            lost = sorted(set(source.labels) - set(new.labels))
            if lost and (channels is None or not new.labels):  # the training part says how many classes there are
                of = f" of class {source.class_names[lost[0]]}" if source.class_names else ""
                raise UserError(f"{source.name}: no image{of} can be read, the first is {about['skipped'][0]}")
            if channels is None and grey:
                new.keep_first_channel()


def own_size(source: Source) -> int:
    """The size of the images if all are equal squares of at most 64 pixels, else 64; said aloud."""

    def size_of(i: int) -> tuple[int, int] | None:
        try:
            return source.open(i).size  # from the file's head alone
        except Exception as error:  # of a damaged file, which is told of when it is read
            if is_memory_error(error):
                raise
            return None

    sizes = set()
    for size in in_order(size_of, len(source.labels)):
        sizes |= {size} - {None}
        if len(sizes) > 1 or any(width != height or width > LARGEST_OWN for width, height in sizes):
            warn(f"the images of {source.name} are brought to 64 x 64 pixels; --image-size N chooses another size")
            return LARGEST_OWN
    size = sizes.pop()[0] if sizes else LARGEST_OWN
    warn(f"the images of {source.name} keep their {size} x {size} pixels; --image-size N chooses another size")
    return size


def in_order(function: Callable[[int], Any], count: int) -> Iterator[Any]:
    """function(0), function(1), ... of `count`, worked out on all cores a few at a time, so that little is held."""
    threads = min(os.cpu_count() or 1, 32)  # threads, for Pillow decodes and resizes without Python's lock
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for i in range(count):
                waiting.append(pool.submit(function, i))
                if len(waiting) > 8 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def pack_once(folder: Path, key: str, name: str, write: Callable[[], None]) -> Pack:
    """What `folder` has packed with this key, else what write() puts there; a second run waits for the first.

    Args:
        key: of all that the pack follows from.
        name: of what is packed, for messages.
        write: fills the folder, through `new_pack`.
    """
    found = read_pack(folder, key)
    if found:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    with locked(folder.parent, waiting=f"another run is packing {name}; waiting for it"):
        found = read_pack(folder, key)
        if found:
            return found
        for scrap in folder.parent.glob("*.tmp"):  # of a run that was killed
            shutil.rmtree(scrap, ignore_errors=True)
        if folder.exists():
            warn(f"{name} or the settings have changed since it was packed, so it is packed anew")
        write()
        found = read_pack(folder, key)
    if not found:
        raise UserError(f"{folder} cannot be read just after it was written; is another run writing there?")
    return found


def read_pack(folder: Path, key: str) -> Pack | None:
    """What is packed in a folder; None if there is nothing, or nothing whole, with this key."""
    try:
        about = json.loads((folder / "pack.json").read_text())
        if about["key"] != key:
            return None
        # Read only: a private copy (mode "c") that could not be held in memory the system refuses to map.
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy")
        if images.ndim != 4 or labels.shape[:1] != images.shape[:1]:  # of captions there is a second dimension
            return None
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError, KeyError, TypeError):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return Pack(torch.from_numpy(images), torch.from_numpy(labels), about["class_names"], about)


def check_room(folder: Path, needed: int, name: str) -> None:
    """Refuse, before the work, a pack of more bytes than the disk has left."""
    there = shutil.disk_usage(folder.parent).free
    if needed > there:
        raise UserError(
            f"{name}, packed, would take {needed / 1e9:,.1f} GB, and {folder.parent} has {there / 1e9:,.1f} GB left; "
            f"free some space, or try a smaller --image-size or another --data-dir"
        )


class NewPack:
    """A pack while it is written: what is added goes to the disk at once. `about` may be changed until the end."""

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self.about, self.labels = folder, about, []
        self.file = open(folder / "images.npy", "w+b")

    def add(self, images: np.ndarray, labels: list[int]) -> None:
        """Images (n, C, H, W), all of the same C, H, W and type, and their labels."""
        if not self.labels:
            self.shape, self.dtype = images.shape[1:], images.dtype
            self.write_head()
        self.file.write(np.ascontiguousarray(images).data)
        self.labels += labels

    def write_head(self) -> None:
        """NumPy's head of the file, which leaves room for any number of images."""
        shape = (len(self.labels), *self.shape)
        head = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, head)

    def keep_first_channel(self) -> None:
        """Leave the other channels out, within the file."""
        channels, height, width = self.shape
        few = 1000
        self.write_head()
        start = self.file.tell()
        size = height * width * self.dtype.itemsize
        for i in range(0, len(self.labels), few):
            self.file.seek(start + i * channels * size)
            images = np.frombuffer(self.file.read(few * channels * size), self.dtype).reshape(-1, *self.shape)
            self.file.seek(start + i * size)
            self.file.write(images[:, 0].tobytes())
        self.file.truncate()
        self.shape = (1, height, width)

    def finish(self) -> None:
        self.write_head()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        labels = io.BytesIO()
        np.save(labels, np.array(self.labels, np.int64))
        (self.folder / "labels.npy").write_bytes(labels.getvalue())
        save_json(self.about, self.folder / "pack.json")


@contextlib.contextmanager
def new_pack(folder: Path, key: str, about: dict[str, Any]) -> Iterator[NewPack]:
    """A pack to add images to, which takes the place of `folder` once it is whole.

    Args:
        about: goes into pack.json; class_names is needed.

    Raises:
        UserError: if it cannot be written (disk full, no permission); what was there before is intact.
    """
    with writing_folder(folder) as temporary:
        about["key"] = key
        new = NewPack(temporary, about)
        try:
            yield new
            new.finish()
        finally:
            with contextlib.suppress(OSError):  # which was raised before
                new.file.close()
        shutil.rmtree(folder, ignore_errors=True)  # the stale one
