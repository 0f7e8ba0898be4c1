import shutil
from contextlib import closing, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, load_corners, random_dit, run
from PIL import Image

import dataset
import train
from config import Config, preset
from inference import denoise
from support.checkpoint import build_process, class_names_of, load_model
from support.errors import UserError
from support.files import load_file
from support.machine import Ahead
from support.prepare import new_settings, prepare, suitable_patch

CPU = torch.device("cpu")
TINY = ["--hidden-size", "32", "--depth", "1", "--num-heads", "2", "--batch-size", "8", "--image-size", "16"]
TINY += ["--log-every", "5", "--warmup-steps", "5", "--sample-steps", "3", "--device", "cpu", "--precision", "fp32"]


def fit(out_dir, *flags):
    train.main([*TINY, "--out-dir", str(out_dir), *map(str, flags)])


def test_the_patch_is_of_at_most_eight_pixels_and_leaves_sixteen_tokens():
    for side, patch in {28: 7, 32: 8, 64: 8, 256: 8, 16: 4, 8: 2, 4: 1, 2: 1, 30: 6, 13: 1}.items():
        assert suitable_patch(side) == patch
    with pytest.raises(UserError, match="images of 61 x 61 do not divide into patches of 2 to 8 pixels; .* 64$"):
        suitable_patch(61)


def test_a_folder_is_settled_by_its_images(pictures_dir, tmp_path):
    config = preset("pictures", dataset=str(pictures_dir), data_dir=str(tmp_path), image_size=16)
    config, data, vae = prepare(config, CPU)
    assert (config.image_size, config.in_channels, config.num_classes, config.patch_size) == (16, 3, 3, 4)
    assert config.class_names == ("frog", "red fox", "whale") and vae is None and not config.latents
    assert data.images.shape[1:] == (3, 16, 16) and config.dataset == str(pictures_dir)


def test_the_preset_suits_the_data_unless_one_is_named(pictures_dir, monkeypatch):
    assert new_settings({})["name"] == new_settings({"dataset": "glyphs"})["name"] == "digits"
    assert new_settings({"dataset": "fashion"})["name"] == new_settings({"dataset": "kmnist"})["name"] == "fashion"
    assert new_settings({"dataset": "cifar10"})["name"] == "pictures"
    monkeypatch.chdir(pictures_dir.parent)
    named = new_settings({"dataset": pictures_dir.name, "preset": "flow"})
    assert named == {"name": "flow", "dataset": str(pictures_dir)}  # the same wherever the run goes on


def test_from_a_folder_to_a_strip(pictures_dir, tmp_path):
    fit(
        tmp_path / "run",
        "--dataset",
        pictures_dir,
        "--data-dir",
        tmp_path,
        "--train-steps",
        300,
        "--time-mean",
        1,
        "--sampler",
        "dpm++",
        "--learning-rate",
        5e-3,
        "--ema-decay",
        0.98,
    )
    strip = run("inference.py", "--checkpoint", tmp_path / "run" / "model.pth", "--output", tmp_path / "strip.png")
    assert strip.returncode == 0, strip.stderr
    named = run("inference.py", "--checkpoint", tmp_path / "run" / "model.pth", "--labels", "frog,cat")
    assert_one_line_error(named, "cat", "frog", "red fox", "whale")
    model, config = load_model(tmp_path / "run" / "model.pth")
    *_, x = denoise(
        model, config.replace(sample_steps=20), torch.tensor([0, 1, 2] * 4), torch.Generator().manual_seed(0)
    )
    brightest = x.mean((2, 3)).argmax(1)
    assert brightest.tolist() == [1, 0, 2] * 4  # a frog is green, a fox red, a whale blue


def test_a_run_on_a_folder_is_resumed_to_the_same_bits(pictures_dir, tmp_path):
    flags = ["--dataset", pictures_dir, "--data-dir", tmp_path, "--flip", "--lr-decay", "constant"]
    fit(tmp_path / "whole", *flags, "--train-steps", 12)
    fit(tmp_path / "cut", *flags, "--train-steps", 7)
    fit(tmp_path / "cut", *flags, "--train-steps", 12, "--resume")
    whole, cut = (load_file(tmp_path / name / "checkpoint.pth")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_what_is_drawn_ahead_is_what_would_be_drawn(pictures_dir, tmp_path):
    config = preset("pictures", dataset=str(pictures_dir), data_dir=str(tmp_path), image_size=16, flip=True)
    config, data, _ = prepare(config, CPU)
    batch_of = partial(train.draw_batch, data, build_process(config), config)
    with closing(Ahead(batch_of, 5, CPU)) as ahead:
        for step in (0, 1, 2, 4):  # what was not expected is drawn as well
            for part, other in zip(ahead(step), batch_of(step), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(part, other, strict=True))
        assert not ahead.coming  # after the last there is none
    with closing(Ahead(lambda step: 1 / (step - 1), 5, CPU)) as ahead, pytest.raises(ZeroDivisionError):
        ahead(0)
        ahead(1)


def test_on_a_gpu_batches_have_a_stream_of_their_own_which_is_waited_for(monkeypatch):
    told = []

    class Stream:
        def wait_stream(self, other):
            told.append(("wait for", other))

    main = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: told.append(("in", stream)) or nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append((tensor.item(), stream)))
    batch_of = lambda step: [(torch.tensor(step), torch.tensor(10 + step))]  # noqa: E731
    with closing(Ahead(batch_of, 1, torch.device("cuda"))) as ahead:
        ahead(0)
        assert told == [("in", ahead.stream), ("wait for", ahead.stream), (0, main), (10, main)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_batches_drawn_ahead_are_whole_while_it_is_busy():
    images = torch.arange(1000, dtype=torch.float32)

    def batch_of(step):
        generator = torch.Generator("cuda").manual_seed(step)
        index = torch.randint(1000, (100_000,), device="cuda", generator=generator)
        return [(images[index.cpu()].pin_memory().to("cuda", non_blocking=True), index)]

    busy, sums = torch.randn(2000, 2000, device="cuda"), []
    with closing(Ahead(batch_of, 50, torch.device("cuda"))) as ahead:
        for step in range(50):
            busy = (busy @ busy).tanh()  # so that the main stream is always behind
            ((x, index),) = ahead(step)
            sums.append((x - index).abs().sum())
    assert torch.stack(sums).sum() == 0


def test_one_class_has_no_labels_to_drop(pictures_dir, tmp_path):
    config = preset("pictures", dataset=str(pictures_dir / "frog"), data_dir=str(tmp_path), image_size=16)
    config, _, _ = prepare(config, CPU)
    assert (config.num_classes, config.class_names, config.label_dropout) == (1, None, 0.0)
    assert (config.cfg_scale, config.teacher_cfg_scale) == (1.0, 1.0)


def test_weights_to_start_from_bring_their_network_and_process(pictures_dir, tmp_path, capsys):
    folder = ["--dataset", pictures_dir, "--data-dir", tmp_path]
    fit(tmp_path / "a", *folder, "--train-steps", 20, "--preset", "flow", "--patch-size", 8, "--flip")
    start = tmp_path / "a" / "model.pth"
    train.main(
        ["--init-from", str(start), *map(str, folder), "--out-dir", str(tmp_path / "b"), "--train-steps", "1"]
        + ["--learning-rate", "1e-9", "--batch-size", "8"]
    )
    assert f"start      the weights of {start}, which know 3 of the classes" in capsys.readouterr().out
    (a, config_a), (b, config_b) = load_model(start), load_model(tmp_path / "b" / "model.pth")
    same = "process prediction patch_size hidden_size depth num_heads image_size sampler class_names".split()
    assert all(getattr(config_a, name) == getattr(config_b, name) for name in same)
    assert (config_b.init_from, config_b.preset, config_b.flip) == ("model.pth", "pictures", False)
    for name, tensor in a.state_dict().items():
        assert torch.allclose(tensor, b.state_dict()[name], atol=1e-6), name


def test_weights_of_another_process_are_refused(pictures_dir, tmp_path):
    folder = ["--dataset", pictures_dir, "--data-dir", tmp_path]
    fit(tmp_path / "a", *folder, "--train-steps", 1)
    start = tmp_path / "a" / "model.pth"
    with pytest.raises(UserError, match=f"^--init-from {start} is of process diffusion; leave out --process flow_mat"):
        fit(tmp_path / "b", *folder, "--init-from", start, "--process", "flow_matching")
    assert not (tmp_path / "b").exists()


def test_known_classes_keep_their_rows_and_new_ones_start_from_no_label(pictures_dir, tmp_path, capsys):
    fit(tmp_path / "a", "--dataset", pictures_dir, "--data-dir", tmp_path, "--train-steps", 20)
    other = tmp_path / "others"
    other.mkdir()
    for name, target in (("ape", "frog"), ("whale", "whale")):
        (other / name).symlink_to(pictures_dir / target)
    flags = ["--dataset", other, "--data-dir", tmp_path, "--train-steps", 1, "--learning-rate", 1e-9]
    fit(tmp_path / "b", *flags, "--init-from", tmp_path / "a" / "model.pth")
    assert "know 1 of the classes; new to them: ape" in capsys.readouterr().out
    old, new = (load_model(tmp_path / name / "model.pth")[0].y_embedder.embedding_table.weight for name in "ab")
    assert torch.allclose(new[1], old[2], atol=1e-6) and torch.allclose(new[2], old[3], atol=1e-6)
    assert 0.01 < (new[0] - old[3]).std() < 0.03  # a little off, or all new classes would be one


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--hidden-size", "64"), ("hidden_size", "32", "64")),
        (("--patch-size", "2"), ("patch_size", "4", "2")),
        (("--image-size", "32"), ("image_size", "16", "32")),
        (("--learn-sigma",), ("learn_sigma", "False", "True")),
    ],
)
def test_weights_of_another_network_are_refused_with_both_numbers(flags, words, pictures_dir, tmp_path):
    folder = ["--dataset", pictures_dir, "--data-dir", tmp_path]
    fit(tmp_path / "a", *folder, "--train-steps", 1)
    with pytest.raises(UserError) as error:
        fit(tmp_path / "b", *folder, "--train-steps", 1, "--init-from", tmp_path / "a" / "model.pth", *flags)
    assert all(word in str(error.value) for word in words) and "--init-from" in str(error.value)
    assert not (tmp_path / "b" / "checkpoint.pth").exists()


def test_names_of_classes_without_names_are_their_numbers():
    assert class_names_of(Config(num_classes=3)) == ["0", "1", "2"]
    assert class_names_of(Config(num_classes=2, class_names=("a", "b"))) == ["a", "b"]
    with pytest.raises(UserError, match="not a name for each of 2 classes"):
        Config(num_classes=2, class_names=("a",))


def test_latents_are_trained_on_sampled_and_resumed(pictures_dir, vae_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(vae_dir.parent)  # the autoencoder is named from where one stands
    flags = [
        "--dataset",
        pictures_dir,
        "--data-dir",
        tmp_path,
        "--vae",
        vae_dir.name,
        "--flip",
        "--lr-decay",
        "constant",
    ]
    fit(tmp_path / "run", *flags, "--train-steps", 6)
    model, config = load_model(tmp_path / "run" / "model.pth")
    assert (config.image_size, config.in_channels, config.patch_size) == (8, 4, 2)  # of latents, half as many a side
    assert config.latents and not config.clip_x0 and config.vae == str(vae_dir)
    sample = Image.open(tmp_path / "run" / "samples" / "step_0000006.png")
    assert sample.height == 3 * 17 + 1  # the preview shows pixels, in a row a class
    strip = run(
        "inference.py", "--checkpoint", tmp_path / "run" / "model.pth", "--num-samples", 3, "--npz", tmp_path / "a.npz"
    )
    assert strip.returncode == 0, strip.stderr
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (3, 16, 16, 3)
    fit(tmp_path / "whole", *flags, "--train-steps", 9)
    monkeypatch.chdir(tmp_path)
    train.main(["--out-dir", str(tmp_path / "run"), "--train-steps", "9", "--resume"])
    a, b = (load_file(tmp_path / name / "checkpoint.pth")["model"] for name in ("run", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match="--vae .* holds no AutoencoderKL"):
        train.main(["--out-dir", str(tmp_path / "run"), "--vae", str(pictures_dir), "--resume"])


def test_latents_train_from_weights_of_the_published_format(pictures_dir, vae_dir, tmp_path, capsys):
    size = dict(patch_size=8, hidden_size=384, depth=12, num_heads=6)  # DiT-S/8, or the file could not tell its heads
    published = random_dit(image_size=8, in_channels=4, num_classes=7, learn_sigma=True, **size)
    torch.save(published.state_dict(), tmp_path / "DiT.pt")
    flags = ["--dataset", str(pictures_dir), "--data-dir", str(tmp_path), "--vae", str(vae_dir), "--batch-size", "8"]
    flags += [
        "--init-from",
        str(tmp_path / "DiT.pt"),
        "--train-steps",
        "1",
        "--learning-rate",
        "1e-9",
        "--sample-steps",
        "2",
    ]
    with pytest.raises(UserError, match="its image_size is 8, that of this run 32"):
        train.main([*flags, "--image-size", "64", "--out-dir", str(tmp_path / "large")])
    train.main([*flags, "--image-size", "16", "--out-dir", str(tmp_path / "run")])
    assert "know 0 of the classes; new to them: frog, red fox, whale" in capsys.readouterr().out
    model, config = load_model(tmp_path / "run" / "model.pth")
    assert (config.prediction, config.schedule, config.learn_sigma, config.latents) == ("noise", "linear", True, True)
    for name, tensor in model.state_dict().items():
        if "embedding_table" not in name:
            assert torch.allclose(tensor, published.state_dict()[name], atol=1e-6), name


def test_images_that_changed_since_are_told_of_when_a_run_goes_on(pictures_dir, tmp_path, capsys):
    shutil.copytree(pictures_dir, tmp_path / "own")
    flags = ["--dataset", tmp_path / "own", "--data-dir", tmp_path, "--lr-decay", "constant"]
    fit(tmp_path / "run", *flags, "--train-steps", 3)
    fit(tmp_path / "run", *flags, "--train-steps", 4, "--resume")
    assert "have changed since" not in capsys.readouterr().err
    (tmp_path / "own" / "frog" / "0.png").unlink()
    fit(tmp_path / "run", *flags, "--train-steps", 5, "--resume")
    assert f"the images of {tmp_path / 'own'}, or their autoencoder, have changed since" in capsys.readouterr().err


def test_a_run_goes_on_where_its_images_have_moved_to(pictures_dir, tmp_path, capsys):
    shutil.copytree(pictures_dir, tmp_path / "here")
    flags = ["--data-dir", tmp_path, "--lr-decay", "constant"]
    fit(tmp_path / "run", "--dataset", tmp_path / "here", *flags, "--train-steps", 3)
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(UserError, match="here' is not one of"):
        fit(tmp_path / "run", *flags, "--train-steps", 4, "--resume")
    fit(tmp_path / "run", "--dataset", tmp_path / "there", *flags, "--train-steps", 4, "--resume")
    assert "have changed since" not in capsys.readouterr().err
    assert load_model(tmp_path / "run" / "model.pth")[1].dataset == str(tmp_path / "there")
    with pytest.raises(UserError, match="--dataset glyphs differs from the run's"):
        fit(tmp_path / "run", "--dataset", "glyphs", *flags, "--resume")


def test_the_only_class_of_a_folder_is_no_class_of_the_weights_it_starts_from(pictures_dir, tmp_path, capsys):
    fit(tmp_path / "a", "--dataset", pictures_dir, "--data-dir", tmp_path, "--train-steps", 1)
    flags = ["--dataset", pictures_dir / "frog", "--data-dir", tmp_path, "--train-steps", 1]
    fit(tmp_path / "b", *flags, "--init-from", tmp_path / "a" / "model.pth")
    assert "which know 0 of the classes" in capsys.readouterr().out


def test_known_words_keep_their_rows_and_new_ones_start_from_no_caption(tmp_path, capsys, monkeypatch):
    """Known by their names, wherever they stand: left and right, which are 4 and 5, are 1 and 2 in the other data."""

    def load_others(data_dir, train):
        images, captions, words = load_corners(data_dir, train)
        others = ["-", "left", "right", "the", "lower", "upper"]
        to = {"top": "upper", "bottom": "lower"}
        numbers = torch.tensor([others.index(to.get(word, word)) for word in words])
        return images, numbers[captions], others

    monkeypatch.setitem(dataset.DATASETS, "corners", load_corners)
    monkeypatch.setitem(dataset.DATASETS, "others", load_others)
    fit(tmp_path / "a", "--dataset", "corners", "--train-steps", 20, "--block", "cross-attention")
    start = ["--dataset", "others", "--train-steps", 1, "--learning-rate", 1e-9]
    fit(tmp_path / "b", *start, "--init-from", tmp_path / "a" / "model.pth")
    assert "know 4 of the words; new to them: lower, upper" in capsys.readouterr().out
    (a, _), (b, config) = (load_model(tmp_path / name / "model.pth") for name in "ab")
    assert config.captions[0] == "the upper left" and config.block == "cross-attention"
    old, new = (model.y_embedder.embedding_table.weight for model in (a, b))
    assert torch.allclose(new[[0, 1, 2, 3, 6]], old[[0, 4, 5, 1, 6]], atol=1e-6)
    assert 0.01 < (new[4:6] - old[6]).std() < 0.03
    assert torch.allclose(b.y_embedder.pos_embed, a.y_embedder.pos_embed, atol=1e-6)


@pytest.mark.parametrize("flags", [[], ["--vae", "any"]], ids=["pixels", "latents"])
def test_images_whose_captions_tell_left_from_right_are_not_mirrored(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(dataset.DATASETS, "corners", load_corners)
    monkeypatch.setattr("support.prepare.open_vae", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(
        "support.prepare.encode_dataset", lambda *_: pytest.fail("the images were encoded, which takes long")
    )
    with pytest.raises(UserError, match="--flip would turn left and right round in images, but not in their captions"):
        fit(tmp_path, "--dataset", "corners", "--flip", "--train-steps", 1, *flags)


def test_weights_for_labels_and_weights_for_captions_do_not_start_each_other(tmp_path, monkeypatch):
    monkeypatch.setitem(dataset.DATASETS, "corners", load_corners)
    monkeypatch.setitem(dataset.DATASETS, "blobs", lambda *_: (load_corners(*_)[0], torch.arange(4)))
    for data, other, lengths in (("corners", "blobs", ("3", "None")), ("blobs", "corners", ("None", "3"))):
        fit(tmp_path / data, "--dataset", data, "--train-steps", 1)
        with pytest.raises(UserError, match="its caption_length is {}, that of this run {}".format(*lengths)):
            start = ["--init-from", tmp_path / data / "model.pth"]
            fit(tmp_path / "new", "--dataset", other, "--train-steps", 1, *start)
        assert not (tmp_path / "new").exists()
