"""Rectified flow: straight lines from noise to data, and the velocity along them (Liu et al., 2023).

    forward   x_t = (1 - t) x_0 + t noise,  t from 0 (data) to 1 (noise); the paper's time runs the other way
    training  the network is given x_t and 1000 t and learns the velocity dx/dt = noise - x_0
              (Lipman et al., 2023; t from a logit-normal: Esser et al., 2024, section 3.1),
              or x_0, from which the velocity follows: (x_t - x_0) / t (Li & He, 2025)
    reverse   from x_1 ~ N(0, I): follow the velocity from t = 1 to t = 0 on a uniform grid

The same two methods as `Diffusion`, and interchangeable with it.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffusion import TIME_SAMPLINGS, draw_time, forgive_overshoot, guidance_at, guided

PREDICTIONS = ("x0", "v")
NUM_TIMESTEPS = 1000  # the network sees 1000 t, as it sees the timesteps of a diffusion


class FlowMatching:
    """Rectified flow with its training loss and its reverse process.

    Args:
        prediction: what the network's output means: "v", the velocity, or "x0".
        time_sampling, time_mean: how training draws t (see diffusion.draw_time).

    Raises:
        ValueError: for an unknown prediction or time_sampling.
    """

    samplers = ("euler", "heun")

    def __init__(self, prediction: str = "v", time_sampling: str = "logit_normal", time_mean: float = 0.0):
        for value, known in ((prediction, PREDICTIONS), (time_sampling, TIME_SAMPLINGS)):
            if value not in known:
                raise ValueError(f"{value!r} is not one of {', '.join(known)}")
        self.prediction = prediction
        self.time_sampling, self.time_mean = time_sampling, time_mean

    def draw_noise(self, x0: Tensor, generator: Generator | None = None, progress: float = 1) -> tuple[Tensor, Tensor]:
        """What is random in the loss of x0 (B, C, H, W), at any progress: times (B,) in [0, 1] and noise like it."""
        t = draw_time(len(x0), self.time_sampling, self.time_mean, x0.device, generator)
        return t, torch.randn(x0.shape, device=x0.device, generator=generator)

    def loss(self, model: Callable, x0: Tensor, y: Tensor, generator: Generator | None = None, drawn=None) -> Tensor:
        """The training loss: x0 (B, C, H, W) in [-1, 1], y (B,), what `draw_noise` draws, or `drawn` -> scalar."""
        t, noise = drawn or self.draw_noise(x0, generator)
        x = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        output = model(x, NUM_TIMESTEPS * t, y).float()
        target = forgive_overshoot(x0, output) if self.prediction == "x0" else noise - x0
        return F.mse_loss(output, target)

    @torch.no_grad()
    def sample(
        self,
        model: Callable,
        noise: Tensor,
        y: Tensor,
        steps: int = 50,
        sampler: str = "euler",
        cfg_scale: float = 1.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generator | None = None,
    ) -> Iterator[Tensor]:
        """The reverse process: yields x_1 = noise (B, C, H, W), then every x after it, x_0 last: steps + 1 in all.

        Args:
            y: labels (B,); model.num_classes means "any".
            steps: of the uniform grid from 1 to 0.
            sampler: "euler", or "heun": the mean of the velocities at a step's two ends, of second order; the last
                step is Euler's, since an estimate of x_0 gives no velocity at t = 0 (Karras et al., 2022, algorithm 1).
            cfg_scale: guidance, 1 for none.
            cfg_interval: guide only where t is above the first and at most the second of these.
            generator: not used; the way back is not random.
        """
        if sampler not in self.samplers:
            raise ValueError(f"sampler {sampler!r} is not one of {', '.join(self.samplers)}")
        if steps < 1:
            raise ValueError(f"sample_steps {steps} is not at least 1")

        def velocity(x: Tensor, t: float) -> Tensor:
            scale = guidance_at(t, cfg_scale, cfg_interval)
            output = guided(model, x, torch.full((len(x),), NUM_TIMESTEPS * t, device=x.device), y, scale)
            return (x - output) / t if self.prediction == "x0" else output

        times = [1 - i / steps for i in range(steps + 1)]
        x = noise
        yield x
        for t, t_next in zip(times, times[1:]):
            slope = velocity(x, t)
            if sampler == "heun" and t_next > 0:
                slope = (slope + velocity(x + (t_next - t) * slope, t_next)) / 2
            x = x + (t_next - t) * slope
            yield x
