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

import torch
from torch import Generator, Tensor

from config import ROOT, SAMPLING, Config
from dit import DiT
from support.autoencoder import decode, load_vae
from support.checkpoint import asked_for, build_process, load_model
from support.command_line import Parser, Progress, counted, run_script
from support.errors import UserError
from support.machine import check_memory, choose_device
from support.outputs import Outputs
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
    Outputs.add_flags(parser)
    parser.add_fields("seed", default="the checkpoint's")
    parser.add_fields(*SAMPLING, default="the checkpoint's")
    parser.add_fields("device", title="machine")
    parser.group("network").add_argument("--vae", metavar="DIR", help="folder of the autoencoder of a model of latents")
    parser.group("network").add_argument("--published", choices=PUBLISHED, help="whose weights, if a file cannot tell")
    given = vars(parser.parse_args(argv))
    outputs = Outputs.take(given)
    text, prompts, folder = (given.pop(name, None) for name in ("labels", "prompt", "vae"))
    device = choose_device(given.pop("device", "auto"))
    model, config = load_model(given.pop("checkpoint", ROOT / "model.pth"), device, given.pop("published", None))
    vae = load_vae(folder, config, device)
    config = config.replace(**given)
    asked, names = asked_for(config, text, prompts)
    if outputs.num_samples is None and text is None and prompts is None:
        asked = asked[:10]
    if outputs.num_samples is None and len(asked) > 100:
        raise UserError(f"{len(asked)} rows are too many for one picture; draw them with --num-samples")
    count = outputs.num_samples or len(asked)
    check_memory(8 * count * config.in_channels * config.image_size**2, f"{count:,} images", "draw fewer", device)
    turn = [i % len(asked) for i in range(count)]
    y = torch.tensor([asked[i] for i in turn], device=device)
    generator = Generator(device).manual_seed(config.seed)

    start = time.perf_counter()
    if outputs.num_samples:
        frames = {config.sample_steps: decode(vae, draw_images(model, config, y, generator))}
    else:
        shown = outputs.shown(config.sample_steps)
        way = counted(denoise(model, config, y, generator), config.sample_steps + 1, "sampling")
        frames = {i: decode(vae, x).cpu() for i, x in enumerate(way) if i in shown}
    print(f"{count} images by {describe_sampling(config)} an image, {time.perf_counter() - start:.1f} s on {device}")
    outputs.write(frames, y, [names[i] for i in turn], config)


if __name__ == "__main__":
    run_script(main)
