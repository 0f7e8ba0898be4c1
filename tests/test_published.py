import json
import pathlib
import struct
import subprocess
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_dit

import evaluate
import inference
from benchmark import diffusers_dit, relative_error
from config import PAPER_MODELS, PRESETS, Config
from dit import sincos_pos_embed
from inference import denoise
from support.checkpoint import load_model, model_config
from support.errors import UserError
from support.files import read_file, save_file
from support.published import WEIGHTS, export, main

SMALL = dict(patch_size=4, hidden_size=64, depth=2, num_heads=4)
SIZES = dict(image_size=8, in_channels=4, num_classes=5, learn_sigma=True, **SMALL)
PAPER = dict(process="diffusion", prediction="noise", schedule="linear", clip_x0=False, block="adaLN-Zero")
PAPER |= dict(sampler="ddpm", sample_steps=250, cfg_scale=4.0, cfg_low=0.0, cfg_high=1.0)
SIT_ARGS = dict(model="SiT-S/8", num_classes=5, path_type="Linear", prediction="velocity")


@pytest.fixture(autouse=True)
def a_small_row(monkeypatch):
    """A row of the paper's table becomes a small one: DiT-S/8 itself takes 130 MB a file."""
    monkeypatch.setitem(PAPER_MODELS, "DiT-S/8", SMALL)
    monkeypatch.setitem(PRESETS, "DiT-S/8", PRESETS["DiT-S/8"] | SMALL)


@pytest.fixture(scope="module")
def ours():
    return random_dit(**SIZES)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return diffusers_dit(Config(**SIZES))


def write(content, tmp_path, name="weights.pt"):
    path = tmp_path / name
    torch.save(content, path)
    return path


def in_training(state, **args):
    """What DiT's and SiT's train.py write."""
    return {"model": {}, "ema": state, "opt": {"state": {}}, "args": Namespace(results_dir="results", **args)}


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


class Lie:
    """Is pickled as a call of a function, and a state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def batch(size=8):
    """x, t and y for a network of SIZES."""
    torch.manual_seed(1)
    return torch.randn(3, 4, size, size), torch.tensor([3.0, 400.0, 900.0]), torch.tensor([4, 0, 5])


@torch.no_grad()
def error_of(model, network, size=8, shift=0):
    """The relative error of a model against a network of diffusers', whose downscale_freq_shift becomes `shift`."""
    x, t, y = batch(size)
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift
    return relative_error(model(x, t, y), network(x, timestep=t, class_labels=y).sample)


def assert_loads(path, state, **expected):
    """The file holds this state dict, of SIZES, and asks to be sampled as the paper does."""
    model, config = load_model(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for name, value in (SIZES | PAPER | expected).items():
        assert getattr(config, name) == value, name
    assert not model.training


def assert_refused(path, *words, published=None):
    with pytest.raises(UserError) as error:
        load_model(path, published=published)
    for word in (*words, str(path)):
        assert word in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_the_papers_own_file_loads_and_what_it_does_not_say_is_said(ours, tmp_path, capsys):
    path = write(ours.state_dict(), tmp_path)
    assert_loads(path, ours.state_dict())
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and str(path) in note
    for words in ("the paper's DiT (--published sit for", "5 classes and a null class", "the 4 heads of DiT-S/8"):
        assert words in note


def test_a_file_of_the_papers_real_sizes_loads(tmp_path, monkeypatch):
    monkeypatch.undo()
    model = random_dit(image_size=16, in_channels=4, num_classes=5, learn_sigma=True, **PAPER_MODELS["DiT-S/8"])
    hollow = {name: torch.zeros(()).expand_as(tensor) for name, tensor in model.state_dict().items()}
    _, config = load_model(write(hollow, tmp_path))
    assert (config.preset, config.hidden_size, config.depth, config.num_heads) == ("DiT-S/8", 384, 12, 6)


def test_of_a_training_file_the_average_loads_as_its_args_say(ours, tmp_path, capsys):
    args = dict(model="DiT-S/8", num_classes=5, image_size=256)
    assert_loads(write(in_training(ours.state_dict(), **args), tmp_path), ours.state_dict())
    assert capsys.readouterr().err == ""  # nothing had to be assumed


def test_weights_without_their_average_are_read_and_it_is_said(ours, tmp_path, capsys):
    assert_loads(write({"model": ours.state_dict(), "opt": {}}, tmp_path), ours.state_dict())
    assert "holds no average of them" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix, ours, tmp_path):
    state = {prefix + name: tensor for name, tensor in ours.state_dict().items()}
    assert_loads(write({"ema": state}, tmp_path), ours.state_dict())


def test_paths_and_numbers_of_numpy_in_args_are_plain_data(ours, tmp_path):
    args = dict(model="DiT-S/8", num_classes=np.int64(5), class_dropout_prob=np.float32(0.1), fast=np.bool_(True))
    args |= dict(data_path=pathlib.Path("/data"), name=np.str_("a"))
    path = write(in_training(ours.state_dict(), **args), tmp_path)
    assert_loads(path, ours.state_dict())
    read = read_file(path)[0]["args"]
    assert (read.num_classes, read.fast, read.name) == (5, True, "a") and type(read.num_classes) is int
    assert read.class_dropout_prob == pytest.approx(0.1)
    assert read.data_path == pathlib.PurePath("/data") and not isinstance(read.data_path, pathlib.Path)


def test_a_type_that_lies_about_itself_is_an_error_and_no_crash(ours, tmp_path):
    """NumPy's own unpickling believes that these eight bytes are an object's address, and goes there."""
    for name in ("O8", "V9999999"):
        kind = Lie(np.dtype, (name, False, True), (3, "|", None, None, None, -1, -1, 0))
        args = {"lr": Lie(np.float64(0).__reduce__()[0], (kind, b"AAAAAAAA"))}
        assert_refused(write(in_training(ours.state_dict(), **args), tmp_path), "is damaged or not a file of weights")


def test_what_is_more_than_plain_data_is_named_and_nothing_is_called_damaged(ours, tmp_path):
    path = write(in_training(ours.state_dict(), classes=np.arange(5)), tmp_path)
    assert_refused(path, "multiarray._reconstruct", "save the weights alone")


def test_a_file_of_the_time_before_zips_loads_and_no_checksums_are_missed(ours, tmp_path, capsys):
    torch.save(ours.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pt")
    assert_loads(tmp_path / "old.pt", ours.state_dict())
    assert "checksums" not in capsys.readouterr().err


def test_checksums_that_do_not_fit_are_a_note_in_a_foreign_file_and_an_error_in_ours(ours, tmp_path, capsys):
    config = Config(**(SIZES | PAPER))
    for content in (in_training(ours.state_dict(), model="DiT-S/8", num_classes=5), None):
        path = write(content or {"model": ours.state_dict(), "config": model_config(config)}, tmp_path)
        data = bytearray(path.read_bytes())
        central = data.rindex(b"PK\x01\x02")  # the list of contents at the end; its last entry's checksum
        data[central + 16 : central + 20] = struct.pack("<I", 0)
        path.write_bytes(data)
        if content:
            assert_loads(path, ours.state_dict())
            assert "checksums" in capsys.readouterr().err
        else:
            assert_refused(path, "is damaged: its checksums")


def sit(seed=0):
    """A network of SiT's, which is DiT's: for t in [0, 1] its first C channels are data - noise."""
    net = random_dit(seed, **SIZES)
    for part in (net.t_embedder.mlp[0], net.final_layer.linear):
        part.weight.data *= 4  # so that it depends on t
    return net


def read_sit(net, how, tmp_path):
    if how == "by its args":
        return load_model(write(in_training(net.state_dict(), **SIT_ARGS), tmp_path))
    return load_model(write(net.state_dict(), tmp_path), published="sit")


@pytest.mark.parametrize("how", ["by its args", "by the flag"])
def test_a_constant_velocity_of_sit_leads_from_noise_to_noise_and_velocity(how, tmp_path):
    net = random_dit(**SIZES)
    net.final_layer.linear.weight.data.zero_()
    net.final_layer.linear.bias.data = torch.tensor([0.3] * 4 + [99.0] * 4).repeat(16)
    model, config = read_sit(net, how, tmp_path)
    assert (config.process, config.sampler, config.cfg_scale) == ("flow_matching", "heun", 4.0)
    noise, *_, x = denoise(model, config, torch.tensor([0, 4]), torch.Generator().manual_seed(0))
    assert torch.allclose(x, noise + 0.3, atol=1e-5)


@pytest.mark.parametrize("how", ["by its args", "by the flag"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_sit_is_sampled_along_its_own_time(how, cfg_scale, tmp_path):
    net, y, steps = sit(), torch.tensor([0, 4, 2]), 10
    model, config = read_sit(net, how, tmp_path)
    config = config.replace(sampler="euler", sample_steps=steps, cfg_scale=cfg_scale)
    noise, *_, x = denoise(model, config, y, torch.Generator().manual_seed(0))

    def travel(scale):
        z = noise
        for step in range(steps):  # from 0, noise, to 1, data
            t = torch.full((3,), scale * step / steps)
            with torch.no_grad():
                velocity, anyones = (net(z, t, labels)[:, :4] for labels in (y, torch.full_like(y, 5)))
            z = z + (anyones + cfg_scale * (velocity - anyones)) / steps
        return z

    assert relative_error(x, travel(scale=1)) < 1e-5
    assert relative_error(x, travel(scale=1000)) > 0.01  # the test would see a wrong scale


def test_a_sit_without_the_unused_channels_is_the_same(tmp_path):
    net = sit()
    half = random_dit(**SIZES | {"learn_sigma": False})
    state = net.state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = state[name].unflatten(0, (16, 8))[:, :4].flatten(0, 1)
    half.load_state_dict(state)
    (model, _), (other, _) = (read_sit(network, "by its args", tmp_path) for network in (net, half))
    assert torch.equal(model(*batch()), other(*batch()))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(path_type="GVP"), "path_type 'GVP'; only Linear"),
        (dict(path_type="linear", prediction="v"), "path_type 'linear'"),  # of a project whose time runs the other way
        (dict(model="DiT-S/8", path_type="VP"), "path_type 'VP'"),
        (dict(prediction="score"), "prediction 'score'; only velocity"),
        (dict(model="SiT-B/8"), "but it is said to be"),
        (dict(num_classes=7), "num_classes 5, but it is said to be 7"),
    ],
)
def test_what_args_say_against_it_is_refused(changes, words, ours, tmp_path):
    assert_refused(write(in_training(ours.state_dict(), **SIT_ARGS | changes), tmp_path), words)


@pytest.mark.parametrize("model, published", [("SiT-S/8", "dit"), ("DiT-S/8", "sit"), ("DiT-S/8", "diffusers")])
def test_a_flag_against_the_args_is_refused(model, published, ours, tmp_path):
    path = write(in_training(ours.state_dict(), model=model, num_classes=5), tmp_path)
    assert_refused(path, f"its args say that it is {model[:3].lower()}; leave out", published=published)


def test_a_model_of_another_name_is_not_taken_for_a_dit(ours, tmp_path):
    args = dict(model="MaskDiT-S/8", num_classes=5)
    path = write(in_training(ours.state_dict(), **args), tmp_path)
    assert_refused(path, "its args name a MaskDiT-S/8; if that is a DiT or a SiT, say which with --published")
    assert load_model(path, published="dit")[1].prediction == "noise"
    with pytest.raises(UserError, match="published 'mask' is not one of dit, sit, diffusers"):
        load_model(path, published="mask")


def test_too_little_memory_is_not_the_files_fault(ours, tmp_path, monkeypatch):
    def no_memory(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes")

    path = write(in_training(ours.state_dict(), model="DiT-S/8", num_classes=5), tmp_path)
    for place in ("dit.DiT.to_empty", "support.published.sizes_of"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="allocate memory"):
            patch.setattr(place, no_memory)
            load_model(path)


def test_the_flag_is_refused_where_it_would_change_nothing(tmp_path):
    config = Config(image_size=28, patch_size=4, hidden_size=32, depth=2, num_heads=2)
    save_file({"model": random_dit().state_dict(), "config": model_config(config)}, tmp_path / "model.pth")
    assert_refused(tmp_path / "model.pth", "--published sit would change nothing", published="sit")
    for flags in ([], ["--bits-per-dim", "2"]):
        with pytest.raises(UserError, match="--published dit would change nothing: .*model.pth says what it is"):
            evaluate.main(["--published", "dit", *flags])
    with pytest.raises(UserError, match="--published dit would change nothing: .*model.pth says what it is"):
        inference.main(["--published", "dit", "--output", str(tmp_path / "a.png")])
    with pytest.raises(UserError, match="--published would change nothing with the images of --npz"):
        evaluate.main(["--published", "dit", "--npz", "a.npz"])


@pytest.mark.parametrize("published", ["dit", "sit"])
def test_the_flag_of_inference_decides_how_raw_weights_are_drawn(published, tmp_path, vae_dir, capsys):
    path = write(sit().state_dict(), tmp_path)
    flags = [
        "--published",
        published,
        "--vae",
        str(vae_dir),
        "--device",
        "cpu",
        "--sample-steps",
        "2",
        "--labels",
        "01",
    ]
    inference.main(["--checkpoint", str(path), *flags, "--output", str(tmp_path / "a.png")])
    sampler = {"dit": "ddpm, 2 steps, guidance 4.0: 4", "sit": "heun, 2 steps, guidance 4.0: 6"}[published]
    assert f"2 images by {sampler} network evaluations" in capsys.readouterr().out


@pytest.mark.parametrize("args", [dict(num_classes=6), dict(class_dropout_prob=0.0)])
def test_a_table_of_labels_without_a_null_class_is_read_as_such(args, ours, tmp_path, capsys):
    model, config = load_model(write(in_training(ours.state_dict(), model="DiT-S/8", **args), tmp_path))
    assert capsys.readouterr().err == ""
    assert (config.num_classes, config.cfg_scale) == (6, 1.0)
    x, t, y = batch()
    assert torch.equal(model(x, t, y), ours(x, t, y))  # label 5 is a class like the others
    config = config.replace(sample_steps=2, sampler="ddim")
    *_, drawn = denoise(model, config, torch.tensor([0, 5]), torch.Generator().manual_seed(0))
    assert drawn.isfinite().all()
    for cfg_scale in (0.0, 4.0):
        with pytest.raises(UserError, match="know no null class, which guidance needs.*cfg_scale"):
            list(denoise(model, config.replace(cfg_scale=cfg_scale), torch.tensor([0]), torch.Generator()))


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_file_of_diffusers_computes_the_same(suffix, theirs, tmp_path, capsys):
    path = tmp_path / f"other_name.{suffix}"
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    if suffix == "bin":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    theirs.save_config(tmp_path)
    model, config = load_model(path)
    assert error_of(model, theirs) <= 1e-5
    for name, value in (SIZES | PAPER).items():
        assert getattr(config, name) == value, name
    assert "assumed: the paper's DiT (--published diffusers for one trained in diffusers)\n" in capsys.readouterr().err


@pytest.mark.parametrize("shards", ["1MB", "100KB"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("pipeline", [True, False])
def test_folders_of_diffusers_are_read_sharded_or_not(pipeline, safe, shards, theirs, tmp_path):
    folder = tmp_path / "transformer" if pipeline else tmp_path
    theirs.save_pretrained(folder, max_shard_size=shards, safe_serialization=safe)
    assert (len(list(folder.glob(f"{WEIGHTS}*"))) > 1) == (shards == "100KB")
    model, _ = load_model(tmp_path)
    assert error_of(model, theirs) <= 1e-5
    model, _ = load_model(str(next(folder.glob("*.index.json"), folder)))
    assert error_of(model, theirs) <= 1e-5


def test_a_missing_shard_is_named(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(tmp_path, f"{shard} does not exist")


def test_weights_trained_in_diffusers_keep_its_frequencies_and_epsilon(theirs, tmp_path, capsys):
    folder = tmp_path / "transformer"
    theirs.save_pretrained(folder)
    model, _ = load_model(folder, published="diffusers")
    assert capsys.readouterr().err == ""
    assert error_of(model, theirs, shift=1) <= 1e-5
    assert error_of(load_model(folder)[0], theirs, shift=1) > 1e-3  # the paper's frequencies would be wrong
    assert model.blocks[0].norm2.eps == 1e-6
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_eps": 0.1}))
    network = type(theirs).from_pretrained(folder, low_cpu_mem_usage=False)
    assert error_of(load_model(folder)[0], network) <= 1e-5
    (folder / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "norm_eps"}))
    assert load_model(folder, published="diffusers")[0].blocks[1].norm2.eps == 1e-5  # what diffusers takes then


def test_heads_and_size_come_from_the_config_of_diffusers(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | dict(num_heads=8, image_size=16, depth=3, learn_sigma=False)  # in no row of the table
    network = diffusers_dit(Config(**sizes))
    network.save_pretrained(tmp_path)
    model, config = load_model(tmp_path)
    for name, value in sizes.items():
        assert getattr(config, name) == value, name
    assert error_of(model, network, size=16) <= 1e-5


def test_a_lone_file_of_diffusers_is_assumed_to_be_for_256_pixels(theirs, tmp_path, capsys):
    model, config = load_model(write(theirs.state_dict(), tmp_path))
    assert config.image_size == 32
    assert torch.equal(model.pos_embed, sincos_pos_embed(64, 8))
    assert "images of 256 pixels (a config.json beside it would tell)" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"sample_size": 64}')
    assert load_model(tmp_path / "weights.pt")[1].image_size == 64


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(activation_fn="gelu"), "config.json says activation_fn 'gelu'"),
        (dict(norm_type="ada_norm"), "config.json says norm_type 'ada_norm'"),
        (dict(_class_name="PixArtTransformer2DModel"), "config.json says _class_name"),
        (dict(num_layers=3), "depth 2, but it is said to be 3"),
        (dict(attention_head_dim=32), "hidden_size 64, but it is said to be 128"),
        (dict(num_attention_heads=3, attention_head_dim=21), "hidden_size 64, but it is said to be 63"),
        (dict(num_attention_heads=None), "config.json says num_attention_heads None; it must be a number"),
        (dict(sample_size="large"), "config.json says sample_size 'large'; it must be a number"),
        (dict(sample_size=0), "image_size is 0; it must be at least 1"),
    ],
)
def test_a_config_of_diffusers_that_cannot_be_is_refused(changes, words, theirs, tmp_path):
    theirs.save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert_refused(write(theirs.state_dict(), tmp_path), words)


def test_a_damaged_config_of_diffusers_is_named(theirs, tmp_path):
    for text in ("{", "[1]", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        assert_refused(write(theirs.state_dict(), tmp_path), "config.json beside it cannot be read")


def test_blocks_that_embed_each_in_its_own_way_are_refused(theirs, tmp_path):
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    path = write(theirs.state_dict() | {name: torch.zeros(6, 64)}, tmp_path)
    assert_refused(path, name, "all blocks share one embedder")


@pytest.mark.parametrize(
    "content, message",
    [
        (
            lambda ours, theirs: random_dit().state_dict(),
            "hidden_size 32, depth 2 and patch_size 4 are in no row of the paper's table (S 384 and 12, B 768 and 12",
        ),
        (lambda ours, theirs: without(ours, "pos_embed"), "it lacks 'pos_embed'"),
        (lambda ours, theirs: without(ours, "t_embedder.mlp.0.bias"), "t_embedder.mlp.0.bias is missing"),
        (lambda ours, theirs: ours | {"bias": torch.zeros(1)}, "bias is no part of a model of its sizes"),
        (
            lambda ours, theirs: ours | {"final_layer.linear.bias": torch.zeros(768)},
            "final_layer.linear.bias is (768,); in a model of its sizes it is (128,)",
        ),
        (
            lambda ours, theirs: without(theirs, "transformer_blocks.1.attn1.to_v.bias"),
            "it lacks 'transformer_blocks.1.attn1.to_v.bias'",
        ),
        (
            lambda ours, theirs: without(theirs, "transformer_blocks.0.ff.net.2.bias"),
            "blocks.0.mlp.fc2.bias is missing",
        ),
        (lambda ours, theirs: {"ema": [1], "args": Namespace()}, "nor published weights"),
        (lambda ours, theirs: {"ema": ours, "args": [1]} | {"ema": 3}, "nor published weights"),
        (lambda ours, theirs: {3: torch.zeros(1)}, "nor published weights"),
        (lambda ours, theirs: ours | {"final_layer.linear.bias": torch.full((128,), torch.nan)}, "not finite"),
    ],
)
@pytest.mark.parametrize("published", [None, "sit", "diffusers"])
def test_weights_that_are_no_model_are_one_clear_error(published, content, message, ours, theirs, tmp_path):
    if published == "sit":
        message = message.replace("(768,); in a model of its sizes it is (128,)", "")
    assert_refused(write(content(ours.state_dict(), theirs.state_dict()), tmp_path), message, published=published)


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


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_an_exported_model_computes_the_same_in_diffusers(learn_sigma, theirs, tmp_path):
    sizes = SIZES | {"learn_sigma": learn_sigma}
    model = random_dit(**sizes)
    model.pos_embed.data = sincos_pos_embed(64, 2)
    save_file({"model": model.state_dict(), "config": model_config(Config(**sizes))}, tmp_path / "model.pth")
    export(tmp_path / "model.pth", tmp_path / "there" / "folder")
    network, info = type(theirs).from_pretrained(
        tmp_path / "there" / "folder", low_cpu_mem_usage=False, output_loading_info=True
    )
    assert not any(info.values())
    assert error_of(model, network, shift=0) <= 1e-5
    assert error_of(model, network, shift=1) > 1e-3  # as export's docstring says
    back, config = load_model(tmp_path / "there" / "folder")
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_of_a_runs_checkpoint_the_average_is_exported(tmp_path):
    state, config = random_dit(**SIZES).state_dict(), model_config(Config(**SIZES))
    raw = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    save_file({"model": raw, "ema": state, "config": config}, tmp_path / "checkpoint.pth")
    export(tmp_path / "checkpoint.pth", tmp_path / "folder")
    assert torch.equal(load_model(tmp_path / "folder")[0].x_embedder.proj.weight, state["x_embedder.proj.weight"])


def test_what_is_no_model_is_not_exported(tmp_path):
    sizes = dict(image_size=28, patch_size=4, hidden_size=32, depth=2, num_heads=2)
    config = model_config(Config(**sizes))
    state = random_dit(block="adaLN").state_dict()
    finite = random_dit().state_dict()
    for content in (
        {"model": state, "config": config},
        {"model": finite},
        {"model": finite, "config": config | {"num_heads": 0}},
        {"model": without(finite, "pos_embed"), "config": config},
        {"model": finite | {"pos_embed": torch.full((1, 49, 32), torch.inf)}, "config": config},
        [1],
    ):
        save_file(content, tmp_path / "a.pth")
        with pytest.raises(UserError, match="a.pth holds no DiT with adaLN-Zero blocks"):
            main([str(tmp_path / "a.pth"), str(tmp_path / "folder")])
        assert not (tmp_path / "folder").exists()


def test_the_command_exports_the_shipped_model(tmp_path):
    line = [sys.executable, "-m", "support.published", "model.pth", str(tmp_path / "folder")]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"config.json", f"{WEIGHTS}.safetensors"}
    ours, theirs = (load_model(path)[0] for path in (ROOT / "model.pth", tmp_path / "folder"))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
