"""Run the notebooks and keep what they show: `python -m docs.notebooks [NAME ...]`, or `make notebooks` for all seven.

Each is written back with its outputs and a fingerprint of what it ran, so that a test can tell when a notebook, or a
file that it reads, has changed since (tests/test_notebooks.py). Some minutes on two cores, most of them
training, in train.ipynb and your_images.ipynb.
"""

import hashlib
import re
import sys

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

from config import ROOT

FOLDER = ROOT / "notebooks"
NAMES = ("diffusion", "train", "inference", "your_images", "paper", "words", "targets")
WIDGET = "application/vnd.jupyter.widget-view+json"


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """A hash of the code cells and of the files that the "parameters" cell names: weights, tables of measurements.

    The first cell is left out: all it does is to find the repository.
    """
    _, parameters, *others = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    parts = [source.encode() for source in (parameters, *others)]
    parts += [(ROOT / name).read_bytes() for name in re.findall(r'"(\S+\.\w+)"', parameters)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def run(name: str) -> None:
    """Run a notebook from top to bottom, and write it with its outputs, its fingerprint and no times of day.

    Widgets, which live only as long as the kernel, leave nothing.
    """
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    ran = ExecutePreprocessor(timeout=3600, record_timing=False)
    ran.preprocess(notebook, {"metadata": {"path": FOLDER}})
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    notebook.metadata["fingerprint"] = fingerprint(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        run(name)
