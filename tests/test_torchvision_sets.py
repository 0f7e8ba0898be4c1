"""CIFAR-10 and Flowers102: small files in their formats are read as by torchvision; damaged, missing, downloaded."""

import functools
import http.server
import pickle
import re
import sys
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, Flowers102
from torchvision.datasets.utils import calculate_md5

from loaders import torchvision_sets
from loaders.packing import read_image
from loaders.torchvision_sets import open_cifar10, open_flowers
from support.errors import NotAvailable, UserError


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with three files of training images in CIFAR-10's format, of 20 each, one of test images."""
    folder = tmp_path / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["data_batch_1", "data_batch_2", "data_batch_3", "test_batch"]
    for name in names:
        data = rng.integers(256, size=(20, 3 * 32 * 32), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": (rng.permutation(20) % 10).tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    sums = [[name, calculate_md5(folder / name)] for name in names]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:3])
    monkeypatch.setattr(CIFAR10, "test_list", sums[3:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": calculate_md5(folder / "batches.meta")})
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # where no one answers
    return folder.parent


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """A folder with 20 images in Flowers102's format, 4 for training, 3 for validation, 13 for tests."""
    scipy_io = pytest.importorskip("scipy.io", reason="Flowers102's lists are read by scipy")
    folder = tmp_path / "made" / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for i in range(1, 21):
        Image.new("RGB", (10 + i, 12), (i, 0, 0)).save(folder / "jpg" / f"image_{i:05d}.jpg")
    parts = {"trnid": [3, 1, 20, 7], "valid": [2, 9, 4], "tstid": [5, 6, 8, *range(10, 20)]}
    scipy_io.savemat(folder / "setid.mat", {name: np.array([ids]) for name, ids in parts.items()})
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": np.array([[1 + i % 5 for i in range(20)]], np.uint8)})
    sums = {name: calculate_md5(folder / name) for name in ("imagelabels.mat", "setid.mat")}
    monkeypatch.setattr(torchvision_sets, "FLOWERS_FILES", sums)
    monkeypatch.setattr(torchvision_sets, "FLOWERS_ADDRESS", "http://127.0.0.1:9/setid.mat")
    theirs = {"label": ("imagelabels.mat", sums["imagelabels.mat"]), "setid": ("setid.mat", sums["setid.mat"])}
    monkeypatch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, **theirs})
    return folder.parent


@pytest.mark.parametrize("train", [True, False])
def test_cifar10_is_as_torchvision_reads_it(cifar, train):
    source, theirs = open_cifar10("cifar10", cifar, train), CIFAR10(cifar, train)
    assert len(source.labels) == len(source.names) == len(theirs) == (60 if train else 20)
    assert source.labels == theirs.targets and source.class_names == theirs.classes
    for i in (0, 7, len(theirs) - 1):
        assert read_image(source, i).mode == "RGB" and read_image(source, i).tobytes() == theirs[i][0].tobytes()


def test_the_key_of_cifar10_is_of_both_parts_and_follows_their_files(cifar, monkeypatch):
    keys = {open_cifar10("cifar10", cifar, train).key for train in (True, False)}
    assert len(keys) == 1
    path = cifar / CIFAR10.base_folder / "test_batch"
    path.write_bytes(path.read_bytes() + b" ")
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", calculate_md5(path)]])
    assert open_cifar10("cifar10", cifar, True).key not in keys


class Trap:
    """A pickle that runs code."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_damaged_file_of_cifar10_is_named_and_never_unpickled(name, cifar):
    path = cifar / CIFAR10.base_folder / name
    for content in (path.read_bytes()[:-1], pickle.dumps(Trap()), b""):
        path.write_bytes(content)
        for train in (True, False):
            words = f"^{re.escape(str(path))} is damaged, or not CIFAR-10 .*; move it away$"
            with pytest.raises(UserError, match=words):
                open_cifar10("cifar10", cifar, train)
        assert path.read_bytes() == content


@pytest.mark.parametrize("train, theirs", [(True, ("train", "val")), (False, ("test",))])
def test_flowers_are_as_torchvision_reads_them(flowers, train, theirs):
    source = open_flowers("flowers", flowers, train)
    parts = [Flowers102(flowers, split) for split in theirs]
    assert source.labels == [label for part in parts for label in part._labels]
    assert source.names == [f"jpg/{path.name}" for part in parts for path in part._image_files]
    assert [source.open(i).size for i in range(len(source.names))] == [im.size for part in parts for im, _ in part]
    assert source.class_names == Flowers102.classes and len(set(source.class_names)) == 102
    assert all(type(label) is int for label in source.labels)


def test_the_key_of_flowers_is_of_both_parts_and_follows_the_images(flowers):
    (key,) = {open_flowers("flowers", flowers, train).key for train in (True, False)}
    path = flowers / "flowers-102" / "jpg" / "image_00005.jpg"  # of the test part
    Image.new("RGB", (99, 99)).save(path)
    assert open_flowers("flowers", flowers, True).key != key


def test_a_damaged_list_of_flowers_is_named_and_a_damaged_image_when_it_is_read(flowers):
    (flowers / "flowers-102" / "jpg" / "image_00003.jpg").write_bytes(b"no JPEG")
    source = open_flowers("flowers", flowers, True)
    with pytest.raises(UserError, match="^flowers: jpg/image_00003.jpg cannot be read"):
        read_image(source, 0)
    (flowers / "flowers-102" / "setid.mat").write_bytes(b"no list")
    with pytest.raises(UserError, match="setid.mat is damaged, or not Flowers102"):
        open_flowers("flowers", flowers, True)


def test_flowers_need_scipy_which_is_told_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setattr(torchvision_sets, "downloading", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(UserError, match="^--dataset flowers needs the package scipy; get it with: pip install scipy$"):
        open_flowers("flowers", tmp_path, True)


SETS = {"CIFAR-10": open_cifar10, "Flowers102": open_flowers}


@pytest.mark.parametrize("name", SETS)
def test_without_a_network_the_folder_is_named_and_what_to_do(name, tmp_path, request):
    request.getfixturevalue("cifar" if name == "CIFAR-10" else "flowers")
    words = f"^{name} is not in {re.escape(str(tmp_path / 'data'))}.* its server cannot be reached; .*--data-dir"
    with pytest.raises(NotAvailable, match=words):
        SETS[name]("name", tmp_path / "data", True)
    assert not (tmp_path / "data").exists()


@pytest.fixture
def served(tmp_path):
    """A folder whose files a server gives, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def test_cifar10_is_downloaded_all_or_none(cifar, served, tmp_path, monkeypatch):
    folder, address = served
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as archive:
        archive.add(cifar / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "url", address + CIFAR10.filename)
    data = tmp_path / "data"
    with pytest.raises(NotAvailable, match="^CIFAR-10 cannot be downloaded .*; try again"):
        open_cifar10("cifar10", data, True)  # its MD5 is not that of the original
    assert not list((data / CIFAR10.base_folder).iterdir())
    monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(folder / CIFAR10.filename))
    assert open_cifar10("cifar10", data, True).labels == CIFAR10(cifar).targets
    there = {path.name for path in (data / CIFAR10.base_folder).iterdir()}
    assert there == {path.name for path in (cifar / CIFAR10.base_folder).iterdir()}


def test_flowers_are_downloaded_all_or_none_and_once_more_where_an_image_is_missing(
    flowers, served, tmp_path, monkeypatch
):
    folder, address = served
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        archive.add(flowers / "flowers-102" / "jpg", "jpg")
    (folder / "imagelabels.mat").write_bytes((flowers / "flowers-102" / "imagelabels.mat").read_bytes())
    (folder / "setid.mat").write_bytes(b"falsified")
    monkeypatch.setattr(torchvision_sets, "FLOWERS_ADDRESS", address + "setid.mat")
    monkeypatch.setattr(Flowers102, "_download_url_prefix", address)
    images = ("102flowers.tgz", calculate_md5(folder / "102flowers.tgz"))
    monkeypatch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, "image": images})
    data = tmp_path / "data"
    with pytest.raises(NotAvailable, match="^Flowers102 cannot be downloaded"):
        open_flowers("flowers", data, True)
    assert not list((data / "flowers-102").iterdir())
    (folder / "setid.mat").write_bytes((flowers / "flowers-102" / "setid.mat").read_bytes())
    for _ in range(2):
        assert open_flowers("flowers", data, True).names == open_flowers("flowers", flowers, True).names
        there = sorted(path.name for path in (data / "flowers-102").iterdir())
        assert there == ["imagelabels.mat", "jpg", "setid.mat"]
        missing = data / "flowers-102" / "jpg" / "image_00005.jpg"
        missing.unlink()
