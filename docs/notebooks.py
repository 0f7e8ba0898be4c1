"""Run the notebooks and keep what they show: `python -m docs.notebooks [NAME ...]`, or `make notebooks` for all.

Each is written back with its outputs, a fingerprint of what it ran, and a hash of each of our modules that it imported,
so that tests can tell when a notebook, a file that it reads or the code behind it has changed since
(tests/test_notebooks.py). `--compare` runs a notebook anew but keeps the outputs that it has: where the figures printed
are the same, within a tolerance, only the hashes are renewed.
"""

import argparse
import ast
import hashlib
import re
import sys
import time
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

from config import ROOT

FOLDER = ROOT / "notebooks"
COURSE = ("diffusion", "dit_in_100_lines", "train", "inference", "network", "your_images", "paper", "words", "targets")
NAMES = (*COURSE, *(f"solutions/{name}" for name in COURSE))
WIDGET = "application/vnd.jupyter.widget-view+json"
ROOMS = [ROOT / room for room in (".", "support", "loaders", "variants", "docs", "notebooks")]
LIST_IMPORTS = (
    "import sys; print(*[m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)], sep='\\n')"
)
FIGURE = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
# Said now and then, or only where the data are not those of the checkpoint; and names of folders drawn by lot.
NOT_ALWAYS_SAID = re.compile(r"^(about .* to go|step [\d,]+ of .*|Note: .*)$|notebook-\w+", re.MULTILINE)
DURATION = re.compile(r"\d[\d,.]* ?(?:s|seconds|minutes|steps/s|images/s)\b")


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """A hash of the code cells and of the files that the "parameters" cell names: weights, tables of measurements.

    What stands before the parameters is left out: all it does is to find the repository. So are checks, whose outputs
    are not kept. To a solution belong the shared cells of its notebook (notebooks/helpers.py).
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and not tagged(cell, "check")]
    (first,) = (i for i, cell in enumerate(cells) if tagged(cell, "parameters"))
    parameters, *others = [cell.source for cell in cells[first:]]
    parts = [source.encode() for source in (parameters, *others)]
    for name in re.findall(r'^run_cells\("(\w+)"\)', "\n".join(others), re.MULTILINE):
        shared = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
        parts += [cell.source.encode() for cell in shared if tagged(cell, "shared")]
    parts += [(ROOT / name).read_bytes() for name in re.findall(r'"(\S+\.\w+)"', parameters)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def module_hash(name: str) -> str:
    """A hash of a module's lines, without docstrings, blank lines and lines that are comments; "" if it is gone."""
    if not (ROOT / name).exists():
        return ""
    source = (ROOT / name).read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            for number in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[number] = ""
    code = "\n".join(line for line in lines if not line.strip().startswith("#") and line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def run(path: Path) -> nbformat.NotebookNode:
    """A notebook, run from top to bottom: with its outputs, fingerprint and hashes, without times of day.

    Checks of exercises, which fail until a reader has written something, and widgets, which live only as long as the
    kernel, leave nothing.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(LIST_IMPORTS))
    ExecutePreprocessor(timeout=3600, record_timing=False).preprocess(notebook, {"metadata": {"path": path.parent}})
    imported = "".join(output.text for output in notebook.cells.pop().outputs).split("\n")
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            cell.outputs = [] if tagged(cell, "check") else kept
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # of a picture that is there as PNG, too
    notebook.metadata["fingerprint"] = fingerprint(notebook)
    files = {Path(file).resolve() for file in imported if Path(file).is_absolute()}
    ours = sorted(file.relative_to(ROOT).as_posix() for file in files if file.parent in ROOMS)
    notebook.metadata["modules"] = {name: module_hash(name) for name in ours}
    return notebook


def figures(cell: nbformat.NotebookNode) -> list[str]:
    """The figures that a cell printed, but for seconds, what is counted in them and what is not always said."""
    text = "".join(output.get("text", "") for output in cell.get("outputs", []))
    return FIGURE.findall(DURATION.sub("", NOT_ALWAYS_SAID.sub("", text)))


def agree(old: str, new: str, tolerance: float) -> bool:
    """Whether two figures are the same: within the tolerance, relative, or one in the last digit printed."""
    a, b = (float(figure.replace(",", "")) for figure in (old, new))
    mantissa, _, exponent = old.partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(a - b) <= max(tolerance * abs(a), 1.001 * last)


def differences(old: nbformat.NotebookNode, new: nbformat.NotebookNode, tolerance: float) -> list[str]:
    """Where two runs of a notebook printed other figures, a line each."""
    lines = []
    for number, (cell, other) in enumerate(zip(old.cells, new.cells, strict=True)):
        before, after = figures(cell), figures(other)
        if len(before) != len(after):
            lines.append(f"cell {number}: {len(before)} figures, now {len(after)}")
        else:
            pairs = zip(before, after)
            lines += [f"cell {number}: {a}, now {b}" for a, b in pairs if not agree(a, b, tolerance)]
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.notebooks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as train or solutions/train (default: all)")
    parser.add_argument("--compare", action="store_true", help="keep the outputs, compare the figures with a new run")
    parser.add_argument("--tolerance", type=float, default=0.05, help="relative, of --compare (default: %(default)s)")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"there is no notebook {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    differing = False
    for name in args.names or NAMES:
        start, path = time.time(), FOLDER / f"{name}.ipynb"
        new = run(path)
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
        if not args.compare:
            nbformat.write(new, path)
            continue
        old = nbformat.read(path, as_version=4)
        found = differences(old, new, args.tolerance)
        count = sum(len(figures(cell)) for cell in old.cells)
        print(f"  {count} figures, {len(found)} of them differ", *found, sep="\n  ", flush=True)
        if not found:
            old.metadata["modules"] = new.metadata["modules"]
            nbformat.write(old, path)
        differing |= bool(found)
    return int(differing)


if __name__ == "__main__":
    sys.exit(main())
