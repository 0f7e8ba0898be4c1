import shutil
import sys
from argparse import Namespace

import pytest
import torch
from conftest import random_dit

from benchmark import diffusers_dit, relative_error
from config import PAPER_MODELS, Config
from dit import sincos_pos_embed
from support.autoencoder import decode, load_vae
from support.checkpoint import load_model
from support.errors import UserError

SIZES = dict(image_size=16, in_channels=4, num_classes=5, learn_sigma=True, **PAPER_MODELS["DiT-S/8"])
PAPER = dict(process="diffusion", prediction="noise", schedule="linear", clip_x0=False, block="adaLN-Zero")
PAPER |= dict(sampler="ddpm", sample_steps=250, cfg_low=0.0, cfg_high=1.0)


@pytest.fixture(scope="module")
def ours():
    return random_dit(**SIZES)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return diffusers_dit(Config(**SIZES))


def latents(in_channels):
    return Config(in_channels=in_channels, clip_x0=False)


def hollow(state):
    """Zeros of a state dict's shapes, which make a small file."""
    return {name: torch.zeros(()).expand_as(tensor) for name, tensor in state.items()}


def assert_loads(path, state):
    """The file holds this state dict of SIZES, and asks to be sampled as the paper does."""
    model, config = load_model(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for name, value in (SIZES | PAPER).items():
        assert getattr(config, name) == value, name
    assert not model.training


def test_the_papers_own_file_loads(ours, tmp_path):
    torch.save(ours.state_dict(), tmp_path / "DiT-S-8.pt")
    assert_loads(tmp_path / "DiT-S-8.pt", ours.state_dict())


def test_of_the_papers_training_file_the_average_loads(ours, tmp_path):
    state = ours.state_dict()
    args = Namespace(model="DiT-S/8", image_size=128, num_classes=5, results_dir="results")
    torch.save({"model": hollow(state), "ema": state, "opt": {"state": {}}, "args": args}, tmp_path / "0050000.pt")
    assert_loads(tmp_path / "0050000.pt", state)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_folder_of_diffusers_computes_the_same(suffix, theirs, tmp_path):
    path = tmp_path / f"diffusion_pytorch_model.{suffix}"
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    if suffix == "bin":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    theirs.save_config(tmp_path)
    model, config = load_model(path)
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.tensor([4, 5])
    with torch.no_grad():
        assert relative_error(model(x, t, y), theirs(x, timestep=t, class_labels=y).sample) <= 1e-5
    for name, value in (SIZES | PAPER).items():
        assert getattr(config, name) == value, name


def test_a_lone_file_of_diffusers_is_for_256_pixels(theirs, tmp_path):
    torch.save(hollow(theirs.state_dict()), tmp_path / "weights.pth")
    model, config = load_model(tmp_path / "weights.pth")
    assert config.image_size == 32
    assert torch.equal(model.pos_embed, sincos_pos_embed(384, 4))


def without(state, name):
    return {key: tensor for key, tensor in hollow(state).items() if key != name}


@pytest.mark.parametrize(
    "content, message",
    [
        (
            lambda ours, theirs: random_dit().state_dict(),
            "hidden_size 32, depth 2 and patch_size 4 are in no row of the paper's table (S 384 and 12, B 768 and 12",
        ),
        (lambda ours, theirs: without(ours, "pos_embed"), "it lacks 'pos_embed'"),
        (lambda ours, theirs: without(ours, "t_embedder.mlp.0.bias"), "t_embedder.mlp.0.bias is missing"),
        (lambda ours, theirs: hollow(ours) | {"bias": torch.zeros(1)}, "bias is no part of a model of its sizes"),
        (
            lambda ours, theirs: hollow(ours) | {"final_layer.linear.bias": torch.zeros(768)},
            "final_layer.linear.bias is (768,); in a model of its sizes it is (512,)",
        ),
        (
            lambda ours, theirs: without(theirs, "transformer_blocks.3.attn1.to_v.bias"),
            "it lacks 'transformer_blocks.3.attn1.to_v.bias'",
        ),
        (
            lambda ours, theirs: without(theirs, "transformer_blocks.0.ff.net.2.bias"),
            "blocks.0.mlp.fc2.bias is missing",
        ),
        (lambda ours, theirs: {"ema": [1], "args": Namespace()}, "nor published weights"),
    ],
)
def test_weights_that_are_no_model_are_one_clear_error(content, message, ours, theirs, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(content(ours.state_dict(), theirs.state_dict()), path)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_published_weights_are_told_where_they_are(tmp_path):
    with pytest.raises(UserError, match="from https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt$"):
        load_model(tmp_path / "DiT-XL-2-256x256.pt")


def test_without_safetensors_its_name_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(UserError, match="a.safetensors needs .*pip install safetensors$"):
        load_model(tmp_path / "a.safetensors")


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"hello")
    with pytest.raises(UserError, match="a.safetensors is damaged"):
        load_model(tmp_path / "a.safetensors")


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


def test_a_model_of_pixels_needs_no_vae():
    for config in (latents(1), latents(3), Config(in_channels=4)):
        assert load_vae(None, config) is None
    with pytest.raises(UserError, match="--vae folder: the checkpoint draws pixels; leave it out"):
        load_vae("folder", latents(1))


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
