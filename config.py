"""Every hyperparameter once, with its meaning; presets; the command line that is made from them.

`Config()` holds the defaults, `Config(hidden_size=128)` changes one; a Config that cannot work raises UserError
when it is made. Scripts turn the fields they need into flags: `hidden_size` becomes `--hidden-size`.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit import PAPER_MODELS
from dit_block import BLOCKS


class UserError(ValueError):
    """A mistake that the user can mend: the message says what, which value, and what to do."""


class NotAvailable(UserError):
    """A dataset that is neither on disk nor to be downloaded."""


def option(default: Any, help: str, type: Callable = str, choices: tuple = ()) -> Any:
    """A field of Config: its default, its meaning, how a flag's text is read, and the values it may take."""
    return dataclasses.field(default=default, metadata={"help": help, "type": type, "choices": choices})


# What the network may predict in each process, what each samples with, and the options that only it has.
PREDICTIONS = {"diffusion": ("noise", "x0", "v"), "flow_matching": ("x0", "v")}
SAMPLERS = {"diffusion": ("ddpm", "ddim", "dpm++"), "flow_matching": ("euler", "heun")}
OPTIONS = {"diffusion": ("schedule", "loss", "learn_sigma", "clip_x0", "eta"), "flow_matching": ()}
# The fields that say how to sample: flags of inference.py and evaluate.py too.
SAMPLING = ("sampler", "sample_steps", "cfg_scale", "cfg_low", "cfg_high", "eta")

# What the first diffusion models and the DiT paper have in common, in process and training.
DDPM = dict(prediction="noise", schedule="linear", time_sampling="uniform", sampler="ddpm", cfg_low=0.0, cfg_high=1.0)
DDPM |= dict(lr_decay="constant", warmup_steps=0, weight_decay=0.0)

PRESETS = {
    "digits": {},  # the defaults: digits in ten minutes on a laptop's CPU
    "flow": dict(process="flow_matching", time_mean=0.5)  # the same time, by rectified flow
    | dict(sampler="euler", sample_steps=25, cfg_scale=1.4, cfg_low=0.0, cfg_high=1.0),
    # Four times the tokens, and the time to learn to use them: the weights of model.pth.
    "long": dict(patch_size=7, hidden_size=128, train_steps=28_000),
    "classic": DDPM  # the recipe of most teaching repositories, for comparison, in this one's model and loop
    | dict(patch_size=4, hidden_size=64, depth=3, loss="l1", learning_rate=1e-3, batch_size=300, train_steps=2000)
    | dict(sample_steps=1000, cfg_scale=1.0),
}
# The recipe of the DiT paper; its images are latents of 32 x 32 x 4.
PAPER = DDPM | dict(image_size=32, learn_sigma=True, sample_steps=250, cfg_scale=1.5)
PAPER |= dict(learning_rate=1e-4, batch_size=256, ema_decay=0.9999, train_steps=400_000)
PRESETS |= {name: PAPER | sizes for name, sizes in PAPER_MODELS.items()}


@dataclass(frozen=True)
class Config:
    # Data
    preset: str = option("digits", "named settings that the other flags change", choices=tuple(PRESETS))
    dataset: str = option("auto", "auto (MNIST, or glyphs where it cannot be had), mnist or glyphs")
    data_dir: str = option(os.environ.get("DATA_DIR") or "data", "folder of the data sets ($DATA_DIR, else data)")
    image_size: int | None = option(None, "height and width in pixels; larger than the data's pads it", int)
    in_channels: int = option(1, "channels of an image; comes from the dataset", int)
    num_classes: int = option(10, "number of labels; comes from the dataset", int)
    # Model
    patch_size: int = option(14, "a token is a square of this many pixels", int)
    hidden_size: int = option(192, "width of a token", int)
    depth: int = option(6, "number of transformer blocks", int)
    num_heads: int = option(4, "attention heads of a block", int)
    block: str = option("adaLN-Zero", "how t and y enter the blocks (the paper's Figure 3)", choices=tuple(BLOCKS))
    # Process
    process: str = option("diffusion", "how noise and data are joined", choices=tuple(SAMPLERS))
    prediction: str = option("x0", "what the network predicts", choices=PREDICTIONS["diffusion"])
    schedule: str = option("cosine", "noise schedule", choices=("linear", "cosine"))
    loss: str = option("mse", "distance between prediction and target", choices=("mse", "l1"))
    learn_sigma: bool = option(False, "learn the variance of ddpm's steps too", bool)
    clip_x0: bool = option(True, "clip estimates of x_0 to [-1, 1]: right for pixels, wrong for latents", bool)
    time_sampling: str = option("logit_normal", "how training draws t", choices=("uniform", "logit_normal"))
    time_mean: float = option(1.0, "logit-normal's mean; above 0, more noise than data", float)
    # Training
    train_steps: int = option(8500, "optimizer steps", int)
    batch_size: int = option(64, "images a step", int)
    optimizer: str = option("adamw", "adamw; or muon for the blocks' matrices", choices=("adamw", "muon"))
    learning_rate: float = option(3e-3, "peak learning rate", float)
    warmup_steps: int = option(200, "steps over which the learning rate rises from 0", int)
    lr_decay: str = option("cosine", "fall to 0 at the last step, or stay", choices=("cosine", "constant"))
    weight_decay: float = option(0.01, "decoupled weight decay", float)
    grad_clip: float = option(1.0, "largest norm of the gradient", float)
    ema_decay: float = option(0.999, "share of itself that the average of the weights keeps each step", float)
    label_dropout: float = option(0.1, "share of labels replaced by the null class, for guidance", float)
    seed: int = option(0, "seed of everything random", int)
    # Running
    out_dir: str | None = option(None, "folder for everything the run writes (default: runs/PRESET)")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "auto: bf16 where the machine gains from it", choices=("auto", "fp32", "bf16"))
    compile: str = option("auto", "torch.compile the training step; auto: in long runs", choices=("auto", "on", "off"))
    activation_checkpointing: bool = option(False, "recompute activations: less memory, more work", bool)
    accumulation_steps: int = option(1, "split each batch into so many parts: less memory", int)
    log_every: int = option(50, "steps between rows of loss.csv", int)
    sample_every: int = option(1000, "steps between sample grids", int)
    checkpoint_every: int = option(1000, "steps between checkpoints", int)
    # Sampling
    sampler: str = option("dpm++", "ddpm, ddim or dpm++; euler or heun for flow_matching")
    sample_steps: int = option(12, "steps from noise to image", int)
    cfg_scale: float = option(1.7, "guidance scale; 1 is none", float)
    cfg_low: float = option(0.45, "guide only where the noise level, 0 (data) to 1 (noise), is above this", float)
    cfg_high: float = option(0.9, "... and at most this", float)
    eta: float = option(0.0, "ddim's share of fresh noise, 0 to 1", float)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything starts."""
        for field in dataclasses.fields(self):
            value, kind, choices = getattr(self, field.name), field.metadata["type"], field.metadata["choices"]
            if value is None and field.default is None:
                continue
            if not isinstance(value, (int, float) if kind is float else kind):
                raise UserError(f"{field.name} {value!r} is not of type {kind.__name__}")
            if choices and value not in choices:
                raise UserError(f"{field.name} {value!r} is not one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{field.name} is {value}; give a finite number")
        at_least_1 = "patch_size hidden_size depth num_heads in_channels num_classes batch_size"
        at_least_1 += " train_steps log_every sample_every checkpoint_every sample_steps accumulation_steps"
        for name in at_least_1.split():
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in "warmup_steps weight_decay".split():
            self.require(name, getattr(self, name) >= 0, "0 or more")
        divides = self.batch_size % self.accumulation_steps == 0
        self.require("accumulation_steps", divides, f"a divisor of batch_size, {self.batch_size}")
        self.require("seed", 0 <= self.seed < 2**63, "0 or more, and less than 2**63")
        self.require("learning_rate", self.learning_rate > 0, "more than 0")
        self.require("grad_clip", self.grad_clip > 0, "more than 0")
        self.require("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and less than 1")
        self.require("label_dropout", 0 <= self.label_dropout < 1, "at least 0 and less than 1")
        self.require("eta", 0 <= self.eta <= 1, "between 0 and 1")
        self.require("cfg_low", 0 <= self.cfg_low < self.cfg_high, "at least 0, and less than cfg_high")
        self.require("cfg_high", self.cfg_high <= 1, "at most 1")
        self.require("sample_steps", self.sample_steps <= 1000, "at most 1000, the number of timesteps")
        if self.hidden_size % 4 or self.hidden_size % self.num_heads:
            step = math.lcm(4, self.num_heads)
            near = max(step, round(self.hidden_size / step) * step)
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads} and by 4; try {near}"
            )
        if self.image_size is not None:
            self.require("image_size", self.image_size >= 1, "at least 1")
            if self.image_size % self.patch_size:
                divisors = [p for p in range(2, self.image_size) if self.image_size % p == 0]
                raise UserError(
                    f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; "
                    f"try patch_size {', '.join(map(str, divisors or [1, self.image_size]))}"
                )
        for name, of_process in (("prediction", PREDICTIONS), ("sampler", SAMPLERS)):
            value, known = getattr(self, name), of_process[self.process]
            if value not in known:
                raise UserError(f"{name} {value!r} is not one of process {self.process}'s: {', '.join(known)}")
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta {self.eta} is an option of sampler ddim, not of {self.sampler}; leave it out")

    def require(self, name: str, holds: bool, rule: str) -> None:
        """Raise UserError naming the field and its value unless the rule holds."""
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)}; it must be {rule}")

    @property
    def run_dir(self) -> Path:
        """The folder of the run: out_dir, or runs/PRESET."""
        return Path(self.out_dir or f"runs/{self.preset.replace('/', '-')}")

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)


def preset(name: str = "digits", **changes: Any) -> Config:
    """The Config of a preset, with changes of its fields."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    settings = {**PRESETS[name], **changes}
    process = settings.get("process", "diffusion")
    for other, options in OPTIONS.items():
        for option_name in options:
            if other != process and option_name in settings:
                advice = "leave it out" if option_name in changes else f"preset {name} sets it, so choose another"
                raise UserError(f"{option_name} is an option of process {other}, not of {process}; {advice}")
    if process == "flow_matching":
        settings.setdefault("sampler", "euler")
    return Config(preset=name, **settings)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one line; a flag not given leaves nothing in the result."""

    def __init__(self, description: str):
        super().__init__(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")

    def add_fields(self, *names: str, default: str | None = None) -> None:
        """Add a flag for each of Config's fields named; `default` says what a flag not given means."""
        fields = {field.name: field for field in dataclasses.fields(Config)}
        for name in names:
            field, meta = fields[name], fields[name].metadata
            shown = default or field.default
            flag, help = "--" + name.replace("_", "-"), meta["help"] + ("" if shown is None else f" (default: {shown})")
            if meta["type"] is bool:
                self.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
                continue
            metavar = None if meta["choices"] else meta["type"].__name__.upper().replace("STR", "NAME")
            self.add_argument(flag, type=meta["type"], choices=meta["choices"] or None, metavar=metavar, help=help)


def run_script(main: Callable[[], None]) -> None:
    """Call a script's main(); a mistake of the user's is one line on stderr and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {where}{error.strerror or error}; check that the path exists, is yours and has room left")
    except RuntimeError as error:
        if "allocate" not in str(error):  # what torch says where memory is short, of any device
            raise
        sys.exit("error: not enough memory; try a smaller model or --batch-size, or train with --accumulation-steps")
    except KeyboardInterrupt:
        sys.exit(130)
