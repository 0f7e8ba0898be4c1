"""Against closed forms, for data of one Gaussian: there the paths, and so the consistency function, are known."""

import inspect

import pytest
import torch
from conftest import ROOT, random_dit
from diffusers import LCMScheduler
from test_train import assert_same, blobs, fit, without_time  # noqa: F401  blobs is a fixture for each test

import dataset
import inference
import train
from config import preset
from diffusion import Diffusion, guided
from inference import denoise
from support.checkpoint import build_process, load_model, save_in_half
from support.errors import UserError
from support.files import load_file, save_file
from support.prepare import new_settings
from support.sampling import network_evaluations
from variants import consistency
from variants.consistency import ConsistencyModel

MEAN, DEVIATION = 0.3, 0.4  # of the data, all pixels alike


def spread(process, t):
    """Mean and deviation of x_t, each (B, 1, 1, 1)."""
    signal, noise = process.signal_and_noise(t)
    return signal * MEAN, ((signal * DEVIATION) ** 2 + noise**2).sqrt()


def along_the_path(process, x, t, r):
    """x_r for x_t: on the path of the flow without noise a point keeps its distance from the mean, in deviations."""
    (mean, deviation), (mean_r, deviation_r) = spread(process, t), spread(process, r)
    return mean_r + deviation_r * (x - mean) / deviation


class Teacher(torch.nn.Module):
    """The exact estimate of x_0, E[x_0 | x_t]."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.weight, self.process = torch.nn.Parameter(torch.ones(())), Diffusion("cosine")

    def forward(self, x, t, y):
        mean, deviation = spread(self.process, t)
        signal, _ = self.process.signal_and_noise(t)
        return MEAN + signal * DEVIATION**2 / deviation**2 * (x - mean)


class Student(torch.nn.Module):
    """The network whose consistency function is the exact one, but for a weight that may err."""

    num_classes = 10

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.process = ConsistencyModel(clip_x0=False)

    def forward(self, x, t, y):
        exact = along_the_path(self.process, x, t, torch.zeros_like(t))
        skip = self.process.consistency(torch.zeros_like(x), x, t)
        scale = self.process.consistency(torch.ones_like(x), torch.zeros_like(x), t)
        return self.weight * torch.where(t.view(-1, 1, 1, 1) > 0, (exact - skip) / scale, 0)


class Oracle(torch.nn.Module):
    """A stand-in network with an answer for every x, t and y."""

    num_classes = 10

    def forward(self, x, t, y):
        return torch.sin(x * 2 + t.view(-1, 1, 1, 1) / 300) + 0.1 * y.view(-1, 1, 1, 1)


def batch(count=64, seed=0):
    """x0 (B, 1, 4, 4) of the Gaussian, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return MEAN + DEVIATION * torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 10


def test_where_there_is_no_noise_nothing_is_changed_and_elsewhere_the_network_answers():
    process, t = ConsistencyModel(clip_x0=False), torch.arange(1000)
    x, output = torch.randn(2, 1000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    f = process.predict_x0(output, x, t)
    assert torch.equal(f[0], x[0]) and torch.equal(process.predict_x0(output, x, 0), x)
    change = (f - output).abs().amax((1, 2, 3))
    assert change[1] < 0.02 and change[5:].max() < 1e-3
    assert torch.equal(process.predict_x0(output[7:8], x[7:8], 7), f[7:8])
    clipped = ConsistencyModel().predict_x0(3 * output, x, t)
    assert clipped.min() == -1 and clipped.max() == 1


def test_r_nears_t_as_training_goes_on():
    process, x0 = ConsistencyModel(), torch.zeros(5000, 1, 1, 1)
    seen = []
    for progress in (0.0, 0.3, 0.4, 0.6, 0.7, 0.9999, 1.0):
        t, r, noise = process.draw_noise(x0, torch.Generator().manual_seed(0), progress)
        t_usual, noise_usual = Diffusion(time_sampling="uniform").draw_noise(x0, torch.Generator().manual_seed(0))
        assert torch.equal(t, t_usual) and torch.equal(noise, noise_usual)
        gap = (t - r)[r > 0].max().item()
        assert torch.equal(r, (t - gap) * (t - gap >= consistency.ANCHOR))
        seen.append(gap)
    assert seen == [400, 200, 200, 100, 100, 50, 50]


def test_a_step_back_stays_on_the_path():
    """One step of DDIM leaves it by the square of its length."""
    process = ConsistencyModel(clip_x0=False, teacher=Teacher())
    x0, y = batch(64)
    t = torch.arange(64) * 12 + 200
    x = process.q_sample(x0, t, torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)))

    def error(gap):
        return (process.step_back(x, t, t - gap, y) - along_the_path(process, x, t, t - gap)).abs().max().item()

    assert error(1) < 2e-5
    assert 3.4 < error(40) / error(20) < 4.6


def test_the_exact_function_has_nothing_to_learn(monkeypatch):
    process, (x0, y) = ConsistencyModel(clip_x0=False, teacher=Teacher()), batch(256)

    def loss_and_gradient(gap, weight=1.0):
        monkeypatch.setattr(consistency, "FIRST_GAP", 4 * gap)  # of the last stage it is a quarter
        monkeypatch.setattr(consistency, "ANCHOR", 0)
        student = Student(weight)
        loss = process.loss(student, x0, y, torch.Generator().manual_seed(2))
        loss.backward()
        return loss.item(), student.weight.grad.abs().item()

    far, near, nearest = (loss_and_gradient(gap) for gap in (32, 8, 1))
    assert far[0] > 4 * near[0] > 16 * nearest[0] and nearest[0] < 2e-6
    wrong = loss_and_gradient(32, 0.9)  # all of a path agree on a wrong end: the boundary alone tells
    assert nearest[1] < 0.01 * wrong[1] and wrong[0] > 100 * nearest[0]


@pytest.mark.parametrize("last", [450, 0])
def test_the_target_is_the_function_at_r_without_a_gradient(last):
    process, (x0, y) = ConsistencyModel(clip_x0=False, teacher=Teacher()), batch(8)
    t, r = torch.full((8,), 600), torch.full((8,), last)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    student = Student(0.8)
    process.loss(student, x0, y, drawn=(t, r, noise)).backward()

    x = process.q_sample(x0, t, noise)
    x_r = process.step_back(x, t, r, y)
    target = process.predict_x0(student(x_r, r, y), x_r, r).detach() if last else x_r
    output = process.predict_x0(Student(0.8)(x, t, y), x, t)
    weight = torch.tensor(0.8, requires_grad=True)
    distance = ((weight / 0.8 * output.detach() - target) ** 2).mean((1, 2, 3))  # each image's, linear in the weight
    loss = (distance + consistency.HUBER**2).sqrt().mean() - consistency.HUBER
    assert process.loss(student, x0, y, drawn=(t, r, noise)).item() == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    assert student.weight.grad.item() == pytest.approx(weight.grad.item(), rel=1e-2)
    assert all(parameter.grad is None for parameter in process.teacher.parameters())


def test_pixels_that_clipping_repairs_cost_nothing():
    class White(Teacher):
        def forward(self, x, t, y):
            return torch.full_like(x, 1.05) * self.weight

    process = ConsistencyModel(teacher=White())
    loss = process.loss(White(), torch.ones(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64), drawn=drawn(900, 800))
    assert loss == 0
    unclipped = ConsistencyModel(teacher=White(), clip_x0=False)
    model = Student(0.5)
    assert unclipped.loss(model, torch.ones(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64), drawn=drawn(900, 800)) > 0


def drawn(t, r):
    return torch.full((4,), t), torch.full((4,), r), torch.zeros(4, 1, 2, 2)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_samples_are_those_of_the_closed_form(steps):
    process, y = ConsistencyModel(clip_x0=False), torch.zeros(20_000, dtype=torch.int64)
    noise = torch.randn(20_000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    xs = list(process.sample(Student(), noise, y, steps=steps, generator=torch.Generator().manual_seed(1)))
    assert len(xs) == steps + 1 and torch.equal(xs[0], noise)

    generator, x = torch.Generator().manual_seed(1), noise
    times = [999 - 1000 * i // steps for i in range(steps)]
    zero = torch.zeros(1, dtype=torch.int64)
    for i, t in enumerate(times):
        x = along_the_path(process, x, torch.tensor([t]), zero)
        if i < steps - 1:
            signal, level = process.signal_and_noise(times[i + 1])
            x = signal * x + level * torch.randn(x.shape, generator=generator)
        assert (x - xs[i + 1]).abs().max() < 1e-4
    assert abs(x.mean() - MEAN) < 0.01 and abs(x.std() - DEVIATION) < 0.01


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_every_step_of_the_sampler_equals_diffusers(steps):
    process = ConsistencyModel(clip_x0=False)
    acp = torch.cat([torch.ones(1), process.alphas_cumprod])
    betas = (1 - acp[1:].double() / acp[:-1].double()).float().numpy()
    theirs = LCMScheduler(trained_betas=betas, prediction_type="sample", clip_sample=False)
    theirs.alphas_cumprod = process.alphas_cumprod  # a product of rounded betas is another in its last digits
    theirs.set_timesteps(timesteps=process.timesteps(steps), original_inference_steps=50)
    x, y = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4, 0])
    ours = process.sample(Oracle(), x, y, steps=steps, generator=torch.Generator().manual_seed(1))
    assert torch.equal(next(ours), x)
    generator = torch.Generator().manual_seed(1)
    for t, x_ours in zip(theirs.timesteps, ours, strict=True):
        x = theirs.step(Oracle()(x, t.repeat(3), y), t, x, generator=generator).prev_sample
        assert (x_ours - x).abs().max() <= 1e-5


@pytest.mark.parametrize("t", [0, 1, 5, 500])
def test_the_boundary_is_that_of_diffusers(t):
    c_skip, c_out = LCMScheduler().get_scalings_for_boundary_condition_discrete(t)
    x, output = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ConsistencyModel().consistency(output, x, t), c_skip * x + c_out * output, rtol=1e-6)


def test_the_teacher_guides_each_image_by_its_own_noise():
    options = dict(teacher_cfg_scale=2.5, cfg_low=0.35, cfg_high=0.75)
    teacher = random_dit(image_size=8)
    process = ConsistencyModel(teacher=teacher, clip_x0=False, **options)
    x, y = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4, 0, 2])
    t, r = torch.tensor([1, 300, 400, 800]), torch.tensor([0, 200, 300, 700])
    x_r = process.step_back(x, t, r, y)
    for i, scale in enumerate((1.0, 1.0, 2.5, 1.0)):
        part = slice(i, i + 1)
        x0 = guided(teacher, x[part], t[part], y[part], scale)
        alone = process.ddim_step(x[part], x0, t[i].item(), r[i].item(), None, 0.0)
        assert torch.allclose(x_r[part], alone, atol=1e-5)


def test_the_teacher_computes_in_the_precision_of_the_run():
    teacher, y = random_dit(image_size=8), torch.tensor([1, 4])
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, r = torch.tensor([300, 900]), torch.tensor([200, 800])
    full, half = (ConsistencyModel(teacher=teacher, precision=name).step_back(x, t, r, y) for name in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and 0 < (full - half).abs().max() < 0.02


@pytest.fixture
def start(tmp_path):
    """Weights to start from, of a diffusion that predicts x_0."""
    fit(tmp_path / "start", "--train-steps", 30)
    return tmp_path / "start" / "model.pth"


def tune(out_dir, *flags):
    fit(out_dir, "--process", "consistency", "--sample-steps", 2, *flags)


def test_a_run_that_is_resumed_ends_with_the_same_bits_though_the_weights_it_started_from_are_gone(start, tmp_path):
    tune(tmp_path / "whole", "--init-from", start, "--train-steps", 12, "--checkpoint-every", 100)
    flags = ["--init-from", start, "--train-steps", 12, "--checkpoint-every", 4, "--log-every", 1]
    with pytest.MonkeyPatch.context() as patch:
        save = train.save_run
        counted = []

        def dying(*arguments):
            save(*arguments)
            counted.append(1)
            if len(counted) == 3:  # at the start, after 4 steps, after 8
                raise KeyboardInterrupt

        patch.setattr(train, "save_run", dying)
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "cut", *flags)
    weights = load_file(start)["model"]
    start.unlink()
    half = load_file(tmp_path / "cut" / "checkpoint.pth")
    assert half["progress"][0] == 8
    assert_same(dict(half["teacher"]), dict(weights))
    train.main(["--resume", "--out-dir", str(tmp_path / "cut")])
    a, b = (load_file(tmp_path / name / "checkpoint.pth") for name in ("whole", "cut"))
    for key in ("model", "ema", "optimizers", "teacher"):
        assert_same(a[key], b[key])
    assert not torch.equal(a["model"]["final_layer.linear.weight"], weights["final_layer.linear.weight"])


def test_tuned_weights_draw_as_their_config_says(start, tmp_path):
    tune(tmp_path / "run", "--init-from", start, "--train-steps", 2)
    model, config = load_model(tmp_path / "run" / "model.pth")
    settings = (config.preset, config.process, config.sampler, config.sample_steps, config.cfg_scale)
    assert settings == ("one-step", "consistency", "consistency", 2, 1.0)
    assert (config.hidden_size, config.patch_size, config.schedule) == (32, 4, "cosine")
    assert network_evaluations(config) == 2 and network_evaluations(config.replace(sample_steps=1)) == 1
    *_, x = denoise(model, config, torch.arange(4), torch.Generator().manual_seed(0))
    assert x.shape == (4, 1, 8, 8) and x.abs().max() <= 1
    assert config.init_from == "model.pth"  # and not where it was


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_half_precision_draws_in_as_many_evaluations_as_are_asked_for(steps, start, tmp_path, capsys):
    tune(tmp_path / "run", "--init-from", start, "--train-steps", 1)
    save_in_half(tmp_path / "run" / "model.pth", tmp_path / "half.pth")
    flags = ["--checkpoint", tmp_path / "half.pth", "--sample-steps", steps, "--output", tmp_path / "digits.png"]
    inference.main([*map(str, flags)])
    told = f"4 images by consistency, {steps} steps, guidance 1.0: {steps} network evaluations an image"
    assert told in capsys.readouterr().out
    with pytest.raises(UserError, match="^cfg_scale is 2.0; a consistency model's guidance is in its weights; give 1$"):
        inference.main([*map(str, flags), "--cfg-scale", "2"])


@pytest.mark.parametrize("flag, way", [("optimizer", "muon"), ("precision", "bf16"), ("time-sampling", "logit_normal")])
def test_other_ways_to_tune_lower_the_loss_too(flag, way, start, tmp_path):
    tune(tmp_path / "run", "--init-from", start, "--train-steps", 60, "--warmup-steps", 0, f"--{flag}", way)
    (teacher, _), (model, config) = load_model(start), load_model(tmp_path / "run" / "model.pth")
    process, x0 = build_process(config, teacher), dataset.load_dataset("blobs", "").images.repeat(64, 1, 1, 1)
    before, after = (
        process.loss(network, dataset.normalize(x0), torch.arange(256) % 4, torch.Generator().manual_seed(0)).item()
        for network in (teacher, model)
    )
    assert getattr(config, flag.replace("-", "_")) == way and 0 < after < 0.8 * before, (before, after)


def test_the_preset_tunes_the_shipped_weights():
    config, shipped = preset(**new_settings({"preset": "one-step"})), load_model(ROOT / "model.pth")[1]
    names = ("patch_size", "hidden_size", "depth", "num_heads", "block", "schedule", "clip_x0")
    assert all(getattr(config, name) == getattr(shipped, name) for name in names)
    assert config.init_from == str(ROOT / "model.pth") and config.process == "consistency"


def test_captions_are_tuned_too(tmp_path):
    captions = ["--dataset", "corners", "--block", "joint-attention"]
    fit(tmp_path / "start", *captions, "--train-steps", 2)
    tune(tmp_path / "run", *captions, "--init-from", tmp_path / "start" / "model.pth", "--train-steps", 2)
    _, config = load_model(tmp_path / "run" / "model.pth")
    assert (config.process, config.caption_length) == ("consistency", 3)


def test_parts_of_a_batch_are_tuned_alike(start, tmp_path):
    for name, parts in (("one", 1), ("four", 4)):
        tune(tmp_path / name, "--init-from", start, "--train-steps", 3, "--accumulation-steps", parts, "--log-every", 1)
    one, four = (without_time(tmp_path / name) for name in ("one", "four"))
    for a, b in zip(one, four, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)


def test_the_progress_of_a_run_decides_r():
    progress = []

    class Spy(ConsistencyModel):
        def draw_noise(self, x0, generator=None, progress_of_run=1):
            progress.append(progress_of_run)
            return super().draw_noise(x0, generator, progress_of_run)

    config = preset("one-step", train_steps=10, batch_size=4, patch_size=4, dataset="blobs")
    data = dataset.load_dataset("blobs", "")
    (first,), (_,), (last,) = (train.draw_batch(data, Spy(), config, step) for step in (0, 5, 9))
    assert progress == [0, 0.5, 0.9] and [len(tensor) for tensor in first] == [4] * 5
    (again,) = train.draw_batch(data, ConsistencyModel(), config, 9)
    assert_same(last, again)
    (part,) = train.draw_batch(data, ConsistencyModel(), config, 9, part=slice(2, 4))
    assert_same(tuple(tensor[2:] for tensor in last), part)


def test_bad_starts_are_refused(start, tmp_path):
    with pytest.raises(UserError, match="process consistency tunes weights that are there; give --init-from"):
        new_settings({"process": "consistency", "preset": "digits"})
    with pytest.raises(UserError, match="give --init-from"):
        new_settings({"process": "consistency"})
    for process, told in (
        ("diffusion", "preset one-step sets it"),
        ("flow_matching", "leave out --process flow_match"),
    ):
        with pytest.raises(UserError, match=told):
            preset(**new_settings({"preset": "one-step", "process": process}))
    for flags, told in (
        (["--prediction", "noise"], "it predicts noise in process diffusion; process consistency needs x0"),
        (["--prediction", "x0", "--learn-sigma"], "it predicts x0 and variances in process diffusion"),
        (["--process", "flow_matching"], "it predicts x0 in process flow_matching"),
    ):
        folder = tmp_path / flags[-1].strip("-")
        fit(folder, "--train-steps", 1, *flags)
        with pytest.raises(UserError, match=f"^--init-from {folder / 'model.pth'}: {told}"):
            new_settings({"process": "consistency", "init_from": str(folder / "model.pth")})
    tune(tmp_path / "tuned", "--init-from", start, "--train-steps", 1)
    with pytest.raises(UserError, match="it predicts x0 in process consistency; process consistency needs x0 in diffu"):
        new_settings({"init_from": str(tmp_path / "tuned" / "model.pth")})
    with pytest.raises(UserError, match="gone.pth does not exist"):
        new_settings({"preset": "one-step", "init_from": "gone.pth"})
    config = preset("one-step", shard=True, optimizer="adamw", image_size=28)
    with pytest.raises(UserError, match="shard does not go with process consistency"):
        build_process(config, random_dit())


def test_a_teacher_that_has_learned_something_else_is_refused(start, tmp_path, monkeypatch):
    load = dataset.DATASETS["blobs"]
    monkeypatch.setitem(dataset.DATASETS, "spots", load)
    monkeypatch.setitem(dataset.DATASETS, "blobs", lambda *_: (*load(*_), ["up", "down", "left", "right"]))
    for flags, told in (
        (
            ("--dataset", "spots"),
            "it has learned blobs, this run has spots, of which it knows 4 of the classes; ",
        ),
        ((), "it has learned blobs, this run has blobs, of which it knows 0 of the classes; process consistency tunes"),
        (("--hidden-size", 64), "its hidden_size is 32, that of this run 64; they must be equal"),
    ):
        with pytest.raises(UserError, match=f"^--init-from {start}: {told}"):
            tune(tmp_path / "run", "--init-from", start, *flags)
        assert not (tmp_path / "run" / "checkpoint.pth").exists()


def test_a_folder_that_has_moved_is_still_what_the_teacher_has_learned(pictures_dir, tmp_path):
    (tmp_path / "moved").symlink_to(pictures_dir)
    flags = ["--data-dir", tmp_path, "--train-steps", 1, "--image-size", 8]
    fit(tmp_path / "start", "--dataset", pictures_dir, *flags)
    tune(tmp_path / "run", "--dataset", tmp_path / "moved", *flags, "--init-from", tmp_path / "start" / "model.pth")
    assert load_model(tmp_path / "run" / "model.pth")[1].dataset == str(tmp_path / "moved")


def test_a_run_goes_on_with_its_own_teacher_alone(start, tmp_path):
    tune(tmp_path / "run", "--init-from", start, "--train-steps", 1)
    folder = ["--resume", "--out-dir", str(tmp_path / "run"), "--init-from"]
    with pytest.raises(UserError, match=f"^--init-from {ROOT / 'model.pth'} differs from the run's {start}; leave it"):
        train.main([*folder, str(ROOT / "model.pth")])
    train.main([*folder, str(start)])


def test_bad_settings_are_refused():
    for settings, told in (
        (dict(sampler="ddim"), "sampler 'ddim' is not one of process consistency's: consistency"),
        (dict(prediction="v"), "prediction 'v' is not one of process consistency's: x0"),
        (dict(sample_steps=1001), "sample_steps is 1001; it must be at most 1000"),
        (dict(learn_sigma=True), "learn_sigma is an option of process diffusion, not of consistency; leave it out"),
        (dict(process="diffusion", teacher_cfg_scale=2.0), "teacher_cfg_scale is an option of process consistency"),
        (dict(cfg_scale=2.0), "cfg_scale is 2.0; a consistency model's guidance is in its weights; give 1"),
        (dict(cfg_scale=0.0), "cfg_scale is 0.0"),
        (dict(process="diffusion"), "teacher_cfg_scale is an option of process consistency, not of diffusion; preset"),
        (dict(eta=0.5), "eta is an option of process diffusion, not of consistency"),
    ):
        with pytest.raises(UserError, match=told):
            preset("one-step", **settings)
    process, x, y = ConsistencyModel(), torch.zeros(1, 1, 2, 2), torch.tensor([0])
    with pytest.raises(ValueError, match="'ddim' is not one of consistency"):
        list(process.sample(Oracle(), x, y, sampler="ddim"))
    with pytest.raises(ValueError, match="cfg_scale 2 is not 1"):
        list(process.sample(Oracle(), x, y, cfg_scale=2))
    with pytest.raises(ValueError, match="sample_steps 0 is not between 1 and 1000"):
        list(process.sample(Oracle(), x, y, steps=0))


def test_a_checkpoint_without_its_teacher_is_refused(start, tmp_path):
    tune(tmp_path / "run", "--init-from", start, "--train-steps", 4)
    path = tmp_path / "run" / "checkpoint.pth"
    state = load_file(path)
    del state["teacher"]
    save_file(state, path)
    with pytest.raises(UserError, match="checkpoint.pth holds no run to go on with .it lacks 'teacher'"):
        train.main(["--resume", "--out-dir", str(tmp_path / "run")])


def test_the_options_are_those_of_the_config():
    assert ConsistencyModel.samplers == ("consistency",)
    process = build_process(preset("one-step", schedule="linear", time_sampling="logit_normal", time_mean=0.3))
    assert torch.equal(process.alphas_cumprod, Diffusion("linear").alphas_cumprod) and process.teacher is None
    assert (process.time_sampling, process.time_mean) == ("logit_normal", 0.3)
    assert {"teacher_cfg_scale", "cfg_low", "cfg_high", "precision"} <= set(
        inspect.signature(ConsistencyModel).parameters
    )
