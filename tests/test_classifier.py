"""The judge: what it learns from, and that a kept one is used only for the data that it learned from."""

import pytest
import torch

from dataset import load_dataset
from support import classifier
from support.classifier import MNIST, Classifier, checksum, judge_of, kept_judge, load_classifier
from support.errors import UserError
from support.files import load_file, save_file


@pytest.fixture
def blocks(monkeypatch):
    """600 images (1, 8, 8), bright or dark, the label saying which, of which the judge may see 500."""
    monkeypatch.setattr(classifier, "HELD_OUT", 100)
    monkeypatch.setattr(classifier, "STEPS", 100)
    labels = torch.arange(600) % 2
    noise = torch.randint(50, (600, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return (labels.view(-1, 1, 1, 1) * 200 + noise).to(torch.uint8), labels


@pytest.fixture
def trained(monkeypatch):
    """What classifiers were trained on while a test runs; each is of random weights."""
    seen = []

    def train_classifier(images, labels, learnt):
        seen.append((images, labels, learnt))
        return Classifier(images.shape[1], int(labels.max()) + 1)

    monkeypatch.setattr(classifier, "train_classifier", train_classifier)
    return seen


def test_a_classifier_learns_is_kept_and_leaves_out_the_last_images(tmp_path, monkeypatch, blocks):
    images, labels = blocks
    seen = []
    usual = classifier.as_judged
    monkeypatch.setattr(classifier, "as_judged", lambda part: seen.append(part) or usual(part))
    model = judge_of("blocks", str(tmp_path), images, labels)
    monkeypatch.undo()
    seen = torch.cat(seen).flatten(1)
    assert len(seen.unique(dim=0)) <= 500
    assert not any((image.flatten() == seen).all(1).any() for image in images[-100:])
    assert (model.read(images)[1].argmax(1) == labels).float().mean() > 0.95
    monkeypatch.setattr(classifier, "train_classifier", lambda *_: pytest.fail("trained again"))
    again = judge_of("blocks", str(tmp_path), images.clone(), labels.clone())
    assert torch.equal(again.head.weight, model.head.weight)
    (path,) = (tmp_path / "judges").iterdir()
    assert path.name == f"blocks-{checksum(images, labels)[:12]}.pth"


def test_a_judge_is_trained_again_for_other_data_of_the_same_name(tmp_path, blocks, trained, capsys):
    images, labels = blocks
    swapped, more, repainted = 1 - labels, labels.clone(), images.clone()
    more[::3] = 2
    repainted[0, 0, 0, 0] += 1
    for count, (x, y) in enumerate(
        [
            (images, labels),
            (images, swapped),
            (images, more),
            (images.expand(-1, 3, -1, -1), more),
            (repainted, labels),
            (images[1:], labels[1:]),
            (images.view(600, 1, 4, 16), labels),
        ]
    ):
        judge_of("blocks", tmp_path, x, y)
        printed = capsys.readouterr().out
        assert len(trained) == count + 1 and torch.equal(trained[-1][1], y)
        assert "training a classifier of blocks" in printed
        assert len(list((tmp_path / "judges").iterdir())) == count + 1
        judge = judge_of("blocks", tmp_path, x.clone(), y.clone())
        assert len(trained) == count + 1 and not capsys.readouterr().out
        assert judge.head.out_features == int(y.max()) + 1


def test_a_kept_judge_of_an_earlier_version_is_trained_again(tmp_path, blocks, trained, capsys):
    path = kept_judge("blocks", tmp_path, checksum(*blocks))
    path.parent.mkdir()
    save_file(Classifier(1, 2).state_dict(), path)  # says nothing of its data
    judge_of("blocks", tmp_path, *blocks)
    assert len(trained) == 1 and "does not say that it learned from these" in capsys.readouterr().out
    judge_of("blocks", tmp_path, *blocks)
    assert len(trained) == 1


def test_the_shipped_judge_is_of_mnist_itself_not_of_its_name(tmp_path, blocks, trained, monkeypatch):
    monkeypatch.setattr(classifier, "SHIPPED", tmp_path / "shipped.pth")
    save_file(Classifier(1, 2).state_dict(), tmp_path / "shipped.pth")
    monkeypatch.setattr(classifier, "MNIST", checksum(*blocks))
    for name in ("mnist", "the same under another name"):
        judge_of(name, tmp_path / "data", *blocks)
    assert not trained and not (tmp_path / "data").exists()
    judge_of("mnist", tmp_path / "data", blocks[0], 1 - blocks[1])
    assert len(trained) == 1 and list((tmp_path / "data" / "judges").glob("mnist-*.pth"))
    (tmp_path / "shipped.pth").unlink()
    judge_of("mnist", tmp_path / "data", *blocks)  # without the file one is trained, and kept with the data
    assert len(trained) == 2 and not (tmp_path / "shipped.pth").exists()


def test_the_shipped_classifier_is_of_mnist_and_reads_the_test_digits(mnist_dir):
    if not classifier.SHIPPED.exists():
        pytest.skip("classifier.pth is not there, and training one takes minutes: run python evaluate.py")
    data, test = (load_dataset("mnist", mnist_dir, train=part) for part in (True, False))
    assert checksum(data.images, data.labels) == MNIST
    _, logits = judge_of("mnist", mnist_dir, data.images, data.labels).read(test.images)
    assert (logits.argmax(1) == test.labels).float().mean() >= 0.994


def test_a_checksum_is_of_sizes_types_and_values():
    a, b = torch.arange(6), torch.arange(6, 12)
    others = [(a,), (b, a), (a.view(2, 3), b), (a.int(), b), (a, b + 1)]
    assert len({checksum(*tensors) for tensors in [(a, b), *others]}) == 6
    assert checksum(torch.arange(12).view(2, 6).T) == checksum(torch.arange(12).view(2, 6).T.contiguous())


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, 3, [1, 2], {"model": 3, "data": "x"}])
def test_a_file_that_is_no_classifier_is_refused(content, tmp_path, blocks):
    path = kept_judge("blocks", tmp_path, checksum(*blocks))
    path.parent.mkdir()
    save_file(content, path)
    with pytest.raises(UserError, match="holds no classifier; delete it"):
        judge_of("blocks", tmp_path, *blocks)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="blocks-.*.pth is damaged.*; delete it"):
        judge_of("blocks", tmp_path, *blocks)
    assert Classifier(3, 7)(torch.zeros(2, 3, 20, 20))[1].shape == (2, 7)


@pytest.mark.parametrize("name", ["hidden.weight", "convolutions.1.running_var", "head.bias"])
def test_a_classifier_that_is_not_finite_judges_nothing(name, tmp_path, blocks, trained):
    judge = judge_of("blocks", tmp_path, *blocks)
    path = kept_judge("blocks", tmp_path, checksum(*blocks))
    content = load_file(path)
    content["model"][name][0] = float("nan")
    save_file(content, path)
    with pytest.raises(UserError, match="holds no classifier; delete it"):
        load_classifier(path)
    judge.state_dict()[name][0] = float("nan")
    with pytest.raises(UserError, match="answers are not finite"):
        judge.read(blocks[0])
