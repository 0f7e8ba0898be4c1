import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_vae
from PIL import Image

from config import Config
from dataset import Dataset, denormalize, load_dataset, normalize
from support import autoencoder
from support.autoencoder import about_vae, decode, encode, encode_dataset, latent_size, load_vae, main, open_vae
from support.errors import UserError


def latents(in_channels, **changes):
    return Config(in_channels=in_channels, latents=True, **changes)


def write_vae(folder, safe=True, **options):
    """A tiny AutoencoderKL with these options, written to a folder."""
    vae = tiny_vae(**options)
    vae.save_pretrained(folder, safe_serialization=safe)
    return vae


def tiny_tiny(**options):
    """A tiny AutoencoderTiny of random weights: latents (N, 4, h, w) -> images (N, 3, 2h, 2w)."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **options)


def test_latents_are_decoded_by_the_papers_scale(vae_dir):
    vae = load_vae(str(vae_dir), latents(4))
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(x / 0.18215).sample
    assert not vae.training
    assert decode(vae, x).shape == (3, 3, 16, 16)
    assert torch.allclose(decode(vae, x), expected, atol=1e-5)
    assert decode(None, x) is x


def test_a_vae_in_a_bin_file_loads_without_a_word(vae_dir, tmp_path, capfd):
    vae = load_vae(str(vae_dir), latents(4))
    vae.save_pretrained(tmp_path, safe_serialization=False)
    capfd.readouterr()
    loaded = load_vae(str(tmp_path), latents(4))
    assert capfd.readouterr() == ("", "")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, vae.state_dict()[name]), name


def test_a_model_of_pixels_needs_no_vae(capsys):
    assert load_vae(None, Config(in_channels=4)) is None
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--vae folder: the checkpoint draws pixels; leave it out"):
        load_vae("folder", Config())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_config_says_whether_a_model_is_of_latents_whatever_else_it_says(channels, tmp_path, capsys):
    for clip_x0 in (True, False):
        assert load_vae(None, Config(in_channels=channels, clip_x0=clip_x0)) is None
        with pytest.raises(UserError, match=f"the checkpoint draws latents of {channels} channels"):
            load_vae(None, latents(channels, clip_x0=clip_x0))
    write_vae(tmp_path, latent_channels=channels)
    x = torch.randn(1, channels, 8, 8)
    assert decode(load_vae(str(tmp_path), latents(channels)), x).shape == (1, 3, 16, 16)
    assert capsys.readouterr().err == ""


def test_a_shift_of_latents_is_added_after_the_scale(tmp_path):
    write_vae(tmp_path, scaling_factor=0.5, shift_factor=2.0)
    vae, x = load_vae(str(tmp_path), latents(4)), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(x / 0.5 + 2.0).sample
    assert torch.allclose(decode(vae, x), expected, atol=1e-5)
    assert not torch.allclose(decode(vae, x), vae.decode(x / 0.5).sample, atol=1e-2)


@pytest.mark.parametrize("option", ["latents_mean", "latents_std"])
def test_a_mean_and_deviation_for_each_channel_are_refused(option, tmp_path):
    write_vae(tmp_path, **{option: (0.5,) * 4})
    with pytest.raises(UserError, match=f"--vae {tmp_path} has a mean and deviation for each channel"):
        load_vae(str(tmp_path), latents(4))


def test_the_vae_of_a_pipelines_folder_is_found(vae_dir, tmp_path):
    shutil.copytree(vae_dir, tmp_path / "vae")
    assert load_vae(str(tmp_path), latents(4)).config.latent_channels == 4


@pytest.mark.parametrize("safe", [True, False])
def test_a_vae_that_lacks_a_weight_is_refused(safe, tmp_path):
    """diffusers draws a random one and goes on."""
    vae = write_vae(tmp_path, safe)
    del vae.decoder.conv_out
    vae.save_pretrained(tmp_path, safe_serialization=safe)
    with pytest.raises(UserError, match=f"--vae {tmp_path} holds no AutoencoderKL or .*decoder.conv_out"):
        load_vae(str(tmp_path), latents(4))


def test_what_a_vae_makes_that_is_no_number_is_not_drawn_black(tmp_path):
    vae = write_vae(tmp_path)
    vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        denormalize(decode(vae, torch.randn(1, 4, 8, 8)))


def test_a_model_of_latents_says_which_vae_to_get():
    with pytest.raises(
        UserError, match="latents of 4 channels.*pip install diffusers.*--vae.*sd-vae-ft-ema.*config.json"
    ):
        load_vae(None, latents(4))


def test_without_diffusers_its_name_is_told(vae_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="--vae needs .*pip install diffusers$"):
        load_vae(str(vae_dir), latents(4))


def test_images_are_encoded_as_diffusers_does_it(vae_dir):
    """The reference: AutoencoderKL's own latent_dist, its sample times scaling_factor."""
    vae, x = open_vae(vae_dir), torch.rand(5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(x).latent_dist
        sample = expected.sample(torch.Generator().manual_seed(1)) * vae.config.scaling_factor
    mean, std = encode(vae, x).chunk(2, dim=1)
    assert mean.shape == (5, 4, 8, 8) and std.min() > 0
    assert torch.allclose(mean, expected.mean, atol=1e-5) and torch.allclose(std, expected.std, atol=1e-5)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose((mean + std * noise) * about_vae(vae)["scale"], sample, atol=1e-5)


def test_few_images_are_encoded_and_decoded_together(vae_dir, monkeypatch):
    vae, x = open_vae(vae_dir), torch.rand(10, 3, 16, 16) * 2 - 1
    moments = encode(vae, x)
    images = decode(vae, moments[:, :4])
    monkeypatch.setattr(autoencoder, "AT_A_TIME", 4 * 16 * 16)
    inner, seen = (vae.encode, vae.decode), []
    monkeypatch.setattr(vae, "encode", lambda part: seen.append(len(part)) or inner[0](part))
    monkeypatch.setattr(vae, "decode", lambda part: seen.append(len(part)) or inner[1](part))
    assert torch.allclose(encode(vae, x), moments, atol=1e-5)
    assert torch.allclose(decode(vae, moments[:, :4]), images, atol=1e-5)
    assert seen == [4, 4, 2] * 2
    monkeypatch.setattr(autoencoder, "AT_A_TIME", 1)
    assert len(encode(vae, x[:2])) == 2


def test_grey_is_encoded_as_a_colour(vae_dir):
    vae, x = open_vae(vae_dir), torch.rand(2, 1, 16, 16) * 2 - 1
    assert torch.equal(encode(vae, x), encode(vae, torch.cat([x, x, x], dim=1)))


def test_an_autoencoder_tiny_has_no_deviation_and_its_own_scale_and_shift(tmp_path):
    tiny_tiny(scaling_factor=0.5, shift_factor=2.0).save_pretrained(tmp_path)
    vae, x = load_vae(str(tmp_path), latents(4)), torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(x).latents
        again = vae.decode(expected).sample
    assert torch.allclose(encode(vae, x), expected, atol=1e-5)
    assert torch.allclose(decode(vae, (expected - 2) * 0.5), again, atol=1e-5)
    about = about_vae(vae)
    assert (about["scale"], about["shift"], about["deviation"]) == (0.5, 2.0, False)
    assert (about_vae(tiny_tiny())["scale"], about_vae(tiny_tiny())["shift"]) == (1.0, 0.0)


def test_the_key_follows_from_weights_and_settings(vae_dir):
    def key(change=lambda vae: None, **options):
        vae = tiny_vae(**options)
        change(vae)
        return about_vae(vae)["vae"]

    assert key() == about_vae(open_vae(vae_dir))["vae"]
    others = {key(), key(scaling_factor=0.5), key(shift_factor=1.0)}
    others.add(key(lambda vae: vae.encoder.conv_in.weight.data[0, 0, 0, 0].add_(1e-3)))
    assert len(others) == 4


def test_images_of_many_channels_are_refused(vae_dir):
    with pytest.raises(UserError, match="colour images, or grey ones; these have 17 channels"):
        encode(open_vae(vae_dir), torch.zeros(1, 17, 8, 8))


def test_images_in_any_order_of_memory_are_encoded(vae_dir, tmp_path):
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # as a loader of (N, H, W, C) gives them
    data = encode_dataset(Dataset("own", images, torch.arange(2), (8, 8)), open_vae(vae_dir), tmp_path, flip=False)
    assert data.images.shape == (2, 8, 4, 4)


def test_a_size_that_does_not_divide_is_refused(vae_dir):
    vae = open_vae(vae_dir)
    assert latent_size(vae, 28) == 14
    with pytest.raises(UserError, match="image_size 27 is not divisible by 2, as the autoencoder needs it; try 28"):
        encode(vae, torch.zeros(1, 3, 28, 27))


def test_latents_that_are_no_numbers_are_refused(vae_dir):
    vae = open_vae(vae_dir)
    vae.encoder.conv_in.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="latents that are not finite numbers"):
        encode(vae, torch.zeros(1, 3, 16, 16))


def test_weights_in_half_precision_are_used_in_full(vae_dir, tmp_path):
    """In which a VAE such as SDXL's overflows."""
    open_vae(vae_dir).half().save_pretrained(tmp_path)
    assert open_vae(tmp_path).dtype == torch.float32


def test_the_vae_of_the_training_is_the_default(vae_dir, tmp_path):
    config = latents(4, vae=str(vae_dir))
    assert about_vae(load_vae(None, config)) == about_vae(open_vae(vae_dir))
    write_vae(tmp_path, scaling_factor=0.5)
    assert load_vae(str(tmp_path), config).config.scaling_factor == 0.5
    gone = tmp_path / "gone"
    with pytest.raises(UserError, match=f"autoencoder is not in {gone} any more; say where with --vae DIR"):
        load_vae(None, latents(4, vae=str(gone)))


def test_a_vae_of_grey_images_is_refused(tmp_path):
    write_vae(tmp_path, in_channels=1, out_channels=1)
    with pytest.raises(UserError, match="is of images of 1 channels; name one of colour images"):
        open_vae(tmp_path)


def test_a_vae_of_other_latents_is_refused(vae_dir):
    with pytest.raises(UserError, match="decodes 4 channels; the checkpoint draws 16"):
        load_vae(str(vae_dir), latents(16))


def no_weights(folder, vae_dir):
    (folder / "config.json").write_text((vae_dir / "config.json").read_text())


def damaged_weights(folder, vae_dir):
    no_weights(folder, vae_dir)
    (folder / "diffusion_pytorch_model.safetensors").write_text("hello")


def another_class(folder, vae_dir):
    shutil.copytree(vae_dir, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text((vae_dir / "config.json").read_text().replace("AutoencoderKL", "VQModel"))


@pytest.mark.parametrize(
    "write",
    [
        lambda folder, vae_dir: None,
        lambda folder, vae_dir: folder.rmdir(),
        lambda folder, vae_dir: (folder / "config.json").write_text("[1]"),
        another_class,
        no_weights,
        damaged_weights,
    ],
)
def test_a_folder_that_holds_no_vae_is_refused(write, vae_dir, tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    write(folder, vae_dir)
    with pytest.raises(
        UserError, match=f"--vae {folder} holds no AutoencoderKL or AutoencoderTiny.*sd-vae-ft-ema"
    ) as error:
        load_vae(str(folder), latents(4))
    assert "\n" not in str(error.value)


def colours(data_dir=None, train=True):
    """200 images (3, 16, 16), each one colour at the left and another at the right."""
    rng = torch.Generator().manual_seed(int(train))
    left = torch.linspace(1, 0, 16).expand(1, 1, 16, 16)
    images = torch.rand(200, 3, 1, 1, generator=rng) * left + torch.rand(200, 3, 1, 1, generator=rng) * (1 - left)
    return (images * 255).to(torch.uint8), torch.zeros(200, dtype=torch.int64)


@pytest.fixture
def colour_data(monkeypatch):
    monkeypatch.setitem(load_dataset.__globals__["DATASETS"], "colours", colours)
    for name, value in dict(WIDTHS=(8, 8), WARMUP_STEPS=5, LEARNING_RATE=1e-2).items():
        monkeypatch.setattr(autoencoder, name, value)


def train(folder, *flags):
    main([*map(str, ["--dataset", "colours", "--out-dir", folder, "--device", "cpu", *flags])])


def test_an_autoencoder_learns_and_says_how_well(colour_data, tmp_path, capsys):
    folder = tmp_path / "runs" / "vae"
    train(folder, "--train-steps", 60, "--downsample", 2)
    words = capsys.readouterr().out
    assert "(3, 16, 16) -> (4, 8, 8), reconstruction of 200 test images: squared error 0." in words

    vae, images = load_vae(str(folder), latents(4)), normalize(colours(train=False)[0])
    mean, std = encode(vae, images).chunk(2, dim=1)
    about = about_vae(vae)
    scaled = (mean + std * torch.randn(mean.shape) - about["shift"]) * about["scale"]
    assert 0.8 < scaled.std() < 1.25
    again = decode(vae, (mean - about["shift"]) * about["scale"])
    error = (again.clamp(-1, 1) - images).square().mean().item()
    assert error < 0.85 * images.var(), "the mean picture is hardly worse"
    assert f"squared error {error:.5f} (pixels in [-1, 1]), PSNR {10 * np.log10(4 / error):.2f} dB" in words
    picture = np.asarray(Image.open(folder / "reconstruction.png"))
    assert picture.shape == (6 * 17 + 1, 12 * 17 + 1, 3)
    originals, reconstructions = picture[1:17].astype(float), picture[18:34].astype(float)
    assert np.abs(originals - reconstructions).mean() < np.abs(originals - picture[35:51]).mean()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "reconstruction.png",
    ]


@pytest.mark.parametrize(("downsample", "channels"), [(2, 4), (8, 3)])
def test_other_sizes_of_latents(downsample, channels, colour_data, tmp_path):
    train(tmp_path / "vae", "--train-steps", 1, "--downsample", downsample, "--latent-channels", channels)
    vae = open_vae(tmp_path / "vae")
    assert encode(vae, torch.zeros(1, 3, 16, 16)).shape == (1, 2 * channels, 16 // downsample, 16 // downsample)


def test_grey_digits_train_too(glyphs_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(autoencoder, "WIDTHS", (8,))
    monkeypatch.setattr(autoencoder, "report", lambda vae, images, path: None)  # 10,000 images take a while
    main(
        [*map(str, ["--dataset", "glyphs", "--data-dir", glyphs_dir, "--train-steps", 1, "--out-dir", tmp_path / "v"])]
    )
    assert encode(open_vae(tmp_path / "v"), torch.zeros(1, 1, 28, 28)).shape == (1, 8, 7, 7)


def test_the_same_seed_gives_the_same_autoencoder(colour_data, tmp_path):
    keys = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(keys))
        train(tmp_path / name, "--train-steps", 2, "--seed", seed)
        keys.append(about_vae(open_vae(tmp_path / name))["vae"])
    assert keys[0] == keys[1] != keys[2]


def test_what_is_there_is_not_overwritten(vae_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "load_dataset", None)  # refused before any work
    with pytest.raises(UserError, match=f"--out-dir {vae_dir} is not empty; give a new folder"):
        train(vae_dir)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        train(tmp_path)
    with pytest.raises(UserError, match="is a file; give a new folder"):
        train(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("what", ["diverged", "full"])
def test_when_training_fails_nothing_is_left(what, colour_data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    def diverge(vae, *_):
        vae.encoder.conv_in.weight.data.fill_(torch.inf)

    if what == "full":
        from diffusers import AutoencoderKL

        monkeypatch.setattr(AutoencoderKL, "save_pretrained", fail)
    else:
        monkeypatch.setattr(autoencoder, "train_vae", diverge)
    with pytest.raises(UserError, match="free some space" if what == "full" else "not finite"):
        train(tmp_path / "vae", "--train-steps", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--out-dir is missing"),
        (["--out-dir", "DIR", "--downsample", "3"], "invalid choice: 3"),
        (["--out-dir", "DIR", "--downsample", "8"], "image_size 28 is not divisible by 8"),
        (["--out-dir", "DIR", "--train-steps", "0"], "train_steps is 0"),
        (["--out-dir", "DIR", "--dataset", "cats"], "dataset 'cats' is not one of"),
    ],
)
def test_mistakes_leave_nothing(flags, words, glyphs_dir, tmp_path, capsys):
    flags = [str(tmp_path / "vae") if flag == "DIR" else flag for flag in flags]
    with pytest.raises((UserError, SystemExit)) as error:
        main(["--data-dir", str(glyphs_dir), "--dataset", "glyphs", *flags])
    assert words in str(error.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(glyphs_dir, tmp_path):
    command = [sys.executable, "-m", "support.autoencoder", "--data-dir", glyphs_dir, "--dataset", "glyphs"]
    command += ["--out-dir", tmp_path / "vae"]
    child = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    start = time.monotonic()
    while not list(tmp_path.iterdir()) and time.monotonic() - start < 120:
        time.sleep(0.1)
    assert list(tmp_path.iterdir()), "it never began"
    time.sleep(3)
    child.send_signal(signal.SIGINT)
    errors = child.communicate(timeout=60)[1]
    assert child.returncode in (130, -signal.SIGINT) and errors == ""  # a shell shows 130 for both
    assert not list(tmp_path.iterdir())
