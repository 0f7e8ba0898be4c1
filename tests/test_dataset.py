import functools
import gzip
import http.server
import socket
import threading
import time

import pytest
import torch
from torchvision.datasets import MNIST
from torchvision.datasets.utils import calculate_md5

from dataset import DATASETS, denormalize, load_dataset, normalize
from loaders import glyphs, mnist
from loaders.glyphs import draw_glyphs
from loaders.mnist import MNIST_FILES
from support.errors import NotAvailable, UserError


def test_glyphs_are_drawn_in_time_alike_for_a_seed_and_cached(tmp_path, monkeypatch):
    start = time.perf_counter()
    train, test = (load_dataset("glyphs", str(tmp_path), train=train) for train in (True, False))
    assert time.perf_counter() - start < 15
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert torch.equal(draw_glyphs(60_000, seed=0)[0], train.images)
    assert not torch.equal(draw_glyphs(10_000, seed=0)[0], test.images)
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda *_: pytest.fail("drawn again"))
    again = load_dataset("glyphs", str(tmp_path))
    assert torch.equal(again.images, train.images) and torch.equal(again.labels, train.labels)


def test_glyphs_are_digits_whole_and_various():
    images, labels = draw_glyphs(5000, seed=2)
    assert labels.bincount(minlength=10).min() > 400
    ink = images.float().mean(dim=(1, 2, 3)) / 255
    assert ink.min() > 0.005 and ink.max() < 0.5 and ink.std() > 0.02
    border = torch.cat([images[:, 0, 0], images[:, 0, -1], images[:, 0, :, 0], images[:, 0, :, -1]], dim=1)
    assert (border.amax(1) > 127).float().mean() < 0.01  # hardly a digit is cut by the edge
    assert len(images.flatten(1).unique(dim=0)) == 5000


def test_a_damaged_cache_is_named_and_kept(tmp_path):
    path = tmp_path / "glyphs" / "train.pth"
    load_dataset("glyphs", str(tmp_path))
    damaged = path.read_bytes()[:100_000]
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=str(path)):
        load_dataset("glyphs", str(tmp_path))
    assert path.read_bytes() == damaged


def test_glyphs_do_without_a_cache_where_none_can_be_written(tmp_path, capsys):
    (tmp_path / "glyphs").write_text("a file where the folder should be")
    assert len(load_dataset("glyphs", str(tmp_path)).images) == 60_000
    assert "drawn anew" in capsys.readouterr().err


def test_mnist_is_read(mnist_dir):
    for train, count in ((True, 60_000), (False, 10_000)):
        data = load_dataset("mnist", mnist_dir, train=train)
        assert data.images.shape == (count, 1, 28, 28) and data.images.dtype == torch.uint8
        assert data.labels.shape == (count,) and data.labels.dtype == torch.int64
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_a_damaged_mnist_file_is_named_and_neither_used_nor_replaced(name, tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for file in MNIST_FILES:
        (folder / file).write_bytes(b"cut short")
    with pytest.raises(UserError, match="train-images-idx3-ubyte is damaged"):
        load_dataset(name, str(tmp_path))
    assert (folder / "train-images-idx3-ubyte").read_bytes() == b"cut short"


@pytest.fixture
def silent_server(monkeypatch):
    """A server that takes connections and never answers, in the place of MNIST's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"] * 2)
        yield


def test_auto_falls_back_loudly_and_soon(tmp_path, silent_server, capsys):
    start = time.perf_counter()
    assert load_dataset("auto", str(tmp_path)).name == "glyphs"
    assert time.perf_counter() - start < 20
    assert "***" in capsys.readouterr().err


def test_a_name_server_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist.urllib.request, "urlopen", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(mnist, "download_mnist", functools.partial(mnist.download_mnist, timeout=1))
    start = time.perf_counter()
    assert load_dataset("auto", str(tmp_path)).name == "glyphs"
    assert time.perf_counter() - start < 10


def test_mnist_asked_for_by_name_never_falls_back(tmp_path, silent_server, monkeypatch):
    monkeypatch.setattr(mnist, "download_mnist", functools.partial(mnist.download_mnist, timeout=1))
    with pytest.raises(NotAvailable, match="--data-dir"):
        load_dataset("mnist", str(tmp_path))


def serve(folder, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
    return server


def test_mnist_is_downloaded_where_it_is_not(tmp_path, monkeypatch, mnist_dir):
    resources = []
    for name in MNIST_FILES:
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress((mnist.Path(mnist_dir) / "MNIST" / "raw" / name).read_bytes(), 1))
        resources.append((packed.name, calculate_md5(packed)))
    monkeypatch.setattr(MNIST, "resources", resources)
    server = serve(tmp_path, monkeypatch)
    data = load_dataset("auto", str(tmp_path / "data"))
    server.shutdown()
    assert data.name == "mnist" and len(data.images) == 60_000
    assert {path.name for path in (tmp_path / "data" / "MNIST" / "raw").iterdir()} == set(MNIST_FILES)


def test_a_falsified_download_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    for name, _ in MNIST.resources:
        (tmp_path / name).write_bytes(gzip.compress(b"not MNIST"))
    server = serve(tmp_path, monkeypatch)
    with pytest.raises(NotAvailable, match="cannot be downloaded"):
        load_dataset("mnist", str(tmp_path / "data"))
    server.shutdown()
    assert not list((tmp_path / "data" / "MNIST" / "raw").iterdir())


def test_a_dataset_of_ones_own(monkeypatch):
    def load_stripes(data_dir, train):
        images = torch.zeros(6, 3, 10, 8, dtype=torch.uint8)
        images[:, :, ::2] = 255
        return images, torch.arange(6) % 3

    monkeypatch.setitem(DATASETS, "stripes", load_stripes)
    data = load_dataset("stripes", "nowhere")
    assert data.images.shape == (6, 3, 10, 10)  # padded to a square
    padded = load_dataset("stripes", "nowhere", image_size=16).images
    assert padded.shape == (6, 3, 16, 16)
    assert torch.equal(padded[:, :, 3:13, 4:12], load_stripes("", True)[0])
    assert padded.sum() == load_stripes("", True)[0].sum()
    with pytest.raises(UserError, match="image_size 9 is smaller than the 10 x 8 images"):
        load_dataset("stripes", "nowhere", image_size=9)
    monkeypatch.setitem(DATASETS, "stripes", lambda *_: (torch.zeros(6, 3, 10, 8), torch.arange(6)))
    with pytest.raises(UserError, match="uint8"):
        load_dataset("stripes", "nowhere")


def test_an_unknown_dataset_is_refused_naming_the_known():
    with pytest.raises(UserError, match="'cifar' is not one of auto, mnist, glyphs"):
        load_dataset("cifar", "nowhere")


def test_normalize_and_back():
    images = torch.arange(256, dtype=torch.uint8)
    x = normalize(images)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    assert torch.equal(denormalize(x), images)
    assert denormalize(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
