"""What several notebooks share: rows of images as a picture, and the way from a solution to its notebook."""

import matplotlib.pyplot as plt
import nbformat
import torch
from IPython import get_ipython

from config import ROOT
from support.pictures import mosaic


def show(rows, titles=(), labels=(), size=1.0):
    """Rows of images, each (B, C, H, W) in [-1, 1], as one picture: titles above columns, labels beside rows.

    size is the side of an image in inches.
    """
    columns, pitch = len(rows[0]), rows[0].shape[-1] + 1  # an image and its border
    figure, axes = plt.subplots(figsize=(size * columns, size * len(rows)), layout="constrained")
    axes.imshow(mosaic(torch.cat(list(rows)), columns), interpolation="nearest")
    axes.xaxis.tick_top()
    axes.set_xticks([pitch * (i + 0.5) for i in range(len(titles))], titles)
    axes.set_yticks([pitch * (i + 0.5) for i in range(len(labels))], labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    plt.show()


def run_cells(name: str) -> None:
    """Run the cells of notebooks/NAME.ipynb tagged "shared" as if they stood here: what its solutions build on."""
    for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells:
        if "shared" in cell.metadata.get("tags", []):
            get_ipython().run_cell(cell.source).raise_error()
