import functools
import gzip
import http.server
import os
import re
import socket
import struct
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.datasets import KMNIST, MNIST, FashionMNIST
from torchvision.datasets.utils import calculate_md5

import inference
import train
from config import Config
from dataset import DATASETS, Dataset, denormalize, load_dataset, normalize
from dit import DiT
from loaders import download, glyphs, mnist
from loaders.check import check_loaded
from loaders.glyphs import draw_glyphs
from loaders.mnist import KMNIST_FILES, MNIST_FILES
from support.checkpoint import load_model
from support.errors import NotAvailable, UserError
from support.files import load_file, save_file


def test_glyphs_are_drawn_alike_for_a_seed_and_cached(glyphs_dir, monkeypatch):
    data, test = (load_dataset("glyphs", str(glyphs_dir), train=part) for part in (True, False))
    assert data.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert data.images.dtype == torch.uint8 and data.labels.dtype == torch.int64
    assert torch.equal(draw_glyphs(60_000, seed=0)[0], data.images)
    assert not torch.equal(draw_glyphs(10_000, seed=0)[0], test.images)
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda *_: pytest.fail("drawn again"))
    again = load_dataset("glyphs", str(glyphs_dir))
    assert torch.equal(again.images, data.images) and torch.equal(again.labels, data.labels)


def test_glyphs_are_drawn_two_thousand_at_a_time_from_outlines_made_once(monkeypatch):
    """What makes 60,000 a matter of seconds."""
    calls = []
    templates, sample = glyphs.glyph_distances, glyphs.F.grid_sample
    monkeypatch.setattr(glyphs, "glyph_distances", lambda: calls.append("outlines") or templates())
    monkeypatch.setattr(glyphs.F, "grid_sample", lambda *args, **kw: calls.append("sample") or sample(*args, **kw))
    draw_glyphs(6000, seed=0)
    assert calls == ["outlines", "sample", "sample", "sample"]


def test_glyphs_are_digits_whole_and_various():
    images, labels = draw_glyphs(5000, seed=2)
    assert labels.bincount(minlength=10).min() > 400
    ink = images.float().mean(dim=(1, 2, 3)) / 255
    assert ink.min() > 0.005 and ink.max() < 0.5 and ink.std() > 0.02
    border = torch.cat([images[:, 0, 0], images[:, 0, -1], images[:, 0, :, 0], images[:, 0, :, -1]], dim=1)
    assert (border.amax(1) > 127).float().mean() < 0.01  # hardly a digit is cut by the edge
    assert len(images.flatten(1).unique(dim=0)) == 5000


@pytest.fixture
def few(monkeypatch):
    """Two hundred glyphs in the place of 60,000, and a list of the seeds drawn with."""
    seeds = []
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda count, seed: seeds.append(seed) or draw_glyphs(200, seed))
    return seeds


def test_a_damaged_cache_is_named_and_kept(tmp_path, few):
    path = tmp_path / "glyphs" / "train.pth"
    load_dataset("glyphs", str(tmp_path))
    damaged = path.read_bytes()[:10_000]
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=str(path)):
        load_dataset("glyphs", str(tmp_path))
    assert path.read_bytes() == damaged


def test_glyphs_do_without_a_cache_where_none_can_be_written(tmp_path, few, capsys):
    (tmp_path / "glyphs").write_text("a file where the folder should be")
    assert len(load_dataset("glyphs", str(tmp_path)).images) == 200
    assert "drawn anew" in capsys.readouterr().err


def test_glyphs_are_drawn_anew_where_the_code_or_the_fonts_have_changed(tmp_path, few, monkeypatch, capsys):
    kept = load_dataset("glyphs", str(tmp_path))
    load_dataset("glyphs", str(tmp_path))
    assert few == [0] and not capsys.readouterr().err
    monkeypatch.setattr(glyphs, "version", lambda package: f"a later {package}")
    for _ in range(2):
        assert torch.equal(load_dataset("glyphs", str(tmp_path)).images, kept.images)
    assert few == [0, 0] and "were drawn by another version" in capsys.readouterr().err
    changed = tmp_path / "glyphs.py"
    changed.write_text("other code")
    monkeypatch.setattr(glyphs, "__file__", str(changed))
    load_dataset("glyphs", str(tmp_path))
    assert few == [0, 0, 0]
    save_file([kept.images, kept.labels], tmp_path / "glyphs" / "train.pth")  # as earlier versions did
    load_dataset("glyphs", str(tmp_path))
    assert few == [0, 0, 0]


def test_mnist_is_read(mnist_dir):
    for part, count in ((True, 60_000), (False, 10_000)):
        data = load_dataset("mnist", mnist_dir, train=part)
        assert data.images.shape == (count, 1, 28, 28) and data.images.dtype == torch.uint8
        assert data.labels.shape == (count,) and data.labels.dtype == torch.int64
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.fixture
def fashion_dir() -> str:
    folder = os.environ.get("DATA_DIR", "data")
    if not all((mnist.Path(folder) / "FashionMNIST" / "raw" / name).exists() for name in MNIST_FILES):
        pytest.skip(f"the real Fashion-MNIST is not in {folder}: name its folder in DATA_DIR")
    return folder


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


@pytest.fixture
def impatient(monkeypatch):
    """MNIST's servers are given up sooner, for the tests' sake."""
    monkeypatch.setattr(mnist, "downloading", functools.partial(mnist.downloading, timeout=1))


def test_auto_falls_back_loudly(glyphs_dir, silent_server, impatient, capsys):
    assert load_dataset("auto", str(glyphs_dir)).name == "glyphs"
    assert "***" in capsys.readouterr().err


def test_two_mirrors_are_given_ten_seconds_together_and_nothing_else_is_tried(tmp_path, monkeypatch):
    patience = []

    def no_answer(url, timeout):
        patience.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(MNIST, "mirrors", ["http://one/", "http://two/"])
    monkeypatch.setattr(download.urllib.request, "urlopen", no_answer)
    monkeypatch.setattr(MNIST, "download", lambda *_: pytest.fail("a download of what cannot be reached"))
    with pytest.raises(NotAvailable):
        load_dataset("mnist", str(tmp_path))
    assert patience == [5, 5]


def test_a_name_server_that_hangs_is_not_waited_for(glyphs_dir, monkeypatch, impatient):
    answer, answered = threading.Event(), []

    def hang(*_, **__):  # a name server that heeds no timeout
        answer.wait(60)
        answered.append(True)
        raise TimeoutError

    monkeypatch.setattr(download.urllib.request, "urlopen", hang)
    assert load_dataset("auto", str(glyphs_dir)).name == "glyphs"
    assert not answered
    (prober,) = (thread for thread in threading.enumerate() if "try_servers" in thread.name)
    assert prober.daemon  # the end of the program does not wait for it either
    answer.set()
    prober.join()


def test_mnist_asked_for_by_name_never_falls_back(tmp_path, silent_server, impatient):
    with pytest.raises(NotAvailable, match="--data-dir"):
        load_dataset("mnist", str(tmp_path))


def serve(folder, monkeypatch, kind=MNIST):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(kind, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
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


def write_kmnist(folder, files=KMNIST_FILES):
    """Files in MNIST's format with KMNIST's sizes: every image is black, the labels go round."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        size = 60_000 if name.startswith("train") else 10_000
        if "images" in name:
            content = struct.pack(">4i", 0x803, size, 28, 28) + bytes(size * 784)
        else:
            content = struct.pack(">2i", 0x801, size) + bytes(i % 10 for i in range(size))
        (folder / name).write_bytes(content)


def test_fashion_is_read_with_its_class_names(fashion_dir):
    for part, count in ((True, 60_000), (False, 10_000)):
        images, labels, names = mnist.load_fashion(fashion_dir, part)
        theirs = FashionMNIST(fashion_dir, train=part)
        assert images.shape == (count, 1, 28, 28) and torch.equal(images[:, 0], theirs.data)
        assert torch.equal(labels, theirs.targets) and names == FashionMNIST.classes
    assert names[0] == "T-shirt/top" and names[labels[0]] == "Ankle boot"
    assert load_dataset("fashion", fashion_dir).num_classes == 10


def test_kmnist_is_read_with_its_class_names(tmp_path):
    write_kmnist(tmp_path / "KMNIST" / "raw")
    images, labels, names = mnist.load_kmnist(tmp_path, train=False)
    assert images.shape == (10_000, 1, 28, 28) and labels[:12].tolist() == [*range(10), 0, 1]
    assert names == KMNIST.classes and names[1] == "ki"
    assert len(load_dataset("kmnist", tmp_path).images) == 60_000


@pytest.mark.parametrize("name, load", [("FashionMNIST", mnist.load_fashion), ("KMNIST", mnist.load_kmnist)])
@pytest.mark.parametrize("file", ["t10k-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_of_mnists_format_is_named(name, load, file, tmp_path):
    path = tmp_path / name / "raw" / file
    write_kmnist(path.parent, [file])
    whole = path.read_bytes()
    others = [whole] if name == "FashionMNIST" else []  # in the right format, but of another set
    for damaged in (whole[:-1], whole + b"0", b"\1" + whole[1:], whole[:7] + b"\0" + whole[8:], b"", *others):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^{re.escape(str(path))} is damaged, or not {name} .*; move it away"):
            load(tmp_path, train=True)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("name, kind", [("fashion", FashionMNIST), ("kmnist", KMNIST)])
def test_sets_in_mnists_format_are_downloaded_all_or_none(name, kind, tmp_path, monkeypatch):
    write_kmnist(tmp_path / "original")
    resources = []
    for file in KMNIST_FILES:
        packed = tmp_path / f"{file}.gz"
        packed.write_bytes(gzip.compress((tmp_path / "original" / file).read_bytes(), 1))
        resources.append((packed.name, calculate_md5(packed)))
    known = {file: calculate_md5(tmp_path / "original" / file) for file in KMNIST_FILES}
    monkeypatch.setattr(mnist, "FASHION_FILES", known)
    server = serve(tmp_path, monkeypatch, kind)
    monkeypatch.setattr(kind, "resources", [*resources[:3], (resources[3][0], "0" * 32)])
    raw = tmp_path / "data" / kind.__name__ / "raw"
    with pytest.raises(NotAvailable, match=f"^{kind.__name__} cannot be downloaded .*; try again"):
        load_dataset(name, tmp_path / "data")
    assert not list(raw.iterdir())
    monkeypatch.setattr(kind, "resources", resources)
    assert len(load_dataset(name, tmp_path / "data").images) == 60_000
    server.shutdown()
    assert {path.name for path in raw.iterdir()} == set(KMNIST_FILES)


@pytest.mark.parametrize("name, kind", [("fashion", FashionMNIST), ("kmnist", KMNIST)])
def test_sets_in_mnists_format_never_fall_back(name, kind, tmp_path, monkeypatch, impatient):
    monkeypatch.setattr(kind, "mirrors", ["http://127.0.0.1:9/"])
    words = f"^{kind.__name__} is not in {re.escape(str(tmp_path))}.* its server cannot be reached; .*--data-dir"
    with pytest.raises(NotAvailable, match=words):
        load_dataset(name, tmp_path)


def own(monkeypatch, images, labels, name="own"):
    monkeypatch.setitem(DATASETS, name, lambda data_dir, train: (images, labels))


STRIPES = torch.zeros(6, 3, 10, 8, dtype=torch.uint8)
STRIPES[:, :, ::2] = 255
THREE = torch.arange(6) % 3


def test_a_dataset_of_ones_own(monkeypatch):
    own(monkeypatch, STRIPES, THREE.to(torch.uint8))
    data = load_dataset("own", "nowhere")
    assert data.images.shape == (6, 3, 10, 10) and data.size == (10, 8)  # padded to a square
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == THREE.tolist()
    padded = load_dataset("own", "nowhere", image_size=16).images
    assert padded.shape == (6, 3, 16, 16)
    assert torch.equal(padded[:, :, 3:13, 4:12], STRIPES)
    assert padded.sum() == STRIPES.sum()
    with pytest.raises(UserError, match="image_size 9 is smaller than the 10 x 8 images"):
        load_dataset("own", "nowhere", image_size=9)


@pytest.mark.parametrize(
    "shape", [(6, 1, 8, 8), (6, 2, 8, 8), (6, 5, 28, 28), (6, 4, 4, 4), (6, 200, 9, 9), (1, 3, 1, 1)]
)
def test_any_number_of_channels_is_taken(shape, monkeypatch):
    own(monkeypatch, torch.zeros(shape, dtype=torch.uint8), None)
    assert load_dataset("own", "nowhere").images.shape == shape


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (STRIPES.float(), THREE, r"tensor \(N, C, H, W\) uint8, and not empty; found Tensor \(6, 3, 10, 8\) float32"),
        (STRIPES.numpy(), THREE, r"must be a tensor .*; found ndarray \(6, 3, 10, 8\) uint8"),
        (list(STRIPES), THREE, "must be a tensor .*; found a list of 6"),
        (STRIPES[:0], THREE[:0], r"and not empty; found Tensor \(0, 3, 10, 8\)"),
        (STRIPES[:, 0], THREE, r"\(N, C, H, W\) uint8, and not empty; found Tensor \(6, 10, 8\)"),
        (STRIPES.permute(0, 2, 3, 1), THREE, r"seem to be \(N, H, W, C\); give images.permute\(0, 3, 1, 2\)"),
        (torch.zeros(6, 28, 28, 5).byte(), THREE, r"seem to be \(N, H, W, C\)"),
        (STRIPES, THREE.tolist(), r"labels must be a tensor \(6,\) of whole numbers, or None; found a list of 6"),
        (STRIPES, THREE.numpy(), r"labels must be .*; found ndarray \(6,\) int64"),
        (STRIPES, THREE.float(), r"of whole numbers, or None; found Tensor \(6,\) float32"),
        (STRIPES, THREE[:5], r"labels must be a tensor \(6,\) .* found Tensor \(5,\)"),
        (STRIPES, torch.eye(6)[THREE].long(), r"labels must be a tensor \(6,\) .* found Tensor \(6, 6\)"),
        (STRIPES, THREE - 1, "labels must be 0, 1, 2, ... without a gap; found 3 different ones from -1 to 1"),
        (STRIPES, THREE.clamp(max=1) * 999_999, "without a gap; found 2 different ones from 0 to 999999"),
        (STRIPES, THREE + 1, "without a gap; found 3 different ones from 1 to 3"),
    ],
)
def test_a_broken_promise_is_told_at_the_start_with_what_was_found(images, labels, message, monkeypatch, tmp_path):
    own(monkeypatch, images, labels)
    with pytest.raises(UserError, match=f"dataset own, training part: .*{message}"):
        train.main(["--dataset", "own", "--out-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loaded", [STRIPES, (STRIPES,), (STRIPES, THREE, ["a"], 1), None, {"images": STRIPES}])
def test_a_loader_gives_a_pair_or_that_and_names(loaded, monkeypatch):
    monkeypatch.setitem(DATASETS, "own", lambda data_dir, train: loaded)
    with pytest.raises(UserError, match="give a pair, images and labels, or those and class names; found "):
        load_dataset("own", "nowhere")


@pytest.mark.parametrize(
    "names, message",
    [
        (None, "class names must be a list of different words; found a NoneType"),
        ("abc", "class names must be a list of different words; found a str of 3"),
        ([0, 1, 2], "class names must be a list of different words; found a list of 3"),
        (["a", "b", "a"], "class names must be a list of different words; found a list of 3"),
        (["a", "", "b"], "class names must be a list of different words"),
        (["a", "b"], "there must be a class name for each label, 0 to 2; found 2 of them"),
        (["a", "b", "c", "d"], "there must be a class name for each label, 0 to 2; found 4 of them"),
    ],
)
def test_class_names_are_different_words_one_for_each_class(names, message):
    with pytest.raises(UserError, match=f"dataset own, training part: {message}"):
        check_loaded((STRIPES, THREE, names), "dataset own", train=True)


def test_class_names_come_back_as_a_list_and_the_test_part_may_lack_some_classes():
    for names in (["cat", "dog", "hot dog"], ("cat", "dog", "hot dog")):
        images, labels, given = check_loaded((STRIPES, THREE, names), "own", train=True)
        assert given == ["cat", "dog", "hot dog"] and images is STRIPES and torch.equal(labels, THREE)
        assert check_loaded((STRIPES, THREE.clamp(max=1), names), "own", train=False)[2] == given
    assert check_loaded((STRIPES, THREE), "own", train=True)[2] == []
    assert check_loaded((STRIPES, None, ["stripe"]), "own", train=True)[2] == ["stripe"]
    with pytest.raises(UserError, match="own, test part: there must be a class name for each label, 0 to 2; found 2"):
        check_loaded((STRIPES, THREE, ["cat", "dog"]), "own", train=False)


def test_the_test_part_may_lack_classes_but_has_no_negative_ones(monkeypatch):
    own(monkeypatch, STRIPES, THREE.clamp(min=1))
    assert load_dataset("own", "nowhere", train=False).labels.tolist() == [1, 1, 2, 1, 1, 2]
    own(monkeypatch, STRIPES, THREE - 1)
    with pytest.raises(UserError, match="own, test part: labels must be"):
        load_dataset("own", "nowhere", train=False)


TINY = ["--patch-size", "4", "--hidden-size", "32", "--depth", "1", "--num-heads", "2", "--batch-size", "8"]
TINY += ["--sample-steps", "3", "--device", "cpu", "--precision", "fp32", "--sample-every", "1", "--log-every", "1"]


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_of_any_channels_from_training_to_pictures(channels, monkeypatch, tmp_path):
    images = torch.randint(256, (6, channels, 8, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    own(monkeypatch, images, THREE)
    flags = ["--out-dir", str(tmp_path), "--checkpoint-every", "1"]
    train.main(["--dataset", "own", *TINY, *flags, "--lr-decay", "constant", "--train-steps", "2"])
    train.main(["--resume", *flags, "--train-steps", "3"])
    assert load_file(tmp_path / "checkpoint.pth")["progress"][0] == 3
    for step in (1, 2, 3):  # a row of 8 for each label, of each the channels, with their borders
        assert Image.open(tmp_path / "samples" / f"step_{step:07d}.png").size == (8 * channels * 9 + 1, 3 * 9 + 1)

    def draw(*flags):
        inference.main(["--checkpoint", str(tmp_path / "model.pth"), "--device", "cpu", *flags])

    draw("--output", str(tmp_path / "strip.png"), "--gif", str(tmp_path / "a.gif"))
    draw("--output", str(tmp_path / "grid.png"), "--npz", str(tmp_path / "s.npz"), "--num-samples", "4")
    assert Image.open(tmp_path / "strip.png").format == "PNG"
    assert Image.open(tmp_path / "a.gif").n_frames == 4
    assert Image.open(tmp_path / "grid.png").size == (2 * channels * 9 + 1, 2 * 9 + 1)
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (4, 8, 8, channels)


@pytest.mark.parametrize("steps, saved", [(7, 3), (2, 2)])  # in the middle of a run, and at its end
def test_the_checkpoint_is_written_before_the_samples_are_drawn(steps, saved, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("whatever goes wrong with a picture")

    own(monkeypatch, STRIPES[:, :, :8], THREE)
    monkeypatch.setattr(train, "save_samples", fail)
    flags = [*TINY, "--sample-every", "3", "--checkpoint-every", "3", "--train-steps", str(steps)]
    with pytest.raises(RuntimeError):
        train.main(["--dataset", "own", *flags, "--out-dir", str(tmp_path)])
    assert load_file(tmp_path / "checkpoint.pth")["progress"][0] == saved


def test_unlabelled_images_are_one_class_without_guidance_or_doubled_steps(monkeypatch, tmp_path, capsys):
    own(monkeypatch, STRIPES[:, :, :8], None)
    calls = []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, y: calls.append((len(x), y)) or forward(self, x, t, y))
    train.main(["--dataset", "own", *TINY, "--train-steps", "3", "--out-dir", str(tmp_path)])
    model, config = load_model(tmp_path / "model.pth")
    assert (config.num_classes, config.cfg_scale, config.label_dropout) == (1, 1.0, 0.0)
    assert all((y == 0).all() for _, y in calls)  # no label is ever the null class
    calls.clear()
    flags = ["--checkpoint", str(tmp_path / "model.pth"), "--output", str(tmp_path / "strip.png"), "--device", "cpu"]
    inference.main(flags)
    assert [size for size, _ in calls] == [1, 1, 1]  # an evaluation a step
    assert "3 network evaluations" in capsys.readouterr().out
    with pytest.raises(UserError, match="cfg_scale is 3.0; a model of one class has nothing to be guided by"):
        inference.main([*flags, "--cfg-scale", "3"])
    assert Config(num_classes=1).cfg_scale > 1  # published models of one class may have learned to do without it


def test_an_unknown_dataset_is_refused_naming_the_known():
    with pytest.raises(UserError, match="'cifar' is not one of auto, mnist, fashion, kmnist, glyphs"):
        load_dataset("cifar", "nowhere")


@pytest.mark.parametrize("free, where", [(2 * STRIPES.nbytes, "meta"), (2 * STRIPES.nbytes - 1, "cpu")])
def test_on_a_gpu_are_the_labels_and_the_images_that_take_half_of_it_at_most(free, where, monkeypatch):
    monkeypatch.setattr("dataset.free_memory", lambda device: {"meta": free}[device.type])
    data = Dataset("own", STRIPES, THREE, (10, 8)).to(torch.device("meta"))  # any device but the CPU
    assert (data.images.device.type, data.labels.device.type) == (where, "meta")
    here = Dataset("own", STRIPES, THREE, (10, 8)).to(torch.device("cpu"))
    assert here.images.data_ptr() == STRIPES.data_ptr()  # what is mapped from a disk stays there


@pytest.mark.parametrize("latents", [None, dict(scale=1.0, shift=0.0, deviation=False)])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_batch_is_on_the_gpu_wherever_the_images_are(place, latents, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # which no stand-in for a GPU can
    with FakeTensorMode():  # in which to mix devices is an error as on a GPU
        images = torch.zeros(20, 3, 8, 8, dtype=torch.uint8, device=place)
        data = Dataset("own", images, torch.zeros(10, dtype=torch.int64, device="cuda"), (8, 8), latents=latents)
        index, mirrored = (torch.zeros(4, dtype=kind, device="cuda") for kind in (torch.int64, torch.bool))
        x0, y = data.draw(index, mirrored, None)
        assert (x0.shape, x0.device.type, y.device.type) == ((4, 3, 8, 8), "cuda", "cuda")


def test_normalize_and_back():
    images = torch.arange(256, dtype=torch.uint8)
    x = normalize(images)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    assert torch.equal(denormalize(x), images)
    assert denormalize(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_pixel_is_made_of_what_is_no_number(value):
    x = torch.zeros(2, 1, 4, 4)
    x[1, 0, 2, 3] = value
    with pytest.raises(UserError, match="not finite"):
        denormalize(x)
