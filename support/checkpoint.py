"""From files and configs to models and processes: what the names in a Config stand for, and what is believed of a file.

`model.pth` is {"model": state_dict, "config": dict}: all that is needed to sample. `checkpoint.pth` is what a training
run goes on from. Published weights, which say nothing of a config, are recognised by published.py.
"""

import dataclasses
import inspect
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config
from diffusion import Diffusion
from dit import DiT
from dit_block import DiTBlock
from support.errors import UserError
from support.files import load_file, read_file, save_file, warn
from support.machine import check_memory
from support.published import DOWNLOADS, read_published, reason_of, sizes_of
from variants.conditioning import AdaLNBlock, CrossAttentionBlock, InContextBlock
from variants.flow_matching import FlowMatching
from variants.learned_variance import LearnedVariance

BLOCKS = {
    "in-context": InContextBlock,
    "cross-attention": CrossAttentionBlock,
    "adaLN": AdaLNBlock,
    "adaLN-Zero": DiTBlock,
}
PROCESSES = {"diffusion": Diffusion, "flow_matching": FlowMatching}
OF_EVERY_FILE = "image_size patch_size in_channels hidden_size depth num_heads num_classes".split()  # fields
OF_THE_MACHINE = ("data_dir", "out_dir", "device")
FREE_ON_RESUME = ("out_dir", "data_dir", "device", "sample_every", "checkpoint_every")


def model_config(config: Config) -> dict[str, Any]:
    """What model.pth keeps of a Config: everything but the folders and device of the machine that trained it."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in OF_THE_MACHINE}


def build_model(config: Config) -> DiT:
    """A fresh DiT of a config's sizes; its weights come from torch's global generator."""
    return DiT(
        image_size=config.image_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=config.num_classes,
        learn_sigma=config.learn_sigma,
        block=BLOCKS[config.block],
        activation_checkpointing=config.activation_checkpointing,
    )


def build_process(config: Config) -> Diffusion | FlowMatching:
    """The process that a config names; its options bear the names of the config's fields."""
    process = PROCESSES[config.process]
    if config.learn_sigma:
        process = LearnedVariance
    options = inspect.signature(process).parameters
    return process(**{name: value for name, value in vars(config).items() if name in options})


def read_config(values: Any, path: str | Path) -> Config:
    """A Config from what a file says of it, or UserError naming the file."""
    try:
        for name in OF_EVERY_FILE:
            values[name]
        if isinstance(values.get("seed"), int):
            values = {**values, "seed": values["seed"] % 2**32}  # larger ones, once allowed, drew the same numbers
        return Config(**values)
    except Exception as error:  # a file can hold anything
        raise UserError(f"{path} holds no usable config ({reason_of(error)})") from error


def check_state(state: dict[str, Tensor], config: Config) -> DiT:
    """An empty model of a config's sizes; UserError unless the state dict fits it, name by name, and is finite."""
    for name, value in sizes_of(state).items():
        if getattr(config, name) != value:
            raise UserError(f"its weights have {name} {value}, but its config says {getattr(config, name)}")
    with torch.device("meta"):  # sizes only, so that a lying config costs no memory
        model = build_model(config)
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

    Counted is the least it takes: weights, gradients, their average and the optimizer's moments, two of AdamW's, and
    of the activations, for each feature of a token in each block, the six numbers that compiled code in bf16 keeps.
    """
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
    copies = copies or (4 if config.optimizer == "muon" else 5)
    tokens = config.batch_size // config.accumulation_steps * (config.image_size // config.patch_size) ** 2
    activations = tokens * config.hidden_size * config.depth * (1 if config.activation_checkpointing else 6)
    what = f"a network of {parameters:,} parameters with a batch of {config.batch_size}"
    advice = "try a smaller --hidden-size, --depth or --batch-size"
    check_memory(4 * (copies * parameters + activations), what, advice, device)


def load_checkpoint(path: str | Path) -> tuple[Config, dict[str, Any]]:
    """The config and the state of a checkpoint.pth: {config, model, ema, optimizers, progress, made_with}.

    Raises:
        UserError: unless all that resuming uses fits the config, but for the optimizers: see restore_optimizer.
    """
    state = load_file(path)
    needed = {"config", "model", "ema", "optimizers", "progress"}
    if not isinstance(state, dict) or not needed <= state.keys() <= needed | {"made_with"}:
        raise UserError(f"{path} is not a checkpoint of train.py")
    config = read_config(state["config"], path)
    try:
        for name in ("model", "ema"):
            check_state(state[name], config)
        check_progress(*state["progress"], config.train_steps)
        dict(state.get("made_with", {}))
    except Exception as error:  # a file can lie in more ways than can be listed
        raise UserError(f"{path} holds no run to go on with: {reason_of(error)}") from error
    return config, state


def check_progress(
    step: int, rows: list[str], loss_sum: float, loss_count: int, seconds: float, train_steps: int
) -> None:
    """UserError unless a checkpoint's counters can be those of a run."""
    counters = f"step {step}, {loss_count} losses of sum {loss_sum} in {seconds} seconds"
    whole = isinstance(step, int) and isinstance(loss_count, int)
    if not (whole and 0 <= step <= train_steps and 0 <= loss_count <= step and math.isfinite(loss_sum + seconds)):
        raise UserError(f"it says {counters}, of {train_steps} steps")
    for row in rows:
        if len([float(figure) for figure in row.split(",")]) != 4:
            raise UserError(f"its row {row!r} is none of loss.csv")


def made_with(model: nn.Module) -> dict[str, Any]:
    """What the same bits need besides the same numbers."""
    device = next(model.parameters()).device.type
    return {"threads": torch.get_num_threads(), "torch": str(torch.__version__), "device": device}


def diverged(out_dir: Path, what: str, step: int) -> UserError:
    """The error of a training whose numbers are not finite any more."""
    last_good = f"{out_dir}/checkpoint.pth is from before"
    return UserError(f"{what} at step {step}; {last_good}; begin anew with a smaller --learning-rate and --out-dir NEW")


def save_run(
    out_dir: Path, config: Config, model: DiT, ema: DiT, optimizers: list[torch.optim.Optimizer], progress: list
) -> None:
    """Write checkpoint.pth, all that a run goes on from, and model.pth; UserError if the weights are not finite."""
    if not all(parameter.isfinite().all() for parameter in (*model.parameters(), *ema.parameters())):
        raise diverged(out_dir, "the weights are not finite", progress[0])
    content = {"config": vars(config), "model": model.state_dict(), "ema": ema.state_dict(), "progress": progress}
    content |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers], "made_with": made_with(model)}
    save_file(content, out_dir / "checkpoint.pth")
    save_file({"model": ema.state_dict(), "config": model_config(config)}, out_dir / "model.pth")


def restore_run(
    state: dict[str, Any], out_dir: Path, model: DiT, ema: DiT, optimizers: list[torch.optim.Optimizer]
) -> list:
    """Put a checkpoint's state into a fresh run; returns its progress: step, rows, loss_sum, loss_count, seconds."""
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            restore_optimizer(optimizer, saved, state["progress"][0])
    except Exception as error:  # a file can lie in more ways than can be listed
        raise UserError(f"{out_dir}/checkpoint.pth does not fit its config or the data: {reason_of(error)}") from error
    then, now = state.get("made_with", {}), made_with(model)
    for name in now:
        if then.get(name, now[name]) != now[name]:
            warn(f"the run was on {name} {then[name]}, now it is {now[name]}: sums may be rounded differently")
    return state["progress"]


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], step: int) -> None:
    """Give a fresh optimizer the moments of a saved one; its settings stay the config's.

    Raises:
        UserError: unless there are finite moments of the right shape for each parameter, after `step` steps.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    muon = isinstance(optimizer, torch.optim.Muon)
    names = {"momentum_buffer"} if muon else {"step", "exp_avg", "exp_avg_sq"}
    if set(saved["state"]) != set(range(len(parameters) if step else 0)):
        raise UserError("its optimizer has not a state for each parameter")
    state = {}
    for index, moments in saved["state"].items():
        if moments.keys() != names:
            raise UserError(f"its optimizer holds {', '.join(moments)}, not {', '.join(sorted(names))}")
        for name, tensor in moments.items():
            shape = () if name == "step" else parameters[index].shape
            if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise UserError(f"{name} of its optimizer is {tuple(tensor.shape)}, or not finite; it must be {shape}")
        if not muon and moments["step"] != step:
            raise UserError(f"its optimizer has taken {moments['step']:.0f} steps, not {step}")
        state[index] = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in moments.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def resumed(given: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The config and state of the checkpoint that train.py's flags name to go on from.

    Raises:
        UserError: if it is not there or a flag contradicts it.
    """
    chosen = {name: given[name] for name in ("preset", "out_dir") if name in given}
    path = Config(**chosen).run_dir / "checkpoint.pth"
    if not path.exists():
        raise UserError(f"nothing to resume: {path} does not exist; leave out --resume, or name the run's --out-dir")
    config, state = load_checkpoint(path)
    free = FREE_ON_RESUME + (("train_steps",) if config.lr_decay == "constant" else ())
    for name, value in given.items():
        if name not in free and value not in (getattr(config, name), "auto"):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} differs from the run's {getattr(config, name)}; leave it out to resume")
    if os.environ.get("DATA_DIR"):  # today's, unless a flag says otherwise, not that of then
        config = config.replace(data_dir=None)
    changes = {name: value for name, value in given.items() if name in free}
    return config.replace(**{**changes, "out_dir": str(path.parent)}), state


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[DiT, Config]:
    """The model of a model.pth or of published weights, in evaluation mode, and its config.

    Raises:
        UserError: if the file cannot be read, or its weights are not those of the model its config describes.
    """
    address = DOWNLOADS.get(Path(path).name)
    advice = f"download it from {address}" if address else "name a file of weights, such as runs/digits/model.pth"
    content, intact = read_file(path, advice)
    ours = isinstance(content, dict) and {"model", "config"} <= content.keys()
    if not intact:
        if ours:
            raise UserError(f"{path} is damaged: its checksums do not fit what it holds")
        warn(f"the checksums of {path} do not fit what it holds; some programs write none")
    if ours:
        # Of a training checkpoint, as of model.pth, the average of the weights is what draws best.
        config, state = read_config(content["config"], path), content.get("ema", content["model"])
    else:
        config, state = read_published(content, path)
    try:
        model = check_state(state, config)
        model.to_empty(device=device).load_state_dict(state)
    except Exception as error:  # a file can lie in more ways than can be listed
        raise UserError(f"{path} holds no usable model: {reason_of(error)}") from error
    return model.eval(), config
