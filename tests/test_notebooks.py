"""Every notebook runs from top to bottom with its "parameters" cell made small, and is committed as it ran in full.

Outputs grow stale in three ways, and docs/notebooks.py keeps what tells. When a notebook is edited, or a file that it
reads changes, its fingerprint no longer fits: `make notebooks` renews the outputs. When a module behind it changes, its
hash no longer fits: `python -m docs.notebooks --compare` says whether the figures are still the same. And what it says
may have come to differ: each cell's small run is compared with what is committed, which must have the same words,
whatever the numbers, and as many pictures.

An exercise is a blank and a check that fails on it; the solutions have the same checks, which pass.
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
from docs.notebooks import (
    COURSE,
    NAMES,
    NOT_ALWAYS_SAID,
    agree,
    differences,
    figures,
    fingerprint,
    main,
    module_hash,
    tagged,
)
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
    | dict(NUM_MOVED=4, COLUMNS=5, TIMES_TOLD=[500]),
    "your_images": dict(NUM_SYMBOLS=5, IMAGE_SIZE=16, TRAIN_STEPS=6, SAMPLE_EVERY=2, LOG_EVERY=2, BATCH_SIZE=8)
    | dict(HIDDEN_SIZE=16, DEPTH=1, COLUMNS=6),
    "paper": dict(SIZES_SHOWN=["DiT-S/8"]),
    "solutions/paper": dict(SIDES=[128, 256], STEPS_SHOWN=[4000]),
    "words": dict(DATASET="glyphs", NUM_DIGITS=200, NUM_CAPTIONS=4, NUM_GUIDED=4, NUM_WATCHED=3, COLUMNS=2)
    | dict(CFG_SCALES=[0, 1, 2], SHARES=[0, 1], SLIDER_STEPS=3),
    "solutions/inference": dict(NUM_IMAGES=10, COLUMNS=3, SWITCHES=[750], INTERVALS=[(0.0, 1.0)], SECOND_LOOKS=[500])
    | dict(BUDGETS=[1, 10]),
    "targets": dict(DIMENSIONS=[2, 4], WIDTH=8, TRAIN_STEPS=3, BATCH_SIZE=8, NUM_SAMPLES=20, NUM_POINTS=10)
    | dict(NUM_PATHS=3, STEP_COUNTS=[1, 2]),
    "solutions/diffusion": dict(DATASET="glyphs", LEVELS=[0, 500, 999], NUM_IMAGES=4, NUM_TIMESTEPS=3),
    "solutions/targets": dict(WIDE=4, WIDTHS=[("x0", 2), ("v", 8)], MANY=4, WIDTH=8, TRAIN_STEPS=3, BATCH_SIZE=8)
    | dict(NUM_SAMPLES=20, NUM_POINTS=10, STEP_COUNTS=[1, 2]),
    "solutions/train": dict(DATASET="glyphs", TRAIN_STEPS=4, KEEP_EVERY=2, NUM_IMAGES=4, NUM_TIMESTEPS=3)
    | dict(CHANGES=dict(patch_size=14, hidden_size=16, depth=1, batch_size=8, sample_steps=2), CHANCE_STEPS=2),
    "solutions/your_images": dict(NUM_SYMBOLS=30, IMAGE_SIZE=16, TRAIN_STEPS=4, TUNE_STEPS=2, LOG_EVERY=2, BATCH_SIZE=8)
    | dict(HIDDEN_SIZE=16, DEPTH=1, FEW_SYMBOLS=5, NUM_EACH=2),
    "solutions/words": dict(DATASET="glyphs", NUM_DIGITS=200, NUM_CAPTIONS=4, NUM_DRAWN=4, NUM_WATCHED=3, NUM_TOLD=1)
    | dict(COLUMNS=2, SHARES=[0, 1], BETWEEN=[0, 1], SWITCHES=[-1, 416]),
    "solutions/dit_in_100_lines": dict(DOWNLOAD=False, TRAIN_STEPS=12, NUM_READ=60),
    "solutions/network": dict(DATASET="glyphs", LEVELS=[0, 500, 999], LEVELS_SHOWN=[0, 500], NUM_DIGITS=40)
    | dict(NUM_DRAWN=4),
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


def shown_by(cell) -> tuple[set[str], int]:
    """The words that a cell's outputs say, and how many pictures they have."""
    text = "".join(output.get("text", "") for output in cell.outputs)
    text = re.sub(r"mnist|glyphs", "", NOT_ALWAYS_SAID.sub("", text))
    return set(re.findall(r"[^\W\d_]{3,}", text)), sum("image/png" in o.get("data", {}) for o in cell.outputs)


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode, tag: str | None = None) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and (tag is None or tagged(cell, tag))]


@pytest.mark.parametrize("name", NAMES)
def test_runs_with_few_steps_and_shows_what_is_committed(name, glyphs_dir, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(glyphs_dir))
    notebook = read(name)
    committed = [shown_by(cell) for cell in code_cells(notebook) if not tagged(cell, "check")]
    (parameters,) = code_cells(notebook, "parameters")
    for key, value in SMALL[name].items():
        assert f"{key} = " in parameters.source
        parameters.source += f"\n{key} = {value!r}"
    if name in AFTERWARDS:
        notebook.cells.append(nbformat.v4.new_code_cell(AFTERWARDS[name]))
    path = (ROOT / "notebooks" / name).parent
    ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": path}})
    shown = [shown_by(cell) for cell in code_cells(notebook) if not tagged(cell, "check")]
    assert shown[: len(committed)] == committed, "the outputs are older than the code; renew them with: make notebooks"
    for check in code_cells(notebook, "check"):
        errors = [output.ename for output in check.outputs if output.output_type == "error"]
        assert errors == (["AssertionError"] if name in COURSE else []), check.source


@pytest.mark.parametrize("name", NAMES)
def test_has_run_since_it_or_the_code_behind_it_was_changed(name):
    notebook = read(name)
    message = f"notebooks/{name}.ipynb, or a file that it reads, has changed since it ran: make notebooks"
    assert notebook.metadata.get("fingerprint") == fingerprint(notebook), message
    changed = [module for module, known in notebook.metadata["modules"].items() if module_hash(module) != known]
    message = (
        f"{', '.join(changed)} changed since notebooks/{name}.ipynb ran: python -m docs.notebooks --compare {name}"
    )
    assert not changed, message


@pytest.mark.parametrize("name", COURSE)
def test_its_exercises_are_blanks_with_checks_and_the_solutions_have_the_same(name):
    notebook, solutions = read(name), read(f"solutions/{name}")
    blanks, checks = code_cells(notebook, "exercise"), code_cells(notebook, "check")
    assert len(blanks) == len(checks) >= 4
    assert all("# your code here" in blank.source for blank in blanks)
    assert not any("# your code here" in cell.source for cell in solutions.cells)
    assert [cell.source for cell in code_cells(solutions, "check")] == [cell.source for cell in checks]
    assert all(tagged(check, "raises-exception") for check in checks)
    assert not any(tagged(cell, "raises-exception") for cell in solutions.cells)
    hints = sum("<details><summary>Hint</summary>" in cell.source for cell in notebook.cells)
    assert hints == len(blanks)
    assert f"(solutions/{name}.ipynb)" in "".join(cell.source for cell in notebook.cells)


def of_printed(*texts: str) -> nbformat.NotebookNode:
    """A notebook whose cells have printed these texts."""
    outputs = [[nbformat.v4.new_output("stream", text=text)] for text in texts]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=output) for output in outputs])


def test_figures_are_compared_but_not_durations():
    printed = "step 1,200: loss 0.114 after 345 seconds\nt = 0: difference 3e-07, 2.5 steps/s\n"
    (cell,) = of_printed(printed + "step 3 of 4: 5\nnotebook-6a7\n").cells
    assert figures(cell) == ["1,200", "0.114", "0", "3e-07"]
    assert agree("1,200", "1,259", 0.05) and not agree("1,200", "1,261", 0.05)
    assert agree("3e-07", "4e-07", 0.05) and not agree("3e-07", "5e-07", 0.05)  # one in the last digit printed
    assert agree("0.02", "0.03", 0) and not agree("0.020", "0.022", 0)
    before = of_printed("99.3% of 150", "0.50")
    assert differences(before, of_printed("99.5% of 150", "0.50 or so"), 0.05) == []
    assert differences(before, of_printed("80.1% of 150", "0.50, 0.25"), 0.05) == [
        "cell 0: 99.3, now 80.1",
        "cell 1: 1 figures, now 2",
    ]


def test_a_module_has_changed_when_its_code_has(tmp_path, monkeypatch):
    monkeypatch.setattr("docs.notebooks.ROOT", tmp_path)
    hashes = []
    for source in (
        '"""One."""\n\n\ndef f(x):\n    """Two\n    lines."""\n    return x + 1\n',
        '"""Another."""\n\n\ndef f(x):\n    """Three."""\n    # why\n    return x + 1\n',
        '"""One."""\n\n\ndef f(x):\n    """Two\n    lines."""\n    return x + 2\n',
    ):
        (tmp_path / "module.py").write_text(source)
        hashes.append(module_hash("module.py"))
    assert hashes[0] == hashes[1] != hashes[2] and module_hash("gone.py") == ""


def test_running_and_comparing(tmp_path, monkeypatch, capsys):
    """Run, a notebook keeps what it imported; compared, it keeps its outputs, and renews the hashes if they agree."""
    path = tmp_path / "diffusion.ipynb"
    monkeypatch.setattr("docs.notebooks.FOLDER", tmp_path)
    cells = [
        f"import sys\nsys.path.insert(0, {str(ROOT / 'notebooks' / '..')!r})",  # as dit_in_100_lines.ipynb does
        "FILE = 2",
        "import dit; print(3)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[1].metadata["tags"] = ["parameters"]
    notebook.cells.append(nbformat.v4.new_code_cell("assert 0", metadata=dict(tags=["check", "raises-exception"])))
    nbformat.write(notebook, path)
    assert main(["diffusion"]) == 0
    ran = nbformat.read(path, as_version=4)
    assert figures(ran.cells[2]) == ["3"] and ran.cells[3].outputs == []
    assert ran.metadata["fingerprint"] == fingerprint(ran)
    modules = {name: module_hash(name) for name in ("dit.py", "dit_block.py", "time_emb.py")}
    assert ran.metadata["modules"] == modules

    ran.metadata["modules"] = {"dit.py": "older"}
    nbformat.write(ran, path)
    assert main(["--compare", "diffusion"]) == 0
    assert nbformat.read(path, as_version=4).metadata["modules"] == modules
    ran.cells[2].outputs[0].text = "5\n"
    nbformat.write(ran, path)
    assert main(["--compare", "diffusion"]) == 1
    assert "cell 2: 5, now 3" in capsys.readouterr().out
    assert nbformat.read(path, as_version=4) == ran, "a notebook that differs is left as it is"
    with pytest.raises(SystemExit):
        main(["difusion"])
    assert "there is no notebook difusion: choose from" in capsys.readouterr().err


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
    """dit_in_100_lines, without the cells that say "ours" (stand-in for MNIST, checks) and the exercises after."""
    cells = code_cells(read("dit_in_100_lines"))
    exercises = [cell for cell in cells if tagged(cell, "exercise") or tagged(cell, "check")]
    assert exercises == cells[-len(exercises) :], "a cell of the lesson stands among the exercises"
    cells = cells[: -len(exercises)]
    stand_in, *checks = [cell for cell in cells if tagged(cell, "ours")]
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


@pytest.mark.parametrize("name", NAMES)
def test_is_committed_as_it_ran(name):
    notebook = read(name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= (3 if name in COURSE else 1)
    text = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"(?<!\S)(/|~|[A-Z]:\\)\w", text), "an output shows a path of the machine that it ran on"
    assert not any("ANSWER_" in cell.source for cell in notebook.cells)
