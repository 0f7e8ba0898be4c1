import csv
import json
import sys
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import ROOT, random_dit
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

import dataset
import evaluate
import inference
from config import SAMPLERS, Config
from dataset import load_dataset
from dit import DiT
from docs import quality
from evaluate import Reference, measure
from loaders import scenes
from loaders.glyphs import draw_glyphs
from support import classifier, scene_judge
from support.checkpoint import build_model, load_model, model_config
from support.classifier import judge_of
from support.errors import UserError
from support.files import load_file, save_file
from support.metrics import (
    frechet_distance,
    inception_distance,
    inception_score,
    kth_neighbour,
    nearest_distance,
    share_within,
)
from support.sampling import network_evaluations


class Features(torch.nn.Module):
    """Hands torchmetrics the features themselves in the place of images."""

    num_features = 16

    def forward(self, x):
        return x


def test_frechet_distance_equals_torchmetrics():
    torch.manual_seed(0)
    a, b = torch.randn(500, 16), torch.randn(300, 16) @ torch.randn(16, 16) * 0.3 + 0.2
    theirs = FrechetInceptionDistance(feature=Features(), normalize=True, input_img_size=(16,)).set_dtype(torch.float64)
    theirs.update(a.double(), real=True)
    theirs.update(b.double(), real=False)
    assert frechet_distance(a, b) == pytest.approx(theirs.compute().item(), rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_inception_score_equals_torchmetrics():
    torch.manual_seed(0)
    logits = torch.randn(400, 16) * 3
    theirs = InceptionScore(feature=Features(), splits=1)
    theirs.update(logits)
    assert inception_score(logits) == pytest.approx(theirs.compute()[0].item(), rel=1e-4)
    assert inception_score(torch.eye(10) * 100) == pytest.approx(10)
    assert inception_score(torch.ones(5, 10)) == pytest.approx(1)


def test_precision_and_recall_see_what_is_missing():
    torch.manual_seed(0)
    real = torch.randn(400, 2)
    half = real[real[:, 0] > 0] + 0.01  # good, but only one side of the data
    wild = torch.randn(400, 2) * 5  # everywhere
    radii = kth_neighbour(real)
    assert share_within(half, real, radii) > 0.95 and share_within(real, half, kth_neighbour(half)) < 0.8
    assert share_within(wild, real, radii) < 0.5 and share_within(real, wild, kth_neighbour(wild)) > 0.8
    points = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
    assert kth_neighbour(points, k=2).tolist() == [3.0, 2.0, 3.0, 5.0]


def test_nearest_distance_is_that_of_torch_cdist_in_parts():
    generator = torch.Generator().manual_seed(0)
    images, training = (torch.randint(256, (n, 2, 5, 4), generator=generator).byte() for n in (600, 4500))
    among = torch.randperm(4500)[:4100]
    everywhere = torch.cdist(dataset.normalize(images).flatten(1), dataset.normalize(training[among]).flatten(1))
    assert nearest_distance(images, training, among) == pytest.approx(everywhere.amin(1).mean().item(), rel=1e-5)
    assert nearest_distance(training[among[-1:]], training, among) < 0.01
    assert nearest_distance(training[:1], training, torch.tensor([7])) > 1


@pytest.fixture(scope="module")
def judged(mnist_dir):
    if not classifier.SHIPPED.exists():
        pytest.skip("classifier.pth is not there, and training one takes minutes: run python evaluate.py")
    train, test = (load_dataset("mnist", mnist_dir, train=part) for part in (True, False))
    judge = judge_of("mnist", mnist_dir, train.images, train.labels)
    features, _ = judge.read(test.images)
    return Reference(train.images, torch.arange(5000), judge, features, kth_neighbour(features)), train


def test_bad_images_measure_worse_than_good_ones_in_every_figure(judged):
    reference, train = judged
    images, labels = train.images[-1000:], train.labels[-1000:]
    good = measure(images, labels, reference)
    noisy = (images / 3 + 170 * torch.rand(images.shape)).to(torch.uint8)
    bad = measure(noisy, labels.roll(1), reference)
    one = measure(images[:1].expand(1000, -1, -1, -1), labels[:1].expand(1000), reference)
    assert good["accuracy"] > 0.98 and bad["accuracy"] < 0.3
    assert bad["FD"] > 10 * good["FD"] and one["FD"] > 10 * good["FD"]
    assert good["precision"] > 0.8 > bad["precision"]
    assert good["recall"] > 0.6 and one["recall"] < 0.1
    assert good["IS"] > 9 and one["IS"] < 1.1
    copies = measure(train.images[:1000], train.labels[:1000], reference)
    assert copies["nearest"] < 0.1 < good["nearest"]  # memorisation shows


def test_the_table_of_a_checkpoint_and_of_its_npz_agree(judged, tmp_path, mnist_dir, capsys):
    sizes = dict(image_size=28, patch_size=7, hidden_size=32, depth=1, num_heads=2)
    config = Config(**sizes, dataset="mnist", sampler="ddim", sample_steps=2, cfg_scale=1.0)
    save_file({"model": random_dit(**sizes).state_dict(), "config": model_config(config)}, tmp_path / "model.pth")
    flags = ["--checkpoint", str(tmp_path / "model.pth"), "--data-dir", mnist_dir, "--json", str(tmp_path / "a.json")]
    evaluate.main([*flags, "--num-samples", "200", "--seeds", "2", "--device", "cpu"])
    report = json.loads((tmp_path / "a.json").read_text())
    assert len(report["generated"]) == 2 and report["generated"][0] != report["generated"][1]
    assert report["real"]["accuracy"] > 0.97 and report["FD ratio"] > 1
    assert report["real"]["nearest"] > 1  # the real column is no training image
    assert report["evaluations"] == 2 and report["sampler"] == "ddim"
    printed = capsys.readouterr().out
    assert "200 images of mnist, ddim, 2 steps, guidance 1.0: 2 network evaluations an image" in printed
    for name in ("accuracy", "FD", "IS", "precision", "recall", "nearest", "FD ratio"):
        assert name in printed
    model, config = load_model(tmp_path / "model.pth")
    y = load_dataset("mnist", mnist_dir, train=False).labels[:200]
    images, _ = evaluate.timed_draw(model, config, y, config.seed)
    np.savez(tmp_path / "s.npz", images.permute(0, 2, 3, 1).numpy(), y.numpy())
    evaluate.main(["--npz", str(tmp_path / "s.npz"), "--data-dir", mnist_dir, "--json", str(tmp_path / "b.json")])
    from_npz = json.loads((tmp_path / "b.json").read_text())
    assert from_npz["real"] == pytest.approx(report["real"])
    assert from_npz["generated"][0] == pytest.approx(report["generated"][0])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-samples", "5"], "num_samples is 5; it must be at least 50"),
        (["--num-samples", "20000"], "num_samples is 20000; it must be at most 10000"),
        (["--seeds", "0"], "seeds is 0"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--npz", str(ROOT / "README.md")], "is not an .npz of images"),
        (["--npz", "nowhere.npz"], "nowhere.npz cannot be read (No such file or directory)"),
        (["--npz", str(ROOT)], "cannot be read (Is a directory)"),
        (["--npz", "nowhere.npz", "--sample-steps", "3"], "--sample-steps would change nothing"),
        (["--json", "/no/such/folder/a.json"], "its folder does not exist"),
        (["--sampler", "heun"], "not one of process diffusion's"),
    ],
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        evaluate.main(flags)
    assert message in str(error.value)


def random_classifier(images, labels, learnt):
    torch.manual_seed(0)
    return classifier.Classifier(images.shape[1], int(labels.max()) + 1 if labels.max() else 4)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Makes a dataset: noise (C, H, W) of a brightness that says the label; 500 to train, 110 to test, 100 held out.

    The judge is of random weights. Returned is a function that makes the dataset again, with other sizes or parts.
    """
    monkeypatch.setattr(evaluate, "HELD_OUT", 100)
    monkeypatch.setattr(classifier, "HELD_OUT", 100)
    monkeypatch.setattr(classifier, "train_classifier", random_classifier)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))

    def make(shape=(1, 8, 8), classes=3, name="small", **parts):
        def load(data_dir, train):
            generator = torch.Generator().manual_seed(int(train))
            labels = torch.arange(500 if train else 110) % classes
            noise = torch.randint(60, (len(labels), *shape), generator=generator)
            found = (noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels
            return parts.get("train" if train else "test", found)

        monkeypatch.setitem(dataset.DATASETS, name, load)

    make()
    return make


def save_model(path, name="small", **sizes):
    """A model of random weights for a dataset; its file."""
    sizes = dict(image_size=8, patch_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=3) | sizes
    config = Config(**sizes, dataset=name, sampler="ddim", sample_steps=2, cfg_scale=1.0)
    save_file({"model": random_dit(**sizes).state_dict(), "config": model_config(config)}, path)
    return path


def refusal(*flags) -> str:
    """What evaluate.py says when it refuses these flags."""
    with pytest.raises(UserError) as error:
        evaluate.main([*map(str, flags)])
    return str(error.value)


ZEROS = torch.zeros(110, 8, 8, 1).byte()


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (ZEROS.float(), torch.zeros(110).long(), "arr_0 is float32 (110, 8, 8, 1), arr_1 int64 (110,)"),
        (ZEROS.float(), None, "arr_0 is float32 (110, 8, 8, 1); they must be uint8"),
        (ZEROS, torch.zeros(110), "arr_1 float32 (110,)"),
        (ZEROS, torch.zeros(109).long(), "arr_1 int64 (109,)"),
        (ZEROS, torch.zeros(110, 3).long(), "arr_1 has captions of 3 words, and small has labels"),
        (ZEROS, torch.zeros(110, 3, 1).long(), "arr_1 int64 (110, 3, 1)"),
        (ZEROS.flatten(1), None, "arr_0 is uint8 (110, 64)"),
        (
            ZEROS.expand(-1, -1, -1, 3),
            None,
            "images of 8 x 8 pixels and 3 channels do not compare with small's, of 8 x 8",
        ),
        (ZEROS[:, :7, :7], None, "images of 7 x 7 pixels and 1 channels"),
        (ZEROS[:, :, :7], None, "images of 8 x 7 pixels"),
        (ZEROS.permute(0, 3, 1, 2), None, "images of 1 x 8 pixels and 8 channels"),
        (ZEROS, torch.full((110,), 3), "labels 3 to 3 are not all of small's, 0 to 2"),
        (ZEROS, torch.full((110,), -1), "labels -1 to -1"),
        (ZEROS[:20], None, "the number of images is 20; it must be at least 50"),
        (ZEROS, None, "the number of images is 110; it must be at most 100"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(images, labels, message, tmp_path, small):
    arrays = [images.numpy()] if labels is None else [images.numpy(), labels.numpy()]
    if "is 110" not in message and "(109,)" not in message:
        arrays = [array[:100] for array in arrays]
        message = message.replace("(110,", "(100,")
    np.savez(tmp_path / "s.npz", *arrays)
    assert message in refusal("--npz", tmp_path / "s.npz", "--dataset", "small")


def test_an_npz_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    np.savez(tmp_path / "s.npz", np.zeros(3))
    for error, kind in ((PermissionError(13, "Permission denied"), UserError), (MemoryError(), MemoryError)):
        monkeypatch.setattr(evaluate.np, "load", lambda path, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(kind) as found:
            evaluate.read_npz(str(tmp_path / "s.npz"))
        assert kind is MemoryError or "cannot be read (Permission denied)" in str(found.value)
    monkeypatch.undo()
    np.save(tmp_path / "a.npy", np.zeros(3))
    np.savez(tmp_path / "b.npz", images=np.zeros(3))
    np.savez(tmp_path / "c.npz", np.array([{}], dtype=object))
    for name in ("a.npy", "b.npz", "c.npz"):
        with pytest.raises(UserError, match="is not an .npz of images"):
            evaluate.read_npz(str(tmp_path / name))


@pytest.mark.parametrize("channels", [1, 5])
def test_a_checkpoint_and_its_npz_in_whatever_form_measure_the_same(channels, tmp_path, small, capsys):
    small((channels, 8, 8))
    path = save_model(tmp_path / "model.pth", in_channels=channels)
    flags = ["--checkpoint", str(path), "--device", "cpu"]
    evaluate.main([*flags, "--num-samples", "100", "--json", str(tmp_path / "a.json")])
    expected = json.loads((tmp_path / "a.json").read_text())["generated"][0]
    model, config = load_model(path)
    y = load_dataset("small", "", train=False).labels[:100]
    images = evaluate.timed_draw(model, config, y, config.seed)[0].permute(0, 2, 3, 1).numpy()
    labels = y.numpy()
    forms = [(images, labels.astype(dtype)) for dtype in ("int64", "int32", "uint8", "uint64", ">i2")]
    if channels == 1:
        forms.append((images[..., 0], labels))
    for form in forms:
        np.savez(tmp_path / "s.npz", *form)
        flags = ["--npz", str(tmp_path / "s.npz"), "--dataset", "small"]
        evaluate.main([*flags, "--json", str(tmp_path / "b.json")])
        assert json.loads((tmp_path / "b.json").read_text())["generated"][0] == pytest.approx(expected)
    np.savez(tmp_path / "s.npz", images)
    capsys.readouterr()
    evaluate.main([*flags, "--json", str(tmp_path / "b.json")])
    printed = capsys.readouterr()
    assert "s.npz has no labels (arr_1), so that the accuracy cannot be told" in printed.err
    (line,) = (line for line in printed.out.splitlines() if line.startswith("accuracy"))
    assert line.split()[1] == "?" and 0 <= float(line.split()[2]) <= 1
    expected.pop("accuracy")
    assert json.loads((tmp_path / "b.json").read_text())["generated"][0] == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 10, 7), (3, 7, 10)])
@pytest.mark.parametrize("image_size", [12, 13])
def test_the_margin_of_padded_images_is_cropped_before_judging(shape, image_size, tmp_path, small, monkeypatch):
    """A model that draws the test images themselves, in their margin, measures as those do: FD 0, all among them."""
    labels = torch.arange(100) % 3
    images = torch.randint(256, (100, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def padded(images):
        small(shape, test=(images, labels))
        return load_dataset("small", "", train=False, image_size=image_size).images

    inside = padded(torch.ones_like(images)).bool()
    noise = torch.randint(256, inside.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    drawn = torch.where(inside, padded(images), noise)  # the margin is full of noise, which must not count
    monkeypatch.setattr(evaluate, "timed_draw", lambda *_: (drawn, 1.0))
    path = save_model(tmp_path / "model.pth", in_channels=shape[0], image_size=image_size, patch_size=1)
    evaluate.main(["--checkpoint", str(path), "--num-samples", "100", "--json", str(tmp_path / "a.json")])
    figures = json.loads((tmp_path / "a.json").read_text())["generated"][0]
    assert figures["FD"] == pytest.approx(0, abs=1e-4) and figures["precision"] == figures["recall"] == 1


def test_a_checkpoint_that_does_not_fit_the_data_is_refused(tmp_path, small):
    def of(**sizes):
        return "--checkpoint", save_model(tmp_path / "model.pth", **sizes), "--num-samples", 100

    assert "draws 7 classes, not small's 3; name its --dataset" in refusal(*of(num_classes=7))
    assert "images of 8 x 8 pixels and 3 channels do not compare with small's, of 8 x 8 and 1" in refusal(
        *of(in_channels=3)
    )
    assert "images of 4 x 4 pixels" in refusal(*of(image_size=4))
    assert "dataset 'big' is not one of auto, mnist," in refusal(*of(name="big"))
    small(name="other", shape=(1, 10, 10))
    assert "images of 8 x 8 pixels and 1 channels do not compare with other's" in refusal(*of(), "--dataset", "other")
    small(name="other", classes=2)
    for flags in ((), ("--bits-per-dim", 5)):
        checkpoint = of()[:2] if flags else of()
        assert "draws 3 classes, not other's 2" in refusal(*checkpoint, *flags, "--dataset", "other")


def test_data_that_cannot_be_evaluated_on_are_refused(tmp_path, small):
    checkpoint = ("--checkpoint", save_model(tmp_path / "model.pth"), "--num-samples", 100)
    images, labels = ZEROS.permute(0, 3, 1, 2), torch.arange(110) % 3
    to_train = "to train 1 channels of 8 x 8, labels up to 2; to test"
    for parts, message in (
        (dict(test=(images[:0], labels[:0])), "small, test part: images must be a tensor (N, C, H, W) uint8, and not"),
        (
            dict(test=(images[:50], labels[:50])),
            "small has 50 test images and 100 held out to compare them with; give at most 50",
        ),
        (dict(test=(images[:, :, :7], labels)), f"{to_train} 1 channels of 7 x 8"),
        (dict(test=(images.expand(-1, 3, -1, -1), labels)), f"{to_train} 3 channels of 8 x 8"),
        (dict(test=(images, labels + 1)), f"{to_train} 1 channels of 8 x 8, labels up to 3"),
    ):
        small(**parts)
        assert message in refusal(*checkpoint)
    assert not (tmp_path / "judges").exists()


def test_seeds_do_not_run_into_those_that_draw_the_same(tmp_path, small):
    path = save_model(tmp_path / "model.pth")
    flags = ("--checkpoint", path, "--num-samples", 100, "--seed", 2**32 - 2, "--seeds", 3)
    assert "seed + seeds is 4294967297; it must be at most 4294967296" in refusal(*flags)


def test_what_is_not_finite_never_becomes_a_table(tmp_path, small, monkeypatch, capsys):
    path, out = save_model(tmp_path / "model.pth"), tmp_path / "a.json"
    flags = ("--checkpoint", path, "--json", out)
    evaluate.main([*map(str, flags), "--num-samples", "100"])  # trains the judge
    out.unlink()
    capsys.readouterr()
    bits = monkeypatch.context
    with bits() as patch:
        patch.setattr(evaluate, "draw_images", lambda *_: torch.full((100, 1, 8, 8), float("nan")))
        assert "not finite" in refusal(*flags, "--num-samples", 100)
    with bits() as patch:
        patch.setattr(evaluate, "bits_per_dim", lambda process, model, x, y, generator: y / 0.0)
        assert "the bound of" in refusal(*flags, "--bits-per-dim", 5)
    content = load_file(path)
    content["model"]["final_layer.linear.bias"][3] = float("nan")
    save_file(content, path)
    for count in ("--num-samples", 100), ("--bits-per-dim", 5):
        assert "final_layer.linear.bias has values that are not finite" in refusal(*flags, *count)
    save_model(path)
    (judge,) = (tmp_path / "judges").iterdir()
    content = load_file(judge)
    content["model"]["head.weight"][0, 0] = float("inf")
    save_file(content, judge)
    assert ".pth holds no classifier; delete it" in refusal(*flags, "--num-samples", 100)
    assert not out.exists() and "accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "shape, image_size, times", [((1, 8, 8), 8, 1), ((1, 8, 8), 16, 4), ((2, 4, 8), 8, 2), ((5, 3, 8), 12, 6)]
)
def test_bits_are_shared_out_among_the_dimensions_of_the_data_without_margin(
    shape, image_size, times, tmp_path, small, monkeypatch
):
    """Of the same bits a dimension of the padded image, which are the bits of `times` as many as there are of data."""
    small(shape)

    def bits(process, model, x, y, generator):
        assert x.shape[1:] == (shape[0], image_size, image_size)
        return 2.52 + 0.01 * (-1.0) ** torch.arange(len(y))

    monkeypatch.setattr(evaluate, "bits_per_dim", bits)
    path = save_model(tmp_path / "model.pth", in_channels=shape[0], image_size=image_size)
    evaluate.main(["--checkpoint", str(path), "--bits-per-dim", "10", "--json", str(tmp_path / "a.json")])
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["bits_per_dim"] == pytest.approx(2.52 * times)
    assert report["standard_error"] == pytest.approx(0.01 * times / 3)  # the deviation is .01 (10 / 9)^(1/2)


def test_the_bits_of_a_part_of_data_in_order_are_of_all_classes(tmp_path, small, monkeypatch):
    parts, seen = in_order((1, 8, 8), (500, 100), 5), []
    small(**parts)
    monkeypatch.setattr(
        evaluate, "bits_per_dim", lambda process, model, x, y, rng: seen.append((x, y)) or x[:, 0, 0, 0]
    )
    evaluate.main(["--checkpoint", str(save_model(tmp_path / "model.pth", num_classes=5)), "--bits-per-dim", "40"])
    ((x, y),) = seen
    assert y.bincount(minlength=5).min() > 3
    brightness = (x.mean((1, 2, 3)) + 1) * 127.5
    assert torch.equal((brightness - 15).div(44).round().long(), y)  # the images are those of the labels


def test_a_margin_that_is_known_adds_no_bits_to_those_of_the_data(tmp_path, small, monkeypatch):
    """A network that knows it, and of the data nothing, needs as many bits for a padded image as for a bare one."""
    reports = []
    for image_size in (8, 16):
        inside = slice((image_size - 8) // 2, (image_size + 8) // 2)

        def knowing(self, x, t, y, inside=inside):
            x0 = torch.full_like(x, -1.0)  # black: the margin
            x0[:, :, inside, inside] = 0.0
            return x0

        monkeypatch.setattr(DiT, "forward", knowing)
        path = save_model(tmp_path / "model.pth", image_size=image_size)
        evaluate.main(["--checkpoint", str(path), "--bits-per-dim", "20", "--json", str(tmp_path / "a.json")])
        reports.append(json.loads((tmp_path / "a.json").read_text())["bits_per_dim"])
    assert reports[1] == pytest.approx(reports[0], rel=0.02) and reports[0] > 1


def test_bits_per_dim_of_a_checkpoint(tmp_path, mnist_dir, capsys, monkeypatch):
    images, labels = torch.zeros(26, 1, 28, 28, dtype=torch.uint8), torch.arange(26)
    monkeypatch.setitem(dataset.DATASETS, "letters", lambda data_dir, train: (images, labels))
    sizes = dict(image_size=28, patch_size=14, hidden_size=32, depth=1, num_heads=2, learn_sigma=True)
    config = model_config(Config(**sizes, dataset="mnist"))
    save_file({"model": random_dit(**sizes).state_dict(), "config": config}, tmp_path / "model.pth")
    flags = ["--checkpoint", str(tmp_path / "model.pth"), "--data-dir", mnist_dir]
    evaluate.main([*flags, "--bits-per-dim", "3", "--json", str(tmp_path / "bits.json")])
    report = json.loads((tmp_path / "bits.json").read_text())
    assert report["images"] == 3 and report["bits_per_dim"] > 1
    assert f"{report['bits_per_dim']:.4f}" in capsys.readouterr().out
    for bad, message in (
        (["--bits-per-dim", "1"], "bits_per_dim is 1; it must be at least 2"),
        (["--bits-per-dim", "9", "--cfg-scale", "2"], "--cfg-scale would change nothing with --bits-per-dim"),
        (["--bits-per-dim", "9", "--dataset", "letters"], "draws 10 classes, not letters's"),
    ):
        with pytest.raises(UserError) as error:
            evaluate.main(flags + bad)
        assert message in str(error.value)
    flow = model_config(Config(**{**sizes, "learn_sigma": False}, process="flow_matching", sampler="euler"))
    sizes["learn_sigma"] = False
    save_file({"model": random_dit(**sizes).state_dict(), "config": flow}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="is a bound of diffusions"):
        evaluate.main([*flags, "--bits-per-dim", "3"])


def table(capsys, tmp_path, *flags) -> tuple[dict, str, str]:
    """What evaluate.py writes as JSON, prints, and notes on stderr."""
    capsys.readouterr()
    evaluate.main([*map(str, flags), "--json", str(tmp_path / "table.json")])
    return json.loads((tmp_path / "table.json").read_text()), *capsys.readouterr()


def in_order(shape, counts, classes):
    """Two parts of data in order of classes, as folders are: of brightness and a little noise."""
    parts = {}
    for name, count in zip(("train", "test"), counts):
        labels = torch.arange(count) * classes // count
        noise = torch.randint(30, (count, *shape), generator=torch.Generator().manual_seed(count))
        parts[name] = (noise + 220 // classes * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels
    return parts


def black_images(monkeypatch) -> list:
    """Has every model draw them; the labels asked for are kept in the list."""
    asked = []

    def draw(model, config, y, *_):
        asked.append(y)
        return torch.zeros(len(y), model.in_channels, 8, 8).byte(), 1.0

    monkeypatch.setattr(evaluate, "timed_draw", draw)
    return asked


def test_of_a_hundred_images_the_nearest_distance_alone_is_told(tmp_path, small, capsys):
    small(**in_order((3, 8, 8), (90, 10), 5))
    path = save_model(tmp_path / "model.pth", in_channels=3, num_classes=5)
    report, out, _ = table(capsys, tmp_path, "--checkpoint", path)
    assert report["real"].keys() == {"nearest"} and report["real"]["nearest"] > 0
    assert report["images"] == 50 and "FD ratio" not in report and not (tmp_path / "judges").exists()
    assert "small has 90 training and 10 test images: too few for a judge, and so for accuracy, FD, IS" in out
    assert "to 72 training images; the real ones are 18 others" in out
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["generated", "nearest"]
    small(**in_order((3, 8, 8), (1, 1), 1))
    save_model(path, in_channels=3, num_classes=1)
    assert "small has one training image" in refusal("--checkpoint", path)
    assert "small has one training image" in refusal("--checkpoint", path, "--fid")
    small(**in_order((3, 8, 8), (2, 1), 1))
    assert table(capsys, tmp_path, "--checkpoint", path)[0]["real"]["nearest"] > 0


def test_of_five_hundred_images_in_order_of_classes_all_is_told_at_equal_counts(tmp_path, small, capsys, monkeypatch):
    small(**in_order((3, 8, 8), (450, 50), 5))
    asked, read, usual = black_images(monkeypatch), [], classifier.Classifier.read
    monkeypatch.setattr(classifier.Classifier, "read", lambda self, x: read.append(len(x)) or usual(self, x))
    path = save_model(tmp_path / "model.pth", in_channels=3, num_classes=5)
    report, out, err = table(capsys, tmp_path, "--checkpoint", path)
    assert report["images"] == 50 and read == [50, 50, 50]  # test, held-out and drawn images
    assert report["real"].keys() == {"accuracy", "FD", "IS", "precision", "recall", "nearest"}
    right = report["real"]["accuracy"]  # of a judge of random weights
    assert f"compared with 50 test images, by a judge that reads {right:.1%} of 50 real images right" in out
    assert right < 0.8 and f"reads {right:.1%} of 50 real images right: with less than 80% accuracy means little" in err
    assert asked[0].bincount().tolist() == [10] * 5


def test_of_more_images_in_order_a_part_is_of_all_classes(tmp_path, small, monkeypatch, capsys):
    small(**in_order((1, 8, 8), (500, 250), 5))
    monkeypatch.setattr(evaluate, "judge_of", lambda *_: ByBrightness())
    asked, read, usual = black_images(monkeypatch), [], ByBrightness.read
    monkeypatch.setattr(ByBrightness, "read", lambda self, x: read.append(len(x)) or usual(self, x))
    path = save_model(tmp_path / "model.pth", num_classes=5)
    report, out, err = table(capsys, tmp_path, "--checkpoint", path, "--num-samples", 60)
    assert report["images"] == 60 and "compared with 60 test images" in out
    assert read == [60, 60, 60] and asked[0].bincount(minlength=5).min() > 4
    # Both real parts are of all classes: of others their brightness would be far apart.
    assert report["real"]["FD"] < 500 < report["generated"][0]["FD"]


class ByBrightness(classifier.Classifier):
    """A judge whose features are brightness alone."""

    def __init__(self):
        super().__init__(1, 5)

    def read(self, images):
        bright = images.float().mean((1, 2, 3), keepdim=False)[:, None]
        return bright.expand(-1, 2) + torch.arange(2), -(bright - 44 * torch.arange(5) - 15).abs()


def test_a_judge_that_reads_well_is_not_doubted(tmp_path, small, monkeypatch, capsys):
    small(**in_order((1, 8, 8), (500, 250), 5))
    monkeypatch.setattr(evaluate, "judge_of", lambda *_: ByBrightness())
    report, out, err = table(capsys, tmp_path, "--checkpoint", save_model(tmp_path / "model.pth", num_classes=5))
    assert report["real"]["accuracy"] == 1 and not err
    assert "by a judge that reads 100.0% of 100 real images right" in out


def test_without_classes_the_judge_is_of_quarter_turns(tmp_path, small, capsys):
    small(classes=1)
    path = save_model(tmp_path / "model.pth", num_classes=1)
    report, out, err = table(capsys, tmp_path, "--checkpoint", path)
    assert report["real"].keys() == {"FD", "precision", "recall", "nearest"} and report["FD ratio"] > 0
    assert "of 100 real images by how many quarters they were turned\nThere is one class, and so no accuracy" in out
    assert "with less than 80% its features mean little" in err  # a judge of random weights
    np.savez(tmp_path / "s.npz", np.zeros((60, 8, 8, 1), np.uint8))
    report, out, _ = table(capsys, tmp_path, "--npz", tmp_path / "s.npz", "--dataset", "small")
    assert report["images"] == 60 and "accuracy" not in report["generated"][0]


class MeanColours(torch.nn.Module):
    """In the place of Inception: the mean and the first pixel of each colour, which are few features."""

    num_features = 6

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return torch.cat([x.float().mean((2, 3)), x[:, :, 0, 0].float()], dim=1)


@pytest.fixture
def stand_in(monkeypatch):
    asked = []

    def distance(*given):
        asked.append(given)
        return FrechetInceptionDistance(feature=MeanColours(), reset_real_features=False)

    monkeypatch.setattr(evaluate, "inception_distance", distance)
    return asked


@pytest.mark.parametrize("channels", [1, 3])
def test_fid_is_of_all_training_images_with_test_images_beside(channels, tmp_path, small, capsys, stand_in):
    small((channels, 8, 8))
    images = torch.randint(256, (200, channels, 8, 8), generator=torch.Generator().manual_seed(2)).byte()
    np.savez(tmp_path / "s.npz", images.permute(0, 2, 3, 1).numpy())
    flags = (
        "--npz",
        tmp_path / "s.npz",
        "--dataset",
        "small",
        "--fid",
        "--inception",
        "weights.pth",
        "--device",
        "cpu",
    )
    report, out, err = table(capsys, tmp_path, *flags)
    train, test = (load_dataset("small", "", train=part).images for part in (True, False))
    features = [MeanColours()(part.expand(-1, 3, -1, -1)) for part in (train, images, test)]
    if channels == 3:  # grey has the same features thrice, whose covariance has roots that only float64 tells from 0
        assert report["generated"][0]["FID"] == pytest.approx(frechet_distance(features[1], features[0]), rel=1e-3)
        assert report["real"]["FID"] == pytest.approx(frechet_distance(features[2], features[0]), rel=1e-3)
    assert report["generated"][0]["FID"] > 20 * report["real"]["FID"]
    assert stand_in == [("weights.pth", torch.device("cpu"))]
    assert report["images"] == 200 and not (tmp_path / "judges").exists()
    assert "compared with all 500 training images; the real ones are 110 test images" in out
    assert "FD ratio" not in out and not err


def test_fid_of_a_checkpoint_is_of_the_training_images_classes_and_of_each_seed(tmp_path, small, capsys, stand_in):
    path = save_model(tmp_path / "model.pth")
    report, out, _ = table(capsys, tmp_path, "--checkpoint", path, "--fid", "--num-samples", 150, "--seeds", 2)
    first, second = (figures["FID"] for figures in report["generated"])
    assert report["images"] == 150 and first != second
    again, *_ = table(capsys, tmp_path, "--checkpoint", path, "--fid", "--num-samples", 150, "--seed", 1)
    assert again["generated"][0]["FID"] == pytest.approx(second, rel=1e-4)  # nothing of the first seed was left


def test_fid_of_few_test_images_is_of_fifty_drawn_ones(tmp_path, small, capsys, stand_in):
    small(**in_order((3, 8, 8), (90, 10), 3))
    path = save_model(tmp_path / "model.pth", in_channels=3)
    report, out, _ = table(capsys, tmp_path, "--checkpoint", path, "--fid")
    assert report["images"] == 50 and "all 90 training images; the real ones are 10 test images" in out
    small(**in_order((3, 8, 8), (90, 1), 3))
    assert "small has one test image" in refusal("--checkpoint", path, "--fid")


def test_what_fid_needs_is_told_in_a_line(tmp_path, small, monkeypatch):
    path = save_model(tmp_path / "model.pth")
    assert "--inception w.pth would change nothing without --fid" in refusal(
        "--checkpoint", path, "--inception", "w.pth"
    )
    for module in ("torchmetrics.image.fid", "torch_fidelity"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch_fidelity", type(sys))
            patch.setitem(sys.modules, module, None)
            package = module.split(".")[0]
            assert f"--fid needs the package {package}; get it with: pip install" in refusal(
                "--checkpoint", path, "--fid"
            )


def test_the_inception_of_fid_is_read_from_a_file_or_its_lack_is_told(tmp_path, monkeypatch):
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )
    cpu = torch.device("cpu")

    def fails(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(module, "load_state_dict_from_url", fails)
    with pytest.raises(
        UserError, match="weights cannot be had .*Name or service.*name a file of them with --inception"
    ):
        inception_distance(None, cpu)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save(Features(), tmp_path / "code.pth")
    for name, message in (
        ("other.pth", "holds no Inception of torch-fidelity"),
        ("text.pth", "is damaged or not a file of weights"),
        ("code.pth", "more than weights and plain data"),
        ("none.pth", "does not exist; download it from the releases"),
    ):
        with pytest.raises(UserError, match=message):
            inception_distance(str(tmp_path / name), cpu)
    torch.manual_seed(0)
    network = {}
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: network)
    monkeypatch.setattr(
        module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: network.update(self.state_dict())
    )
    ours = inception_distance(None, cpu)
    monkeypatch.undo()
    save_file(network, tmp_path / "inception.pth")
    again = inception_distance(str(tmp_path / "inception.pth"), cpu)
    x = torch.randint(256, (2, 3, 40, 40)).byte()
    original = module.FeatureExtractorInceptionV3("inception", ["2048"], str(tmp_path / "inception.pth"))
    for fid in (ours, again):
        expected = original(x)[0].reshape(2, -1)
        gap = (fid.inception(x) - expected).abs().max()
        assert gap < 1e-4 * expected.std() and not fid.inception.use_antialias  # its resizing too


def save_latent_model(path, name="small", **sizes):
    """A model of random weights that draws latents of 4 channels and 4 x 4."""
    sizes = dict(image_size=4, patch_size=2, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=3) | sizes
    config = Config(**sizes, dataset=name, sampler="ddim", sample_steps=2, cfg_scale=1.0, clip_x0=False, latents=True)
    save_file({"model": random_dit(**sizes).state_dict(), "config": model_config(config)}, path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_latents_are_decoded_and_compared_as_pixels(channels, tmp_path, small, capsys, vae_dir, monkeypatch):
    pytest.importorskip("diffusers")
    small((channels, 8, 8))
    path, seen, usual = save_latent_model(tmp_path / "model.pth"), [], evaluate.measure
    monkeypatch.setattr(evaluate, "measure", lambda images, *rest: seen.append(images) or usual(images, *rest))
    report, *_ = table(capsys, tmp_path, "--checkpoint", path, "--vae", vae_dir, "--device", "cpu")
    model, config = load_model(path)
    y = torch.arange(100) % 3
    latents = evaluate.draw_images(model, config, y, torch.Generator().manual_seed(config.seed))
    drawn = dataset.denormalize(evaluate.decode(evaluate.load_vae(vae_dir, config), latents))
    assert drawn.shape == (100, 3, 8, 8) and report["images"] == 100
    expected = drawn if channels == 3 else drawn.float().mean(1, keepdim=True).round().byte()
    assert seen[-1].shape == expected.shape and (seen[-1].int() - expected.int()).abs().max() <= 1
    small((channels, 10, 10), name="other")
    message = f"images of 8 x 8 pixels and {channels} channels do not compare with other's"
    assert message in refusal("--checkpoint", path, "--vae", vae_dir, "--dataset", "other")
    message = "--bits-per-dim is a bound for pixels"
    assert message in refusal("--checkpoint", path, "--bits-per-dim", 5)


def test_image_files_are_brought_to_the_size_of_what_is_compared(tmp_path, small, monkeypatch, capsys):
    sizes, parts = [], in_order((3, 8, 8), (500, 100), 3)

    def load(name, data_dir, train=True, image_size=None, skip_damaged=False):
        sizes.append((name, image_size, skip_damaged))
        return dataset.Dataset("cats.zip", *parts["train" if train else "test"], (8, 8))

    monkeypatch.setattr(evaluate, "load_dataset", load)
    path = save_model(tmp_path / "model.pth", in_channels=3, name="cats.zip")
    report, *_ = table(capsys, tmp_path, "--checkpoint", path, "--skip-damaged")
    np.savez(tmp_path / "s.npz", np.zeros((60, 8, 8, 3), np.uint8))
    table(capsys, tmp_path, "--npz", tmp_path / "s.npz", "--dataset", "cats.zip")
    assert report["dataset"] == "cats.zip" and sizes == [("cats.zip", 8, True)] * 2 + [("cats.zip", 8, False)] * 2


def test_the_adm_suite_reads_what_inference_writes_and_its_folder_holds_the_same(tmp_path, small):
    """It streams arr_0 from the zip: a header of version 1.0, C order, then NHWC bytes, which it takes for colours."""
    path = save_model(tmp_path / "model.pth", in_channels=3)
    flags = ["--checkpoint", str(path), "--num-samples", "7", "--labels", "012", "--device", "cpu"]
    inference.main([*flags, "--npz", str(tmp_path / "s.npz"), "--png-dir", str(tmp_path / "pngs")])
    with zipfile.ZipFile(tmp_path / "s.npz").open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran, dtype) == ((7, 8, 8, 3), False, np.uint8)
        streamed = np.frombuffer(file.read(), dtype).reshape(shape)
    model, config = load_model(path)
    y = torch.arange(7) % 3
    drawn = dataset.denormalize(inference.draw_images(model, config, y, torch.Generator().manual_seed(config.seed)))
    assert (streamed == drawn.permute(0, 2, 3, 1).numpy()).all()
    assert np.load(tmp_path / "s.npz")["arr_1"].tolist() == y.tolist()
    for name, image in zip(["000000-0.png", "000001-1.png", "000002-2.png", "000003-0.png"], streamed):
        assert (np.array(Image.open(tmp_path / "pngs" / name)) == image).all()


def test_the_measured_curves_are_of_every_sampler_and_setting():
    with open(ROOT / "docs" / "quality.csv") as file:
        rows = list(csv.DictReader(file))
    for process in SAMPLERS:
        measured = [row for row in rows if row["process"] == process]
        expected = quality.settings(process)
        assert len(measured) == len(expected)
        for row, setting in zip(measured, expected):
            assert all(row[name] == str(value) for name, value in setting.items())
            assert 0 < float(row["accuracy"]) <= 1 and float(row["FD_ratio"]) > 0


def test_one_guided_curve_costs_what_a_consistency_model_costs():
    usual = [s for s in quality.settings("diffusion") if s["cfg_scale"] == Config().cfg_scale]
    costs = {network_evaluations(Config(**setting)) for setting in usual}
    assert set(quality.EVALUATIONS["consistency"]) <= costs


def test_a_file_measured_alone_leaves_the_rows_of_the_others(tmp_path, monkeypatch):
    sizes = dict(image_size=8, patch_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    for process, samplers in SAMPLERS.items():
        config = Config(**sizes, process=process, sampler=samplers[0], cfg_scale=1.0, dataset="small")
        content = {"model": random_dit(**sizes).state_dict(), "config": model_config(config)}
        save_file(content, tmp_path / f"{process}.pth")
    score, path = [0.5, 2.0], tmp_path / "quality.csv"
    monkeypatch.setattr(quality, "scorer", lambda dataset, num_samples: lambda model, config: score)
    monkeypatch.setattr(quality, "CSV", path)

    def rows_after(*names):
        monkeypatch.setattr(sys, "argv", ["quality", *(str(tmp_path / f"{name}.pth") for name in names)])
        quality.main()
        return path.read_text().splitlines()

    before = rows_after("diffusion", "consistency", "flow_matching")
    expected = [process for process in SAMPLERS for _ in quality.settings(process)]
    assert [row.split(",")[0] for row in before[1:]] == expected
    assert path.with_suffix(".png").stat().st_size > 1000
    score[:] = 0.75, 3.0
    after = rows_after("consistency")
    assert [row for row in after if "consistency" not in row] == [row for row in before if "consistency" not in row]
    assert all(row.endswith("0.75,3.0") == ("consistency" in row) for row in after)
    with pytest.raises(UserError, match="nothing.pth"):
        rows_after("nothing")
    assert path.read_text().splitlines() == after


class NearestCrop:
    """A classifier that needs no training: of the nearest of the crops that it is given."""

    def __init__(self, dataset, data_dir, images, labels):
        self.known, self.labels = images.flatten(1).float(), labels

    def read(self, images):
        nearest = torch.cdist(images.flatten(1).float(), self.known).argmin(1)
        return None, torch.nn.functional.one_hot(self.labels[nearest], 10).float()


@pytest.fixture
def scenes_dir(tmp_path, monkeypatch):
    """A data folder of scenes of glyphs, 1,500 to train and 100 to test, which a stand-in for the classifier judges."""
    glyphs = draw_glyphs(600, seed=0)
    draw = scenes.draw_scenes
    monkeypatch.setattr(scenes, "load_mnist", lambda data_dir, train: glyphs)
    few = {0: 1500, 1: 100}  # by the seeds of the two parts
    monkeypatch.setattr(
        scenes,
        "draw_scenes",
        lambda digits, labels, chosen, seed: draw(digits, labels, chosen[: few[seed]], seed),
    )
    monkeypatch.setattr(scene_judge, "judge_of", NearestCrop)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    return tmp_path


def save_words_model(path, **changes):
    """A model of captions, of random weights; its file."""
    sizes = dict(image_size=28, patch_size=14, hidden_size=32, depth=1, num_heads=2, num_classes=len(scenes.WORDS))
    words = dict(class_names=scenes.WORDS, caption_length=scenes.LENGTH) | changes
    config = Config(**sizes, **words, dataset="scenes", sampler="ddim", sample_steps=2, cfg_scale=1.0)
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    save_file({"model": model.state_dict(), "config": model_config(config)}, path)
    return path


def test_scenes_are_judged_by_what_they_show(scenes_dir, capsys):
    checkpoint, report = save_words_model(scenes_dir / "model.pth"), scenes_dir / "a.json"
    evaluate.main(["--checkpoint", str(checkpoint), "--seeds", "2", "--json", str(report), "--device", "cpu"])
    found, printed = json.loads(report.read_text()), capsys.readouterr().out
    names = [f"{name}, {pairs}" for pairs in ("seen", "unseen") for name in scene_judge.RIGHT]
    assert list(found["real"]) == names and [list(figures) for figures in found["generated"]] == [names] * 2
    assert found["images"] == 100 and "FD ratio" not in found and found["generated"][0] != found["generated"][1]
    assert "both digits, unseen" in printed and "100 images of scenes, ddim, 2 steps" in printed
    assert f"judge sees both digits and their relation in {found['real']['digits and relation, seen']:.1%}" in printed
    real = found["real"]
    assert real["both digits, seen"] > 0.8 and real["relation, seen"] > 0.95 and real["thickness, seen"] > 0.9
    assert all(figures["all, seen"] < 0.1 for figures in found["generated"])

    def of_npz(images, captions):
        np.savez(scenes_dir / "s.npz", images.permute(0, 2, 3, 1).numpy(), captions.numpy())
        flags = ["--npz", scenes_dir / "s.npz", "--dataset", "scenes", "--json", report]
        evaluate.main([*map(str, flags)])
        return json.loads(report.read_text())["generated"][0]

    test = load_dataset("scenes", scenes_dir, train=False)
    assert of_npz(test.images, test.labels) == pytest.approx(real)  # in the padding's margin too:
    assert of_npz(torch.nn.functional.pad(test.images, (2, 2, 2, 2)), test.labels) == pytest.approx(real)
    asked = scenes.scenes_of(test.labels)
    beside, other = asked.relation == 0, (asked.digits[:, 0] != asked.digits[:, 1]) & ~asked.unseen
    mirrored = test.images[beside & other].roll(14, 3)  # what was at the left is at the right
    figures = of_npz(mirrored.repeat(3, 1, 1, 1), test.labels[beside & other].repeat(3, 1))
    assert figures["both digits, seen"] > 0.8 and figures["relation, seen"] < 0.2 and figures["thickness, seen"] > 0.9


def test_what_is_no_scene_is_not_judged_as_one(scenes_dir, small, monkeypatch):
    checkpoint = save_words_model(scenes_dir / "model.pth")
    short = save_words_model(scenes_dir / "short.pth", caption_length=5)
    assert "short.pth draws captions of 5 words, and scenes has captions of 8 words" in refusal("--checkpoint", short)
    labelled = save_model(scenes_dir / "labels.pth", image_size=28, patch_size=14, num_classes=len(scenes.WORDS))
    small(shape=(1, 28, 28), classes=len(scenes.WORDS))
    message = "draws captions of 8 words, and small has labels; name its --dataset"
    assert message in refusal("--checkpoint", checkpoint, "--dataset", "small")
    message = "labels.pth draws labels, and scenes has captions of 8 words; name its --dataset"
    assert message in refusal("--checkpoint", labelled, "--dataset", "scenes")
    images = np.zeros((60, 28, 28), np.uint8)
    monkeypatch.setattr(evaluate, "scene_judge_of", lambda *_: pytest.fail("a judge was made"))  # it takes minutes
    for arrays, message in (
        ((images,), "bad.npz has no captions (arr_1)"),
        ((images, np.zeros(60, int)), "arr_1 has labels, and scenes has captions of 8 words; name its --dataset"),
        ((images, np.zeros((60, 7), int)), "arr_1 has captions of 7 words, and scenes has captions of 8 words"),
        ((images, np.full((60, 8), 18)), "labels 18 to 18 are not all of scenes's, 0 to 17"),
        ((images, np.full((60, 8), 17)), "the caption '' is not that of a scene, such as"),  # what --prompt "" writes
        ((images, np.tile([1, 7, 0, 0, 0, 0, 0, 0], (60, 1))), "the caption 'a zero' is not that of a scene, such as"),
    ):
        np.savez(scenes_dir / "bad.npz", *arrays)
        assert message in refusal("--npz", scenes_dir / "bad.npz", "--dataset", "scenes")


def test_the_judge_of_scenes_is_the_same_from_its_file(scenes_dir, monkeypatch, capsys):
    judge, path = random_classifier(torch.zeros(1, 1), torch.tensor([9]), None).eval(), scenes_dir / "judge.pth"
    monkeypatch.setattr(scene_judge, "judge_of", lambda *_: judge)
    scene_judge.main([str(path)])
    assert f"written: {path}" in capsys.readouterr().out
    train, loaded = load_dataset("scenes", scenes_dir), scene_judge.load_scene_judge(path)
    x = torch.randint(256, (20, 1, 16, 16)).byte()
    torch.testing.assert_close(loaded.classifier.read(x)[1], judge.read(x)[1])
    assert torch.equal(loaded.limits, scene_judge.scene_judge_of(scenes_dir, train.images, train.labels).limits)
    for limits in ({}, {"limits": torch.ones(10)}, {"limits": torch.full((10, 2), torch.nan)}):
        save_file({"model": judge.state_dict(), **limits}, path)
        with pytest.raises(UserError, match="judge.pth holds no judge of scenes"):
            scene_judge.load_scene_judge(path)
    save_file({"limits": torch.ones(10, 2)}, path)
    with pytest.raises(UserError, match="judge.pth holds no classifier"):
        scene_judge.load_scene_judge(path)
