"""The rules of the house: what stands at the root, and who may import whom."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# Each row may import from the rows above it and, in its own row, from what stands to its left.
ORDER = """
support.start support.errors
support.options support.files support.captions support.machine support.speed config
support.distributed
support.command_line
time_emb dit_block diffusion
dit
variants.*
loaders.download loaders.drawn loaders.packing loaders.image_folder
loaders.glyphs loaders.mnist
loaders.* loaders.sources
dataset
support.published support.pictures support.autoencoder support.checkpoint support.classifier
support.metrics support.sampling support.outputs support.prepare support.scene_judge
support.run_state support.watching support.run_log
inference
train evaluate benchmark
""".split()
NOTHING_BUT_ERRORS = ("time_emb", "dit_block", "diffusion")
CORE = "config dataset time_emb dit_block dit diffusion train inference".split()


def modules() -> dict[str, str]:
    """Source by module name, of the root and its rooms."""
    paths = [path for room in (".", "support", "loaders", "variants") for path in (ROOT / room).glob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in paths}
    return {name: text for name, text in names.items() if not name.endswith("__init__")}


MODULES = modules()


def imports_of(text: str) -> set[str]:
    """The modules of ours that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are from the root"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def rank(name: str) -> int:
    """The place of a module in ORDER; a room's modules that are not told apart share theirs."""
    return ORDER.index(name) if name in ORDER else ORDER.index(name.split(".")[0] + ".*")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_left(name):
    for other in imports_of(MODULES[name]):
        assert rank(other) < rank(name), f"{name} imports {other}"
        assert name not in NOTHING_BUT_ERRORS or other == "support.errors", f"{name} imports {other}"
        of_data = name == "dataset" or name.startswith("loaders.")
        assert not of_data or other.startswith(("loaders.", "support.")), f"{name} imports {other}, a model"


def test_a_broken_rule_is_seen():
    assert imports_of("def f():\n    from inference import mosaic\n    import torch, train") == {"inference", "train"}
    assert imports_of("from support import files") == {"support.files"}
    assert rank("inference") < rank("train") and rank("variants.flow_matching") == rank("variants.conditioning")


def test_the_root_is_what_a_newcomer_reads_and_runs():
    found = {path.name for path in ROOT.iterdir() if path.suffix in (".py", ".pth")}
    assert found == {"model.pth", "one_step.pth", *(f"{name}.py" for name in (*CORE, "evaluate", "benchmark"))}


SLOW = {"torchvision", "matplotlib", "diffusers", "IPython", "torch._dynamo", "triton"}


@pytest.mark.parametrize(
    "code, lines",
    [
        ("import inference, evaluate, train, benchmark", 0),
        ("import inference; inference.main(['--output', 'strip.png', '--gif', 'way.gif'])", 2),
        ("import inference; inference.main(['--output', 'grid.png', '--num-samples', '2', '--npz', 'a.npz'])", 2),
    ],
)
def test_nothing_runs_at_import_and_sampling_does_not_wait_for_what_it_does_not_use(code, lines, tmp_path):
    check = f"import sys, torch; given = {{*sys.modules}}; {code}; print(*({SLOW} & sys.modules.keys()) - given)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout.splitlines()[lines:], result.stderr) == (0, [""], "")
