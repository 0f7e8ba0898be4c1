"""Sample from a trained DiT: `python inference.py` turns noise into digits, and draws the way there.

One generator, `denoise`, feeds everything: the strip (a row per label or caption, noise at the left, image at the
right), the animation (--gif), a grid (--num-samples) and arrays for evaluation (--num-samples with --npz). Models of
latents, such as the paper's own, need a VAE that decodes them (--vae).
"""

from support.start import start_quietly

if __name__ == "__main__":
    start_quietly()  # before all else is imported

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Generator, Tensor

from config import ROOT, SAMPLING, Config
from dataset import denormalize
from dit import DiT
from support.autoencoder import decode, load_vae
from support.checkpoint import asked_for, build_process, load_model
from support.command_line import Parser, Progress, counted, run_script, shown
from support.errors import UserError
from support.files import check_new_folder, check_path, writing
from support.machine import check_memory, choose_device
from support.pictures import frames_shown, save_gif, save_png, save_png_dir, save_strip
from support.published import PUBLISHED
from support.sampling import describe_sampling, sampling_settings

BATCH_SIZE, MOST_TOKENS = 500, 50_000  # of what is drawn at a time; part of what a seed means


def denoise(model: DiT, config: Config, y: Tensor, generator: Generator) -> Iterator[Tensor]:
    """x_T, ..., x_0 for labels (B,) or captions (B, L), each (B, C, H, W), drawn as the config's fields say."""
    size = model.image_size
    noise = torch.randn(len(y), model.in_channels, size, size, device=y.device, generator=generator)
    return build_process(config).sample(model, noise, y, generator=generator, **sampling_settings(config))


def draw_images(model: DiT, config: Config, y: Tensor, generator: Generator) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] for labels (N,) or captions (N, L), some at a time.

    Which noise an image starts from, and which a step of ddpm adds, depends on the images drawn together with it.
    """
    parts, images = y.split(max(1, min(BATCH_SIZE, MOST_TOKENS // model.num_tokens))), []
    with Progress(len(parts) * (config.sample_steps + 1), "sampling") as bar:
        for part in parts:
            for x in denoise(model, config, part, generator):
                bar.update()
            images.append(x)
    return torch.cat(images)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Turn noise into images with a trained DiT.")
    basics = parser.group("basics")
    basics.add_argument("--checkpoint", metavar="FILE", help="weights (default: the repository's model.pth)")
    basics.add_argument("--labels", metavar="LABELS", help="0123, or with commas 207,360 or cat,dog (default: all)")
    basics.add_argument("--prompt", action="append", metavar="TEXT", help="a caption to draw; repeat it for more")
    basics.add_argument("--output", metavar="FILE", help="the picture (default: the repository's inference.png)")
    basics.add_argument("--gif", metavar="FILE", help="an animation of the way from noise to image")
    parser.add_number("--num-samples", "a grid of so many, the labels in turn, not the way there", "basics", most=10**8)
    basics.add_argument("--npz", metavar="FILE", help="the --num-samples as arrays: arr_0 images, arr_1 labels")
    basics.add_argument("--png-dir", metavar="DIR", help="the --num-samples as files, in a new folder")
    parser.add_fields("seed", default="the checkpoint's")
    parser.add_fields(*SAMPLING, default="the checkpoint's")
    parser.add_fields("device", title="machine")
    parser.group("network").add_argument("--vae", metavar="DIR", help="folder of the autoencoder of a model of latents")
    parser.group("network").add_argument("--published", choices=PUBLISHED, help="whose weights, if a file cannot tell")
    given = vars(parser.parse_args(argv))
    output, gif, npz, png_dir = (given.pop(name, None) for name in ("output", "gif", "npz", "png_dir"))
    text, prompts, folder, num_samples = (given.pop(name, None) for name in ("labels", "prompt", "vae", "num_samples"))
    for flag, path in (("--npz", npz), ("--png-dir", png_dir)):
        if path and num_samples is None:
            raise UserError(f"{flag} needs --num-samples, how many to draw")
    if gif and num_samples is not None:
        raise UserError("--gif shows one image for each of --labels; leave out --num-samples")
    if not (gif or npz or png_dir):
        output = output or str(ROOT / "inference.png")
    for flag, path, suffix in (("--output", output, ".png"), ("--gif", gif, ".gif"), ("--npz", npz, ".npz")):
        if path:
            check_path(flag, path, suffix)
    if png_dir:
        check_new_folder("--png-dir", png_dir)

    device = choose_device(given.pop("device", "auto"))
    model, config = load_model(given.pop("checkpoint", ROOT / "model.pth"), device, given.pop("published", None))
    vae = load_vae(folder, config, device)
    config = config.replace(**given)
    asked, names = asked_for(config, text, prompts)
    if num_samples is None and text is None and prompts is None:
        asked = asked[:10]
    if num_samples is None and len(asked) > 100:
        raise UserError(f"{len(asked)} rows are too many for one picture; draw them with --num-samples")
    count = num_samples or len(asked)
    check_memory(8 * count * config.in_channels * config.image_size**2, f"{count:,} images", "draw fewer", device)
    turn = [i % len(asked) for i in range(count)]
    y = torch.tensor([asked[i] for i in turn], device=device)
    names = [names[i] for i in turn]
    generator = Generator(device).manual_seed(config.seed)

    start = time.perf_counter()
    if num_samples:
        images = decode(vae, draw_images(model, config, y, generator))
    else:
        columns, film = (frames_shown(config.sample_steps, most) for most in (13, 50))
        kept = {*(columns if output else ()), *(film if gif else ())}  # of a thousand steps all would fill the memory
        way = counted(denoise(model, config, y, generator), config.sample_steps + 1, "sampling")
        frames = {i: decode(vae, x).cpu() for i, x in enumerate(way) if i in kept}
    seconds = time.perf_counter() - start

    if npz:
        with writing(npz) as file:
            np.savez(file, denormalize(images).permute(0, 2, 3, 1).cpu().numpy(), y.cpu().numpy())
    if png_dir:
        save_png_dir(images, names, png_dir)
    if gif:
        save_gif([frames[i] for i in film], gif)
    if output and num_samples:
        save_png(images, output, columns=round(num_samples**0.5), labels=config.class_names and names)
    elif output:
        save_strip({i: frames[i] for i in columns}, names, output)
    print(f"{count} images by {describe_sampling(config)} an image, {seconds:.1f} s on {device}")
    print("written: " + ", ".join(shown(path) for path in (output, gif, npz, png_dir) if path))


if __name__ == "__main__":
    run_script(main)
