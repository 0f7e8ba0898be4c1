"""What a training run goes on from: checkpoint.pth, written by save_run, believed by load_checkpoint and restore_run.

It is {"config": dict, "model": state_dict, "ema": state_dict, "optimizers": [state_dict, ...], "progress": list,
"made_with": dict}. Whatever resuming uses of it is checked against what its config builds, before it is used: a moment
a row too short would be read past its end, and a wrong count of steps would end in other weights without a word.
"""

import contextlib
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import ROOT, Config, preset
from dataset import Dataset
from diffusion import Diffusion
from dit import DiT
from support.checkpoint import BEFORE, OF_THE_MACHINE, check_state, model_config, read_config
from support.distributed import check_shared, first, launch_name, part_like, processes, together, whole
from support.errors import UserError, believing, flag_of
from support.files import load_file, locked, save_file, warn
from support.prepare import new_settings, preset_of, rooted

FREE_ON_RESUME = (*OF_THE_MACHINE, "sample_every", "checkpoint_every")


def made_with(model: nn.Module, data: Dataset) -> dict[str, Any]:
    """What the same bits need besides the same numbers; of packed data the key, which changes with them."""
    device = next(model.parameters()).device.type
    of_some = {"data": data.about["key"]} if data.about else {}
    of_some |= {"launch": launch_name()} if together() else {}
    threads = {"threads": torch.get_num_threads(), "processes": processes()}
    return {**threads, "torch": str(torch.__version__), "device": device, **of_some}


def diverged(out_dir: Path, what: str, step: int) -> UserError:
    """The error of a training whose numbers are not finite any more."""
    last_good = f"{out_dir}/checkpoint.pth is from before"
    return UserError(f"{what} at step {step}; {last_good}; begin anew with a smaller --learning-rate and --out-dir NEW")


def refuse_trained(out_dir: Path) -> None:
    """UserError for a folder in which there are trained weights already."""
    for name, advice in (("checkpoint.pth", "go on with --resume, or give"), ("model.pth", "give")):
        if (out_dir / name).exists():
            raise UserError(f"{out_dir / name} is there already; {advice} another --out-dir")


def save_run(
    out_dir: Path,
    config: Config,
    data: Dataset,
    process: Diffusion,
    model: DiT,
    ema: DiT,
    optimizers: list[torch.optim.Optimizer],
    progress: list,
) -> None:
    """Write checkpoint.pth, all that a run goes on from, and model.pth; UserError if the weights are not finite."""
    states = [model.state_dict(), ema.state_dict(), [optimizer.state_dict() for optimizer in optimizers]]
    weights, average, moments = whole(states) if config.shard else states
    if not first():
        return
    if not all(tensor.isfinite().all() for tensor in (*weights.values(), *average.values())):
        raise diverged(out_dir, "the weights are not finite", progress[0])
    data_dir = config.data_dir or os.environ.get("DATA_DIR")  # the same folder from wherever the run goes on
    fields = vars(config) | {"data_dir": data_dir and os.path.abspath(data_dir)}
    content = {"config": fields, "model": weights, "ema": average, "progress": progress}
    content |= {"optimizers": moments, "made_with": made_with(model, data)}
    if config.process == "consistency":
        content["teacher"] = process.teacher.state_dict()
    save_file(content, out_dir / "checkpoint.pth")
    save_file({"model": average, "config": model_config(config)}, out_dir / "model.pth")


def load_checkpoint(path: str | Path) -> tuple[Config, dict[str, Any]]:
    """The config and the state of a checkpoint.pth; files of earlier versions may lack made_with.

    Raises:
        UserError: unless all that resuming uses fits the config, but for the optimizers: see restore_optimizer.
    """
    state = load_file(path)
    needed = {"config", "model", "ema", "optimizers", "progress"}
    if not isinstance(state, dict) or not needed <= state.keys() <= needed | {"teacher", "made_with"}:
        raise UserError(f"{path} is not a checkpoint of train.py; go on from that of a run, or begin anew")
    fields = {field.name for field in dataclasses.fields(Config)}
    config = read_config(state["config"], path, fields.difference(BEFORE, OF_THE_MACHINE))
    with believing(f"{path} holds no run to go on with"):
        for name in ("model", "ema", "teacher") if config.process == "consistency" else ("model", "ema"):
            check_state(state[name], config)
            if any(tensor.dtype != torch.float32 for tensor in state[name].values()):
                raise UserError(f"{name} is not in float32")
        check_progress(*state["progress"], config.train_steps)
        if not all(isinstance(value, int | str) for value in state.get("made_with", {}).values()):
            raise UserError("its made_with is not what save_run writes")
    return config, state


def check_progress(
    step: int, rows: list[str], loss_sum: float, loss_count: int, seconds: float, train_steps: int
) -> None:
    """UserError unless a checkpoint's counters can be those of a run."""
    if not isinstance(rows, list) or not all(re.fullmatch(r"\d+(,[-+.\de]+){3}", row) for row in rows):
        raise UserError("its rows are not those of loss.csv")
    logged = [0, *(int(row.split(",")[0]) for row in rows)]
    whole = type(step) is type(loss_count) is int and type(loss_sum) is type(seconds) is float
    if not (whole and step <= train_steps and math.isfinite(loss_sum) and 0 <= seconds < math.inf):
        raise UserError(f"it says step {step} of {train_steps}, losses of sum {loss_sum} in {seconds} seconds")
    if logged != sorted(logged) or loss_count != step - logged[-1] or loss_count < 0:
        raise UserError(f"it says step {step}, {loss_count} losses since the last row, which is of step {logged[-1]}")


def restore_run(
    state: dict[str, Any], out_dir: Path, data: Dataset, model: DiT, ema: DiT, optimizers: list[torch.optim.Optimizer]
) -> list:
    """Put a checkpoint's state into a fresh run; returns its progress: step, rows, loss_sum, loss_count, seconds.

    What has been put there is left out of `state`, for a large network's would fill the memory.
    """
    path = out_dir / "checkpoint.pth"
    there = {"in_channels": data.channels, "num_classes": data.num_classes, "class_names": data.class_names}
    there["caption_length"] = data.caption_length
    for name, is_now in there.items():
        was = state["config"].get(name)
        if was not in (None, is_now):  # class names may be told later
            raise UserError(f"{path}: {name} of its data was {was}, now it is {is_now}; name its --data-dir")
    with believing(f"{path} holds no run to go on with"):
        for network, name in ((model, "model"), (ema, "ema")):
            there = network.state_dict()
            network.load_state_dict({key: part_like(tensor, there[key]) for key, tensor in state.pop(name).items()})
        if len(state["optimizers"]) != len(optimizers):
            raise UserError(f"it has {len(state['optimizers'])} optimizers, and its config builds {len(optimizers)}")
        for optimizer, saved in zip(optimizers, state.pop("optimizers")):
            restore_optimizer(optimizer, saved, state["progress"][0])
    then, now = state.get("made_with", {}), made_with(model, data)
    if then.pop("data", None) not in (None, now.pop("data", None)):
        warn(f"the images of {data.name}, or their autoencoder, have changed since: the run goes on with those of now")
    then.pop("launch", None)
    changes = [f"{name} {then[name]!r}, now {now[name]!r}" for name in now if then.get(name, now[name]) != now[name]]
    if changes:
        also = ", and other numbers are drawn" if then.get("device", now["device"]) != now["device"] else ""
        warn(f"the run was on {'; '.join(changes)}: from here on sums may be rounded differently{also}")
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
            shape = () if name == "step" else tuple(parameters[index].shape)
            if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.isfinite().all():
                found = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise UserError(f"{name} of its optimizer is {found}, or not finite; it must be {shape} in float32")
            if name == "exp_avg_sq" and tensor.min() < 0:
                raise UserError(f"{name} of its optimizer, a mean of squares, is negative")
            if name == "step" and tensor != min(step, 2**24):  # float32 counts no further
                raise UserError(f"its optimizer has taken {tensor:.0f} steps, not {step}")
        moments = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in moments.items()}
        like = parameters[index]
        state[index] = {name: part_like(tensor, like) if tensor.ndim else tensor for name, tensor in moments.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def checkpoint_of(given: dict[str, Any]) -> Path:
    """The checkpoint.pth of the run that train.py's flags name."""
    return Config(preset=preset_of(given), out_dir=given.get("out_dir")).run_dir / "checkpoint.pth"


def restarted(given: dict[str, Any]) -> dict[str, Any]:
    """The flags to resume with where torchrun has started its processes again (--max-restarts); else none.

    They resume what this very launch has written; another run's folder is refused as ever.
    """
    path = checkpoint_of(given)
    if (
        not (together() and path.exists())
        or load_checkpoint(path)[1].get("made_with", {}).get("launch") != launch_name()
    ):
        return {}
    return {name: given[name] for name in FREE_ON_RESUME if name in given} | {"out_dir": str(path.parent)}


def resumed(given: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The config and state of the checkpoint that train.py's flags name to go on from.

    Raises:
        UserError: if it is not there, a flag contradicts it, or its run has not ended.
    """
    given = rooted(given)
    path = checkpoint_of(given)
    if first() and not path.exists():
        raise UserError(f"nothing to resume: {path} does not exist; leave out --resume, or name the run's --out-dir")
    check_shared(path.parent)
    with locked(path.parent) if first() else contextlib.nullcontext():
        config, state = load_checkpoint(path)
    free = FREE_ON_RESUME + (("train_steps",) if config.lr_decay == "constant" else ())
    # A folder of images or of an autoencoder may have moved; whether it is the same is seen when it is read.
    free += tuple(n for n in ("dataset", "vae") if all(os.path.isabs(str(v)) for v in (given.get(n), vars(config)[n])))
    for name, value in given.items():
        if name not in free and value not in (getattr(config, name), "auto"):
            then = getattr(config, name)
            raise UserError(f"{flag_of(name)} {value} differs from the run's {then}; leave it out to resume")
    step = state["progress"][0]
    if given.get("train_steps", step) < step:
        raise UserError(
            f"--train-steps {given['train_steps']}: the run has taken {step} already; give at least as many"
        )
    # The folder of the data: by a flag, else $DATA_DIR of today, else that of then (from the root, in older files).
    then, today = config.data_dir and str(ROOT / config.data_dir), os.environ.get("DATA_DIR")
    if then and today and "data_dir" not in given and os.path.abspath(today) != then:
        warn(f"the data were read from {then}, now from $DATA_DIR, {today}; --data-dir says otherwise")
    data_dir = None if today else then
    changes = {name: value for name, value in given.items() if name in free}
    return config.replace(**{"data_dir": data_dir, "shard": False, **changes, "out_dir": str(path.parent)}), state


def begun(given: dict[str, Any]) -> tuple[Config, dict[str, Any] | None]:
    """The config of the run that train.py's flags name, and the state that it goes on from; a new run has none."""
    if given.pop("resume", False):
        return resumed(given)
    if again := restarted(given):
        return resumed(again)
    config = preset(**new_settings(given))
    refuse_trained(config.run_dir)
    return config, None
