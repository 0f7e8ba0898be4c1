"""DDPM: noise added step by step, and the reverse process that a network learns (Ho et al., 2020).

    forward   q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, (1 - alphas_cumprod_t) I)            eq. 4
    training  x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise; the network is given
              x_t and t and learns the noise (eq. 14), or x_0, or v = sqrt(acp) noise - sqrt(1 - acp) x_0
              (Salimans & Ho, 2022)
    reverse   from x_T ~ N(0, I): estimate x_0, step a little towards it, repeat                eq. 7

Images x are (B, C, H, W) in [-1, 1]; timesteps t (B,) int64 in [0, T), T = 1000. They count from 0 as arrays do: x at
t = 0 is already a little noisy. It is the papers' x_1, and their clean x_0 stands one step before it, at t = -1.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def linear_alphas_cumprod(num_timesteps: int) -> Tensor:
    """beta from 1e-4 to 0.02 in a straight line (Ho et al., 2020, section 4) -> (T,) float64.

    That is for T = 1000; fewer steps are larger in proportion, so that as little is left of the image at the end.
    """
    betas = torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64) * (1000 / num_timesteps)
    return (1 - betas.clamp(max=0.999)).cumprod(0)


def cosine_alphas_cumprod(num_timesteps: int) -> Tensor:
    """A squared cosine, every beta at most 0.999 (Nichol & Dhariwal, 2021, eq. 17) -> (T,) float64."""
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


SCHEDULES = {"linear": linear_alphas_cumprod, "cosine": cosine_alphas_cumprod}
PREDICTIONS = ("noise", "x0", "v")
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}
TIME_SAMPLINGS = ("uniform", "logit_normal")


def draw_time(count: int, sampling: str, mean: float, device: torch.device, generator: Generator | None) -> Tensor:
    """Training's random times, 0 (data) to 1 (noise) -> (count,): "uniform", or "logit_normal", sigmoid(N(mean, 1)).

    The logit-normal spares the two ends, where there is little to learn (Esser et al., 2024, section 3.1).
    """
    if sampling == "uniform":
        return torch.rand(count, device=device, generator=generator)
    return (mean + torch.randn(count, device=device, generator=generator)).sigmoid()


def forgive_overshoot(target: Tensor, x0: Tensor, limit: float = 1.1) -> Tensor:
    """The target of an estimate x0, except that black may be answered by up to -limit and white by up to limit.

    Pixels are clipped to [-1, 1] in the end, so those are no errors. Were they punished, the estimates would scatter
    about -1 wherever the image is black, and clipping would leave grey grain there. In colour it is so in each channel.
    """
    beyond = (target.abs() == 1) & (x0 * target > 1)
    return torch.where(beyond, x0.detach().clamp(-limit, limit), target)


def guidance_at(noise_level: float, cfg_scale: float, cfg_interval: tuple[float, float]) -> float:
    """cfg_scale where the noise level is above the interval's first and at most its second end, else 1: no guidance.

    A scale below 1 listens less to the label, 0 not at all; that is no exaggeration, and holds everywhere.
    """
    low, high = (end + 1e-9 for end in cfg_interval)  # a level meant to be 0.15 may be 0.15000000000000002
    return cfg_scale if cfg_scale < 1 or low < noise_level <= high else 1.0


def guided(model: Callable, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, 2022): unconditional + cfg_scale * (conditional - unconditional).

    Guidance without a classifier: the same network, told no label, says what every image has in common, and what the
    label adds is exaggerated. cfg_scale 1 is the conditional model alone, one network evaluation an image; anything
    else costs two. (The paper's w counts from there: cfg_scale = w + 1.)
    """
    if not isinstance(cfg_scale, Tensor) and cfg_scale == 1:
        return model(x, t, y)
    null = torch.full_like(y, model.num_classes)
    conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
    output = unconditional + cfg_scale * (conditional - unconditional)
    C = x.shape[1]
    return torch.cat([output[:, :C], conditional[:, C:]], dim=1)  # a learned variance is the conditional one


class Diffusion:
    """A noise schedule with its training loss and its reverse process.

    Args:
        schedule: "linear" or "cosine".
        prediction: what the network's output means: "noise", "x0" or "v".
        loss: "mse" or "l1", between that output and its target.
        time_sampling, time_mean: how training draws t (see draw_time).
        clip_x0: clip each estimate of x_0 to [-1, 1] while sampling; right for pixels, wrong for latents.
        num_timesteps: T.

    Raises:
        ValueError: for an unknown schedule, prediction, loss or time_sampling.
    """

    samplers = ("ddpm", "ddim", "dpm++")

    def __init__(
        self,
        schedule: str = "linear",
        prediction: str = "noise",
        loss: str = "mse",
        time_sampling: str = "uniform",
        time_mean: float = 0.0,
        clip_x0: bool = True,
        num_timesteps: int = 1000,
    ):
        checks = ((schedule, SCHEDULES), (prediction, PREDICTIONS), (loss, LOSSES), (time_sampling, TIME_SAMPLINGS))
        for value, known in checks:
            if value not in known:
                raise ValueError(f"{value!r} is not one of {', '.join(known)}")
        self.prediction = prediction
        self.time_sampling, self.time_mean = time_sampling, time_mean
        self.loss_function = LOSSES[loss]
        self.clip_x0, self.num_timesteps = clip_x0, num_timesteps
        self.alphas_cumprod = SCHEDULES[schedule](num_timesteps).float()
        self.tables: dict[torch.device, Tensor] = {}  # of alphas_cumprod_at

    def alphas_cumprod_at(self, t: int | Tensor) -> Tensor:
        """alphas_cumprod of t (B,) -> (B, 1, 1, 1), of an int -> (); past the last step, at t = -1, 1: no noise."""
        device = torch.device("cpu") if isinstance(t, int) else t.device
        if device not in self.tables:  # made once, for a GPU would wait for each copy
            self.tables[device] = F.pad(self.alphas_cumprod, (1, 0), value=1.0).to(device)
        values = self.tables[device][t + 1]
        return values if isinstance(t, int) else values.view(-1, 1, 1, 1)

    def signal_and_noise(self, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alphas_cumprod_t), sqrt(1 - alphas_cumprod_t): t (B,) -> two (B, 1, 1, 1), an int -> two ()."""
        alphas_cumprod = self.alphas_cumprod_at(t)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t given x_0 and noise of its shape, in one jump (Ho et al., eq. 4)."""
        signal_scale, noise_scale = self.signal_and_noise(t)
        return signal_scale * x0 + noise_scale * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should answer to x_t, of the shape of x0."""
        if self.prediction == "noise":
            return noise
        if self.prediction == "x0":
            return x0
        signal_scale, noise_scale = self.signal_and_noise(t)
        return signal_scale * noise - noise_scale * x0

    def draw_noise(self, x0: Tensor, generator: Generator | None = None, progress: float = 1) -> tuple[Tensor, Tensor]:
        """What is random in the loss of x0 (B, C, H, W), at any progress: timesteps (B,) and noise (B, C, H, W)."""
        time = draw_time(len(x0), self.time_sampling, self.time_mean, x0.device, generator)
        t = (time * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        return t, torch.randn(x0.shape, device=x0.device, generator=generator)

    def loss(self, model: Callable, x0: Tensor, y: Tensor, generator: Generator | None = None, drawn=None) -> Tensor:
        """L_simple (Ho et al., eq. 14): x0 (B, C, H, W) in [-1, 1], y (B,) -> scalar; drawn: what draw_noise drew."""
        t, noise = drawn or self.draw_noise(x0, generator)
        output = model(self.q_sample(x0, t, noise), t, y).float()
        target = self.target(x0, t, noise)
        if self.prediction == "x0" and self.clip_x0:
            target = forgive_overshoot(target, output)
        return self.loss_function(output, target)

    def predict_x0(self, output: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        """The estimate of x_0 that a prediction at x_t amounts to, clipped where clip_x0 says so."""
        signal_scale, noise_scale = self.signal_and_noise(t)
        if self.prediction == "noise":
            x0 = (x - noise_scale * output) / signal_scale
        elif self.prediction == "x0":
            x0 = output
        else:
            x0 = signal_scale * x - noise_scale * output
        return x0.clamp(-1, 1) if self.clip_x0 else x0

    def posterior_mean(self, x: Tensor, x0: Tensor, t: int | Tensor, t_next: int | Tensor) -> Tensor:
        """Mean of q(x_next | x_t, x_0) (Ho et al., eq. 7)."""
        acp, acp_next = self.alphas_cumprod_at(t), self.alphas_cumprod_at(t_next)
        alpha = acp / acp_next
        return acp_next.sqrt() * (1 - alpha) / (1 - acp) * x0 + alpha.sqrt() * (1 - acp_next) / (1 - acp) * x

    def posterior_variance(self, t: int | Tensor, t_next: int | Tensor) -> Tensor:
        """Variance of q(x_next | x_t, x_0) (Ho et al., eq. 7); 0 at the last step."""
        acp, acp_next = self.alphas_cumprod_at(t), self.alphas_cumprod_at(t_next)
        return (1 - acp_next) / (1 - acp) * (1 - acp / acp_next)

    def timesteps(self, steps: int) -> list[int]:
        """`steps` of the T timesteps, falling, evenly spaced, the first T - 1 ("trailing"; Lin et al., 2024)."""
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"sample_steps {steps} is not between 1 and {self.num_timesteps}")
        return [round(self.num_timesteps - i * self.num_timesteps / steps) - 1 for i in range(steps)]

    @torch.no_grad()
    def sample(
        self,
        model: Callable,
        noise: Tensor,
        y: Tensor,
        steps: int = 50,
        sampler: str = "ddim",
        cfg_scale: float = 1.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generator | None = None,
        eta: float = 0.0,
    ) -> Iterator[Tensor]:
        """The reverse process: yields x_T = noise (B, C, H, W), then every x after it, x_0 last: steps + 1 in all.

        Args:
            y: labels (B,); model.num_classes means "any".
            steps: how many of the T timesteps to call the network at, 1 to T.
            sampler: "ddpm" (ancestral; Ho et al., 2020), "ddim" (Song et al., 2021) or "dpm++" (Lu et al., 2022).
            cfg_scale: guidance, 1 for none.
            cfg_interval: guide only where the noise level (t + 1) / T is above the first and at most the second of
                these: early guidance costs variety, late guidance does little (Kynkaanniemi et al., 2024).
            generator: source of the noise that ddpm adds, and ddim with eta.
            eta: ddim's share of that noise, 0 (none) to 1 (as much as ddpm).

        Raises:
            ValueError: for a number of steps outside 1 ... T or an unknown sampler.
        """
        if sampler not in self.samplers:
            raise ValueError(f"sampler {sampler!r} is not one of {', '.join(self.samplers)}")
        timesteps = self.timesteps(steps)
        x, last = noise, None
        yield x
        for t, t_next in zip(timesteps, timesteps[1:] + [-1]):
            scale = guidance_at((t + 1) / self.num_timesteps, cfg_scale, cfg_interval)
            output = guided(model, x, torch.full((len(x),), t, device=x.device), y, scale)
            x0 = self.predict_x0(output, x, t)
            z = torch.randn(x.shape, device=x.device, generator=generator) if sampler == "ddpm" or eta else None
            if sampler == "ddpm":
                x = self.ddpm_step(x, x0, t, t_next, z, output)
            elif sampler == "ddim":
                x = self.ddim_step(x, x0, t, t_next, z, eta)
            else:
                x = self.dpm_solver_step(x, x0, t, t_next, last)
            last = (x0, t)
            yield x

    def ddpm_step(self, x: Tensor, x0: Tensor, t: int, t_next: int, z: Tensor, output: Tensor) -> Tensor:
        """A draw from q(x_next | x_t, x_0), for the estimate of x_0 (Ho et al., algorithm 2)."""
        x = self.posterior_mean(x, x0, t, t_next)
        return x + (self.log_variance(t, t_next, output) / 2).exp() * z if t_next >= 0 else x

    def log_variance(self, t: int | Tensor, t_next: int | Tensor, output: Tensor) -> Tensor:
        """Of a step of ddpm: the posterior's. variants/learned_variance.py has the network's output choose it."""
        return self.posterior_variance(t, t_next).log()

    def ddim_step(self, x: Tensor, x0: Tensor, t: int, t_next: int, z: Tensor | None, eta: float) -> Tensor:
        """x_0 and the noise that x_t then holds, mixed anew in t_next's proportions (Song et al., eq. 12)."""
        acp, acp_next = self.alphas_cumprod_at(t), self.alphas_cumprod_at(t_next)
        noise = (x - acp.sqrt() * x0) / (1 - acp).sqrt()
        sigma = eta * self.posterior_variance(t, t_next).sqrt()
        x = acp_next.sqrt() * x0 + (1 - acp_next - sigma**2).clamp(min=0).sqrt() * noise  # rounding may fall below 0
        return x if z is None else x + sigma * z

    def dpm_solver_step(self, x: Tensor, x0: Tensor, t: int, t_next: int, last: tuple[Tensor, int] | None) -> Tensor:
        """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2): the step for an x_0 that moves in a straight line.

        The line is drawn through this estimate of x_0 and the last one, in time lambda = log(signal / noise), which is
        half the logit of alphas_cumprod.
        """
        if t_next < 0:
            return x0
        acp, acp_next = self.alphas_cumprod_at(t), self.alphas_cumprod_at(t_next)
        lambda_t = acp.logit() / 2
        h = acp_next.logit() / 2 - lambda_t
        if last is not None:
            x0_last, t_last = last
            h_last = lambda_t - self.alphas_cumprod[t_last].logit() / 2
            x0 = x0 + (x0 - x0_last) * h / h_last / 2  # where the line is half way to t_next
        return ((1 - acp_next) / (1 - acp)).sqrt() * x - acp_next.sqrt() * torch.expm1(-h) * x0
