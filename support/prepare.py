"""Before training: what the flags leave open is settled by the data, and by the weights that a run starts from."""

import os
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from config import PRESET_OF, PRESETS, Config
from dataset import DATASETS, Dataset, load_dataset
from loaders.sources import full_name
from support.autoencoder import downsampling, encode_dataset, open_vae
from support.captions import caption_text
from support.checkpoint import settings_of
from support.distributed import together
from support.errors import UserError, optional
from support.machine import choose_compile, choose_precision


def rooted(given: dict[str, Any]) -> dict[str, Any]:
    """Flags given, their paths from the root, so that they mean the same wherever a run goes on."""
    paths = {name: os.path.abspath(os.path.expanduser(given[name])) for name in ("vae", "init_from") if name in given}
    names = {"dataset": full_name(given["dataset"], ("auto", *DATASETS))} if "dataset" in given else {}
    return given | paths | names


def preset_of(given: dict[str, Any]) -> str:
    """The preset that flags name; where they name none, the one that suits their dataset."""
    if given.get("process") == "consistency":
        return given.get("preset") or "one-step"
    return given.get("preset") or PRESET_OF.get(given.get("dataset", "auto"), "pictures")


def new_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of config.preset for a new run: the flags given, and what the weights to start from decide."""
    given = rooted(given)
    settings = PRESETS.get(given.get("preset"), {}) | given
    tuned, path = settings.get("process") == "consistency", settings.get("init_from")
    if tuned and not path:
        raise UserError("process consistency tunes weights that are there; give --init-from, such as model.pth")
    start = settings_of(path, "consistency" if tuned else given.get("process")) if path else {}
    changes = start | {name: value for name, value in given.items() if name != "preset"}
    return {"name": preset_of(given), **changes}


def suitable_patch(side: int) -> int:
    """The patch size for images of this side: the largest of at most 8 pixels that leaves 4 x 4 tokens or more.

    Raises:
        UserError: if that is one pixel, and there are many.
    """
    patch = max(patch for patch in range(1, 9) if side % patch == 0 and (4 * patch <= side or patch == 1))
    if patch == 1 and side > 16:
        near = 8 * round(side / 8)
        raise UserError(
            f"images of {side} x {side} do not divide into patches of 2 to 8 pixels; try --image-size {near}"
        )
    return patch


def prepare(config: Config, device: torch.device) -> tuple[Config, Dataset, nn.Module | None]:
    """The data that a config names, the config as it fits them, and the autoencoder of latents, or None."""
    if config.tensorboard:  # an extra package, which it is better to miss now than after the hours that data may take
        optional("tensorboard", "--tensorboard")
    vae = open_vae(config.vae, device) if config.vae else None
    # Of a run that goes on, image_size is the latents' already; of a new one it is the images'.
    size = config.image_size * downsampling(vae) if config.latents else config.image_size
    data = load_dataset(config.dataset, config.data_folder, image_size=size, skip_damaged=config.skip_damaged)
    if config.flip and data.caption_length:
        raise UserError("--flip would turn left and right round in images, but not in their captions; leave it out")
    if vae:
        data = encode_dataset(data, vae, config.data_folder, config.flip)
    side = data.images.shape[-1]
    changes = dict(
        dataset=data.name,
        image_size=side,
        in_channels=data.channels,
        num_classes=data.num_classes,
        class_names=data.class_names,
        caption_length=data.caption_length,
        patch_size=config.patch_size or suitable_patch(side),
        precision=choose_precision(config.precision, device),
        compile=choose_compile(config.compile, config.train_steps),
    )
    if vae:
        changes |= dict(latents=True, clip_x0=False)
    if data.caption_length:
        changes |= dict(captions=tuple(caption_text(y, data.class_names) for y in data.labels[:10].tolist()))
    if data.num_classes == 1:  # there is no other to be told from
        changes |= dict(cfg_scale=1.0, teacher_cfg_scale=1.0, label_dropout=0.0)
    return config.replace(**changes), data.to(device), vae


def check_same(data: Dataset) -> None:
    """UserError unless all processes of a run have the same labels and, of a thousand compared, images."""
    if not together():
        return
    some = torch.linspace(0, len(data.labels) - 1, 1000).long()
    parts = (data.labels, data.images[some.to(data.images.device)])
    number = zlib.crc32(b"".join(part.cpu().numpy().tobytes() for part in parts))
    bounds = torch.tensor([number, -number])  # whose maxima are opposite where there is but one number
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    if bounds.sum():
        raise UserError("the processes have read different data; have all machines hold the same in --data-dir")
