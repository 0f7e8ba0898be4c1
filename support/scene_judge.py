"""The judge of scenes: which digits a picture shows, in what relation, of how thick strokes, all measured from pixels.

The relation is where the ink is spread further. Each half is cropped about its middle; the digit in it is read by a
classifier of half-size digits (support/classifier.py), its strokes by their ink and its edges. Classifier and limits
between the widths come from the training scenes; the test scenes, and anything generated, they have not seen.

`python -m support.scene_judge FILE` writes the judge to a file: notebooks/words.ipynb measures with the same one
everywhere, and where there is no MNIST to learn from.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config
from dataset import load_dataset
from loaders.scenes import PENS, Scenes, scenes_of
from support.classifier import Classifier, judge_of, load_classifier
from support.command_line import Parser, run_script, shown
from support.errors import believing
from support.files import load_file, save_file

CROP = 16  # pixels a side, of a half-size digit and a margin
RIGHT = ("both digits", "relation", "digits and relation", "thickness", "all")  # what may be right
SPECK = 0.1  # ink of at most so much does not count as a stroke


def middle_and_spread(ink: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of where the ink (B, H, W) is: each (B, 2), of rows and of columns."""
    moments = []
    for dim in (2, 1):
        profile = ink.sum(dim) / ink.sum((1, 2)).clamp(min=1e-6)[:, None]
        places = torch.arange(profile.shape[1], dtype=torch.float32)
        mean = profile @ places
        moments.append(torch.stack([mean, profile @ places.square() - mean.square()]))
    return tuple(torch.stack(moments, dim=2))


def take_apart(images: Tensor) -> tuple[Tensor, Tensor]:
    """Scenes (B, 1, H, W) uint8 -> their relations (B,) and both digits, the first one first (B, 2, 16, 16) uint8."""
    images = images.squeeze(1)
    _, spread = middle_and_spread(images.float())
    relation = (spread[:, 0] > spread[:, 1]).long()  # 0: left of, 1: above
    B, H, W = images.shape
    left = (torch.arange(W) < W // 2).expand(H, W)
    upper = (torch.arange(H) < H // 2)[:, None].expand(H, W)
    first = torch.stack([left, upper])[relation]
    halves = torch.stack([images * first, images * ~first], dim=1).flatten(0, 1)
    rows, columns = middle_and_spread(halves.float())[0].round().long().unbind(1)
    windows = F.pad(halves, (CROP // 2,) * 4).unfold(1, CROP, 1).unfold(2, CROP, 1)
    return relation, windows[torch.arange(2 * B), rows, columns].view(B, 2, CROP, CROP)


def stroke_widths(digits: Tensor) -> Tensor:
    """About the widths of the strokes (N,), in pixels, of digits (N, H, W) uint8.

    A long stroke has as much ink as width times length, and two edges of its length, which are the total variation.
    Ink is squared, so that a thin stroke between two pixels is not taken for one of both.
    """
    ink = F.relu(F.pad(digits.float() / 255, (1, 1, 1, 1)) - SPECK)
    across, down = ink[:, 1:, 1:] - ink[:, 1:, :-1], ink[:, 1:, 1:] - ink[:, :-1, 1:]
    edges = (across.square() + down.square()).sqrt().sum((1, 2))
    return 2 * ink.square().sum((1, 2)) / edges.clamp(min=1e-6)


class SceneJudge(NamedTuple):
    """Reads scenes; `limits` (10, 2) are those between the measured widths of the three pens, for each digit."""

    classifier: Classifier
    limits: Tensor

    def read(self, images: Tensor) -> Scenes:
        """What is to be seen in pictures (N, 1, H, W) uint8."""
        relation, digits = map(torch.cat, zip(*map(take_apart, images.split(1000))))
        digits = digits.flatten(0, 1)
        # A reading at its place and a pixel to each side, together, is right a little more often than one.
        shifts = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
        readings = [self.classifier.read(digits.roll(shift, (1, 2))[:, None])[1].softmax(1) for shift in shifts]
        numbers = sum(readings).argmax(1)
        pens = (stroke_widths(digits)[:, None] > self.limits[numbers]).sum(1)
        return Scenes(numbers.view(-1, 2), pens.view(-1, 2), relation)


def scene_judge_of(data_dir: str | Path, images: Tensor, captions: Tensor) -> SceneJudge:
    """The judge that learns from scenes (N, 1, H, W) uint8 and captions (N, L); its classifier is kept in data_dir."""
    asked = scenes_of(captions)
    _, digits = map(torch.cat, zip(*map(take_apart, images.split(1000))))
    digits, numbers, pens = digits.flatten(0, 1), asked.digits.flatten(), asked.pens.flatten()
    widths = torch.cat([stroke_widths(part) for part in digits.split(1000)])
    groups = [[widths[(numbers == digit) & (pens == pen)] for pen in range(len(PENS))] for digit in range(10)]
    mean, deviation = (torch.tensor([[of(group) for group in row] for row in groups]) for of in (torch.mean, torch.std))
    # As many deviations from the mean of the thinner pen as from that of the thicker one.
    limits = (mean[:, :-1] * deviation[:, 1:] + mean[:, 1:] * deviation[:, :-1]) / (
        deviation[:, :-1] + deviation[:, 1:]
    )
    return SceneJudge(judge_of("scenes", data_dir, digits[:, None], numbers), limits)


def load_scene_judge(path: str | Path) -> SceneJudge:
    """The judge of a file that `python -m support.scene_judge` wrote; UserError if it holds none."""
    classifier, _ = load_classifier(path)
    with believing(f"{path} holds no judge of scenes"):
        limits = load_file(path)["limits"].float()
        if limits.shape != (10, len(PENS) - 1) or not limits.isfinite().all():
            raise ValueError("its limits are not those between the widths of pens")
    return SceneJudge(classifier, limits)


def obedience(asked: Scenes, read: Scenes) -> dict[str, float]:
    """Shares of scenes that show what was asked for, of pairs of digits seen in training, and of unseen ones if any.

    both digits: wherever they are. relation: as asked, and a digit that was asked for is in its place. thickness: of
    both digits; where they have changed places, each takes its own along.
    """
    fits = (read.digits == asked.digits).any(1)
    crossed = ~fits & (read.digits.flip(1) == asked.digits).any(1)
    pens = torch.where(crossed[:, None], read.pens.flip(1), read.pens)
    digits = (read.digits.sort(1).values == asked.digits.sort(1).values).all(1)
    relation = (read.relation == asked.relation) & fits
    thickness = (pens == asked.pens).all(1)
    right = digits, relation, digits & relation, thickness, digits & relation & thickness
    groups = {"seen": ~asked.unseen, "unseen": asked.unseen}
    return {
        f"{name}, {pairs}": values[group].float().mean().item()
        for pairs, group in groups.items()
        if group.any()
        for name, values in zip(RIGHT, right)
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Write the judge of scenes to a file.")
    parser.usage = "python -m support.scene_judge FILE"
    parser.add_argument("file", metavar="FILE", help="the file to write, such as notebooks/words/judge.pth")
    path, data_dir = parser.parse_args(argv).file, Config().data_folder
    train = load_dataset("scenes", data_dir)
    judge = scene_judge_of(data_dir, train.images, train.labels)
    save_file({"model": judge.classifier.state_dict(), "limits": judge.limits}, path)
    print(f"written: {shown(path)}")


if __name__ == "__main__":
    run_script(main)
