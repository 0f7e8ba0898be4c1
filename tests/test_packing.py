import errno
import io
import json
import os
import shutil
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from loaders.packing import Source, bring_to_size, new_pack, pack, pack_once, read_image, read_pack
from support.errors import DamagedFile, UserError


def noise(width: int, height: int, bands: int = 3, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(2) if bands == 1 else pixels)


def source_of(*images, labels=None, class_names=(), key="key") -> Source:
    """A source of images in memory, or of the bytes of files; an exception is raised."""

    def open_image(i: int) -> Image.Image:
        if isinstance(images[i], Exception):
            raise images[i]
        return Image.open(io.BytesIO(images[i])) if isinstance(images[i], bytes) else images[i].copy()

    labels = [0] * len(images) if labels is None else labels
    names = [f"{i}.png" for i in range(len(images))]
    return Source("pictures", list(class_names), labels, names, key, open_image)


def file_of(image: Image.Image, format: str, **options) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, rows: bytes, transparent: bytes = b"", interlaced: int = 0) -> bytes:
    """A grey PNG by hand; each row begins with the number of its filter, 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, interlaced))
    head += chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def read(image) -> np.ndarray:
    """What read_image makes of one image, or of a file."""
    found = read_image(source_of(image), 0)
    assert found.mode in ("L", "RGB")
    return np.array(found)


# Bringing to size


def center_crop_arr(image: Image.Image, size: int) -> np.ndarray:
    """What the published code of ADM and DiT does to an image, as they describe it."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(64, 64), (32, 32), (31, 57), (300, 129), (128, 127), (65, 640), (7, 9), (1, 40)])
@pytest.mark.parametrize("bands", [1, 3])
def test_images_are_brought_to_size_as_the_paper_does_it(shape, bands):
    image = noise(*shape, bands)
    assert np.array_equal(np.array(bring_to_size(image, 32)), center_crop_arr(image, 32))


# Any mode of image


def test_grey_and_colour_are_left_as_they_are():
    for bands in (1, 3):
        image = noise(8, 6, bands)
        assert np.array_equal(read(image), image)
        assert np.array_equal(read(file_of(image, "PNG")), image)


def test_black_and_white():
    bits = np.random.default_rng(0).integers(0, 2, (5, 9)).astype(bool)
    assert np.array_equal(read(file_of(Image.fromarray(bits), "PNG")), bits * 255)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


def test_what_is_transparent_is_laid_on_white():
    pixels = np.array(noise(8, 6, 4))
    expected = over_white(pixels[..., :3], pixels[..., 3])
    assert np.abs(read(file_of(Image.fromarray(pixels), "PNG")) - expected).max() <= 1
    grey = np.array(noise(8, 6, 2))
    expected = over_white(grey[..., :1], grey[..., 1])
    assert np.abs(read(file_of(Image.fromarray(grey, "LA"), "PNG")) - expected).max() <= 1


def test_a_palette_with_and_without_transparency():
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]]
    image.putpalette(sum(colours, []))
    assert read(file_of(image, "PNG")).reshape(4, 3).tolist() == colours
    one = read(file_of(image, "PNG", transparency=1)).reshape(4, 3)
    assert one.tolist() == [colours[0], [255, 255, 255], *colours[2:]]
    each = read(file_of(image, "PNG", transparency=bytes([255, 0, 128, 255]))).reshape(4, 3)
    assert np.abs(each - [[255, 0, 0], [255, 255, 255], [127, 127, 255], [10, 20, 30]]).max() <= 1


def test_one_transparent_colour_of_an_image_without_alpha():
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (0, 0, 0))
    assert read(file_of(image, "PNG", transparency=(0, 0, 0))).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_cmyk():
    image = Image.new("CMYK", (1, 1), (255, 0, 0, 0))  # cyan
    assert read(file_of(image, "TIFF")).tolist() == [[[0, 255, 255]]]
    assert read(Image.new("CMYK", (1, 1), (0, 0, 0, 255))).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(format):
    values = np.array([[0, 128, 257, 300, 32768, 65535]], dtype=np.uint16)
    assert read(file_of(Image.fromarray(values), format)).tolist() == [[0, 0, 1, 1, 128, 255]]


def test_a_transparent_shade_of_sixteen_bits():
    shades = b"\0" + struct.pack(">HH", 32768, 1000)
    assert read(png(2, 1, 16, shades, transparent=struct.pack(">H", 1000))).tolist() == [[128, 255]]


def test_fractions_are_of_one_or_of_255():
    assert read(file_of(Image.fromarray(np.float32([[0, 0.5, 1]])), "TIFF")).tolist() == [[0, 128, 255]]
    assert read(file_of(Image.fromarray(np.float32([[0, 1, 254.6]])), "TIFF")).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("values", [[-0.1, 0.5], [0, 300], [0, float("nan")], [float("nan")] * 2])
def test_fractions_of_another_range_are_refused(values):
    with pytest.raises(DamagedFile, match="8 bits a channel"):
        read(Image.fromarray(np.float32([values])))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_the_camera_was_held(orientation):
    from PIL import ImageOps

    image = noise(8, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.array(image)
    turns = {  # of the EXIF standard: where row 0 and column 0 of the file are in the scene
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }
    found = read(file_of(image, "PNG", exif=exif))
    assert np.array_equal(found, turns[orientation])
    assert np.array_equal(found, ImageOps.exif_transpose(Image.open(io.BytesIO(file_of(image, "PNG", exif=exif)))))


def test_a_broken_orientation_loses_no_image(monkeypatch):
    from loaders import packing

    monkeypatch.setattr(packing.ImageOps, "exif_transpose", lambda image: 1 / 0)
    assert np.array_equal(read(noise(3, 4)), noise(3, 4))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    file = file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(file)).n_frames == 3
    assert np.array_equal(read(file), frames[0])


def test_an_interlaced_png():
    """Pillow writes none. The seven passes of a 2 x 2 image are three: (0, 0), then (1, 0), then row 1."""
    assert read(png(2, 2, 8, bytes([0, 10, 0, 20, 0, 30, 40]), interlaced=1)).tolist() == [[10, 20], [30, 40]]


# Bad images


def test_a_damaged_image_is_named_and_nothing_is_half_packed(tmp_path):
    jpeg = file_of(noise(64, 64), "JPEG")
    for bad, word in [
        (jpeg[: len(jpeg) // 2], "truncated"),
        (b"shopping: milk, bread", "not an image"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "No such file"),
    ]:
        folder = tmp_path / "packed" / "train"
        with pytest.raises(DamagedFile, match=f"pictures: 30.png cannot be read .*{word}.*--skip-damaged") as error:
            pack(source_of(*[noise(32, 32)] * 30, bad, *[noise(32, 32)] * 30), folder, 32)
        assert "\n" not in str(error.value)
        assert list(folder.parent.iterdir()) == []


def test_damaged_images_are_left_out_where_that_is_asked_for(tmp_path, capsys):
    images = [b"nothing" if i % 2 else noise(16, 16, seed=i) for i in range(40)]
    labels = [i // 4 for i in range(40)]
    folder = tmp_path / "train"
    for _ in range(2):  # the second time read from the disk
        found = pack(source_of(*images, labels=labels, class_names="abcdefghij"), folder, 16, skip_damaged=True)
        assert found.labels.tolist() == labels[::2]
        assert all(np.array_equal(found.images[i].permute(1, 2, 0), images[2 * i]) for i in range(20))
        assert found.about["skipped"] == [f"{i}.png" for i in range(1, 40, 2)]
        assert json.loads((folder / "pack.json").read_text())["skipped"] == found.about["skipped"]
        line = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
        assert len(line) == 1 and "20 damaged" in line[0] and "19.png and 10 more" in line[0] and "21" not in line[0]
    with pytest.raises(DamagedFile, match="1.png"):  # and are refused again where it is not
        pack(source_of(*images, labels=labels), folder, 16)
    assert read_pack(folder, found.about["key"])


def test_a_class_of_which_nothing_is_left_is_named(tmp_path):
    source = source_of(noise(8, 8), b"", b"", labels=[0, 1, 1], class_names=["cat", "dog"])
    with pytest.raises(UserError, match="no image of class dog can be read, the first is 1.png"):
        pack(source, tmp_path / "train", 8, skip_damaged=True)
    assert pack(source, tmp_path / "test", 8, skip_damaged=True, channels=3).labels.tolist() == [0]
    with pytest.raises(UserError, match="pictures: no image can be read, the first is 0.png"):
        pack(source_of(b"", b""), tmp_path / "other", 8, skip_damaged=True, channels=3)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(DamagedFile, match=f"it is {size[0]} x {size[1]} pixels"):
        read(Image.new("RGB", size))


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own limit warns from fewer on
    file = file_of(Image.new("1", (10_001, 10_000)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DamagedFile, match="10001 x 10000 pixels; 1 to 100,000,000"):
        read_image(source_of(file), 0)


def test_pillows_own_limit_is_one_line_too():
    with pytest.raises(DamagedFile, match="0.png cannot be read .*exceeds limit"):
        read(file_of(Image.new("1", (20_000, 10_000)), "PNG"))


def test_a_line_of_pixels_is_refused_and_not_made_a_huge_image(tmp_path):
    with pytest.raises(DamagedFile, match="0.png cannot be read .it is 1 x 30000 pixels, too long for its width"):
        pack(source_of(Image.new("L", (1, 30_000))), tmp_path / "train", 64)


def test_too_little_memory_is_not_the_files_fault():
    with pytest.raises(MemoryError):
        read_image(source_of(MemoryError()), 0)


def test_oddities_that_pillow_warns_of_are_no_lines_on_the_screen(tmp_path, recwarn):
    big = file_of(Image.new("1", (10_000, 9_000)), "PNG")  # more than what Pillow warns of
    pack(source_of(big), tmp_path / "train", 8)
    assert not list(recwarn)


# The pack


def test_what_is_packed_is_what_was_there(tmp_path):
    images = [noise(32, 32, seed=i) for i in range(50)]
    labels = [i % 3 for i in range(50)]
    folder = tmp_path / "packed" / "train"
    found = pack(source_of(*images, labels=labels, class_names="abc"), folder, None)
    assert found.images.shape == (50, 3, 32, 32) and found.images.dtype == torch.uint8
    assert all(np.array_equal(found.images[i].permute(1, 2, 0), images[i]) for i in range(50))
    assert found.labels.tolist() == labels and found.labels.dtype == torch.int64
    assert found.class_names == ["a", "b", "c"] and found.about["image_size"] == 32
    assert {path.name for path in folder.iterdir()} == {"images.npy", "labels.npy", "pack.json"}
    assert list(folder.parent.iterdir()) == [folder]
    assert np.array_equal(np.load(folder / "images.npy"), found.images)  # NumPy's own format


def test_images_come_in_order_whichever_is_done_first(tmp_path):
    """Large ones take longer than small ones."""
    images = [Image.new("L", (2000, 2000) if i % 7 == 0 else (8, 8), i) for i in range(100)]
    assert pack(source_of(*images), tmp_path / "train", 8).images[:, 0, 0, 0].tolist() == list(range(100))


def test_few_images_are_held_at_once(tmp_path):
    """While the first is not done, only so many more are begun."""
    begun = set()

    def open_image(i: int) -> Image.Image:
        begun.add(i)
        if i == 0:
            time.sleep(0.5)
            begun.add(-max(begun))  # how far the others are by then
        return Image.new("L", (8, 8))

    pack(source_of(*[None] * 2000)._replace(open=open_image), tmp_path / "train", 8)
    assert max(begun) == 1999 and min(begun) > -10 * min(os.cpu_count() or 1, 32) - 10


def test_grey_images_take_one_channel_even_if_their_files_have_three(tmp_path):
    grey = [noise(16, 16, 1, seed=i) for i in range(2500)]
    mixed = [image.convert("RGB") if i % 2 else image for i, image in enumerate(grey)]
    found = pack(source_of(*mixed), tmp_path / "train", 16)
    assert found.images.shape == (2500, 1, 16, 16)
    assert all(np.array_equal(found.images[i, 0], grey[i]) for i in range(2500))
    assert (tmp_path / "train" / "images.npy").stat().st_size == 128 + 2500 * 256


def test_one_coloured_image_makes_three_channels(tmp_path):
    coloured = Image.new("RGB", (16, 16))
    coloured.putpixel((3, 3), (0, 0, 1))
    grey = [noise(16, 16, 1)] * 10
    images = pack(source_of(*grey, coloured, *grey), tmp_path / "train", 16).images
    assert images.shape == (21, 3, 16, 16) and images[10, :, 3, 3].tolist() == [0, 0, 1]
    assert torch.equal(images[0, 0], images[0, 2])


def test_the_test_part_takes_the_channels_of_the_training_part(tmp_path):
    assert pack(source_of(noise(8, 8, 1)), tmp_path / "a", 8, channels=3).images.shape == (1, 3, 8, 8)
    found = pack(source_of(noise(8, 8)), tmp_path / "b", 8, channels=1)
    assert np.array_equal(found.images[0, 0], noise(8, 8).convert("L"))


@pytest.mark.parametrize(
    ("shapes", "size", "same"),
    [
        ([(28, 28)] * 3, 28, True),
        ([(64, 64)] * 3, 64, True),
        ([(65, 65)] * 3, 64, False),
        ([(28, 28)] * 2 + [(27, 27)], 64, False),
        ([(28, 30)] * 3, 64, False),
        ([(200, 100), (28, 28)], 64, False),
    ],
)
def test_the_size_is_the_images_own_or_64_said_aloud(shapes, size, same, tmp_path, capsys):
    found = pack(source_of(*[Image.new("RGB", shape) for shape in shapes]), tmp_path / "train", None)
    assert found.images.shape[2:] == (size, size)
    words = f"keep their {size} x {size} pixels" if same else "are brought to 64 x 64 pixels"
    assert words in capsys.readouterr().err
    assert pack(source_of(Image.new("RGB", (50, 40))), tmp_path / "other", 20).images.shape[2:] == (20, 20)
    assert capsys.readouterr().err == ""


def test_a_damaged_image_does_not_decide_the_size(tmp_path):
    source = source_of(b"no image", *[noise(24, 24)] * 3)
    assert pack(source, tmp_path / "train", None, skip_damaged=True).images.shape == (3, 3, 24, 24)


def test_packed_once_and_anew_when_the_source_or_the_size_changed(tmp_path, capsys):
    opened = []
    folder = tmp_path / "train"

    def images_of(key: str, size: int, **options):
        source = source_of(noise(16, 16), key=key)
        return pack(source._replace(open=lambda i: opened.append(i) or source.open(i)), folder, size, **options)

    images_of("a", 16)
    images_of("a", 16)
    assert opened == [0] and capsys.readouterr().err == ""
    for count, (key, size, options) in enumerate([("b", 16, {}), ("b", 8, {}), ("b", 8, {"channels": 1})], 2):
        assert images_of(key, size, **options).images.shape[2] == size
        assert len(opened) == count and "packed anew" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


def test_a_pack_outlives_its_source(tmp_path):
    """What is read through the map is on the disk as long as it is used, whoever packs anew meanwhile."""
    first = pack(source_of(noise(16, 16)), tmp_path / "train", 16)
    pack(source_of(noise(16, 16, seed=1), key="other"), tmp_path / "train", 16)
    assert np.array_equal(first.images[0].permute(1, 2, 0), noise(16, 16))


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "pack.json"])
@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\x93NUMPY"])
def test_a_damaged_pack_is_made_anew(name, content, tmp_path):
    folder = tmp_path / "train"
    source = source_of(noise(16, 16))
    pack(source, folder, 16)
    path = folder / name
    path.unlink() if content is None else path.write_bytes(content)
    assert np.array_equal(pack(source, folder, 16).images[0].permute(1, 2, 0), noise(16, 16))
    path.write_bytes(path.read_bytes()[:-1])
    assert np.array_equal(pack(source, folder, 16).images[0].permute(1, 2, 0), noise(16, 16))


def test_a_pack_with_more_labels_than_images_is_made_anew(tmp_path):
    pack(source_of(noise(16, 16)), tmp_path / "train", 16)
    np.save(tmp_path / "train" / "labels.npy", np.zeros(2, np.int64))
    assert pack(source_of(noise(16, 16)), tmp_path / "train", 16).labels.tolist() == [0]


def test_the_map_is_taken_without_a_warning(tmp_path, recwarn):
    usual = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not the first time alone
    try:
        pack(source_of(noise(16, 16)), tmp_path / "train", 16)
    finally:
        torch.set_warn_always(usual)
    assert not list(recwarn)


def test_what_a_killed_run_left_is_cleared(tmp_path):
    (tmp_path / "train.123.tmp").mkdir()
    (tmp_path / "train.123.tmp" / "images.npy").write_bytes(b"half")
    pack(source_of(noise(16, 16)), tmp_path / "train", 16)
    assert list(tmp_path.iterdir()) == [tmp_path / "train"]


def test_a_disk_without_room_is_said_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 16 * 16 * 2 - 1))
    source = source_of(noise(16, 16), noise(16, 16))
    unread = source._replace(open=lambda i: pytest.fail("read"))
    with pytest.raises(UserError, match="pictures, packed, would take .* GB left; free some space"):
        pack(unread, tmp_path / "train", 16)
    assert list(tmp_path.iterdir()) == []
    assert len(pack(source, tmp_path / "train", 16, channels=1).images) == 2


@pytest.mark.parametrize("damaged", [0, 500])
def test_a_disk_that_is_full_while_packing_leaves_nothing(damaged, tmp_path):
    """Full among the images, or where the list of those left out is written."""
    resource = pytest.importorskip("resource")
    good = 500
    source = source_of(*[noise(8, 8)] * good, *[b""] * damaged)
    source = source._replace(names=["x" * 1000] * (good + damaged))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = 128 + good * 3 * 64 - (0 if damaged else 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*(File too large).*free some space"):
            pack(source, tmp_path / "train", 8, skip_damaged=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "packed").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write .*packed"):
        pack(source_of(noise(16, 16)), tmp_path / "packed" / "x" / "train", 16)


def test_a_second_run_waits_for_the_first_and_takes_what_it_packed(tmp_path, capsys):
    pytest.importorskip("fcntl")
    source = source_of(noise(16, 16))
    started, go_on, found = threading.Event(), threading.Event(), []

    def slow(i: int) -> Image.Image:
        started.set()
        assert go_on.wait(30)
        return source.open(i)

    first = threading.Thread(target=lambda: found.append(pack(source._replace(open=slow), tmp_path / "train", 16)))
    unread = source._replace(open=lambda i: pytest.fail("packed twice"))
    second = threading.Thread(target=lambda: found.append(pack(unread, tmp_path / "train", 16)))
    first.start()
    assert started.wait(30)
    second.start()
    second.join(0.5)
    assert second.is_alive()
    go_on.set()
    first.join(30)
    second.join(30)
    assert len(found) == 2 and torch.equal(found[0].images, found[1].images)
    assert capsys.readouterr().err == "note: another run is packing pictures; waiting for it\n"


def test_other_arrays_are_packed_too(tmp_path):
    moments = np.random.default_rng(0).normal(size=(10, 8, 4, 4)).astype(np.float16)
    folder = tmp_path / "latents"

    def write() -> None:
        with new_pack(folder, "key", {"class_names": ["a"], "scale": 0.5}) as new:
            new.add(moments[:6], [0] * 6)
            new.add(moments[6:], [1] * 4)
            new.about["shift"] = 0.25

    found = pack_once(folder, "key", "latents", write)
    assert found.images.dtype == torch.float16 and np.array_equal(found.images, moments)
    assert found.labels.tolist() == [0] * 6 + [1] * 4
    assert (found.about["scale"], found.about["shift"]) == (0.5, 0.25)
    assert read_pack(folder, "another key") is None and read_pack(tmp_path / "nowhere", "key") is None


def test_a_pack_that_fails_keeps_the_one_before(tmp_path):
    pack(source_of(noise(16, 16)), tmp_path / "train", 16)
    key = json.loads((tmp_path / "train" / "pack.json").read_text())["key"]
    with pytest.raises(DamagedFile):
        pack(source_of(b"", key="other"), tmp_path / "train", 16)
    assert read_pack(tmp_path / "train", key)
    assert list(tmp_path.iterdir()) == [tmp_path / "train"]


def test_a_pack_larger_than_memory_can_be_mapped(tmp_path):
    """Its file has a hole where the images would be."""
    with new_pack(tmp_path / "train", "key", {"class_names": []}) as new:
        new.add(np.zeros((1, 3, 256, 256), np.uint8), [0])
    size = 3 * 256 * 256
    count = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // size
    with open(tmp_path / "train" / "images.npy", "r+b") as file:
        head = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, 256, 256)}
        np.lib.format.write_array_header_1_0(file, head)
        try:
            file.truncate(128 + count * size)
        except OSError:
            pytest.skip("the file system has no files with holes so large")
    np.save(tmp_path / "train" / "labels.npy", np.zeros(count, np.int64))
    found = read_pack(tmp_path / "train", "key")
    assert len(found.images) == count and found.images[count - 1].sum() == 0
