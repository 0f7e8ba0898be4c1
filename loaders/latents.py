"""Latents: each image is encoded once and packed; at each use a sample is drawn from its mean and deviation.

images (N, C, H, W) uint8 -> moments (N, 2C, h, w) float16 on disk -> x_0 (B, C, h, w) float32

The function that encodes is handed in, for a loader knows no model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from loaders.packing import Pack, check_room, new_pack, pack_once
from support.command_line import Progress
from support.errors import UserError

TOGETHER = 64  # images handed to the function that encodes


def pack_latents(
    name: str,
    images: Tensor,
    labels: Tensor,
    encode: Callable[[Tensor], Tensor],
    folder: Path,
    key: str,
    flip: bool,
    about: dict[str, Any],
) -> Pack:
    """The moments (N, 2C, h, w) float16 of images (N, C, H, W) uint8: what `folder` has of them, else encoded now.

    With `flip`, N more entries follow: that at i + N is of image i mirrored.

    Args:
        name: the data's, for messages.
        encode: uint8 images (B, C, H, W) -> moments (B, 2C, h, w), or (B, C, h, w) of latents without deviation.
        key: follows from the images.
        about: kept in the pack: class_names, and what support.autoencoder.about_vae says; its `vae` is a key too.

    Raises:
        UserError: if latents are too large for half precision, or the pack cannot be written; and as `encode` does.
    """
    key = f"{key}, vae {about['vae']}, {'with mirrored ones' if flip else 'as they are'}"

    sides = (False, True) if flip else (False,)

    def write() -> None:
        parts = [(start, mirrored) for mirrored in sides for start in range(0, len(images), TOGETHER)]
        with new_pack(folder, key, dict(about)) as new, Progress(len(parts), f"encoding {name}") as bar:
            for start, mirrored in parts:
                part = images[start : start + TOGETHER]
                moments = encode(part.flip(3) if mirrored else part).half().cpu()
                if not moments.isfinite().all():
                    raise UserError(f"{name}: its latents are beyond half precision, 65,504; use another autoencoder")
                if not new.labels:
                    check_room(folder, 2 * len(sides) * len(images) * moments[0].numel(), f"the latents of {name}")
                new.add(moments.numpy(), labels[start : start + TOGETHER].tolist())
                bar.update()

    return pack_once(folder, key, f"the latents of {name}", write)


def draw_latents(moments: Tensor, noise: Tensor | None, scale: float, shift: float) -> Tensor:
    """Moments (B, 2C, h, w) float16 -> x_0 (B, C, h, w) float32: (mean + deviation * noise - shift) * scale.

    Without noise there is no deviation: moments (B, C, h, w) are the latents.
    """
    latents = moments.float()
    if noise is not None:
        mean, std = latents.chunk(2, dim=1)
        latents = mean + std * noise.to(mean.device)
    return (latents - shift) * scale
