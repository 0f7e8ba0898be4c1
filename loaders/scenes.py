"""Scenes of two half-size digits, and captions of them: "a thick three left of a seven", "a one above a thin one".

Whether a picture obeys such a caption can be counted rather than judged by eye. Each digit is MNIST's (a glyph where
that is not at hand), redrawn with a pen of one of three widths, so that the width can be measured back; no word means
the middle one. One ordered pair of digits in ten is never seen in training, though each digit is, in both places: the
pairs whose second digit is the first plus 3, modulo 10, such as "three ... six" and "eight ... one".
"""

import functools
import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loaders.drawn import kept
from loaders.glyphs import load_glyphs
from loaders.mnist import load_mnist
from support.captions import caption_text, parse_caption
from support.command_line import counted
from support.errors import NotAvailable, UserError

DIGITS = "zero one two three four five six seven eight nine".split()
PENS = {"thin": 1.0, "": 1.7, "thick": 2.3}  # widths of strokes, in pixels of the scene
RELATIONS = ("left of", "above")
WORDS = ("-", "a", "thin", "thick", "left", "of", "above", *DIGITS)  # the first is the padding
LENGTH = 8  # of the longest caption: a thick three left of a thick seven
# A digit's neighbours, clockwise from the one above.
NEIGHBOURS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


class Scenes(NamedTuple):
    """What there is to see: the digit at the left or above comes first."""

    digits: Tensor  # (N, 2)
    pens: Tensor  # (N, 2), numbers in PENS
    relation: Tensor  # (N,), numbers in RELATIONS

    @property
    def unseen(self) -> Tensor:
        """Which ones (N,) have a pair of digits that is left out of training."""
        return self.digits[:, 1] == (self.digits[:, 0] + 3) % 10


@functools.cache
def all_scenes() -> tuple[Scenes, Tensor]:
    """Each of the 1,800 scenes that there are, and their captions (1800, L)."""
    rows = torch.cartesian_prod(*map(torch.arange, (10, 10, len(PENS), len(PENS), len(RELATIONS))))
    scenes, pens = Scenes(rows[:, :2], rows[:, 2:4], rows[:, 4]), list(PENS)
    texts = (
        f"a {pens[pen]} {DIGITS[first]} {RELATIONS[relation]} a {pens[other]} {DIGITS[second]}"
        for first, second, pen, other, relation in rows.tolist()
    )
    return scenes, torch.tensor([parse_caption(text, WORDS, LENGTH) for text in texts])


def scenes_of(captions: Tensor) -> Scenes:
    """What captions (N, L) ask for; UserError for one of no scene."""
    scenes, theirs = all_scenes()
    rows = {tuple(caption): row for row, caption in enumerate(theirs.tolist())}
    asked = list(map(tuple, captions.tolist()))
    for caption in asked:
        if caption not in rows:
            text = caption_text(caption, WORDS)
            raise UserError(f"the caption {text!r} is not that of a scene, such as a thick three left of a seven")
    chosen = torch.tensor([rows[caption] for caption in asked])
    return Scenes(*(part[chosen] for part in scenes))


def thinning_tables() -> Tensor:
    """Whether a pixel goes that has such neighbours, bit i for NEIGHBOURS[i], in a step's two halves: (2, 256) bool.

    Zhang & Suen, "A fast parallel algorithm for thinning digital patterns" (1984): it goes if it is at an edge (at the
    south-east one in the first half, at the north-west one in the second), no end of a line, and joins nothing.
    """
    bits = torch.arange(256) >> torch.arange(8)[:, None] & 1
    count, joined = bits.sum(0), (bits < bits.roll(-1, 0)).sum(0)
    north, _, east, _, south, _, west, _ = bits.bool()
    free = (count >= 2) & (count <= 6) & (joined == 1)
    return torch.stack([free & ~(east & south & (north | west)), free & ~(north & west & (east | south))])


def thinned(ink: Tensor) -> Tensor:
    """Lines of one pixel through the middle of the strokes, of pictures of ink (B, H, W) bool."""
    (_, H, W), tables = ink.shape, thinning_tables()
    while True:
        before = ink
        for table in tables:
            edged = F.pad(ink, (1, 1, 1, 1)).byte()
            near = sum(edged[:, 1 + y : 1 + y + H, 1 + x : 1 + x + W] << i for i, (y, x) in enumerate(NEIGHBOURS))
            ink = ink & ~table.index_select(0, near.int().flatten()).view(ink.shape)
        if torch.equal(ink, before):
            return ink


def lines_of(digits: Tensor) -> Tensor:
    """The lines (N, 56, 56) bool that a pen follows to write digits (N, 1, 28, 28) uint8, at twice their size."""
    x = digits.float()
    # Ink is what is black beside its surroundings: a bold digit's loops stay open, and faint strokes stay whole.
    blackest = torch.maximum(F.max_pool2d(x, 11, stride=1, padding=5), x.amax((1, 2, 3), keepdim=True) / 2)
    return thinned(F.interpolate(x - 0.5 * blackest, scale_factor=2, mode="bicubic").squeeze(1) > 0)


def distances(lines: Tensor, reach: int) -> Tensor:
    """From each pixel to the nearest of lines (B, H, W) bool, along rows and then columns; exact up to `reach`."""
    squares = torch.where(lines, 0.0, 1e4)
    for dim, edges in ((2, (reach, reach)), (1, (0, 0, reach, reach))):
        padded, size = F.pad(squares, edges, value=1e4), squares.shape[dim]
        for k in range(2 * reach + 1):
            squares = torch.minimum(squares, padded.narrow(dim, k, size) + (k - reach) ** 2)
    return squares.sqrt()


def middles(lines: Tensor) -> Tensor:
    """The middle (B, 2) of the box about lines (B, H, W) bool, x and y from -1 to 1."""
    _, H, W = lines.shape
    ends = [
        (any_ink.int().argmax(1), size - any_ink.flip(1).int().argmax(1), size)
        for any_ink, size in ((lines.any(1), W), (lines.any(2), H))
    ]
    return torch.stack([(first + last) / size - 1 for first, last, size in ends], dim=1)


def write(lines: Tensor, widths: Tensor, centres: Tensor) -> Tensor:
    """Ink (B, 1, 28, 28) in [0, 1] along lines (B, 56, 56), at a quarter of their size, by pens of some widths (B,).

    Args:
        centres: where the middle of the lines goes (B, 2), x and y from -1 to 1.
    """
    reach = max(PENS.values()) / 2 + 0.5
    nearness = reach - (distances(lines, int(4 * reach)) / 4).clamp(max=reach)
    shift = middles(lines) - 2 * centres
    affine = torch.cat([2 * torch.eye(2).expand(len(lines), 2, 2), shift[..., None]], dim=2)
    grid = F.affine_grid(affine, [len(lines), 1, 28, 28], align_corners=False)
    near = F.grid_sample(nearness[:, None], grid, align_corners=False)
    return (near - reach + widths.view(-1, 1, 1, 1) / 2 + 0.5).clamp(0, 1)  # an edge one pixel wide


def draw_scenes(digits: Tensor, labels: Tensor, chosen: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Scenes of the digits (M, 1, 28, 28) uint8 with their labels (M,): images (N, 1, 28, 28) uint8, captions (N, L).

    Args:
        chosen: which of all_scenes to draw (N,).
        seed: of which of the digits, and where in their halves.
    """
    rng = torch.Generator().manual_seed(seed)
    scenes = Scenes(*(part[chosen] for part in all_scenes()[0]))
    parts = digits.split(100)  # small enough for the processor's cache
    lines = torch.cat([lines_of(part) for part in counted(parts, len(parts), "thinning digits")])
    # Of each digit one at random: the labels in order are in runs, which start where the smaller ones end.
    order, counts = labels.argsort(stable=True), labels.bincount(minlength=10)
    share = torch.rand(scenes.digits.shape, generator=rng)
    which = order[(counts.cumsum(0) - counts)[scenes.digits] + (share * counts[scenes.digits]).long()]
    # A pixel along the relation and two across it, of a half of 14, is the most that a digit is away from its middle.
    along, across = ((torch.rand(2, *share.shape, generator=rng) * 2 - 1) * torch.tensor([1.0, 2.0]).view(2, 1, 1)) / 14
    along += torch.tensor([-0.5, 0.5])
    beside = (scenes.relation == 0)[:, None]
    centres = torch.stack([torch.where(beside, along, across), torch.where(beside, across, along)], dim=2)
    widths = torch.tensor(list(PENS.values()))[scenes.pens]
    parts, images = torch.arange(len(chosen)).split(100), torch.empty(len(chosen), 1, 28, 28, dtype=torch.uint8)
    for part in counted(parts, len(parts), "drawing scenes"):
        ink = torch.stack([write(lines[which[part, i]], widths[part, i], centres[part, i]) for i in (0, 1)])
        images[part] = (ink.amax(0) * 255).round().to(torch.uint8)
    return images, all_scenes()[1][chosen]


def load_digits(data_dir: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST's digits and labels, or glyphs, said loudly, where those cannot be had."""
    try:
        return load_mnist(data_dir, train)
    except NotAvailable as error:
        print(f"\n*** {error}\n*** The scenes are made of glyphs: digits drawn from fonts.\n", file=sys.stderr)
        return load_glyphs(str(data_dir), train)


def load_scenes(data_dir: str | Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """60,000 + 10,000 scenes, cached in data_dir: images (N, 1, 28, 28) uint8, captions (N, L) int64, their words.

    The test part is of other digits, and has the unseen pairs too.

    Raises:
        UserError: if the cached file is damaged, or cannot be read.
    """
    digits, labels = load_digits(data_dir, train)
    key = hashlib.sha256(Path(__file__).read_bytes())
    for tensor in (digits, labels):
        key.update(tensor.contiguous().numpy())

    def draw() -> tuple[Tensor, Tensor]:
        there = ~all_scenes()[0].unseen if train else torch.ones(len(all_scenes()[1]), dtype=torch.bool)
        there, (count, seed) = there.nonzero().flatten(), (60_000, 0) if train else (10_000, 1)
        chosen = there[torch.randint(len(there), (count,), generator=torch.Generator().manual_seed(seed))]
        return draw_scenes(digits, labels, chosen, seed)

    path = Path(data_dir) / "scenes" / ("train.pth" if train else "test.pth")
    return *kept(path, "scenes", key.hexdigest, (LENGTH,), draw), list(WORDS)
