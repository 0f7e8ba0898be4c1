"""Three ways to give a caption to a network, measured: `python -m docs.words`, about an hour and a half on two cores.

Each learns for about the same time, with the same settings: the bag of words takes less work a step, and gets more
steps. Their weights go to notebooks/words/ in half precision; those are what is measured, by 10,000 scenes from each of
three seeds, beside as many real ones. Each figure is a row of docs/words.csv. Stopped and started again, the script
goes on with what is missing. notebooks/words.ipynb shows the rest.
"""

import json
import statistics
from pathlib import Path

import evaluate
from config import ROOT, preset
from support.checkpoint import save_in_half
from support.command_line import run_script
from support.files import writing
from support.run_state import resumed
from train import train

CSV = Path(__file__).with_suffix(".csv")
FOLDER, RUNS = ROOT / "notebooks" / "words", ROOT / "runs" / "docs-words"
COLUMNS = "conditioning pairs figure mean spread real"
WAYS = {  # files, block, and the steps of 17 to 18 minutes, eager
    "bag of words": ("bag", "adaLN-Zero", 8300),
    "cross-attention": ("cross-attention", "cross-attention", 6200),
    "joint attention": ("joint-attention", "joint-attention", 5000),
}


def train_way(name: str, block: str, steps: int) -> Path:
    """Train a network, or go on; its weights in half precision."""
    run_dir, path = RUNS / name, FOLDER / f"{name}.pth"
    if not path.exists():
        if (run_dir / "checkpoint.pth").exists():
            train(*resumed({"out_dir": str(run_dir)}))
        else:
            train(preset("words", block=block, train_steps=steps, out_dir=str(run_dir)))
        save_in_half(run_dir / "model.pth", path)
    return path


def measure_way(path: Path) -> list[list]:
    """Rows of pairs, figure, mean and spread over the seeds, and the same of real scenes."""
    figures = RUNS / f"{path.stem}.json"
    if not figures.exists():
        evaluate.main(["--checkpoint", str(path), "--num-samples", "10000", "--seeds", "3", "--json", str(figures)])
    report = json.loads(figures.read_text())
    rows = []
    for name, real in report["real"].items():
        values = [seed[name] for seed in report["generated"]]
        numbers = (statistics.mean(values), statistics.stdev(values), real)
        figure, pairs = name.rsplit(", ", 1)
        rows.append([pairs, figure, *(round(number, 4) for number in numbers)])
    return rows


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    rows = [[way, *row] for way, how in WAYS.items() for row in measure_way(train_way(*how))]
    with writing(CSV) as file:
        lines = [COLUMNS.split(), *rows]
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())


if __name__ == "__main__":
    run_script(main)
