"""The judge: what it learns from, and that a kept one is used only for the data that it learned from."""

import pytest
import torch

from dataset import load_dataset, normalize
from support import classifier
from support.classifier import (
    MNIST,
    Classifier,
    as_judged,
    checksum,
    judge_of,
    kept_judge,
    load_classifier,
    mirror_and_shift,
    quarter_turns,
    split_training,
)
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


def test_of_shuffled_data_the_last_images_are_held_out():
    labels = torch.randint(10, (60_000,), generator=torch.Generator().manual_seed(0))
    for count, learnt, cut in ((60_000, 50_000, 50_000), (50_000, 40_000, 40_000), (450, 360, 360), (2, 1, 1)):
        parts = split_training(labels[-count:])
        assert parts[0].equal(torch.arange(learnt)) and parts[1].equal(torch.arange(cut, count))
    parts = split_training(labels.repeat(2))
    assert parts[0].equal(torch.arange(50_000)) and parts[1].equal(torch.arange(110_000, 120_000))


@pytest.mark.parametrize(
    "labels",
    [
        torch.arange(5000) // 500,
        9 - torch.arange(5000) // 500,
        torch.arange(5000) // 50 % 10,  # as in several files, each in order of its classes
        torch.zeros(5000).long(),
    ],
)
def test_of_data_in_order_any_images_are_held_out_always_the_same(labels):
    learnt, held_out = split_training(labels)
    assert len(held_out) == 1000 and torch.cat([learnt, held_out]).sort().values.equal(torch.arange(5000))
    share = labels[held_out].bincount() / labels.bincount()
    assert share.min() > 0.15 and share.max() < 0.25
    assert held_out.float().mean().item() == pytest.approx(2500, abs=150)
    assert all(map(torch.equal, split_training(labels), (learnt, held_out)))


def test_of_one_class_the_judge_learns_quarter_turns(tmp_path, blocks):
    images = blocks[0].clone() // 5
    images[:, :, :3] += 200  # light above
    judge = judge_of("sky", tmp_path, images, torch.zeros(600).long())
    turned, turns = quarter_turns(images, torch.Generator().manual_seed(0))
    assert judge.head.out_features == 4 and turns.unique().tolist() == [0, 1, 2, 3]
    assert (judge.read(turned)[1].argmax(1) == turns).float().mean() > 0.95
    back = torch.stack([image.rot90(-k, (1, 2)) for image, k in zip(turned, turns.tolist())])
    assert back.equal(images)
    assert quarter_turns(images[:, :, :5], torch.Generator())[0].shape == (600, 1, 5, 5)


def test_a_judge_of_colours_learns_and_is_read_again(tmp_path, blocks):
    _, labels = blocks
    images = torch.randint(120, (600, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    images[labels == 1, 2] += 100  # bluer
    judge = judge_of("sky", tmp_path, images, labels)
    assert (judge.read(images)[1].argmax(1) == labels).float().mean() > 0.95
    again, _ = load_classifier(kept_judge("sky", tmp_path, checksum(images, labels)))
    assert torch.allclose(again.read(images)[0], judge.read(images)[0])
    assert judge.convolutions[0].stride == (2, 2) and Classifier(1, 2).convolutions[0].stride == (1, 1)


def test_photographs_are_mirrored_and_shifted_by_whole_pixels_and_no_more():
    x = normalize(torch.randint(256, (200, 3, 12, 20), generator=torch.Generator().manual_seed(0)).byte())
    y = mirror_and_shift(x, torch.Generator().manual_seed(0))
    found = set()
    for before, after in zip(x, y):
        for mirrored in (False, True):
            source = before.flip(2) if mirrored else before
            for down in (-1, 0, 1):
                for right in (-2, -1, 0, 1, 2):
                    moved = source.roll((down, right), (1, 2))[:, 1:-1, 2:-2]  # what did not come in at an edge
                    if torch.allclose(moved, after[:, 1:-1, 2:-2], atol=1e-6):
                        found.add((mirrored, down, right))
                        break
    assert len(found) == 2 * 3 * 5


def test_large_images_are_judged_reduced_and_small_ones_as_they_are():
    images = torch.randint(256, (2, 3, 200, 100), generator=torch.Generator().manual_seed(0)).byte()
    reduced = as_judged(images)
    assert reduced.shape == (2, 3, 64, 32)
    assert reduced.std() < normalize(images).std() / 2  # averaged, not picked
    assert reduced.mean().item() == pytest.approx(normalize(images).mean().item(), abs=0.01)
    small = images[:, :, :64, :64]
    assert as_judged(small).equal(normalize(small))
    for shape in ((1, 1, 1), (1, 3, 5), (3, 1, 1), (3, 3, 70)):
        features, logits = Classifier(shape[0], 2).eval().read(torch.zeros(2, *shape).byte())
        assert features.shape == (2, 128) and logits.shape == (2, 2)


@pytest.mark.parametrize(
    "name", ["/home/me/cats", "cats.zip", "hf:me/cats", "../../cats", "c:\\cats", "cats" * 99, "/"]
)
def test_a_judge_is_kept_in_the_data_folder_whatever_the_data_are_called(name, tmp_path, blocks, trained):
    judge_of(name, tmp_path / "data", *blocks)
    (path,) = (tmp_path / "data" / "judges").iterdir()
    assert "cats" in path.name or name == "/"
    assert judge_of(name, tmp_path / "data", *blocks) and len(trained) == 1
