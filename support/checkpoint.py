"""From files and configs to models and processes: what the names in a Config stand for, and what is believed of a file.

`model.pth` is {"model": state_dict, "config": dict}: all that is needed to sample. Published weights, which say nothing
of a config, are recognised by published.py; what a training run goes on from is in run_state.py.
"""

import copy
import dataclasses
import inspect
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import OPTIONS, ROOT, SAMPLING, Config
from diffusion import Diffusion
from dit import DiT
from dit_block import DiTBlock
from support.captions import parse_caption
from support.command_line import parse_labels
from support.distributed import processes
from support.errors import UserError, believing
from support.files import load_file, read_file, save_file, warn
from support.machine import check_memory
from support.published import DOWNLOADS, read_published, sizes_of, weights_of
from variants.captions import BagOfWords, TextEmbedder
from variants.conditioning import AdaLNBlock, CrossAttentionBlock, InContextBlock
from variants.consistency import ConsistencyModel
from variants.flow_matching import FlowMatching
from variants.joint_attention import JointAttentionBlock
from variants.learned_variance import LearnedVariance
from variants.modern_block import ModernBlock

BLOCKS = {
    "in-context": InContextBlock,
    "cross-attention": CrossAttentionBlock,
    "adaLN": AdaLNBlock,
    "adaLN-Zero": DiTBlock,
    "modern": ModernBlock,
    "joint-attention": JointAttentionBlock,
}
PROCESSES = {"diffusion": Diffusion, "flow_matching": FlowMatching, "consistency": ConsistencyModel}
# The fields that every version has written, and that no default can stand for.
OF_EVERY_FILE = "image_size patch_size in_channels hidden_size depth num_heads num_classes".split()
OF_EVERY_FILE += ["process", "prediction", "schedule"]
# What runs did before there was a field to say so, for files of that time.
BEFORE = dict(block="adaLN-Zero", learn_sigma=False, clip_x0=True, time_sampling="uniform", time_mean=0.0)
BEFORE |= dict(optimizer="adamw", cfg_low=0.0, cfg_high=1.0, accumulation_steps=1, activation_checkpointing=False)
BEFORE |= dict(flip=False, skip_damaged=False, vae=None, init_from=None, class_names=None, latents=False)
BEFORE |= dict(caption_length=None, captions=None, teacher_cfg_scale=1.0)
OF_THE_MACHINE = ("data_dir", "out_dir", "device", "shard", "tensorboard", "profile")
NETWORK = "image_size in_channels patch_size hidden_size depth num_heads block caption_length".split()
PROCESS = ("process", "prediction", "time_sampling", "time_mean", *SAMPLING[:-1])  # eta is among OPTIONS


def model_config(config: Config) -> dict[str, Any]:
    """What model.pth keeps of a Config: everything but what concerns the machine that trained it.

    Of init_from that is the path from the root of the repository, or of a file that is elsewhere its name.
    """
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in OF_THE_MACHINE}
    if config.init_from:
        start = Path(config.init_from)
        fields["init_from"] = start.relative_to(ROOT).as_posix() if start.is_relative_to(ROOT) else start.name
    return fields


def build_model(config: Config) -> DiT:
    """A fresh DiT of a config's sizes; its weights come from torch's global generator.

    Raises:
        UserError: for labels, where the block is one for captions.
    """
    block, y_embedder = BLOCKS[config.block], None
    if config.caption_length:
        sizes = (config.num_classes, config.caption_length, config.hidden_size)
        y_embedder = TextEmbedder(*sizes, config.num_heads) if block.reads_words else BagOfWords(*sizes)
    elif config.block == "joint-attention":
        raise UserError("block joint-attention is for captions, such as those of --dataset scenes; these are labels")
    return DiT(
        image_size=config.image_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=config.num_classes,
        learn_sigma=config.learn_sigma,
        block=block,
        activation_checkpointing=config.activation_checkpointing,
        y_embedder=y_embedder,
    )


def build_process(
    config: Config, start: DiT | None = None, state: dict[str, Any] | None = None
) -> Diffusion | FlowMatching:
    """The process that a config names; its options bear the names of the config's fields.

    Args:
        start: to train, the network that the run starts from, of which the teacher is a copy, where there is one.
        state: of the checkpoint that the run goes on from instead; its teacher is taken out of it.

    Raises:
        UserError: for a teacher in shards.
    """
    process = PROCESSES[config.process]
    if config.learn_sigma:
        process = LearnedVariance
    options = inspect.signature(process).parameters
    values = {name: value for name, value in vars(config).items() if name in options}
    if start is not None and "teacher" in options:
        if config.shard:
            raise UserError(f"shard does not go with process {config.process}, whose teacher is whole; leave it out")
        values["teacher"] = copy.deepcopy(start)
        if state:
            values["teacher"].load_state_dict(state.pop("teacher"))
    return process(**values)


def read_config(values: Any, path: str | Path, needed: Iterable[str] = OF_EVERY_FILE) -> Config:
    """A Config from what a file says of it, or UserError naming the file; the fields needed have to be there."""
    with believing(f"{path} holds no usable config"):
        if not isinstance(values, dict):
            raise TypeError("it is no dict")
        for name in needed:
            values[name]
        values = {**BEFORE, **values}
        if isinstance(values.get("seed"), int):
            values = {**values, "seed": values["seed"] % 2**32}  # larger ones, once allowed, drew the same numbers
        return Config(**values)


def empty_model(config: Config) -> DiT:
    """A model to be compared or filled. A large one is on the meta device: sizes only, for a config may lie.

    A small one is not, because the meta device loads torch's compiler, which takes seconds.
    """
    D, patch_values = config.hidden_size, config.patch_size**2 * config.in_channels
    tokens = (config.image_size // config.patch_size) ** 2
    parameters = D * (18 * config.depth * D + config.num_classes + tokens + 3 * patch_values)
    with torch.device("cpu" if parameters < 10**7 else "meta"), torch.random.fork_rng(devices=[]):
        return build_model(config)


def check_state(state: dict[str, Tensor], config: Config) -> DiT:
    """An empty model of a config's sizes; UserError unless the state dict fits it, name by name, and is finite."""
    if not isinstance(state, dict):
        raise UserError("its weights are no state dict")
    for name, value in sizes_of(state, BLOCKS[config.block].adds_pos_embed).items():
        if getattr(config, name) != value:
            raise UserError(f"its weights have {name} {value}, but its config says {getattr(config, name)}")
    model = empty_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, parameter in model.state_dict().items():
        shape = shapes.pop(name, "missing")
        if shape != tuple(parameter.shape):
            raise UserError(f"{name} is {shape}; in a model of its sizes it is {tuple(parameter.shape)}")
        if not (state[name].is_floating_point() and state[name].isfinite().all()):
            raise UserError(f"{name} has values that are not finite numbers")
    if shapes:
        raise UserError(f"{next(iter(shapes))} is no part of a model of its sizes")
    return model


def check_size(config: Config, device: torch.device, copies: int | None = None) -> None:
    """UserError, before the work, for a network that cannot be trained in the memory that is there.

    Counted is the least it takes: weights, gradients, the average, the optimizer's moments, two of AdamW's, a teacher;
    of the activations, for each feature of a token in each block, the six numbers that compiled code in bf16 keeps.
    """
    parameters = sum(parameter.numel() for parameter in empty_model(config).parameters())
    copies = copies or (4 if config.optimizer == "muon" else 5) + (config.process == "consistency")
    copies /= processes() if config.shard else 1
    images = config.batch_size // (processes() * config.accumulation_steps)
    tokens = images * (config.image_size // config.patch_size) ** 2
    activations = tokens * config.hidden_size * config.depth * (1 if config.activation_checkpointing else 6)
    what = f"a network of {parameters:,} parameters with a batch of {config.batch_size}"
    advice = "try a smaller --hidden-size, --depth or --batch-size"
    check_memory(4 * (copies * parameters + activations), what, advice, device)


def load_model(
    path: str | Path, device: str | torch.device = "cpu", published: str | None = None
) -> tuple[DiT, Config]:
    """The model of a model.pth or of published weights, in evaluation mode, and its config.

    Args:
        path: the file, or a folder of diffusers'.
        published: whose network published weights are, where their file does not say (see published.PUBLISHED).

    Raises:
        UserError: if the file cannot be read, or its weights are not those of the model its config describes, or
            `published` would change nothing.
    """
    path = weights_of(path)
    address = DOWNLOADS.get(path.name)
    advice = f"download it from {address}" if address else "name a file of weights, such as runs/digits/model.pth"
    content, intact = read_file(path, advice)
    ours = isinstance(content, dict) and {"model", "config"} <= content.keys()
    if not intact:
        if ours:
            raise UserError(f"{path} is damaged: its checksums do not fit what it holds")
        warn(f"the checksums of {path} do not fit what it holds: it is damaged, or was written without them")
    if ours:
        if published:
            raise UserError(f"--published {published} would change nothing: {path} says what it is; leave it out")
        # Of a training checkpoint, as of model.pth, the average of the weights is what draws best.
        config, state, parts = read_config(content["config"], path), content.get("ema", content["model"]), {}
    else:
        config, state, parts = read_published(content, path, published)
    with believing(f"{path} holds no usable model"):
        model = check_state(state, config)
        for name, part in parts.items():
            model.set_submodule(name, part)
        model.to_empty(device=device).load_state_dict(state)
    return model.eval(), config


def save_in_half(source: str | Path, path: str | Path) -> None:
    """A model.pth again, with its weights in half precision, to be shipped; load_model makes float32 of them."""
    content = load_file(source)
    content["model"] = {name: tensor.half() for name, tensor in content["model"].items()}
    save_file(content, path)


def settings_of(path: str | Path, process: str | None = None) -> dict[str, Any]:
    """The fields of Config that weights to start from decide: their network, its process and how to sample from it.

    Args:
        process: that of the run, where it is said. To tune them for consistency they must be of a diffusion that
            predicts x_0; of their process the schedule is kept then, and how to sample is another matter.

    Raises:
        UserError: for weights of another process, or that cannot be tuned.
    """
    config = load_model(path)[1]
    process, names = process or config.process, [*NETWORK, *PROCESS, *OPTIONS[config.process]]
    if process == "consistency":
        if (config.process, config.prediction, config.learn_sigma) != ("diffusion", "x0", False):
            told = f"{config.prediction}{' and variances' if config.learn_sigma else ''} in process {config.process}"
            raise UserError(f"--init-from {path}: it predicts {told}; process consistency needs x0 in diffusion")
        names = [*NETWORK, "schedule", "clip_x0"]
    elif process != config.process:
        raise UserError(f"--init-from {path} is of process {config.process}; leave out --process {process}")
    # Latents' size is not that of the images, which the user names; channels are the data's to say.
    left_out = {"in_channels", "caption_length", "image_size" if config.latents else ""}
    left_out |= set(SAMPLING) if config.num_classes == 1 else set()
    return {name: getattr(config, name) for name in names if name not in left_out}


def class_names_of(config: Config) -> list[str]:
    """The names of a config's classes, or words; where it has none, their numbers."""
    return list(config.class_names or map(str, range(config.num_classes)))


def asked_for(config: Config, labels: str | None = None, prompts: list[str] | None = None) -> tuple[list, list[str]]:
    """What a model is to draw, by --labels or by --prompt: labels, or captions (lists of words), and a name for each.

    Where neither is given they are all labels, or those captions of its data that the config keeps.

    Raises:
        UserError: for labels of a model of captions, or the other way round, and for those it does not know.
    """
    if config.caption_length:
        if labels is not None:
            raise UserError(f"--labels {labels}: this is a model of captions; give --prompt")
        prompts = prompts or list(config.captions or [""])
        asked = [parse_caption(prompt, config.class_names, config.caption_length) for prompt in prompts]
        return asked, [prompt.strip() or "anything" for prompt in prompts]
    if prompts:
        raise UserError(f"--prompt {prompts[0]!r}: this is a model of labels, not of captions; give --labels")
    names = class_names_of(config)
    asked = list(range(len(names))) if labels is None else parse_labels(labels, len(names), config.class_names)
    return asked, [names[label] for label in asked]


@torch.no_grad()
def start_from(path: str | Path, model: DiT, config: Config) -> None:
    """Put weights of ours or published ones into a fresh model; classes that they do not know start from "no label".

    Raises:
        UserError: if they are of another size or kind of network; to be tuned, if they have learned other data.
    """
    other, theirs = load_model(path, next(model.parameters()).device)
    for name in (*NETWORK, "learn_sigma"):
        there, here = getattr(theirs, name), getattr(config, name)
        if there != here:
            raise UserError(f"--init-from {path}: its {name} is {there}, that of this run {here}; they must be equal")
    if type(other.t_embedder) is not type(model.t_embedder):
        raise UserError(f"--init-from {path}: it embeds t in another way than the paper, which train.py does not train")
    state = other.state_dict()
    rows = state["y_embedder.embedding_table.weight"]
    fresh = model.y_embedder.embedding_table.weight.clone()
    model.load_state_dict(state | {"y_embedder.embedding_table.weight": fresh})
    # The only class of a folder has no name, and number 0 means something else where there are several.
    names = class_names_of(theirs) if config.num_classes > 1 or theirs.num_classes == 1 else []
    table, new = model.y_embedder.embedding_table.weight, []
    table[-1] = rows[-1]  # the null class
    for i, name in enumerate(class_names_of(config)):
        if name in names:
            table[i] = rows[names.index(name)]
        else:
            table[i] += rows[-1]
            new.append(name)
    known = f"{config.num_classes - len(new)} of the {'words' if config.caption_length else 'classes'}"
    folders = os.path.isabs(theirs.dataset) and os.path.isabs(config.dataset)  # the same one may have moved
    if config.process == "consistency" and (new or theirs.dataset != config.dataset and not folders):
        told = f"it has learned {theirs.dataset}, this run has {config.dataset}, of which it knows {known}"
        raise UserError(f"--init-from {path}: {told}; process consistency tunes on the same data")
    told = f"; new to them: {', '.join(new[:10])}{' ...' if len(new) > 10 else ''}" if new else ""
    print(f"start      the weights of {path}, which know {known}{told}")
