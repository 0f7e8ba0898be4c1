"""Published weights: facebookresearch/DiT's, SiT's and `diffusers'`, as DiTs of this repository.

    DiT        DiT-XL-2-256x256.pt, a state dict with this repository's names, or what its train.py writes,
               {"model", "ema", "opt", "args"}, of which "ema" is taken
    SiT        (Ma et al., 2024) the same names and shapes in the same files, but a velocity on the straight line from
               noise to data; in training files "args" tells which of the two it is, in others nothing does
    diffusers  the state dict of a DiTTransformer2DModel, or a folder with it; q, k and v apart, t and y embedded in
               every block; config.json beside it tells the sizes that the tensors do not

They denoise latents (B, 4, H / 8, W / 8); autoencoder.py turns those into images (B, 3, H, W).

The other way: `python -m support.published MODEL DIR` writes a model.pth as a folder for diffusers (see export).
"""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import PAPER_MODELS, SIZES, Config, preset
from dit import DiT, LabelEmbedder, sincos_pos_embed
from support.command_line import Parser, run_script, shown
from support.errors import UserError, believing, is_memory_error, optional, reason_of
from support.files import load_file, save_json, warn, writing
from time_emb import TimestepEmbedder, timestep_embedding

# Whose network it is, for a file that does not tell: the paper's (in whatever format), SiT's, one trained in diffusers.
PUBLISHED = ("dit", "sit", "diffusers")
DOWNLOADS = {
    name: f"https://dl.fbaipublicfiles.com/DiT/models/{name}" for name in ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
}
# As SiT's paper samples by its ODE: Heun's method in 250 network evaluations.
SIT_SAMPLING = dict(process="flow_matching", prediction="v", time_sampling="uniform")
SIT_SAMPLING |= dict(sampler="heun", sample_steps=125, cfg_low=0.0, cfg_high=1.0)
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
WEIGHTS = "diffusion_pytorch_model"  # the stem of diffusers' files
FIRST_EMBEDDER = "transformer_blocks.0.norm1.emb."  # each block has its own copy: all are equal
FROM_DIFFUSERS = {  # parts of names, replaced in this order, and in the reverse order for the way back
    FIRST_EMBEDDER + "timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    FIRST_EMBEDDER + "timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    FIRST_EMBEDDER + "class_embedder.": "y_embedder.",
    "pos_embed.proj.": "x_embedder.proj.",
    "transformer_blocks.": "blocks.",
    ".attn1.to_q.": ".attn.qkv.",
    ".attn1.to_out.0.": ".attn.proj.",
    ".ff.net.0.proj.": ".mlp.fc1.",
    ".ff.net.2.": ".mlp.fc2.",
    ".norm1.linear.": ".adaLN_modulation.1.",
    "proj_out_1.": "final_layer.adaLN_modulation.1.",
    "proj_out_2.": "final_layer.linear.",
}


class SiTTime(TimestepEmbedder):
    """SiT's time: from 0 (noise) to 1 (data), for that of FlowMatching, 1000 t, from 1000 (noise) to 0 (data)."""

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(1 - t / 1000)


class DiffusersTime(TimestepEmbedder):
    """The time as `diffusers` trains it: frequencies exp(-ln(10000) i / 127), the paper's having 128 there."""

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_embedding(t, self.frequency_embedding_size, max_period=10_000.0 ** (128 / 127))
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class NoNullClass(LabelEmbedder):
    """A label table that was trained without the null class; its last row only fills the place."""

    def forward(self, y: Tensor) -> Tensor:
        if (y == self.embedding_table.num_embeddings - 1).any():
            raise UserError("the weights know no null class, which guidance needs; leave out cfg_scale, or make it 1")
        return super().forward(y)


class Published(NamedTuple):
    """What a published file comes to: a Config, a state dict, and modules that take the place of a DiT's own."""

    config: Config
    state: dict[str, Tensor]
    parts: dict[str, nn.Module]


def weights_of(path: str | Path) -> Path:
    """The file of weights in a folder of diffusers', a model's or a pipeline's; any other path is itself."""
    folder = Path(path)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    for ending in ("safetensors", "safetensors.index.json", "bin", "bin.index.json"):
        if (folder / f"{WEIGHTS}.{ending}").exists():
            return folder / f"{WEIGHTS}.{ending}"
    return Path(path)


def from_diffusers(state: dict[str, Tensor], image_size: int = 32) -> dict[str, Tensor]:
    """The state dict of diffusers' DiTTransformer2DModel under this repository's names.

    It lacks the position embedding, which image_size, in latent pixels, decides.

    Raises:
        UserError: if its blocks embed t and y each in its own way.
    """
    converted = {}
    for name, tensor in state.items():
        if ".norm1.emb." in name and not name.startswith(FIRST_EMBEDDER):
            if not torch.equal(tensor, state[FIRST_EMBEDDER + name.split(".norm1.emb.")[1]]):
                raise UserError(f"{name} is not that of the first block; here all blocks share one embedder of t and y")
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


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other way: a DiT's state dict under diffusers' names; image_size goes into its config.json."""
    depth, converted = sizes_of(state)["depth"], {}
    for name, tensor in state.items():
        if name == "pos_embed":
            continue
        for theirs, ours in reversed(FROM_DIFFUSERS.items()):
            name = name.replace(ours, theirs)
        if name.startswith(FIRST_EMBEDDER):
            for block in range(depth):
                converted[name.replace(".0.", f".{block}.", 1)] = tensor
        elif ".to_q." in name:
            for part, rows in zip("qkv", tensor.chunk(3)):
                converted[name.replace(".to_q.", f".to_{part}.")] = rows
        else:
            converted[name] = tensor
    return converted


def sizes_of(state: dict[str, Tensor], adds_pos_embed: bool = True) -> dict[str, int | bool]:
    """What a DiT's state dict says of its Config; of image_size nothing, where its block adds no position embedding.

    Raises:
        KeyError: for a tensor that every DiT has and this one lacks.
    """
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    values = patch_size**2 * in_channels
    sizes = {
        "depth": 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1),
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,  # the last row is the null class
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * values,
    }
    if adds_pos_embed:
        sizes["image_size"] = round(state["pos_embed"].shape[1] ** 0.5) * patch_size
    return sizes


def told_by_args(args: Any) -> dict[str, Any]:
    """What the flags of DiT's or SiT's train.py, kept in their files, say of a Config, and whose network it is.

    Their image_size is in pixels of an autoencoder that they do not name; the position embedding tells that of latents.

    Raises:
        UserError: for a SiT of another path or prediction than the straight line's velocity.
    """
    args = vars(args) if isinstance(args, Namespace) else args if isinstance(args, dict) else {}
    told = {name: args[name] for name in ("num_classes", "class_dropout_prob") if name in args}
    family, _, size = str(args.get("model", "")).partition("-")
    if family in ("DiT", "SiT"):
        told |= {"published": family.lower()} | PAPER_MODELS.get(f"DiT-{size}", {})
    elif family:
        told["family"] = args["model"]
    if "path_type" in args:  # a flag of SiT's train.py alone, whatever its network is called
        told["published"] = "sit"
        for name, only in (("path_type", "Linear"), ("prediction", "velocity")):
            if args.get(name, only) != only:
                raise UserError(f"it is a SiT of {name} {args[name]!r}; only {only} can be read")
    return told


def told_by_config(path: str | Path) -> dict[str, Any]:
    """What the config.json beside a file of diffusers' says of a Config, and its norm_eps; {} where there is none.

    Raises:
        UserError: if it cannot be read, or describes another network than a DiT.
    """
    beside = Path(path).with_name("config.json")
    if not beside.exists():
        return {}
    try:
        values = dict(json.loads(beside.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{beside} beside it cannot be read ({reason_of(error)})") from error
    for name, known in (
        ("_class_name", ("DiTTransformer2DModel", "Transformer2DModel")),
        ("activation_fn", ("gelu-approximate",)),
        ("norm_type", ("ada_norm_zero",)),
    ):
        if values.get(name, known[0]) not in known:
            raise UserError(f"{beside} says {name} {values[name]!r}; of a DiT it is {known[0]!r}")
    names = {"num_attention_heads": "num_heads", "num_layers": "depth", "sample_size": "image_size"}
    names |= {"num_embeds_ada_norm": "num_classes"} | {name: name for name in ("in_channels", "patch_size", "norm_eps")}
    for name in (*names, "attention_head_dim"):
        if not isinstance(values.get(name, 0), (int, float)):
            raise UserError(f"{beside} says {name} {values[name]!r}; it must be a number")
    told = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
    if {"num_attention_heads", "attention_head_dim"} <= values.keys():
        told["hidden_size"] = values["num_attention_heads"] * values["attention_head_dim"]
    return told


def negated_first_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A SiT's state dict -> one whose last layer gives noise - data, and not data - noise and C channels of no use."""
    _, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    changed = dict(state)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = -state[name].unflatten(0, (patch_size**2, -1))  # a patch is in (row, column, channel) order
        changed[name] = (rows[:, :in_channels] if rows.shape[1] == 2 * in_channels else rows).flatten(0, 1)
    return changed


def understand(content: Any, path: str | Path, published: str | None) -> tuple[dict, dict[str, Any], list[str]]:
    """A published file's content -> its state dict under this repository's names, what is known of it, what is assumed.

    Known are values of Config's fields, whose network it is ("published"), norm_eps, and whether it has a null class.

    Raises:
        UserError: if it contradicts `published`, or says what no network here can be.
        Exception: any, if it is in no format known here.
    """
    known: dict[str, Any] = {}
    assumed: list[str] = []

    def assume(name: str, value: Any, words: str) -> None:
        if name not in known:
            known[name] = value
            assumed.append(words)

    wrapped = [content[name] for name in ("ema", "model", "state_dict") if name in content]
    if wrapped and "ema" not in content:
        assumed.append("that its weights are wanted, for it holds no average of them")
    state = {PREFIXES.sub("", name): tensor for name, tensor in (wrapped or [content])[0].items()}
    known |= told_by_args(content.get("args"))
    if published and known.setdefault("published", published) != published:
        raise UserError(f"its args say that it is {known['published']}; leave out --published {published}")
    if "family" in known and "published" not in known:
        raise UserError(f"its args name a {known['family']}; if that is a DiT or a SiT, say which with --published")
    other = "--published sit for SiT's, whose files look alike"
    if "pos_embed.proj.weight" in state:
        other = "--published diffusers for one trained in diffusers"
        known |= told_by_config(path)
        assume("image_size", 32, "images of 256 pixels (a config.json beside it would tell)")
        state = from_diffusers(state, known["image_size"])
    assume("published", "dit", f"the paper's DiT ({other})")

    table = state["y_embedder.embedding_table.weight"]
    if known.pop("class_dropout_prob", None) == 0:
        known.setdefault("num_classes", len(table))
    classes = len(table) - 1
    assume("num_classes", classes, f"{classes} classes and a null class (num_classes in its args would tell)")
    known["null_class"] = known["num_classes"] != len(table)
    if not known["null_class"]:
        state["y_embedder.embedding_table.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    if known["published"] == "sit":
        state = negated_first_half(state)
    return state, known, assumed


def read_published(content: Any, path: str | Path, published: str | None = None) -> Published:
    """A published file's content, read as what it says of itself; what it does not say is assumed, in a line on stderr.

    Args:
        published: whose network it is, one of PUBLISHED, where the file does not say.

    Raises:
        UserError: if it is in no format known here, or contradicts itself or `published`, or if nothing tells its
            number of heads and its sizes are not in the paper's table.
    """
    if published not in (None, *PUBLISHED):
        raise UserError(f"published {published!r} is not one of {', '.join(PUBLISHED)}")
    try:
        state, known, assumed = understand(content, path, published)
        sizes = sizes_of(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a file can hold anything
        if is_memory_error(error):
            raise
        why = reason_of(error) if isinstance(content, dict) else "it holds no state dict"
        raise UserError(
            f'{path} is neither a Pocket DiT model (it lacks "model" and "config") nor published weights ({why})'
        ) from error
    for name, value in sizes.items():
        if known.get(name, value) != value:
            raise UserError(f"{path}: its weights have {name} {value}, but it is said to be {known[name]}")
    rows = [name for name, row in PAPER_MODELS.items() if all(sizes.get(k, value) == value for k, value in row.items())]
    if not rows and "num_heads" not in known:
        table = ", ".join(f"{size} {width} and {depth}" for size, (depth, width, _) in SIZES.items())
        found = f"hidden_size {sizes['hidden_size']}, depth {sizes['depth']} and patch_size {sizes['patch_size']}"
        raise UserError(
            f"{path} does not tell its number of heads, and {found} are in no row of the paper's table "
            f"({table}; patches of 8, 4 or 2)"
        )
    if "num_heads" not in known:
        assumed.append(f"the {PAPER_MODELS[rows[0]]['num_heads']} heads of {rows[0]}")
    if assumed:
        warn(f"{path} does not say what all of it means; assumed: " + "; ".join(assumed))

    sizes["num_heads"] = known.get("num_heads") or PAPER_MODELS[rows[0]]["num_heads"]
    sizes |= {"clip_x0": False, "latents": True, "cfg_scale": 4.0 if known["null_class"] else 1.0}
    try:
        if known["published"] == "sit":
            config = Config(preset="flow", **sizes, **SIT_SAMPLING)
        else:
            config = preset(rows[0] if rows else "DiT-XL/2", **sizes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Published(config, state, parts_of(config, known))


def parts_of(config: Config, known: dict[str, Any]) -> dict[str, nn.Module]:
    """The modules, by name, that stand in a published network where DiT has others; without weights."""
    parts: dict[str, nn.Module] = {}
    with torch.device("meta"):
        if not known["null_class"]:
            parts["y_embedder"] = NoNullClass(config.num_classes, config.hidden_size)
        if known["published"] == "sit":
            parts["t_embedder"] = SiTTime(config.hidden_size)
        if known["published"] == "diffusers":
            parts["t_embedder"] = DiffusersTime(config.hidden_size)
        norm_eps = known.get("norm_eps", 1e-5 if known["published"] == "diffusers" else 1e-6)
        for block in range(config.depth):
            parts[f"blocks.{block}.norm2"] = nn.LayerNorm(config.hidden_size, norm_eps, elementwise_affine=False)
    return parts


def export(model_path: str | Path, folder: str | Path) -> None:
    """Write a model.pth's network as a folder that DiTTransformer2DModel.from_pretrained loads.

    diffusers embeds t with frequencies exp(-ln(10000) i / 127) where ours, the paper's, have 128. That is written into
    its code, so set it right after loading, and the two agree to rounding:

        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0

    Without that, what the shipped weights predict of noisy MNIST digits has a relative error of 1.7% (mean over the
    timesteps; 9.6% at the worst, t = 966); with it, of 2e-7. The folder holds the network alone: of which process it is
    and what it predicts, its user has to know.

    Raises:
        UserError: if the file is no model.pth of adaLN-Zero blocks, or the folder cannot be written.
    """
    safetensors = optional("safetensors.torch", "the export to diffusers")
    content = load_file(model_path, "name a model.pth of train.py")
    with believing(f"{model_path} holds no DiT with adaLN-Zero blocks"):
        state, heads = content.get("ema", content["model"]), content["config"]["num_heads"]
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("it has values that are not finite numbers")
        sizes = sizes_of(state)
        with torch.device("meta"):
            DiT(**sizes, num_heads=heads).load_state_dict(state, assign=True)
    values = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": sizes["hidden_size"] // heads,
        "in_channels": sizes["in_channels"],
        "out_channels": sizes["in_channels"] * (2 if sizes["learn_sigma"] else 1),
        "num_layers": sizes["depth"],
        "sample_size": sizes["image_size"],
        "patch_size": sizes["patch_size"],
        "num_embeds_ada_norm": sizes["num_classes"],
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_eps": 1e-6,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    with writing(Path(folder) / f"{WEIGHTS}.safetensors") as file:  # a format in which no two tensors share memory
        file.write(safetensors.save({name: tensor.clone() for name, tensor in to_diffusers(state).items()}))
    save_json(values, Path(folder) / "config.json")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Write a model's network as a folder for diffusers' DiTTransformer2DModel.from_pretrained.")
    parser.usage = "python -m support.published MODEL DIR"
    parser.add_argument("model", metavar="MODEL", help="a model.pth of train.py")
    parser.add_argument("folder", metavar="DIR", help="the folder to write; created where it is missing")
    given = parser.parse_args(argv)
    export(given.model, given.folder)
    print(
        f"written: {shown(given.folder)}; after from_pretrained, for block in model.transformer_blocks: "
        f"block.norm1.emb.time_proj.downscale_freq_shift = 0"
    )


if __name__ == "__main__":
    run_script(main)
