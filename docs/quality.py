"""Quality against network evaluations and against guidance, measured: `python -m docs.quality`, about half an hour.

Writes docs/quality.csv, a row for each setting, and docs/quality.png, the picture of it. The weights are those that
ship, model.pth (for the diffusion's samplers) and one_step.pth (for the consistency model's), and those of
`python train.py --preset flow` (for the flow's). Each setting is judged by 1,000 images beside as many real ones: with
so few, FD itself is larger, and its ratio nearer to 1, than with the README's 10,000.

`python -m docs.quality one_step.pth` measures the files that it names: their rows take the place of those of the same
process, and the others stay. To draw the picture alone: `python -c "from docs import quality; quality.plot()"`.
"""

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from config import ROOT, SAMPLERS, SAMPLING, Config
from dataset import denormalize, load_dataset
from dit import DiT
from inference import draw_images
from support.checkpoint import load_model
from support.classifier import judge_of, split_training
from support.command_line import run_script
from support.files import writing
from support.metrics import frechet_distance
from support.sampling import network_evaluations

CSV = Path(__file__).with_suffix(".csv")
NUM_SAMPLES = 1000
EVALUATIONS = {  # without guidance
    "diffusion": (1, 2, 3, 4, 5, 10, 12, 20, 50),
    "flow_matching": (1, 2, 3, 5, 10, 20, 50, 250),
    "consistency": (1, 2, 4, 12),
}
GUIDED_STEPS = (1, 2, 3, 5, 8, 10, 12)  # with guidance as Config has it: 1, 2, 4, 6, 10, 12 and 15 evaluations
GUIDANCE = (1.25, 1.5, 2.0, 3.0, 5.0)
COLUMNS = ("process", *SAMPLING[:-1], "evaluations", "accuracy", "FD_ratio")


def settings(process: str) -> list[dict]:
    """Every sampler without guidance over EVALUATIONS; then guidance over GUIDANCE, always and in Config's interval.

    Config's own guidance over GUIDED_STEPS, too.
    """
    found = []
    for sampler in SAMPLERS[process]:
        steps = [(n + 1) // 2 if sampler == "heun" else n for n in EVALUATIONS[process]]
        found += [(sampler, n, 1.0, 0.0, 1.0) for n in steps]
    if process == "diffusion":
        usual = Config()
        found += [("dpm++", 20, w, 0.0, 1.0) for w in GUIDANCE]
        found += [("dpm++", usual.sample_steps, w, usual.cfg_low, usual.cfg_high) for w in GUIDANCE]
        found += [("dpm++", n, usual.cfg_scale, usual.cfg_low, usual.cfg_high) for n in GUIDED_STEPS]
    elif process == "flow_matching":
        found += [("heun", 10, w, 0.0, 1.0) for w in GUIDANCE]
    return [dict(zip(SAMPLING, values)) for values in dict.fromkeys(found)]


def scorer(dataset: str, num_samples: int) -> Callable[[DiT, Config], tuple[float, float]]:
    """A function of a model and its config: the accuracy and FD ratio of num_samples images drawn with it."""
    train, test = (load_dataset(dataset, Config().data_folder, train=part) for part in (True, False))
    judge = judge_of(train.name, Config().data_folder, train.images, train.labels)
    of_test, _ = judge.read(test.images)
    of_real, _ = judge.read(train.images[split_training(train.labels)[1][:num_samples]])
    real = frechet_distance(of_real, of_test)
    y = test.labels[:num_samples]

    def score(model: DiT, config: Config) -> tuple[float, float]:
        images = denormalize(draw_images(model, config, y, torch.Generator().manual_seed(0)))
        features, logits = judge.read(images)
        accuracy = (logits.argmax(1) == y).float().mean().item()
        return round(accuracy, 4), round(frechet_distance(features, of_test) / real, 4)

    return score


def measure_settings(path: str | Path) -> list[dict]:
    """Accuracy and FD ratio of each setting of a checkpoint's process, by NUM_SAMPLES images each."""
    model, config = load_model(path)
    score, rows = scorer(config.dataset, NUM_SAMPLES), []
    for setting in settings(config.process):
        config = config.replace(**setting)
        values = (config.process, *setting.values(), network_evaluations(config), *score(model, config))
        rows.append(dict(zip(COLUMNS, values)))
        print(*values, flush=True)
    return rows


def lines(rows: list[dict], x: str) -> dict[tuple, list[dict]]:
    """The rows that differ in x alone, "sample_steps" or "cfg_scale": a line each, three rows or more, in x's order.

    The key is what they have in common: sampler, the other one of the two, cfg_low, cfg_high.
    """
    common = [name for name in ("sampler", "sample_steps", "cfg_scale", "cfg_low", "cfg_high") if name != x]
    found: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: float(row[x])):
        found.setdefault(tuple(row[name] for name in common), []).append(row)
    return {key: line for key, line in found.items() if len(line) > 2}


def plot() -> None:
    """docs/quality.csv as a picture: a line for each sampler against its network evaluations, then against guidance."""
    rows = kept_rows()
    figure = Figure(figsize=(10, 7), layout="constrained")
    for (above, below), name in zip(figure.subplots(2, 2).T, ("accuracy", "FD_ratio")):
        for (sampler, scale, low, high), line in lines(rows, "sample_steps").items():
            label = sampler if float(scale) == 1 else f"{sampler}, guided by {scale} {where(low, high)}"
            above.plot(*points(line, "evaluations", name), marker="o", markersize=3, label=label)
        for (sampler, steps, low, high), line in lines(rows, "cfg_scale").items():
            label = f"{sampler}, {steps} steps, guided {where(low, high)}"
            below.plot(*points(line, "cfg_scale", name), marker="o", markersize=3, label=label)
        above.set(title="few evaluations and many", xscale="log", xlabel="network evaluations an image")
        above.set_xticks([1, 2, 5, 10, 20, 50, 250], [1, 2, 5, 10, 20, 50, 250])
        below.set(title="more and more guidance", xlabel="guidance scale")
        for axes in (above, below):
            axes.grid(alpha=0.3)
            if name == "FD_ratio":
                axes.set(yscale="log", ylabel=f"FD ratio of {NUM_SAMPLES:,} images (real digits have 1)")
                ticks = [1, 2, 5, 10, 20, 50, 100] if axes is above else [1, 2, 5, 10, 20]
                axes.set_yticks(ticks, ticks)
                axes.axhline(1, color="black", linestyle=":", label="real digits")
            else:
                # a single step, 0.1 to 0.2, is not worth the room
                axes.set(ylim=(0.9, 1.005), ylabel=f"accuracy (share of {NUM_SAMPLES:,} images)")
            axes.minorticks_off()
            axes.legend(fontsize="small")
    with writing(CSV.with_suffix(".png")) as file:
        figure.savefig(file, format="png", dpi=100)


def where(low: str, high: str) -> str:
    """At which noise levels there is guidance, in words."""
    return "throughout" if (float(low), float(high)) == (0, 1) else f"at noise {low} to {high}"


def points(rows: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of the rows, as numbers."""
    return [float(row[x]) for row in rows], [float(row[y]) for row in rows]


def kept_rows() -> list[dict]:
    """The rows of docs/quality.csv, values as text."""
    if not CSV.exists():
        return []
    with CSV.open() as file:
        return list(csv.DictReader(file))


def keep(rows: list[dict]) -> None:
    """Put rows into docs/quality.csv, in the place of those of their processes, and renew the picture."""
    measured = {row["process"] for row in rows}
    rows = rows + [row for row in kept_rows() if row["process"] not in measured]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: list(SAMPLERS).index(row["process"])))
    with writing(CSV) as file:
        file.write(text.getvalue().encode())
    plot()


def main() -> None:
    shipped = (ROOT / "model.pth", ROOT / "runs/flow/model.pth", ROOT / "one_step.pth")
    for path in sys.argv[1:] or shipped:
        keep(measure_settings(path))


if __name__ == "__main__":
    run_script(main)
