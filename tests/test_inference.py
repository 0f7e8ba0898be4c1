import weakref

import pytest
import torch
from conftest import CAPTIONS, ROOT, WORDS, assert_one_line_error, random_dit, run
from PIL import Image

import inference
from config import PAPER_MODELS, Config
from dataset import denormalize
from dit import DiT
from inference import denoise
from support.autoencoder import decode, load_vae
from support.checkpoint import build_process, load_model, model_config
from support.command_line import parse_labels
from support.errors import UserError
from support.files import save_file
from support.pictures import frames_shown, save_png, save_strip
from variants.captions import TextEmbedder
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


def test_labels_are_digits_of_at_most_ten_classes_and_numbers_of_more():
    assert parse_labels("0123", 10) == [0, 1, 2, 3] and parse_labels("3,1,", 10) == [3, 1]
    assert parse_labels("207", 1000) == [207] and parse_labels("10", 11) == [10]
    assert parse_labels("207,360", 1000) == [207, 360] and parse_labels("207,", 1000) == [207]
    for text, num_classes in (("", 10), ("a", 10), ("1,,2", 10), ("1.5,2", 10), ("", 1000), ("207 360", 1000)):
        with pytest.raises(UserError, match="labels"):
            parse_labels(text, num_classes)


def test_without_labels_all_classes_are_drawn_in_turn_and_ten_in_one_picture(model_file, tmp_path, capsys):
    infer(model_file, "--num-samples", 15, "--npz", tmp_path / "s.npz")
    assert np.load(tmp_path / "s.npz")["arr_1"].tolist() == [*range(13), 0, 1]
    infer(model_file, "--output", tmp_path / "strip.png")
    assert "10 images by ddim" in capsys.readouterr().out


def test_frames_are_evenly_spaced_but_for_the_gap_after_the_noise():
    for steps in (*range(1, 60), 100, 250, 997, 1000):
        for most in (3, 13, 50):
            frames = frames_shown(steps, most)
            assert frames[0] == 0 and frames[-1] == steps and 2 <= len(frames) <= most
            gaps = [b - a for a, b in zip(frames, frames[1:])]
            assert len(set(gaps[1:])) <= 1 and gaps[0] <= gaps[-1]
    assert frames_shown(1000, 13) == list(range(0, 1001, 100))
    assert frames_shown(12, 13) == list(range(13))


@pytest.mark.parametrize("flag, most", [("--output", 13), ("--gif", 50)])
def test_memory_holds_the_frames_that_are_shown_and_no_others(flag, most, model_file, tmp_path, monkeypatch):
    alive, peak = weakref.WeakSet(), [0]

    class Frame(torch.Tensor):  # a plain tensor's slots do not tell when it dies
        __hash__ = object.__hash__

    def way(model, config, y, generator):
        for _ in range(config.sample_steps + 1):
            frame = torch.zeros(len(y), 1, 8, 8).as_subclass(Frame)
            alive.add(frame)
            peak[0] = max(peak[0], len(alive))
            yield frame

    monkeypatch.setattr(inference, "denoise", way)
    suffix = {"--output": "png", "--gif": "gif"}[flag]
    infer(model_file, flag, tmp_path / f"a.{suffix}", "--sample-steps", 1000, "--labels", "0,1")
    assert peak[0] <= most + 1


@pytest.mark.parametrize("channels, tiles", [(1, 1), (2, 2), (3, 1), (5, 5)])
def test_images_of_any_number_of_channels_are_drawn(channels, tiles, tmp_path):
    x = torch.rand(4, channels, 8, 8) * 2 - 1
    save_png(x, tmp_path / "a.png", columns=2)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (2 * 9 + 1, 2 * tiles * 9 + 1, 3)
    first = denormalize(x[0]).numpy()
    assert (picture[1:9, 1:9] == (first.transpose(1, 2, 0) if channels == 3 else first[0][..., None])).all()
    assert (picture[0] == 64).all() and (picture[:, 9] == 64).all()


def test_without_a_label_guidance_of_0_is_the_null_class_all_the_way(model_file, tmp_path):
    def pixels(name, *flags):
        infer(model_file, "--num-samples", 3, "--npz", tmp_path / name, *flags)
        return np.load(tmp_path / name)["arr_0"]

    interval = ["--cfg-low", 0.4, "--cfg-high", 0.6]
    unconditional = pixels("a.npz", "--cfg-scale", 0, "--labels", "1,2,3", *interval)
    assert (unconditional == pixels("b.npz", "--cfg-scale", 0, "--labels", "4,5,6", *interval)).all()
    assert (unconditional != pixels("c.npz", "--cfg-scale", 1, "--labels", "1,2,3", *interval)).any()
    model, config = load_model(model_file)
    null = torch.full((3,), config.num_classes)
    x = inference.draw_images(model, config.replace(cfg_scale=1.0), null, torch.Generator().manual_seed(config.seed))
    assert (np.abs(unconditional.astype(int) - denormalize(x).permute(0, 2, 3, 1).numpy()) <= 1).all()


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
        (["--labels", "1," * 101], "101 rows are too many for one picture"),
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


def test_the_shipped_weights_draw_the_strip(tmp_path):
    result = run("inference.py", "--output", tmp_path / "strip.png")
    assert result.returncode == 0, result.stderr
    assert "10 images by dpm++, 8 steps, guidance 2.1 at noise 0.6 to 0.85: 10 network evaluations" in result.stdout
    assert "Traceback" not in result.stderr
    assert Image.open(tmp_path / "strip.png").size[0] > 500


def test_the_strip_and_the_animation_share_one_way_through_the_network(tmp_path, monkeypatch):
    """What makes the strip a matter of seconds: 10 evaluations an image, no more for a second picture of the same."""
    calls, forward = [], DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, y: calls.append(len(x)) or forward(self, x, t, y))
    infer(ROOT / "model.pth", "--output", tmp_path / "strip.png", "--gif", tmp_path / "a.gif")
    assert len(calls) == 8 and sum(calls) == 10 * 10


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


@pytest.fixture(scope="module")
def caption_file(tmp_path_factory):
    """A tiny model of random weights, of load_corners' captions."""
    path = tmp_path_factory.mktemp("captions") / "model.pth"
    sizes = dict(image_size=8, patch_size=4, hidden_size=32, depth=1, num_heads=2, block="cross-attention")
    config = Config(**sizes, num_classes=6, class_names=tuple(WORDS), caption_length=3, captions=tuple(CAPTIONS))
    y_embedder = TextEmbedder(6, 3, 32, 2)
    model = random_dit(**sizes, num_classes=6, y_embedder=y_embedder)
    save_file({"model": model.state_dict(), "config": model_config(config)}, path)
    return path


def test_prompts_are_drawn_in_turn(caption_file, tmp_path):
    prompts = ["--prompt", "top LEFT", "--prompt", "", "--prompt", "  the bottom right"]
    infer(caption_file, "--num-samples", 4, "--npz", tmp_path / "s.npz", "--seed", 3, *prompts)
    model, config = load_model(caption_file)
    y = torch.tensor([[2, 4, 0], [6, 6, 6], [1, 3, 5], [2, 4, 0]])
    images = inference.draw_images(model, config, y, torch.Generator().manual_seed(3))
    arrays = np.load(tmp_path / "s.npz")
    assert arrays["arr_1"].tolist() == y.tolist() and arrays["arr_1"].dtype == np.int64
    assert (arrays["arr_0"] == denormalize(images).permute(0, 2, 3, 1).numpy()).all()


def test_rows_are_named_by_their_captions(caption_file, tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr("support.outputs.save_strip", lambda frames, names, path: named.append((len(frames[0]), names)))
    monkeypatch.setattr("support.outputs.save_png", lambda images, path, columns, labels: named.append(labels))
    infer(caption_file, "--output", tmp_path / "a.png", "--prompt", "the top left", "--prompt", "")
    infer(caption_file, "--output", tmp_path / "a.png")  # those of its data that the config keeps
    infer(caption_file, "--output", tmp_path / "a.png", "--num-samples", 3, "--prompt", "left", "--prompt", "top")
    infer(caption_file, "--output", tmp_path / "a.png", *["--prompt", "top"] * 12)
    two, kept = (2, ["the top left", "anything"]), (4, CAPTIONS)
    assert named == [two, kept, ["left", "top", "left"], (12, ["top"] * 12)]
    infer(caption_file, "--png-dir", tmp_path / "new", "--num-samples", 2, "--prompt", "the top left")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["000000-the_top_left.png", "000001-the_top_left.png"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--labels", "0"], "--labels 0: this is a model of captions; give --prompt"),
        (["--prompt", "top", "--labels", "0"], "--labels 0: this is a model of captions"),
        (["--prompt", "the upper left"], "the word 'upper' of the caption 'the upper left' is not one of the, top,"),
        (["--prompt", "-"], "the word '-' of the caption '-' is not one of the, top, bottom, left, right"),
        (["--prompt", "the top left left"], "the caption 'the top left left' has 4 words; give at most 3"),
        (["--prompt=--"], "--"),
        (["--prompt", "top"] * 101, "101 rows are too many for one picture"),
    ],
)
def test_bad_prompts_are_refused(flags, message, caption_file):
    with pytest.raises(UserError) as error:
        infer(caption_file, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_for_a_model_of_labels_is_refused(model_file):
    for prompt in ("a three", ""):
        with pytest.raises(
            UserError, match=f"--prompt '{prompt}': this is a model of labels, not of captions; give --la"
        ):
            infer(model_file, "--prompt", prompt)
