"""README, docs/ and the notebooks' prose name what exists: files, modules and their parts, flags, headings."""

import importlib
import json
import re
import tokenize

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser as torchrun_parser

from config import PRESETS, Config

ROOMS = [ROOT / room for room in (".", "support", "loaders", "variants", "docs", "notebooks")]
SOURCES = [path for room in ROOMS for path in room.glob("*.py")]
COURSE = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *COURSE, *SOLUTIONS]
NOT_OURS = "diffusers torchmetrics kill config.json .bin .safetensors sd-vae-ft-ema itertools.islice data/".split()


def prose_of(page) -> str:
    """A page's markdown."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def code_of(page) -> str:
    """A notebook's code; a solution's with that of its notebook, some cells of which it runs."""
    if page.suffix == ".md":
        return ""
    cells = json.loads(page.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return code + code_of(page.parent.parent / page.name) if page in SOLUTIONS else code


def words_of_the_code() -> set[str]:
    """Every name in the sources, and every string without a space: fields' choices, flags, files."""
    words = set()
    for path in SOURCES:
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.NAME:
                    words.add(token.string)
                elif token.type == tokenize.STRING and not re.search(r"\s", token.string):
                    words.add(token.string.strip("\"'"))
                elif token.type == tokenize.STRING and not token.string.startswith('"""'):
                    words |= set(token.string.strip("\"'").split())
    return words


WORDS = words_of_the_code()
FLAGS = {"--help", *("--" + name.replace("_", "-") for name in Config.__dataclass_fields__)}
FLAGS |= {word for word in WORDS if word.startswith("--")}
FLAGS |= set(torchrun_parser()._option_string_actions)


def names_in(text: str) -> set[str]:
    """What stands in backticks and looks like the name of something: no blanks, no brackets."""
    return set(re.findall(r"`([A-Za-z_][\w./-]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


def exists(name: str, code: str) -> bool:
    """Whether a file, a module, a part of one, or at least a word of the code bears this name."""
    folders = [ROOT, ROOT / "support", ROOT / "docs", ROOT / "notebooks"]
    if name in WORDS or name in PRESETS or name in NOT_OURS or any((folder / name).exists() for folder in folders):
        return True
    if name.startswith("runs/") or re.search(rf"\b{re.escape(name)}\b", code):  # what a run writes, a variable's part
        return True
    owner, *parts = name.split(".")
    modules = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES}
    if parts and owner not in modules:  # Class.method
        return any(has(vars(importlib.import_module(module)).get(owner), parts) for module in modules.values())
    return bool(parts) and has(importlib.import_module(modules[owner]), parts)


def has(thing, parts: list[str]) -> bool:
    """Whether thing.a.b exists."""
    for part in parts:
        thing = getattr(thing, part, None)
    return thing is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_named_exists(page):
    code = code_of(page)
    missing = sorted(name for name in names_in(prose_of(page)) if not exists(name, code))
    assert not missing


def test_a_name_that_is_gone_is_seen():
    assert exists("Diffusion.ddim_step", "") and exists("dataset.py", "") and exists("predict_x0", "")
    for name in ("Diffusion.no_such_step", "no_such_step", "diffusion.no_such_step", "mnist.py", "classifier/judge.py"):
        assert not exists(name, ""), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = prose_of(page)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", prose_of(target), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


TABLE = ROOT / "docs" / "paper_to_code.md"


def parts_linked(line: str) -> list[tuple[str, str]]:
    """The links from a name in code marks to a module of ours: (name, the module's path)."""
    return re.findall(r"\[`([^`]+)`\]\(([^)]+\.py)\)", line)


def is_part(name: str, path: str) -> bool:
    """Whether `name` stands in the module at `path`, seen from docs/: not merely imported there, nor inherited."""
    module = ".".join((TABLE.parent / path).resolve().relative_to(ROOT).with_suffix("").parts)
    thing = importlib.import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part, None)
    return thing is not None and getattr(thing, "__module__", module) == module


def test_the_papers_equations_are_the_functions_that_the_table_names():
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ") and "| here |" not in line]
    links = [parts_linked(row.rsplit(" | ", 1)[1]) for row in rows]
    assert len(rows) > 40 and all(links)
    assert not [link for row in links for link in row if not is_part(*link)]
    files = {path.removeprefix("../") for row in links for _, path in row}
    variants = {f"variants/{path.stem}.py" for path in (ROOT / "variants").glob("[!_]*.py")}
    assert files >= variants | {"diffusion.py", "dit.py", "dit_block.py", "time_emb.py"}


def test_a_wrong_name_in_the_table_is_seen():
    assert parts_linked("see [`Diffusion.loss`](../diffusion.py), eq. 14") == [("Diffusion.loss", "../diffusion.py")]
    assert is_part("Diffusion.loss", "../diffusion.py") and is_part("plan", "paper.py")
    assert not is_part("Diffusion.no_such_step", "../diffusion.py")  # does not exist
    assert not is_part("attend", "../dit.py")  # exists elsewhere
    assert not is_part("DiTBlock", "../dit.py")  # is imported there
    assert not is_part("LearnedVariance.sample", "../variants/learned_variance.py")  # is inherited


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_exist(page):
    text = re.sub(r"(?<![\w-])(pip|ruff|time|tests?/\S+|nbconvert)[^`\n]*", "", prose_of(page))  # other programs' flags
    missing = sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - FLAGS)
    assert not missing
