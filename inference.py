"""Sample from a trained DiT: `python inference.py` turns noise into digits, and draws the way there.

One generator, the process's `sample`, feeds everything: the strip (a row per label, noise at the left, digit at the
right), the animation (--gif), a grid (--num-samples) and arrays for evaluation (--num-samples with --npz). Models of
latents, such as the paper's own, need a VAE that decodes them (--vae).
"""

import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import Module
from torchvision.utils import make_grid
from tqdm import tqdm

from config import SAMPLING, Config, Parser, UserError, run_script
from dataset import denormalize
from dit import DiT
from support.checkpoint import denoise, load_model, sampling_of
from support.machine import choose_device
from support.published import decode, load_vae

BATCH_SIZE, MOST_TOKENS = 500, 50_000  # of what is drawn at a time; part of what a seed means


def some_of(frames: list[Tensor], count: int) -> list[int]:
    """At most `count` evenly spaced indices of the frames, the first and the last among them."""
    return torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().int().tolist()


def mosaic(images: Tensor, columns: int) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1], row by row -> one picture (height, width, 3) uint8."""
    return make_grid(denormalize(images).cpu(), nrow=columns, padding=1, pad_value=64).permute(1, 2, 0).numpy()


def save_strip(frames: list[Tensor], labels: list[int], path: str | Path, vae: Module | None = None) -> None:
    """The progression: a row per label, from noise at the left to the image at the right, in at most 11 columns."""
    chosen = some_of(frames, 11)
    rows = torch.stack([decode(vae, frames[i]) for i in chosen], dim=1).flatten(0, 1)  # label by label
    picture = mosaic(rows, len(chosen))
    figure = Figure(figsize=(0.6 * len(chosen) + 0.6, 0.6 * len(labels) + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture, interpolation="nearest")
    pitch = rows.shape[-1] + 1  # an image and its border
    axes.set_xticks([pitch * (i + 0.5) for i in range(len(chosen))], chosen)
    axes.set_yticks([pitch * (i + 0.5) for i in range(len(labels))], labels)
    axes.set(xlabel="denoising steps taken", ylabel="label")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=max(100, pitch / 0.6))  # large images at about their own size


def save_gif(frames: list[Tensor], path: str | Path, vae: Module | None = None) -> None:
    """The same as an animation: all labels side by side, about four seconds and a pause at the end."""
    pictures = [Image.fromarray(mosaic(decode(vae, frames[i]), 10)) for i in some_of(frames, 50)]
    zoom = 3 if pictures[0].width < 400 else 1
    pictures = [picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST) for picture in pictures]
    durations = [80] * (len(pictures) - 1) + [2000]  # milliseconds
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def parse_labels(text: str, num_classes: int) -> list[int]:
    """[207, 360] from "207,360"; without a comma each character is a label, as in "0123"."""
    try:
        labels = [int(label) for label in (text.removesuffix(",").split(",") if "," in text else text)]
    except ValueError:
        labels = []
    if not labels:
        raise UserError(f"labels {text!r}: give digits, such as 0123, or numbers with commas, such as 207,360")
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"label {label} is not one of the model's {num_classes} classes, 0 to {num_classes - 1}")
    return labels


def check_path(flag: str, path: str, suffix: str) -> None:
    """Refuse a file that could not be written, before the work rather than after it."""
    if Path(path).suffix != suffix:
        raise UserError(f"{flag} {path}: the file's name must end in {suffix}")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: its folder does not exist; create it first")


def draw(model: DiT, config: Config, y: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] for the labels y (N,), some at a time."""
    parts, images = y.split(max(1, min(BATCH_SIZE, MOST_TOKENS // model.pos_embed.shape[1]))), []
    with tqdm(total=len(parts) * (config.sample_steps + 1), unit="step", leave=False) as bar:
        for part in parts:
            for x in denoise(model, config, part, generator):
                bar.update()
            images.append(x)
    return torch.cat(images)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Turn noise into images with a trained DiT.")
    parser.add_argument("--checkpoint", default="model.pth", metavar="FILE", help="weights (default: model.pth)")
    parser.add_argument("--vae", metavar="DIR", help="folder of the AutoencoderKL that decodes a model's latents")
    parser.add_argument("--labels", metavar="LABELS", help="a digit a character, or numbers with commas (default: all)")
    parser.add_fields(*SAMPLING, "seed", default="the checkpoint's")
    parser.add_fields("device")
    parser.add_argument("--output", metavar="FILE", help="the picture (default: inference.png)")
    parser.add_argument("--gif", metavar="FILE", help="write an animation")
    parser.add_argument("--num-samples", type=int, metavar="INT", help="draw many, the labels in turn, as a grid")
    parser.add_argument("--npz", metavar="FILE", help="write the --num-samples as arrays: arr_0 images, arr_1 labels")
    given = vars(parser.parse_args(argv))
    output, gif, npz = (given.pop(name, None) for name in ("output", "gif", "npz"))
    num_samples = given.pop("num_samples", None)
    if num_samples is not None and num_samples < 1:
        raise UserError(f"num_samples is {num_samples}; it must be at least 1")
    if npz and num_samples is None:
        raise UserError("--npz needs --num-samples, how many to draw")
    if gif and num_samples is not None:
        raise UserError("--gif shows one image for each of --labels; leave out --num-samples")
    if not gif and not npz:
        output = output or "inference.png"
    for flag, path, suffix in (("--output", output, ".png"), ("--gif", gif, ".gif"), ("--npz", npz, ".npz")):
        if path:
            check_path(flag, path, suffix)

    device = choose_device(given.pop("device", "auto"))
    model, config = load_model(given.pop("checkpoint"), device)
    vae = load_vae(given.pop("vae", None), config, device)
    text = given.pop("labels", None)
    labels = list(range(min(config.num_classes, 10))) if text is None else parse_labels(text, config.num_classes)
    if num_samples is None and len(labels) > 100:
        raise UserError(f"{len(labels)} labels are too many for one picture; draw them with --num-samples")
    config = config.replace(**given)
    generator = torch.Generator(device).manual_seed(config.seed)

    start = time.perf_counter()
    count = num_samples or len(labels)
    y = torch.tensor([labels[i % len(labels)] for i in range(count)], device=device)
    if num_samples:
        images = decode(vae, draw(model, config, y, generator))
    else:
        frames = list(tqdm(denoise(model, config, y, generator), total=config.sample_steps + 1, leave=False))
    seconds = time.perf_counter() - start

    if npz:
        np.savez(npz, denormalize(images).permute(0, 2, 3, 1).cpu().numpy(), y.cpu().numpy())
    if gif:
        save_gif(frames, gif, vae)
    if output and num_samples:
        Image.fromarray(mosaic(images, round(num_samples**0.5))).save(output)
    elif output:
        save_strip(frames, labels, output, vae)
    print(f"{count} images by {sampling_of(config)} an image, {seconds:.1f} s on {device}")
    print("written: " + ", ".join(path for path in (output, gif, npz) if path))


if __name__ == "__main__":
    run_script(main)
