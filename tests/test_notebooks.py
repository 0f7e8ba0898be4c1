"""Every notebook runs from top to bottom with its "parameters" cell made small, and is committed as it ran in full.

Outputs grow stale in two ways. When a notebook is edited, or a file that it reads changes, its fingerprint no longer
fits (docs/notebooks.py). When the modules behind it change, so may what they print and draw: here each cell's small run
is compared with what is committed, which must have the same words, whatever the numbers, and as many pictures.
`make notebooks` renews the outputs. A change of the modules that moves numbers alone goes unseen: only running
everything again could tell.
"""

import csv
import re
import sys

import nbformat
import pytest
from conftest import ROOT
from nbconvert.preprocessors import ExecutePreprocessor

from config import Config, preset
from docs import paper
from docs.notebooks import NAMES, fingerprint
from support import run_log
from train import learning_rate_at

SMALL = {
    "diffusion": dict(DATASET="glyphs", LEVELS=[0, 500, 999], NUM_CHAINS=2, NUM_IMAGES=4, NUM_TIMESTEPS=3),
    "dit_in_100_lines": dict(DOWNLOAD=False, TRAIN_STEPS=20, NUM_READ=20),
    "train": dict(DATASET="glyphs", TRAIN_STEPS=6, NOISE_STEPS=3, KEEP_EVERY=3, NUM_IMAGES=4, NUM_TIMESTEPS=3)
    | dict(CHANGES=dict(hidden_size=16, depth=1, batch_size=8, sample_steps=2), NUM_ROWS=1),
    "inference": dict(SAMPLE_STEPS=2, STEP_COUNTS=[1, 2], CFG_SCALES=[0, 1, 2], ETAS=[0.0, 1.0])
    | dict(SIDE_BY_SIDE=[1, 2], NUM_NOISES=2, NUM_IMAGES=4, COLUMNS=3, PATH_STEPS=4, EVALUATIONS=[1, 2]),
    "network": dict(DATASET="glyphs", LEVELS=[0, 500, 999], LEVELS_SHOWN=[0, 500], NUM_DIGITS=40, NUM_DRAWN=10)
    | dict(NUM_MOVED=4, COLUMNS=2, TIMES_TOLD=[500]),
    "your_images": dict(NUM_SYMBOLS=5, IMAGE_SIZE=16, TRAIN_STEPS=6, SAMPLE_EVERY=2, LOG_EVERY=2, BATCH_SIZE=8)
    | dict(HIDDEN_SIZE=16, DEPTH=1, COLUMNS=6),
    "paper": dict(SIZES_SHOWN=["DiT-S/8"]),
    "words": dict(DATASET="glyphs", NUM_DIGITS=200, NUM_CAPTIONS=4, NUM_GUIDED=4, NUM_WATCHED=3, COLUMNS=2)
    | dict(CFG_SCALES=[0, 1, 2], SHARES=[0, 1], SLIDER_STEPS=3),
    "targets": dict(DIMENSIONS=[2, 4], WIDTH=8, TRAIN_STEPS=3, BATCH_SIZE=8, NUM_SAMPLES=20, NUM_POINTS=10)
    | dict(NUM_PATHS=3, STEP_COUNTS=[1, 2]),
}
# Last cells: what a reader does to a notebook that has run, or a comparison with the modules.
IN_100_LINES = """
from diffusion import Diffusion
process, y = Diffusion(schedule="cosine", prediction="x0"), torch.arange(11)
t = 99 * y
torch.manual_seed(1)
noisy, (*_, drawn) = add_noise(digits[:11], t), sample(ours, y)
torch.manual_seed(1)
assert (noisy - process.q_sample(digits[:11], t, torch.randn(noisy.shape))).abs().max() < 1e-4
*_, expected = process.sample(theirs, torch.randn(drawn.shape), y, 25, "ddpm", 1.5)
assert (drawn - expected).abs().max() < 0.03
fresh, pos_embed = DiT(), dit.sincos_pos_embed(192, 2)
assert not fresh(noisy, t, y).any() and (fresh.pos_embed - pos_embed).abs().max() < 1e-6
"""
AS_TRAIN_PY = """
import tempfile
from support.files import load_file
from train import train

with tempfile.TemporaryDirectory() as folder:
    train(config.replace(out_dir=folder, device="cpu", precision="fp32", compile="off"))
    state = load_file(Path(folder) / "checkpoint.pth")
for network, weights in zip(kept[TRAIN_STEPS], (state["model"], state["ema"])):
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
"""
TURN_EACH_SLIDER = """
for slider in sliders.children[:-1]:
    before, slider.value = sliders.result, slider.max
    assert sliders.result.shape == before.shape and not torch.equal(sliders.result, before)
"""
LOOK_INSIDE = """
for slider in sliders.children[:-1]:  # a head changes where patches look in a block, not the picture after it
    before, slider.value = sliders.result, slider.max
    changed = [not torch.equal(a, b) for a, b in zip(before, sliders.result)]
    assert changed == [slider.description != "head", True], slider.description
"""
AFTERWARDS = {
    "dit_in_100_lines": IN_100_LINES,
    "train": AS_TRAIN_PY,
    "inference": TURN_EACH_SLIDER,
    "words": TURN_EACH_SLIDER,
    "network": LOOK_INSIDE,
}


# Said now and then, or only where the data are not those of the checkpoint.
NOT_ALWAYS_SAID = re.compile(r"^(about .* to go|step [\d,]+ of .*|Note: .*)$", re.MULTILINE)


def shown_by(cell) -> tuple[set[str], int]:
    """The words that a cell's outputs say, and how many pictures they have."""
    text = "".join(output.get("text", "") for output in cell.outputs)
    text = re.sub(r"notebook-\w+|mnist|glyphs", "", NOT_ALWAYS_SAID.sub("", text))
    return set(re.findall(r"[^\W\d_]{3,}", text)), sum("image/png" in o.get("data", {}) for o in cell.outputs)


@pytest.mark.parametrize("name", SMALL)
def test_runs_with_few_steps_and_shows_what_is_committed(name, glyphs_dir, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(glyphs_dir))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    committed = [shown_by(cell) for cell in notebook.cells if cell.cell_type == "code"]
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for key, value in SMALL[name].items():
        assert f"{key} = " in parameters.source
        parameters.source += f"\n{key} = {value!r}"
    if name in AFTERWARDS:
        notebook.cells.append(nbformat.v4.new_code_cell(AFTERWARDS[name]))
    ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": ROOT / "notebooks"}})
    shown = [shown_by(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert shown[: len(committed)] == committed, "the outputs are older than the code; renew them with: make notebooks"


@pytest.mark.parametrize("name", NAMES)
def test_has_run_since_it_was_changed(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    message = f"notebooks/{name}.ipynb, or a file that it reads, has changed since it ran: make notebooks"
    assert notebook.metadata.get("fingerprint") == fingerprint(notebook), message


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


def test_a_hundred_lines_are_enough_and_import_nothing_of_ours():
    """dit_in_100_lines, without the cells that say "ours": the stand-in for MNIST, and the checks at the end."""
    notebook = nbformat.read(ROOT / "notebooks" / "dit_in_100_lines.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stand_in, *checks = [cell for cell in cells if "ours" in cell.metadata.get("tags", [])]
    assert stand_in.source.startswith("if mnist is None:") and checks == cells[-len(checks) :]
    own = "\n".join(cell.source for cell in cells[: -len(checks)] if cell is not stand_in)
    assert sum(line.strip()[:1] not in ("", "#") for line in own.splitlines()) <= 110
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", own, re.MULTILINE))
    assert {"torch", "torchvision"} <= imported <= {"torch", "torchvision", *sys.stdlib_module_names}


def test_the_run_beside_that_of_the_train_notebook_had_the_defaults_of_now():
    config = Config()
    with open(ROOT / "docs" / "defaults.csv") as file:
        columns, *rows = csv.reader(file)
    assert ",".join(columns) == run_log.COLUMNS
    steps = range(config.log_every, config.train_steps + 1, config.log_every)
    rates = [f"{learning_rate_at(step - 1, config):.6g}" for step in steps]
    assert [(row[0], row[2]) for row in rows] == [(str(step), rate) for step, rate in zip(steps, rates)]
    assert float(rows[0][1]) > float(rows[-1][1]) > 0


@pytest.mark.parametrize("name", SMALL)
def test_is_committed_as_it_ran(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    text = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"(?<!\S)(/|~|[A-Z]:\\)\w", text), "an output shows a path of the machine that it ran on"
    assert "xercises" in notebook.cells[-1].source
    assert not any("ANSWER_" in cell.source for cell in notebook.cells)
