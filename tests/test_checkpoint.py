import math
import os
import pickle
import zipfile
from argparse import Namespace

import pytest
import torch
from conftest import CAPTIONS, ROOT, WORDS, random_dit

from config import Config
from support import files
from support.checkpoint import BEFORE, load_model, model_config, save_in_half
from support.errors import UserError
from support.files import load_file, save_file
from variants.captions import TextEmbedder

CONFIG = Config(image_size=28, patch_size=4, hidden_size=32, depth=2, num_heads=2, data_dir="/a/private/folder")


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.pth"
    save_file({"model": random_dit().state_dict(), "config": model_config(CONFIG)}, path)
    return path


def test_a_model_comes_back_as_it_was(model_file):
    model, config = load_model(model_file)
    assert not model.training
    assert (config.hidden_size, config.depth, config.cfg_scale) == (32, 2, CONFIG.cfg_scale)
    for (name, tensor), expected in zip(model.state_dict().items(), random_dit().state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def test_a_model_file_does_not_tell_its_makers_folders(model_file):
    assert b"private" not in model_file.read_bytes()


def test_a_model_file_tells_what_it_started_from_but_not_where_that_was():
    for path, told in ((ROOT / "runs" / "a" / "model.pth", "runs/a/model.pth"), ("/a/private/folder/b.pth", "b.pth")):
        assert model_config(CONFIG.replace(init_from=str(path)))["init_from"] == told
    assert model_config(CONFIG)["init_from"] is None


def test_weights_in_half_precision_come_back_in_float32(model_file, tmp_path):
    save_in_half(model_file, tmp_path / "half.pth")
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tmp_path / "half.pth")["model"].values())
    (half, config), (model, was) = load_model(tmp_path / "half.pth"), load_model(model_file)
    assert config == was
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, model.state_dict()[name].half().float())


def test_of_a_runs_checkpoint_the_average_is_drawn_with(tmp_path):
    """checkpoint.pth, where there is no model.pth yet: its raw weights draw worse digits than their average."""
    states = {"model": random_dit(0).state_dict(), "ema": random_dit(1).state_dict()}
    save_file(states | {"config": vars(CONFIG), "optimizers": [], "progress": []}, tmp_path / "checkpoint.pth")
    model, _ = load_model(tmp_path / "checkpoint.pth")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, states["ema"][name]), name


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def write_pickle(path):
    path.write_bytes(pickle.dumps(Bomb()))


def write_torch_pickle(path):
    torch.save({"model": Bomb(), "config": {}}, path)


def write_truncated(path):
    save_file({"model": random_dit().state_dict(), "config": model_config(CONFIG)}, path)
    path.write_bytes(path.read_bytes()[:-2000])


def write_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello", "world")


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a folder; name a file"),
        (lambda path: path.write_bytes(b""), "is damaged or not a file of weights"),
        (lambda path: path.write_bytes(os.urandom(5000)), "is damaged or not a file of weights"),
        (lambda path: path.write_text("hello"), "is damaged or not a file of weights"),
        (write_truncated, "is damaged or not a file of weights"),
        (write_zip, "is damaged or not a file of weights"),
        (write_pickle, "is damaged or not a file of weights"),
        (write_torch_pickle, f"holds {os.name}.mkdir, more than weights and plain data"),
        (lambda path: torch.save([1, 2], path), 'it lacks "model" and "config"'),
        (
            lambda path: torch.save({"ema": {}, "args": Namespace(bomb=Bomb())}, path),
            f"holds {os.name}.mkdir, more than",
        ),
        (lambda path: torch.save({"model": {}, "config": model_config(CONFIG)}, path), "it lacks 'x_embedder.proj"),
        (lambda path: torch.save({"model": 3, "config": model_config(CONFIG)}, path), "holds no usable model"),
        (lambda path: torch.save({"model": {"a": 3}, "config": model_config(CONFIG)}, path), "holds no usable model"),
        (lambda path: torch.save({"model": {}, "config": {}}, path), "holds no usable config (it lacks 'image_size')"),
        (lambda path: torch.save({"model": {}, "config": {"size": 3}}, path), "holds no usable config"),
        (lambda path: torch.save({"model": {}, "config": {"depth": "x"}}, path), "holds no usable config"),
        (lambda path: torch.save({"model": {}, "config": [3]}, path), "holds no usable config"),
    ],
)
def test_a_bad_file_is_one_clear_error_and_nothing_runs(write, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    write(path)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "lie, name",
    [
        (dict(hidden_size=64), "hidden_size 32, but its config says 64"),
        (dict(depth=10**9), "depth is 1000000000; it must be at most 1000"),
        (dict(depth=1), "depth 2, but its config says 1"),
        (dict(num_classes=10**18), "num_classes is 1000000000000000000; it must be at most"),
        (dict(hidden_size=2**40), "hidden_size is 1099511627776; it must be at most"),
        (dict(num_heads=1, hidden_size=4 * 10**30), "holds no usable config"),
        (dict(image_size=None), "image_size 28, but its config says None"),
        (dict(num_classes=20), "num_classes 10, but its config says 20"),
        (dict(image_size=10**6), "image_size is 1000000; it must be at most"),
        (dict(patch_size=2), "patch_size 4, but its config says 2"),
        (dict(in_channels=3), "in_channels 1, but its config says 3"),
        (dict(learn_sigma=True), "learn_sigma False, but its config says True"),
        (dict(block="cross-attention"), "blocks.0.norm1.weight is missing; in a model of its sizes it is .32"),
        (
            dict(block="adaLN"),
            "blocks.0.adaLN_modulation.1.weight is .192, 32.; in a model of its sizes it is .128",
        ),
    ],
)
def test_weights_of_another_model_are_named(lie, name, model_file):
    content = load_file(model_file)
    content["config"] |= lie
    save_file(content, model_file)
    with pytest.raises(UserError, match=name):
        load_model(model_file)


def test_weights_with_learn_sigma_are_not_loaded_without_it(tmp_path):
    save_file({"model": random_dit(learn_sigma=True).state_dict(), "config": model_config(CONFIG)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="its weights have learn_sigma True, but its config says False"):
        load_model(tmp_path / "a.pth")


def test_a_tensor_too_many_is_named(model_file):
    content = load_file(model_file)
    content["model"]["y_embedder.bias"] = torch.zeros(1)
    save_file(content, model_file)
    with pytest.raises(UserError, match="y_embedder.bias is no part of a model of its sizes"):
        load_model(model_file)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_scraps(function, model_file, monkeypatch):
    before = model_file.read_bytes()

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, function, disk_full)
    with pytest.raises(UserError, match="No space left on device.*free some space"):
        save_file({"model": torch.zeros(1000)}, model_file)
    assert model_file.read_bytes() == before
    assert list(model_file.parent.iterdir()) == [model_file]


def test_a_disk_that_fills_up_midway_is_an_error_too(model_file, tmp_path):
    resource = pytest.importorskip("resource", reason="file size limits are of Unix")
    before, limits = model_file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            save_file(torch.zeros(1_000_000), model_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert model_file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [model_file]


def test_a_flipped_bit_in_a_model_file_is_seen(model_file):
    good = model_file.read_bytes()
    for name, tensor in load_file(model_file)["model"].items():
        content = bytearray(good)
        content[good.index(tensor.numpy().tobytes()) + tensor.nbytes // 2] ^= 1  # a last digit of one number
        model_file.write_bytes(content)
        assert torch.load(model_file, weights_only=True)["model"][name].isfinite().all()  # torch alone sees nothing
        with pytest.raises(UserError, match="is damaged: its checksums do not fit what it holds") as error:
            load_model(model_file)
        assert str(model_file) in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(value, model_file):
    content = load_file(model_file)
    for name, tensor in content["model"].items():
        kept = tensor.flatten()[-1].clone()
        tensor.view(-1)[-1] = value
        save_file(content, model_file)
        with pytest.raises(UserError, match=f"model.pth holds no usable model .{name} has values that are not finite"):
            load_model(model_file)
        tensor.view(-1)[-1] = kept


def test_a_model_file_that_may_not_be_read_is_not_called_damaged(model_file, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(UserError) as error:
        load_model(model_file)
    assert str(error.value) == f"{model_file} cannot be read (Permission denied)"


@pytest.mark.parametrize("field", ["image_size", "num_heads", "num_classes", "process", "prediction", "schedule"])
def test_what_no_default_can_stand_for_has_to_be_in_the_file(field, model_file):
    content = load_file(model_file)
    del content["config"][field]
    save_file(content, model_file)
    with pytest.raises(UserError, match=f"model.pth holds no usable config .it lacks '{field}'"):
        load_model(model_file)


def test_a_seed_that_older_versions_allowed_still_loads(model_file):
    """CPU generators keep 32 bits of a seed: the rest, which is now refused, changed nothing."""
    content = load_file(model_file)
    content["config"]["seed"] = 2**32 + 5
    save_file(content, model_file)
    seed = load_model(model_file)[1].seed
    assert seed == 5
    assert torch.equal(*(torch.randn(9, generator=torch.Generator().manual_seed(s)) for s in (5, 2**32 + 5)))


def test_a_file_older_than_a_field_means_what_runs_did_then(model_file):
    """Before there was an interval, guidance was throughout; before there was a choice, t was uniform."""
    content = load_file(model_file)
    for name in BEFORE:
        del content["config"][name]
    save_file(content, model_file)
    config = load_model(model_file)[1]
    assert (config.cfg_low, config.cfg_high, config.time_sampling) == (0.0, 1.0, "uniform")
    assert (config.block, config.clip_x0, config.learn_sigma) == ("adaLN-Zero", True, False)
    assert (config.caption_length, config.captions) == (None, None)


@pytest.fixture
def caption_file(tmp_path):
    path = tmp_path / "model.pth"
    sizes = dict(image_size=28, patch_size=4, hidden_size=32, depth=2, num_heads=2, block="cross-attention")
    config = Config(**sizes, num_classes=6, class_names=tuple(WORDS), caption_length=3, captions=tuple(CAPTIONS))
    model = random_dit(block="cross-attention", num_classes=6, y_embedder=TextEmbedder(6, 3, 32, 2))
    save_file({"model": model.state_dict(), "config": model_config(config)}, path)
    return path


def test_a_model_of_captions_comes_back_as_it_was(caption_file):
    model, config = load_model(caption_file)
    assert isinstance(model.y_embedder, TextEmbedder) and config.captions == tuple(CAPTIONS)
    for name, tensor in load_file(caption_file)["model"].items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "lie, message",
    [
        (dict(caption_length=4), "y_embedder.pos_embed is .3, 32.; in a model of its sizes it is .4, 32."),
        (dict(caption_length=None), "y_embedder.pos_embed is no part of a model of its sizes"),
        (dict(caption_length=10**6), "caption_length is 1000000; it must be at most"),
        (dict(class_names=None), "caption_length 3 needs class_names, the words, and captions of them"),
        (dict(captions=(3,)), "caption_length 3 needs class_names, the words, and captions of them"),
        (dict(class_names=("-", "a")), "class_names .'-', 'a'. are not a name for each of 6 classes"),
        (dict(num_classes=7, class_names=tuple("abcdefg")), "num_classes 6, but its config says 7"),
        (dict(block="joint-attention"), "blocks.0.image.adaLN_modulation.1.weight is missing"),
        (dict(block="joint-attention", caption_length=None), "block joint-attention is for captions"),
        (dict(block="in-context"), "y_embedder.pos_embed is no part|norm_cross.weight is no part"),
    ],
)
def test_a_config_that_lies_about_captions_is_one_clear_error(lie, message, caption_file):
    content = load_file(caption_file)
    content["config"] |= lie
    save_file(content, caption_file)
    with pytest.raises(UserError, match=message) as error:
        load_model(caption_file)
    assert str(caption_file) in str(error.value) and "\n" not in str(error.value)
