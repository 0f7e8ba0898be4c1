"""The autoencoder of models of latents: `diffusers`' AutoencoderKL, latents (B, C, h, w) <-> images (B, 3, H, W)."""

import json
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from support.errors import UserError, optional
from support.files import warn


def load_vae(folder: str | None, config: Config, device: str | torch.device = "cpu") -> torch.nn.Module | None:
    """The AutoencoderKL for a model of latents (clip_x0 off); None for a model of pixels.

    Without a folder, 1 or 3 channels are taken for those of pixels, which is said on stderr.

    Args:
        folder: the autoencoder's, or that of a pipeline of diffusers', in which it is `vae`.

    Raises:
        UserError: if one is needed and missing or given and not needed, for a folder that is none or of other
            latents or lacks weights, or without diffusers.
    """
    if config.clip_x0:
        if folder:
            raise UserError(f"--vae {folder}: the checkpoint draws pixels; leave it out")
        return None
    if not folder and config.in_channels in (1, 3):
        warn(f"{config.in_channels} channels are taken for those of pixels; if they are latents', add --vae DIR")
        return None
    what = (
        "the folder of an AutoencoderKL, such as a download of huggingface.co/stabilityai/sd-vae-ft-ema: "
        "config.json and diffusion_pytorch_model.safetensors (or .bin); a pipeline's folder will do too"
    )
    if not folder:
        raise UserError(
            f"the checkpoint draws latents of {config.in_channels} channels; "
            f"pip install diffusers and add --vae DIR, {what}"
        )
    AutoencoderKL = optional("diffusers", "--vae").AutoencoderKL
    if (Path(folder) / "vae").is_dir():
        folder = str(Path(folder) / "vae")
    try:
        if json.loads((Path(folder) / "config.json").read_text())["_class_name"] != "AutoencoderKL":
            raise ValueError("config.json names another class")
        safe = any(Path(folder).glob("*.safetensors"))  # given, as is low_cpu_mem_usage, to silence diffusers' advice
        options = dict(local_files_only=True, use_safetensors=safe, low_cpu_mem_usage=False, output_loading_info=True)
        vae, loaded = AutoencoderKL.from_pretrained(folder, **options)
        lacks = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
        if lacks:  # diffusers draws them at random, and goes on
            raise ValueError(f"it lacks {lacks[0]}")
    except Exception as error:  # diffusers and what it reads with fail in many ways
        why = error if isinstance(error, ValueError) and "\n" not in str(error) else type(error).__name__
        raise UserError(f"--vae {folder} holds no AutoencoderKL ({why}); name {what}") from error
    if vae.config.latent_channels != config.in_channels:
        channels = vae.config.latent_channels
        raise UserError(f"--vae {folder} decodes {channels} channels; the checkpoint draws {config.in_channels}")
    if vae.config.get("latents_mean") or vae.config.get("latents_std"):
        raise UserError(f"--vae {folder} has a mean and deviation for each channel of latents, which is not supported")
    return vae.to(device).eval()


@torch.no_grad()
def decode(vae: torch.nn.Module | None, latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) -> images (N, 3, H, W) in about [-1, 1]; without a VAE they are the images.

    One at a time, for a VAE takes much memory.
    """
    if vae is None:
        return latents
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    return torch.cat([vae.decode(latent / scale + shift).sample for latent in latents.split(1)])
