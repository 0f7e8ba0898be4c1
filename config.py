"""Every hyperparameter once, with its meaning and its limits; the presets.

`Config()` holds the defaults, `Config(hidden_size=128)` changes one; a Config that cannot work raises UserError
when it is made. Scripts turn the fields they need into flags: `hidden_size` becomes `--hidden-size`. It knows names
alone; support/checkpoint.py has the classes that they stand for.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.errors import UserError
from support.options import check_option, option

ROOT = Path(__file__).parent  # default paths start here, wherever a command is called from

# What the network may predict in each process, what each samples with, and the options that only it has.
PREDICTIONS = {"diffusion": ("noise", "x0", "v"), "flow_matching": ("x0", "v"), "consistency": ("x0",)}
SAMPLERS = {"diffusion": ("ddpm", "ddim", "dpm++"), "flow_matching": ("euler", "heun"), "consistency": ("consistency",)}
OPTIONS = {"diffusion": ("schedule", "loss", "learn_sigma", "clip_x0", "eta"), "flow_matching": ()}
OPTIONS["consistency"] = ("schedule", "clip_x0", "teacher_cfg_scale")
BLOCKS = ("in-context", "cross-attention", "adaLN", "adaLN-Zero", "modern", "joint-attention")
# The fields that say how to sample: flags of inference.py and evaluate.py too.
SAMPLING = ("sampler", "sample_steps", "cfg_scale", "cfg_low", "cfg_high", "eta")

# The DiT paper's sizes (its Table 1): depth, hidden size, heads. "DiT-XL/2" is size XL on patches of 2 x 2.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PAPER_MODELS = {
    f"DiT-{size}/{patch_size}": dict(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
    for size, (depth, hidden_size, num_heads) in SIZES.items()
    for patch_size in (8, 4, 2)
}
# What the first diffusion models and the DiT paper have in common, in process and training.
ORIGINAL = dict(prediction="noise", schedule="linear", time_sampling="uniform", sampler="ddpm")
ORIGINAL |= dict(cfg_low=0.0, cfg_high=1.0)
ORIGINAL |= dict(optimizer="adamw", lr_decay="constant", warmup_steps=0, weight_decay=0.0)
# Where fine grain is part of a picture: more of the steps at little noise, and a sampler that mends what they leave.
TEXTURED = dict(time_mean=0.0, sampler="ddpm", sample_steps=25, cfg_scale=1.7, cfg_low=0.45, cfg_high=0.9)

PRESETS = {
    "digits": {},  # the defaults: digits in ten minutes on a laptop's CPU
    # Rectified flow in about the same time, on four tokens, as it was measured.
    "flow": dict(process="flow_matching", time_mean=0.5, optimizer="adamw", train_steps=8500)
    | dict(patch_size=14, hidden_size=192, sampler="euler", sample_steps=25)
    | dict(cfg_scale=1.4, cfg_low=0.0, cfg_high=1.0),
    "long": dict(train_steps=32_000),  # the same for two hours: the weights of model.pth
    "fashion": TEXTURED | dict(train_steps=14_000),  # in fifty minutes
    # One's own pictures, in an hour on one core; the patch follows from their size.
    "pictures": TEXTURED | dict(optimizer="adamw", patch_size=None, hidden_size=256, train_steps=4500),
    "words": dict(dataset="scenes", block="joint-attention", depth=4, time_mean=1.0, train_steps=5000)
    | dict(cfg_scale=3.0, cfg_low=0.2, cfg_high=1.0),  # captions instead of labels, in twenty minutes
    "one-step": dict(process="consistency", init_from=str(ROOT / "model.pth"), train_steps=2300, warmup_steps=300)
    | dict(time_sampling="uniform", label_dropout=0.0, teacher_cfg_scale=1.7, cfg_low=0.45, cfg_high=0.9)
    | dict(sampler="consistency", sample_steps=1, cfg_scale=1.0),  # model.pth tuned, to draw in one evaluation
    "classic": ORIGINAL  # the recipe of a well-known teaching repository, in this one's model and loop, cut short
    | dict(patch_size=4, hidden_size=64, depth=3, loss="l1", learning_rate=1e-3, batch_size=300, train_steps=2000)
    | dict(sample_steps=1000, cfg_scale=1.0),
}
# The recipe of the DiT paper; its images are latents of 32 x 32 x 4.
PAPER = ORIGINAL | dict(image_size=32, learn_sigma=True, sample_steps=250, cfg_scale=1.5)
PAPER |= dict(learning_rate=1e-4, batch_size=256, ema_decay=0.9999, train_steps=400_000)
PRESETS |= {name: PAPER | sizes for name, sizes in PAPER_MODELS.items()}
# The preset of a dataset where none is named; for others it is pictures.
PRESET_OF = {"auto": "digits", "mnist": "digits", "glyphs": "digits", "scenes": "words"}
PRESET_OF |= {"fashion": "fashion", "kmnist": "fashion"}


@dataclass(frozen=True)
class Config:
    preset: str = option("digits", "named settings that the other flags change", choices=tuple(PRESETS), group="basics")
    dataset: str = option("auto", "a name, a folder, a .zip or hf:NAME; auto is mnist, or glyphs without a network")
    data_dir: str | None = option(None, "folder of the data sets (default: $DATA_DIR, else the repository's data)")
    out_dir: str | None = option(None, "folder for everything the run writes (default: the repository's runs/PRESET)")
    train_steps: int = option(4300, "optimizer steps", int, least=1, most=10**9)
    batch_size: int = option(64, "images a step", int, least=1, most=2**20)
    learning_rate: float = option(3e-3, "peak learning rate", float, above=0)
    seed: int = option(0, "seed of everything random", int, least=0, below=2**32)  # CPU generators keep 32 bits
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    sample_every: int = option(1000, "steps between sample grids", int, least=1, most=2**62)
    checkpoint_every: int = option(1000, "steps between checkpoints", int, least=1, most=2**62)

    flip: bool = option(False, "mirror half of the images, drawn anew at each use", bool, group="data")
    skip_damaged: bool = option(False, "go on without image files that cannot be read, and list them", bool)
    vae: str | None = option(None, "folder of an autoencoder: train on the images' latents")
    init_from: str | None = option(None, "weights to start from: a model.pth, or published ones")

    image_size: int | None = option(None, "pixels a side, else the data's", int, group="network", least=1, most=2**14)
    in_channels: int = option(1, "channels of an image; comes from the dataset", int, least=1, most=2**14)
    num_classes: int = option(10, "number of labels, or words; comes from the dataset", int, least=1, most=10**7)
    class_names: tuple | None = option(None, "their names; come from the dataset", tuple)
    caption_length: int | None = option(None, "y is captions of at most so many words", int, least=1, most=1000)
    captions: tuple | None = option(None, "some of them, shown where none are asked for; of the dataset", tuple)
    latents: bool = option(False, "images are an autoencoder's latents; comes with vae", bool)
    patch_size: int | None = option(7, "a token is a square of this many pixels", int, least=1, most=2**14)
    hidden_size: int = option(128, "width of a token", int, least=4, most=2**16)
    depth: int = option(6, "number of transformer blocks", int, least=1, most=1000)
    num_heads: int = option(4, "attention heads of a block", int, least=1, most=2**14)
    block: str = option("adaLN-Zero", "how t and y enter (Figure 3), or a later design", choices=BLOCKS)

    process: str = option("diffusion", "how noise and data are joined", choices=tuple(SAMPLERS), group="process")
    prediction: str = option("x0", "what the network predicts", choices=PREDICTIONS["diffusion"])
    schedule: str = option("cosine", "noise schedule", choices=("linear", "cosine"))
    loss: str = option("mse", "distance between prediction and target", choices=("mse", "l1"))
    learn_sigma: bool = option(False, "learn the variance of ddpm's steps too", bool)
    clip_x0: bool = option(True, "clip estimates of x_0 to [-1, 1]: right for pixels, wrong for latents", bool)
    time_sampling: str = option("logit_normal", "how training draws t", choices=("uniform", "logit_normal"))
    time_mean: float = option(0.6, "logit-normal's mean; above 0, more noise than data", float)
    teacher_cfg_scale: float = option(1.7, "guidance that consistency tuning puts into the weights", float)

    optimizer: str = option("muon", "muon: for the blocks' matrices", choices=("adamw", "muon"), group="training")
    warmup_steps: int = option(200, "steps over which the learning rate rises from 0", int, least=0, most=10**9)
    lr_decay: str = option("cosine", "fall to 0 at the last step, or stay", choices=("cosine", "constant"))
    weight_decay: float = option(0.01, "decoupled weight decay", float, least=0)
    grad_clip: float = option(1.0, "largest norm of the gradient", float, above=0)
    ema_decay: float = option(0.999, "what the average of weights keeps of itself a step", float, least=0, below=1)
    label_dropout: float = option(0.1, "share of labels dropped, for guidance", float, least=0, below=1)

    precision: str = option("auto", "auto: bf16 if faster", choices=("auto", "fp32", "bf16"), group="machine")
    compile: str = option("auto", "torch.compile the training step; auto: in long runs", choices=("auto", "on", "off"))
    activation_checkpointing: bool = option(False, "recompute activations: less memory, more work", bool)
    accumulation_steps: int = option(1, "split each batch into so many parts: less memory", int, least=1, most=2**20)
    shard: bool = option(False, "divide weights, average and moments among torchrun's processes", bool)
    log_every: int = option(50, "steps between rows of loss.csv", int, least=1, most=2**62)
    tensorboard: bool = option(False, "write figures and samples for TensorBoard too, to out_dir", bool)
    profile: bool = option(False, "see where the time of a few steps goes: a table, and trace.json in out_dir", bool)

    sampler: str = option("dpm++", "ddpm, ddim or dpm++; euler, heun for flow_matching; consistency", group="sampling")
    sample_steps: int = option(8, "steps from noise to image, of at most 1000 timesteps", int, least=1, most=1000)
    cfg_scale: float = option(2.1, "guidance scale; 1 is none, 0 leaves the label out", float)
    cfg_low: float = option(0.6, "guide only at noise levels (0 data, 1 noise) above this", float, least=0, below=1)
    cfg_high: float = option(0.85, "... and at most this", float, above=0, most=1)
    eta: float = option(0.0, "ddim's share of fresh noise, 0 to 1", float, least=0, most=1)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything starts."""
        for field in dataclasses.fields(self):
            check_option(field, getattr(self, field.name))
        if self.batch_size % self.accumulation_steps:
            parts = self.accumulation_steps
            raise UserError(f"accumulation_steps is {parts}; it must be a divisor of batch_size, {self.batch_size}")
        names = self.class_names
        if names is not None and not (len(names) == self.num_classes and all(isinstance(name, str) for name in names)):
            raise UserError(f"class_names {names!r} are not a name for each of {self.num_classes} classes")
        if self.caption_length and not (names and all(isinstance(text, str) for text in self.captions or ())):
            raise UserError(f"caption_length {self.caption_length} needs class_names, the words, and captions of them")
        if self.cfg_low >= self.cfg_high:
            raise UserError(f"cfg_low is {self.cfg_low}; it must be less than cfg_high, {self.cfg_high}")
        if self.hidden_size % 4 or self.hidden_size % self.num_heads:
            width, step = self.hidden_size, math.lcm(4, self.num_heads)
            near = max(step, round(width / step) * step)
            raise UserError(f"hidden_size {width} is not divisible by num_heads {self.num_heads} and by 4; try {near}")
        if self.image_size and self.patch_size and self.image_size % self.patch_size:
            side = self.image_size
            fit = ", ".join(str(p) for p in range(2, side) if side % p == 0) or f"1, {side}"
            raise UserError(f"image_size {side} is not divisible by patch_size {self.patch_size}; try patch_size {fit}")
        for name, of_process in (("prediction", PREDICTIONS), ("sampler", SAMPLERS)):
            value, known = getattr(self, name), of_process[self.process]
            if value not in known:
                raise UserError(f"{name} {value!r} is not one of process {self.process}'s: {', '.join(known)}")
        if self.learn_sigma and self.process != "diffusion":
            raise UserError(f"learn_sigma is an option of process diffusion, not of {self.process}; leave it out")
        if self.num_classes == 1 and not self.label_dropout and self.cfg_scale != 1:
            raise UserError(f"cfg_scale is {self.cfg_scale}; a model of one class has nothing to be guided by; give 1")
        if self.process == "consistency" and self.cfg_scale != 1:
            raise UserError(f"cfg_scale is {self.cfg_scale}; a consistency model's guidance is in its weights; give 1")
        if self.shard and self.optimizer == "muon":  # its steps are products of whole matrices
            raise UserError("shard does not go with optimizer muon, which needs whole matrices; give adamw")
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta {self.eta} is an option of sampler ddim, not of {self.sampler}; leave it out")

    @property
    def run_dir(self) -> Path:
        """The folder of the run: out_dir, or runs/PRESET of the repository."""
        return Path(self.out_dir or ROOT / "runs" / self.preset.replace("/", "-"))

    @property
    def data_folder(self) -> Path:
        """The folder of the data sets: data_dir, or $DATA_DIR, or data of the repository."""
        return Path(self.data_dir or os.environ.get("DATA_DIR") or ROOT / "data")

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)


def preset(name: str = "digits", **changes: Any) -> Config:
    """The Config of a preset, with changes of its fields."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    settings = {**PRESETS[name], **changes}
    if changes.get("vae") and "image_size" not in changes:
        settings.pop("image_size", None)  # the preset's is of latents, and here it is the size of the images
    process = settings.get("process", "diffusion")
    for other, options in OPTIONS.items():
        for option_name in options:
            if option_name in settings and option_name not in OPTIONS[process]:
                advice = "leave it out" if option_name in changes else f"preset {name} sets it, so choose another"
                raise UserError(f"{option_name} is an option of process {other}, not of {process}; {advice}")
    if process != PRESETS[name].get("process", "diffusion"):
        settings["sampler"] = changes.get("sampler", "dpm++" if process == "diffusion" else SAMPLERS[process][0])
    return Config(preset=name, **settings)
