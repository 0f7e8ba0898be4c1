"""The paper's sizes and block designs: its own counts of parameters and Gflops (Table 4, section 5)."""

import pytest
import torch

from config import PAPER_MODELS
from dit import DiT
from support.checkpoint import BLOCKS
from support.speed import count_gflops

# Table 4: million parameters and Gflops of one forward pass at 32 x 32 x 4.
TABLE_4 = {
    "DiT-S/8": (33, 0.36),
    "DiT-S/4": (33, 1.41),
    "DiT-S/2": (33, 6.06),
    "DiT-B/8": (131, 1.42),
    "DiT-B/4": (130, 5.56),
    "DiT-B/2": (130, 23.01),
    "DiT-L/8": (459, 5.01),
    "DiT-L/4": (458, 19.70),
    "DiT-L/2": (458, 80.71),
    "DiT-XL/8": (676, 7.39),
    "DiT-XL/4": (675, 29.05),
    "DiT-XL/2": (675, 118.64),
}


def count(name: str, **options) -> tuple[int, float]:
    """Parameters and Gflops of a size, on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = DiT(image_size=32, in_channels=4, num_classes=1000, learn_sigma=True, **PAPER_MODELS[name], **options)
    return sum(p.numel() for p in model.parameters()), count_gflops(model)


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_parameters_and_gflops_are_those_of_table_4(name):
    parameters, gflops = count(name)
    millions, expected = TABLE_4[name]
    assert abs(parameters / 1e6 - millions) < 1
    assert abs(gflops - expected) <= max(0.005 * expected, 0.005)


def test_parameters_of_xl():
    assert count("DiT-XL/2")[0] == 675_129_632


@pytest.mark.parametrize(
    "block, gflops", [("in-context", 119.4), ("cross-attention", 137.6), ("adaLN", 118.6), ("adaLN-Zero", 118.6)]
)
def test_gflops_of_the_block_designs_are_those_of_the_paper(block, gflops):
    assert count("DiT-XL/2", block=BLOCKS[block])[1] == pytest.approx(gflops, abs=0.1)


def test_the_modern_block_has_the_parameters_and_gflops_of_the_papers():
    """But for the position embedding, two norms a block, and the width of its MLP, in eights."""
    for name in ("DiT-S/2", "DiT-B/4", "DiT-L/8", "DiT-XL/2"):
        expected, gflops = count(name)
        assert count(name, block=BLOCKS["modern"]) == (pytest.approx(expected, 3e-3), pytest.approx(gflops, 1e-3))
