"""The paper's experiments in miniature, measured: `python -m docs.paper [blocks] [sizes] [sampling]`, a few hours.

    blocks     the four designs of conditioning against training steps (Peebles & Xie, Figure 5), two seeds each; and
               the modern block beside them
    sizes      models of four sizes on three sizes of patches, against their Gflops (Figures 6 and 8)
    sampling   the same models, drawing with more and fewer steps (Figure 10)

Each figure is a row of docs/paper.csv, written as soon as it is measured: started again, the script goes on with what
is missing. As in the paper there is no guidance (cfg_scale 1), and the learning rate is constant, but for its warm-up;
unlike there, the network predicts x_0. Each figure is from 2,000 images. notebooks/paper.ipynb draws the pictures.
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

from config import ROOT, Config, preset
from docs.quality import scorer
from support.checkpoint import load_model
from support.command_line import run_script
from support.errors import UserError
from support.files import append_line
from support.run_state import resumed
from support.speed import count_gflops
from train import train

CSV = Path(__file__).with_suffix(".csv")
COLUMNS = "experiment block patch_size hidden_size depth seed step sample_steps parameters gflops accuracy FD_ratio"
NUM_SAMPLES = 2000
RECIPE = dict(optimizer="adamw", learning_rate=1e-3, lr_decay="constant", time_mean=1.0)
RECIPE |= dict(compile="off", sampler="ddpm", cfg_scale=1.0)
STEPS = 2000
SAMPLE_STEPS = 32
SIZES = [dict(depth=depth, hidden_size=hidden_size) for depth, hidden_size in ((3, 48), (4, 96), (6, 144), (8, 192))]
MODELS = [dict(patch_size=patch_size, **size) for patch_size in (14, 7, 4) for size in SIZES][:-2]


def plan(experiment: str) -> list[tuple[dict, int, int]]:
    """The fields of the model, training steps and sampling steps of each of the experiment's figures."""
    if experiment == "blocks":
        designs = ("in-context", "cross-attention", "adaLN", "adaLN-Zero", "modern")
        fields = [dict(patch_size=7, **SIZES[1], block=block, seed=seed) for seed in (0, 1) for block in designs]
        return [(model, step, SAMPLE_STEPS) for model in fields for step in (250, 500, 1000, 2000, 4000)]
    if experiment == "sizes":
        return [(model, STEPS, SAMPLE_STEPS) for model in MODELS]
    if experiment == "sampling":
        return [(model, STEPS, n) for model in MODELS if model["patch_size"] > 4 for n in (2, 4, 8, 16, 64)]
    raise UserError(f"{experiment} is not one of blocks, sizes, sampling")


def key_of(experiment: str, config: Config, step: int, sample_steps: int) -> list[str]:
    """The first columns of a figure's row, which say what was measured."""
    fields = (config.block, config.patch_size, config.hidden_size, config.depth, config.seed)
    return [experiment, *map(str, fields), str(step), str(sample_steps)]


def measure_run(experiment: str, config: Config, sample_steps: int, score: Callable) -> list:
    """Train a network, or go on, until config.train_steps; the other columns of its row."""
    run = "blocks" if experiment == "blocks" else "sizes"  # sampling is from the networks of sizes
    name = "-".join(key_of(run, config, 0, 0)[:6])
    config = config.replace(out_dir=str(ROOT / "runs" / "paper" / name))
    if (config.run_dir / "checkpoint.pth").exists():
        train(*resumed({"out_dir": config.out_dir, "train_steps": config.train_steps}))
    else:
        train(config)
    model, _ = load_model(config.run_dir / "model.pth")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [parameters, round(count_gflops(model), 5), *score(model, config.replace(sample_steps=sample_steps))]


def main() -> None:
    score = scorer("mnist", NUM_SAMPLES)
    if not CSV.exists():
        append_line(CSV, COLUMNS.replace(" ", ","))
    for experiment in sys.argv[1:] or ("blocks", "sizes", "sampling"):
        for fields, step, sample_steps in plan(experiment):
            config = preset(**RECIPE, **fields, train_steps=step, dataset="mnist", image_size=28)
            key = key_of(experiment, config, step, sample_steps)
            with CSV.open() as file:
                done = [row[: len(key)] for row in csv.reader(file)]
            if key not in done:
                row = key + measure_run(experiment, config, sample_steps, score)
                append_line(CSV, ",".join(map(str, row)))


if __name__ == "__main__":
    run_script(main)
