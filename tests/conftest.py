"""What the tests share: a small random model, glyphs in a temporary folder, the real MNIST where $DATA_DIR has it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmark import relative_error
from dataset import load_dataset, normalize
from dit import DiT
from loaders.mnist import MNIST_FILES
from support.captions import parse_caption
from support.checkpoint import BLOCKS

ROOT = Path(__file__).parent.parent
OF_LABELS = [name for name in BLOCKS if name != "joint-attention"]  # the blocks that take labels
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as support.start has it, for machine.sum_in_order
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers, and what they start, share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


class Words(NamedTuple):
    """As variants/captions.py has them."""

    mean: Tensor  # (B, D)
    tokens: Tensor  # (B, L, D)
    mask: Tensor  # (B, L)


class Captions(nn.Module):
    """The least that embeds captions: y (B, L), 0 for padding -> Words."""

    def __init__(self, num_words: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_words + 1, hidden_size)

    def forward(self, y: Tensor) -> Words:
        tokens, mask = self.embedding_table(y), y > 0
        mean = (tokens * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        return Words(mean, tokens, mask)


def random_dit(seed: int = 0, **sizes) -> DiT:
    """A DiT with every tensor redrawn from N(0, 0.05): a fresh one predicts 0, which would prove nothing."""
    if "block" in sizes:
        sizes["block"] = BLOCKS[sizes["block"]]
    torch.manual_seed(seed)
    model = DiT(**{"hidden_size": 32, "depth": 2, "num_heads": 2, **sizes}).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    return model


WORDS = ["-", "the", "top", "bottom", "left", "right"]  # of load_corners; the first is the padding
CAPTIONS = ["the top left", "top right", "bottom left", "the bottom right"]


def load_corners(data_dir: str, train: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """A data set of four images, each a white square in one corner, and of captions that say which."""
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    for i, (row, column) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        images[i, 0, row : row + 4, column : column + 4] = 255
    return images, torch.tensor([parse_caption(caption, WORDS, 3) for caption in CAPTIONS]), WORDS


def run(script: str, *flags: object, **env: str) -> subprocess.CompletedProcess:
    """`python SCRIPT FLAGS` at the repository's root, as a user does it."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)


def assert_one_line_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """One clear line on stderr with these words in it, and a non-zero exit status."""
    assert result.returncode != 0, result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory) -> Path:
    """A data folder in which the glyphs are cached."""
    folder = tmp_path_factory.mktemp("data")
    load_dataset("glyphs", str(folder))
    return folder


@pytest.fixture(scope="session")
def pictures_dir(tmp_path_factory) -> Path:
    """A folder of 3 classes of 12 colour pictures, 20 x 16 pixels, each its class's colour with some noise."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name, colour in (("red fox", (200, 60, 30)), ("frog", (40, 180, 60)), ("whale", (30, 60, 190))):
        (folder / name).mkdir()
        for i in range(12):
            noise = torch.randint(-20, 21, (16, 20, 3), generator=generator)
            pixels = (torch.tensor(colour) + noise).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def tiny_vae(**options) -> torch.nn.Module:
    """A tiny AutoencoderKL of random weights: latents (N, 4, h, w) -> images (N, 3, 2h, 2w)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return AutoencoderKL(**{**blocks, "block_out_channels": (8, 8), "norm_num_groups": 4, **options})


@pytest.fixture(scope="session")
def vae_dir(tmp_path_factory) -> Path:
    """The folder of a tiny_vae."""
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mnist_dir() -> str:
    folder = os.environ.get("DATA_DIR", "data")
    if not all((Path(folder) / "MNIST" / "raw" / name).exists() for name in MNIST_FILES):
        pytest.skip(f"the real MNIST is not in {folder}: name its folder in DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def read_digits(mnist_dir):
    """A classifier: images (N, 1, 28, 28) in [-1, 1] -> the label of the nearest training digit of each."""
    data = load_dataset("mnist", mnist_dir)
    digits = normalize(data.images).flatten(1)
    return lambda images: data.labels[torch.cdist(images.flatten(1), digits).argmin(1)]


def assert_same_in_bf16(model: DiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> None:
    """Nearly the same output, and no warning, by autocast and with weights of bf16, which the model has afterwards."""
    expected = model(x, t, y)
    with warnings.catch_warnings(action="error"):
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x, t, y)
        whole = model.bfloat16()(x.bfloat16(), t, y)
    for out in (cast, whole):
        assert out.dtype == torch.bfloat16 and 0 < relative_error(out.float(), expected) < 0.02


def assert_compiles_to_one_graph(model: DiT, *batch: torch.Tensor) -> None:
    """Traced with its backward pass, without a break; code is not generated, which takes a minute."""
    torch._dynamo.reset()  # what it has seen of other shapes would make sizes symbols, which isqrt does not take
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(*batch).square().mean().backward()
    assert relative_error(compiled(*batch), model(*batch)) < 1e-5
