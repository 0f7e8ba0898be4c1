"""Published weights: facebookresearch/DiT's files and `diffusers`', recognised by their tensors' names.

    facebookresearch/DiT  DiT-XL-2-256x256.pt, a state dict with this repository's names, or what its train.py writes,
                          {"model", "ema", "opt", "args"}, of which "ema" is taken
    diffusers             the state dict of a DiTTransformer2DModel; q, k and v apart, t and y embedded in every block

They denoise latents (B, 4, H / 8, W / 8); autoencoder.py turns those into images (B, 3, H, W).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import PAPER_MODELS, SIZES, Config, preset
from dit import sincos_pos_embed
from support.errors import UserError

DOWNLOADS = {
    name: f"https://dl.fbaipublicfiles.com/DiT/models/{name}" for name in ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
}
FIRST_EMBEDDER = "transformer_blocks.0.norm1.emb."  # each block has its own copy: all are equal
FROM_DIFFUSERS = {  # parts of names, replaced in this order
    FIRST_EMBEDDER + "timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    FIRST_EMBEDDER + "timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    FIRST_EMBEDDER + "class_embedder.": "y_embedder.",
    "pos_embed.proj.": "x_embedder.proj.",
    "proj_out_1.": "final_layer.adaLN_modulation.1.",
    "proj_out_2.": "final_layer.linear.",
    "transformer_blocks.": "blocks.",
    ".attn1.to_q.": ".attn.qkv.",
    ".attn1.to_out.0.": ".attn.proj.",
    ".ff.net.0.proj.": ".mlp.fc1.",
    ".ff.net.2.": ".mlp.fc2.",
    ".norm1.linear.": ".adaLN_modulation.1.",
}


def from_diffusers(state: dict[str, Tensor], image_size: int = 32) -> dict[str, Tensor]:
    """The state dict of diffusers' DiTTransformer2DModel under this repository's names.

    It lacks the position embedding, which image_size, in latent pixels, decides.
    """
    converted = {}
    for name, tensor in state.items():
        if ".norm1.emb." in name and not name.startswith(FIRST_EMBEDDER):
            continue
        if ".attn1.to_k." in name or ".attn1.to_v." in name:
            continue
        if ".attn1.to_q." in name:
            tensor = torch.cat([tensor, *(state[name.replace(".to_q.", f".to_{part}.")] for part in "kv")])
        for theirs, ours in FROM_DIFFUSERS.items():
            name = name.replace(theirs, ours)
        converted[name] = tensor
    hidden_size, _, patch_size, _ = converted["x_embedder.proj.weight"].shape
    converted["pos_embed"] = sincos_pos_embed(hidden_size, image_size // patch_size)
    return converted


def sizes_of(state: dict[str, Tensor]) -> dict[str, int | bool]:
    """What a DiT's state dict says of its Config.

    Raises:
        KeyError: for a tensor that every DiT has and this one lacks.
    """
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    values = patch_size**2 * in_channels
    return {
        "depth": 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1),
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "image_size": round(state["pos_embed"].shape[1] ** 0.5) * patch_size,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,  # the last row is the null class
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * values,
    }


def reason_of(error: Exception) -> str:
    """What went wrong with a file's content, in one line."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_published(content: Any, path: str | Path) -> tuple[Config, dict[str, Tensor]]:
    """The Config and the state dict of a published file's content; they sample as the paper does.

    Raises:
        UserError: if it is in neither format, or of a width and depth that are not the paper's.
    """
    try:
        state = content["ema"] if "ema" in content else content
        if "pos_embed.proj.weight" in state:
            beside = Path(path).with_name("config.json")  # where diffusers tells the size of the latents
            state = from_diffusers(state, json.loads(beside.read_text())["sample_size"] if beside.exists() else 32)
        sizes = sizes_of(state)
    except Exception as error:  # a file can hold anything
        why = reason_of(error) if isinstance(content, dict) else "it holds no state dict"
        raise UserError(
            f'{path} is neither a Pocket DiT model (it lacks "model" and "config") nor published weights ({why})'
        ) from error
    for name, row in PAPER_MODELS.items():
        if all(sizes.get(key, value) == value for key, value in row.items()):
            settings = {key: value for key, value in sizes.items() if key not in row}
            return preset(name, **settings, clip_x0=False, cfg_scale=4.0), state
    rows = ", ".join(f"{size} {width} and {depth}" for size, (depth, width, _) in SIZES.items())
    found = f"hidden_size {sizes['hidden_size']}, depth {sizes['depth']} and patch_size {sizes['patch_size']}"
    raise UserError(f"{path}: {found} are in no row of the paper's table ({rows}; patches of 8, 4 or 2)")
