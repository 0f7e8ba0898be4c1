import pytest
import torch
from conftest import random_dit
from diffusers import FlowMatchEulerDiscreteScheduler

import train
from config import Config, preset
from diffusion import Diffusion
from support.checkpoint import build_process, load_model
from support.errors import UserError
from support.sampling import network_evaluations
from variants.flow_matching import FlowMatching


class Oracle(torch.nn.Module):
    """A stand-in network with an answer for every x and t, the same for ours and for diffusers."""

    num_classes = 10

    def forward(self, x, t, y):
        return torch.sin(x * 2 + t.view(-1, 1, 1, 1) / 300) + 0.1 * y.view(-1, 1, 1, 1)


@pytest.mark.parametrize("steps", [1, 7, 10, 50])
def test_every_euler_step_equals_diffusers(steps):
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    x, y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4])
    ours = FlowMatching().sample(Oracle(), x, y, steps=steps, sampler="euler")
    assert torch.equal(next(ours), x)
    for t, x_ours in zip(theirs.timesteps, ours, strict=True):
        x_theirs = theirs.step(Oracle()(x, t.repeat(2), y), t, x).prev_sample
        assert (x_ours - x_theirs).abs().max() <= 1e-5
        x = x_ours


def test_heun_is_of_second_order_and_euler_of_first():
    class Field(torch.nn.Module):
        def forward(self, x, t, y):
            return x * (t / 1000).view(-1, 1, 1, 1)  # dx/dt = x t: x_0 = x_1 exp(-1/2)

    x, y = torch.ones(1, 1, 1, 1), torch.tensor([0])
    exact = torch.tensor(-0.5).exp()

    def error(sampler, steps):
        *_, x0 = FlowMatching().sample(Field(), x, y, steps=steps, sampler=sampler)
        return (x0 - exact).abs().item()

    assert 1.8 < error("euler", 20) / error("euler", 40) < 2.2
    assert 3.5 < error("heun", 20) / error("heun", 40) < 4.5
    assert error("heun", 20) < error("euler", 20) / 20


@pytest.mark.parametrize("time_sampling, quarter", [("uniform", 0.25), ("logit_normal", 0.136)])
def test_t_is_drawn_as_said_and_the_network_sees_1000_t(time_sampling, quarter):
    class Spy(torch.nn.Module):
        def forward(self, x, t, y):
            self.x, self.t = x, t
            return torch.zeros_like(x)

    spy, x0 = Spy(), torch.full((20_000, 1, 1, 1), 0.5)
    loss = FlowMatching(time_sampling=time_sampling).loss(spy, x0, None, torch.Generator().manual_seed(0))
    t = spy.t / 1000
    assert 0 <= t.min() and t.max() <= 1
    assert abs((t < 0.25).float().mean() - quarter) < 0.01  # P(sigmoid(N(0, 1)) < 1/4) = Phi(-ln 3) = 0.136
    late, early = spy.x[t > 0.8].flatten(), spy.x[t < 0.2].flatten()
    assert abs(early.mean() - 0.5 * (1 - t[t < 0.2].mean())) < 0.02 and late.std() > 0.7
    assert abs(loss - 1.25) < 0.05  # the mean square of noise - x_0


def test_loss_of_a_perfect_velocity_is_zero():
    class Perfect(torch.nn.Module):
        def forward(self, x, t, y):
            return (x - 0.3) / (t / 1000).view(-1, 1, 1, 1)  # all data are 0.3: noise - x_0 = (x_t - x_0) / t

    loss = FlowMatching().loss(Perfect(), torch.full((64, 1, 2, 2), 0.3), None, torch.Generator().manual_seed(0))
    assert loss < 1e-6


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_x0_and_its_velocity_give_the_same_images(sampler):
    class Denoiser(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.sin(x * 2 + t.view(-1, 1, 1, 1) / 300)

    class Velocity(Denoiser):
        def forward(self, x, t, y):
            return (x - super().forward(x, t, y)) / (t / 1000).view(-1, 1, 1, 1)

    x, y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4])
    of_x0 = FlowMatching(prediction="x0").sample(Denoiser(), x, y, steps=7, sampler=sampler)
    of_v = FlowMatching(prediction="v").sample(Velocity(), x, y, steps=7, sampler=sampler)
    for a, b in zip(of_x0, of_v, strict=True):
        assert (a - b).abs().max() <= 1e-5


def test_the_loss_compares_with_what_is_predicted():
    class Zero(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.zeros_like(x)

    x0 = torch.full((20_000, 1, 1, 1), 0.5)
    assert abs(FlowMatching(prediction="v").loss(Zero(), x0, None, torch.Generator().manual_seed(0)) - 1.25) < 0.05
    assert FlowMatching(prediction="x0").loss(Zero(), x0, None) == 0.25


def test_guidance_and_bad_settings():
    model, x, y = random_dit(), torch.randn(2, 1, 28, 28), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="'uniformly' is not one of uniform, logit_normal"):
        FlowMatching(time_sampling="uniformly")
    with pytest.raises(ValueError, match="'noise' is not one of x0, v"):
        FlowMatching(prediction="noise")
    process = FlowMatching()
    *_, plain = process.sample(model, x, y, steps=2)
    *_, guided = process.sample(model, x, y, steps=2, cfg_scale=3.0)
    assert not torch.allclose(plain, guided)
    with pytest.raises(ValueError, match="'ddim' is not one of euler, heun"):
        list(process.sample(model, x, y, sampler="ddim"))
    with pytest.raises(ValueError, match="0 is not at least 1"):
        list(process.sample(model, x, y, steps=0))


def test_options_of_the_other_process_are_refused():
    assert preset("digits", process="flow_matching").sampler == "euler"
    with pytest.raises(UserError, match="schedule is an option of process diffusion, not of flow_matching"):
        preset("digits", process="flow_matching", schedule="linear")
    with pytest.raises(UserError, match="preset classic sets it, so choose another"):
        preset("classic", process="flow_matching")
    with pytest.raises(UserError, match="prediction 'noise' is not one of process flow_matching's: x0, v"):
        preset("digits", process="flow_matching", prediction="noise")
    with pytest.raises(UserError, match="flow_matching's: euler, heun"):
        preset("digits", process="flow_matching", sampler="ddim")


def test_network_evaluations_are_counted():
    config = Config(sampler="ddim", sample_steps=25, cfg_scale=1.0, cfg_low=0.0, cfg_high=1.0)
    assert network_evaluations(config) == network_evaluations(config.replace(sampler="dpm++")) == 25
    assert network_evaluations(config.replace(cfg_scale=2.0)) == 50
    assert network_evaluations(config.replace(cfg_scale=2.0, cfg_low=0.6)) == 35  # guided at 1.00, 0.96, ... 0.64
    assert network_evaluations(config.replace(cfg_scale=2.0, cfg_high=0.4)) == 35  # and at 0.40, 0.36, ... 0.04
    heun = config.replace(process="flow_matching", sampler="heun")
    assert network_evaluations(heun) == 49 and network_evaluations(heun.replace(cfg_scale=1.5)) == 98
    assert network_evaluations(heun.replace(sampler="euler", cfg_scale=1.5, cfg_low=0.3, cfg_high=0.5)) == 30
    assert all(network_evaluations(preset(name)) <= 100 for name in ("digits", "flow", "long"))


@pytest.mark.parametrize("process", [Diffusion(), FlowMatching()])
def test_guidance_is_of_the_interval_alone(process):
    class Spy(Oracle):
        def forward(self, x, t, y):
            calls.append((t[0].item() / 1000, len(x), y.tolist()))
            return super().forward(x, t, y)

    calls, x, y = [], torch.randn(1, 1, 8, 8), torch.tensor([3])
    list(process.sample(Spy(), x, y, steps=10, sampler=process.samplers[0], cfg_scale=2.0, cfg_interval=(0.35, 0.75)))
    assert len(calls) == 10
    for time, count, labels in calls:
        assert (count, labels) == ((2, [3, 10]) if 0.35 < time < 0.75 else (1, [3]))


def test_a_process_is_built_with_all_its_options():
    shared = dict(prediction="v", time_sampling="uniform", time_mean=0.3)
    diffusion = build_process(Config(**shared, schedule="cosine", loss="l1"))  # neither is Diffusion's default
    flow = build_process(preset("flow", **shared))
    for process in (diffusion, flow):
        assert all(getattr(process, name) == value for name, value in shared.items())
    assert torch.equal(diffusion.alphas_cumprod, Diffusion("cosine").alphas_cumprod)
    assert diffusion.loss_function is torch.nn.functional.l1_loss and isinstance(flow, FlowMatching)


def test_a_flow_trains_and_samples_through_the_same_scripts(tmp_path, glyphs_dir):
    flags = "--process flow_matching --dataset glyphs --hidden-size 32 --depth 1 --num-heads 2 --train-steps 3"
    flags += f" --batch-size 8 --sample-steps 2 --data-dir {glyphs_dir} --out-dir {tmp_path}"
    train.main(flags.split())
    assert load_model(tmp_path / "model.pth")[1].process == "flow_matching"
