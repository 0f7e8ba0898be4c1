"""One picture of the whole network, one block of it drawn open: `python -m docs.architecture`, some seconds.

Writes docs/architecture.png, after the DiT paper's Figure 3, with the numbers of the shipped weights: every shape is
read from the network as it answers, every image is one that it has seen or drawn. Coordinates are about the pixels
that the picture has on a page 900 wide.
"""

import io
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from config import ROOT, Config
from dit import DiT
from inference import draw_images
from support.checkpoint import build_process, load_model
from support.command_line import run_script
from support.files import writing

PICTURE = Path(__file__).with_suffix(".png")
WIDTH, HEIGHT = 900, 540
PATH, BUS, TOP = 342, 434, 512  # heights of the way from image to image, of what brings c to the blocks, of t and y
BLOCKS_FROM, BLOCKS_TO = 482, 627
INK, LINE, PAPER = "#2b3440", "#66717f", "#f5f7fa"
GREY, BLUE, GREEN, SAND = (  # face and edge: layers, attention, MLP, and all that comes from t and y
    ("#ebeef2", "#8a95a3"),
    ("#d9e7f6", "#4f7cac"),
    ("#dcefe1", "#579a6c"),
    ("#fbe8cc", "#c08a3e"),
)
LABEL, TIME = 3, 500  # of the digit that is shown


def times(*sizes: int) -> str:
    """A shape in words: 16×128."""
    return "×".join(map(str, sizes))


@torch.no_grad()
def shapes_of(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> tuple[dict[str, str], Tensor]:
    """What leaves each part of the network for one image, without the batch, by the part's name; and its answer."""
    shapes = {}
    hooks = [
        part.register_forward_hook(lambda *call, name=name: shapes.update({name: times(*call[2].shape[1:])}))
        for name, part in model.named_modules()
    ]
    out = model(x, t, y)
    for hook in hooks:
        hook.remove()
    patch = model.x_embedder.proj.weight[0].numel()
    return shapes | {"input": times(*x.shape[1:]), "patches": times(model.num_tokens, patch)}, out


def write(axes: Axes, x: float, y: float, text: str, size: float = 12, **style: Any) -> None:
    """Words centred at a place; sizes, like places, are in units of the picture."""
    style = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.25, **style}
    axes.text(x, y, text, fontsize=0.72 * size, **style)


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, kind: tuple = GREY, **style) -> None:
    """A rounded box whose left side is at x and whose middle is at height y."""
    face, edge = kind
    shape = dict(boxstyle="round,pad=0,rounding_size=5", facecolor=face, edgecolor=edge, linewidth=0.9, zorder=3)
    axes.add_patch(FancyBboxPatch((x, y - height / 2), width, height, **shape))
    write(axes, x + width / 2, y, text, zorder=4, **style)


def line(axes: Axes, *points: tuple[float, float], text: str = "", color: str = LINE, tip: bool = True) -> None:
    """A line through points, with an arrow's tip at its end; a shape stands above its first part."""
    axes.plot(*zip(*points), color=color, linewidth=1.1, solid_joinstyle="round", zorder=2)
    if tip:
        arrow = dict(
            arrowstyle="-|>,head_width=0.17,head_length=0.32", color=color, linewidth=1.1, shrinkA=0, shrinkB=0
        )
        axes.annotate("", points[-1], points[-2], arrowprops=arrow, zorder=2)
    (left, y), (right, _) = points[:2]
    write(axes, (left + right) / 2, y + 10, text, size=11.5)


def plus(axes: Axes, x: float, y: float, kind: tuple = GREY) -> None:
    """A sum."""
    axes.plot(x, y, "o", markersize=12, markerfacecolor="white", markeredgecolor=kind[1], zorder=3)
    axes.plot(x, y, "+", markersize=7, markeredgecolor=kind[1], markeredgewidth=1.2, zorder=4)


def picture(axes: Axes, x: float, y: float, width: float, height: float, values: Tensor, **style: Any) -> None:
    """A tensor (rows, columns) as an image whose left side is at x and whose middle is at height y."""
    extent = (x, x + width, y - height / 2, y + height / 2)
    axes.imshow(values.detach().numpy(), extent=extent, interpolation="nearest", aspect="auto", zorder=3, **style)
    axes.add_patch(Rectangle(extent[::2], width, height, fill=False, edgecolor="#c6cdd6", linewidth=0.6, zorder=4))


def grey(axes: Axes, x: float, y: float, size: float, image: Tensor) -> None:
    """The first channel of images (1, C, H, W) in [-1, 1], as a square."""
    picture(axes, x, y, size, size, image[0, 0], cmap="gray", vmin=-1, vmax=1)


def blocks_at(depth: int) -> tuple[list[float], float]:
    """Where the left side of each block stands, and how wide it is."""
    pitch = (BLOCKS_TO - BLOCKS_FROM + 7) / depth
    return [BLOCKS_FROM + pitch * i for i in range(depth)], pitch - 7


def draw_tokens(axes: Axes, model: DiT, shapes: dict[str, str], x: Tensor) -> None:
    """From the image to the first block."""
    p, side = model.patch_size, model.image_size // model.patch_size
    grey(axes, 8, PATH, 76, x)
    write(axes, 46, PATH - 54, f"$x_t$ at $t$ = {TIME}")
    line(axes, (84, PATH), (148, PATH), text=shapes["input"])
    pitch = 92 / side
    for row in range(side):
        for column in range(side):
            patch = x[:, :, p * row : p * (row + 1), p * column : p * (column + 1)]
            grey(axes, 151 + pitch * column, PATH + 47 - pitch * (row + 0.5), 0.86 * pitch, patch)
    write(axes, 196, PATH - 60, f"{model.num_tokens} patches of {times(p, p)}")
    line(axes, (242, PATH), (290, PATH), text=shapes["patches"])
    box(axes, 290, PATH, 48, 40, "linear")
    line(axes, (338, PATH), (352, PATH))
    colours = LinearSegmentedColormap.from_list("", [BLUE[1], "white", SAND[1]])
    picture(axes, 353, PATH, 34, 84, model.x_embedder(x)[0].T, cmap=colours, vmin=-1.2, vmax=1.2)
    write(axes, 370, PATH - 56, "tokens")
    line(axes, (388, PATH), (406, PATH))
    plus(axes, 414, PATH)
    picture(axes, 350, PATH + 92, 128, 32, model.pos_embed[0], cmap=colours, vmin=-1.2, vmax=1.2)
    write(axes, 414, PATH + 121, "position embedding")
    line(axes, (414, PATH + 76), (414, PATH + 8))
    write(axes, 442, PATH + 56, times(*model.pos_embed.shape[1:]), size=11.5)
    line(axes, (422, PATH), (BLOCKS_FROM, PATH), text=shapes["x_embedder"])


def draw_blocks(axes: Axes, model: DiT, shapes: dict[str, str], out: Tensor, answer: str) -> None:
    """From the first block to the network's answer."""
    depth = len(model.blocks)
    lefts, width = blocks_at(depth)
    for i, left in enumerate(lefts):
        box(axes, left, PATH, width, 116, f"block {i + 1}", BLUE if i == depth - 1 else GREY, rotation=90)
        line(axes, (left + width / 2, BUS), (left + width / 2, PATH + 59), color=SAND[1])
        if i < depth - 1:
            line(axes, (left + width, PATH), (left + width + 7, PATH), tip=False)
    line(axes, (BLOCKS_TO, PATH), (684, PATH), text=shapes[f"blocks.{depth - 1}"])
    box(axes, 684, PATH, 56, 84, "final\nlayer")
    line(axes, (712, BUS), (712, PATH + 43), color=SAND[1])
    line(axes, (740, PATH), (814, PATH), text=shapes["final_layer"])
    write(axes, 775, PATH - 12, "unpatchify", size=11.5)
    grey(axes, 816, PATH, 76, out)
    write(axes, 854, PATH - 54, answer)


def draw_conditioning(axes: Axes, model: DiT, shapes: dict[str, str]) -> None:
    """From t and y to c, which goes to each block and to the final layer."""
    lefts, width = blocks_at(len(model.blocks))
    middle = (BLOCKS_FROM + BLOCKS_TO) / 2
    write(axes, 258, TOP, f"$t$ = {TIME}", ha="right")
    line(axes, (264, TOP), (290, TOP), color=SAND[1])
    box(axes, 290, TOP, 104, 32, "sines, cosines", SAND)
    line(axes, (394, TOP), (432, TOP), text=str(model.t_embedder.frequency_embedding_size), color=SAND[1])
    box(axes, 432, TOP, 48, 32, "MLP", SAND)
    line(axes, (480, TOP), (middle - 8, TOP), text=shapes["t_embedder"], color=SAND[1])
    plus(axes, middle, TOP, SAND)
    line(axes, (652, TOP), (middle + 8, TOP), text=shapes["y_embedder"], color=SAND[1])
    box(axes, 652, TOP, 128, 32, f"label table, {times(*model.y_embedder.embedding_table.weight.shape)}", SAND)
    line(axes, (806, TOP), (780, TOP), color=SAND[1])
    write(axes, 812, TOP, f"$y$ = {LABEL}", ha="left")
    line(axes, (middle, TOP - 8), (middle, BUS), color=SAND[1], tip=False)
    line(axes, (lefts[0] + width / 2, BUS), (712, BUS), color=SAND[1], tip=False)
    write(axes, middle + 10, BUS + 36, f"$c$, {shapes['t_embedder']}", ha="left", size=11.5)


def draw_opened(axes: Axes, model: DiT, shapes: dict[str, str]) -> None:
    """The last block, drawn open, at the bottom."""
    depth, block = len(model.blocks), model.blocks[-1]
    lefts, width = blocks_at(depth)
    frame = dict(boxstyle="round,pad=0,rounding_size=7", facecolor=PAPER, edgecolor="#c6cdd6", linewidth=0.9, zorder=1)
    axes.add_patch(FancyBboxPatch((6, 6), WIDTH - 12, 228, **frame))
    light = ([lefts[-1], BLOCKS_TO, WIDTH - 10, 10], [PATH - 58, PATH - 58, 234, 234])
    axes.fill(*light, color="#e9eef4", linewidth=0, zorder=0)
    write(axes, 20, 215, f"One of the {depth} blocks, opened: adaLN-Zero", ha="left", fontweight="bold", size=12.5)

    y, bus = 131, 58
    write(axes, 22, bus, "$c$", ha="left")
    line(axes, (36, bus), (60, bus), color=SAND[1])
    box(axes, 60, bus, 44, 32, "SiLU", SAND)
    line(axes, (104, bus), (120, bus), color=SAND[1])
    box(axes, 120, bus, 50, 32, "linear", SAND)
    write(axes, 312, bus + 10, times(block.num_vectors, shapes["t_embedder"]), size=11.5)
    zero = "Zero: this linear layer starts at 0, so all gates are closed and a fresh block changes nothing."
    write(axes, 120, 25, zero, ha="left", size=11.5, color=LINE)

    num_heads = block.attn.num_heads
    heads = f"attention\n{num_heads} heads\nof {block.attn.proj.in_features // num_heads}"
    inside = f"MLP\n{shapes[f'blocks.{depth - 1}.mlp.fc1']}\ninside"
    write(axes, 46, y + 10, shapes["x_embedder"], size=11.5)
    x = 18
    for number, start, text, kind in ((1, 74, heads, BLUE), (2, 488, inside, GREEN)):
        line(axes, (x, y), (start, y), tip=False)
        x, middles = start, []
        steps = (
            ("Layer\nNorm", GREY, 52),
            (f"× (1 + scale$_{number}$)\n+ shift$_{number}$", SAND, 92),
            (text, kind, 86),
            (f"× gate$_{number}$", SAND, 58),
        )
        for text, kind, width in steps:
            line(axes, (x, y), (x + 17, y))
            box(axes, x + 17, y, width, 60, text, kind)
            middles.append(x + 17 + width / 2)
            x += 17 + width
        line(axes, (x, y), (x + 17, y))
        x += 25
        plus(axes, x, y)
        line(axes, (start, y), (start, y + 48), (x, y + 48), (x, y + 8))
        for at in (middles[1] - 15, middles[1] + 15, middles[3]):
            line(axes, (at, bus), (at, y - 31), color=SAND[1])
    line(axes, (170, bus), (middles[3], bus), color=SAND[1], tip=False)
    line(axes, (x + 8, y), (WIDTH - 12, y))


def draw(model: DiT, config: Config) -> Figure:
    """The picture, of a network of adaLN-Zero blocks and of a digit that it draws of LABEL."""
    y, t = torch.full((1,), LABEL), torch.full((1,), TIME)
    generator = torch.Generator().manual_seed(config.seed)
    digit = draw_images(model, config, y, generator)
    x = build_process(config).q_sample(digit, t, torch.randn(digit.shape, generator=generator))
    shapes, out = shapes_of(model, x, t, y)
    answer = {"x0": "$x_0$", "noise": "the noise", "v": "$v$"}[config.prediction]
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    draw_tokens(axes, model, shapes, x)
    draw_blocks(axes, model, shapes, out, f"its guess of {answer}")
    draw_conditioning(axes, model, shapes)
    draw_opened(axes, model, shapes)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axes.axis("off")
    return figure


def words_of(figure: Figure) -> list[str]:
    """All that is written in a figure; kept in the file too, so that a test can tell whether it is out of date."""
    return sorted({text.get_text() for text in figure.axes[0].texts} - {""})


def save(figure: Figure, path: str | Path) -> None:
    """A PNG of at most 256 colours, half as large as it would be with all."""
    pixels, words = io.BytesIO(), PngInfo()
    figure.savefig(pixels, format="png", dpi=180)
    words.add_itxt("Description", "\n".join(words_of(figure)))
    with writing(path) as file:
        Image.open(pixels).convert("RGB").quantize(256).save(file, format="PNG", pnginfo=words, optimize=True)


def main() -> None:
    save(draw(*load_model(ROOT / "model.pth")), PICTURE)


if __name__ == "__main__":
    run_script(main)
