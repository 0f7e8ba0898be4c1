"""A config's way of sampling: as arguments of a process, in words, and what it costs."""

from typing import Any

import torch
from torch import Tensor

from config import Config
from support.checkpoint import build_process


def sampling_settings(config: Config) -> dict[str, Any]:
    """The arguments of a process's `sample` that a config decides."""
    settings = dict(steps=config.sample_steps, sampler=config.sampler, cfg_scale=config.cfg_scale)
    settings["cfg_interval"] = (config.cfg_low, config.cfg_high)
    return settings | ({"eta": config.eta} if config.process == "diffusion" else {})


def network_evaluations(config: Config) -> int:
    """Forward passes for one image, by the config's sampling fields; a guided step takes two, one of heun more."""

    class Counter:
        """A stand-in for the network that counts the images it is given."""

        in_channels, image_size, num_classes, images = 1, 1, 1, 0

        def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.images += len(x)
            return torch.zeros_like(x)

    counter, label = Counter(), torch.zeros(1, dtype=torch.int64)
    process = build_process(config.replace(learn_sigma=False))  # the counter has no variance to tell
    for _ in process.sample(counter, torch.zeros(1, 1, 1, 1), label, **sampling_settings(config)):
        pass
    return counter.images


def describe_sampling(config: Config) -> str:
    """A config's way of sampling, and its cost, in words."""
    guidance = f"guidance {config.cfg_scale}"
    if config.cfg_scale > 1 and (config.cfg_low, config.cfg_high) != (0, 1):
        guidance += f" at noise {config.cfg_low} to {config.cfg_high}"
    return (
        f"{config.sampler}, {config.sample_steps} steps, {guidance}: {network_evaluations(config)} network evaluations"
    )
