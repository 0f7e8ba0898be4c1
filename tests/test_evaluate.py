import csv
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, random_dit
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

import dataset
import evaluate
from config import SAMPLERS, Config
from dataset import load_dataset, normalize
from docs import quality
from evaluate import frechet_distance, inception_score, kth_neighbour, measure, nearest_distance, share_within
from support import classifier
from support.checkpoint import load_model, model_config
from support.classifier import Classifier, judge_of, load_classifier
from support.errors import UserError
from support.files import save_file


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


def test_nearest_distance():
    training = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    assert nearest_distance(torch.tensor([[0.0, 1.0], [10.0, 3.0]]), training) == pytest.approx(2)


@pytest.fixture(scope="module")
def judged(mnist_dir):
    if not classifier.SHIPPED.exists():
        pytest.skip("classifier.pth is not there, and training one takes minutes: run python evaluate.py")
    train, test = (load_dataset("mnist", mnist_dir, train=part) for part in (True, False))
    judge = judge_of("mnist", mnist_dir, train.images, train.labels)
    features, logits = judge.read(normalize(test.images))
    training = normalize(train.images[:5000]).flatten(1)
    reference = {"features": features, "radii": kth_neighbour(features), "training": training}
    return judge, reference, train, (logits.argmax(1) == test.labels).float().mean().item()


def test_the_shipped_classifier_reads_the_test_digits(judged):
    assert judged[3] >= 0.994


def test_bad_images_measure_worse_than_good_ones_in_every_figure(judged):
    judge, reference, train, _ = judged
    images, labels = train.images[-1000:], train.labels[-1000:]
    good = measure(images, labels, judge, reference)
    noisy = (images / 3 + 170 * torch.rand(images.shape)).to(torch.uint8)
    bad = measure(noisy, labels.roll(1), judge, reference)
    one = measure(images[:1].expand(1000, -1, -1, -1), labels[:1].expand(1000), judge, reference)
    assert good["accuracy"] > 0.98 and bad["accuracy"] < 0.3
    assert bad["FD"] > 10 * good["FD"] and one["FD"] > 10 * good["FD"]
    assert good["precision"] > 0.8 > bad["precision"]
    assert good["recall"] > 0.6 and one["recall"] < 0.1
    assert good["IS"] > 9 and one["IS"] < 1.1
    copies = measure(train.images[:1000], train.labels[:1000], judge, reference)
    assert copies["nearest"] < 0.1 < good["nearest"]  # memorisation shows


def test_a_classifier_learns_is_kept_and_leaves_out_the_last_images(tmp_path, monkeypatch):
    torch.manual_seed(0)
    labels = torch.arange(600) % 2
    images = (labels.view(-1, 1, 1, 1) * 200 + torch.randint(50, (600, 1, 8, 8))).to(torch.uint8)
    monkeypatch.setattr(classifier, "HELD_OUT", 100)
    seen = []
    monkeypatch.setattr(classifier, "normalize", lambda part: seen.append(part) or normalize(part))
    model = judge_of("blocks", str(tmp_path), images, labels)
    seen = torch.cat(seen).flatten(1)
    assert len(seen.unique(dim=0)) <= 500
    assert not any((image.flatten() == seen).all(1).any() for image in images[-100:])
    assert (model.read(normalize(images))[1].argmax(1) == labels).float().mean() > 0.95
    monkeypatch.setattr(classifier, "train_classifier", lambda *_: pytest.fail("trained again"))
    again = judge_of("blocks", str(tmp_path), images, labels)
    assert torch.equal(again.head.weight, model.head.weight)
    (tmp_path / "blocks" / "classifier.pth").write_bytes(b"")
    with pytest.raises(UserError, match="classifier.pth"):
        judge_of("blocks", str(tmp_path), images, labels)


def test_the_table_of_a_checkpoint_and_of_its_npz_agree(judged, tmp_path, mnist_dir, capsys):
    sizes = dict(image_size=28, patch_size=7, hidden_size=32, depth=1, num_heads=2)
    config = Config(**sizes, dataset="mnist", sampler="ddim", sample_steps=2, cfg_scale=1.0)
    save_file({"model": random_dit(**sizes).state_dict(), "config": model_config(config)}, tmp_path / "model.pth")
    flags = ["--checkpoint", str(tmp_path / "model.pth"), "--data-dir", mnist_dir, "--json", str(tmp_path / "a.json")]
    evaluate.main([*flags, "--num-samples", "200", "--seeds", "2"])
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
        (["--num-samples", "5"], "num_samples is 5; it must be at least 100"),
        (["--num-samples", "20000"], "num_samples is 20000; it must be at most 10000"),
        (["--seeds", "0"], "seeds is 0"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--npz", str(ROOT / "README.md")], "is not an .npz of images"),
        (["--npz", "nowhere.npz"], "is not an .npz of images"),
        (["--npz", "nowhere.npz", "--sample-steps", "3"], "--sample-steps would change nothing"),
        (["--json", "/no/such/folder/a.json"], "its folder does not exist"),
        (["--sampler", "heun"], "not one of process diffusion's"),
    ],
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        evaluate.main(flags)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (torch.zeros(200, 28, 28, 1), torch.zeros(200).long(), "arr_0 is torch.float32"),
        (torch.zeros(200, 28, 28, 1).byte(), torch.zeros(200), "arr_1 torch.float32"),
        (torch.zeros(200, 28, 28, 1).byte(), torch.zeros(199).long(), "(199,)"),
        (torch.zeros(200, 28, 28, 3).byte(), torch.zeros(200).long(), "images of (3, 28, 28)"),
        (torch.zeros(200, 27, 27, 1).byte(), torch.zeros(200).long(), "images of (1, 27, 27)"),
        (torch.zeros(200, 30, 28, 1).byte(), torch.zeros(200).long(), "images of (1, 30, 28)"),
        (torch.zeros(200, 28, 28, 1).byte(), torch.full((200,), 10), "labels 10 to 10 are not"),
        (torch.zeros(200, 28, 28, 1).byte(), torch.full((200,), -1), "labels -1 to -1"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(images, labels, message, tmp_path, mnist_dir):
    np.savez(tmp_path / "s.npz", images.numpy(), labels.numpy())
    with pytest.raises(UserError) as error:
        evaluate.main(["--npz", str(tmp_path / "s.npz"), "--data-dir", mnist_dir])
    assert message in str(error.value)


def test_a_checkpoint_that_does_not_fit_the_data_is_refused(tmp_path, mnist_dir):
    for sizes, message in ((dict(num_classes=7), "draws 7 classes"), (dict(in_channels=3), "images of (3, 28, 28)")):
        sizes |= dict(image_size=28, patch_size=14, hidden_size=32, depth=1, num_heads=2)
        config = model_config(Config(**sizes, dataset="mnist"))
        save_file({"model": random_dit(**sizes).state_dict(), "config": config}, tmp_path / "model.pth")
        with pytest.raises(UserError) as error:
            evaluate.main(["--checkpoint", str(tmp_path / "model.pth"), "--data-dir", mnist_dir])
        assert message in str(error.value)


def test_the_margin_of_padded_images_is_cropped_before_judging(mnist_dir):
    data, padded = (load_dataset("mnist", mnist_dir, train=False, image_size=size) for size in (None, 33))
    assert padded.images.shape[-1] == 33 and torch.equal(evaluate.crop(padded.images[:10], 28), data.images[:10])


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


def test_a_file_that_is_no_classifier_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "classifier.pth")
    with pytest.raises(UserError, match="holds no classifier"):
        load_classifier(tmp_path / "classifier.pth")
    assert Classifier(3, 7)(torch.zeros(2, 3, 20, 20))[1].shape == (2, 7)


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
