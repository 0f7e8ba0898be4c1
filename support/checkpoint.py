"""Files of weights: written atomically, read without trusting them, turned back into a model.

`model.pth` is {"model": state_dict, "config": dict}: all that is needed to sample. Files are read with
`weights_only=True`, which builds tensors and plain containers and refuses to run code. Published weights, which say
nothing of a config, are recognised by published.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config, UserError
from diffusion import Diffusion
from dit import DiT
from support.published import DOWNLOADS, optional, read_published, reason_of, sizes_of
from variants.flow_matching import FlowMatching


def save_file(content: Any, path: str | Path) -> None:
    """torch.save that leaves the old file or the new one, never a part: temporary file, flush, rename.

    Raises:
        UserError: if it cannot be written (disk full, no permission); what was there before is intact.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(f"cannot write {path} ({error}); free some space or choose another folder") from error


def load_file(path: str | Path) -> Any:
    """What save_file wrote, or a published file holds, on the CPU.

    Raises:
        UserError: if the file is missing, damaged, not one of torch's or safetensors', or holds more than plain data.
    """
    if not os.path.isfile(path):
        address = DOWNLOADS.get(os.path.basename(path))
        advice = f"download it from {address}" if address else "name a file of weights, such as runs/digits/model.pth"
        raise UserError(f"{path} {'is a folder' if os.path.isdir(path) else 'does not exist'}; {advice}")
    if str(path).endswith(".safetensors"):
        read = optional("safetensors.torch", str(path)).load_file
    else:
        read = functools.partial(torch.load, map_location="cpu", weights_only=True)
    try:
        # facebookresearch/DiT's train.py keeps its flags in a Namespace, which is plain data too.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of a foreign file's format: the error below says it all
            return read(path)
    except Exception as error:  # random bytes can fail in any way inside the reader
        raise UserError(f"{path} is damaged or not a file of weights ({type(error).__name__})") from error


def model_config(config: Config) -> dict[str, Any]:
    """What model.pth keeps of a Config: everything but the folders and device of the machine that trained it."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("data_dir", "out_dir", "device")}


def build_model(config: Config) -> DiT:
    """A fresh DiT of a config's sizes; its weights come from torch's global generator."""
    return DiT(
        image_size=config.image_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=config.num_classes,
        learn_sigma=config.learn_sigma,
        block=config.block,
        activation_checkpointing=config.activation_checkpointing,
    )


def build_process(config: Config) -> Diffusion | FlowMatching:
    """The process that a config names, with its own options."""
    shared = dict(prediction=config.prediction, time_sampling=config.time_sampling, time_mean=config.time_mean)
    if config.process == "flow_matching":
        return FlowMatching(**shared)
    own = dict(schedule=config.schedule, loss=config.loss, learn_sigma=config.learn_sigma, clip_x0=config.clip_x0)
    return Diffusion(**own, **shared)


def denoise(model: DiT, config: Config, y: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """x_T, ..., x_0 for the labels y (B,), each (B, C, H, W), drawn as the config's sampling fields say."""
    size = model.image_size
    noise = torch.randn(len(y), model.in_channels, size, size, device=y.device, generator=generator)
    return build_process(config).sample(
        model,
        noise,
        y,
        steps=config.sample_steps,
        sampler=config.sampler,
        cfg_scale=config.cfg_scale,
        cfg_interval=(config.cfg_low, config.cfg_high),
        generator=generator,
        **({"eta": config.eta} if config.process == "diffusion" else {}),
    )


class Counter:
    """A stand-in for the network that counts the images it is given."""

    in_channels, image_size, num_classes, images = 1, 1, 1, 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.images += len(x)
        return torch.zeros_like(x)


def network_evaluations(config: Config) -> int:
    """Forward passes for one image, by the config's sampling fields; a guided step takes two, one of heun more."""
    counter = Counter()
    config = config.replace(learn_sigma=False)  # the counter has no variance to tell
    list(denoise(counter, config, torch.zeros(1, dtype=torch.int64), torch.Generator()))
    return counter.images


def sampling_of(config: Config) -> str:
    """A config's way of sampling, and its cost, in words."""
    guidance = f"guidance {config.cfg_scale}"
    if config.cfg_scale != 1 and (config.cfg_low, config.cfg_high) != (0, 1):
        guidance += f" at noise {config.cfg_low} to {config.cfg_high}"
    return (
        f"{config.sampler}, {config.sample_steps} steps, {guidance}: {network_evaluations(config)} network evaluations"
    )


def read_config(values: Any, path: str | Path) -> Config:
    """A Config from what a file says of it, or UserError naming the file."""
    try:
        return Config(**values)
    except (TypeError, UserError) as error:
        raise UserError(f"{path} holds no usable config ({error})") from error


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[DiT, Config]:
    """The model of a model.pth or of published weights, in evaluation mode, and its config.

    Raises:
        UserError: if the file cannot be read, or its weights are not those of the model its config describes.
    """
    content = load_file(path)
    if isinstance(content, dict) and {"model", "config"} <= content.keys():
        config, state = read_config(content["config"], path), content["model"]
    else:
        config, state = read_published(content, path)
    try:
        for name, value in sizes_of(state).items():
            if getattr(config, name) != value:
                raise UserError(f"its weights have {name} {value}, but its config says {getattr(config, name)}")
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        with torch.device("meta"):  # sizes only, so that a lying config costs no memory
            model = build_model(config)
        for name, parameter in model.state_dict().items():
            shape = shapes.pop(name, "missing")
            if shape != tuple(parameter.shape):
                raise UserError(f"{name} is {shape}; in a model of its sizes it is {tuple(parameter.shape)}")
        if shapes:
            raise UserError(f"{next(iter(shapes))} is no part of a model of its sizes")
        model.to_empty(device=device).load_state_dict(state)
    except Exception as error:  # a file can lie in more ways than can be listed
        raise UserError(f"{path} holds no usable model: {reason_of(error)}") from error
    return model.eval(), config
