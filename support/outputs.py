"""Where inference.py's images go: a picture (the way from noise, or a grid), an animation, arrays, files."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from config import ROOT, Config
from dataset import denormalize
from support.command_line import Parser, shown
from support.errors import UserError
from support.files import check_new_folder, check_path, writing
from support.pictures import frames_shown, save_gif, save_png, save_png_dir, save_strip

COLUMNS, FILM = 13, 50  # the most steps that a strip and an animation show


@dataclass
class Outputs:
    """The flags that say what to write; with num_samples the images are many, without it each row shows its way."""

    output: str | None
    gif: str | None
    npz: str | None
    png_dir: str | None
    num_samples: int | None

    @staticmethod
    def add_flags(parser: Parser) -> None:
        basics = parser.group("basics")
        basics.add_argument("--output", metavar="FILE", help="the picture (default: the repository's inference.png)")
        basics.add_argument("--gif", metavar="FILE", help="an animation of the way from noise to image")
        parser.add_number("--num-samples", "a grid of so many, the labels in turn, not the way", "basics", most=10**8)
        basics.add_argument("--npz", metavar="FILE", help="the --num-samples as arrays: arr_0 images, arr_1 labels")
        basics.add_argument("--png-dir", metavar="DIR", help="the --num-samples as files, in a new folder")

    @classmethod
    def take(cls, given: dict[str, Any]) -> "Outputs":
        """Those of the flags given, which they are taken out of; UserError, before the work, for what cannot be."""
        flags = cls(**{name: given.pop(name, None) for name in cls.__dataclass_fields__})
        for flag, path in (("--npz", flags.npz), ("--png-dir", flags.png_dir)):
            if path and flags.num_samples is None:
                raise UserError(f"{flag} needs --num-samples, how many to draw")
        if flags.gif and flags.num_samples is not None:
            raise UserError("--gif shows one image for each of --labels; leave out --num-samples")
        if not (flags.gif or flags.npz or flags.png_dir):
            flags.output = flags.output or str(ROOT / "inference.png")
        for name, suffix in (("output", ".png"), ("gif", ".gif"), ("npz", ".npz")):
            if path := getattr(flags, name):
                check_path(f"--{name}", path, suffix)
        if flags.png_dir:
            check_new_folder("--png-dir", flags.png_dir)
        return flags

    def shown(self, steps: int) -> set[int]:
        """The steps, 0 to `steps`, whose images are shown: of a thousand steps all would fill the memory."""
        strip = frames_shown(steps, COLUMNS) if self.output else ()
        return {*strip, *(frames_shown(steps, FILM) if self.gif else ())}

    def write(self, frames: dict[int, Tensor], y: Tensor, names: list[str], config: Config) -> None:
        """Write images (N, C, H, W) in [-1, 1] by step, and say where to; with num_samples there is the last step's."""
        last = frames[config.sample_steps]
        if self.npz:
            with writing(self.npz) as file:
                np.savez(file, denormalize(last).permute(0, 2, 3, 1).cpu().numpy(), y.cpu().numpy())
        if self.png_dir:
            save_png_dir(last, names, self.png_dir)
        if self.gif:
            save_gif([frames[i] for i in frames_shown(config.sample_steps, FILM)], self.gif)
        if self.output and self.num_samples:
            columns = round(self.num_samples**0.5)
            save_png(last, self.output, columns=columns, labels=config.class_names and names)
        elif self.output:
            save_strip({i: frames[i] for i in frames_shown(config.sample_steps, COLUMNS)}, names, self.output)
        print("written: " + ", ".join(shown(path) for path in (self.output, self.gif, self.npz, self.png_dir) if path))
