import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, load_corners, tiny_vae

import dataset
from config import Config
from dataset import Dataset, normalize
from loaders.latents import draw_latents, pack_latents
from loaders.packing import read_pack
from support import autoencoder
from support.errors import UserError
from support.prepare import prepare

IMAGES = torch.randint(256, (150, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(150) % 3
ABOUT = {"scale": 0.5, "shift": 1.0, "deviation": True, "vae": "v1", "class_names": ["a", "b", "c"]}


def halves(images):
    """A stand-in for an autoencoder: the first columns as mean, the others as deviation."""
    x = images.float() / 255
    return torch.cat([x[..., :4], x[..., 4:]], dim=1)


def pack(folder, encode=halves, images=IMAGES, flip=False, key="d1", **about):
    return pack_latents("cats", images, LABELS[: len(images)], encode, folder, key, flip, {**ABOUT, **about})


def refuse(images):
    raise AssertionError("encoded again")


def test_each_image_is_encoded_once_and_kept_in_half_precision(tmp_path):
    found = pack(tmp_path / "train")
    assert found.images.dtype == torch.float16 and found.images.shape == (150, 6, 8, 4)
    assert torch.equal(found.images, halves(IMAGES).half())
    assert torch.equal(found.labels, LABELS) and found.class_names == ["a", "b", "c"]
    assert ABOUT.items() <= found.about.items() and "key" not in ABOUT
    again = pack(tmp_path / "train", refuse)
    assert torch.equal(again.images, found.images)
    on_disk = np.load(tmp_path / "train" / "images.npy")
    assert on_disk.dtype == np.float16 and np.array_equal(on_disk, found.images.numpy())


def test_mirrored_images_follow_the_others(tmp_path):
    found = pack(tmp_path / "train", flip=True)
    assert torch.equal(found.images, torch.cat([halves(IMAGES), halves(IMAGES.flip(3))]).half())
    assert torch.equal(found.labels, torch.cat([LABELS, LABELS]))
    assert not torch.equal(found.images[:150], found.images[150:])


@pytest.mark.parametrize("change", [dict(key="d2"), dict(vae="v2"), dict(flip=True)])
def test_latents_are_stale_when_data_autoencoder_or_flip_changed(change, tmp_path, capsys):
    pack(tmp_path / "train")
    capsys.readouterr()
    pack(tmp_path / "train", lambda images: halves(255 - images), **change)
    assert "the latents of cats or the settings have changed" in capsys.readouterr().err
    found = pack(tmp_path / "train", refuse, **change)
    assert torch.equal(found.images[:150], halves(255 - IMAGES).half())


def test_a_failure_leaves_nothing(tmp_path):
    calls = []

    def fail_later(images):
        calls.append(0)
        if len(calls) == 2:
            raise UserError("no")
        return halves(images)

    with pytest.raises(UserError, match="no"):
        pack(tmp_path / "train", fail_later)
    assert not (tmp_path / "train").exists() and not list(tmp_path.glob("*.tmp"))


def test_latents_beyond_half_precision_are_refused(tmp_path):
    with pytest.raises(UserError, match="cats: its latents are beyond half precision, 65,504; use another autoencoder"):
        pack(tmp_path / "train", lambda images: halves(images) * 1e5)
    assert read_pack(tmp_path / "train", "d1") is None and not list(tmp_path.iterdir())


def test_too_small_a_disk_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 150 * 6 * 32 * 2 - 1}))
    with pytest.raises(UserError, match="the latents of cats, packed, would take 0.0 GB"):
        pack(tmp_path / "train")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 150 * 6 * 32 * 2}))
    pack(tmp_path / "train")


def test_draws_have_the_mean_and_the_deviation_after_shift_and_scale():
    mean, std = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1), torch.tensor([0.5, 0.1]).view(1, 2, 1, 1)
    moments = torch.cat([mean, std], dim=1).expand(4000, 4, 3, 3).half()
    data = Dataset("latents", moments, torch.arange(4000), (3, 3), latents=dict(scale=2.0, shift=1.0, deviation=True))
    draw = partial(data.draw, torch.arange(4000), None)
    x0, _ = draw(torch.Generator().manual_seed(0))
    assert x0.shape == (4000, 2, 3, 3) and x0.dtype == torch.float32
    assert torch.allclose(x0.mean((0, 2, 3)), torch.tensor([4.0, -4.0]), atol=0.03)
    assert torch.allclose(x0.std((0, 2, 3)), torch.tensor([1.0, 0.2]), rtol=0.02)
    again, other = (draw(torch.Generator().manual_seed(seed))[0] for seed in (0, 1))
    part, _ = draw(torch.Generator().manual_seed(0), slice(9, 30))
    assert torch.equal(x0, again) and not torch.equal(x0, other) and torch.equal(x0[9:30], part)


def test_latents_without_deviation_are_not_drawn():
    moments, generator = torch.randn(5, 4, 2, 2).half(), torch.Generator().manual_seed(0)
    before = generator.get_state()
    data = Dataset("latents", moments, torch.arange(5), (2, 2), latents=dict(scale=2.0, shift=1.0, deviation=False))
    x0, _ = data.draw(torch.arange(5), None, generator)
    assert torch.equal(x0, (moments.float() - 1) * 2)
    assert torch.equal(generator.get_state(), before)


def test_from_pictures_to_latents_and_back_through_diffusers(tmp_path):
    """The reference: AutoencoderKL's own sample and scale; half precision is all that differs."""
    vae = tiny_vae(scaling_factor=0.7, shift_factor=0.1).eval()
    about = autoencoder.about_vae(vae)

    def encode(images):
        return autoencoder.encode(vae, normalize(images))

    found = pack(tmp_path / "train", encode, **about)
    assert json.loads((tmp_path / "train" / "pack.json").read_text())["vae"] == about["vae"]
    noise = torch.randn(
        9, found.images.shape[1] // 2, *found.images.shape[2:], generator=torch.Generator().manual_seed(3)
    )
    x0 = draw_latents(found.images[:9], noise, found.about["scale"], found.about["shift"])
    with torch.no_grad():
        sample = vae.encode(normalize(IMAGES[:9])).latent_dist.sample(torch.Generator().manual_seed(3))
        expected = vae.decode(sample).sample
    assert torch.allclose(x0, (sample - 0.1) * 0.7, atol=2e-3)
    assert torch.allclose(autoencoder.decode(vae, x0), expected, atol=1e-2)


def test_latents_of_images_with_captions_keep_them(vae_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(dataset.DATASETS, "corners", load_corners)
    config = Config(dataset="corners", data_dir=str(tmp_path), vae=str(vae_dir), patch_size=2)
    config, data, _ = prepare(config, torch.device("cpu"))
    assert config.latents and (config.caption_length, config.captions) == (3, tuple(CAPTIONS))
    assert torch.equal(data.labels, load_corners("", True)[1]) and len(data.images) == 4
