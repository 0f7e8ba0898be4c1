import itertools
from fractions import Fraction

import pytest
import torch
from conftest import random_dit
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

import config
from diffusion import (
    LOSSES,
    PREDICTIONS,
    SCHEDULES,
    TIME_SAMPLINGS,
    Diffusion,
    draw_time,
    forgive_overshoot,
    guidance_at,
    guided,
)
from dit import DiT
from support.checkpoint import BLOCKS, PROCESSES
from variants.captions import BagOfWords, TextEmbedder
from variants.flow_matching import PREDICTIONS as FLOW_PREDICTIONS
from variants.flow_matching import FlowMatching


class Oracle(torch.nn.Module):
    """A stand-in network with an answer for every x and t, the same for ours and for diffusers."""

    num_classes = 10

    def forward(self, x, t, y):
        return torch.sin(x * 2 + t.view(-1, 1, 1, 1) / 300) + 0.1 * y.view(-1, 1, 1, 1)


def diffusers_scheduler(kind, process, steps, **options):
    scheduler = kind(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type={"noise": "epsilon", "v": "v_prediction", "x0": "sample"}[process.prediction],
        timestep_spacing="trailing",
        clip_sample=True,
        **options,
    )
    scheduler.alphas_cumprod = process.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [10, 50, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["noise", "v", "x0"])
@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_every_step_equals_diffusers(sampler, eta, prediction, schedule, steps):
    process = Diffusion(schedule, prediction)
    if sampler == "ddpm":
        theirs = diffusers_scheduler(DDPMScheduler, process, steps, variance_type="fixed_small")
    else:
        theirs = diffusers_scheduler(DDIMScheduler, process, steps)
    assert process.timesteps(steps) == theirs.timesteps.tolist()
    y = torch.tensor([1, 4])
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = process.sample(
        Oracle(), x, y, steps=steps, sampler=sampler, eta=eta, generator=torch.Generator().manual_seed(2)
    )
    assert torch.equal(next(ours), x)
    generator = torch.Generator().manual_seed(2)
    options = {} if sampler == "ddpm" else {"eta": eta, "use_clipped_model_output": True}
    for t, x_ours in zip(theirs.timesteps, ours, strict=True):
        output = Oracle()(x, torch.full((2,), int(t)), y)
        x_theirs = theirs.step(output, t, x, generator=generator, **options).prev_sample
        assert (x_ours - x_theirs).abs().max() <= 1e-5
        x = x_ours


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize(
    "schedule, prediction, tolerance",
    [("linear", "v", 1e-5), ("cosine", "v", 1e-5), ("linear", "noise", 1e-5), ("cosine", "noise", 1e-4)]
    + [("linear", "x0", 1e-5), ("cosine", "x0", 1e-5)],
)
def test_dpm_solver_equals_diffusers(schedule, prediction, tolerance, steps):
    process = Diffusion(schedule, prediction)
    theirs = DPMSolverMultistepScheduler(
        prediction_type={"noise": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction],
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        thresholding=True,
    )
    theirs.alphas_cumprod = process.alphas_cumprod
    theirs.set_timesteps(steps)
    assert process.timesteps(steps) == theirs.timesteps.tolist()
    y = torch.tensor([1, 4])
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = process.sample(Oracle(), x, y, steps=steps, sampler="dpm++")
    next(ours)
    for t, x_ours in zip(theirs.timesteps, ours, strict=True):
        x_theirs = theirs.step(Oracle()(x, torch.full((2,), int(t)), y), t, x).prev_sample
        assert (x_ours - x_theirs).abs().max() <= tolerance
        x = x_ours


def test_schedules_are_the_papers():
    betas = 1 - SCHEDULES["linear"](1000)[1:] / SCHEDULES["linear"](1000)[:-1]
    assert abs(betas[-1] - 0.02) < 1e-9 and abs(1 - SCHEDULES["linear"](1000)[0] - 1e-4) < 1e-9
    for name, theirs in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
        table = DDPMScheduler(beta_schedule=theirs).alphas_cumprod
        assert (Diffusion(name).alphas_cumprod - table).abs().max() < 2e-5  # theirs is accumulated in float32
        assert Diffusion(name).alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize("steps", [100, 250, 1000])
def test_fewer_timesteps_are_larger_ones_and_leave_as_little_of_the_image(steps):
    scale = 1000 / steps
    theirs = DDPMScheduler(steps, beta_start=1e-4 * scale, beta_end=0.02 * scale).alphas_cumprod
    assert torch.allclose(Diffusion("linear", num_timesteps=steps).alphas_cumprod, theirs, rtol=1e-3, atol=1e-6)
    for schedule in SCHEDULES:
        assert Diffusion(schedule, num_timesteps=steps).alphas_cumprod[-1] < 1e-4
    assert (Diffusion("linear", num_timesteps=10).alphas_cumprod > 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_signal_to_noise_falls_with_t(schedule):
    alphas_cumprod = SCHEDULES[schedule](1000)
    assert ((alphas_cumprod / (1 - alphas_cumprod)).diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0, 300, 999])
def test_q_has_the_stated_mean_and_variance(schedule, t):
    process = Diffusion(schedule)
    x0 = torch.full((200_000, 1, 1, 1), 0.8)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x = process.q_sample(x0, torch.full((len(x0),), t), noise)
    alpha = SCHEDULES[schedule](1000)[t]
    assert abs(x.mean() - alpha.sqrt() * 0.8) < 0.01
    assert abs(x.var() - (1 - alpha)) < 0.01


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_is_recovered_from_its_own_target(prediction):
    process = Diffusion("cosine", prediction, clip_x0=False)
    x0, noise = torch.rand(1, 1, 8, 8) * 2 - 1, torch.randn(1, 1, 8, 8)
    for t in (0, 100, 900):
        ts = torch.tensor([t])
        x = process.q_sample(x0, ts, noise)
        assert torch.allclose(process.predict_x0(process.target(x0, ts, noise), x, t), x0, atol=1e-4)


@pytest.mark.parametrize("prediction, schedule", [("noise", "linear"), ("x0", "cosine"), ("v", "cosine")])
def test_loss_of_a_fresh_model_is_the_mean_square_of_its_target(prediction, schedule):
    x0 = torch.rand(512, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = DiT(8, 4, hidden_size=32, depth=1, num_heads=2)
    generator = torch.Generator().manual_seed(3)
    loss = Diffusion(schedule, prediction).loss(model, x0, torch.zeros(512).long(), generator)
    # noise has mean square 1, x_0 here 1/3; v mixes the two as the schedule does, on average
    signal = SCHEDULES[schedule](1000).mean().item()
    expected = {"noise": 1.0, "x0": 1 / 3, "v": signal + (1 - signal) / 3}[prediction]
    assert abs(loss.item() - expected) < 0.02
    if prediction == "noise":
        l1 = Diffusion(schedule, prediction, loss="l1").loss(model, x0, torch.zeros(512).long(), generator)
        assert abs(l1.item() - (2 / torch.pi) ** 0.5) < 0.02


def test_guidance_1_is_the_conditional_model():
    model = random_dit()
    x, t, y = torch.randn(3, 1, 28, 28), torch.tensor([1, 500, 999]), torch.tensor([0, 3, 9])
    null = torch.full_like(y, 10)
    conditional, unconditional = model(x, t, y), model(x, t, null)
    assert torch.equal(guided(model, x, t, y, 1.0), conditional)
    assert torch.allclose(guided(model, x, t, y, 0.0), unconditional, atol=1e-5)
    assert torch.allclose(guided(model, x, t, y, 1.0001), conditional, atol=1e-3)
    expected = unconditional + 3 * (conditional - unconditional)
    assert torch.allclose(guided(model, x, t, y, 3.0), expected, atol=1e-5)


def test_overshooting_black_or_white_is_no_error_up_to_a_limit():
    target = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 0.5, -0.999])
    x0 = torch.tensor([-1.05, -1.4, 1.05, 1.05, 1.4, -1.05, 1.05, -1.05], requires_grad=True)
    expected = torch.tensor([-1.05, -1.1, -1.0, 1.05, 1.1, 1.0, 0.5, -0.999])
    assert torch.equal(forgive_overshoot(target, x0), expected)

    class Beyond(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.answer = torch.nn.Parameter(torch.tensor(-1.05))

        def forward(self, x, t, y):
            return self.answer.expand_as(x)

    black, y = torch.full((4, 1, 2, 2), -1.0), torch.zeros(4).long()
    for process in (Diffusion("cosine", "x0"), FlowMatching("x0")):
        model = Beyond()
        loss = process.loss(model, black, y)
        loss.backward()
        assert loss == 0 and model.answer.grad == 0  # a target is no way for the gradient
    assert Diffusion("cosine", "x0", clip_x0=False).loss(Beyond(), black, y) > 0
    assert Diffusion("cosine", "v").loss(Beyond(), black, y) > 0


def test_clipping_is_of_x0_and_can_be_left_out():
    noise, y = torch.randn(2, 1, 8, 8) * 3, torch.tensor([0, 1])
    assert list(Diffusion().sample(Oracle(), noise, y, steps=5))[-1].abs().max() <= 1
    assert list(Diffusion().sample(Oracle(), noise, y, steps=5))[1].abs().max() > 1  # x_t itself is never clipped
    assert list(Diffusion(clip_x0=False).sample(Oracle(), noise, y, steps=5))[-1].abs().max() > 1


def test_same_seed_same_images_and_ddim_draws_nothing():
    noise, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])

    def final(sampler, seed, eta=0.0):
        generator = torch.Generator().manual_seed(seed)
        return list(Diffusion().sample(Oracle(), noise, y, 10, sampler, generator=generator, eta=eta))[-1]

    for sampler in ("ddpm", "ddim"):
        assert torch.equal(final(sampler, 0), final(sampler, 0))
    assert torch.equal(final("ddim", 0), final("ddim", 1))
    assert not torch.equal(final("ddpm", 0), final("ddpm", 1))
    assert torch.allclose(final("ddim", 0, eta=1.0), final("ddpm", 0), atol=1e-3)  # the same process


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} is not between 1 and 1000"):
        list(Diffusion().sample(Oracle(), torch.zeros(1, 1, 8, 8), torch.tensor([0]), steps=steps))


def test_times_are_drawn_as_said_and_reach_the_network():
    generator = torch.Generator().manual_seed(0)
    uniform = draw_time(50_000, "uniform", 3.0, torch.device("cpu"), generator)
    assert abs((uniform < 0.25).float().mean() - 0.25) < 0.01
    normal = draw_time(50_000, "logit_normal", 0.5, torch.device("cpu"), generator).logit()
    assert abs(normal.mean() - 0.5) < 0.02 and abs(normal.std() - 1) < 0.02

    class Spy(torch.nn.Module):
        def forward(self, x, t, y):
            self.t = t
            return x

    spy = Spy()
    for mean, least, most in ((-20, 0, 0), (20, 999, 999), (0, 400, 600)):
        process = Diffusion(time_sampling="logit_normal", time_mean=mean)
        process.loss(spy, torch.zeros(1000, 1, 1, 1), torch.zeros(1000).long(), generator)
        assert spy.t.dtype == torch.int64 and least <= spy.t.float().mean() <= most
    Diffusion().loss(spy, torch.zeros(20_000, 1, 1, 1), torch.zeros(20_000).long(), generator)
    assert spy.t.min() == 0 and spy.t.max() == 999  # every timestep has its turn


def test_config_names_what_the_process_has():
    fields = {field.name: field.metadata["choices"] for field in config.dataclasses.fields(config.Config)}
    assert set(fields["schedule"]) == set(SCHEDULES)
    assert set(fields["loss"]) == set(LOSSES)
    assert fields["time_sampling"] == TIME_SAMPLINGS
    assert config.SAMPLERS == {name: process.samplers for name, process in PROCESSES.items()}
    predictions = {"diffusion": PREDICTIONS, "flow_matching": FLOW_PREDICTIONS, "consistency": ("x0",)}
    assert config.PREDICTIONS == predictions
    assert tuple(BLOCKS) == config.BLOCKS and tuple(PROCESSES) == tuple(config.SAMPLERS)
    for wrong in (dict(schedule="sigmoid"), dict(prediction="epsilon"), dict(loss="huber"), dict(time_sampling="beta")):
        with pytest.raises(ValueError, match=f"{next(iter(wrong.values()))!r} is not one of"):
            Diffusion(**wrong)
    with pytest.raises(ValueError, match="'heun' is not one of ddpm, ddim, dpm"):
        list(Diffusion().sample(Oracle(), torch.zeros(1, 1, 8, 8), torch.tensor([0]), sampler="heun"))


def test_guidance_is_counted_as_in_exact_arithmetic():
    """On common grids: step i of n is at noise 1 - i/n, the interval's ends are multiples of 0.05."""
    ends = [Fraction(i, 20) for i in range(21)]
    for steps in (5, 8, 10, 12, 15, 20, 25, 30, 40, 50, 100):
        for low, high in itertools.combinations(ends, 2):
            exact = sum(low < 1 - Fraction(i, steps) <= high for i in range(steps))
            levels = [1 - i / steps for i in range(steps)]
            ours = [guidance_at(level, 2.0, (float(low), float(high))) for level in levels]
            assert ours.count(2.0) == exact and ours.count(1.0) == steps - exact, (steps, low, high)


def test_a_scale_below_1_holds_everywhere():
    assert [guidance_at(level, 0.0, (0.4, 0.6)) for level in (0.1, 0.5, 1.0)] == [0.0] * 3
    assert [guidance_at(level, 1.5, (0.4, 0.6)) for level in (0.1, 0.4, 0.5, 0.6, 1.0)] == [1.0, 1.0, 1.5, 1.5, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_looked_up_is_the_table_itself_with_no_noise_before_its_first_step(schedule):
    process = Diffusion(schedule)
    t = torch.arange(-1, 1000)
    expected = torch.cat([torch.ones(1), process.alphas_cumprod])
    assert torch.equal(process.alphas_cumprod_at(t), expected.view(-1, 1, 1, 1))
    assert all(torch.equal(process.alphas_cumprod_at(step), expected[step + 1]) for step in (-1, 0, 500, 999))


@pytest.mark.parametrize("block", ["adaLN-Zero", "cross-attention", "joint-attention"])
def test_guidance_with_captions_is_two_calls_the_second_of_the_null_caption(block):
    y_embedder = TextEmbedder(6, 3, 32, 2) if BLOCKS[block].reads_words else BagOfWords(6, 3, 32)
    model = random_dit(image_size=8, num_classes=6, block=block, y_embedder=y_embedder)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([700, 30]), torch.tensor([[1, 2, 4], [3, 5, 0]])
    conditional, unconditional = model(x, t, y), model(x, t, torch.full((2, 3), 6))
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    expected = unconditional + 2.5 * (conditional - unconditional)
    assert torch.allclose(guided(model, x, t, y, 2.5), expected, atol=1e-5)
    assert torch.equal(guided(model, x, t, y, 1.0), conditional)
