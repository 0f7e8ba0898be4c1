"""Pictures of images: a grid, the strip from noise to image, an animation, a folder of PNGs."""

import math
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from dataset import denormalize, normalize
from support.errors import UserError, one_line
from support.files import check_new_folder, writing, writing_folder

BORDER = 64  # the grey between images


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
    tiles = F.pad(tiles.expand(-1, 3, -1, -1), (border, 0, border, 0), value=BORDER)  # at the left and above
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(tiles)), value=BORDER)
    picture = tiles.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return F.pad(picture, (0, 0, 0, border, 0, border), value=BORDER).numpy()


def frames_shown(steps: int, most: int) -> list[int]:
    """At most `most` of the steps + 1 frames from noise to image, evenly spaced, the first and the last among them.

    Where the steps do not divide well, the gap after the noise is shorter than the others.
    """
    exact = [stride for stride in range(1, steps + 1) if steps % stride == 0 and most / 2 <= steps / stride + 1 <= most]
    stride = exact[0] if exact else math.ceil(steps / (most - 1))
    return [0, *sorted(range(steps, 0, -stride))]


def letters(size: int) -> ImageFont.FreeTypeFont:
    """The font of matplotlib's plots, which has more letters than Pillow's own."""
    package = Path(find_spec("matplotlib").origin).parent  # found, not imported, which takes a moment
    return ImageFont.truetype(package / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def shortened(name: str, most: int = 36) -> str:
    """A class's name to stand beside a row of images, in one line of at most so many letters."""
    name = one_line(name)
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


def by_label(images: Tensor, labels: list[str], columns: int) -> tuple[Tensor, list[str]]:
    """Images (N, C, H, W) put into rows of one label each -> the same with grey ones for gaps, and a name for each row.

    Labels follow one another as they first come; of one that takes several rows the first is named. Rows have as many
    images as `columns` says, or fewer where no label has so many: len(images) / len(names).
    """
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    columns = min(columns, max(map(len, groups.values())))
    places, names = [], []
    for label, group in groups.items():
        group += [len(images)] * (-len(group) % columns)
        places += group
        names += [label] + [""] * (len(group) // columns - 1)
    gap = images.new_full((1, *images.shape[1:]), normalize(torch.tensor(BORDER)))
    return torch.cat([images, gap])[places], names


def enlarged(picture: Image.Image, zoom: int) -> Image.Image:
    """A picture whose every pixel has become a square."""
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST)


def save_strip(frames: dict[int, Tensor], labels: list[str], path: str | Path) -> None:
    """The progression: a row per label; frames are the images after so many steps, each (B, C, H, W).

    Small images are enlarged to about 60 pixels; beside large ones the text is larger.
    """
    rows = torch.stack(list(frames.values()), dim=1).flatten(0, 1)  # label by label
    pitch = rows.shape[-1] + 1  # an image, or one of its channels, and the border
    picture = enlarged(Image.fromarray(mosaic(rows, len(frames))), max(1, round(60 / pitch)))
    names = [shortened(str(label)) for label in labels]
    numbers = all(name.isdecimal() for name in names)

    font, title = letters(max(14, pitch // 4)), "denoising steps taken"
    rim, line = font.size // 3, round(1.4 * font.size)
    width = max(picture.width, math.ceil(font.getlength(title)))
    room = (line if numbers else 0, rim, rim + width - picture.width, rim + 2 * line)
    sheet = ImageOps.expand(named(picture, names, font, "black", "white"), room, "white")
    left, bottom = sheet.width - rim - width, rim + picture.height  # the corner of the images
    draw = ImageDraw.Draw(sheet)
    for i, step in enumerate(frames):
        middle = left + picture.width * (i + 0.5) / len(frames)
        draw.text((middle, bottom + rim), str(step), "black", font, anchor="ma")
    draw.text((left + width / 2, bottom + rim + line), title, "black", font, anchor="ma")
    if numbers:
        upwards = ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90)
        draw.text((rim, rim + (picture.height - font.getlength("label")) / 2), "label", "black", upwards)
    with writing(path) as file:
        sheet.save(file, "PNG")


def save_gif(frames: list[Tensor], path: str | Path) -> None:
    """The same as an animation: all labels side by side, about four seconds and a pause at the end."""
    pictures = [Image.fromarray(mosaic(frame, 10)) for frame in frames]
    pictures = [enlarged(picture, 3 if picture.width < 400 else 1) for picture in pictures]
    durations = [80] * (len(pictures) - 1) + [2000]  # milliseconds
    with writing(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_png(images: Tensor, path: str | Path, columns: int, labels: list[str] | None = None) -> None:
    """Images (N, C, H, W) in [-1, 1] as a grid; with a label for each, in rows of one label, which stands beside.

    There are no such rows where the labels are so many that the picture would be a narrow column.
    """
    if labels and len(set(labels)) <= 4 * columns:
        images, names = by_label(images, labels, columns)
        picture = Image.fromarray(mosaic(images, len(images) // len(names)))
        font = letters(round(min(max(picture.height / len(names) / 3, 10), 24)))
        picture = named(picture, [shortened(name) for name in names], font, "white", (BORDER,) * 3)
    else:
        picture = Image.fromarray(mosaic(images, columns))
    with writing(path) as file:
        picture.save(file, "PNG")


def named(
    picture: Image.Image, names: list[str], font: ImageFont.FreeTypeFont, ink: str, paper: str | tuple
) -> Image.Image:
    """A grid with a name at the left of each of its rows."""
    margin = math.ceil(max(map(font.getlength, names)) + font.size)
    wide = ImageOps.expand(picture, (margin, 0, 0, 0), paper)
    for row, name in enumerate(names):
        place = (margin - font.size / 2, picture.height * (row + 0.5) / len(names))
        ImageDraw.Draw(wide).text(place, name, ink, font, anchor="rm")
    return wide


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


def save_png_dir(images: Tensor, names: list[str], folder: str | Path) -> None:
    """Images (N, C, H, W) in [-1, 1], grey or in colour, as a folder of PNGs: 000000-cat.png, 000001-dog.png, ...

    One flat folder, as pytorch-fid and clean-fid read it; what each image was asked to be is in its name. The folder is
    whole or not there: what cannot be written leaves nothing behind.

    Raises:
        UserError: for a folder that is not empty, for images of other channels than 1 or 3, or if it cannot be written.
    """
    check_new_folder("--png-dir", folder)
    if images.shape[1] not in (1, 3):
        raise UserError(f"--png-dir {folder}: images of {images.shape[1]} channels are no PNGs; give --npz instead")
    digits = max(6, len(str(len(images) - 1)))
    with writing_folder(folder) as temporary:
        for start in range(0, len(images), 1000):
            pixels = denormalize(images[start : start + 1000]).permute(0, 2, 3, 1).cpu().numpy()
            for i, (picture, name) in enumerate(zip(pixels, names[start : start + 1000]), start):
                name = re.sub(r"\W+", "_", name)[:60]
                image = Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture)
                image.save(temporary / f"{i:0{digits}}-{name}.png")
