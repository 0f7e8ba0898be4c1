import csv
import math
import signal
import subprocess
import sys

import pytest
import torch
from conftest import CAPTIONS, OF_LABELS, ROOT, WORDS, assert_one_line_error, load_corners, random_dit, run

import dataset
import train
from config import Config, preset
from diffusion import Diffusion
from dit import DiT
from inference import denoise
from support import machine, run_state
from support.captions import parse_caption
from support.checkpoint import BLOCKS, load_model
from support.errors import UserError
from support.files import load_file
from train import build_optimizers, draw_batch, ema_decay_at, learning_rate_at, update_ema

TINY = ["--dataset", "blobs", "--patch-size", 4, "--hidden-size", 32, "--depth", 1, "--num-heads", 2, "--batch-size", 8]
TINY += ["--log-every", 5, "--warmup-steps", 5, "--sample-steps", 3, "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def blobs(monkeypatch):
    """A data set of four images: a white square in one corner, the label saying which; and one of captions that do."""
    monkeypatch.setitem(dataset.DATASETS, "blobs", lambda *_: (load_corners(*_)[0], torch.arange(4)))
    monkeypatch.setitem(dataset.DATASETS, "corners", load_corners)


def fit(out_dir, *flags):
    train.main([*map(str, TINY), "--out-dir", str(out_dir), *map(str, flags)])


def rows(out_dir):
    with open(out_dir / "loss.csv") as file:
        return list(csv.DictReader(file))


def without_time(out_dir):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(out_dir)]


def assert_same(a, b):
    """Equal to the last bit, through all containers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_tiny_run_overfits_a_handful_of_images(tmp_path):
    fit(tmp_path, "--train-steps", 400, "--learning-rate", 5e-3, "--batch-size", 32, "--ema-decay", 0.98)
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert sum(losses[-5:]) / 5 < 0.2 * losses[0]  # a tenth of the labels is dropped: those cannot be told in noise
    model, config = load_model(tmp_path / "model.pth")
    config = config.replace(sample_steps=20, cfg_scale=1.0)
    *_, x = denoise(model, config, torch.arange(40) % 4, torch.Generator().manual_seed(0))
    originals = dataset.normalize(dataset.load_dataset("blobs", "").images)
    distance = (x[:, None] - originals).abs().mean(dim=(2, 3, 4))  # of each sample to each original
    assert distance.amin(1).mean() < 0.1
    assert distance.argmin(1).unique().tolist() == [0, 1, 2, 3]


def test_a_run_leaves_what_it_says(tmp_path, capsys):
    fit(tmp_path, "--train-steps", 60, "--checkpoint-every", 30, "--sample-every", 20)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    samples = [f"samples/step_{step:07d}.png" for step in (20, 40, 60)]
    assert names == ["checkpoint.pth", "loss.csv", "loss.png", "model.pth", *samples]
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(5, 65, 5))
    assert list(rows(tmp_path)[0]) == ["step", "loss", "learning_rate", "images_per_second"]
    assert float(rows(tmp_path)[-1]["images_per_second"]) > 0
    printed = capsys.readouterr()
    for word in ("cpu", "fp32", "blobs", "parameters", "60", str(tmp_path), "minutes to go"):
        assert word in printed.out + printed.err
    model, config = load_model(tmp_path / "model.pth")
    assert (config.num_classes, config.image_size, config.dataset) == (4, 8, "blobs")
    assert_same(dict(model.state_dict()), dict(load_file(tmp_path / "checkpoint.pth")["ema"]))


def test_the_same_seed_gives_the_same_weights(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        fit(tmp_path / name, "--train-steps", 12, "--seed", seed)
    a, b, c = (load_file(tmp_path / name / "checkpoint.pth") for name in "abc")
    assert_same(a["model"], b["model"])
    assert not torch.equal(a["model"]["final_layer.linear.weight"], c["model"]["final_layer.linear.weight"])


def test_ema_equals_its_closed_form():
    torch.manual_seed(0)
    model, ema, decay = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2), 0.9
    start, history = ema.weight.detach().clone(), []
    for _ in range(10):
        model.weight.data.normal_()
        history.append(model.weight.detach().clone())
        update_ema(ema, model, decay)
    closed = decay**10 * start + sum((1 - decay) * decay ** (9 - i) * w for i, w in enumerate(history))
    assert torch.allclose(ema.weight, closed, atol=1e-6)
    config = Config(ema_decay=0.99)
    assert ema_decay_at(0, config) == 0.1 and ema_decay_at(10_000, config) == 0.99


def test_the_average_in_one_call_is_that_of_a_call_for_each_parameter_to_the_last_bit():
    model, ema = random_dit(seed=1), random_dit(seed=2)
    ema.pos_embed.data.copy_(model.pos_embed)  # which is not trained
    for decay in (0.1, 2 / 11, 0.5, 0.999, 0.9999):
        pairs = zip(ema.parameters(), model.parameters())
        expected = [a.lerp(b, 1 - decay).detach() if b.requires_grad else a.detach().clone() for a, b in pairs]
        update_ema(ema, model, decay)
        assert_same(expected, [parameter.detach() for parameter in ema.parameters()])


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = DiT(8, 4, hidden_size=32, depth=2, num_heads=2)
    (adamw,) = build_optimizers(model, Config(optimizer="adamw"))
    assert len(adamw.param_groups[0]["params"]) == sum(p.requires_grad for p in model.parameters())
    adamw, muon = build_optimizers(model, Config(optimizer="muon"))
    names = {p: name for name, p in model.named_parameters()}
    blocks = {names[p].split(".", 2)[2] for p in muon.param_groups[0]["params"]}
    assert blocks == {f"{m}.weight" for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")}
    rest = {names[p] for p in adamw.param_groups[0]["params"]}
    assert len(rest) + len(muon.param_groups[0]["params"]) == sum(p.requires_grad for p in model.parameters())
    assert {"final_layer.linear.weight", "x_embedder.proj.weight", "blocks.0.attn.qkv.bias"} <= rest


def test_learning_rate_warms_up_and_decays():
    config = Config(train_steps=1000, warmup_steps=100, learning_rate=0.01)
    rates = [learning_rate_at(step, config) for step in range(1000)]
    assert 0 < rates[0] < 2e-4 and rates[:100] == sorted(rates[:100])
    assert max(rates) < 0.01 and rates[100:] == sorted(rates[100:], reverse=True) and rates[-1] < 1e-7
    assert learning_rate_at(900, config.replace(lr_decay="constant")) == 0.01


def test_batches_are_of_the_data_with_some_labels_dropped():
    data = dataset.load_dataset("blobs", "")
    config = Config(num_classes=4, batch_size=5000, label_dropout=0.2)
    ((x0, y, t, noise),) = draw_batch(data, Diffusion(), config, step=0)
    assert x0.shape == (5000, 1, 8, 8) and x0.min() == -1 and x0.max() == 1
    assert abs((y == 4).float().mean() - 0.2) < 0.02
    kept = y < 4
    assert torch.equal(x0[kept], dataset.normalize(data.images)[y[kept]])
    assert (y.bincount() > 900).all()


def test_half_of_the_images_are_mirrored_and_nothing_else_changes():
    data = dataset.load_dataset("blobs", "")
    config = Config(num_classes=4, batch_size=1000, label_dropout=0.0)
    ((plain, labels, *_),) = draw_batch(data, Diffusion(), config, step=0)
    ((x0, y, *_),) = draw_batch(data, Diffusion(), config.replace(flip=True), step=0)
    mirrored = (x0 != plain).flatten(1).any(1)
    assert torch.equal(y, labels) and abs(mirrored.float().mean() - 0.5) < 0.05
    assert torch.equal(x0[mirrored], plain[mirrored].flip(-1))


def test_parts_of_a_batch_are_the_batch_and_every_step_has_its_own():
    data, process = dataset.load_dataset("blobs", ""), Diffusion()
    config = Config(num_classes=4, batch_size=12)
    (whole,) = draw_batch(data, process, config, step=5)
    parts = draw_batch(data, process, config.replace(accumulation_steps=3), step=5)
    assert len(parts) == 3
    assert_same(list(whole), [torch.cat(tensors) for tensors in zip(*parts)])
    for other in (draw_batch(data, process, config, step=6), draw_batch(data, process, config.replace(seed=1), step=5)):
        assert not torch.equal(whole[3], other[0][3])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_ends_with_the_same_bits(optimizer, tmp_path, monkeypatch):
    flags = ["--train-steps", 40, "--checkpoint-every", 7, "--sample-every", 10, "--optimizer", optimizer]
    fit(tmp_path / "whole", *flags)
    saved = []

    def save_and_die(content, path):
        save(content, path)
        saved.append(path)
        if len(saved) == 7:  # step 21, in the middle of a row; its model.pth is not written
            raise KeyboardInterrupt

    save = run_state.save_file
    monkeypatch.setattr(run_state, "save_file", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", *flags)
    assert load_file(tmp_path / "cut" / "checkpoint.pth")["progress"][0] == 21
    train.main(["--resume", "--out-dir", str(tmp_path / "cut")])
    whole, cut = (load_file(tmp_path / name / "checkpoint.pth") for name in ("whole", "cut"))
    for key in ("model", "ema", "optimizers"):
        assert_same(whole[key], cut[key])
    assert without_time(tmp_path / "whole") == without_time(tmp_path / "cut")
    assert (tmp_path / "whole" / "model.pth").read_bytes() == (tmp_path / "cut" / "model.pth").read_bytes()


def test_resume_has_its_rules(tmp_path):
    fit(tmp_path, "--train-steps", 10)
    with pytest.raises(UserError, match="--resume, or give another --out-dir"):
        fit(tmp_path, "--train-steps", 10)
    resume = ["--resume", "--out-dir", str(tmp_path)]
    for flag, value in (("--depth", "2"), ("--learning-rate", "0.1"), ("--train-steps", "20"), ("--seed", "5")):
        with pytest.raises(UserError, match=f"{flag} {value} differs from the run's"):
            train.main([*resume, flag, value])
    train.main([*resume, "--depth", "1", "--sample-every", "3", "--dataset", "auto", "--data-dir", "elsewhere"])
    with pytest.raises(UserError, match="nothing to resume"):
        train.main(["--resume", "--out-dir", str(tmp_path / "nowhere")])
    (tmp_path / "checkpoint.pth").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        train.main(resume)


def test_a_finished_run_writes_what_is_missing(tmp_path):
    fit(tmp_path, "--train-steps", 10)
    before = {name: (tmp_path / name).read_bytes() for name in ("model.pth", "loss.csv", "samples/step_0000010.png")}
    for name in (*before, "loss.png"):
        (tmp_path / name).unlink()
    train.main(["--resume", "--out-dir", str(tmp_path)])
    assert (tmp_path / "loss.png").exists()
    for name, content in before.items():
        assert (tmp_path / name).read_bytes() == content


def test_a_constant_learning_rate_allows_more_steps(tmp_path):
    fit(tmp_path / "a", "--train-steps", 10, "--lr-decay", "constant")
    fit(tmp_path / "b", "--train-steps", 20, "--lr-decay", "constant")
    train.main(["--resume", "--out-dir", str(tmp_path / "a"), "--train-steps", "20"])
    a, b = (load_file(tmp_path / name / "checkpoint.pth") for name in "ab")
    assert_same(a["model"], b["model"])


@pytest.mark.parametrize("process", ["diffusion", "flow_matching"])
@pytest.mark.parametrize("flags", [["--accumulation-steps", 4], ["--activation-checkpointing"]])
def test_saving_memory_changes_loss_and_weights_by_rounding_alone(flags, process, tmp_path):
    common = ["--train-steps", 10, "--process", process, "--log-every", 1]
    common += ["--sampler", "euler"] if process == "flow_matching" else []
    fit(tmp_path / "plain", *common)
    fit(tmp_path / "saving", *common, *flags)
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "saving"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
    plain, saving = (load_model(tmp_path / name / "model.pth")[0] for name in ("plain", "saving"))
    for a, b in zip(plain.parameters(), saving.parameters()):
        assert (a - b).norm() <= 1e-3 * a.norm() + 1e-7  # Adam divides gradients near 0 by themselves


def test_accumulation_hands_the_network_parts_of_the_batch(tmp_path, monkeypatch):
    sizes = []
    forward = DiT.forward

    def spy(self, x, t, y):
        if self.training:
            sizes.append(len(x))
        return forward(self, x, t, y)

    monkeypatch.setattr(DiT, "forward", spy)
    fit(tmp_path, "--train-steps", 3, "--accumulation-steps", 4)
    assert sizes == [2] * 12


def test_sample_grids_take_at_most_50_steps(tmp_path, monkeypatch):
    calls = []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, *batch: calls.append(self.training) or forward(self, *batch))
    fit(tmp_path, "--train-steps", 1, "--sampler", "ddpm", "--sample-steps", 200, "--cfg-scale", 1)
    assert calls.count(False) == 50


@pytest.mark.parametrize("block", OF_LABELS)
def test_every_block_trains_with_a_learned_variance_and_samples(block, tmp_path):
    fit(tmp_path, "--train-steps", 30, "--learn-sigma", "--block", block, "--lr-decay", "constant", "--sampler", "ddpm")
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert losses[-1] < losses[0]
    model, config = load_model(tmp_path / "model.pth")
    assert config.learn_sigma and config.block == block and model.block is BLOCKS[block]
    *_, x = denoise(model, config, torch.arange(4), torch.Generator().manual_seed(0))
    assert x.shape == (4, 1, 8, 8)


def test_a_preset_of_the_papers_trains_on_padded_digits(tmp_path):
    settings = dict(dataset="blobs", train_steps=1, batch_size=2, sample_steps=1, out_dir=str(tmp_path))
    train.train(preset("DiT-S/8", **settings))
    model, config = load_model(tmp_path / "model.pth")
    assert (model.image_size, len(model.blocks), config.ema_decay) == (32, 12, 0.9999)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"at step \d+; .*checkpoint.pth is from before") as error:
        fit(tmp_path, "--train-steps", 50, "--learning-rate", 1e30, "--grad-clip", 1e30, "--checkpoint-every", 1)
    step = int(str(error.value).split("at step ")[1].split(";")[0])
    state = load_file(tmp_path / "checkpoint.pth")
    assert state["progress"][0] < step
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_grid_that_is_not_finite_stops_the_run_after_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "denoise", lambda *_: iter([torch.full((32, 1, 8, 8), math.nan)]))
    with pytest.raises(UserError, match="the images have pixels that are not finite numbers"):
        fit(tmp_path, "--train-steps", 50, "--checkpoint-every", 4, "--sample-every", 4)
    state = load_file(tmp_path / "checkpoint.pth")
    assert state["progress"][0] == 4 and not list((tmp_path / "samples").iterdir())
    monkeypatch.undo()
    assert load_model(tmp_path / "model.pth")[1].train_steps == 50


def test_bad_flags_are_refused_before_anything_is_written(tmp_path):
    out = ["--out-dir", str(tmp_path / "run")]
    for flags, message in (
        (["--image-size", "28", "--patch-size", "3"], "not divisible"),
        (["--learning-rate", "nan"], "nan"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--train-steps", "-1"], "train_steps is -1"),
        (["--dataset", "cifar"], "auto, mnist, fashion, kmnist, glyphs"),
        (["--dataset", "blobs", "--patch-size", "3"], "image_size 8 is not divisible by patch_size 3"),
        (["--dataset", "blobs", "--image-size", "4", "--patch-size", "4"], "smaller than"),
    ):
        with pytest.raises(UserError, match=message):
            train.main([*out, *flags])
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        train.main([*map(str, TINY), "--out-dir", str(tmp_path / "file" / "run")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path):
    result = run("train.py", "--device", "cuda", "--out-dir", tmp_path / "run")
    assert_one_line_error(result, "device 'cuda' is not there", "--device cpu")


def test_sigterm_saves_and_says_how_to_go_on(tmp_path, glyphs_dir):
    command = [sys.executable, "train.py", "--dataset", "glyphs", "--data-dir", glyphs_dir, "--out-dir", tmp_path]
    command += ["--hidden-size", "32", "--depth", "1", "--train-steps", "100000", "--log-every", "2"]
    command += ["--compile", "off"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "loss.csv").exists() or len((tmp_path / "loss.csv").read_text().splitlines()) < 3:
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    step = load_file(tmp_path / "checkpoint.pth")["progress"][0]
    assert step >= 4
    assert f"stopped at step {step:,}; to go on: python train.py --resume --out-dir {tmp_path}" in out
    assert "Traceback" not in err


def test_bf16_trains_to_nearly_the_same_loss(tmp_path):
    for precision in ("fp32", "bf16"):
        fit(tmp_path / precision, "--train-steps", 20, "--precision", precision)
    a, b = (float(rows(tmp_path / name)[-1]["loss"]) for name in ("fp32", "bf16"))
    assert a != b and math.isclose(a, b, rel_tol=0.05)


def test_a_compiled_run_is_repeatable_and_learns_what_an_eager_one_does(tmp_path, capsys):
    for name, compile in (("on", "on"), ("again", "on"), ("off", "off")):
        fit(tmp_path / name, "--train-steps", 40, "--batch-size", 256, "--compile", compile)
    if "compiling failed" in capsys.readouterr().out:
        pytest.skip("torch.compile finds no working compiler on this machine")
    assert (tmp_path / "on" / "model.pth").read_bytes() == (tmp_path / "again" / "model.pth").read_bytes()
    a, b = (float(rows(tmp_path / name)[-1]["loss"]) for name in ("on", "off"))
    assert math.isclose(a, b, rel_tol=1e-3)


def test_where_no_compiler_works_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def broken(model):
        def network(*_):
            raise RuntimeError("no C++ compiler")

        return network

    monkeypatch.setattr(machine.torch, "compile", broken)
    fit(tmp_path / "on", "--train-steps", 10, "--compile", "on")
    assert "compiling failed (RuntimeError)" in capsys.readouterr().out
    fit(tmp_path / "off", "--train-steps", 10, "--compile", "off")
    a, b = (load_file(tmp_path / name / "checkpoint.pth") for name in ("on", "off"))
    assert_same(a["model"], b["model"])


def test_the_classic_preset_trains(tmp_path):
    settings = dict(dataset="blobs", train_steps=3, batch_size=4, sample_steps=2, out_dir=str(tmp_path))
    assert train.train(preset("classic", **settings)) == tmp_path
    assert load_model(tmp_path / "model.pth")[1].loss == "l1"


def test_a_folder_in_which_another_run_ended_meanwhile_is_refused(tmp_path, monkeypatch):
    """Between the first look at the folder and the lock lie data and networks: seconds in which much can happen."""

    def build_slowly(config):
        (tmp_path / "model.pth").write_bytes(b"of another run")
        return build(config)

    build = train.build_model
    monkeypatch.setattr(train, "build_model", build_slowly)
    with pytest.raises(UserError, match="model.pth is there already"):
        fit(tmp_path, "--train-steps", 1)
    assert (tmp_path / "model.pth").read_bytes() == b"of another run"
    assert not (tmp_path / "checkpoint.pth").exists()


def test_unlabelled_images_train_whatever_the_share_of_dropped_labels(tmp_path, monkeypatch):
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    monkeypatch.setitem(dataset.DATASETS, "blobs", lambda data_dir, train: (images, None))
    fit(tmp_path, "--train-steps", 2, "--label-dropout", 0)
    assert load_model(tmp_path / "model.pth")[1].cfg_scale == 1


def test_dropped_captions_are_the_null_caption_as_dropped_labels_are_the_null_class():
    labels, captions = dataset.load_dataset("blobs", ""), dataset.load_dataset("corners", "")
    config = Config(num_classes=6, batch_size=500, label_dropout=0.3, accumulation_steps=2)
    for of_labels, of_captions in zip(*(draw_batch(data, Diffusion(), config, 7) for data in (labels, captions))):
        (x0, y, *drawn), (x0_too, words, *drawn_too) = of_labels, of_captions
        assert_same([x0, *drawn], [x0_too, *drawn_too])
        table = torch.cat([captions.labels, torch.full((3, 3), 6)])  # label 6 is the null class
        assert torch.equal(words, table[y]) and (y == 6).any() and words.dtype == torch.int64


def read_corners(path, captions):
    """The corners, 0 to 3, that a run's model draws for ten of each of these captions."""
    model, config = load_model(path / "model.pth")
    y = torch.tensor([parse_caption(caption, config.class_names, config.caption_length) for caption in captions])
    config = config.replace(sample_steps=20, cfg_scale=1.0)
    *_, x = denoise(model, config, y.repeat_interleave(10, dim=0), torch.Generator().manual_seed(0))
    corners = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((1, 4, 5)).flatten(1)  # (N, 4)
    return corners.argmax(1).view(-1, 10)


@pytest.mark.parametrize("block", ["adaLN-Zero", "cross-attention", "joint-attention"])
def test_captions_are_learnt_in_each_of_three_ways(block, tmp_path, capsys):
    flags = ["--dataset", "corners", "--block", block, "--train-steps", 200, "--learning-rate", 5e-3]
    fit(tmp_path, *flags, "--batch-size", 32, "--ema-decay", 0.98, "--time-mean", 2.5)  # at much noise captions matter
    assert "4 images of (1, 8, 8), captions, of 5 different words" in capsys.readouterr().out
    config = load_model(tmp_path / "model.pth")[1]
    assert (config.num_classes, config.caption_length, config.class_names) == (6, 3, tuple(WORDS))
    assert config.captions == tuple(CAPTIONS)
    asked = [*CAPTIONS, "", "right the bottom"]
    *drawn, anything, shuffled = read_corners(tmp_path, asked)
    assert [(corner == i).float().mean() >= 0.9 for i, corner in enumerate(drawn)] == [True] * 4
    assert len(anything.unique()) > 1
    if block == "adaLN-Zero":  # a bag of words
        assert ((shuffled == 3).float().mean()) >= 0.9


def test_a_grid_of_samples_shows_the_first_captions_of_the_data(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "save_png", lambda images, path, columns, labels: seen.append((len(images), labels)))
    fit(tmp_path, "--dataset", "corners", "--train-steps", 1)
    assert seen == [(32, [caption for caption in CAPTIONS for _ in range(8)])]


@pytest.mark.parametrize("block", ["adaLN-Zero", "joint-attention"])
def test_a_resumed_run_of_captions_ends_with_the_same_bits(block, tmp_path):
    flags = ["--dataset", "corners", "--block", block, "--lr-decay", "constant"]
    fit(tmp_path / "a", *flags, "--train-steps", 6)
    fit(tmp_path / "b", *flags, "--train-steps", 12)
    train.main(["--resume", "--out-dir", str(tmp_path / "a"), "--train-steps", "12"])
    a, b = (load_file(tmp_path / name / "checkpoint.pth") for name in "ab")
    assert_same(a["model"], b["model"])
    assert (tmp_path / "a" / "model.pth").read_bytes() == (tmp_path / "b" / "model.pth").read_bytes()


def test_captions_train_in_every_way_that_a_machine_asks_for(tmp_path):
    common = ["--dataset", "corners", "--block", "joint-attention", "--train-steps", 15, "--log-every", 5]
    ways = {
        "plain": [],
        "parts": ["--accumulation-steps", 4],
        "again": ["--activation-checkpointing"],
        "bf16": ["--precision", "bf16"],
        "compiled": ["--compile", "on"],
    }
    for name, flags in ways.items():
        fit(tmp_path / name, *common, *flags)
    for name in ways:
        for ours, plain in zip(rows(tmp_path / name), rows(tmp_path / "plain"), strict=True):
            assert float(ours["loss"]) == pytest.approx(float(plain["loss"]), rel=0.05 if name == "bf16" else 1e-3)


def test_labels_for_a_block_of_captions_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="block joint-attention is for captions, such as those of --dataset scenes"):
        fit(tmp_path / "run", "--block", "joint-attention", "--train-steps", 1)
    assert not (tmp_path / "run").exists()
