import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from loaders import image_folder
from loaders.image_folder import hold_out, open_folder, open_zip
from loaders.packing import Source, pack
from support.errors import DamagedFile, UserError


def fill(root: Path, *names: str, size: tuple[int, int] = (8, 8)) -> Path:
    """A folder with these files: images, each of its own colour, a folder for a name with a slash at its end."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        elif name.endswith((".txt", ".csv", ".heic", ".db")):
            path.write_text("no image")
        else:
            colour = tuple(zlib.crc32(name.encode()).to_bytes(4, "big")[:3])
            image = Image.new("RGB", size, colour)
            image.save(path, "PNG" if name.startswith("._") or "/._" in name else None)
    return root


def zip_of(folder: Path, path: Path) -> Path:
    """The folder as a zip, as usual programs write it: folders are members as well."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture(params=["folder", "zip"])
def opened(request, tmp_path):
    """A function of a folder, that opens it, or a zip of it, as a source."""

    def opener(folder: Path, train: bool = True) -> Source:
        if request.param == "folder":
            return open_folder(folder, "", train)
        return open_zip(zip_of(folder, tmp_path / f"{folder.name}.zip"), "", train)

    return opener


PICTURES = [f"{name}/{i}.png" for name in ("dog", "cat", "Emu") for i in range(20)]


# What is an image of which class


def test_classes_and_their_order_are_those_of_torchvision(tmp_path, opened):
    names = ["b/1.png", "b/10.png", "b/2.PNG", "b/sub/a.jpg", "b/sub-1/a.png", "b/sub/x/a.png", "B2/z.bmp", "a b/é.png"]
    root = fill(tmp_path / "root", *(f"{part}/{name}" for part in ("train", "test") for name in names), "train/b/n.txt")
    for train, part in ((True, "train"), (False, "test")):
        theirs, ours = ImageFolder(root / part), opened(root, train)
        assert ours.class_names == theirs.classes
        assert ours.labels == theirs.targets
        assert [str(root / name) for name in ours.names] == [path for path, _ in theirs.samples]
        for i, (image, _) in enumerate(theirs):
            assert np.array_equal(ours.open(i).convert("RGB"), image)


def test_a_folder_without_subfolders_is_one_class_without_a_name(tmp_path, opened):
    source = opened(fill(tmp_path / "root", *(f"{i}.png" for i in range(20)), "notes.txt"))
    assert source.class_names == [] and source.labels == [0] * 18
    source = opened(fill(tmp_path / "parts", "train/1.png", "train/2.png", "test/3.png"), train=False)
    assert (source.class_names, source.labels, source.names) == ([], [0], ["test/3.png"])


def test_one_subfolder_is_one_class_with_a_name(tmp_path, opened):
    source = opened(fill(tmp_path / "root", *(f"cat/{i}.png" for i in range(5))))
    assert source.class_names == ["cat"] and source.labels == [0] * 4


@pytest.mark.parametrize("top", ["cifar/", "a/b/", "train/"])
def test_folders_around_it_all_are_looked_through(top, tmp_path, opened):
    bare, wrapped = (
        opened(fill(tmp_path / "bare", *PICTURES)),
        opened(fill(tmp_path / "w", *(top + p for p in PICTURES))),
    )
    assert wrapped.class_names == bare.class_names == ["Emu", "cat", "dog"]
    names = [f"{part}/{name}" for part in ("train", "test") for name in PICTURES[::7]]
    parts = opened(fill(tmp_path / "parts", *(top + name for name in names)), train=False)
    assert parts.names and all(name.startswith(f"{top}test/") for name in parts.names)


@pytest.mark.parametrize("test_name", ["test", "val", "valid", "validation", "Test"])
def test_parts_by_their_names(test_name, tmp_path, opened):
    root = fill(tmp_path / "root", "train/a/1.png", "train/b/2.png", f"{test_name}/a/3.png", f"{test_name}/b/4.png")
    assert opened(root).names == ["train/a/1.png", "train/b/2.png"]
    assert opened(root, train=False).names == [f"{test_name}/a/3.png", f"{test_name}/b/4.png"]
    assert opened(root).key == opened(root, train=False).key


def test_test_comes_before_val(tmp_path, opened):
    root = fill(tmp_path / "root", *(f"{part}/a/1.png" for part in ("train", "val", "test")))
    assert opened(root, train=False).names == ["test/a/1.png"]


def test_a_class_may_be_called_train(tmp_path, opened):
    root = fill(tmp_path / "root", "train/1.png", "train/2.png", "ship/1.png")
    assert opened(root).class_names == ["ship", "train"]


def test_a_class_of_which_the_test_part_has_nothing_keeps_its_number(tmp_path, opened):
    root = fill(tmp_path / "root", *(f"train/{name}/1.png" for name in "abc"), "test/c/1.png", "test/a/1.png")
    source = opened(root, train=False)
    assert source.class_names == ["a", "b", "c"] and source.labels == [0, 2]


def test_what_systems_leave_behind_and_what_is_no_image_is_left_out(tmp_path, opened):
    root = fill(tmp_path / "root", *PICTURES)
    rubbish = [
        ".DS_Store.png",
        "cat/.hidden.png",
        "cat/._1.png",
        "__MACOSX/cat/._1.png",
        ".git/x.png",
        "cat/.git/x.png",
    ]
    more = fill(tmp_path / "more", *PICTURES, *rubbish, "readme.txt", "cat/notes.txt", "labels.csv", "cat/Thumbs.db")
    assert opened(more)[1:4] == opened(root)[1:4]


def test_images_beside_class_folders_are_told_of(tmp_path, opened, capsys):
    source = opened(fill(tmp_path / "root", *PICTURES, "cover.png"))
    assert len(source.labels) == 54
    assert "1 images beside the class folders, as cover.png, are left out" in capsys.readouterr().err


def test_links_are_followed_and_a_loop_ends(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", *PICTURES)
    root = tmp_path / "root"
    (root / "one").mkdir(parents=True)
    (root / "one" / "a.png").symlink_to(elsewhere / "cat" / "1.png")
    (root / "one" / "loop").symlink_to(root)
    (root / "two").symlink_to(elsewhere / "dog")
    source = open_folder(root, "", True)
    assert source.class_names == ["one", "two"] and len(source.labels) == 1 + 20 - 2
    (root / "one" / "gone.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(DamagedFile, match="root: one/gone.png cannot be read .No such file or directory"):
        for train in (True, False):
            pack(open_folder(root, "", train), tmp_path / "packed" / str(train), 8)


# The tenth that is held out


def test_a_tenth_is_held_out_spread_over_the_classes(tmp_path, opened):
    root = fill(tmp_path / "root", *PICTURES)
    train, test = opened(root), opened(root, train=False)
    assert sorted(train.names + test.names) == sorted(PICTURES)
    assert torch.bincount(torch.tensor(test.labels)).tolist() == [2, 2, 2]
    assert train.class_names == test.class_names and train.key == test.key
    assert opened(root, train=False)[1:5] == test[1:5]  # the same again


@pytest.mark.parametrize(
    ("counts", "expected"), [([2], 1), ([1, 1, 2], 1), ([5] * 20, 8), ([1000], 100), ([100, 1, 37], 14)]
)
def test_how_many_are_held_out(counts, expected):
    groups = {str(i): [f"{i}/{j}.png" for j in range(count)] for i, count in enumerate(counts)}
    held_out = hold_out(groups)
    assert len(held_out) == expected
    assert all(set(files) - held_out for files in groups.values())  # something is left to train on


def test_those_held_out_are_from_all_over_a_class():
    """And not its first, which may be of one camera or one day."""
    numbers = [int(name[:3]) // 250 for name in hold_out({"a": [f"{i:03}.png" for i in range(1000)]})]
    assert min(numbers.count(quarter) for quarter in range(4)) > 10


def test_images_added_leave_the_others_in_their_part():
    before = hold_out({"a": [f"{i}.png" for i in range(1000)]})
    after = hold_out({"a": [f"{i}.png" for i in range(1100)]})
    assert len(before - after) < 20


def test_one_image_a_class_leaves_nothing_to_hold_out(tmp_path, opened):
    root = fill(tmp_path / "root", "a/1.png", "b/1.png")
    assert len(opened(root).labels) == 2
    with pytest.raises(UserError, match="one image a class, so none is held out"):
        opened(root, train=False)


# What has changed


def test_the_key_follows_names_sizes_and_times(tmp_path):
    root = fill(tmp_path / "root", *PICTURES)
    keys = [open_folder(root, "", True).key]

    def changed() -> bool:
        keys.append(open_folder(root, "", True).key)
        return keys[-1] not in keys[:-1]

    assert not changed()
    (root / "notes.txt").write_text("no image")
    assert not changed()
    fill(root, "cat/new.png")
    assert changed()
    (root / "cat" / "new.png").rename(root / "cat" / "other.png")
    assert changed()
    os.utime(root / "cat" / "other.png", (1, 1))
    assert changed()
    (root / "cat" / "other.png").write_bytes(b"1")
    os.utime(root / "cat" / "other.png", (1, 1))
    assert changed()
    (root / "cat" / "other.png").unlink()
    assert not changed() or keys[-1] == keys[0]
    assert open_folder(fill(tmp_path / "copy", *PICTURES[1:]), "", True).key != keys[0]


def test_the_key_of_a_zip_follows_its_contents_and_not_where_it_lies(tmp_path):
    root = fill(tmp_path / "root", *PICTURES)
    first = zip_of(root, tmp_path / "a.zip")
    key = open_zip(first, "", True).key
    (tmp_path / "b.zip").write_bytes(first.read_bytes())
    assert open_zip(tmp_path / "b.zip", "", True).key == key
    path = root / "cat" / "1.png"
    times = path.stat().st_atime, path.stat().st_mtime
    path.write_bytes(bytes(reversed(path.read_bytes())))  # as many bytes
    os.utime(path, times)
    assert open_zip(zip_of(root, tmp_path / "c.zip"), "", True).key != key


def test_a_changed_folder_is_packed_anew(tmp_path, capsys):
    root, folder = fill(tmp_path / "root", *PICTURES), tmp_path / "packed" / "train"
    assert len(pack(open_folder(root, "", True), folder, 8).labels) == 54
    capsys.readouterr()
    assert len(pack(open_folder(root, "", True), folder, 8).labels) == 54
    assert capsys.readouterr().err == ""
    fill(root, *(f"cat/new{i}.png" for i in range(10)))
    assert len(pack(open_folder(root, "", True), folder, 8).labels) == 63
    assert "root or the settings have changed since it was packed, so it is packed anew" in capsys.readouterr().err


# Bad input: one line each


def refused(opened, root: Path, words: str, train: bool = True) -> None:
    with pytest.raises(UserError, match=words) as error:
        opened(root, train)
    assert "\n" not in str(error.value)


def test_without_images(tmp_path, opened):
    (tmp_path / "empty").mkdir()
    refused(opened, tmp_path / "empty", "empty.* holds no images; put some in")
    refused(opened, fill(tmp_path / "other", "a/1.heic", "b/2.heic", "n.txt"), "holds no images, only .heic, .txt")


@pytest.mark.parametrize("names", [["cat/"], ["cat/notes.txt"], ["cat/deep/"]])
def test_an_empty_class_is_named(names, tmp_path, opened):
    refused(opened, fill(tmp_path / "root", "dog/1.png", "dog/2.png", *names), "the folder cat holds no images")


@pytest.mark.parametrize("train", [True, False])
def test_a_test_part_that_does_not_fit(train, tmp_path, opened):
    base = ["train/cat/1.png", "train/dog/1.png"]
    refused(opened, fill(tmp_path / "a", *base, "test/emu/1.png"), "test/emu has no counterpart in train/", train)
    refused(opened, fill(tmp_path / "b", *base, "test/1.png"), "test/ has no counterpart in train/", train)
    refused(opened, fill(tmp_path / "c", *base, "test/"), "the folder test/ holds no images", train)


def test_classes_that_differ_only_in_case(tmp_path, opened):
    for others in ([], ["dog/3.png"]):
        root = fill(tmp_path / f"with {len(others)}", "Cat/1.png", "cat/2.png", *others)
        if len(list(root.iterdir())) == 2 + len(others):  # not on a file system that takes them for one
            refused(opened, root, "class folders Cat and cat differ only in case; rename one")


def test_a_text_file_named_png_and_a_truncated_jpeg(tmp_path, opened):
    for name, size in (("cat/bad.png", 20), ("cat/half.jpg", 400)):
        root = fill(tmp_path / name[4:7], f"train/{name}", "train/dog/1.png", "test/cat/1.png")
        path = root / "train" / name
        path.write_bytes(path.read_bytes()[:size] if name.endswith("jpg") else b"shopping: milk, bread")
        with pytest.raises(
            DamagedFile, match=f"{root.name}[^:]*: train/{name} cannot be read .*--skip-damaged"
        ) as error:
            pack(opened(root), tmp_path / "packed" / "train", 8)
        assert "\n" not in str(error.value) and list((tmp_path / "packed").iterdir()) == []


def test_what_there_is_no_folder_or_no_zip_at(tmp_path):
    for opener in (open_folder, open_zip):
        with pytest.raises(UserError, match="nothing.* cannot be read .No such file or directory"):
            opener(tmp_path / "nothing", "", True)
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        open_zip(tmp_path, "", True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read .Not a directory"):
        open_folder(tmp_path / "file", "", True)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    root = fill(tmp_path / "root", *PICTURES)
    (root / "cat").chmod(0)
    scandir = os.scandir

    def guarded(path):  # as the system does for all but its administrator
        if os.path.basename(os.path.normpath(path)) == "cat":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    try:
        with pytest.raises(UserError, match="root/cat/? cannot be read .Permission denied"):
            open_folder(root, "", True)
    finally:
        (root / "cat").chmod(0o700)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\3\4" + bytes(100)])
def test_what_is_no_zip(content, tmp_path):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match="a.zip is damaged, or no zip"):
        open_zip(tmp_path / "a.zip", "", True)


def test_a_zip_with_any_byte_damaged_is_refused_or_read(tmp_path):
    """Whatever is damaged, it ends in a UserError or in images."""
    data = zip_of(fill(tmp_path / "root", "a/1.png", "a/2.png"), tmp_path / "good.zip").read_bytes()
    refused = 0
    for i in range(len(data)):
        (tmp_path / "bad.zip").write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        try:
            source = open_zip(tmp_path / "bad.zip", "", True)
            pack(source, tmp_path / "packed" / f"{i}", 4, channels=3)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_an_encrypted_zip(tmp_path):
    path = zip_of(fill(tmp_path / "root", "a/1.png", "a/2.png"), tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = 0
        while (start := data.find(signature, start)) >= 0:
            data[start + flags] |= 1
            start += 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="a.zip is encrypted; give a zip without a password"):
        open_zip(path, "", True)


@pytest.mark.parametrize(
    "name", ["../out.png", "a/../../out.png", "/etc/out.png", "C:/out.png", "..\\out.png", "a/../b.png"]
)
def test_names_that_lead_out_of_a_zip(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/1.png", b"")
        archive.writestr(zipfile.ZipInfo(name), b"")
    with pytest.raises(UserError, match="a.zip: the name .* leads out of the zip"):
        open_zip(tmp_path / "a.zip", "", True)


def test_a_zip_written_on_windows(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in PICTURES:
            archive.writestr("pets\\" + name.replace("/", "\\"), b"")
    assert open_zip(tmp_path / "a.zip", "", True).class_names == ["Emu", "cat", "dog"]


def bomb(path: Path, said: int, kind: int = zipfile.ZIP_DEFLATED) -> Path:
    """A zip of an image file of 200 MB of nothing, which says that it has `said` bytes."""
    with zipfile.ZipFile(path, "w", kind) as archive, archive.open("a/bomb.png", "w") as file:
        for _ in range(200):
            file.write(bytes(1_000_000))
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        start = data.rfind(signature)
        data[start + place : start + place + 4] = struct.pack("<I", said)
    path.write_bytes(data)
    return path


def test_a_bomb_is_refused_by_the_size_it_says(tmp_path, monkeypatch):
    path = bomb(tmp_path / "a.zip", 200_000_000)
    monkeypatch.setattr(image_folder, "LARGEST_FILE", 100_000_000)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("decompressed"))
    with pytest.raises(DamagedFile, match="a.zip: a/bomb.png cannot be read .it would be 0.2 GB, decompressed"):
        pack(open_zip(path, "", True), tmp_path / "packed" / "train", 8)


def test_a_bomb_that_lies_about_its_size_is_not_decompressed_beyond_it(tmp_path):
    import tracemalloc

    path = bomb(tmp_path / "a.zip", 10_000)
    source = open_zip(path, "", True)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFile, match="a/bomb.png cannot be read .*CRC"):
            pack(source, tmp_path / "packed" / "train", 8)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_way_to_compress_that_knows_no_bounds_is_refused(tmp_path):
    source = open_zip(bomb(tmp_path / "a.zip", 10_000, zipfile.ZIP_LZMA), "", True)
    with pytest.raises(DamagedFile, match="a/bomb.png cannot be read .it is compressed in an unusual way"):
        pack(source, tmp_path / "packed" / "train", 8)


def test_a_file_of_five_channels(tmp_path, opened):
    root = fill(tmp_path / "root", "train/a/", "test/a/1.png")
    # Of 4 x 4 pixels, eight bits, not compressed, from byte 122 on, five a pixel, 80 bytes in all.
    fields = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 122, 277: 5, 278: 4, 279: 80}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields))
    (root / "train" / "a" / "five.tif").write_bytes(head + entries + bytes(4 + 80))
    with pytest.raises(DamagedFile, match="train/a/five.tif cannot be read"):
        pack(opened(root), tmp_path / "packed" / "train", 8)


def test_a_file_that_would_run_another_program_is_no_image(tmp_path, opened):
    """PostScript is drawn by Ghostscript, whatever the file's name."""
    root = fill(tmp_path / "root", "a/1.png", "a/2.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    for name in ("1.png", "2.png"):
        (root / "a" / name).write_bytes((tmp_path / "x.eps").read_bytes())
    with pytest.raises(DamagedFile, match="a/.*it is not an image, or of a kind that is not read"):
        pack(opened(root), tmp_path / "packed" / "train", 8)


def test_an_image_removed_while_packing_is_named(tmp_path):
    root = fill(tmp_path / "root", *PICTURES)
    source = open_folder(root, "", True)
    (root / source.names[40]).unlink()
    with pytest.raises(DamagedFile, match=f"{source.names[40]} cannot be read .No such file or directory"):
        pack(source, tmp_path / "packed" / "train", 8)


# Whole


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm", "jpeg", "JPG"])
def test_kinds_of_files(ending, tmp_path, opened):
    root = fill(tmp_path / "root", *(f"cat/{i}.{ending}" for i in range(3)))
    assert len(opened(root).labels) == 2


def test_from_a_folder_and_from_its_zip_the_same_is_packed(tmp_path):
    root = fill(tmp_path / "root", *PICTURES, size=(40, 30))
    path = zip_of(root, tmp_path / "a.zip")
    for train in (True, False):
        one = pack(open_folder(root, "", train), tmp_path / "one" / str(train), 16)
        two = pack(open_zip(path, "", train), tmp_path / "two" / str(train), 16)
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
        assert len(one.labels) == (54 if train else 6)


def test_a_zip_is_read_from_many_threads(tmp_path, monkeypatch):
    root = fill(tmp_path / "root", *(f"{i:03}.png" for i in range(500)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    found = pack(open_zip(zip_of(root, tmp_path / "a.zip"), "", True), tmp_path / "packed" / "train", 8)
    names = open_folder(root, "", True).names
    colours = [list(zlib.crc32(name.encode()).to_bytes(4, "big")[:3]) for name in names]
    assert found.images[:, :, 0, 0].tolist() == colours
