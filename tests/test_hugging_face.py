"""Data sets of Hugging Face's library, of files made here: parquet and a folder of images, without a network."""

import sys

import pytest
from PIL import Image

from loaders.hugging_face import open_hub
from loaders.packing import read_image
from support.errors import NotAvailable, UserError

datasets = pytest.importorskip("datasets", reason="the extra that hf:NAME needs")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No network is asked, and nothing is kept in the user's own cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache")


def image(i: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (10 + i, 8), i)


def write(folder, name="train", count=20, features=None, **columns) -> str:
    """A parquet file of a data set whose columns are given, or images with labels 0, 1, ... of three classes."""
    folder.mkdir(exist_ok=True)
    columns = columns or {"image": [image(i) for i in range(count)], "label": [i % 3 for i in range(count)]}
    features = features or {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "hot dog"])}
    data = datasets.Dataset.from_dict(columns, datasets.Features(features))
    data.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return f"hf:{folder}"


def test_parquet_with_both_parts(tmp_path):
    write(tmp_path / "set")
    where = write(tmp_path / "set", "test", 5)
    training, test = (open_hub(where, tmp_path, train) for train in (True, False))
    assert training.name == where and training.class_names == test.class_names == ["cat", "dog", "hot dog"]
    assert training.labels == [i % 3 for i in range(20)] and test.labels == [0, 1, 2, 0, 1]
    assert training.names[3] == "train, row 3" and test.names[4] == "test, row 4"
    assert training.key == test.key
    for source in (training, test):
        for i in range(len(source.names)):
            assert read_image(source, i).tobytes() == image(i).tobytes() and source.open(i).size == image(i).size


def test_a_fixed_tenth_is_held_out_where_there_is_one_part(tmp_path):
    where = write(tmp_path / "set", count=60)
    training, test = (open_hub(where, tmp_path, train) for train in (True, False))
    assert len(training.names) == 54 and len(test.names) == 6
    assert not set(training.names) & set(test.names)
    assert sorted(test.labels) == [0, 0, 1, 1, 2, 2]
    for source in (training, test):
        for i, name in enumerate(source.names):
            row = int(name.split()[-1])
            assert source.labels[i] == row % 3 and source.open(i).size == image(row).size
    assert open_hub(where, tmp_path, False).names == test.names


def test_a_folder_of_images_is_read_and_its_key_follows_the_files(tmp_path):
    for name in ("dog", "cat"):
        for i in range(10):
            path = tmp_path / "set" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(i + (20 if name == "dog" else 0), "L").save(path)
    where = f"hf:{tmp_path / 'set'}"
    source = open_hub(where, tmp_path, True)
    assert source.class_names == ["cat", "dog"] and sorted(source.labels) == [0] * 9 + [1] * 9
    for i, label in enumerate(source.labels):
        assert read_image(source, i).mode == "L" and (read_image(source, i).width >= 30) == (label == 1)
    assert open_hub(where, tmp_path, True).key == source.key
    path.write_bytes(b"no image any more")
    changed = open_hub(where, tmp_path, True)
    assert changed.key != source.key
    with pytest.raises(UserError, match=r"^hf:.*set: train, row \d+ cannot be read \(it is not an image"):
        for part in (changed, open_hub(where, tmp_path, False)):
            for i in range(len(part.names)):
                read_image(part, i)


def test_an_image_that_is_missing_is_named_when_it_is_read(tmp_path):
    images = [image(0), None, image(2), image(3)]
    where = write(tmp_path / "set", image=images, features={"image": datasets.Image()})
    for train in (True, False):
        source = open_hub(where, tmp_path, train)
        assert source.class_names == [] and set(source.labels) == {0}
        for i, name in enumerate(source.names):
            if name == "train, row 1":
                with pytest.raises(UserError, match="train, row 1 cannot be read .there is no image in this row"):
                    read_image(source, i)


def test_whole_numbers_are_their_own_names_and_classes_without_images_are_left_out(tmp_path):
    features = {"picture": datasets.Image(), "label": datasets.Value("int64")}
    where = write(tmp_path / "a", picture=[image(i) for i in range(20)], label=[3, 5] * 10, features=features)
    source = open_hub(where, tmp_path, True)
    assert source.class_names == ["3", "5"] and set(source.labels) == {0, 1}
    assert [source.labels[i] for i in range(4)] == [int(name.split()[-1]) % 2 for name in source.names[:4]]
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["none", "cat", "dog"])}
    where = write(tmp_path / "b", picture=[image(i) for i in range(20)], kind=[1, 2] * 10, features=features)
    assert open_hub(where, tmp_path, True).class_names == ["cat", "dog"]


def test_secret_test_labels_are_no_test_part(tmp_path):
    write(tmp_path / "set")
    where = write(tmp_path / "set", "test", image=[image(i) for i in range(4)], label=[-1] * 4)
    test = open_hub(where, tmp_path, False)
    assert len(test.names) == 2 and test.names[0].startswith("train, ")
    assert len(open_hub(where, tmp_path, True).names) == 18
    write(tmp_path / "set", "validation", 5)
    assert open_hub(where, tmp_path, False).names[0] == "validation, row 0"
    assert len(open_hub(where, tmp_path, True).names) == 20


@pytest.mark.parametrize(
    "kind, labels, message",
    [
        ("float32", [0.0, 0.5], "its column label is of float32; labels must be whole numbers, 0, 1, 2"),
        ("string", ["cat", "dog"], "its column label is of string; labels must be whole numbers"),
        ("int64", [0, -1], "the label of row 1 is -1; labels must be whole numbers"),
        ("int64", [0, None], "the label of row 1 is missing; labels must be whole numbers"),
    ],
)
def test_labels_that_are_not_whole_numbers_from_0(kind, labels, message, tmp_path):
    features = {"image": datasets.Image(), "label": datasets.Value(kind)}
    where = write(tmp_path / "set", image=[image(0), image(1)] * 5, label=labels * 5, features=features)
    with pytest.raises(UserError, match=f"^{where}: {message}"):
        open_hub(where, tmp_path, True)


def test_lists_of_labels_are_refused(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.Sequence(datasets.Value("int64"))}
    where = write(tmp_path / "set", image=[image(0), image(1)], label=[[0, 1], [2]], features=features)
    with pytest.raises(UserError, match="its column label is of list; labels must be whole numbers"):
        open_hub(where, tmp_path, True)


def test_no_column_of_images_or_several(tmp_path, capsys):
    where = write(
        tmp_path / "a", text=["x"], label=[0], features={c: datasets.Value("string") for c in ("text", "label")}
    )
    with pytest.raises(
        UserError, match=f"^{where} has no column of images, only text, label; choose another data set$"
    ):
        open_hub(where, tmp_path, True)
    columns = {name: [image(i + n) for i in range(10)] for n, name in enumerate(("first", "second"))}
    where = write(tmp_path / "b", **columns, features=dict.fromkeys(columns, datasets.Image()))
    assert open_hub(where, tmp_path, True).open(0).width < 20
    assert "has several columns of images, first, second; the first is taken" in capsys.readouterr().err


def test_parts_of_which_none_is_for_training(tmp_path):
    write(tmp_path / "set", "test", 5)
    assert len(open_hub(f"hf:{tmp_path / 'set'}", tmp_path, True).names) == 4  # of one alone a tenth is held out
    where = write(tmp_path / "set", "validation", 5)
    with pytest.raises(UserError, match="has the parts validation, test, and none called train"):
        open_hub(where, tmp_path, True)


def test_one_image_has_nothing_to_hold_out(tmp_path):
    where = write(tmp_path / "set", image=[image(0)], features={"image": datasets.Image()})
    assert len(open_hub(where, tmp_path, True).names) == 1
    with pytest.raises(UserError, match="has no images in its test part; it needs more"):
        open_hub(where, tmp_path, False)


def test_names_that_are_not_there_and_files_that_are_none(tmp_path):
    for name in ("nobody/nothing", "./nothing", "cifar"):
        with pytest.raises(NotAvailable, match=f"^hf:{name}: there is no folder {name}, and .* cannot be reached"):
            open_hub(f"hf:{name}", tmp_path, True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.xyz").write_text("no data")
    for name in ("empty", "damaged", "text", "nowhere/at/all"):
        with pytest.raises(UserError, match=rf"^hf:{tmp_path / name} cannot be loaded \(.+\); give a name on"):
            open_hub(f"hf:{tmp_path / name}", tmp_path, True)


def test_the_library_is_an_extra_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = "^--dataset hf:a/b needs the package datasets; get it with: pip install datasets$"
    with pytest.raises(UserError, match=words):
        open_hub("hf:a/b", tmp_path, True)
