import shutil
import sys

import pytest
import torch
from conftest import tiny_vae

from config import Config
from dataset import denormalize
from support.autoencoder import decode, load_vae
from support.errors import UserError


def latents(in_channels, **changes):
    return Config(in_channels=in_channels, latents=True, **changes)


def write_vae(folder, safe=True, **options):
    """A tiny AutoencoderKL with these options, written to a folder."""
    vae = tiny_vae(**options)
    vae.save_pretrained(folder, safe_serialization=safe)
    return vae


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
    with pytest.raises(UserError, match=f"--vae {folder} holds no AutoencoderKL.*sd-vae-ft-ema") as error:
        load_vae(str(folder), latents(4))
    assert "\n" not in str(error.value)
