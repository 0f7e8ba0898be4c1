"""The paper's experiments in miniature, measured: `python -m docs.paper [blocks] [sizes] [sampling]`, about two hours.

    blocks     the four designs of conditioning against training steps (Peebles & Xie, Figure 5), two seeds each
    sizes      models of four sizes on three sizes of patches, against their Gflops (Figures 6 and 8)
    sampling   the same models, drawing with more and fewer steps (Figure 10)

A row of docs/paper.csv for each figure, kept as it is measured: begun anew, the script goes on with what is missing.
As in the paper no label guides (cfg_scale 1) and the learning rate stays; unlike there, the network predicts x_0.
Each figure is by 2,000 images. notebooks/paper.ipynb draws the pictures.
"""

import csv
import sys
from pathlib import Path

import torch

from benchmark import count_gflops
from checkpoint import build_model, load_model
from config import UserError, preset, run_script
from docs.quality import scorer
from train import resumed, train

CSV = Path("docs/paper.csv")
COLUMNS = "experiment block patch_size hidden_size depth seed step sample_steps parameters gflops accuracy FD_ratio"
NUM_SAMPLES = 2000
RECIPE = dict(learning_rate=1e-3, lr_decay="constant", compile="off", sampler="ddpm", cfg_scale=1.0)
STEPS = 2000
SAMPLE_STEPS = 32
SIZES = [dict(depth=depth, hidden_size=hidden_size) for depth, hidden_size in ((3, 48), (4, 96), (6, 144), (8, 192))]
MODELS = [dict(patch_size=patch_size, **size) for patch_size in (14, 7, 4) for size in SIZES][:-2]


def plan(experiment: str) -> list[tuple[dict, int, int]]:
    """The fields of the model, training steps and sampling steps of each of the experiment's figures."""
    if experiment == "blocks":
        designs = ("in-context", "cross-attention", "adaLN", "adaLN-Zero")
        fields = [dict(patch_size=7, **SIZES[1], block=block, seed=seed) for seed in (0, 1) for block in designs]
        return [(model, step, SAMPLE_STEPS) for model in fields for step in (250, 500, 1000, 2000, 4000)]
    if experiment == "sizes":
        return [(model, STEPS, SAMPLE_STEPS) for model in MODELS]
    if experiment == "sampling":
        return [(model, STEPS, n) for model in MODELS if model["patch_size"] > 4 for n in (2, 4, 8, 16, 64)]
    raise UserError(f"{experiment} is not one of blocks, sizes, sampling")


def main() -> None:
    score = scorer("mnist", NUM_SAMPLES)
    if not CSV.exists():
        CSV.write_text(COLUMNS.replace(" ", ",") + "\n")
    for experiment in sys.argv[1:] or ("blocks", "sizes", "sampling"):
        for fields, step, sample_steps in plan(experiment):
            config = preset(**RECIPE, **fields, train_steps=step, dataset="mnist", image_size=28)
            key = [experiment, *(getattr(config, name) for name in COLUMNS.split()[1:6]), step, sample_steps]
            with CSV.open() as file:
                if list(map(str, key)) in [row[: len(key)] for row in csv.reader(file)]:
                    continue
            run = "blocks" if experiment == "blocks" else "sizes"
            config = config.replace(out_dir="-".join(map(str, [f"runs/paper/{run}", *key[1:6]])))
            saved = config.run_dir / "checkpoint.pth"
            if not saved.exists():
                train(config)
            else:
                train(*resumed({"out_dir": config.out_dir, "train_steps": step}))
            model, _ = load_model(config.run_dir / "model.pth")
            with torch.device("meta"):
                gflops = count_gflops(build_model(config))
            parameters = sum(p.numel() for p in model.parameters())
            figures = score(model, config.replace(sample_steps=sample_steps))
            with CSV.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow([*key, parameters, round(gflops, 5), *figures])


if __name__ == "__main__":
    run_script(main)
