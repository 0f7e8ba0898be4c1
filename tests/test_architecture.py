"""docs/architecture.py: the picture of the network says what the network is."""

from itertools import combinations

import pytest
from conftest import ROOT, random_dit
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from config import Config
from docs import architecture
from support.checkpoint import load_model


@pytest.fixture(scope="module")
def shipped():
    return architecture.draw(*load_model(ROOT / "model.pth"))


def test_shapes_are_those_of_the_network(tmp_path):
    sizes = dict(image_size=32, patch_size=8, in_channels=3, hidden_size=64, depth=2, num_heads=4, learn_sigma=True)
    figure = architecture.draw(random_dit(**sizes), Config(**sizes, prediction="v", sample_steps=1))
    words = {"3×32×32", "16 patches of 8×8", "16×192", "16×384", "16×64", "6×64", "MLP\n16×256\ninside"}
    words |= {"attention\n4 heads\nof 16", "One of the 2 blocks, opened: adaLN-Zero", "block 2"}
    words |= {"label table, 11×64", "its guess of $v$"}
    assert words < set(architecture.words_of(figure)) and "block 3" not in architecture.words_of(figure)
    architecture.save(figure, tmp_path / "network.png")
    with Image.open(tmp_path / "network.png") as picture:
        assert picture.size == (1620, 972)
        assert len(picture.convert("L").getcolors()) > 20


def test_the_committed_picture_is_of_the_shipped_weights(shipped):
    with Image.open(architecture.PICTURE) as picture:
        words = picture.info["Description"].split("\n")
    assert words == "\n".join(architecture.words_of(shipped)).split("\n"), "draw it again: python -m docs.architecture"
    assert architecture.PICTURE.stat().st_size < 150_000


def test_no_words_overlap(shipped):
    renderer = FigureCanvasAgg(shipped).get_renderer()
    places = {text: text.get_window_extent(renderer) for text in shipped.axes[0].texts if text.get_text()}
    assert len(places) > 40
    for place in places.values():
        assert shipped.bbox.count_contains(place.corners()) == 4
    crossing = [(a.get_text(), b.get_text()) for a, b in combinations(places, 2) if places[a].overlaps(places[b])]
    assert not crossing
