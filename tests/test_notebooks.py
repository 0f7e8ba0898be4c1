"""Every notebook runs from top to bottom with its "parameters" cell made small, and is committed as it ran in full."""

import csv

import nbformat
import pytest
from conftest import ROOT
from nbconvert.preprocessors import ExecutePreprocessor

from config import preset
from docs import paper

SMALL = {
    "diffusion": dict(DATASET="glyphs", LEVELS=[0, 500, 999], NUM_CHAINS=2, NUM_IMAGES=4, NUM_TIMESTEPS=3),
    "train": dict(DATASET="glyphs", TRAIN_STEPS=6, SAMPLE_EVERY=3, LOG_EVERY=2, BATCH_SIZE=8, SAMPLE_STEPS=2)
    | dict(HIDDEN_SIZE=16, DEPTH=1, NUM_IMAGES=4, NUM_TIMESTEPS=3, NUM_ROWS=1),
    "inference": dict(SAMPLE_STEPS=2, STEP_COUNTS=[1, 2], CFG_SCALES=[0, 1, 2], ETAS=[0.0, 1.0])
    | dict(SIDE_BY_SIDE=[1, 2], NUM_NOISES=2, NUM_IMAGES=4, COLUMNS=3),
    "paper": dict(SIZES_SHOWN=["DiT-S/8"]),
}


@pytest.mark.parametrize("name", SMALL)
def test_runs_with_few_steps(name, glyphs_dir, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(glyphs_dir))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for key, value in SMALL[name].items():
        assert f"{key} = " in parameters.source
        parameters.source += f"\n{key} = {value!r}"
    ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": ROOT / "notebooks"}})


def test_every_figure_of_the_paper_in_miniature_was_measured():
    """docs/paper.csv has the rows of docs/paper.py's plan, each once, and no others."""
    with open(ROOT / "docs" / "paper.csv") as file:
        columns, *rows = csv.reader(file)
    assert columns == paper.COLUMNS.split()
    plan = [
        (experiment, *figure) for experiment in ("blocks", "sizes", "sampling") for figure in paper.plan(experiment)
    ]
    keys = [paper.key_of(kind, preset(**fields), step, steps) for kind, fields, step, steps in plan]
    assert [row[: len(keys[0])] for row in rows] == keys
    assert all(0 < float(row[-2]) <= 1 and float(row[-1]) > 0 for row in rows)


@pytest.mark.parametrize("name", SMALL)
def test_is_committed_as_it_ran(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert "xercises" in notebook.cells[-1].source
    assert not any("ANSWER_" in cell.source for cell in notebook.cells)
