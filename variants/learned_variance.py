"""A learned variance for the steps of ddpm, and the variational bound that teaches it (Nichol & Dhariwal, 2021).

How much noise should a step back add? The sensible extremes are the posterior's variance and beta. The network has 2C
channels; the second C, `leaning` from -1 (the least) to 1 (beta), choose between the two in logarithms:

    log variance = log least + (leaning + 1) / 2 * (log beta - log least)       eq. 15
    loss         = L_simple + 0.001 L_vlb, the second with its gradient kept from the mean     eq. 16

The bound is also a measure of its own: the bits that a model needs to tell an image (Ho et al., 2020, eq. 5).

Images x are (B, C, H, W) in [-1, 1], outputs of the network (B, 2C, H, W); t and t_next are ints or (B,).
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.distributions import Normal, kl_divergence

from diffusion import Diffusion
from support.command_line import counted


class LearnedVariance(Diffusion):
    """A Diffusion whose network also predicts the variance of ddpm's steps; all else is Diffusion's."""

    def loss(self, model: Callable, x0: Tensor, y: Tensor, generator: Generator | None = None, drawn=None) -> Tensor:
        """L_simple + 0.001 L_vlb, the sum of the T bounds (for uniform t), which teaches the variance alone."""
        t, noise = drawn or self.draw_noise(x0, generator)
        x = self.q_sample(x0, t, noise)
        output = model(x, t, y).float()
        mean, leaning = output.chunk(2, dim=1)
        simple = super().loss(lambda *_: mean, x0, y, drawn=(t, noise))
        bound = variational_bound(self, x0, x, t, torch.cat([mean.detach(), leaning], dim=1))
        return simple + 0.001 * self.num_timesteps * bound.mean()

    def predict_x0(self, output: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        """The estimate of x_0, by the first C channels."""
        return super().predict_x0(output.chunk(2, dim=1)[0], x, t)

    def log_variance(self, t: int | Tensor, t_next: int | Tensor, output: Tensor) -> Tensor:
        """Between the posterior's (leaning -1) and beta (1), by the last C channels (eq. 15)."""
        _, leaning = output.chunk(2, dim=1)
        log_beta = (1 - self.alphas_cumprod_at(t) / self.alphas_cumprod_at(t_next)).log()
        log_least = log_posterior_variance(self, t, t_next)
        return log_least + (leaning + 1) / 2 * (log_beta - log_least)


def log_posterior_variance(process: Diffusion, t: int | Tensor, t_next: int | Tensor) -> Tensor:
    """Of q(x_next | x_t, x_0); at the last step, where it would be -infinity, that of the step before stands in."""
    return process.posterior_variance(t, t_next).clamp(min=process.posterior_variance(1, 0).item()).log()


def variational_bound(process: Diffusion, x0: Tensor, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """Timestep t's term of the variational bound on -log2 p(x_0), in bits per dimension -> (B,).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) (Ho et al., eq. 5); at t = 0 -log p(x_0 | x_1), of the Gaussian's mass
    within half a grey level of each pixel's value, of 256 (their eq. 13).
    """

    def gaussian(x0: Tensor, log_variance: Tensor) -> Normal:
        scale = (log_variance / 2).exp().expand_as(x)
        return Normal(process.posterior_mean(x, x0, t, t - 1), scale, validate_args=False)

    log_least = log_posterior_variance(process, t, t - 1)
    learned = isinstance(process, LearnedVariance)
    p = gaussian(process.predict_x0(output, x, t), process.log_variance(t, t - 1, output) if learned else log_least)
    kl = kl_divergence(gaussian(x0, log_least), p)
    above, below = p.cdf(x0 + 1 / 255).masked_fill(x0 > 0.999, 1), p.cdf(x0 - 1 / 255).masked_fill(x0 < -0.999, 0)
    decoder = -(above - below).clamp(min=1e-12).log()
    return torch.where(t.view(-1, 1, 1, 1) == 0, decoder, kl).mean((1, 2, 3)) / math.log(2)


@torch.no_grad()
def bits_per_dim(process: Diffusion, model: Callable, x0: Tensor, y: Tensor, generator: Generator) -> Tensor:
    """The bound on -log2 p(x_0 | y) for images x0 (B, C, H, W) of 256 values, per dimension: (B,).

    All its T + 1 terms (Ho et al., 2020, eq. 5), each of the first T by one network call.
    """
    signal_scale, noise_scale = process.signal_and_noise(process.num_timesteps - 1)
    end, noise = Normal(signal_scale.to(x0) * x0, noise_scale.to(x0), validate_args=False), Normal(0.0, 1.0)
    prior = kl_divergence(end, noise)
    bits = prior.mean((1, 2, 3)) / math.log(2)
    for step in counted(range(process.num_timesteps), process.num_timesteps, "bits per dimension"):
        t = torch.full((len(y),), step, device=y.device)
        x = process.q_sample(x0, t, torch.randn(x0.shape, device=x0.device, generator=generator))
        bits += variational_bound(process, x0, x, t, model(x, t, y).float())
    return bits
