"""Consistency models: from noise to an image in one evaluation (Song et al., 2023), by easy tuning (Geng et al., 2024).

Without fresh noise the way from x_T to x_0 is a path, and each point of it has one end. A consistency function tells it
at once, f(x_t, t) = x_0, so that f is the same at all points of a path:

    boundary   f(x_t, t) = c_skip(t) x_t + c_out(t) network(x_t, t, y);  c_skip = 1 and c_out = 0 at t = 0
    training   f(x_t, t) learns f(x_r, r), no gradient, at an earlier r < t on the path; r -> t as training goes on
    path       from x_t to x_r by one step of DDIM, with the guided estimate of x_0 of a teacher: the weights that the
               run starts from. So the guidance ends up in the weights, and sampling needs none
    reverse    x_0 = f(x_T, T - 1); for more steps: noise it again, to a lower level, and repeat (Song et al., alg. 1)

The same two methods as `Diffusion`, and its schedule. The network predicts x_0, as the weights that it starts from do:
where there is little noise that is nearly the end of the path, and from there it spreads to where there is much.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor, nn

from diffusion import Diffusion, forgive_overshoot, guidance_at, guided

SIGMA_DATA, TIME_SCALE = 0.5, 10.0  # of the boundary: but for t = 0, f is nearly the network alone (Luo et al., 2023)
FIRST_GAP, STAGES = 400, 4  # t - r at first; it is halved at each further stage of training
ANCHOR = 200  # r below that is 0: the teacher knows the end from there, and no error of the student's enters
HUBER = 0.00054  # where the loss turns from a square into a norm, per dimension (Song & Dhariwal, 2024, section 3.3)


class ConsistencyModel(Diffusion):
    """A consistency function with its tuning and its sampler.

    Args:
        schedule, time_sampling, time_mean, clip_x0, num_timesteps: as Diffusion has them.
        teacher: the frozen network whose paths are learned, which predicts x_0; only training needs it.
        teacher_cfg_scale, cfg_low, cfg_high: its guidance, and the noise levels above and up to which it guides.
        precision: "bf16" if the teacher computes by autocast.
    """

    samplers = ("consistency",)

    def __init__(
        self,
        schedule: str = "cosine",
        time_sampling: str = "uniform",
        time_mean: float = 0.0,
        clip_x0: bool = True,
        teacher: nn.Module | None = None,
        teacher_cfg_scale: float = 1.0,
        cfg_low: float = 0.0,
        cfg_high: float = 1.0,
        precision: str = "fp32",
        num_timesteps: int = 1000,
    ):
        super().__init__(schedule, "x0", "mse", time_sampling, time_mean, clip_x0, num_timesteps)
        self.teacher, self.precision = teacher, precision
        if teacher:
            levels = ((t + 1) / num_timesteps for t in range(num_timesteps))
            scales = [guidance_at(level, teacher_cfg_scale, (cfg_low, cfg_high)) for level in levels]
            self.scales = torch.tensor(scales, device=next(teacher.parameters()).device).view(-1, 1, 1, 1)

    def draw_noise(self, x0: Tensor, generator: Generator | None = None, progress: float = 1) -> tuple[Tensor, ...]:
        """What is random in the loss of x0 (B, C, H, W): t (B,), r (B,) at this progress, 0 to 1, and noise like x0."""
        t, noise = super().draw_noise(x0, generator)
        gap = FIRST_GAP // 2 ** min(int(progress * STAGES), STAGES - 1)
        r = (t - gap).clamp(min=0)
        return t, torch.where(r < ANCHOR, 0, r), noise

    def consistency(self, output: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        """f(x_t, t), from the network's output at x_t."""
        scaled = TIME_SCALE * (t if isinstance(t, int) else t.view(-1, 1, 1, 1))
        sum_of_squares = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / sum_of_squares * x + scaled / sum_of_squares**0.5 * output

    def predict_x0(self, output: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        """f(x_t, t), clipped where clip_x0 says so."""
        return super().predict_x0(self.consistency(output, x, t), x, t)

    def step_back(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """x_r on the teacher's guided path through x_t."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = guided(self.teacher, x, t, y, self.scales[t]).float()
        return self.ddim_step(x, super().predict_x0(output, x, t), t, r, None, 0.0)

    def loss(self, model: Callable, x0: Tensor, y: Tensor, generator: Generator | None = None, drawn=None) -> Tensor:
        """The distance of f(x_t, t) from f(x_r, r): x0 (B, C, H, W) in [-1, 1], y (B,) -> scalar.

        It is each image's pseudo-Huber distance, nearly a norm: far images do not outweigh the near ones.
        """
        t, r, noise = drawn or self.draw_noise(x0, generator)
        x = self.q_sample(x0, t, noise)
        with torch.no_grad():
            x_r = self.step_back(x, t, r, y)
            target = self.predict_x0(model(x_r, r, y).float(), x_r, r)
        output = self.consistency(model(x, t, y).float(), x, t)
        target = forgive_overshoot(target, output) if self.clip_x0 else target
        return (((output - target) ** 2).mean((1, 2, 3)) + HUBER**2).sqrt().mean() - HUBER

    @torch.no_grad()
    def sample(
        self,
        model: Callable,
        noise: Tensor,
        y: Tensor,
        steps: int = 2,
        sampler: str = "consistency",
        cfg_scale: float = 1.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yields x_T = noise (B, C, H, W), then an x for each of the steps, x_0 last; arguments as Diffusion's.

        The generator is the source of the noise that each step but the last adds.

        Raises:
            ValueError: for another sampler, or a cfg_scale other than 1: the guidance is in the weights.
        """
        if sampler not in self.samplers:
            raise ValueError(f"sampler {sampler!r} is not one of {', '.join(self.samplers)}")
        if cfg_scale != 1:
            raise ValueError(f"cfg_scale {cfg_scale} is not 1: a consistency model's guidance is in its weights")
        timesteps = self.timesteps(steps)
        x = noise
        yield x
        for t, t_next in zip(timesteps, [*timesteps[1:], None]):
            x = self.predict_x0(model(x, torch.full((len(x),), t, device=x.device), y), x, t)
            if t_next is not None:
                x = self.q_sample(x, t_next, torch.randn(x.shape, device=x.device, generator=generator))
            yield x
