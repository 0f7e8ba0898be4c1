import math

import pytest
import torch
from diffusers import DDPMScheduler
from test_diffusion import Oracle, diffusers_scheduler

from dataset import denormalize, normalize
from diffusion import PREDICTIONS, SCHEDULES, Diffusion, guided
from variants import learned_variance
from variants.learned_variance import LearnedVariance, bits_per_dim, variational_bound


def learned(seed=0, **options):
    """A diffusion that learns its variance, and a network for it that has an answer for every x and t."""

    class Both(Oracle):
        def forward(self, x, t, y):
            return torch.cat([super().forward(x, t, y), torch.cos(3 * x + (t / 100 + y).view(-1, 1, 1, 1))], dim=1)

    return LearnedVariance(**options), Both()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1000, 250, 7])
def test_learned_log_variance_equals_diffusers(schedule, steps):
    process = LearnedVariance(schedule)
    theirs = diffusers_scheduler(DDPMScheduler, process, steps, variance_type="learned_range")
    v = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    timesteps = process.timesteps(steps)
    for t, t_next in zip(timesteps, timesteps[1:]):
        expected = theirs._get_variance(t, predicted_variance=v)
        output = torch.cat([torch.full_like(v, 7.0), v], dim=1)
        assert (process.log_variance(t, t_next, output) - expected).abs().max() <= 1e-5
        batch = process.log_variance(torch.tensor([t, t]), torch.tensor([t_next, t_next]), output)
        assert torch.allclose(batch, expected.expand(2, 1, 8, 8), atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learned_log_variance_of_the_last_step(schedule):
    """The posterior's variance would be 0 there: that of t = 1 stands in (Nichol & Dhariwal's code does the same)."""
    process = LearnedVariance(schedule)
    acp = process.alphas_cumprod.double()
    posterior_1 = (1 - acp[0]) / (1 - acp[1]) * (1 - acp[1] / acp[0])
    low, high = (process.log_variance(0, -1, torch.full((1, 2), v)).exp()[0].item() for v in (-1.0, 1.0))
    assert low == pytest.approx(posterior_1.item(), rel=2e-3)  # of a difference between float32s near 1
    assert high == pytest.approx(1 - acp[0].item(), rel=2e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_with_learned_variance_equals_diffusers(prediction):
    process, network = learned(prediction=prediction)
    theirs = diffusers_scheduler(DDPMScheduler, process, 1000, variance_type="learned_range")
    x, y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 4])
    ours = process.sample(network, x, y, steps=1000, sampler="ddpm", generator=torch.Generator().manual_seed(2))
    next(ours)
    generator = torch.Generator().manual_seed(2)
    for t, x_ours in zip(theirs.timesteps, ours, strict=True):
        output = network(x, torch.full((2,), int(t)), y)
        x_theirs = theirs.step(output, t, x, generator=generator).prev_sample
        assert (x_ours - x_theirs).abs().max() <= 1e-5
        x = x_ours


@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_other_samplers_ignore_the_learned_variance(sampler):
    process, network = learned()
    noise, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 4])

    def last(process, network):
        generator = torch.Generator().manual_seed(0)
        return list(process.sample(network, noise, y, steps=5, sampler=sampler, generator=generator))[-1]

    assert torch.equal(last(process, network), last(Diffusion(), Oracle())) == (sampler != "ddpm")


def test_guidance_leaves_the_learned_variance_alone():
    _, network = learned()
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([3, 9]), torch.tensor([1, 4])
    conditional, unconditional = network(x, t, y), network(x, t, torch.full_like(y, 10))
    out = guided(network, x, t, y, 3.0)
    assert torch.allclose(out[:, :3], (unconditional + 3 * (conditional - unconditional))[:, :3], atol=1e-5)
    assert torch.equal(out[:, 3:], conditional[:, 3:])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_loss_is_the_simple_one_and_the_bound_and_teaches_the_mean_by_the_first_alone(prediction):
    process, simple = LearnedVariance("cosine", prediction), Diffusion("cosine", prediction)
    x0, y = torch.rand(4, 1, 8, 8) * 2 - 1, torch.zeros(4).long()
    t, noise = torch.tensor([1, 2, 400, 999]), torch.randn(4, 1, 8, 8)
    output = (0.3 * torch.randn(4, 2, 8, 8)).requires_grad_()
    hybrid = process.loss(lambda *_: output, x0, y, drawn=(t, noise))
    (gradient,) = torch.autograd.grad(hybrid, output)
    mean = output[:, :1].detach().requires_grad_()
    plain = simple.loss(lambda *_: mean, x0, y, drawn=(t, noise))
    (gradient_of_mean,) = torch.autograd.grad(plain, mean)
    assert torch.allclose(gradient[:, :1], gradient_of_mean) and gradient[:, 1:].abs().min() > 0
    bound = variational_bound(process, x0, process.q_sample(x0, t, noise), t, output.detach())
    assert hybrid.item() == pytest.approx(plain.item() + bound.mean().item(), rel=1e-5)  # 0.001 of 1000 terms


def test_bound_is_the_divergence_of_two_gaussians_by_its_formula():
    process = LearnedVariance("linear", clip_x0=False)
    acp = process.alphas_cumprod.double()
    x0, x, output, v = (torch.randn(3, 1, 4, 4).double() for _ in range(4))
    t = torch.tensor([1, 30, 999])
    for i, step in enumerate(t.tolist()):
        beta = 1 - acp[step] / acp[step - 1]
        estimate = (x[i] - (1 - acp[step]).sqrt() * output[i]) / acp[step].sqrt()
        weight = acp[step - 1].sqrt() * beta / (1 - acp[step])
        variance = (1 - acp[step - 1]) / (1 - acp[step]) * beta
        model_variance = torch.exp((v[i] + 1) / 2 * beta.log() + (1 - v[i]) / 2 * variance.log())
        gap = weight * (x0[i] - estimate)  # both means share the part of x
        kl = ((model_variance / variance).log() + (variance + gap**2) / model_variance - 1) / 2
        ours = variational_bound(process, x0.float(), x.float(), t, torch.cat([output, v], dim=1).float())[i]
        assert ours.item() == pytest.approx(kl.mean().item() / math.log(2), rel=2e-3)  # tables are float32


def test_decoder_gives_the_256_values_of_a_pixel_probabilities_that_sum_to_1():
    process, _ = learned()
    x0 = torch.arange(256).view(-1, 1, 1, 1) / 127.5 - 1
    for mean, v in ((-1.0, 1.0), (0.3, -1.0), (0.999, 0.0)):
        x = torch.full_like(x0, mean)
        estimate = process.target(x, torch.zeros(256).long(), (x - 0.99995 * x) / 0.01)
        output = torch.cat([estimate, torch.full_like(x0, v)], dim=1)
        bits = variational_bound(process, x0, x, torch.zeros(256).long(), output)
        assert (0.5**bits).sum().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("prediction", ["noise", "x0"])
def test_bits_per_dim_of_gaussian_pixels_by_their_best_network_is_their_entropy(prediction):
    """Pixels from N(0, s^2), of 256 values: every p(x_next | x_t) is a Gaussian, of a variance that v can say."""
    s = 0.3
    process = LearnedVariance("cosine", prediction)
    generator = torch.Generator().manual_seed(0)
    x0 = normalize(denormalize(s * torch.randn(8, 1, 28, 28, generator=generator)))

    def best(x, t, y):
        signal, noise = process.signal_and_noise(t)
        estimate = x * signal * s**2 / ((signal * s) ** 2 + noise**2)
        beta = 1 - process.alphas_cumprod_at(t) / process.alphas_cumprod_at(t - 1)
        least = process.posterior_variance(t, t - 1).clamp(min=1e-12)
        error = (s * noise) ** 2 / ((signal * s) ** 2 + noise**2)  # the variance of x_0 given x_t
        variance = least + process.alphas_cumprod_at(t - 1) * (beta / noise**2) ** 2 * error
        least = least.clamp(min=process.posterior_variance(1, 0))
        v = 2 * (variance / least).log() / (beta / least).log() - 1
        return torch.cat([estimate if prediction == "x0" else (x - signal * estimate) / noise, v.expand_as(x)], dim=1)

    bits = bits_per_dim(process, best, x0, torch.zeros(8).long(), generator)
    entropy = math.log2(s * 127.5 * math.sqrt(2 * math.pi * math.e))
    assert bits.shape == (8,) and bits.mean().item() == pytest.approx(entropy, abs=0.03)


def test_bits_per_dim_count_what_is_left_of_the_image_in_x_T(monkeypatch):
    process = Diffusion()
    process.alphas_cumprod = torch.linspace(1, 0.9, 1000)  # most is left
    monkeypatch.setattr(learned_variance, "variational_bound", lambda process, x0, *_: torch.zeros(len(x0)))
    x0 = torch.rand(2, 1, 4, 4) * 2 - 1
    bits = bits_per_dim(process, lambda x, t, y: x, x0, torch.zeros(2).long(), torch.Generator())
    acp = process.alphas_cumprod[-1]
    kl = (acp * x0**2 + (1 - acp) - 1 - (1 - acp).log()) / 2
    assert torch.allclose(bits, kl.mean((1, 2, 3)) / math.log(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("process, network", [(Diffusion(), Oracle()), learned()])
def test_everything_runs_on_a_gpu_as_on_the_cpu(process, network):
    x0, noise, y = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 1, 8, 8), torch.tensor([0, 3, 10])
    t = torch.tensor([0, 1, 999])
    loss = process.loss(network, x0, y, drawn=(t, noise))
    on_gpu = process.loss(network, x0.cuda(), y.cuda(), drawn=(t.cuda(), noise.cuda()))
    assert torch.allclose(on_gpu.cpu(), loss, rtol=1e-3)
    for sampler in Diffusion.samplers:
        generator = torch.Generator("cuda").manual_seed(0)
        *_, x = process.sample(network, noise.cuda(), y.cuda(), steps=5, sampler=sampler, generator=generator)
        assert x.isfinite().all() and x.device.type == "cuda"
