"""Pictures of images: a grid, the strip from noise to image, an animation."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset import denormalize
from support.files import writing


def mosaic(images: Tensor, columns: int) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1], row by row, in grey borders -> one picture (height, width, 3) uint8.

    One channel is grey, three are colours; of any other number each is shown as a grey picture of its own.
    """
    tiles = denormalize(images).cpu()
    if tiles.shape[1] not in (1, 3):
        tiles, columns = tiles.flatten(0, 1).unsqueeze(1), columns * tiles.shape[1]
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    border = int(len(tiles) > 1)
    tiles = F.pad(tiles.expand(-1, 3, -1, -1), (border, 0, border, 0), value=64)  # at the left and above
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(tiles)), value=64)
    picture = tiles.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return F.pad(picture, (0, 0, 0, border, 0, border), value=64).numpy()


def frames_shown(steps: int, most: int) -> list[int]:
    """At most `most` of the steps + 1 frames from noise to image, evenly spaced, the first and the last among them.

    Where the steps do not divide well, the gap after the noise is shorter than the others.
    """
    exact = [stride for stride in range(1, steps + 1) if steps % stride == 0 and most / 2 <= steps / stride + 1 <= most]
    stride = exact[0] if exact else math.ceil(steps / (most - 1))
    return [0, *sorted(range(steps, 0, -stride))]


def save_strip(frames: dict[int, Tensor], labels: list[int], path: str | Path) -> None:
    """The progression: a row per label; frames are the images after so many steps, each (B, C, H, W)."""
    from matplotlib.figure import Figure  # here, for it takes a second that grids and arrays need not wait

    rows = torch.stack(list(frames.values()), dim=1).flatten(0, 1)  # label by label
    picture = mosaic(rows, len(frames))
    pitch = rows.shape[-1] + 1  # an image, or one of its channels, and the border
    height, width = (side // pitch for side in picture.shape[:2])
    figure = Figure(figsize=(0.6 * width + 0.6, 0.6 * height + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([pitch * width / len(frames) * (i + 0.5) for i in range(len(frames))], list(frames))
    axes.set_yticks([pitch * (i + 0.5) for i in range(len(labels))], labels)
    axes.set(xlabel="denoising steps taken", ylabel="label")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    with writing(path) as file:
        # Large images at about their own size, as long as matplotlib can draw so many pixels.
        figure.savefig(file, format="png", dpi=min(max(100, pitch / 0.6), 65_000 / max(figure.get_size_inches())))


def save_gif(frames: list[Tensor], path: str | Path) -> None:
    """The same as an animation: all labels side by side, about four seconds and a pause at the end."""
    pictures = [Image.fromarray(mosaic(frame, 10)) for frame in frames]
    zoom = 3 if pictures[0].width < 400 else 1
    pictures = [picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST) for picture in pictures]
    durations = [80] * (len(pictures) - 1) + [2000]  # milliseconds
    with writing(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_png(images: Tensor, path: str | Path, columns: int) -> None:
    """Images (N, C, H, W) in [-1, 1] as a grid."""
    picture = Image.fromarray(mosaic(images, columns))
    with writing(path) as file:
        picture.save(file, "PNG")


def save_loss_plot(path: Path, rows: list[str]) -> None:
    """loss.csv as a picture."""
    from matplotlib.figure import Figure  # here, for it takes a second
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([int(row.split(",")[0]) for row in rows], [float(row.split(",")[1]) for row in rows])
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    with writing(path) as file:
        figure.savefig(file, format="png", dpi=120)
