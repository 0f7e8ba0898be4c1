"""Rectified flow: straight lines from noise to data, and the velocity along them (Liu et al., 2023).

    forward   x_t = (1 - t) x_0 + t noise,  t from 0 (data) to 1 (noise)
    training  the network is given x_t and 1000 t and learns the velocity dx/dt = noise - x_0
              (Lipman et al., 2023; t from a logit-normal: Esser et al., 2024, section 3.1)
    reverse   from x_1 ~ N(0, I): follow the velocity from t = 1 to t = 0 on a uniform grid

The same two methods as `Diffusion`, and interchangeable with it.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffusion import guided

TIME_SAMPLINGS = ("logit_normal", "uniform")
NUM_TIMESTEPS = 1000  # the network sees 1000 t, as it sees the timesteps of a diffusion


class FlowMatching:
    """Rectified flow with its training loss and its reverse process.

    Args:
        time_sampling: how training draws t: "logit_normal", sigmoid(N(0, 1)), or "uniform" in [0, 1).

    Raises:
        ValueError: for an unknown time_sampling.
    """

    samplers = ("euler", "heun")

    def __init__(self, time_sampling: str = "logit_normal"):
        if time_sampling not in TIME_SAMPLINGS:
            raise ValueError(f"{time_sampling!r} is not one of {', '.join(TIME_SAMPLINGS)}")
        self.time_sampling = time_sampling

    def loss(self, model: Callable, x0: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """The training loss at a random t for each image: x0 (B, C, H, W) in [-1, 1], y (B,) -> scalar."""
        draw = torch.randn if self.time_sampling == "logit_normal" else torch.rand
        t = draw(len(x0), device=x0.device, generator=generator)
        if self.time_sampling == "logit_normal":
            t = t.sigmoid()
        noise = torch.randn(x0.shape, device=x0.device, generator=generator)
        x = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        output = model(x, NUM_TIMESTEPS * t, y)
        return F.mse_loss(output.float(), noise - x0)

    @torch.no_grad()
    def sample(
        self,
        model: Callable,
        noise: Tensor,
        y: Tensor,
        steps: int = 50,
        sampler: str = "euler",
        cfg_scale: float = 1.0,
        generator: Generator | None = None,
    ) -> Iterator[Tensor]:
        """The reverse process: yields x_1 = noise (B, C, H, W), then every x after it, x_0 last: steps + 1 in all.

        Args:
            y: labels (B,); model.num_classes means "any".
            steps: of the uniform grid from 1 to 0.
            sampler: "euler", or "heun": the mean of the velocities at a step's two ends, of second order.
            cfg_scale: guidance, 1 for none.
            generator: not used; the way back is not random.
        """
        if sampler not in self.samplers:
            raise ValueError(f"sampler {sampler!r} is not one of {', '.join(self.samplers)}")
        if steps < 1:
            raise ValueError(f"sample_steps {steps} is not at least 1")

        def velocity(x: Tensor, t: float) -> Tensor:
            return guided(model, x, torch.full((len(x),), NUM_TIMESTEPS * t, device=x.device), y, cfg_scale)

        times = [1 - i / steps for i in range(steps + 1)]
        x = noise
        yield x
        for t, t_next in zip(times, times[1:]):
            slope = velocity(x, t)
            if sampler == "heun":
                slope = (slope + velocity(x + (t_next - t) * slope, t_next)) / 2
            x = x + (t_next - t) * slope
            yield x
