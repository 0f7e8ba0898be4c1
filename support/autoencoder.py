"""The autoencoder of models of latents: `diffusers`' AutoencoderKL, latents (B, C, h, w) <-> images (B, 3, H, W)."""

import json
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from support.errors import UserError, optional


def load_vae(folder: str | None, config: Config, device: str | torch.device = "cpu") -> torch.nn.Module | None:
    """The AutoencoderKL for a model of latents (clip_x0 off, and not 1 or 3 channels); None for a model of pixels.

    Raises:
        UserError: if one is needed and missing or given and not needed, for a folder that is none or of other
            latents, or without diffusers.
    """
    if config.clip_x0 or config.in_channels in (1, 3):
        if folder:
            raise UserError(f"--vae {folder}: the checkpoint draws pixels; leave it out")
        return None
    what = (
        "the folder of an AutoencoderKL, such as a download of huggingface.co/stabilityai/sd-vae-ft-ema: "
        "config.json and diffusion_pytorch_model.safetensors (or .bin)"
    )
    if not folder:
        raise UserError(
            f"the checkpoint draws latents of {config.in_channels} channels; "
            f"pip install diffusers and add --vae DIR, {what}"
        )
    AutoencoderKL = optional("diffusers", "--vae").AutoencoderKL
    try:
        if json.loads((Path(folder) / "config.json").read_text())["_class_name"] != "AutoencoderKL":
            raise ValueError("config.json names another class")
        safe = any(Path(folder).glob("*.safetensors"))  # given, as is low_cpu_mem_usage, to silence diffusers' advice
        vae = AutoencoderKL.from_pretrained(
            folder, local_files_only=True, use_safetensors=safe, low_cpu_mem_usage=False
        )
    except Exception as error:  # diffusers and what it reads with fail in many ways
        raise UserError(f"--vae {folder} holds no AutoencoderKL ({type(error).__name__}); name {what}") from error
    if vae.config.latent_channels != config.in_channels:
        channels = vae.config.latent_channels
        raise UserError(f"--vae {folder} decodes {channels} channels; the checkpoint draws {config.in_channels}")
    return vae.to(device).eval()


@torch.no_grad()
def decode(vae: torch.nn.Module | None, latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) -> images (N, 3, H, W) in about [-1, 1]; without a VAE they are the images.

    One at a time, for a VAE takes much memory.
    """
    if vae is None:
        return latents
    return torch.cat([vae.decode(latent / vae.config.scaling_factor).sample for latent in latents.split(1)])
