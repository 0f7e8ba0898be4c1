"""The autoencoder of models of latents: `diffusers`' AutoencoderKL or AutoencoderTiny.

    encode    images (N, 3, H, W) in [-1, 1] -> moments (N, 2C, h, w), the mean and the deviation of each latent
    decode    latents (N, C, h, w) as models see them, (latent - shift) * scale -> images (N, 3, H, W)

`python -m support.autoencoder --dataset NAME --out-dir DIR` trains a small one (Rombach et al., 2022, without their
adversarial part), so that the whole way from pictures to latents and back needs no download.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config
from dataset import Dataset, load_dataset, normalize
from loaders.latents import pack_latents
from loaders.sources import packed_folder
from support.command_line import Parser, Progress, run_script, shown
from support.errors import UserError, believing, optional
from support.files import check_new_folder, writing_folder
from support.machine import choose_device
from support.pictures import save_png

CLASSES = ("AutoencoderKL", "AutoencoderTiny")
WHAT = (
    "the folder of an AutoencoderKL or AutoencoderTiny, such as a download of huggingface.co/stabilityai/sd-vae-ft-ema:"
    " config.json and diffusion_pytorch_model.safetensors (or .bin); a pipeline's folder will do too"
)
AT_A_TIME = 2**16  # pixels that are encoded or decoded together, for an autoencoder takes much memory

# How a small one is trained.
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 16, 3e-3, 50
KL_WEIGHT = 1e-3  # of a squared error and a divergence that are both sums over an image
WIDTHS = (16, 32, 32)  # channels at full size, half, and all that is smaller
GROUPS = 2  # of channels that are normalised together: many would hide how bright and how colourful an image is


def load_vae(folder: str | None, config: Config, device: str | torch.device = "cpu") -> nn.Module | None:
    """The autoencoder of a model of latents, by default the one that it was trained with; None for a model of pixels.

    Raises:
        UserError: if one is needed and missing, or given and not needed, or of other latents; and as open_vae.
    """
    if not config.latents:
        if folder:
            raise UserError(f"--vae {folder}: the checkpoint draws pixels; leave it out")
        return None
    if not folder and not config.vae:
        raise UserError(
            f"the checkpoint draws latents of {config.in_channels} channels; "
            f"pip install diffusers and add --vae DIR, {WHAT}"
        )
    if not folder and not Path(config.vae).is_dir():
        raise UserError(f"the checkpoint's autoencoder is not in {config.vae} any more; say where with --vae DIR")
    folder = folder or config.vae
    vae = open_vae(folder, device)
    channels = vae.config.latent_channels
    if channels != config.in_channels:
        raise UserError(f"--vae {folder} decodes {channels} channels; the checkpoint draws {config.in_channels}")
    return vae


def open_vae(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The autoencoder in a folder of diffusers', or in that of a pipeline, in which it is `vae`.

    Raises:
        UserError: for a folder that holds none, or lacks weights, or is of other images than colour; without diffusers.
    """
    diffusers = optional("diffusers", "--vae")
    within = Path(folder) / "vae" if (Path(folder) / "vae").is_dir() else Path(folder)
    try:
        name = json.loads((within / "config.json").read_text())["_class_name"]
        if name not in CLASSES:
            raise ValueError("config.json names another class")
        safe = any(within.glob("*.safetensors"))  # given, as is low_cpu_mem_usage, to silence diffusers' advice
        options = dict(local_files_only=True, use_safetensors=safe, low_cpu_mem_usage=False, output_loading_info=True)
        vae, loaded = getattr(diffusers, name).from_pretrained(str(within), **options)
        lacks = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
        if lacks:  # diffusers draws them at random, and goes on
            raise ValueError(f"it lacks {lacks[0]}")
    except Exception as error:  # diffusers and what it reads with fail in many ways
        why = error if isinstance(error, ValueError) and "\n" not in str(error) else type(error).__name__
        raise UserError(f"--vae {folder} holds no AutoencoderKL or AutoencoderTiny ({why}); name {WHAT}") from error
    if (vae.config.in_channels, vae.config.out_channels) != (3, 3):
        raise UserError(f"--vae {folder} is of images of {vae.config.in_channels} channels; name one of colour images")
    if vae.config.get("latents_mean") or vae.config.get("latents_std"):
        raise UserError(f"--vae {folder} has a mean and deviation for each channel of latents, which is not supported")
    return vae.to(device).eval()


def scale_and_shift(vae: nn.Module) -> tuple[float, float]:
    """The two numbers between its latents and those that a model sees, (latent - shift) * scale."""
    return vae.config.scaling_factor, vae.config.shift_factor or 0.0


def about_vae(vae: nn.Module) -> dict[str, Any]:
    """What a pack of latents has to know: scale, shift, whether latents have a deviation, and the autoencoder's key.

    The key is a SHA-256 of weights and config.
    """
    settings = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in vae.state_dict().items():
        key.update(name.encode())
        key.update(tensor.cpu().contiguous().numpy())
    scale, shift = scale_and_shift(vae)
    deviation = type(vae).__name__ == "AutoencoderKL"
    return {"scale": scale, "shift": shift, "deviation": deviation, "vae": key.hexdigest()}


def downsampling(vae: nn.Module) -> int:
    """How many pixels a side become one latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_size(vae: nn.Module, image_size: int) -> int:
    """Latents a side of an image; UserError where its pixels do not divide."""
    factor = downsampling(vae)
    if image_size % factor:
        near = math.ceil(image_size / factor) * factor  # for an array's images cannot be smaller
        raise UserError(
            f"image_size {image_size} is not divisible by {factor}, as the autoencoder needs it; try {near}"
        )
    return image_size // factor


def in_colour(x: Tensor) -> Tensor:
    """Images (N, 3 or 1, H, W) -> (N, 3, H, W): grey is taken for a colour. UserError for any other channels."""
    if x.shape[1] not in (1, 3):
        raise UserError(f"an autoencoder is of colour images, or grey ones; these have {x.shape[1]} channels")
    return x.expand(-1, 3, -1, -1)


@torch.no_grad()
def encode(vae: nn.Module, x: Tensor) -> Tensor:
    """Images (N, 3 or 1, H, W) in [-1, 1] -> moments (N, 2C, h, w): the latents' mean and deviation, not yet scaled.

    Of an AutoencoderTiny, which has no deviation, the latents alone (N, C, h, w). Grey is taken for a colour.

    Raises:
        UserError: for sides that do not divide, or where latents are no finite numbers.
    """
    for side in x.shape[2:]:
        latent_size(vae, side)
    parts = []
    for part in x.split(max(1, AT_A_TIME // x[0, 0].numel())):
        encoded = vae.encode(in_colour(part))
        if hasattr(encoded, "latent_dist"):
            parts.append(torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1))
        else:
            parts.append(encoded.latents)
        if not parts[-1].isfinite().all():
            raise UserError("the autoencoder makes latents that are not finite numbers; its weights are damaged")
    return torch.cat(parts)


@torch.no_grad()
def decode(vae: nn.Module | None, latents: Tensor) -> Tensor:
    """Scaled latents (N, C, h, w) -> images (N, 3, H, W) in about [-1, 1]; without a VAE they are the images."""
    if vae is None:
        return latents
    scale, shift = scale_and_shift(vae)
    together = max(1, AT_A_TIME // (latents[0, 0].numel() * downsampling(vae) ** 2))
    return torch.cat([vae.decode(part / scale + shift).sample for part in latents.split(together)])


def encode_dataset(data: Dataset, vae: nn.Module, data_dir: Path, flip: bool) -> Dataset:
    """A dataset as latents, which are encoded once and packed in data_dir; with `flip` the mirrored ones too."""
    device, about = next(vae.parameters()).device, about_vae(vae)
    kind = f"latents-{about['vae'][:8]}-{data.images.shape[-1]}{'-flip' if flip else ''}"
    key = data.about["key"] if data.about else hashlib.sha256(data.images.contiguous().numpy()).hexdigest()
    key += hashlib.sha256(data.labels.numpy()).hexdigest()
    pack = pack_latents(
        data.name,
        data.images,
        data.labels,
        lambda images: encode(vae, normalize(images).to(device)),
        packed_folder(data_dir, data.name) / kind,
        key,
        flip,
        about | {"class_names": list(data.class_names or ())},
    )
    latents = {name: about[name] for name in ("scale", "shift", "deviation")}
    return data._replace(images=pack.images, size=tuple(pack.images.shape[2:]), about=pack.about, latents=latents)


def build_vae(image_size: int, latent_channels: int, downsample: int) -> nn.Module:
    """A small AutoencoderKL with fresh weights from torch's global generator.

    Without attention, and one residual block at each size: on a CPU what works at full size decides the time.
    """
    widths = [WIDTHS[min(i, len(WIDTHS) - 1)] for i in range(int(math.log2(downsample)) + 1)]
    vae = optional("diffusers", "training an autoencoder").AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        latent_channels=latent_channels,
        norm_num_groups=GROUPS,
        mid_block_add_attention=False,
        sample_size=image_size,
    )
    latent_size(vae, image_size)
    return vae


def train_vae(vae: nn.Module, images: Tensor, steps: int, generator: torch.Generator) -> None:
    """Train on images (N, C, H, W) uint8: squared error of the reconstruction + KL_WEIGHT * divergence from N(0, 1).

    Args:
        generator: one of the CPU's; images and noise are drawn from it.
    """
    device = next(vae.parameters()).device
    optimizer = torch.optim.AdamW(vae.train().parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)
    with Progress(steps, "autoencoder") as bar:
        for step in range(steps):
            rate = min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
            indices = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
            x = in_colour(normalize(images[indices].to(device)))
            latents = vae.encode(x).latent_dist
            noise = torch.randn(latents.mean.shape, generator=generator).to(device)
            reconstruction = vae.decode(latents.mean + latents.std * noise).sample
            error = (reconstruction - x).square().sum(dim=(1, 2, 3))
            loss = (error + KL_WEIGHT * latents.kl()).mean() / x[0].numel()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0 or step == steps - 1:  # for reading the loss waits for the device
                bar.note = f"loss {loss.item():.4f}"
            bar.update()
    vae.eval()


@torch.no_grad()
def set_scale(vae: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Set scaling_factor to 1 / the deviation of the latents of these images (N, C, H, W) uint8."""
    device = next(vae.parameters()).device
    mean, std = encode(vae, normalize(images).to(device)).chunk(2, dim=1)
    latents = mean + std * torch.randn(mean.shape, generator=generator).to(device)
    vae.register_to_config(scaling_factor=1 / latents.std().item())


def reconstruct(vae: nn.Module, images: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 -> (N, 3, H, W) in [-1, 1]: what comes back of them by way of their mean latents."""
    device = next(vae.parameters()).device
    scale, shift = scale_and_shift(vae)
    mean = encode(vae, normalize(images).to(device))[:, : vae.config.latent_channels]
    return decode(vae, (mean - shift) * scale).clamp(-1, 1).cpu()


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Train a small autoencoder, for models of latents, on the images of a data set.")
    parser.usage = "python -m support.autoencoder --out-dir DIR [--flag value ...]"
    basics = parser.group("basics")
    parser.add_fields("dataset", "data_dir", "image_size", "skip_damaged", title="basics")
    basics.add_argument("--out-dir", metavar="DIR", help="the folder to write: the autoencoder and reconstruction.png")
    parser.add_number("--train-steps", f"steps of {BATCH_SIZE} images (default: 4000)", "basics")
    parser.add_number("--latent-channels", "channels of a latent (default: 4)", "basics", most=64)
    sides = "pixels a side that become one latent (default: 4)"
    basics.add_argument("--downsample", type=int, choices=(2, 4, 8, 16), help=sides)
    parser.add_fields("seed", "device", title="basics")
    given = vars(parser.parse_args(argv))
    channels, downsample = given.pop("latent_channels", 4), given.pop("downsample", 4)
    steps, folder = given.pop("train_steps", 4000), given.pop("out_dir", None)
    if not folder:
        raise UserError("--out-dir is missing: name the folder to write the autoencoder in")
    config = Config(**given, patch_size=None)  # which need not divide the size of these images
    device, generator = choose_device(config.device), torch.Generator().manual_seed(config.seed)
    settings = dict(image_size=config.image_size, skip_damaged=config.skip_damaged)
    check_new_folder("--out-dir", folder)
    with writing_folder(folder) as temporary:
        train = load_dataset(config.dataset, config.data_folder, **settings).images
        test = load_dataset(config.dataset, config.data_folder, train=False, **settings).images
        torch.manual_seed(config.seed)
        vae = build_vae(train.shape[-1], channels, downsample).to(device)
        train_vae(vae, train, steps, generator)
        set_scale(vae, train[torch.randint(len(train), (2000,), generator=generator)], generator)
        report(vae, test, temporary / "reconstruction.png")
        with believing(f"cannot write {folder}; free some space or choose another folder"):
            vae.save_pretrained(temporary)
    print(f"written: {shown(folder)}; train with --vae {shown(folder)}")


def report(vae: nn.Module, images: Tensor, path: Path) -> None:
    """Print the error of the reconstruction of images (N, C, H, W) uint8; draw originals above reconstructions."""
    error, first = 0.0, None
    for part in images.split(500):
        x, again = in_colour(normalize(part)), reconstruct(vae, part)
        error += (again - x).square().sum().item() / (3 * images[:, 0].numel())
        first = (x, again) if first is None else first
    pictures = [part[start : start + 12] for start in (0, 12, 24) for part in first]
    save_png(torch.cat([row for row in pictures if len(row)]), path, columns=min(12, len(images)))
    size = latent_size(vae, images.shape[-1])
    print(
        f"{tuple(images.shape[1:])} -> ({vae.config.latent_channels}, {size}, {size}), "
        f"reconstruction of {len(images):,} test images: squared error {error:.5f} (pixels in [-1, 1]), "
        f"PSNR {10 * math.log10(4 / error):.2f} dB; scaling_factor {vae.config.scaling_factor:.4f}"
    )


if __name__ == "__main__":
    run_script(main)
