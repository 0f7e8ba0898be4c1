"""Digits drawn from the fonts that matplotlib ships: the data set of a machine without an internet connection.

Each image is a random digit of a random font, stretched, sheared, turned, shifted, its strokes thinned or
thickened. 60,000 take about two seconds, because the work is one `grid_sample` over tables of distances.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from loaders.drawn import kept

GLYPH_FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono DejaVuSansMono-Bold "
    "DejaVuSansMono-Oblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic "
    "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta cmr10 cmb10 cmss10 cmtt10"
).split()


def glyph_distances(size: int = 64) -> Tensor:
    """Signed distance to the outline of each digit in each font: (fonts, 10, size, size), in pixels, > 0 inside.

    Distances, because the outline at distance d is the same glyph with a stroke wider by 2d.
    """
    import matplotlib  # here, for it takes a second that sampling need not wait

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pixels = torch.cartesian_prod(torch.arange(size), torch.arange(size)).float()
    distances = []
    for name in GLYPH_FONTS:
        font = ImageFont.truetype(fonts / f"{name}.ttf", round(size * 0.75))
        for digit in "0123456789":
            left, top, right, bottom = font.getbbox(digit)
            canvas = Image.new("L", (size, size))
            corner = ((size - left - right) / 2, (size - top - bottom) / 2)  # centres the ink
            ImageDraw.Draw(canvas).text(corner, digit, font=font, fill=255)
            inside = torch.from_numpy(np.array(canvas)).flatten() > 127
            gaps = torch.cdist(pixels[inside], pixels[~inside])
            distance = torch.empty(size * size)
            distance[inside] = gaps.amin(1) - 0.5
            distance[~inside] = 0.5 - gaps.amin(0)
            distances.append(distance.view(size, size))
    return torch.stack(distances).view(len(GLYPH_FONTS), 10, size, size)


def draw_glyphs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` digits in random fonts, slants, sizes, places and stroke widths: (count, 1, 28, 28) and labels."""
    templates = glyph_distances()
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=rng)

    labels = torch.randint(10, (count,), generator=rng)
    fonts = torch.randint(len(templates), (count,), generator=rng)
    angle, shear = uniform(-0.25, 0.25), uniform(-0.3, 0.3)
    width, height, dx, dy = uniform(0.8, 1.25), uniform(0.75, 1.05), uniform(-0.1, 0.1), uniform(-0.1, 0.1)
    thicken = uniform(-1.0, 2.0)  # template pixels on each side of the stroke
    cos, sin = angle.cos(), angle.sin()
    # Where in the template each output pixel comes from: shear and stretch, then rotation, then shift.
    affine = torch.stack([width * cos, width * (shear - sin), dx, height * sin, height * cos, dy], dim=1).view(-1, 2, 3)
    images = torch.empty(count, 1, 28, 28, dtype=torch.uint8)
    for chunk in torch.arange(count).split(2000):  # small enough for the processor's cache
        grid = F.affine_grid(affine[chunk], (len(chunk), 1, 28, 28), align_corners=False)
        distance = F.grid_sample(
            templates[fonts[chunk], labels[chunk]].unsqueeze(1), grid, padding_mode="border", align_corners=False
        )
        ink = (distance + thicken[chunk].view(-1, 1, 1, 1)) / 2.4 + 0.5  # an edge one output pixel wide
        images[chunk] = (ink.clamp(0, 1) * 255).round().to(torch.uint8)
    return images, labels


def drawn_by() -> str:
    """A key of all that the glyphs follow from: this file and matplotlib's fonts."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest() + " " + version("matplotlib")


def load_glyphs(data_dir: str, train: bool) -> tuple[Tensor, Tensor]:
    """The offline stand-in for MNIST: 60,000 + 10,000 digits drawn from matplotlib's fonts, cached in data_dir.

    Raises:
        UserError: if the cached file is damaged, or cannot be read.
    """
    path = Path(data_dir) / "glyphs" / ("train.pth" if train else "test.pth")
    return kept(
        path, "glyphs", drawn_by, (), lambda: draw_glyphs(60_000, seed=0) if train else draw_glyphs(10_000, seed=1)
    )
