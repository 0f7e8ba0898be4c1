"""The pictures: what stands where in a grid, a strip and an animation, for any number of channels."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import denormalize, normalize
from support.errors import UserError
from support.pictures import (
    by_label,
    frames_shown,
    letters,
    mosaic,
    named,
    save_gif,
    save_png,
    save_png_dir,
    save_strip,
    shortened,
)

BORDER = [64, 64, 64]


def bytes_of(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_coloured_images_stand_row_by_row(channels):
    images = bytes_of(5, channels, 4, 4)
    picture = mosaic(normalize(images), columns=2)
    assert picture.shape == (3 * 5 + 1, 2 * 5 + 1, 3) and picture.dtype == np.uint8
    for i, image in enumerate(images):
        top, left = i // 2 * 5 + 1, i % 2 * 5 + 1
        expected = image.permute(1, 2, 0).expand(-1, -1, 3).numpy()
        assert (picture[top : top + 4, left : left + 4] == expected).all()
    for line in (
        *picture[::5],
        *picture.swapaxes(0, 1)[::5],
        picture[11:, 6:].reshape(-1, 3),
    ):  # the last place is empty
        assert (line == BORDER).all()


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_of_other_channels_are_shown_channel_by_channel(channels):
    images = bytes_of(3, channels, 4, 4)
    picture = mosaic(normalize(images), columns=2)
    assert picture.shape == (2 * 5 + 1, 2 * channels * 5 + 1, 3)
    for i, image in enumerate(images):
        for c, channel in enumerate(image):
            top, left = i // 2 * 5 + 1, (i % 2 * channels + c) * 5 + 1
            assert (picture[top : top + 4, left : left + 4] == channel.unsqueeze(2).numpy()).all()


def test_one_image_alone_has_no_border():
    image = bytes_of(1, 3, 4, 4)
    assert (mosaic(normalize(image), columns=9) == image[0].permute(1, 2, 0).numpy()).all()


def test_a_picture_of_no_numbers_is_none(tmp_path):
    x = torch.zeros(2, 1, 4, 4)
    x[1, 0, 0, 0] = float("nan")
    for save, *content in ((save_png, x, tmp_path / "a", 2), (save_strip, {0: x}, [0, 1], tmp_path / "a")):
        with pytest.raises(UserError, match="not finite"):
            save(*content)
    with pytest.raises(UserError, match="not finite"):
        save_gif([x], tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_frames_shown_are_few_evenly_spaced_and_end_at_the_image():
    for steps in range(1, 300):
        for most in (13, 50):
            shown = frames_shown(steps, most)
            gaps = [b - a for a, b in zip(shown, shown[1:])]
            assert shown[0] == 0 and shown[-1] == steps and len(shown) <= most
            assert len(set(gaps[1:])) <= 1 and 0 < gaps[0] <= max(gaps)
    assert frames_shown(12, 13) == list(range(13)) and frames_shown(1000, 13) == list(range(0, 1001, 100))


def strip_of(frames, labels, folder):
    """A strip as it was written, (height, width, 3), and the left, top, right and bottom of its images."""
    save_strip(frames, labels, folder / "strip.png")
    strip = np.array(Image.open(folder / "strip.png"))
    rows, columns = (strip == BORDER).all(2).nonzero()
    top, left = rows[0], columns[0]  # above the images there is no text
    return strip, (left, top, columns[rows == top][-1] + 1, rows[columns == left][-1] + 1)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size, zoom", [(4, 12), (28, 2), (100, 1)])
def test_the_images_of_a_strip_are_a_mosaic_of_squares_with_numbers_at_their_middle(channels, size, zoom, tmp_path):
    frames = {step: normalize(bytes_of(2, channels, size, size)) for step in (0, 10)}
    strip, (left, top, right, bottom) = strip_of(frames, [7, 3], tmp_path)
    images = torch.stack([x[i] for i in range(2) for x in frames.values()])
    assert (strip[top:bottom, left:right] == mosaic(images, 2).repeat(zoom, 0).repeat(zoom, 1)).all()
    ink = strip.min(2) < 128
    column, row = (right - left) / 2, (bottom - top) / 2
    for i in range(2):  # the first line below holds the steps
        places = ink[bottom : bottom + letters(14).size + 7, round(left + i * column) : round(left + (i + 1) * column)]
        middle = places.any(0).nonzero()[0].mean()
        assert abs(middle - column / 2) < 2 + zoom
    for i in range(2):
        places = ink[round(top + i * row) : round(top + (i + 1) * row), left - 24 : left]
        middle = places.any(1).nonzero()[0].mean()
        assert abs(middle - row / 2) < 2 + zoom


def test_the_text_beside_large_images_is_large(tmp_path):
    heights = []
    for size in (32, 256):
        strip, (*_, bottom) = strip_of(dict(enumerate(torch.zeros(2, 1, 3, size, size))), [207], tmp_path)
        heights.append((strip[bottom:].min(2) < 128).any(1).sum())  # of what is written below
    assert heights[1] > 3 * heights[0]


NAMES = ["T-shirt/top", "M" * 50, "it is $\\foo$", "\u82b1\u306e\u5199\u771f", "two\nlines", "\udcff"]
CAPTION = "a thick three left of a thick seven"


@pytest.mark.parametrize("rows, columns", [(1, 2), (1, 13), (2, 2), (2, 8), (6, 13), (6, 3)])
@pytest.mark.parametrize("names", [NAMES, [CAPTION] * 6, list("012345")])
def test_all_text_of_a_strip_is_whole(rows, columns, names, tmp_path):
    frames = {i: torch.zeros(rows, 1, 8, 8) for i in range(columns)}
    strip, (left, top, _, bottom) = strip_of(frames, names[:rows], tmp_path)
    for edge in (strip[0], strip[-1], strip[:, 0], strip[:, -1]):
        assert (edge == 255).all()
    height = (bottom - top) / rows
    for i in range(rows):
        place = strip[round(top + i * height) : round(top + (i + 1) * height), :left]
        assert (place.min(2) < 128).any()


def test_a_long_name_is_shortened_to_one_line():
    assert shortened("Ankle boot") == "Ankle boot" and shortened("a" * 36) == "a" * 36
    assert (
        shortened("a" * 37) == "a" * 35 + "…" and shortened("tench, Tinca tinca, a fish", 21) == "tench, Tinca tinca,…"
    )
    assert shortened(longest := "a thick three left of a thick seven") == longest
    assert shortened("a\nb") == r"a\nb"


def test_the_rows_of_a_grid_are_named_beside_the_picture_that_it_is_without(tmp_path):
    images = normalize(bytes_of(5, 3, 16, 16))
    plain = Image.fromarray(mosaic(images, 2))
    save_png(images, tmp_path / "plain.png", 2)
    assert Image.open(tmp_path / "plain.png").tobytes() == plain.tobytes()
    save_png(images, tmp_path / "named.png", 2, ["cat"] * 4 + ["a long name"])
    picture = Image.open(tmp_path / "named.png")
    margin = picture.width - plain.width
    assert picture.height == plain.height and margin > 40
    assert picture.crop((margin, 0, picture.width, picture.height)).tobytes() == plain.tobytes()
    text = np.array(picture.convert("L"))[:, :margin] > 160
    written = [text[1 + 17 * row : 17 * (row + 1)] for row in range(3)]
    assert [bool(row.any()) for row in written] == [True, False, True]
    assert written[0].any(0).argmax() > written[2].any(0).argmax() > 0  # to the right, beside the images; none is cut
    for row in (written[0], written[2]):
        assert 3 < row.any(1).nonzero()[0].mean() < 13  # in the middle of its row


@pytest.mark.parametrize("count, labels, rows", [(16, 16, 16), (25, 21, None), (100, 40, 40), (100, 41, None)])
def test_labels_so_many_that_a_column_would_come_of_it_are_left_out(count, labels, rows, tmp_path):
    images, columns = torch.zeros(count, 1, 16, 16), round(count**0.5)
    save_png(images, tmp_path / "a.png", columns, [str(i % labels) for i in range(count)])
    assert Image.open(tmp_path / "a.png").height == (rows or columns) * 17 + 1


@pytest.mark.parametrize("names", [NAMES, ["x"] * 6])
def test_names_of_a_grid_are_never_cut(names):
    names = [shortened(name) for name in names]
    picture = named(Image.new("RGB", (10, 6 * 40 + 1)), names, letters(13), "white", "black")
    text = np.array(picture.convert("L"))[:, :-10] > 160
    assert text.any() and not text[:, 0].any() and not text[:, -1].any()


def test_images_go_into_rows_of_a_label_each_with_gaps_as_grey_as_borders():
    images = normalize(bytes_of(7, 1, 4, 4))
    rows, names = by_label(images, ["b", "a", "b", "b", "a", "b", "b"], columns=3)
    assert names == ["b", "", "a"]
    order = [0, 2, 3, 5, 6, None, 1, 4, None]
    assert len(rows) == 9
    for image, i in zip(rows, order):
        assert torch.equal(image, images[i]) if i is not None else (denormalize(image) == BORDER[0]).all()
    rows, names = by_label(images, list("abcdefg"), columns=3)
    assert torch.equal(rows, images) and names == list("abcdefg")  # a column


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_an_animation_shows_each_frame(channels, tmp_path):
    frames = [torch.full((2, channels, 4, 4), level) for level in (-1.0, 0.0, 1.0)]
    save_gif(frames, tmp_path / "a.gif")
    gif = Image.open(tmp_path / "a.gif")
    tiles = 2 * (1 if channels in (1, 3) else channels)
    assert gif.n_frames == 3 and gif.size == (3 * (tiles * 5 + 1), 3 * 6)
    for i, level in enumerate((0, 128, 255)):
        gif.seek(i)
        assert abs(np.array(gif.convert("L"))[8, 8].item() - level) <= 1  # inside the first image


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_pngs_holds_the_images_themselves(channels, tmp_path):
    images = bytes_of(12, channels, 5, 4)
    names = ["cat", "a/b: c", "Ü" * 300]
    for folder in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        save_png_dir(normalize(images), 4 * names, folder)
        paths = sorted(folder.iterdir())
        assert [path.name for path in paths[:2]] == ["000000-cat.png", "000001-a_b_c.png"] and len(paths) == 12
        for path, image in zip(paths, images):
            picture = Image.open(path)
            assert picture.mode == ("L" if channels == 1 else "RGB")
            assert (np.array(picture).reshape(5, 4, channels) == image.permute(1, 2, 0).numpy()).all()
    save_png_dir(normalize(images), ["7"] * 12, tmp_path / "numbers")
    assert (tmp_path / "numbers" / "000011-7.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new", "numbers"]


def test_a_folder_of_pngs_is_whole_or_not_there(tmp_path, monkeypatch):
    x = normalize(bytes_of(12, 3, 4, 4))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for folder, images, message in (
        (tmp_path / "full", x, "full is not empty; give a new folder"),
        (tmp_path / "full" / "a", x, "is a file"),
        (tmp_path / "new", x[:, :2], "images of 2 channels are no PNGs"),
        (tmp_path / "new", x / 0, "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            save_png_dir(images, ["0"] * 12, folder)
    saved, save = [], Image.Image.save

    def fill_up(self, path):
        if len(saved) == 5:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(self, path)

    monkeypatch.setattr(Image.Image, "save", fill_up)
    with pytest.raises(UserError, match="cannot write .*new .No space left on device"):
        save_png_dir(x, ["0"] * 12, tmp_path / "new")
    assert len(saved) == 5 and [path.name for path in tmp_path.iterdir()] == ["full"]


def test_pytorch_fid_reads_a_folder_of_pngs(tmp_path):
    fid_score = pytest.importorskip("pytorch_fid.fid_score", reason="pytorch-fid is not installed: pip install it")
    images = bytes_of(60, 1, 8, 8)
    save_png_dir(normalize(images), ["0"] * 60, tmp_path / "a")
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return [x.mean((2, 3), keepdim=True)]

    mean, _ = fid_score.compute_statistics_of_path(str(tmp_path / "a"), Network(), 50, 3, "cpu", num_workers=0)
    assert torch.equal((torch.cat(seen) * 255).round().byte(), images.expand(-1, 3, -1, -1))  # in order
    assert mean == pytest.approx(images.float().mean().item() / 255, abs=1e-5)


def test_clean_fid_reads_a_folder_of_pngs(tmp_path):
    fid = pytest.importorskip("cleanfid.fid", reason="clean-fid is not installed: pip install it")
    images = bytes_of(10, 3, 299, 299)  # the size that it would resize to
    save_png_dir(normalize(images), ["0"] * 10, tmp_path / "a")
    seen = []

    def network(x):
        seen.append(x)
        return x.mean((2, 3))

    features = fid.get_folder_features(str(tmp_path / "a"), network, num_workers=0, device="cpu", verbose=False)
    assert features.shape == (10, 3)
    assert torch.equal(torch.cat(seen).round().byte(), images)
