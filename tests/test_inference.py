import time

import pytest
import torch
from conftest import ROOT, assert_one_line_error, random_dit, run
from PIL import Image

import inference
from config import PAPER_MODELS, Config
from dataset import denormalize
from dit import DiT
from evaluate import timed_draw
from inference import denoise, parse_labels
from support.autoencoder import decode, load_vae
from support.checkpoint import build_process, load_model, model_config
from support.errors import UserError
from support.files import save_file
from support.pictures import save_strip
from variants.learned_variance import LearnedVariance

np = pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A tiny model of random weights with 13 classes."""
    path = tmp_path_factory.mktemp("model") / "model.pth"
    sizes = dict(image_size=8, patch_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=13)
    config = Config(**sizes, in_channels=1, sampler="ddim", sample_steps=6, cfg_scale=2.0, cfg_low=0.0, cfg_high=1.0)
    save_file({"model": random_dit(**sizes).state_dict(), "config": model_config(config)}, path)
    return path


def infer(model_file, *flags) -> None:
    inference.main(["--checkpoint", str(model_file), "--device", "cpu", *map(str, flags)])


@pytest.fixture(scope="module")
def published_file(tmp_path_factory):
    """A DiT-S/8 of random weights for latents of 16 x 16 x 4, as the paper's authors publish theirs."""
    path = tmp_path_factory.mktemp("published") / "DiT-S-8-128x128.pt"
    sizes = dict(image_size=16, in_channels=4, num_classes=1000, learn_sigma=True)
    torch.save(random_dit(**sizes, **PAPER_MODELS["DiT-S/8"]).state_dict(), path)
    return path


def test_strip(model_file, tmp_path, capsys):
    infer(model_file, "--output", tmp_path / "strip.png", "--labels", "0,12,3")
    assert Image.open(tmp_path / "strip.png").size[0] > 300
    assert "3 images by ddim, 6 steps, guidance 2.0: 12 network evaluations an image" in capsys.readouterr().out


def test_gif_shows_the_way_to_the_digits(model_file, tmp_path):
    infer(model_file, "--gif", tmp_path / "a.gif", "--sampler", "ddpm", "--sample-steps", 5)
    gif = Image.open(tmp_path / "a.gif")
    assert gif.n_frames == 6
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_npz_is_as_the_adm_suite_has_it(model_file, tmp_path):
    infer(model_file, "--num-samples", 7, "--npz", tmp_path / "s.npz", "--labels", "1,12")
    arrays = np.load(tmp_path / "s.npz")
    assert arrays["arr_0"].shape == (7, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [1, 12, 1, 12, 1, 12, 1] and arrays["arr_1"].dtype == np.int64


def test_grid(model_file, tmp_path):
    infer(model_file, "--num-samples", 9, "--output", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (28, 28)  # 3 x 3 images of 8 pixels and their borders


def test_the_seed_decides(model_file, tmp_path):
    def pixels(name, *flags):
        infer(model_file, "--num-samples", 4, "--npz", tmp_path / name, "--cfg-scale", 1, *flags)
        return np.load(tmp_path / name)["arr_0"]

    assert (pixels("a.npz", "--seed", 5) == pixels("b.npz", "--seed", 5)).all()
    assert (pixels("a.npz", "--seed", 5) != pixels("b.npz", "--seed", 6)).any()


def test_samples_are_those_of_the_process(model_file, tmp_path):
    infer(model_file, "--num-samples", 3, "--npz", tmp_path / "s.npz", "--labels", "4,5,6", "--seed", 9)
    model, config = load_model(model_file)
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(3, 1, 8, 8, generator=generator)
    *_, x = build_process(config).sample(model, noise, torch.tensor([4, 5, 6]), steps=6, cfg_scale=2.0)
    assert (np.load(tmp_path / "s.npz")["arr_0"] == denormalize(x).permute(0, 2, 3, 1).numpy()).all()


def test_published_weights_sample_as_the_paper_does(published_file, vae_dir, tmp_path, capsys):
    flags = ["--labels", "207,360", "--vae", vae_dir, "--seed", 9, "--num-samples", 2, "--sample-steps", 5]
    infer(published_file, *flags, "--npz", tmp_path / "s.npz")
    assert "by ddpm, 5 steps, guidance 4.0: 10 network" in capsys.readouterr().out
    model, config = load_model(published_file)
    process, generator = LearnedVariance("linear", "noise", clip_x0=False), torch.Generator().manual_seed(9)
    noise, y = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([207, 360])
    options = dict(steps=5, sampler="ddpm", cfg_scale=4.0, generator=generator)
    *_, x = process.sample(model, noise, y, **options)
    images = denormalize(decode(load_vae(str(vae_dir), config), x)).permute(0, 2, 3, 1)
    assert images.shape == (2, 32, 32, 3) and images.float().std() > 1
    assert (np.load(tmp_path / "s.npz")["arr_0"] == images.numpy()).all()


def test_latents_are_shown_decoded(published_file, vae_dir, tmp_path):
    flags = ["--labels", "1,2,3,4", "--vae", vae_dir, "--sample-steps", 3]
    infer(published_file, *flags, "--output", tmp_path / "strip.png", "--gif", tmp_path / "a.gif")
    infer(published_file, *flags, "--output", tmp_path / "grid.png", "--num-samples", 4)
    assert Image.open(tmp_path / "grid.png").size == (67, 67)  # 2 x 2 images of 32 pixels and their borders
    gif = Image.open(tmp_path / "a.gif")
    assert gif.n_frames == 4 and gif.size == (3 * 133, 3 * 34)
    assert Image.open(tmp_path / "strip.png").size[0] > 200


def test_the_strip_of_large_images_is_large(tmp_path):
    save_strip(dict(enumerate([torch.zeros(1, 3, 256, 256)] * 4)), [207], tmp_path / "strip.png")
    assert Image.open(tmp_path / "strip.png").width >= 4 * 256


def test_latents_are_not_shown_without_a_vae(published_file):
    with pytest.raises(UserError, match="draws latents of 4 channels; pip install diffusers.* add --vae"):
        infer(published_file)


def test_labels_beyond_the_published_classes_are_refused(published_file, vae_dir):
    with pytest.raises(UserError, match="label 1000 is not one of the model's 1000 classes, 0 to 999"):
        infer(published_file, "--vae", vae_dir, "--labels", "207,1000")


@pytest.mark.parametrize("limit", [("BATCH_SIZE", 3), ("MOST_TOKENS", 12)])  # of the model's 4 tokens an image
def test_many_are_drawn_in_batches(limit, model_file, monkeypatch):
    model, config = load_model(model_file)
    y, generator = torch.arange(7), torch.Generator().manual_seed(1)
    monkeypatch.setattr(inference, *limit)
    images = inference.draw_images(model, config, y, torch.Generator().manual_seed(1))
    parts = [list(denoise(model, config, part, generator))[-1] for part in y.split(3)]
    assert torch.equal(images, torch.cat(parts))


def test_labels_are_parsed():
    assert parse_labels("0123", 10) == [0, 1, 2, 3]
    assert parse_labels("207,360", 1000) == [207, 360] and parse_labels("207,", 1000) == [207]
    for text in ("", "a", "1,,2", "1.5,2"):
        with pytest.raises(UserError, match="labels"):
            parse_labels(text, 10)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--labels", "0,13"], "label 13 is not one of the model's 13 classes, 0 to 12"),
        (["--labels=-1,3"], "label -1 is not one of"),
        (["--labels", "x"], "labels 'x'"),
        (["--sample-steps", "0"], "sample_steps is 0"),
        (["--sample-steps", "1001"], "sample_steps is 1001"),
        (["--sampler", "heun"], "'heun' is not one of process diffusion's: ddpm, ddim, dpm++"),
        (["--sampler", "ddpm", "--eta", "1"], "eta 1.0 is an option of sampler ddim"),
        (["--cfg-scale", "nan"], "cfg_scale is nan"),
        (["--cfg-low", "0.9", "--cfg-high", "0.5"], "cfg_low is 0.9; it must be less than cfg_high, 0.5"),
        (["--cfg-high", "1.5"], "cfg_high is 1.5; it must be at most 1"),
        (["--num-samples", "-3"], "num_samples is -3; it must be at least 1"),
        (["--npz", "s.npz"], "--npz needs --num-samples"),
        (["--num-samples", "3", "--gif", "a.gif"], "leave out --num-samples"),
        (["--vae", "folder"], "the checkpoint draws pixels; leave it out"),
        (["--output", "strip.tiff"], "must end in .png"),
        (["--output", "/no/such/folder/strip.png"], "its folder does not exist"),
        (["--labels", "1," * 101], "101 labels are too many for one picture"),
        (["--seed", "99999999999999999999"], "seed is 99999999999999999999"),
    ],
)
def test_bad_flags_are_refused(flags, message, model_file):
    with pytest.raises(UserError) as error:
        infer(model_file, *flags)
    assert message in str(error.value)


def test_the_command_line_fails_in_one_line(model_file, tmp_path):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(model_file.read_bytes()[:1000])
    assert_one_line_error(run("inference.py", "--checkpoint", broken), str(broken), "damaged")
    assert_one_line_error(run("inference.py", "--checkpoint", model_file, "--seed", "x"), "--seed")


def test_the_shipped_weights_draw_the_strip_in_time(tmp_path):
    start = time.perf_counter()
    result = run("inference.py", "--output", tmp_path / "strip.png")
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < 15
    assert "Traceback" not in result.stderr
    assert Image.open(tmp_path / "strip.png").size[0] > 500


def share_read_as_asked(read_digits, count, **changes) -> float:
    """Of `count` samples of the shipped weights, the share that the nearest training digit reads as asked for."""
    model, config = load_model(ROOT / "model.pth")
    y, generator = torch.arange(count) % 10, torch.Generator().manual_seed(0)
    images = inference.draw_images(model, config.replace(**changes), y, generator)
    return (read_digits(images) == y).float().mean().item()


def test_the_shipped_weights_draw_the_digits_asked_for(read_digits):
    assert share_read_as_asked(read_digits, 200) >= 0.85


@pytest.mark.long
def test_the_shipped_weights_draw_a_thousand_digits_asked_for(read_digits):
    guided, plain = share_read_as_asked(read_digits, 1000), share_read_as_asked(read_digits, 1000, cfg_scale=1.0)
    print(f"of 1000 samples read as asked for: {guided:.1%}, without guidance {plain:.1%}")
    assert guided >= 0.85


@pytest.mark.parametrize(
    "flags", [["--labels", "3,4"], ["--num-samples", 4], ["--num-samples", 4, "--npz", "a.npz"], ["--gif", "a.gif"]]
)
def test_images_that_are_not_finite_are_an_error_and_replace_nothing(flags, model_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, y: x * float("nan"))
    flags = [*flags, "--output", "a.png"]
    names = ("a.png", "a.gif", "a.npz")
    for name in names:
        (tmp_path / name).write_text("good")
    with pytest.raises(UserError, match="not finite numbers; the weights are damaged or have diverged"):
        infer(model_file, *flags)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "good")


def test_drawings_to_be_judged_are_finite_too(model_file, monkeypatch):
    model, config = load_model(model_file)
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, y: x * float("nan"))
    with pytest.raises(UserError, match="not finite numbers"):
        timed_draw(model, config, torch.zeros(2, dtype=torch.int64), seed=0)
